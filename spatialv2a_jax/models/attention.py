"""Softmax attention of the flow network.

Axis letters: b batch, t query, s key, h head, k head width, n group of queries.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAFE_LOGIT = 70.0  # Between its negative and it, sums of exponentials are normal in float32.


@jax.custom_vjp
def attend(q_bthk: jax.Array, k_bshk: jax.Array, v_bshk: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Softmax attention that also returns the log of each query's softmax denominator.

  `jax.nn.dot_product_attention(return_residual=True)` stops the gradient of that logarithm,
  which the merge of two ears needs. The backward pass makes the weights anew from the logarithm
  (as FlashAttention does, arXiv 2205.14135): neither they nor the logits are kept.

  Returns:
    Output [b, t, h, k] in the dtype of `v_bshk`, and log-sum-exp [b, t, h] in float32.
  """
  logits_bhts = _logits(q_bthk, k_bshk)
  peak = logits_bhts.max(axis=-1, keepdims=True)
  if v_bshk.dtype == jnp.float32:
    weight = jnp.exp(logits_bhts - peak)
    out = jnp.einsum("bhts,bshk->bthk", weight, v_bshk)
    total_bth = weight.sum(axis=-1).swapaxes(1, 2)
  else:
    # Logits are made twice: with heads of 64 that takes less than to write them in float32 and to
    # read them again. What is written are the weights, in half the bytes.
    q_bthk, k_bshk, peak = jax.lax.optimization_barrier((q_bthk, k_bshk, peak))
    low = jnp.exp(_logits(q_bthk, k_bshk) - peak).astype(v_bshk.dtype)
    # The product sums the weights by the way: one pass over them less.
    more = jnp.concatenate([v_bshk, jnp.ones_like(v_bshk[..., :1])], axis=-1)
    out = jnp.einsum("bhts,bshk->bthk", low, more, preferred_element_type=jnp.float32)
    out, total_bth = out[..., :-1], out[..., -1]
  lse_bth = jnp.log(total_bth) + peak.squeeze(-1).swapaxes(1, 2)
  return (out / total_bth[..., None]).astype(v_bshk.dtype), lse_bth


def _logits(q_bthk: jax.Array, k_bshk: jax.Array) -> jax.Array:
  logits = jnp.einsum("bthk,bshk->bhts", q_bthk, k_bshk, preferred_element_type=jnp.float32)
  return logits / math.sqrt(q_bthk.shape[-1])


def _attend_forward(q_bthk, k_bshk, v_bshk):
  out, lse = (checkpoint_name(x, "attention") for x in attend(q_bthk, k_bshk, v_bshk))
  return (out, lse), (q_bthk, k_bshk, v_bshk, out, lse)


def _attend_backward(saved, cotangents):
  q_bthk, k_bshk, v_bshk, out, lse_bth = saved
  d_out, d_lse = cotangents
  weight = jnp.exp(_logits(q_bthk, k_bshk) - lse_bth.swapaxes(1, 2)[..., None])
  weight = weight.astype(v_bshk.dtype)  # Two products read it.
  d_v = jnp.einsum("bhts,bthk->bshk", weight, d_out)
  d_weight = jnp.einsum("bthk,bshk->bhts", d_out, v_bshk, preferred_element_type=jnp.float32)
  common = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - d_lse
  d_logits = weight * (d_weight - common.swapaxes(1, 2)[..., None])
  d_logits = (d_logits / math.sqrt(q_bthk.shape[-1])).astype(q_bthk.dtype)
  d_q = jnp.einsum("bhts,bshk->bthk", d_logits, k_bshk)
  return d_q, jnp.einsum("bhts,bthk->bshk", d_logits, q_bthk), d_v


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def attend_biased(
  q_bthk: jax.Array,
  k_bshk: jax.Array,
  v_bshk: jax.Array,
  group_tn: jax.Array,
  bias_shn: jax.Array,
  limit: jax.Array,
) -> jax.Array:
  """Softmax attention with group x bias added to the logits, for bfloat16 and many tokens.

  The sum comes with the product that makes the logits, as further columns of what is multiplied:
  a TPU multiplies 128 at a time, and heads are 64 wide. The largest logit of each query, which
  takes a product of its own, is looked for and subtracted only if logits may exceed `SAFE_LOGIT`.

  Args:
    q_bthk: queries.
    k_bshk: keys.
    v_bshk: values.
    group_tn: 0 or 1 for each query and group; receives no gradient.
    bias_shn: what the logits of a group get, in float32; at most 10.
    limit: no logit is larger without it, nor smaller than its negative; receives no gradient.

  Returns:
    Output [b, t, h, k].
  """
  return _biased_forward(q_bthk, k_bshk, v_bshk, group_tn, bias_shn, limit)[0]


