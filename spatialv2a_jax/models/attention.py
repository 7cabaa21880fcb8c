"""Softmax attention of the flow network.

Axis letters: b batch, t query, s key, h head, k head width.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


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


def fused(
  q_bthk: jax.Array,
  k_bshk: jax.Array,
  v_bshk: jax.Array,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """Attention in one kernel of cuDNN: for bfloat16 on an NVIDIA GPU.

  Its backward pass refuses an odd number of tokens, to which one is added that nobody attends to.
  """
  frames = q_bthk.shape[1]
  lengths = jnp.full(len(q_bthk), frames, jnp.int32) if frames % 2 else None
  if frames % 2:
    spare = ((0, 0), (0, 1), (0, 0), (0, 0))
    q_bthk, k_bshk, v_bshk = (jnp.pad(x, spare) for x in (q_bthk, k_bshk, v_bshk))
  out_bthk = jax.nn.dot_product_attention(
    q_bthk,
    k_bshk,
    v_bshk,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation=implementation,
  )
  return checkpoint_name(out_bthk[:, :frames], "attention")
