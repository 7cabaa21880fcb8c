import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import optim

PARAMS = {
  "joint": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)},
  "ear": {"kernel": jnp.full((2, 2), 3.0)},
  "null": {"text": jnp.full(2, 3.0)},
}
ONES = jax.tree.map(jnp.ones_like, PARAMS)


def one_update(config, grads=ONES) -> Any:
  tx = optim.adamw(config, PARAMS).tx
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  return updates


def test_step_decay_drops_where_mmaudio_drops():
  config = optim.Config(lr=1e-4, warmup=1000, decay="step", milestones=(240_000, 270_000))
  rate = optim.schedule(config)
  expected = {
    0: 1e-4 / 1001,
    999: 1e-4 * 1000 / 1001,
    1000: 1e-4,
    240_999: 1e-4,
    241_000: 1e-5,
    270_999: 1e-5,
    271_000: 1e-6,
    299_999: 1e-6,
  }
  for step, value in expected.items():
    assert float(rate(step)) == pytest.approx(value, rel=1e-5), step


def test_cosine_ends_at_its_final_share():
  rate = optim.schedule(optim.Config(lr=2.0, warmup=10, decay="cosine", steps=110, final=0.1))
  assert float(rate(10)) == pytest.approx(2.0)
  assert float(rate(60)) == pytest.approx(2.0 * 0.55)
  assert float(rate(110)) == float(rate(500)) == pytest.approx(0.2)


@pytest.mark.parametrize(
  "values, message",
  [
    ({"decay": "linear"}, "decay='linear' is unknown, have: constant, step, cosine"),
    ({"lr": -1e-4}, "lr=-0.0001 is not above 0"),
    ({"lr": math.nan}, "lr=nan is not above 0"),
    ({"eps": 0.0}, "eps=0.0 is not above 0"),
    ({"gamma": 0.0}, "gamma=0.0 is not above 0"),
    ({"clip": -1.0}, "clip=-1.0 is not 0 or more"),
    ({"warmup": -1}, "warmup=-1 is not 0 or more"),
    ({"weight_decay": -1e-6}, "weight_decay=-1e-06 is not 0 or more"),
    ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) are not two numbers in \[0, 1\)"),
    ({"betas": (0.9,)}, "are not two numbers"),
    ({"final": 1.5}, "final=1.5 is not in 0..1"),
    ({"milestones": (3, 2)}, r"milestones=\(3, 2\) are not steps in rising order"),
    ({"milestones": (-1,)}, "in rising order"),
    ({"decay": "cosine"}, "cosine ends at steps=0, not after warmup=1000"),
    ({"decay": "cosine", "steps": 1000}, "cosine ends at steps=1000, not after warmup=1000"),
    ({"freeze": (("a/(", True),)}, r"table freeze: \('a/\(', True\) is no regular expression"),
    ({"freeze": (("frozen/.*", True), (".*",))}, r"table freeze: \('.\*',\) is not \(regex, True"),
    ({"freeze": ("frozen/.*", True)}, "table freeze: 'frozen/.*' is not .regex, True or False"),
    ({"freeze": ((".*", "False"),)}, r"table freeze: \('.\*', 'False'\) is not"),
    ({"lr_scale": ((".*", "0.1"),)}, r"lr_scale: \('.\*', '0.1'\) is not \(regex, a number of 0"),
    ({"decay_scale": ((".*", -1.0),)}, r"decay_scale: \('.\*', -1.0\) is not"),
  ],
)
def test_numbers_out_of_their_range_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    optim.Config(**values)


def test_a_table_that_freezes_everything_is_refused():
  with pytest.raises(UserError, match=r"freeze leaves nothing to train: \(\('.\*', True\),\)"):
    optim.adamw(optim.Config(freeze=((".*", True),)), PARAMS)


