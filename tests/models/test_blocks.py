"""Attention of both ears at once, as accelerators do it, against one ear after the other."""
# The ears and what they attend to come in tuples of one length.
# pyright: reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax.models import attention, blocks


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
  "limit, loud",
  [(20.0, 1.0), (160.0, 3.0), (None, 3.0)],
  ids=["no largest logit", "largest logit", "one kernel"],
)
def test_both_ears_at_once_attend_as_one_after_the_other(last, limit, loud):
  fused = functools.partial(attention.fused_biased, implementation="xla")
  biased = fused if limit is None else lambda *a: attention.attend_biased(*a, jnp.asarray(limit))

  def tokens(seed, count):  # Numbers that bfloat16 has.
    parts = (loud * normal(seed + i, 2, 1, count, 3, 16) for i in range(3))
    return tuple(x.astype(jnp.bfloat16).astype(jnp.float32) for x in parts)

  ears, context = [tokens(0, 7), tokens(10, 7)], tokens(30, 4)
  wanted = [normal(40 + i, 2, 1, 7, 3, 16) for i in range(2)]
  mass_h = jnp.asarray([-0.5, 0.0, 0.7])

  def apart(ears, context, mass_h):
    for own, other in (ears, ears[::-1]):
      q, k, v = (jnp.concatenate(part, axis=2)[:, 0] for part in zip(own, context, strict=True))
      q = own[0][:, 0] if last else q
      sets = *attention.attend(q, k, v), *attention.attend(q, other[1][:, 0], other[2][:, 0])
      yield blocks.merge_ears(*(x[:, None] for x in sets), mass_h)

  def at_once(ears, context, mass_h):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (ears, context))
    outs = blocks.attend_at_once(*low, mass_h, biased, last=last)
    pairs = zip(*(part for part in outs if part), strict=True)
    return [jnp.concatenate(parts, axis=2).astype(jnp.float32) for parts in pairs]

  def total(function, *args):
    outs = list(function(*args))
    rest = [jnp.sin(out[:, :, 7:]).sum() for out in outs]
    return sum((out[:, :, :7] * w).sum() for out, w in zip(outs, wanted, strict=True)) + sum(rest)

  args = ears, context, mass_h
  for ours, theirs in zip(at_once(*args), apart(*args), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=0.02 * loud**2)
  ours, theirs = (
    jax.grad(functools.partial(total, f), argnums=(0, 1, 2))(*args) for f in (at_once, apart)
  )
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, atol=0.03 * float(abs(b).max()))


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_any_size_give_weights(sign):
  """All equal and so far from zero that their exponentials are none in float32."""
  q_bthk = jnp.full((1, 4, 1, 16), 10.0, jnp.bfloat16)
  v_bthk = normal(0, 1, 4, 1, 16).astype(jnp.bfloat16)
  group_tn, bias_shn = jnp.zeros((4, 2)), jnp.zeros((4, 1, 2))
  out = attention.attend_biased(
    q_bthk, sign * q_bthk, v_bthk, group_tn, bias_shn, jnp.asarray(400.0)
  )
  mean = v_bthk.astype(jnp.float32).mean(axis=1, keepdims=True)
  np.testing.assert_allclose(out.astype(jnp.float32), jnp.broadcast_to(mean, out.shape), atol=0.01)