def _biased_forward(q_bthk, k_bshk, v_bshk, group_tn, bias_shn, limit):
  more = jnp.concatenate([v_bshk, jnp.ones_like(v_bshk[..., :1])], axis=-1)
  queries, keys = _columns(q_bthk, k_bshk, group_tn, bias_shn)
  queries, keys, more = jax.lax.optimization_barrier((queries, keys, more))
  b, t, h, _ = q_bthk.shape
  peak_bht1 = jax.lax.cond(
    limit <= SAFE_LOGIT,
    lambda *_: jnp.zeros((b, h, t, 1), jnp.float32),
    lambda *pair: _product(*pair).max(axis=-1, keepdims=True),
    queries,
    keys,
  )
  weight = jnp.exp(_product(queries, keys) - peak_bht1).astype(v_bshk.dtype)
  # The product sums the weights by the way: one pass over them less.
  out = jnp.einsum("bhts,bshk->bthk", weight, more, preferred_element_type=jnp.float32)
  total_bth = out[..., -1]
  out = (out[..., :-1] / total_bth[..., None]).astype(v_bshk.dtype)
  lse_bth = jnp.log(total_bth) + peak_bht1.squeeze(-1).swapaxes(1, 2)
  out, lse_bth = (checkpoint_name(x, "attention") for x in (out, lse_bth))
  return out, (q_bthk, k_bshk, v_bshk, group_tn, bias_shn, limit, out, lse_bth)


def _columns(q_bthk, k_bshk, group_tn, bias_shn):
  """Returns two arrays whose product are the biased logits."""
  (b, t, h, k), s = q_bthk.shape, k_bshk.shape[1]
  dtype, n = q_bthk.dtype, group_tn.shape[-1]
  group = jnp.broadcast_to(group_tn.astype(dtype)[None, :, None], (b, t, h, n))
  high = bias_shn.astype(dtype)  # Two columns for the digits that one does not hold.
  low = (bias_shn - high.astype(bias_shn.dtype)).astype(dtype)
  # Broadcast in float32, in which their gradient is then summed over the clips.
  biases = (
    jnp.broadcast_to(x.astype(jnp.float32)[None], (b, s, h, n)).astype(dtype) for x in (high, low)
  )
  return (
    jnp.concatenate([q_bthk * (1 / math.sqrt(k)), group, group], axis=-1),
    jnp.concatenate([k_bshk, *biases], axis=-1),
  )


def _product(a_bthk: jax.Array, b_bshk: jax.Array) -> jax.Array:
  return jnp.einsum("bthk,bshk->bhts", a_bthk, b_bshk, preferred_element_type=jnp.float32)