def test_milestones_that_a_run_does_not_reach_are_told():
  config = optim.Config(decay="step", warmup=1000, milestones=(240_000, 270_000))
  assert not config.remarks(300_000)
  (line,) = config.remarks(271_000)
  assert line.startswith("the learning rate does not fall at [271000]: the run has 271000 steps")
  assert "[241000, 271000]" in config.remarks(100_000)[0]
  assert not optim.Config(milestones=(5,), warmup=1).remarks(
    3
  )  # Of no meaning when the rate is constant.


def test_one_update_is_adamw():
  config = optim.Config(lr=0.1, warmup=0, clip=0.0, weight_decay=0.01, betas=(0.9, 0.95))
  ours = one_update(config)
  reference = optax.adamw(0.1, 0.9, 0.95, weight_decay=0.01)
  theirs, _ = reference.update(ONES, reference.init(PARAMS), PARAMS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize(
  "decay", [{"decay": "step", "milestones": (1, 3)}, {"decay": "cosine", "steps": 8, "final": 0.1}]
)
def test_every_update_has_the_rate_of_its_step(decay):
  """Adam divides a constant gradient by itself."""
  config = optim.Config(lr=0.1, warmup=3, clip=0.0, weight_decay=0.0, **decay)
  rate, tx = optim.schedule(config), optim.adamw(config, PARAMS).tx
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  for step in range(8):
    updates, state = update(ONES, state, PARAMS)
    for x in jax.tree.leaves(updates):
      np.testing.assert_allclose(-x, rate(step), rtol=1e-5)


def test_tables_scale_rate_and_decay_by_name():
  config = optim.Config(
    lr=0.1,
    warmup=0,
    clip=0.0,
    weight_decay=0.5,
    lr_scale=(("ear/.*", 0.1), (".*", 1.0)),
    decay_scale=((".*/(bias|text)", 0.0), (".*", 1.0)),
  )
  updates = one_update(config)
  np.testing.assert_allclose(updates["joint"]["kernel"], -0.1 * (1 + 0.5 * 3), rtol=1e-5)
  np.testing.assert_allclose(updates["joint"]["bias"], -0.1, rtol=1e-5)
  np.testing.assert_allclose(updates["ear"]["kernel"], -0.01 * (1 + 0.5 * 3), rtol=1e-5)


def test_the_clipped_norm_is_that_of_what_is_trained():
  config = optim.Config(freeze=(("null/text", True), (".*", False)), clip=1.0)
  optimizer = optim.adamw(config, PARAMS)
  state = optimizer.tx.init(PARAMS)
  huge = {**ONES, "null": {"text": jnp.full(2, 1e6)}}
  _, small_state = optimizer.tx.update(ONES, state, PARAMS)
  updates: Any
  updates, huge_state = optimizer.tx.update(huge, state, PARAMS)
  jax.tree.map(np.testing.assert_array_equal, small_state, huge_state)
  np.testing.assert_array_equal(updates["null"]["text"], 0)
  # Ten trained entries of gradient 1 come down to norm 1; the first moment is a tenth of that.
  moments = [x for x in jax.tree.leaves(huge_state) if x.shape == (2, 2)]
  np.testing.assert_allclose(moments[0], 0.1 / math.sqrt(10), rtol=1e-5)


def test_frozen_parameters_get_no_gradient():
  optimizer = optim.adamw(optim.Config(freeze=(("null/.*", True), (".*", False))), PARAMS)
  total = jax.grad(lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(optimizer.trainable(p))))(
    PARAMS
  )
  np.testing.assert_array_equal(total["null"]["text"], 0)
  np.testing.assert_array_equal(total["ear"]["kernel"], 1)


def test_constants_of_a_model_cannot_be_trained_by_a_table_that_forgets_them():
  params = {**PARAMS, "frozen": {"std": jnp.ones(2)}}
  with pytest.raises(UserError, match="would train the constant 'frozen/std'"):
    optim.adamw(optim.Config(freeze=(("ear/.*", True), (".*", False))), params)
  optim.adamw(optim.Config(freeze=(("frozen/.*", True), ("ear/.*", True), (".*", False))), params)


