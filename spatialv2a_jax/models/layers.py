"""Layers of the flow network, as the public MMAudio project defines them.

Axis letters: b batch, e ear, t token or frame, s key token, d width, h head, k head width,
f hidden width of an MLP, i and o any input and output channels.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

Constrain = Callable[..., jax.Array]

RMS_EPS = 1.1920929e-07
LAYER_NORM_EPS = 1e-5

zeros = nn.initializers.zeros
ones = nn.initializers.ones


def logical(init: Callable, *axes: str | None) -> Callable:
  """Names the axes of a parameter; `sharding.Rules` gives the names their meaning."""
  return nn.with_logical_partitioning(init, axes)


def unconstrained(x: jax.Array, *axes: str | None) -> jax.Array:
  """Stands in for `sharding.constrainer` where there is one device."""
  del axes
  return x


def uniform(bound: float) -> Callable:
  """Returns an initialiser that draws from U(-bound, bound)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def xavier(fan_in: int, fan_out: int) -> Callable:
  """Returns Xavier's uniform initialiser for explicit fans."""
  return uniform(math.sqrt(6 / (fan_in + fan_out)))


def sealed(function: Callable, lift: Callable = jax.jit) -> Callable:
  """Returns a function that is compiled as a program of its own within the one that calls it.

  On the CPU, XLA otherwise fuses it with what is around it, where a product and a sum in one kernel
  round once instead of twice. Sealed, it rounds alike wherever it is called, if all it returns is
  used.

  Args:
    function: of arrays; or of a module and arrays.
    lift: `nn.jit` for a function of a module.
  """
  inner = lift(function)

  def call(*args):
    with set_xla_metadata(inlineable="false"):
      return inner(*args)

  return call


