"""BigVGAN: waveforms from log-mels with anti-aliased periodic activations (arXiv 2206.04658).

One function for both public vocoders that MMAudio uses: version 1 (16 kHz, tanh at the end) and
version 2 (44.1 kHz, clipped, no bias at the end). Weight normalisation is folded into the weights.

Every activation doubles the rate, applies x + sin^2(a x) / b and halves the rate again with a
12-tap Kaiser-windowed sinc. Here the doubled signal exists only as its even and odd samples, each
a six-tap sum of shifted copies, so no interleaving and no depthwise convolution is needed.

Axes: b clip, m mel bin, n mel frame, p sample (of the current rate), d channel, k kernel tap.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatialv2a_jax.models.layers import logical

# pi as a sum whose first parts have few bits, so that small multiples of them are exact.
PI_PARTS = np.float32(3.140625), np.float32(9.675025939941406e-4), np.float32(1.509958e-7)
# Fit of sin(x)^2 / x^2 in powers of x^2 for |x| <= pi / 2; largest error 1e-8.
SERIES = (1.0, -0.33333308, 0.04444318, -0.0031724053, 0.0001393526, -3.631618e-06)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of a vocoder; the defaults are those of version 1 at 16 kHz.

  Attributes:
    n_mels: mel bins.
    width: channels before the first stage; each stage halves them.
    rates: upsampling factor of each stage; their product is the hop.
    kernels: taps of each stage's transposed convolution.
    block_kernels: taps of the parallel residual blocks.
    dilations: of the layers of each residual block.
    bounded: "tanh" or "clip", what keeps the output in -1..1.
    final_bias: whether the last convolution has a bias.
  """

  n_mels: int = 80
  width: int = 1536
  rates: tuple[int, ...] = (4, 4, 2, 2, 2, 2)
  kernels: tuple[int, ...] = (8, 8, 4, 4, 4, 4)
  block_kernels: tuple[int, ...] = (3, 7, 11)
  dilations: tuple[int, ...] = (1, 3, 5)
  bounded: str = "tanh"
  final_bias: bool = True

  def __post_init__(self):
    for name in ("rates", "kernels", "block_kernels", "dilations"):  # JSON knows lists only.
      object.__setattr__(self, name, tuple(getattr(self, name)))


V1_16K = Config()
V2_44K = Config(
  n_mels=128,
  rates=(8, 4, 2, 2, 2, 2),
  kernels=(16, 8, 4, 4, 4, 4),
  bounded="clip",
  final_bias=False,
)


class Vocoder(NamedTuple):
  """Functions of one vocoder.

  Attributes:
    init: key -> boxed parameters.
    waveform: (params, log_mel_bmn) -> audio_bp in -1..1, p = n * hop.
  """

  init: Callable[[Array], Any]
  waveform: Callable[[Any, Array], Array]


