"""Synchformer's visual encoder (arXiv 2401.16423): 16 frames -> 8 tokens, as MMAudio uses it.

A ViT over space and time whose attention is divided: tokens look at those of their place at other
times, then at those of their time at other places; a class token sees all. A last layer sums up
the places of each time.

Axes: b video, n frame at 25 fps, g segment, z frame of a segment, y row, x column, c colour,
t time of a segment (two frames), p place (patch of a frame), i token, d width, h head, k head
width, s synchronisation token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatialv2a_jax.models import vit
from spatialv2a_jax.models.layers import Linear, logical

EPS = 1e-6
FRAMES, STRIDE = 16, 8  # Of a segment, and from one to the next, at 25 fps.


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those of the released encoder.

  Attributes:
    size: pixels along each side of a frame.
    patch: pixels along each side of a patch; a patch spans two frames.
    width: d.
    layers: blocks.
    heads: attention heads.
    dtype: of the matmuls.
    batch: segments that are encoded at once.
  """

  size: int = 224
  patch: int = 16
  width: int = 768
  layers: int = 12
  heads: int = 12
  dtype: str = "float32"
  batch: int = 8


class Synchformer(NamedTuple):
  """Functions of one encoder.

  Attributes:
    init: key -> boxed parameters.
    encode: (params, frames_bnyxc uint8 RGB at 25 fps, size x size) -> tokens_bsd, 8 per segment;
      frames after the last whole segment are not looked at.
  """

  init: Callable[[Array], Any]
  encode: Callable[[Any, Array], Array]


def segments(frames: int) -> np.ndarray:
  """Returns the frame indices of each overlapping segment, int [g, z].

  Raises:
    ValueError: with fewer frames than one segment.
  """
  if frames < FRAMES:
    raise ValueError(f"a segment has {FRAMES} frames, got {frames}")
  starts = np.arange(0, frames - FRAMES + 1, STRIDE)
  return starts[:, None] + np.arange(FRAMES)[None]


def divided(q: Array, k: Array, v: Array, *, times: int, over_time: bool) -> Array:
  """Attention of a class token to all, and of each patch to that token and to its own group.

  Args:
    q: queries [b, 1 + t p, h, k], class token first, then patches by time and place.
    k: keys.
    v: values.
    times: t.
    over_time: groups share a place; otherwise they share a time.

  Returns:
    [b, 1 + t p, h, k].
  """
  rows, _, heads, width = q.shape

  def grouped(x):
    x = x[:, 1:].reshape(rows, times, -1, heads, width)
    x = x.swapaxes(1, 2) if over_time else x
    return x.reshape(-1, *x.shape[2:])

  def with_class(x):
    groups = grouped(x)
    first = jnp.repeat(x[:, :1], len(groups) // rows, axis=0)
    return jnp.concatenate([first, groups], axis=1)

  whole = jax.nn.dot_product_attention(q[:, :1], k, v)
  parts = jax.nn.dot_product_attention(grouped(q), with_class(k), with_class(v))
  parts = parts.reshape(rows, -1, *parts.shape[1:])
  parts = parts.swapaxes(1, 2) if over_time else parts
  return jnp.concatenate([whole, parts.reshape(rows, -1, heads, width)], axis=1)


class Block(nn.Module):
  """Attention over time, attention over space, MLP, each after a norm and beside a skip."""

  heads: int
  times: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x_bid: Array) -> Array:
    """Returns [b, i, d]."""
    for name in ("time", "space"):

      def mix(q, k, v, over_time=name == "time"):
        return divided(q, k, v, times=self.times, over_time=over_time)

      attention = vit.Attention(self.heads, mix=mix, dtype=self.dtype, name=name)
      x_bid += attention(vit.Norm(EPS, name=f"norm_{name}")(x_bid))
    mlp = vit.Mlp(4 * x_bid.shape[-1], vit.exact_gelu, self.dtype, name="mlp")
    return x_bid + mlp(vit.Norm(EPS, name="norm_mlp")(x_bid))


def build(config: Config) -> Synchformer:
  """Returns the functions of an encoder of the given sizes."""
  c = config
  grid, times = c.size // c.patch, FRAMES // 2
  block = Block(c.heads, times, c.dtype)
  summary = vit.Block(c.heads, 4 * c.width, vit.exact_gelu, EPS, dtype=c.dtype)
  patch = Linear((c.width,), (None, None, None, None, "width"), dtype=c.dtype)

  def init(key: Array) -> Any:
    keys = jax.random.split(key, 8)
    x_bid = jnp.zeros((1, 1 + times, c.width))
    patch_bizyxc = jnp.zeros((1, 1, 2, c.patch, c.patch, 3))
    table = logical(vit.normal, None, None)
    return {
      "patch": patch.init(keys[0], patch_bizyxc)["params"],
      "class": logical(vit.normal, None)(keys[1], (c.width,)),
      "places": table(keys[2], (1 + grid**2, c.width)),
      "times": table(keys[3], (times, c.width)),
      "blocks": vit.init_blocks(block, keys[4], c.layers, x_bid),
      "norm": vit.Norm(EPS).init(keys[5], x_bid)["params"],
      "summary_class": logical(vit.normal, None)(keys[6], (c.width,)),
      "summary": summary.init(keys[7], x_bid)["params"],
    }

  def first(x_1d: Array, rows: int) -> Array:
    return jnp.broadcast_to(x_1d, (rows, 1, c.width))

  def segment(params: Any, frames_zyxc: Array) -> Array:
    x = vit.pixels(frames_zyxc, (0.5,) * 3, (0.5,) * 3)
    x = x.reshape(times, 2, grid, c.patch, grid, c.patch, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    x_1izyxc = x.reshape(1, -1, *x.shape[3:])
    x_1id = jnp.asarray(patch.apply({"params": params["patch"]}, x_1izyxc), jnp.float32)
    x_tpd = x_1id.reshape(times, grid**2, c.width)
    x_tpd += params["places"][None, 1:] + params["times"][:, None]
    class_11d = first((params["class"] + params["places"][0])[None, None], 1)
    x_1id = jnp.concatenate([class_11d, x_tpd.reshape(1, -1, c.width)], axis=1)
    x_1id = vit.run_blocks(block, params["blocks"], x_1id)
    x_1id = jnp.asarray(vit.Norm(EPS).apply({"params": params["norm"]}, x_1id[:, 1:]))
    x_tpd = x_1id.reshape(times, grid**2, c.width)
    x_tpd = jnp.concatenate([first(params["summary_class"][None, None], times), x_tpd], axis=1)
    return jnp.asarray(summary.apply({"params": params["summary"]}, x_tpd))[:, 0]

  def encode(params: Any, frames_bnyxc: Array) -> Array:
    index_gz = segments(frames_bnyxc.shape[1])
    x = jnp.asarray(frames_bnyxc)[:, index_gz]
    x = x.reshape(-1, *x.shape[2:])
    tokens = jax.lax.map(lambda one: segment(params, one), x, batch_size=c.batch)
    return tokens.reshape(len(frames_bnyxc), -1, c.width)

  return Synchformer(init, encode)
