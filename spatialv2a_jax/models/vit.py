"""Transformer parts that the frozen encoders share: blocks, and CLIP's image and text towers.

Weights of repeated blocks are stacked on a leading axis `layers` and scanned. Activations are
those of OpenAI's CLIP (QuickGELU) unless told otherwise; norms and softmax stay float32.

Axes: b image or text, y row, x column, c colour, n token, w text token, d width, h head,
k head width, f feature, q patch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatialv2a_jax.models import layers
from spatialv2a_jax.models.flow_net import stacked
from spatialv2a_jax.models.layers import Linear, logical

Params = dict[str, Any]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
normal = nn.initializers.normal(0.02)


def quick_gelu(x: Array) -> Array:
  """CLIP's approximation of GELU; the exact one differs by up to 0.02."""
  return x * nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
  """GELU by the error function."""
  return nn.gelu(x, approximate=False)


def pixels(frames: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
  """Returns uint8 pixels [..., c] as float32, scaled to 0..1, then normalised by colour."""
  shape = (1,) * (frames.ndim - 1) + (3,)
  shift, scale = (np.asarray(x, np.float32).reshape(shape) for x in (mean, std))
  return (frames.astype(jnp.float32) / 255 - shift) / scale


def normalize(x: Array) -> Array:
  """Returns vectors of unit length along the last axis; a norm below 1e-12 counts as that."""
  size = jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True))
  return x / jnp.maximum(size, 1e-12)


