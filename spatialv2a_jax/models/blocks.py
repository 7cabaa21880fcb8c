"""Transformer blocks of the flow network: MMAudio's, with an ear axis.

Axis letters: b batch, e ear (size 1 where both ears share a stream), t latent frame, n token of
any kind, d width, h head, k head width, c latent channel.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax.models import attention, layers
from spatialv2a_jax.models.layers import Constrain, GatedMlp, Linear, ParallelLinear

Qkv = tuple[jax.Array, jax.Array, jax.Array]


class Stream(nn.Module):
  """The part of a block that belongs to one kind of tokens: adaLN-zero around an attention.

  Attributes:
    width: d.
    heads: attention heads; divides the width.
    ffn: hidden width of the MLP.
    taps: kernel length of output projection and MLP; 0 where the order is no time axis (text).
    pre_only: the stream only gives queries, keys and values, and ends there.
    dtype: of the matmuls; parameters, norms and softmax stay float32, and the residual stream is
      what it comes as.
    gemm: convolves by matrix products.
    rope_by_product: see `layers.rope`.
  """

  width: int
  heads: int
  ffn: int
  taps: int = 3
  pre_only: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  gemm: bool = False
  rope_by_product: bool = False

  def setup(self):
    """Declares the layers; those after the attention only where they are used."""
    d, h, k = self.width, self.heads, self.width // self.heads
    parts = 2 if self.pre_only else 6
    self.mod = ParallelLinear(
      parts, (d,), ("width", "mod"), kernel_init=layers.zeros, dtype=self.dtype
    )
    qkv_axes, qkv_init = ("width", "heads", "head_dim"), layers.xavier(d, 3 * d)
    self.qkv = ParallelLinear(3, (h, k), qkv_axes, kernel_init=qkv_init, dtype=self.dtype)
    self.q_norm = layers.RMSNorm()
    self.k_norm = layers.RMSNorm()
    if not self.pre_only:
      options = {"taps": self.taps, "dtype": self.dtype, "gemm": self.gemm}
      self.out = Linear((d,), ("heads", "head_dim", "width"), **options)
      self.mlp = GatedMlp(self.ffn, **options)

  def modulation(self, c_bend: jax.Array) -> list[jax.Array]:
    """Returns shifts, scales and gates of an activated condition.

    Ears or tokens that share a condition have size 1.
    """
    return self.mod(c_bend)

  def before(self, x_bend: jax.Array, mods: list[jax.Array], table: np.ndarray | None) -> Qkv:
    """Returns queries, keys and values [b, e, n, h, k].

    Args:
      x_bend: tokens.
      mods: from `modulation`.
      table: rotary table of the tokens, None for those without positions.
    """
    q, k, v = self.qkv(layers.modulate(x_bend, *mods[:2]))
    q, k = self.q_norm(q).astype(self.dtype), self.k_norm(k).astype(self.dtype)
    if table is not None:
      q, k = (layers.rope(x, table, self.rope_by_product) for x in (q, k))
    return q.astype(self.dtype), k.astype(self.dtype), v

  def after(self, x_bend: jax.Array, out_benhk: jax.Array, mods: list[jax.Array]) -> jax.Array:
    """Returns the tokens after output projection and MLP, both gated."""
    gate1, shift2, scale2, gate2 = mods[2:]
    x_bend += self.out(out_benhk) * gate1
    return x_bend + self.mlp(layers.modulate(x_bend, shift2, scale2)) * gate2


class EarBlock(nn.Module):
  """Self-attention and ConvMLP over the frames of one ear (MMAudio's fused block).

  Attributes:
    width: d.
    heads: attention heads; divides the width.
    ffn: hidden width of the MLP.
    dtype: of the matmuls.
    gemm: convolves by matrix products.
    attention: "xla", or NVIDIA's "cudnn".
    constrain: pins an activation to its logical axes.
  """

  width: int
  heads: int
  ffn: int
  dtype: jax.typing.DTypeLike = jnp.float32
  gemm: bool = False
  attention: Literal["xla", "cudnn"] = "xla"
  constrain: Constrain = layers.unconstrained

  @nn.compact
  def __call__(self, x_btd: jax.Array, c_btd: jax.Array) -> jax.Array:
    """Maps tokens [b, t, d] under the activated per-frame condition [b, t, d]."""
    size = (self.width, self.heads, self.ffn)
    options: dict[str, Any] = {"dtype": self.dtype, "gemm": self.gemm}
    options["rope_by_product"] = self.attention == "xla"
    stream = Stream(*size, name="audio", **options)
    table = layers.rope_table(x_btd.shape[1], self.width // self.heads)
    mods = stream.modulation(c_btd)
    qkv = stream.before(x_btd, mods, table)
    if self.attention == "cudnn":
      out_bthk = attention.fused(*qkv)
    else:
      out_bthk, _ = attention.attend(*qkv)
    x_btd = stream.after(x_btd, out_bthk, mods)
    return self.constrain(x_btd, "act_batch", "act_time", "act_width")


class JointBlock(nn.Module):
  """Joint attention over the latents of the ears, the visual and the text tokens.

  The streams' weights are shared by the ears. Each ear's latents, with a copy of the visual and
  text tokens, attend to that same set and to the other ear's latents, the latter weighted by
  `cross_mass` m: at m = 1 this is attention over all tokens at once, at m = 0 every ear is on its
  own, as in the mono network. The copies' outputs are averaged, so ears that agree leave the
  visual and text tokens as one ear alone would.

  Attributes:
    ears: 1 or 2.
    width: d.
    heads: attention heads; divides the width.
    ffn: hidden width of the MLPs.
    last: visual and text streams end in this block.
    dtype: of the matmuls.
    gemm: convolves by matrix products.
    attention: "xla", or NVIDIA's "cudnn".
    sealed: see `layers.sealed`.
    constrain: pins an activation to its logical axes.
  """

  ears: int
  width: int
  heads: int
  ffn: int
  last: bool = False
  sealed: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  gemm: bool = False
  attention: Literal["xla", "cudnn"] = "xla"
  constrain: Constrain = layers.unconstrained

  @nn.compact
  def __call__(self, tokens: tuple[jax.Array, ...], c_b1td: jax.Array, g_b11d: jax.Array):
    """Runs the block.

    Args:
      tokens: audio [b, e, t, d], clip [b, 1, v, d] and text tokens [b, 1, w, d].
      c_b1td: per-frame condition of the audio tokens, activated.
      g_b11d: global condition of the others, activated.

    Returns:
      The three kinds of tokens after the block; those of a `last` block's clip and text streams
      are unchanged.
    """
    x_betd, clip_b1vd, text_b1wd = tokens
    frames, k = x_betd.shape[2], self.width // self.heads
    size = (self.width, self.heads, self.ffn)
    options: dict[str, Any] = {"dtype": self.dtype, "gemm": self.gemm}
    options["rope_by_product"] = self.attention == "xla"
    audio = Stream(*size, name="audio", **options)
    clip = Stream(*size, pre_only=self.last, name="clip", **options)
    text = Stream(*size, taps=0, pre_only=self.last, name="text", **options)

    seal = functools.partial(layers.sealed, lift=nn.jit) if self.sealed else lambda f: f
    modulation = seal(Stream.modulation)
    attend: Callable[..., Any] = _sealed_attend if self.sealed else _attend
    if self.attention == "cudnn" and self.ears == 1:
      attend = _fused
    table = layers.rope_table(frames, k)
    clip_table = layers.rope_table(clip_b1vd.shape[2], k, frames / clip_b1vd.shape[2])
    before = [
      seal(lambda stream, x, mods, at=at: stream.before(x, mods, at))
      for at in (table, clip_table, None)
    ]
    after = seal(Stream.after)
    audio_mods = modulation(audio, c_b1td)
    clip_mods, text_mods = modulation(clip, g_b11d), modulation(text, g_b11d)
    # One ear after the other: XLA may round the rows of one large batch differently; apart, ears
    # with equal inputs have equal outputs, to the bit. Nor is there an axis of size 2 within the
    # block, along which a TPU would copy what it joins and cuts.
    x_ears = jnp.split(x_betd, self.ears, axis=1)
    audio_qkv = [before[0](audio, x_b1td, audio_mods) for x_b1td in x_ears]
    clip_qkv = before[1](clip, clip_b1vd, clip_mods)
    text_qkv = before[2](text, text_b1wd, text_mods)
    context = [jnp.concatenate(parts, axis=2) for parts in zip(clip_qkv, text_qkv, strict=True)]

    mass_init, mass = layers.logical(layers.ones, "heads"), None
    if self.ears == 2:
      mass = self.param("cross_mass", mass_init, (self.heads,))
    if mass is not None and not self.sealed and jnp.dtype(self.dtype) != jnp.float32:
      biased = attention.fused_biased
      if self.attention == "xla":
        limit = largest_logit(k, audio, clip, text)
        biased = functools.partial(attention.attend_biased, limit=limit)
      outs, context_outs = attend_at_once(audio_qkv, context, mass, biased, last=self.last)
    else:
      outs, context_outs = [], []
      for own, other in zip(audio_qkv, audio_qkv[::-1], strict=True):
        queries, keys, values = (
          jnp.concatenate(parts, axis=2) for parts in zip(own, context, strict=True)
        )
        if self.last:
          queries = own[0]
        out_b1nhk, lse_b1nh = attend(queries, keys, values)
        if mass is not None:
          _, other_keys, other_values = other
          other_out, other_lse = attend(queries, other_keys, other_values)
          out_b1nhk = merge_ears(out_b1nhk, lse_b1nh, other_out, other_lse, mass)
        outs.append(out_b1nhk[:, :, :frames])
        context_outs.append(out_b1nhk[:, :, frames:])

    def pin(x, ear):
      return self.constrain(x, "act_batch", ear, "act_time", "act_width")

    x_ears = [after(audio, x, out, audio_mods) for x, out in zip(x_ears, outs, strict=True)]
    if not self.last:
      first, *rest = context_outs
      mean_b1nhk = sum(rest, first) / self.ears
      out_clip, out_text = jnp.split(mean_b1nhk, [clip_b1vd.shape[2]], axis=2)
      clip_b1vd = pin(after(clip, clip_b1vd, out_clip, clip_mods), None)
      text_b1wd = pin(after(text, text_b1wd, out_text, text_mods), None)
    return pin(jnp.concatenate(x_ears, axis=1), "ear"), clip_b1vd, text_b1wd


def _attend(q_benhk: jax.Array, k_benhk: jax.Array, v_benhk: jax.Array):
  """Attention of every clip and ear, and its log-sum-exp [b, e, n, h]."""
  folded = (x.reshape(-1, *x.shape[2:]) for x in (q_benhk, k_benhk, v_benhk))
  return tuple(x.reshape(*q_benhk.shape[:2], *x.shape[1:]) for x in attention.attend(*folded))


def _fused(q_b1nhk: jax.Array, k_b1nhk: jax.Array, v_b1nhk: jax.Array) -> tuple[jax.Array, None]:
  """Does the same for a single ear in one kernel, whose log-sum-exp nothing merges."""
  return attention.fused(q_b1nhk[:, 0], k_b1nhk[:, 0], v_b1nhk[:, 0])[:, None], None


def _sealed_attend(q_benhk: jax.Array, k_benhk: jax.Array, v_benhk: jax.Array):
  """Does the same as `_attend`, sealed.

  One array comes out, for of two XLA would drop the one that a single ear does not use, and compute
  the other in another way.
  """

  def both(*qkv):
    out, lse = _attend(*qkv)
    return jnp.concatenate([out.astype(lse.dtype), lse[..., None]], axis=-1)

  y = layers.sealed(both)(q_benhk, k_benhk, v_benhk)
  return y[..., :-1].astype(v_benhk.dtype), y[..., -1]


def largest_logit(head_dim: int, *streams: Stream) -> jax.Array:
  """Returns a bound of all logits between tokens of streams: q and k are of known norm."""
  q_scale, k_scale = (
    jnp.stack([jnp.abs(nn.unbox(n.variables)["params"]["scale"]).max() for n in norms]).max()
    for norms in ([s.q_norm for s in streams], [s.k_norm for s in streams])
  )
  return jax.lax.stop_gradient(q_scale * k_scale) * math.sqrt(head_dim)


def attend_at_once(
  audio_qkv: Sequence[Qkv],
  context: Sequence[jax.Array],
  mass_h: jax.Array,
  attend_biased: Callable[..., jax.Array],
  *,
  last: bool,
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Attention of both ears as one: all queries over all keys, the mass as a bias of the logits.

  For a TPU faster than attention over two sets and `merge_ears`, by its compiler; on a GPU it is
  one kernel of cuDNN. For bfloat16: a mass below e^-40 counts as that, whose share no digit of the
  result shows, yet gets its gradient.

  Args:
    audio_qkv: queries, keys and values [b, 1, t, h, k] of each ear.
    context: those of the other tokens.
    mass_h: see `merge_ears`.
    attend_biased: `attention.attend_biased` with its limit, or `attention.fused_biased`.
    last: the other tokens ask nothing.

  Returns:
    The output for the tokens of each ear, and for the other tokens as each ear's copy has them.
  """
  (left, *left_kv), (right, *right_kv) = audio_qkv
  frames, others = left.shape[2], context[0].shape[2]
  asked = [left, right] if last else [left, right, context[0], context[0]]
  parts = zip(left_kv, right_kv, context[1:], strict=True)
  ear_t = np.repeat([0, 1, 0, 1][: len(asked)], [x.shape[2] for x in asked])
  ear_s = np.repeat([0, 1, 2], [frames, frames, others])  # 2: of neither.
  floor = math.exp(-40)
  low_h = floor + (mass_h - jax.lax.stop_gradient(mass_h))
  log_h = jnp.log(jnp.where(mass_h > floor, mass_h, low_h))
  foreign_sn = np.stack([ear_s == 1, ear_s == 0], axis=-1)
  out_bnhk = attend_biased(
    jnp.concatenate(asked, axis=2)[:, 0],
    *(jnp.concatenate(part, axis=2)[:, 0] for part in parts),
    jnp.asarray(ear_t[:, None] == np.arange(2), jnp.float32),
    jnp.where(foreign_sn[:, None], log_h[None, :, None], 0),
  )
  ends = np.cumsum([x.shape[2] for x in asked])[:-1]
  outs = jnp.split(out_bnhk[:, None], ends.tolist(), axis=2)
  return outs[:2], outs[2:]


def merge_ears(
  own_benhk: jax.Array,
  own_lse_benh: jax.Array,
  other_benhk: jax.Array,
  other_lse_benh: jax.Array,
  mass_h: jax.Array,
) -> jax.Array:
  """Merges attention over two disjoint sets of keys, the second weighted by a mass per head.

  The mass enters the softmax linearly. A negative one counts as 0 yet receives its gradient, so
  that it can recover; at 0 the result is `own_benhk`, bit for bit.

  Args:
    own_benhk: attention over the first set.
    own_lse_benh: log of its softmax denominator.
    other_benhk: attention over the second set.
    other_lse_benh: log of its softmax denominator.
    mass_h: multiplies the softmax weights of the second set.

  Returns:
    Attention over both sets [b, e, n, h, k].
  """
  mass_h = mass_h + jax.lax.stop_gradient(jnp.maximum(mass_h, 0) - mass_h)
  # The bound keeps the derivative finite; the share rounds to 1 long before it.
  odds = mass_h[None, None, None] * jnp.exp(jnp.minimum(other_lse_benh - own_lse_benh, 40.0))
  share = (odds / (1 + odds))[..., None].astype(own_benhk.dtype)
  return own_benhk + share * (other_benhk - own_benhk)


class FinalLayer(nn.Module):
  """Adaptive LayerNorm and a convolution to the flow of one ear, zero at the start."""

  width: int
  channels: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x_btd: jax.Array, g_b1d: jax.Array) -> jax.Array:
    """Maps tokens [b, t, d] under the activated global condition [b, 1, d] to a flow [b, t, c]."""
    zeros = {"kernel_init": layers.zeros, "dtype": self.dtype}
    shift, scale = ParallelLinear(2, (self.width,), ("width", "mod"), name="mod", **zeros)(g_b1d)
    conv = Linear((self.channels,), ("width", "latent"), taps=7, name="conv", **zeros)
    return conv(layers.modulate(x_btd, shift, scale)).astype(jnp.float32)