def _biased_backward(saved, d_out):
  q_bthk, k_bshk, v_bshk, group_tn, bias_shn, limit, out, lse_bth = saved
  dtype, width = v_bshk.dtype, q_bthk.shape[-1]
  columns = _columns(q_bthk, k_bshk, group_tn, bias_shn)
  queries, keys = jax.lax.optimization_barrier(columns)
  weight = jnp.exp(_product(queries, keys) - lse_bth.swapaxes(1, 2)[..., None])
  weight = jax.lax.optimization_barrier(weight.astype(dtype))
  d_v = jnp.einsum("bhts,bthk->bshk", weight, d_out)
  common = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

  def d_logits(d_out, v_bshk, common):
    d_weight = _product(d_out, v_bshk)
    return (weight * (d_weight - common.swapaxes(1, 2)[..., None])).astype(dtype)

  # Made for each of the two products that read it, which takes less than to write it.
  again = jax.lax.optimization_barrier((d_out, v_bshk, common))
  d_q = jnp.einsum("bhts,bshk->bthk", d_logits(*again), k_bshk) / math.sqrt(width)
  again = jax.lax.optimization_barrier(again)
  groups = queries[..., : width + group_tn.shape[-1]]
  d_k = jnp.einsum("bhts,bthk->bshk", d_logits(*again), groups)
  d_bias = d_k[..., width:].astype(jnp.float32).sum(axis=0)
  none = jnp.zeros_like(group_tn), jnp.zeros_like(limit)
  return d_q.astype(dtype), d_k[..., :width], d_v, none[0], d_bias, none[1]


attend_biased.defvjp(_biased_forward, _biased_backward)


def is_fused(asked: str, device: Any, dtype: str, head_dim: int) -> bool:
  """Returns whether attention asked for as "auto", "cudnn" or "xla" is `fused` on a device.

  It is for bfloat16 on NVIDIA GPUs since Ampere, heads of at most 120 in multiples of 8: cuDNN's
  may have 128 there, and the mass of the other ear takes 4 columns more.
  """
  if asked == "xla" or dtype != "bfloat16" or head_dim % 8 or head_dim > 120:
    return False
  # Topologies without devices are "cuda" and of no capability; AMD's is no number.
  capability = str(getattr(device, "compute_capability", "9.0"))
  nvidia = device.platform in ("gpu", "cuda") and capability[:1].isdigit()
  return nvidia and float(capability) >= 8


def fused(
  q_bthk: jax.Array,
  k_bshk: jax.Array,
  v_bshk: jax.Array,
  *,
  scale: float | None = None,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """Attention in one kernel of cuDNN: for bfloat16 on an NVIDIA GPU.

  Its backward pass refuses odd numbers of tokens, to which one is added that nobody attends to, and
  widths that are no multiple of 8, which are filled up with zeros, as are narrower values.

  Args:
    q_bthk: queries.
    k_bshk: keys.
    v_bshk: values, no wider than the keys.
    scale: of the logits; None is one over the root of the width.
    implementation: of `jax.nn.dot_product_attention`.

  Returns:
    Output [b, t, h, k], as wide as the values.
  """
  t, s = q_bthk.shape[1], k_bshk.shape[1]
  scale = 1 / math.sqrt(q_bthk.shape[-1]) if scale is None else scale
  width = 8 * math.ceil(q_bthk.shape[-1] / 8)
  is_odd = bool(t % 2 or s % 2)
  out_bthk = jax.nn.dot_product_attention(
    *(
      jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, width - x.shape[-1])))
      for x in (q_bthk, k_bshk, v_bshk)
    ),
    scale=scale,
    query_seq_lengths=jnp.full(len(q_bthk), t, jnp.int32) if is_odd else None,
    key_value_seq_lengths=jnp.full(len(q_bthk), s, jnp.int32) if is_odd else None,
    implementation=implementation,
  )
  return out_bthk[:, :t, :, : v_bshk.shape[-1]]


def fused_biased(
  q_bthk: jax.Array,
  k_bshk: jax.Array,
  v_bshk: jax.Array,
  group_tn: jax.Array,
  bias_shn: jax.Array,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """Does what `attend_biased` does as `fused`, which finds the largest logits itself.

  As a bias of its own, cuDNN would take the sum in bfloat16, and write its gradient for all pairs.
  """
  queries, keys = _columns(q_bthk, k_bshk, group_tn, bias_shn)
  return fused(queries, keys, v_bshk, scale=1.0, implementation=implementation)
