"""Mono sound and a picture -> the sound of both ears: PseudoBinaural's networks (CVPR 2021).

A U-Net on the complex spectrogram of the mono mix sees the picture through ResNet-18 at its
bottleneck and predicts a complex mask for the difference left - right (Gao and Grauman, 2.5D
Visual Sound). APNet, a pyramid that weighs the U-Net's decoder levels by each place of the picture,
predicts a mask for each ear; AssoConv is its last level alone.

Axes: b window, f frequency bin, t frame, z real and imaginary part, d channel, i and o input and
output channels, y and x row and column of a picture or of its features, c colour, q place of
the picture's features.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from spatialv2a_jax.models import layers, resnet
from spatialv2a_jax.models.resnet import BatchNorm, Conv, ResNet18

BINS, FRAMES = (
  257,
  64,
)  # Of one window: 0.63 s at 16 kHz. The last bin, Nyquist's, is not predicted.
SQUEEZED = 8  # Channels to which the picture's features are reduced for the U-Net.
ENCODER, DECODER = (1, 2, 4, 8, 8), (8, 4, 2, 1)  # Channels of the levels, in widths.
HEADS = ("apnet", "assoconv")

_small = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are PseudoBinaural's.

  Attributes:
    width: channels of the U-Net's first level.
    planes: channels of ResNet-18's first stage.
    rows: of the picture, a multiple of 32.
    columns: of the picture, a multiple of 32.
    norm: of U-Net and heads: "batch", or "instance" (without parameters).
    apnet: adds APNet, which then gives the output.
    assoconv: adds AssoConv.
  """

  width: int = 64
  planes: int = 64
  rows: int = 224
  columns: int = 448
  norm: str = "batch"
  apnet: bool = True
  assoconv: bool = False

  def __post_init__(self):
    """Refuses what cannot be built."""
    if self.norm not in ("batch", "instance"):
      raise ValueError(f"norm {self.norm!r} is unknown, have: batch, instance")
    if min(self.rows, self.columns) < 1 or self.rows % 32 or self.columns % 32:
      raise ValueError(f"rows {self.rows} and columns {self.columns} must be multiples of 32")

  @property
  def heads(self) -> tuple[str, ...]:
    """Names of the heads that predict each ear."""
    return tuple(name for name in HEADS if getattr(self, name))

  @property
  def places(self) -> int:
    """Number of places at which the picture is described."""
    return (self.rows // resnet.STRIDE) * (self.columns // resnet.STRIDE)


class Mono2Binaural(NamedTuple):
  """Functions of one network.

  Attributes:
    init: key -> boxed parameters.
    init_stats: () -> running statistics of the norms.
    apply: (params, stats, mix_bftz [b, 257, 64 k / 2, 2], image_byxc uint8 RGB, train=False) ->
      (predictions, new stats). Predictions are "mask" of the difference, in -1..1, "difference",
      the spectrogram left - right, and for each head "HEAD_left" and "HEAD_right", all
      [b, 256, t, 2]; "features" are the picture's.
  """

  init: Callable[[Array], Any]
  init_stats: Callable[[], Any]
  apply: Callable[..., tuple[dict[str, Array], Any]]


def masked(mask_bftz: Array, mix_bftz: Array) -> Array:
  """Returns the complex product of a mask and the mix without its last bin."""
  mix = mix_bftz[:, : mask_bftz.shape[1]]
  real = mask_bftz[..., 0] * mix[..., 0] - mask_bftz[..., 1] * mix[..., 1]
  imaginary = mask_bftz[..., 0] * mix[..., 1] + mask_bftz[..., 1] * mix[..., 0]
  return jnp.stack([real, imaginary], -1)


class Norm(nn.Module):
  """Batch norm, or instance norm without parameters, over bins and frames of each window."""

  kind: str
  train: bool

  @nn.compact
  def __call__(self, x_bftd: Array) -> Array:
    """Returns the normalised input."""
    if self.kind == "batch":
      return BatchNorm(self.train, name="batch")(x_bftd)
    x = x_bftd - x_bftd.mean((1, 2), keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean((1, 2), keepdims=True) + resnet.EPS)


class Down(nn.Module):
  """Convolution of 4 x 4 taps and stride 2, on neighbouring 2 x 2 blocks: its gradient is dense."""

  features: int

  @nn.compact
  def __call__(self, x_bfti: Array) -> Array:
    """Returns [b, f // 2, t // 2, o]."""
    b, f, t, i = x_bfti.shape
    kernel, bias = _kernel_and_bias(self, _small, i, self.features)
    rows, columns = f // 2 + 1, t // 2 + 1
    pads = [(0, 0), (1, 2 * rows - 1 - f), (1, 2 * columns - 1 - t), (0, 0)]
    blocks = jnp.pad(x_bfti, pads).reshape(b, rows, 2, columns, 2, i).transpose(0, 1, 3, 2, 4, 5)
    kernel = kernel.reshape(2, 2, 2, 2, i, -1).transpose(0, 2, 1, 3, 4, 5)
    y = _dense_2x2(blocks.reshape(b, rows, columns, 4 * i), kernel.reshape(2, 2, 4 * i, -1))
    return y + bias.reshape(1, 1, 1, -1)


class Up(nn.Module):
  """Transposed convolution of 4 x 4 taps and stride 2, as four convolutions of 2 x 2.

  The kernel is that of an ordinary convolution over the input with zeros in between: PyTorch's,
  turned round.
  """

  features: int
  kernel_init: Any = _small

  @nn.compact
  def __call__(self, x_bfti: Array) -> Array:
    """Returns [b, 2 f, 2 t, o]."""
    b, f, t, i = x_bfti.shape
    kernel, bias = _kernel_and_bias(self, self.kernel_init, i, self.features)
    kernel = kernel.reshape(2, 2, 2, 2, i, -1).transpose(0, 2, 4, 1, 3, 5)  # Phases go last.
    padded = jnp.pad(x_bfti, [(0, 0), (1, 1), (1, 1), (0, 0)])
    y = _dense_2x2(padded, kernel.reshape(2, 2, i, -1)).reshape(b, f + 1, t + 1, 2, 2, -1)
    rows = [
      jnp.stack([y[:, r : r + f, c : c + t, r, c] for c in range(2)], 3).reshape(b, f, 2 * t, -1)
      for r in range(2)
    ]
    return jnp.stack(rows, 2).reshape(b, 2 * f, 2 * t, -1) + bias.reshape(1, 1, 1, -1)


def _kernel_and_bias(layer: nn.Module, init: Any, i: int, o: int) -> tuple[Array, Array]:
  kernel = layer.param("kernel", layers.logical(init, None, None, None, None), (4, 4, i, o))
  bias_init = layers.zeros if init is _small else init
  return kernel, layer.param("bias", layers.logical(bias_init, None), (o,))


def _dense_2x2(x: Array, kernel: Array) -> Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


class AudioNet(nn.Module):
  """The U-Net: mask of the difference between the ears."""

  config: Config
  train: bool

  @nn.compact
  def __call__(self, mix_bftz: Array, seen_byxd: Array) -> tuple[Array, list[Array]]:
    """Returns mask_bftz, and the decoder's levels from the coarsest on."""
    width, norm = self.config.width, self.config.norm
    x, skips = mix_bftz, []
    for level, multiple in enumerate(ENCODER):
      x = Down(multiple * width, name=f"down{level}")(x)
      x = nn.leaky_relu(Norm(norm, self.train, name=f"down{level}_norm")(x), 0.2)
      skips.append(x)
    seen = Conv(SQUEEZED, 1, bias=True, kernel_init=_small, name="squeeze")(seen_byxd)
    seen = nn.relu(BatchNorm(self.train, name="squeeze_norm")(seen))
    seen_bd = seen.transpose(0, 3, 1, 2).reshape(len(seen), -1)
    seen = jnp.broadcast_to(seen_bd[:, None, None], (*x.shape[:3], seen_bd.shape[1]))
    x, levels = jnp.concatenate([seen, x], -1), []
    for (level, multiple), skip in zip(enumerate(DECODER), reversed(skips[:-1]), strict=True):
      x = Up(multiple * width, name=f"up{level}")(x)
      x = nn.relu(Norm(norm, self.train, name=f"up{level}_norm")(x))
      levels.append(x)
      x = jnp.concatenate([x, skip], -1)
    return jnp.tanh(0.5 * Up(2, name="out")(x)), levels


class Association(nn.Module):
  """How much of each channel of the sound belongs to each place of the picture."""

  @nn.compact
  def __call__(self, x_bftd: Array, seen_bqi: Array) -> Array:
    """Returns [b, f, t, q]."""
    i, d = seen_bqi.shape[-1], x_bftd.shape[-1]
    init = layers.uniform(i**-0.5)
    kernel = self.param("kernel", layers.logical(init, None, None), (i, d))
    bias = self.param("bias", layers.logical(init, None), (d,))
    weight_bqd = nn.relu(jnp.einsum("bqi,id->bqd", seen_bqi, kernel) + bias.reshape(1, 1, -1))
    return jnp.einsum("bqd,bftd->bftq", weight_bqd, x_bftd)


class Head(nn.Module):
  """APNet, or with one level AssoConv: a mask for each ear.

  Attributes:
    levels: levels of the U-Net's decoder that are used, the finest last.
    norm: kind of norm.
    train: see `resnet.BatchNorm`.
  """

  levels: int
  norm: str
  train: bool

  @nn.compact
  def __call__(self, levels: list[Array], seen_byxd: Array) -> tuple[Array, Array]:
    """Returns the masks of the left and of the right ear, [b, f, t, 2]."""
    seen_bqd = seen_byxd.reshape(len(seen_byxd), -1, seen_byxd.shape[-1])
    places = seen_bqd.shape[1]

    def up(features, x, name):
      # PyTorch takes the fan of a transposed convolution from its outputs.
      return Up(features, layers.uniform((16 * features) ** -0.5), name=name)(x)

    x = None
    for level, sound in enumerate(levels[-self.levels :]):
      if x is not None:
        x = up(places, x, f"up{level - 1}")
        x = nn.relu(Norm(self.norm, self.train, name=f"up{level - 1}_norm")(x))
      found = Association(name=f"fuse{level}")(sound, seen_bqd)
      x = found if x is None else jnp.concatenate([found, x], -1)
    left, right = (jnp.tanh(0.5 * up(2, x, side)) for side in ("left", "right"))
    return left, right


class Net(nn.Module):
  """All of it."""

  config: Config
  train: bool

  @nn.compact
  def __call__(self, mix_bftz: Array, image_byxc: Array) -> dict[str, Array]:
    """Returns the predictions; see `Mono2Binaural`."""
    c = self.config
    seen = ResNet18(c.planes, self.train, name="visual")(image_byxc)
    mask, levels = AudioNet(c, self.train, name="audio")(mix_bftz, seen)
    out = {"features": seen, "mask": mask, "difference": masked(mask, mix_bftz)}
    for head in c.heads:
      count = len(levels) if head == "apnet" else 1
      masks = Head(count, c.norm, self.train, name=head)(levels, seen)
      for side, mask in zip(("left", "right"), masks, strict=True):
        out[f"{head}_{side}"] = masked(mask, mix_bftz)
    return out


def build(config: Config, constrain: layers.Constrain = layers.unconstrained) -> Mono2Binaural:
  """Returns the functions of a network of the given sizes.

  Args:
    config: sizes.
    constrain: names the axes of activations; from `sharding.constrainer`.
  """

  def example(key: Array, train: bool = False) -> Any:
    mix = jnp.zeros((1, BINS, FRAMES, 2))
    image = jnp.zeros((1, config.rows, config.columns, 3), jnp.uint8)
    return Net(config, train).init(key, mix, image)

  def init(key: Array) -> Any:
    return example(key)["params"]

  def init_stats() -> Any:
    return resnet.empty_stats(example)

  def apply(
    params: Any, stats: Any, mix_bftz: Array, image_byxc: Array, train: bool = False
  ) -> tuple[dict[str, Array], Any]:
    mix_bftz = constrain(mix_bftz, "act_batch", None, None, None)
    run = functools.partial(Net(config, train).apply, {"params": params, "stats": stats})
    if not train:
      return cast(Any, run(mix_bftz, image_byxc)), stats
    predictions, new = cast(Any, run(mix_bftz, image_byxc, mutable=["stats"]))
    return predictions, new["stats"]

  return Mono2Binaural(init, init_stats, apply)
