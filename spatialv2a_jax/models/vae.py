"""Magnitude-preserving 1-D convolutional VAE between log-mels and latents (one ear at a time).

The architecture is that of the public MMAudio project's audio VAE; the arithmetic that keeps
activations at unit magnitude is EDM2's (Karras et al., arXiv 2312.02696). No layer has a bias.

Axes: b clip (or clip and ear), m mel bin, n mel frame, t latent frame (n / 2), c latent channel,
d width, k kernel tap.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from spatialv2a_jax.models.layers import logical

EPS = 1e-4
_BRANCH = 0.3  # Weight of a residual branch in `mp_sum`.
_CLAMP = 256.0
_LEVELS = (1, 2, 4)
_ENCODER_BLOCKS, _DECODER_BLOCKS = 2, 3


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of a VAE.

  Attributes:
    n_mels: mel bins.
    latent_channels: channels of the latent.
    width: channels of the first level; the others have two and four times as many (384 and 512 in
      MMAudio's 16 kHz and 44.1 kHz models, 32 in the tiny one).
    folded: whether kernels are already normalised, as a converter leaves them. If not, they are
      normalised at each call, so that training may change their magnitude freely.
  """

  n_mels: int = 80
  latent_channels: int = 20
  width: int = 32
  folded: bool = False


class Vae(NamedTuple):
  """Functions of one VAE; parameters are a plain nested dict.

  Attributes:
    init: key -> boxed parameters. `frozen/data_mean` and `frozen/data_std` [m] start at 0 and 1.
    encode: (params, mel_bmn with even n) -> mean_btc, std_btc of the posterior.
    decode: (params, z_btc) -> mel_bmn with n = 2 t, in the units of the input of `encode`.
  """

  init: Callable[[Array], Any]
  encode: Callable[[Any, Array], tuple[Array, Array]]
  decode: Callable[[Any, Array], Array]


def normalize(x: Array, axes: tuple[int, ...] = (-1,)) -> Array:
  """Divides by the root mean square over `axes`, plus 1e-4."""
  square = jnp.mean(jnp.square(x.astype(jnp.float32)), axes, keepdims=True)
  return (x / (EPS + jnp.sqrt(square))).astype(x.dtype)


def fold(kernel: Array) -> Array:
  """Returns a kernel [k, in, out] with (nearly) unit norm for each output, as EDM2's layers use."""
  fan_in = kernel.shape[0] * kernel.shape[1]
  return normalize(kernel.astype(jnp.float32), (0, 1)) / math.sqrt(fan_in)


def mp_silu(x: Array) -> Array:
  """SiLU scaled so that unit-variance input gives unit-variance output."""
  return nn.silu(x) / 0.596


def mp_sum(a: Array, b: Array) -> Array:
  """Magnitude-preserving sum with weight 0.3 on the second term."""
  return ((1 - _BRANCH) * a + _BRANCH * b) / math.sqrt((1 - _BRANCH) ** 2 + _BRANCH**2)


def conv(x_bnd: Array, kernel: Array) -> Array:
  """Convolves with zero padding to equal length."""
  return jax.lax.conv_general_dilated(
    x_bnd, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
  )


class Conv(nn.Module):
  """Bias-free convolution with normalised weights and an optional gain."""

  features: int
  taps: int
  folded: bool
  axes: tuple[str | None, ...] = (None, None, "width")

  @nn.compact
  def __call__(self, x_bnd: Array, gain: Array | float = 1.0) -> Array:
    """Returns [b, n, features]."""
    shape = (self.taps, x_bnd.shape[-1], self.features)
    kernel = self.param("kernel", logical(nn.initializers.normal(1.0), *self.axes), shape)
    kernel = kernel if self.folded else fold(kernel)
    return conv(x_bnd, (kernel * gain).astype(x_bnd.dtype))


class Block(nn.Module):
  """Two convolutions beside a skip that sees the pixel-normalised input; output clamped."""

  features: int
  folded: bool

  @nn.compact
  def __call__(self, x_bnd: Array) -> Array:
    """Returns [b, n, features]."""
    x = normalize(x_bnd)
    h = Conv(self.features, 3, self.folded, name="conv1")(mp_silu(x))
    h = Conv(self.features, 3, self.folded, name="conv2")(mp_silu(h))
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, self.folded, name="nin_shortcut")(x)
    return mp_sum(x, h)