class Linear(nn.Module):
  """A dense layer, or with `taps` a 1-D convolution over time (odd, stride 1, zero padded).

  Several input or output axes let one kernel keep heads apart, so that they can be sharded.

  Attributes:
    features: sizes of the output axes.
    axes: logical names of the input axes, then of the output axes.
    taps: kernel length over time; 0 is a dense layer.
    bias: adds a bias.
    kernel_init: by default Xavier uniform (dense, zero bias) or U(+-1/sqrt(fan in)) for
      both kernel and bias (convolution), which are PyTorch's and MMAudio's.
    dtype: of the multiplication; parameters stay float32.
    gemm: convolves by one matrix product over shifted copies of the input, which is faster where
      the platform's 1-D convolutions are slow.
  """

  features: tuple[int, ...]
  axes: tuple[str | None, ...]
  taps: int = 0
  bias: bool = True
  kernel_init: Callable | None = None
  dtype: jax.typing.DTypeLike = jnp.float32
  gemm: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., t, *input axes] to [..., t, *features] in `dtype`."""
    inputs = len(self.axes) - len(self.features)
    split = x.ndim - inputs
    fan_in, fan_out = math.prod(x.shape[split:]), math.prod(self.features)
    kernel_init, bias_init = self.kernel_init or xavier(fan_in, fan_out), zeros
    if self.taps and self.kernel_init is None:
      kernel_init = bias_init = uniform(1 / math.sqrt(fan_in * self.taps))
    taps = (self.taps,) if self.taps else ()
    kernel = self.param(
      "kernel",
      logical(kernel_init, *(None for _ in taps), *self.axes),
      (*taps, *x.shape[split:], *self.features),
    ).astype(self.dtype)
    x = x.astype(self.dtype).reshape(*x.shape[:split], fan_in)
    y = product(x, kernel.reshape(*taps, fan_in, fan_out), self.gemm)
    if self.bias:
      bias = self.param("bias", logical(bias_init, *self.axes[inputs:]), self.features)
      y += bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (fan_out,))
    return y.reshape(*x.shape[:-1], *self.features)


class ParallelLinear(nn.Module):
  """Several dense layers or convolutions of one input, their kernels stacked on a leading axis.

  Each part is a product of its own: cutting the result of one wide product apart costs a TPU as
  much as the product, where the parts are no multiple of 128 wide.

  Attributes:
    parts: their number.
    features: sizes of the output axes of each part.
    axes: logical names of the input axis, then of the output axes.
    taps: as in `Linear`.
    bias: as in `Linear`.
    kernel_init: as in `Linear`, for the kernel of all parts side by side.
    dtype: of the multiplication; parameters stay float32.
    gemm: as in `Linear`.
  """

  parts: int
  features: tuple[int, ...]
  axes: tuple[str | None, ...]
  taps: int = 0
  bias: bool = True
  kernel_init: Callable | None = None
  dtype: jax.typing.DTypeLike = jnp.float32
  gemm: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    """Maps [..., t, input axis] to `parts` arrays [..., t, *features] in `dtype`."""
    fan_in, width = x.shape[-1], math.prod(self.features)
    taps = (self.taps,) if self.taps else ()
    default = uniform(1 / math.sqrt(fan_in * self.taps)) if self.taps else xavier(fan_in, width)
    draw = self.kernel_init or default

    def init(key, shape, dtype=jnp.float32):
      side_by_side = (*shape[1 : 2 + len(taps)], shape[0], *shape[2 + len(taps) :])
      return jnp.moveaxis(draw(key, side_by_side, dtype), 1 + len(taps), 0)

    names = (None, *(None for _ in taps), *self.axes)
    shape = (self.parts, *taps, fan_in, *self.features)
    kernels = jnp.unstack(self.param("kernel", logical(init, *names), shape).astype(self.dtype))
    biases: list[jax.Array | None] = [None] * self.parts
    if self.bias:
      bias_init = logical(zeros, None, *self.axes[1:])
      bias = self.param("bias", bias_init, (self.parts, *self.features)).astype(self.dtype)
      biases = list(jnp.unstack(bias.reshape(self.parts, width)))
    x = x.astype(self.dtype)
    return [self._one(x, k, b) for k, b in zip(kernels, biases, strict=True)]

  @nn.nowrap
  def _one(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = product(x, kernel.reshape(*kernel.shape[: 1 + bool(self.taps)], -1), self.gemm)
    if bias is not None:
      y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
    return y.reshape(*x.shape[:-1], *self.features)


def product(x: jax.Array, kernel: jax.Array, gemm: bool) -> jax.Array:
  """Multiplies [..., t, i] by a kernel [i, o], or convolves it with one [taps, i, o]."""
  if kernel.ndim == 2:
    return checkpoint_name(x @ kernel, "dense")
  return checkpoint_name((convolve_by_product if gemm else convolve)(x, kernel), "convolution")


def convolve_by_product(x: jax.Array, kernel_tio: jax.Array) -> jax.Array:
  """Does what `convolve` does, as one matrix product."""
  taps, fan_in, fan_out = kernel_tio.shape
  length, half = x.shape[-2], taps // 2
  padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(half, half), (0, 0)])
  shifted = [jax.lax.slice_in_dim(padded, n, n + length, axis=-2) for n in range(taps)]
  return jnp.concatenate(shifted, axis=-1) @ kernel_tio.reshape(taps * fan_in, fan_out)


def convolve(x: jax.Array, kernel_tio: jax.Array) -> jax.Array:
  """Convolves [..., t, i] with an odd kernel [taps, i, o]: stride 1, zero padding."""
  y = jax.lax.conv_general_dilated(
    x.reshape(-1, *x.shape[-2:]),
    kernel_tio,
    window_strides=(1,),
    padding="SAME",
    dimension_numbers=("NWC", "WIO", "NWC"),
  )
  return y.reshape(*x.shape[:-1], y.shape[-1])


def hidden_width(width: int) -> int:
  """Returns MMAudio's hidden width: two thirds of 4 x 2 x width, rounded up to 256."""
  return 256 * math.ceil(int(8 * width / 3) / 256)


