"""Attention against its definition."""

import functools
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax.models import attention, flow_net


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_attend_is_attention_and_its_logarithm_has_gradients():
  q, k, v = (normal(i, 2, n, 3, 8) for i, n in ((0, 5), (1, 7), (2, 7)))
  out, lse = attention.attend(q, k, v)
  np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v), atol=1e-6)
  plain = lambda q: jax.nn.logsumexp(  # noqa: E731
    jnp.einsum("bthk,bshk->bths", q, k) / 8**0.5, axis=-1
  )
  np.testing.assert_allclose(lse, plain(q), atol=1e-6)
  ours = jax.grad(lambda q: (attention.attend(q, k, v)[1] ** 2).sum())(q)
  np.testing.assert_allclose(ours, jax.grad(lambda q: (plain(q) ** 2).sum())(q), atol=1e-5)
  assert np.isfinite(attention.attend(1e3 * q, k, v)[0]).all()


def test_the_backward_pass_of_attention_is_that_of_plain_attention():
  arrays = q, k, v = [normal(i, 2, n, 3, 8) for i, n in ((0, 5), (1, 7), (2, 7))]

  def plain(q, k, v):
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / 8**0.5
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits), v), jax.nn.logsumexp(logits, -1)

  def total(attend, *arrays):
    out, lse = attend(*arrays)
    return jnp.sin(out).sum() + (lse**2).sum()

  ours, theirs = (
    jax.grad(lambda *a, f=f: total(f, *a), argnums=(0, 1, 2))(*arrays)
    for f in (attention.attend, plain)
  )
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_in_bfloat16_the_values_and_gradients_of_attention_are_near():
  arrays = [normal(i, 2, n, 3, 8) for i, n in ((0, 5), (1, 7), (2, 7))]
  low = [x.astype(jnp.bfloat16) for x in arrays]

  def total(*arrays):
    out, lse = attention.attend(*arrays)
    return jnp.sin(out.astype(jnp.float32)).sum() + (lse**2).sum(), (out, lse)

  (ours, values), (theirs, expected) = (
    jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*a) for a in (low, arrays)
  )
  for a, b in zip((*ours, *values), (*theirs, *expected), strict=True):
    scale = float(jnp.abs(b).max())
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * scale)
  # Large logits neither overflow nor vanish.
  out, lse = attention.attend(100 * low[0], *low[1:])
  assert np.isfinite(out.astype(jnp.float32)).all() and np.isfinite(lse).all()


def gpu(**about):
  return types.SimpleNamespace(**{"platform": "gpu", "compute_capability": "9.0", **about})


TPU = types.SimpleNamespace(platform="tpu")
TOPOLOGY = types.SimpleNamespace(platform="cuda")


@pytest.mark.parametrize("ears", [1, 2])
@pytest.mark.parametrize(
  "asked, device, dtype, used",
  [
    ("auto", gpu(), "bfloat16", True),
    ("auto", TOPOLOGY, "bfloat16", True),
    ("cudnn", gpu(), "bfloat16", True),
    ("xla", gpu(), "bfloat16", False),
    ("auto", gpu(), "float32", False),
    ("auto", gpu(compute_capability="7.5"), "bfloat16", False),
    ("auto", gpu(compute_capability="gfx942"), "bfloat16", False),
    ("auto", TPU, "bfloat16", False),
    ("auto", None, "bfloat16", False),
    ("cudnn", None, "bfloat16", False),  # A model trained on a GPU, opened on a CPU.
  ],
)
def test_the_device_decides_which_attention_the_blocks_have(
  monkeypatch, asked, device, dtype, used, ears
):
  taken = []

  def record(q, k, v, *, implementation, **_):
    taken.append((implementation, k.shape[1]))
    assert all(x.shape[-1] % 8 == 0 and x.shape[1] % 2 == 0 for x in (q, k, v))
    return jnp.zeros_like(q)

  monkeypatch.setattr(jax.nn, "dot_product_attention", record)
  sizes: dict[str, Any] = {"latent_channels": 4, "clip_dim": 4, "sync_dim": 4, "text_dim": 4}
  sizes |= {"text_len": 2, "width": 16, "heads": 2, "joint_depth": 1, "ear_depth": 1}
  sizes |= {"unroll": False, "dtype": dtype, "attention": asked, "ears": ears}
  net = flow_net.build(flow_net.Config(**sizes), device=device)
  prepared = {"global_bd": (1, 16), "sync_btd": (1, 6, 16), "spatial_btd": (1, 6, 16)}
  prepared |= {"clip_bvd": (1, 3, 16), "text_bwd": (1, 2, 16)}
  params = nn.unbox(jax.eval_shape(net.init, jax.random.key(0)))
  assert not taken  # It is no matter of the parameters.
  jax.eval_shape(
    net.velocity,
    params,
    jnp.zeros((1, ears, 6, 4)),
    jnp.zeros(1),
    {name: jnp.zeros(shape) for name, shape in prepared.items()},
  )
  # Frames of one ear; of all of them and 5 other tokens, an even number.
  assert set(taken) == ({("cudnn", 6), ("cudnn", 6 * ears + 6)} if used else set())


@pytest.mark.parametrize(
  "capability, head_dim, used",
  [
    ("8.0", 64, True),  # Ampere.
    ("9.0", 120, True),
    ("9.0", 128, False),  # No room for the columns of the other ear's mass.
    ("9.0", 60, False),
    ("10.0", 64, True),
  ],
)
def test_which_heads_and_gpus_cudnns_attention_takes(capability, head_dim, used):
  device = gpu(compute_capability=capability)
  assert attention.is_fused("auto", device, "bfloat16", head_dim) == used


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("frames", [(6, 6), (7, 7), (7, 4), (6, 5)])
def test_what_fills_up_tokens_and_widths_changes_nothing(frames, width):
  q, k, v = (normal(i, 2, n, 3, width) for i, n in enumerate((frames[0], frames[1], frames[1])))
  fused = functools.partial(attention.fused, implementation="xla")

  def both(attend):  # In one program.
    gradient = jax.grad(lambda *a: (attend(*a) ** 2).sum(), argnums=(0, 1, 2))
    return jax.jit(lambda *a: (attend(*a), *gradient(*a)))(q, k, v)

  (out, *ours), (want, *theirs) = both(fused), both(lambda *a: attention.attend(*a)[0])
  assert out.shape == q.shape
  np.testing.assert_allclose(out, want, atol=1e-6)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
