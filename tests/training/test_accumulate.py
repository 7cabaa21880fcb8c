"""Accumulation of the real flow network, and what it does to running statistics."""

import functools

import jax
import numpy as np
import pytest

from spatialv2a_jax import flow, schema, sharding
from spatialv2a_jax.models import flow_net
from spatialv2a_jax.models.spatial import MOMENTUM
from spatialv2a_jax.training import guard, train_step
from tests.training import test_train_step as toy

SHAPES = {
  "mean": (2, 4, 4), "std": (2, 4, 4), "clip": (3, 4), "sync": (8, 4), "text": (2, 4),
  "spatial": (3, 5),
}  # fmt: skip


@functools.cache
def prepare(train, accumulate):
  """Returns a state whose gates are open, other than that of a new run, and the step."""
  mesh = toy.one_device()
  sizes = {"width": 8, "heads": 2, "joint_depth": 1, "ear_depth": 1, "latent_channels": 4}
  sizes |= {"clip_dim": 4, "sync_dim": 4, "text_dim": 4, "text_len": 2}
  net = flow_net.build(flow_net.Config(**sizes))
  _, abstract, layout = train_step.init_state(
    net.init, net.init_stats(), toy.SGD, jax.random.key(0), mesh, toy.RULES
  )
  step = train_step.make_train_step(
    functools.partial(flow.loss, net=net, config=flow.LossConfig(), train=train),
    toy.SGD,
    key=jax.random.key(1),
    mesh=mesh,
    rules=toy.RULES,
    layout=layout,
    accumulate=accumulate,
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), abstract.params
  )
  params["frozen"]["latent_std"][:] = 1
  opt, stats = toy.SGD.tx.init(params), net.init_stats()
  state = train_step.State(np.int32(0), params, params, opt, stats, guard.init(), means=(stats,))
  return state, step


def after_a_step(batch, train, accumulate):
  """The state before and after one step of gradient descent, and its metrics."""
  start, step = prepare(train, accumulate)
  state = jax.tree.map(lambda x: jax.numpy.array(x), start)  # The step donates it.
  batch = sharding.global_batch(batch, toy.one_device(), toy.RULES, 8)
  return start, *jax.device_get(step(state, batch))


def clips(weights):
  batch = schema.synthetic_batch(SHAPES, 8, seed=3)
  return batch | {"weight_b": np.array(weights, np.float32)}


def doubled():
  """Clips 2 i and 2 i + 1 are the same, so that both parts of the batch are."""
  half = schema.synthetic_batch(SHAPES, 4, seed=4)
  return {name: np.repeat(x, 2, axis=0) for name, x in half.items()}


def gap(a, b, part=None):
  """Distance of the parameters of two states."""
  a, b = (x.params if part is None else x.params[part] for x in (a, b))
  square = jax.tree.map(lambda x, y: np.square(x - y).sum(), a, b)
  return sum(jax.tree.leaves(square)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
  "batch, train",
  [(clips([1, 1, 0, 1, 1, 0, 1, 0]), False), (doubled(), True)],
  ids=["statistics fixed", "parts alike"],
)
def test_accumulation_gives_the_gradient_of_the_flow_model(batch, train):
  start, whole, metrics = after_a_step(batch, train, 1)
  _, parts, other = after_a_step(batch, train, 2)
  for part in set(start.params) - {"frozen"}:
    moved = gap(whole, start, part)
    assert moved > 1e-4 and gap(parts, whole, part) < 1e-4 * moved, part
  for name in ("loss", "loss/left", "loss/right", "loss/difference", "grad_norm"):
    np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5)
  if train:  # The running statistics move once per part.
    for name, old in start.stats["spatial"].items():
      twice = old + (1 + MOMENTUM) * (whole.stats["spatial"][name] - old)
      np.testing.assert_allclose(parts.stats["spatial"][name], twice, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_parts_are_normalised_by_their_own_statistics():
  batch = clips([1] * 8)
  start, whole, _ = after_a_step(batch, True, 1)
  _, parts, _ = after_a_step(batch, True, 2)
  assert gap(parts, whole) > 1e-3 * gap(whole, start)