class Norm(nn.Module):
  """LayerNorm over the last axis, two-pass variance, float32."""

  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns an array of equal shape."""
    d = x.shape[-1]
    scale = self.param("scale", logical(layers.ones, None), (d,))
    bias = self.param("bias", logical(layers.zeros, None), (d,))
    x = x.astype(jnp.float32)
    x -= x.mean(axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
    return x * scale.reshape((1,) * (x.ndim - 1) + (d,)) + bias.reshape((1,) * (x.ndim - 1) + (d,))


class Attention(nn.Module):
  """Self-attention with biases; `mix` may replace full attention by another pattern."""

  heads: int
  causal: bool = False
  mix: Callable[[Array, Array, Array], Array] | None = None
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x_bnd: Array) -> Array:
    """Returns [b, n, d]."""
    d, k = x_bnd.shape[-1], x_bnd.shape[-1] // self.heads
    axes = ("width", None, "heads", "head_dim")
    qkv = Linear((3, self.heads, k), axes, dtype=self.dtype, name="qkv")(x_bnd)
    q, k, v = jnp.unstack(qkv, axis=-3)
    if self.mix is None:
      out = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
    else:
      out = self.mix(q, k, v)
    return Linear((d,), ("heads", "head_dim", "width"), dtype=self.dtype, name="out")(out)


class Mlp(nn.Module):
  """Two dense layers around an activation."""

  hidden: int
  activation: Callable[[Array], Array] = quick_gelu
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x_bnd: Array) -> Array:
    """Returns [b, n, d]."""
    d = x_bnd.shape[-1]
    x = Linear((self.hidden,), ("width", "ffn"), dtype=self.dtype, name="up")(x_bnd)
    return Linear((d,), ("ffn", "width"), dtype=self.dtype, name="down")(self.activation(x))


class Block(nn.Module):
  """Attention and MLP around a residual stream.

  Attributes:
    heads: attention heads.
    hidden: hidden width of the MLP.
    activation: of the MLP.
    eps: of the norms.
    causal: no token sees a later one.
    post: norms after each sum, as in the first transformers, instead of before each part.
    dtype: of the matmuls.
  """

  heads: int
  hidden: int
  activation: Callable[[Array], Array] = quick_gelu
  eps: float = 1e-5
  causal: bool = False
  post: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x_bnd: Array) -> Array:
    """Returns [b, n, d], float32."""
    attention = Attention(self.heads, self.causal, dtype=self.dtype, name="attention")
    mlp = Mlp(self.hidden, self.activation, self.dtype, name="mlp")
    norm1, norm2 = Norm(self.eps, name="norm1"), Norm(self.eps, name="norm2")
    if self.post:
      x_bnd = norm1(x_bnd + attention(x_bnd))
      return norm2(x_bnd + mlp(x_bnd))
    x_bnd += attention(norm1(x_bnd))
    return x_bnd + mlp(norm2(x_bnd))


def init_blocks(block: nn.Module, key: Array, depth: int, *args: Array) -> Params:
  """Returns the boxed parameters of `depth` equal blocks, stacked."""
  return stacked(lambda k: block.init(k, *args)["params"], key, depth, "layers")


def run_blocks(
  block: nn.Module,
  params: Params,
  x: Array,
  first: int = 0,
  last: int = 0,
  *,
  extra: tuple[Array, ...] = (),
) -> Array:
  """Applies blocks `first` to `last` (not included; 0 is all that follow), one after the other.

  Each gets the output of the one before it, and `extra`.
  """
  part = jax.tree.map(lambda leaf: leaf[first : last or None], params)

  def step(x, p):
    return jnp.asarray(block.apply({"params": p}, x, *extra)), None

  return jax.lax.scan(step, x, part)[0]


@dataclasses.dataclass(frozen=True)
class ImageTower:
  """CLIP's image tower: patches and a class token, blocks, projection of the class token.

  Attributes:
    grid: patches along each side.
    patch: pixels along each side of a patch.
    width: d.
    layers: blocks.
    heads: attention heads.
    dim: width of the projection.
    dtype: of the matmuls.
  """

  grid: int
  patch: int
  width: int
  layers: int
  heads: int
  dim: int
  dtype: str = "float32"

  @property
  def block(self) -> Block:
    """One block, without parameters."""
    return Block(self.heads, 4 * self.width, dtype=self.dtype)

  def init(self, key: Array) -> Params:
    """Returns boxed parameters."""
    keys = jax.random.split(key, 7)
    x_bnd = jnp.zeros((1, 1, self.width))
    patch_bqyxc = jnp.zeros((1, 1, self.patch, self.patch, 3))
    return {
      "patch": self._patch.init(keys[0], patch_bqyxc)["params"],
      "class": logical(normal, None)(keys[1], (self.width,)),
      "positions": logical(normal, None, None)(keys[2], (self.grid**2 + 1, self.width)),
      "norm_pre": Norm().init(keys[3], x_bnd)["params"],
      "blocks": init_blocks(self.block, keys[4], self.layers, x_bnd),
      "norm_post": Norm().init(keys[5], x_bnd)["params"],
      "project": self._project.init(keys[6], x_bnd)["params"],
    }

  @property
  def _patch(self) -> Linear:
    axes = (None, None, None, "width")
    return Linear((self.width,), axes, bias=False, dtype=self.dtype)

  @property
  def _project(self) -> Linear:
    return Linear((self.dim,), ("width", None), bias=False, dtype=self.dtype)

  def embed(self, params: Params, frames_byxc: Array) -> Array:
    """Returns the tokens [b, 1 + grid^2, d] before the first block, class token first.

    Args:
      params: of the tower.
      frames_byxc: uint8 RGB; rows and columns beyond the last whole patch are not looked at.
    """
    side, size = self.grid * self.patch, (self.grid, self.patch)
    x = pixels(frames_byxc[:, :side, :side], CLIP_MEAN, CLIP_STD)
    x = x.reshape(-1, *size, *size, 3).swapaxes(2, 3)
    x_bqyxc = x.reshape(-1, self.grid**2, self.patch, self.patch, 3)
    x_bqd = jnp.asarray(self._patch.apply({"params": params["patch"]}, x_bqyxc))
    class_b1d = jnp.broadcast_to(params["class"], (len(x), 1, self.width))
    x_bnd = jnp.concatenate([class_b1d, x_bqd.astype(jnp.float32)], axis=1)
    x_bnd += params["positions"][None]
    return jnp.asarray(Norm().apply({"params": params["norm_pre"]}, x_bnd))

  def run(self, params: Params, x_bnd: Array, first: int = 0, last: int = 0) -> Array:
    """Runs blocks `first` to `last` (not included; 0 is all that follow)."""
    return run_blocks(self.block, params["blocks"], x_bnd, first, last)

  def pool(self, params: Params, x_bnd: Array) -> Array:
    """Returns the projected class token [b, dim] of the last block's output, float32."""
    x_bd = Norm().apply({"params": params["norm_post"]}, x_bnd[:, 0])
    return jnp.asarray(self._project.apply({"params": params["project"]}, x_bd), jnp.float32)


