"""ZeRO-1: the optimiser and the averages split over devices that hold the same parameters."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from launch import hlo, hlo_cost
from spatialv2a_jax import sharding
from spatialv2a_jax.training import optim, train_step
from tests import test_sharding
from tests.training.test_train import fit
from tests.training.test_train_step import toy_batch, toy_init, toy_loss

box = test_sharding.box


@pytest.fixture(autouse=True)
def small_leaves_count(monkeypatch):
  monkeypatch.setattr(sharding, "_SMALL", 0)


def prepare(rules, shape=(8, 1, 1)):
  mesh = sharding.make_mesh(*shape)
  config = optim.Config(lr=0.1, warmup=0, freeze=(("null/.*", True), (".*", False)))
  optimizer = optim.adamw(config, jax.eval_shape(toy_init, jax.random.key(0)))
  create, abstract, layout = train_step.init_state(
    toy_init, {"mean": np.zeros(8, np.float32)}, optimizer, jax.random.key(0), mesh, rules
  )
  loss = functools.partial(toy_loss, constrain=sharding.constrainer(mesh, rules))
  step = train_step.make_train_step(
    loss, optimizer, key=jax.random.key(1), mesh=mesh, rules=rules, layout=layout,
    ema=optim.Ema(decay=0.5),
  )  # fmt: skip
  batch = sharding.global_batch(toy_batch(0), mesh, rules, 8)
  return create(), abstract, step, batch


def test_it_changes_where_things_are_and_not_what_they_are():
  results = []
  for rules in (sharding.Rules(), sharding.Rules(zero="data")):
    state, _, step, batch = prepare(rules)
    for _ in range(3):
      state, metrics = step(state, batch)
    results.append((state, metrics))
  (plain, _), (split, _) = results
  for a, b in zip(*(jax.tree.leaves(jax.device_get(r)) for r in results), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(split.params))
  for name, shape in (("up", (8, 2)), ("down", (2, 8))):
    average = split.ema[name]["kernel"]
    assert average.sharding.shard_shape(average.shape) == shape
  moments = [x for x in jax.tree.leaves(split.opt) if x.shape in ((8, 16), (16, 8))]
  assert len(moments) == 4 and not any(x.sharding.is_fully_replicated for x in moments)
  assert sharding.bytes_per_device(split.opt) < 0.3 * sharding.bytes_per_device(plain.opt)


def test_a_run_says_what_zero_leaves_whole(tmp_path):
  """The toy's frozen text and biases are few; on three devices nothing of it divides."""
  told = []
  mesh = sharding.make_mesh(3, 1, 1, devices=jax.devices()[:3])
  endless = lambda start: (toy_batch(i, 6) for i in range(start, 9))  # noqa: E731
  rules = sharding.Rules(zero="data")
  more = {"mesh": mesh, "batches": endless, "batch_size": 6, "rules": rules, "say": told.append}
  fit(tmp_path, steps=1, **more)
  assert any("rules.zero leaves 100 % of the optimiser whole" in line for line in told)
  told.clear()
  plain = {**more, "rules": sharding.Rules(zero=None)}
  fit(tmp_path / "plain", steps=1, **plain)
  assert not any("rules.zero" in line for line in told)


def test_the_parameters_are_gathered_once_and_the_state_is_donated():
  state, abstract, step, batch = prepare(sharding.Rules(zero="data"))
  module = hlo.parse(step.lower(abstract, batch).compile().as_text())
  found = hlo_cost.collectives(module)
  assert found["all-gather"].bytes == (2 * 8 * 16 + 8) * 4
  donated = hlo_cost.aliased_bytes(module)
  assert donated >= 0.99 * sharding.bytes_per_device(state)


def test_values_from_elsewhere_keep_the_layout():
  state, _, step, batch = prepare(sharding.Rules(zero="data"))
  layout = jax.tree.map(lambda x: x.sharding, state)
  state = train_step.overwrite(state, {"null": {"text": np.full(8, 2, np.float32)}})
  assert jax.tree.map(lambda x: x.sharding, state) == layout
  np.testing.assert_array_equal(state.ema["null"]["text"], 2)
  step(state, batch)


@pytest.mark.parametrize(
  "shape, names, spec",
  [
    ((12, 64, 3, 28), ("layers", "width", None, None), P(None, ("fsdp", "data"), None, None)),
    ((12, 6, 3, 48), ("layers", "width", None, None), P(None, "fsdp", None, "data")),
    ((8, 2, 3), ("layers", "width", None), P(None, "fsdp", None)),  # Loops run over layers.
    ((64, 2, 3), (None, "width", "ffn"), P("data", "fsdp", "tensor")),
  ],
)
def test_the_largest_dimension_that_divides_is_split(shape, names, spec):
  mesh = sharding.make_mesh(4, 2, 1)
  rules = sharding.Rules(zero="data")
  assert sharding.shardings([box(shape, *names)], mesh, rules, zero=True)[0].spec == spec


def test_small_leaves_stay_whole(monkeypatch):
  monkeypatch.setattr(sharding, "_SMALL", 2**16)
  mesh, rules = sharding.make_mesh(8, 1, 1), sharding.Rules(zero="data")
  small, large = box((64, 128), None, None), box((128, 128), None, None)
  found = sharding.shardings([small, large], mesh, rules, zero=True)
  assert [s.spec for s in found] == [P(None, None), P("data", None)]


@pytest.mark.parametrize("columns, refused", [(163, False), (164, True)])
def test_two_percent_may_stay_whole_under_fsdp(columns, refused):
  """163 of 8192 columns are 1.990 %, 164 are 2.002 %."""
  mesh, rules = sharding.make_mesh(1, 8, 1), sharding.Rules()
  tree = {
    "whole": box((2**12, columns), None, None),
    "split": box((2**12, 2**13 - columns), "width", None),
  }
  layout, plain = sharding.shardings(tree, mesh, rules), sharding.unboxed(tree)
  if not refused:
    sharding.check_split(plain, layout, mesh, rules)
    return
  with pytest.raises(sharding.UserError, match=r"fsdp=8 leaves 2.0 % .* such as whole \(3 MiB\)"):
    sharding.check_split(plain, layout, mesh, rules)


def test_what_fsdp_should_split_but_does_not_is_an_error():
  mesh = sharding.make_mesh(1, 8, 1)
  tree = {"big": box((2**12, 2**11), None, None), "split": box((2**12, 2**13), "width", None)}
  layout = sharding.shardings(tree, mesh, sharding.Rules())
  plain = sharding.unboxed(tree)
  with pytest.raises(sharding.UserError, match=r"leaves 20.0 % .* such as big \(32 MiB\)") as stop:
    sharding.check_split(plain, layout, mesh, sharding.Rules())
  assert "rules.width=fsdp splits no axis of theirs" in str(stop.value)  # It is set already.
  sharding.check_split(plain, layout, mesh, sharding.Rules(zero="data+fsdp"))
  with pytest.raises(sharding.UserError, match="give a rule fsdp"):
    none = sharding.Rules(width="")
    sharding.check_split(plain, sharding.shardings(tree, mesh, none), mesh, none)
  small = {"big": box((2**12, 2**10), None, None)}  # 16 MiB: no large model.
  layout = sharding.shardings(small, mesh, sharding.Rules())
  sharding.check_split(sharding.unboxed(small), layout, mesh, sharding.Rules())
  replicas = sharding.make_mesh(8, 1, 1)
  layout = sharding.shardings(tree, replicas, sharding.Rules())
  sharding.check_split(plain, layout, replicas, sharding.Rules())