@functools.cache
def sinc_filter() -> np.ndarray:
  """Returns the 12 taps of the half-band filter: cutoff 0.25, half-width 0.3, sum one."""
  taps, cutoff, half_width = 12, 0.25, 0.3
  attenuation = 2.285 * (taps // 2 - 1) * np.pi * 4 * half_width + 7.95
  beta = 0.1102 * (attenuation - 8.7)  # Kaiser's rule above 50 dB; the attenuation is 51.02.
  time = np.arange(taps) - taps / 2 + 0.5
  taps_k = np.kaiser(taps, beta) * 2 * cutoff * np.sinc(2 * cutoff * time)
  return (taps_k / taps_k.sum()).astype(np.float32)


def _edges(first: Array, x_bpd: Array, last: Array, left: int, right: int) -> Array:
  """Puts `left` copies of the row `first` and `right` copies of `last` around the signal."""
  return jnp.concatenate([jnp.repeat(first, left, 1), x_bpd, jnp.repeat(last, right, 1)], 1)


def _fir(x_bpd: Array, taps: np.ndarray, length: int) -> Array:
  """Returns sum_j taps[j] x[i + j] for i < length."""
  return sum((float(c) * x_bpd[:, j : j + length] for j, c in enumerate(taps)), jnp.zeros(()))


def filtered(function: Callable[[Array], Array], x_bpd: Array) -> Array:
  """Applies a pointwise function at twice the rate, between interpolation and decimation."""
  taps, length = sinc_filter(), x_bpd.shape[1]
  padded = _edges(x_bpd[:, :1], x_bpd, x_bpd[:, -1:], 3, 3)
  even = function(2 * _fir(padded[:, :-1], taps[1::2][::-1], length))
  odd = function(2 * _fir(padded[:, 1:], taps[0::2][::-1], length))
  first, last = even[:, :1], odd[:, -1:]  # Outermost samples of the doubled signal.
  even = _edges(first, even, last, 2, 3)
  odd = _edges(first, odd, last, 3, 2)
  return _fir(even, taps[1::2], length) + _fir(odd, taps[0::2], length)


def sin_squared(x: Array) -> Array:
  """Returns sin(x)^2; in float32 to 3e-7 for |x| < 1000, without the C library.

  XLA calls it for each sine on a CPU, which took most of a vocoder's time. Instead: the distance
  from x to the nearest multiple of pi, in three parts, and a polynomial in its square.
  """
  if x.dtype != jnp.float32:
    return jnp.square(jnp.sin(x))
  turns = jnp.round(x * np.float32(1 / np.pi))
  for part in PI_PARTS:
    x -= turns * part
  square = jnp.square(x)
  series = jnp.full((), SERIES[-1], x.dtype)
  for c in SERIES[-2::-1]:
    series = series * square + c
  return square * series


def conv(x_bpd: Array, kernel: Array, dilation: int = 1) -> Array:
  """Convolves with zero padding to equal length."""
  return jax.lax.conv_general_dilated(
    x_bpd, kernel, (1,), "SAME", rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
  )


def upsample(x_bpd: Array, kernel: Array, rate: int) -> Array:
  """Transposed convolution, cropped to `rate` samples for each one.

  Args:
    x_bpd: [b, p, in].
    kernel: [k, in, out] with the taps in the order of the impulse response; k - rate is even.
    rate: upsampling factor.
  """
  taps = kernel.shape[0]
  pad = taps - 1 - (taps - rate) // 2
  return jax.lax.conv_general_dilated(
    x_bpd,
    kernel[::-1],
    (1,),
    [(pad, pad)],
    lhs_dilation=(rate,),
    dimension_numbers=("NWC", "WIO", "NWC"),
  )


class Conv(nn.Module):
  """Convolution with bias, or with `rate` a transposed one."""

  features: int
  taps: int
  dilation: int = 1
  rate: int = 1
  bias: bool = True

  @nn.compact
  def __call__(self, x_bpd: Array) -> Array:
    """Returns [b, p * rate, features]."""
    shape = (self.taps, x_bpd.shape[-1], self.features)
    axes = (None, None, "width" if self.features > 1 else None)
    kernel = self.param("kernel", logical(nn.initializers.normal(0.01), *axes), shape)
    out = (
      upsample(x_bpd, kernel, self.rate) if self.rate > 1 else conv(x_bpd, kernel, self.dilation)
    )
    if self.bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      out = out + bias.reshape(1, 1, -1)
    return out


class Snake(nn.Module):
  """Anti-aliased x + sin^2(x exp(alpha)) / exp(beta)."""

  @nn.compact
  def __call__(self, x_bpd: Array) -> Array:
    """Returns an array of equal shape."""
    shape = (x_bpd.shape[-1],)
    alpha = jnp.exp(self.param("alpha", nn.initializers.zeros, shape)).reshape(1, 1, -1)
    beta = jnp.exp(self.param("beta", nn.initializers.zeros, shape)).reshape(1, 1, -1)
    return filtered(lambda x: x + sin_squared(x * alpha) / (beta + 1e-9), x_bpd)


class Block(nn.Module):
  """Residual layers of one kernel size: activation, dilated convolution, and both again plain."""

  taps: int
  dilations: tuple[int, ...]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns an array of equal shape."""
    width = x.shape[-1]
    for j, dilation in enumerate(self.dilations):
      y = Snake(name=f"activations_{2 * j}")(x)
      y = Conv(width, self.taps, dilation, name=f"convs1_{j}")(y)
      y = Snake(name=f"activations_{2 * j + 1}")(y)
      x = x + Conv(width, self.taps, name=f"convs2_{j}")(y)
    return x


class Generator(nn.Module):
  """Log-mels [b, n, m] to samples [b, p]."""

  config: Config

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns the waveform."""
    cfg = self.config
    x = Conv(cfg.width, 7, name="conv_pre")(x)
    for i, (rate, taps) in enumerate(zip(cfg.rates, cfg.kernels, strict=True)):
      x = Conv(cfg.width >> (i + 1), taps, rate=rate, name=f"ups_{i}")(x)
      count = len(cfg.block_kernels)
      blocks = [
        Block(k, cfg.dilations, name=f"resblocks_{i * count + j}")(x)
        for j, k in enumerate(cfg.block_kernels)
      ]
      x = sum(blocks[1:], blocks[0]) / count
    x = Snake(name="activation_post")(x)
    x = Conv(1, 7, bias=cfg.final_bias, name="conv_post")(x)[..., 0]
    return jnp.tanh(x) if cfg.bounded == "tanh" else jnp.clip(x, -1, 1)


def build(config: Config) -> Vocoder:
  """Returns the functions of a vocoder.

  Raises:
    ValueError: unknown `bounded`.
  """
  if config.bounded not in ("tanh", "clip"):
    raise ValueError(f'unknown bound "{config.bounded}"; use "tanh" or "clip"')
  generator = Generator(config)

  def init(key: Array) -> Any:
    return generator.init(key, jnp.zeros((1, 2, config.n_mels)))["params"]

  def waveform(params: Any, log_mel_bmn: Array) -> Array:
    return jnp.asarray(generator.apply({"params": params}, log_mel_bmn.swapaxes(1, 2)))

  return Vocoder(init, waveform)
