"""Updates that are left out: nothing but the step number changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import guard, optim, train, train_step
from tests.training import test_train_step as toy

RULES = sharding.Rules()


def judge(values, config):
  """Judges a sequence of losses, with a gradient norm of a tenth of them."""
  state, out = guard.init(), []
  step = jax.jit(functools.partial(guard.judge, config))
  for x in values:
    good, state, metrics = step(state, jnp.float32(x), jnp.float32(0.1 * x))
    out.append((bool(good), state, {name: float(v) for name, v in metrics.items()}))
  return out


def noise(count, seed=0):
  return 5 + np.random.default_rng(seed).standard_normal(count)


def test_the_statistics_are_those_of_the_window():
  x = noise(4000)
  (*_, (_, state, _)) = judge(x, guard.Config(sigma=0, window=100))
  weight = 0.99 ** np.arange(4000)[::-1]
  mean = (weight * x).sum() / weight.sum()
  var = (weight * np.square(x - mean)).sum() / weight.sum()
  np.testing.assert_allclose(state.mean_q, [mean, 0.1 * mean], rtol=1e-3)
  np.testing.assert_allclose(state.var_q, [var, 0.01 * var], rtol=2e-2)
  short = judge(x[:50], guard.Config(sigma=0, window=100))[-1][1]  # The plain mean until then.
  np.testing.assert_allclose(short.mean_q[0], x[:50].mean(), rtol=1e-5)
  np.testing.assert_allclose(short.var_q[0], x[:50].var(), rtol=1e-4)


def test_a_spike_is_left_out_and_a_fall_is_not():
  config = guard.Config(sigma=6, window=50, warmup=40)
  judged = judge([*noise(60), 20.0, 5.0, -20.0], config)
  assert [good for good, _, _ in judged] == [True] * 60 + [False, True, True]
  assert judged[60][2]["sigmas"] > 6
  np.testing.assert_array_equal(judged[60][1].mean_q, judged[59][1].mean_q)
  assert judged[60][2]["skipped"] == judged[62][2]["skipped"] == 1


def test_spikes_pass_during_the_warm_up_and_with_sigma_0():
  values = [*noise(30), 500.0]
  assert judge(values, guard.Config(warmup=40))[-1][0]
  assert judge(values, guard.Config(warmup=10, sigma=0))[-1][0]
  assert not judge(values, guard.Config(warmup=10))[-1][0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(value):
  judged = judge([value, 1.0, value, 1.0], guard.Config(sigma=0))
  assert [good for good, _, _ in judged] == [False, True, False, True]
  assert judged[-1][2]["skipped"] == 2 and np.isfinite(judged[-1][1].mean_q).all()


def test_the_count_is_cleared_by_good_updates_in_a_row():
  values = [np.nan, np.nan, *[1.0] * 4, np.nan, *[1.0] * 5, np.nan]
  bursts = [m["burst"] for _, _, m in judge(values, guard.Config(sigma=0, window=5))]
  assert bursts == [1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 0, 1]


def test_a_run_that_goes_on_with_another_batch_learns_anew_what_is_usual():
  """Else it would leave out all that follows."""
  config = guard.Config(sigma=6, warmup=64, window=128)
  quiet, loud = 5 + 0.1 * (noise(300) - 5), 9 + (noise(100, seed=1) - 5)
  state = judge(quiet, config)[-1][1].replace(skipped=jnp.int32(3))
  _, _, metrics = guard.judge(config, state, jnp.float32(loud[0]), jnp.float32(0.1 * loud[0]))
  assert metrics["sigmas"] > 6
  full = train_step.State(*[None] * len(dataclasses.fields(train_step.State))).replace(guard=state)
  config = {
    "data": {"batch_size": 512, "path": "a"},
    "loss": {"drop_text": 0.1},
    "optim": {"lr": 1},
  }
  then = {"config": config, "data": {"path": "0f"}}
  moved = {"data": {"batch_size": 512, "path": "b"}}
  for same in ({}, {"optim": {"lr": 2}}, {"steps": 9}, moved):
    assert train.judged(full, then, then | {"config": config | same}) is full
  others = [
    then | {"config": config | {"data": {"batch_size": 64}}},
    then | {"config": config | {"data": config["data"] | {"mirror": True}}},
    then | {"config": config | {"loss": {"drop_text": 0.5}}},
    then | {"config": config | {"model": {"width": 9}}},
    then | {"config": config | {"optim": {"lr": 1, "freeze": (("up/.*", True), (".*", False))}}},
    then | {"config": config | {"seconds": 4}},
    then | {"data": {"path": "1e"}},
  ]
  for now in others:
    found = train.judged(full, then, now).guard
    assert int(found.skipped) == 3 and int(found.seen) == 0 and not found.mean_q.any()


def test_impossible_settings_are_refused():
  with pytest.raises(UserError, match="guard.cap=-1 is less than 0"):
    guard.Config(cap=-1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_bad_batch_changes_nothing_but_the_step(shape):
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
  optimizer = optim.adamw(optim.Config(lr=1e-2), jax.eval_shape(toy.toy_init, jax.random.key(0)))
  stats, ema = {"mean": jnp.zeros(8)}, optim.Ema(beside=(0.1,))
  create, _, layout = train_step.init_state(
    toy.toy_init, stats, optimizer, jax.random.key(0), mesh, RULES, ema
  )
  step = train_step.make_train_step(
    toy.toy_loss, optimizer, key=jax.random.key(1), mesh=mesh, rules=RULES, layout=layout, ema=ema
  )
  good = toy.toy_batch(0)
  bad = {**good, "x_bw": np.where(np.arange(8)[:, None] == 3, np.nan, good["x_bw"])}
  state = create()
  state, _ = step(state, sharding.global_batch(good, mesh, RULES, 8))
  before = jax.device_get(state)
  state, metrics = step(state, sharding.global_batch(bad, mesh, RULES, 8))
  assert not metrics["good"] and np.isnan(metrics["loss"])
  assert len(before.beside) == 1 and len(before.means) == 2
  kept = state.replace(step=before.step, guard=before.guard)
  jax.tree.map(np.testing.assert_array_equal, kept, before)
  assert int(state.step) == 2 and int(state.guard.skipped) == 1
  state, metrics = step(state, sharding.global_batch(good, mesh, RULES, 8))
  assert metrics["good"] and np.isfinite(metrics["loss"])
  moved = np.abs(state.params["up"]["kernel"] - before.params["up"]["kernel"])
  assert moved.max() > 0
  # The schedule stands still as well: its third step is the second update that counts.
  assert optimizer.lr is not None
  np.testing.assert_allclose(metrics["lr"], optimizer.lr(1), rtol=1e-6)


@pytest.mark.parametrize("which", ["loss", "grad_norm"])
@pytest.mark.parametrize("bad", [20.0, np.inf, -np.inf, np.nan])
def test_either_of_loss_and_norm_is_enough_for_an_update_to_be_left_out(which, bad):
  config = guard.Config(sigma=6, window=50, warmup=40)
  state = judge(noise(60), config)[-1][1]
  usual = {"loss": jnp.float32(5.0), "grad_norm": jnp.float32(0.5)}
  assert guard.judge(config, state, **usual)[0]
  # What is not finite also where no spike counts: at the beginning, and with sigma 0.
  cases = [(config, state), (config, guard.init()), (guard.Config(sigma=0), state)]
  for rules, before in cases[: 1 if np.isfinite(bad) else 3]:
    good, after, metrics = guard.judge(rules, before, **usual | {which: jnp.float32(bad)})
    assert not good and metrics["skipped"] == metrics["burst"] == 1
    np.testing.assert_array_equal(after.mean_q, before.mean_q)
    np.testing.assert_array_equal(after.var_q, before.var_q)
    assert after.seen == before.seen


def test_the_first_update_after_the_warm_up_is_judged():
  config = guard.Config(sigma=6, window=50, warmup=40)
  assert judge([*noise(39), 50.0], config)[-1][0]
  assert not judge([*noise(40), 50.0], config)[-1][0]


def test_a_quantity_that_never_moved_may_move_by_a_little():
  """Its deviation is zero, or the rounding of its mean."""
  config = guard.Config(sigma=6, warmup=64)
  judged = judge([5.0] * 100 + [5.0005, 5.05], config)
  assert [good for good, _, _ in judged] == [True] * 101 + [False]
  assert judged[100][2]["sigmas"] == pytest.approx(0.1, rel=0.02)
  assert all(good for good, _, _ in judge([0.0] * 100, config))