class GatedMlp(nn.Module):
  """SwiGLU without biases: down(silu(gate) * value), dense or convolutional (ConvMLP).

  Attributes:
    hidden: hidden width f.
    taps: 0 is MMAudio's MLP, an odd number its ConvMLP.
    dtype: of the multiplications.
    gemm: as in `Linear`.
  """

  hidden: int
  taps: int = 0
  dtype: jax.typing.DTypeLike = jnp.float32
  gemm: bool = False

  @nn.compact
  def __call__(self, x_btd: jax.Array) -> jax.Array:
    """Maps [..., t, d] to [..., t, d]."""
    d = x_btd.shape[-1]
    options = {"taps": self.taps, "bias": False, "dtype": self.dtype, "gemm": self.gemm}
    gate, value = ParallelLinear(2, (self.hidden,), ("width", "ffn"), name="up", **options)(x_btd)
    return Linear((d,), ("ffn", "width"), name="down", **options)(nn.silu(gate) * value)


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis, with one weight per channel, in float32."""

  axis: str | None = "head_dim"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns `x` normalised, float32."""
    scale = self.param("scale", logical(ones, self.axis), x.shape[-1:])
    x = x.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + RMS_EPS)
    return x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def layer_norm(x: jax.Array) -> jax.Array:
  """Returns LayerNorm over the last axis without affine part, float32, two-pass variance."""
  x = x.astype(jnp.float32)
  x -= x.mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + LAYER_NORM_EPS)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns adaptive LayerNorm: `layer_norm(x) * (1 + scale) + shift`."""
  return layer_norm(x) * (1 + scale.astype(jnp.float32)) + shift


def frequencies(size: int, dtype: type[np.floating] = np.float32) -> np.ndarray:
  """Returns the frequencies 10000^(-2i / size), i < size / 2.

  Each operation rounds to `dtype` once, as PyTorch's do. NumPy's own float32 power does not, and
  MMAudio v2 multiplies the table by 10000.
  """
  exponent = np.arange(0, size, 2, dtype=dtype) / dtype(size)
  return dtype(1) / (10_000.0 ** exponent.astype(np.float64)).astype(dtype)


def rope_table(length: int, head_dim: int, scale: float = 1.0) -> np.ndarray:
  """Returns rotary angles' (cos, sin) as float32 [2, length, head_dim], each pair's value twice.

  `scale` multiplies the frequencies, so that clip frames sit at latent positions (MMAudio).
  """
  frequency = frequencies(head_dim) * np.float32(scale)
  angle = np.outer(np.arange(length, dtype=np.float32), frequency).repeat(2, axis=1)
  return np.stack([np.cos(angle), np.sin(angle)])


def rope(x: jax.Array, table: np.ndarray, by_product: bool = False) -> jax.Array:
  """Rotates the interleaved pairs (2i, 2i+1) of [..., t, h, k]; returns float32.

  The half-split layout of most libraries would pair other channels than MMAudio's weights do.

  Args:
    x: queries or keys.
    table: from `rope_table`.
    by_product: exchanges the channels of a pair by a product with a signed permutation, which is
      exact for bfloat16, and on a TPU faster than to move channels about; float32 is moved.
  """
  shape = (1,) * (x.ndim - 3) + (table.shape[1], 1, table.shape[2])
  cos, sin = (jnp.asarray(part.reshape(shape)) for part in table)
  if by_product and x.dtype != jnp.float32:
    index = np.arange(x.shape[-1])
    swap = np.zeros((x.shape[-1],) * 2, np.float32)
    swap[index ^ 1, index] = np.where(index % 2 == 0, -1, 1)
    partner = x @ jnp.asarray(swap, x.dtype)
  else:
    even = (np.arange(x.shape[-1]) % 2 == 0).reshape((1,) * (x.ndim - 1) + (-1,))
    partner = jnp.where(even, -jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
  return x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin


def nearest_exact(source: int, target: int) -> np.ndarray:
  """Returns the int32 source index of each target frame, as PyTorch's "nearest-exact" does.

  PyTorch decides in float32, which settles exact ties otherwise than real arithmetic does.
  """
  step = np.float32(source) / np.float32(target)
  position = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * step
  return np.minimum(np.floor(position).astype(np.int32), source - 1)


def timestep_table(
  size: int, max_period: float, dtype: type[np.floating] = np.float32
) -> np.ndarray:
  """Returns the size/2 frequencies of the time embedding.

  The base is always 10000 (as in MMAudio); `max_period` only sets the multiplier.
  """
  return frequencies(size, dtype) * dtype(10_000 / max_period)


def timestep_features(t_b: jax.Array, table: np.ndarray) -> jax.Array:
  """Returns [cos, sin] of time x frequency, [b, 2 * len(table)], as precise as the table."""
  angle = t_b.astype(table.dtype)[:, None] * table[None, :]
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
