"""ResNet-18 without its head (arXiv 1512.03385), as torchvision builds it, and its layers.

Running statistics of the norms are a collection `stats` beside the parameters; with `train` a norm
uses those of the batch and moves the running ones.

Axes: b clip, y image row, x image column, d channel, i and o input and output channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from spatialv2a_jax.models.layers import logical, ones, zeros

EPS = 1e-5
MOMENTUM = 0.9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's colours, of 0..1.
STRIDE = 32  # Pixels to one feature.
STAGES, BLOCKS = 4, 2

_kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
  """Square convolution with PyTorch's padding; replicated on a mesh, for it is small.

  Attributes:
    features: output channels.
    size: taps along each side.
    stride: of the output.
    padding: zeros around.
    bias: adds a bias.
    kernel_init: of the kernel [size, size, i, o].
  """

  features: int
  size: int
  stride: int = 1
  padding: int = 0
  bias: bool = False
  kernel_init: Any = _kaiming

  @nn.compact
  def __call__(self, x_byxi: Array) -> Array:
    """Returns [b, y / stride, x / stride, o]."""
    shape = (self.size, self.size, x_byxi.shape[-1], self.features)
    kernel = self.param("kernel", logical(self.kernel_init, None, None, None, None), shape)
    y = jax.lax.conv_general_dilated(
      x_byxi,
      kernel,
      (self.stride, self.stride),
      [(self.padding, self.padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if self.bias:
      bias = self.param("bias", logical(zeros, None), (self.features,))
      y += bias.reshape(1, 1, 1, -1)
    return y


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, with PyTorch's running statistics.

  Attributes:
    train: normalises with the statistics of the batch and moves the running ones.
  """

  train: bool = False

  @nn.compact
  def __call__(self, x_byxd: Array) -> Array:
    """Returns the normalised input."""
    d = x_byxd.shape[-1]
    row = (1,) * (x_byxd.ndim - 1) + (d,)
    scale = self.param("scale", logical(ones, None), (d,))
    bias = self.param("bias", logical(zeros, None), (d,))
    mean_d = self.variable("stats", "mean", jnp.zeros, (d,))
    var_d = self.variable("stats", "var", jnp.ones, (d,))
    mean, var = mean_d.value, var_d.value
    if self.train:
      axes = tuple(range(x_byxd.ndim - 1))
      mean = x_byxd.mean(axes)
      var = jnp.square(x_byxd - mean.reshape(row)).mean(axes)
      if not self.is_initializing():
        count = x_byxd.size // d
        unbiased = var * (count / max(count - 1, 1))
        for old, new in ((mean_d, mean), (var_d, unbiased)):
          old.value = MOMENTUM * old.value + (1 - MOMENTUM) * jax.lax.stop_gradient(new)
    y = (x_byxd - mean.reshape(row)) * jax.lax.rsqrt(var + EPS).reshape(row)
    return y * scale.reshape(row) + bias.reshape(row)


class Block(nn.Module):
  """Two convolutions beside a skip."""

  features: int
  stride: int
  train: bool

  @nn.compact
  def __call__(self, x_byxd: Array) -> Array:
    """Returns [b, y / stride, x / stride, features]."""
    h = Conv(self.features, 3, self.stride, 1, name="conv1")(x_byxd)
    h = nn.relu(BatchNorm(self.train, name="norm1")(h))
    h = BatchNorm(self.train, name="norm2")(Conv(self.features, 3, 1, 1, name="conv2")(h))
    if self.stride != 1 or x_byxd.shape[-1] != self.features:
      x_byxd = Conv(self.features, 1, self.stride, name="skip")(x_byxd)
      x_byxd = BatchNorm(self.train, name="skip_norm")(x_byxd)
    return nn.relu(h + x_byxd)


class ResNet18(nn.Module):
  """Pictures -> features at a 32nd of their size.

  Attributes:
    planes: channels of the first stage, 64 in the original; the others have 2, 4, 8 times as many.
    train: see `BatchNorm`.
  """

  planes: int = 64
  train: bool = False

  @nn.compact
  def __call__(self, image_byxc: Array) -> Array:
    """Maps uint8 RGB [b, y, x, 3] to [b, y / 32, x / 32, 8 planes]."""
    x = image_byxc.astype(jnp.float32) / 255 - jnp.asarray(MEAN).reshape(1, 1, 1, 3)
    x /= jnp.asarray(STD).reshape(1, 1, 1, 3)
    x = Conv(self.planes, 7, 2, 3, name="stem")(x)
    x = nn.relu(BatchNorm(self.train, name="stem_norm")(x))
    x = nn.max_pool(jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]), (3, 3), (2, 2))  # x is >= 0.
    for stage in range(STAGES):
      for i in range(BLOCKS):
        stride = 2 if stage and not i else 1
        block = Block(2**stage * self.planes, stride, self.train, name=f"stage{stage}_block{i}")
        x = block(x)
    return x


@dataclasses.dataclass(frozen=True)
class Config:
  """Size.

  Attributes:
    planes: see `ResNet18`.
  """

  planes: int = 64


class ResNet(NamedTuple):
  """Functions of one network.

  Attributes:
    init: key -> boxed parameters.
    init_stats: () -> running statistics of the norms.
    apply: (params, stats, image_byxc uint8 RGB) -> features [b, y / 32, x / 32, 8 planes].
  """

  init: Callable[[Array], Any]
  init_stats: Callable[[], Any]
  apply: Callable[[Any, Any, Array], Array]


def empty_stats(init: Callable[[Array], Any]) -> Any:
  """Returns the running statistics before any batch of a module whose `init` this is."""
  shapes = jax.eval_shape(init, jax.random.key(0))["stats"]
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (jnp.ones if path[-1].key == "var" else jnp.zeros)(x.shape), shapes
  )


def build(config: Config) -> ResNet:
  """Returns the functions of a network of the given size."""
  net = ResNet18(config.planes)

  def variables(key: Array) -> Any:
    return net.init(key, jnp.zeros((1, STRIDE, STRIDE, 3), jnp.uint8))

  def apply(params: Any, stats: Any, image_byxc: Array) -> Array:
    return cast(Array, net.apply({"params": params, "stats": stats}, image_byxc))

  return ResNet(lambda key: variables(key)["params"], lambda: empty_stats(variables), apply)