def test_tables_cover_every_parameter_and_have_no_dead_rows():
  names = optim.names(PARAMS)
  assert sorted(names) == ["ear/kernel", "joint/bias", "joint/kernel", "null/text"]
  table = ((".*/bias", 1), ("joint/.*", 2), (".*", 3))
  assert optim.lookup(table, names, "t") == {
    "ear/kernel": 3, "joint/bias": 1, "joint/kernel": 2, "null/text": 3,
  }  # fmt: skip
  with pytest.raises(UserError, match="covers no parameter 'ear/kernel'"):
    optim.lookup((("joint/.*", 1), ("null/.*", 1)), names, "t")
  with pytest.raises(UserError, match="'nul/.*' matches no parameter"):
    optim.lookup((("nul/.*", 1), (".*", 2)), names, "t")
  with pytest.raises(UserError, match="no .'learning_rate'"):
    optim.from_mapping({"learning_rate": 1.0})


def test_the_plain_average_warms_up_to_its_decay():
  ema = optim.Ema(decay=0.99)
  assert float(ema.take(1)) == pytest.approx(9 / 11)
  assert float(ema.take(10_000)) == pytest.approx(0.01)


@pytest.mark.parametrize("sigma, gamma", [(0.05, 16.9722), (0.1, 6.9372)])
def test_the_power_average_has_the_width_it_promises(sigma, gamma):
  assert optim.power_gamma(sigma) == pytest.approx(gamma, abs=1e-4)
  # Weight of each step in the average after `total` of them, by running it on unit vectors.
  total, ema = 2000, optim.Ema(sigma_rel=sigma)
  keep = 1 - np.asarray(ema.take(np.arange(1, total + 1)), np.float64)
  assert keep[0] == 0
  weight = (1 - keep) * np.append(np.cumprod(keep[::-1])[::-1][1:], 1.0)
  np.testing.assert_allclose(weight.sum(), 1, rtol=1e-4)
  time = np.arange(1, total + 1) / total
  mean = (weight * time).sum()
  width = math.sqrt((weight * (time - mean) ** 2).sum())
  assert width == pytest.approx(sigma, rel=0.02)


def test_the_average_of_a_constant_is_that_constant():
  value = {"x": jnp.asarray(np.random.default_rng(0).standard_normal(100), jnp.float32)}
  average = value
  for n in range(1, 5):
    average = optim.Ema(decay=0.7).update(average, value, n)
  np.testing.assert_array_equal(average["x"], value["x"])


@pytest.mark.parametrize("bad", [{"decay": 1.0}, {"decay": -0.1}, {"sigma_rel": 0.3}])
def test_impossible_averages_are_refused(bad):
  with pytest.raises(UserError):
    optim.Ema(**bad)


@pytest.mark.parametrize("clip", [0.0, 0.5, 50.0])
def test_eps_and_clip_are_those_of_the_config(clip):
  """Adam hides the scale of a gradient that is far above eps."""
  config = optim.Config(lr=0.1, warmup=0, clip=clip, weight_decay=0.01, eps=1e-2)
  clipped = optax.clip_by_global_norm(clip) if clip else optax.identity()
  reference = optax.chain(clipped, optax.adamw(0.1, 0.9, 0.95, eps=1e-2, weight_decay=0.01))
  for scale in (1e-2, 1.0):
    grads = jax.tree.map(lambda x, scale=scale: scale * x, ONES)
    theirs, _ = reference.update(grads, reference.init(PARAMS), PARAMS)
    ours = one_update(config, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_each_milestone_multiplies_the_rate_by_gamma():
  config = optim.Config(lr=2.0, warmup=5, decay="step", milestones=(10, 20), gamma=0.3)
  rates = [float(optim.schedule(config)(step)) for step in (14, 15, 24, 25)]
  np.testing.assert_allclose(rates, [2.0, 0.6, 0.6, 0.18], rtol=1e-6)