class Attention(nn.Module):
  """One head over all frames; q, k and v are pixel-normalised. Channel order is (d, {q, k, v})."""

  folded: bool

  @nn.compact
  def __call__(self, x_btd: Array) -> Array:
    """Returns [b, t, d]."""
    width = x_btd.shape[-1]
    qkv = Conv(3 * width, 1, self.folded, name="qkv")(x_btd)
    q, k, v = jnp.moveaxis(normalize(qkv.reshape(*x_btd.shape, 3), (-2,)), -1, 0)
    scores = jnp.einsum("bqd,bkd->bqk", q, k) / math.sqrt(width)
    h = jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, -1), v)
    return mp_sum(x_btd, Conv(width, 1, self.folded, name="proj_out")(h))


class Middle(nn.Module):
  """Block, attention, block."""

  features: int
  folded: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns [b, t, features], clamped."""
    x = Block(self.features, self.folded, name="block_1")(x)
    x = Attention(self.folded, name="attn_1")(x)
    return _clamp(Block(self.features, self.folded, name="block_2")(x))


class Encoder(nn.Module):
  """Log-mels [b, n, m] to posterior moments [b, n / 2, 2 c]."""

  config: Config

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns means and log-variances, side by side."""
    cfg = self.config
    gain = self.param("learnable_gain", nn.initializers.zeros, ())
    x = Conv(cfg.width, 3, cfg.folded, name="conv_in")(x)
    for level, multiple in enumerate(_LEVELS):
      for i in range(_ENCODER_BLOCKS):
        block = Block(multiple * cfg.width, cfg.folded, name=f"down_{level}_block_{i}")
        x = _clamp(block(x))
      if level == 0:
        x = Conv(cfg.width, 1, cfg.folded, name="down_0_downsample_conv1")(x)
        x = x.reshape(x.shape[0], -1, 2, x.shape[2]).mean(2)
        x = Conv(cfg.width, 1, cfg.folded, name="down_0_downsample_conv2")(x)
    x = Middle(_LEVELS[-1] * cfg.width, cfg.folded, name="mid")(x)
    last = Conv(2 * cfg.latent_channels, 3, cfg.folded, (None, "width", "latent"), name="conv_out")
    return last(mp_silu(x), 1 + gain)


class Decoder(nn.Module):
  """Latents [b, t, c] to log-mels [b, 2 t, m]."""

  config: Config

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns normalised log-mels."""
    cfg = self.config
    gain = self.param("learnable_gain", nn.initializers.zeros, ())
    x = Conv(_LEVELS[-1] * cfg.width, 3, cfg.folded, (None, "latent", "width"), name="conv_in")(x)
    x = Middle(_LEVELS[-1] * cfg.width, cfg.folded, name="mid")(x)
    for level, multiple in reversed(list(enumerate(_LEVELS))):
      for i in range(_DECODER_BLOCKS):
        block = Block(multiple * cfg.width, cfg.folded, name=f"up_{level}_block_{i}")
        x = _clamp(block(x))
      if level == 1:
        x = jnp.repeat(x, 2, axis=1)
        x = Conv(multiple * cfg.width, 3, cfg.folded, name="up_1_upsample_conv")(x)
    last = Conv(cfg.n_mels, 3, cfg.folded, (None, "width", None), name="conv_out")
    return last(mp_silu(x), 1 + gain)


def _clamp(x: Array) -> Array:
  return jnp.clip(x, -_CLAMP, _CLAMP)


def _column(x_m: Array) -> Array:
  return jax.lax.stop_gradient(x_m).reshape(1, 1, -1)


def build(config: Config) -> Vae:
  """Returns the functions of a VAE of the given sizes; lengths are free."""
  encoder, decoder = Encoder(config), Decoder(config)

  def init(key: Array) -> Any:
    mel = jnp.zeros((1, 4, config.n_mels))
    z = jnp.zeros((1, 2, config.latent_channels))
    encoder_key, decoder_key = jax.random.split(key)
    return {
      "encoder": encoder.init(encoder_key, mel)["params"],
      "decoder": decoder.init(decoder_key, z)["params"],
      "frozen": {"data_mean": jnp.zeros(config.n_mels), "data_std": jnp.ones(config.n_mels)},
    }

  def encode(params: Any, mel_bmn: Array) -> tuple[Array, Array]:
    frozen = params["frozen"]
    x = mel_bmn.swapaxes(1, 2)
    x = (x - _column(frozen["data_mean"])) / _column(frozen["data_std"])
    moments = encoder.apply({"params": params["encoder"]}, x)
    mean, log_variance = jnp.split(jnp.asarray(moments), 2, -1)
    return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30, 20))

  def decode(params: Any, z_btc: Array) -> Array:
    frozen = params["frozen"]
    x = jnp.asarray(decoder.apply({"params": params["decoder"]}, z_btc))
    x = x * _column(frozen["data_std"]) + _column(frozen["data_mean"])
    return x.swapaxes(1, 2)

  return Vae(init, encode, decode)
