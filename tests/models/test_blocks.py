"""Attention of two ears: what the other counts, and both at once against one after the other."""
# The ears and what they attend to come in tuples of one length.
# pyright: reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax.models import attention, blocks, layers


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

  def both(function):  # As one program: each operation of its own would be compiled.
    gradient = jax.grad(functools.partial(total, function), argnums=(0, 1, 2))
    return jax.jit(lambda *args: (list(function(*args)), gradient(*args)))(ears, context, mass_h)

  (outs, ours), (expected, theirs) = both(at_once), both(apart)
  for one, other in zip(outs, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=0.02 * loud**2)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, atol=0.03 * float(abs(b).max()))


def test_cross_mass_enters_the_softmax_linearly():
  q, k1, k2, v1, v2 = (normal(i, 2, 5, 2, 8) for i in range(5))
  own, other = attention.attend(q, k1, v1), attention.attend(q, k2, v2)

  @jax.jit
  def merged(mass_h):
    expand = lambda pair: (x[:, None] for x in pair)  # noqa: E731
    return blocks.merge_ears(*expand(own), *expand(other), mass_h)[:, 0]

  mass_h = jnp.asarray([0.3, 1.0])
  logits = jnp.einsum("bthk,bshk->bhts", q, jnp.concatenate([k1, k2], 1)) / 8**0.5
  weight = jnp.exp(logits) * jnp.where(np.arange(10) < 5, 1.0, mass_h[:, None])[None, :, None]
  weight /= weight.sum(-1, keepdims=True)
  naive = jnp.einsum("bhts,bshk->bthk", weight, jnp.concatenate([v1, v2], 1))
  np.testing.assert_allclose(merged(mass_h), naive, atol=1e-5)

  total = lambda mass_h: (merged(mass_h) * v1).sum()  # noqa: E731
  zero, step = jnp.zeros(2), jnp.asarray([1e-2, 0.0])
  np.testing.assert_array_equal(merged(zero), own[0])
  np.testing.assert_array_equal(merged(zero - 0.5), own[0])
  slope = jax.grad(total)(zero)
  np.testing.assert_allclose(slope[0], (total(zero + step) - total(zero)) / 1e-2, rtol=0.05)
  assert abs(slope).min() > 1e-3 and abs(jax.grad(total)(zero - 0.5)).min() > 1e-3
  # An overwhelming other ear overflows nothing, not even in the gradient.
  loud = own[0][:, None], own[1][:, None], other[0][:, None], other[1][:, None] + 1e4
  assert np.isfinite(blocks.merge_ears(*loud, zero)).all()
  assert np.isfinite(jax.grad(lambda m: blocks.merge_ears(*loud, m).sum())(zero)).all()


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


def test_a_bias_has_more_digits_than_bfloat16():
  """One key is ahead by its logit of 10, the other by a bias of nearly as much."""
  q_bthk = jnp.ones((1, 1, 1, 16), jnp.bfloat16)
  k_bshk = jnp.asarray([[0.0], [2.5]], jnp.bfloat16).reshape(1, 2, 1, 1) * q_bthk
  v_bshk = jnp.asarray([1.0, 0.0], jnp.bfloat16).reshape(1, 2, 1, 1) * q_bthk
  group_tn, bias_shn = jnp.ones((1, 1)), jnp.asarray([9.97, 0.0]).reshape(2, 1, 1)
  attend = jax.jit(attention.attend_biased)
  out = attend(q_bthk, k_bshk, v_bshk, group_tn, bias_shn, jnp.asarray(20.0))
  want = 1 / (1 + np.exp(10 - 9.97))  # With 9.97 rounded to 10 it would be one half.
  np.testing.assert_allclose(out.astype(jnp.float32), np.full(out.shape, want), atol=2e-3)


def test_no_logit_is_larger_than_its_bound_which_one_reaches():
  q_scale, k_scale = normal(0, 16).at[0].set(-4), normal(1, 16).at[0].set(3)
  scales = [(q_scale, jnp.ones(16)), (jnp.ones(16), k_scale)]
  streams = [
    blocks.Stream(32, 2, 48).bind({"params": {"q_norm": {"scale": q}, "k_norm": {"scale": k}}})
    for q, k in scales
  ]
  x = jnp.eye(16)  # All of a token in one channel.
  q, k = (layers.RMSNorm().apply({"params": {"scale": s}}, x) for s in (q_scale, k_scale))
  bound = blocks.largest_logit(16, *streams)
  np.testing.assert_allclose(abs(jnp.asarray(q) @ jnp.asarray(k).T).max() / 4, bound, rtol=1e-5)