@dataclasses.dataclass(frozen=True)
class TextTower:
  """CLIP's text tower: causal blocks over tokens, no padding mask.

  Attributes:
    vocab: rows of the embedding table.
    length: tokens of a text.
    width: d.
    layers: blocks.
    heads: attention heads.
    dim: width of the projection.
    dtype: of the matmuls.
  """

  vocab: int
  length: int
  width: int
  layers: int
  heads: int
  dim: int
  dtype: str = "float32"

  @property
  def block(self) -> Block:
    """One block, without parameters."""
    return Block(self.heads, 4 * self.width, causal=True, dtype=self.dtype)

  @property
  def _project(self) -> Linear:
    return Linear((self.dim,), ("width", None), bias=False, dtype=self.dtype)

  def init(self, key: Array) -> Params:
    """Returns boxed parameters."""
    keys = jax.random.split(key, 5)
    x_bnd = jnp.zeros((1, 1, self.width))
    return {
      "tokens": logical(normal, "vocab", "width")(keys[0], (self.vocab, self.width)),
      "positions": logical(normal, None, None)(keys[1], (self.length, self.width)),
      "blocks": init_blocks(self.block, keys[2], self.layers, x_bnd),
      "norm": Norm().init(keys[3], x_bnd)["params"],
      "project": self._project.init(keys[4], x_bnd)["params"],
    }

  def __call__(self, params: Params, ids_bw: Array) -> tuple[Array, Array]:
    """Encodes texts.

    Args:
      params: of the tower.
      ids_bw: token ids, padded with 0 (itself a token); the end token has the highest id.

    Returns:
      States of all tokens after the last norm [b, w, d], padding included, and the projected
      state of the end token [b, dim], both float32.
    """
    x_bwd = self.states(params, params["tokens"][ids_bw])
    end_b = ids_bw.argmax(axis=1)
    end_bd = jnp.take_along_axis(x_bwd, end_b[:, None, None], axis=1)[:, 0]
    return x_bwd, self.project(params, end_bd)

  def states(self, params: Params, x_bwd: Array) -> Array:
    """Returns the states after the last norm, float32, of the embeddings of tokens."""
    x_bwd = x_bwd + params["positions"][None, : x_bwd.shape[1]]
    x_bwd = run_blocks(self.block, params["blocks"], x_bwd.astype(jnp.float32))
    return jnp.asarray(Norm().apply({"params": params["norm"]}, x_bwd))

  def project(self, params: Params, end_bd: Array) -> Array:
    """Returns the projection [b, dim], float32, of the state of the end token."""
    pooled_bf = self._project.apply({"params": params["project"]}, end_bd)
    return jnp.asarray(pooled_bf, jnp.float32)


def towers(sizes: Any) -> tuple[ImageTower, TextTower]:
  """Returns the towers of sizes that have the fields of `clip.Config` and `localizer.Config`."""
  c = sizes
  return (
    ImageTower(c.grid, c.patch, c.image_width, c.image_layers, c.image_heads, c.dim, c.dtype),
    TextTower(c.vocab, c.text_len, c.text_width, c.text_layers, c.text_heads, c.dim, c.dtype),
  )
