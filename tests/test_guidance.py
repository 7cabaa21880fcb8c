"""Guidance and solvers of the flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import solvers
from spatialv2a_jax import flow
from tests.test_flow import KEY, NET, SIGNS, FakeNet, batch_of

COND = ("clip_bvf", "sync_bsf", "text_bwf", "spatial_bvk")


def setting():
  batch = batch_of(3)
  cond = {name: jnp.asarray(batch[name]) for name in COND}
  t_b = jnp.array([0.0, 0.4, 0.9])
  return cond, jnp.asarray(batch["mean_betc"]), t_b


def branch(cond, x, t_b, *, video=True, text=True, spatial=True, params=0.3):
  """The fake network's velocity by hand, with some conditions missing."""
  mean = {n: cond[n].mean(axis=(1, 2)) for n in COND}
  both = video * (mean["clip_bvf"] + mean["sync_bsf"]) + text * mean["text_bwf"]
  ear = both[:, None, None, None] + (spatial * mean["spatial_bvk"])[:, None, None, None] * SIGNS
  return params * ear + x * np.asarray(t_b)[:, None, None, None]


def guided(cond, x, t_b, **options):
  return flow.guided(NET, 0.3, {"calls": 0}, cond, latent_len=5, **options)(x, t_b)


def test_guidance_of_one_is_the_conditional_branch_and_runs_it_alone():
  cond, x, t_b = setting()
  rows = []

  class Counting(FakeNet):
    def velocity(self, params, x_betc, t_b, prepared):
      rows.append(len(x_betc))
      return super().velocity(params, x_betc, t_b, prepared)

  velocity = flow.guided(Counting(), 0.3, {}, cond, latent_len=5, guidance=1.0)
  np.testing.assert_allclose(velocity(x, t_b), branch(cond, x, t_b), rtol=1e-5, atol=1e-6)
  assert rows == [3]


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guidance_moves_away_from_the_unconditional_branch(guidance):
  cond, x, t_b = setting()
  null = branch(cond, x, t_b, video=False, text=False, spatial=False)
  expected = null + guidance * (branch(cond, x, t_b) - null)
  got = guided(cond, x, t_b, guidance=guidance)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  same = guided(cond, x, t_b, guidance=guidance, spatial_guidance=guidance)
  np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize("guidance, spatial", [(3.0, 6.0), (3.0, 0.0), (1.0, 2.0), (0.0, 1.0)])
def test_spatial_guidance_has_its_own_scale(guidance, spatial):
  cond, x, t_b = setting()
  null = branch(cond, x, t_b, video=False, text=False, spatial=False)
  plain = branch(cond, x, t_b, spatial=False)
  full = branch(cond, x, t_b)
  expected = null + guidance * (plain - null) + spatial * (full - plain)
  got = guided(cond, x, t_b, guidance=guidance, spatial_guidance=spatial)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spatial", [None, 5.0])
def test_negative_text_takes_the_place_of_no_text(spatial):
  cond, x, t_b = setting()
  negative_bwf = batch_of(3, seed=5)["text_bwf"]
  options = {"guidance": 2.0, "spatial_guidance": spatial}
  got = guided(cond, x, t_b, negative_text_bwf=negative_bwf, **options)
  without = guided(cond, x, t_b, **options)
  pull = 0.3 * negative_bwf.mean(axis=(1, 2)).reshape(3, 1, 1, 1)
  np.testing.assert_allclose(got - without, (1 - 2.0) * pull * np.ones_like(x), atol=1e-5)


def test_conditions_that_a_clip_does_not_have_are_nulls_for_it_alone():
  cond, x, t_b = setting()
  missing = {"text": jnp.array([False, True, False])}
  got = guided(cond, x, t_b, guidance=1.0, missing=missing)
  full, mute = branch(cond, x, t_b), branch(cond, x, t_b, text=False)
  np.testing.assert_allclose(got, np.stack([full[0], mute[1], full[2]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", flow.SOLVERS)
def test_a_constant_velocity_is_integrated_exactly(method):
  x = jnp.zeros((2, 2, 3, 4))
  v = jnp.arange(48.0).reshape(2, 2, 3, 4)
  for steps in (1, 7):
    np.testing.assert_allclose(
      flow.sample(lambda x, t_b: v, x, steps=steps, method=method), v, rtol=1e-6
    )


@pytest.mark.parametrize("method", flow.SOLVERS)
def test_the_error_falls_with_the_order_of_the_method(method):
  with jax.enable_x64(True):

    def velocity(x, t_b):  # Of x(t) = exp(-t^2).
      return -2 * t_b[:, None, None, None] * x

    x = jnp.ones((1, 2, 1, 1), jnp.float64)
    errors = [
      abs(float(flow.sample(velocity, x, steps=n, method=method)[0, 0, 0, 0]) - np.exp(-1.0))
      for n in (16, 32)
    ]
  np.testing.assert_allclose(np.log2(errors[0] / errors[1]), flow.SOLVERS[method].order, atol=0.1)


@pytest.mark.parametrize("method, nodes", [("ab2", 1), ("midpoint", 2), ("rk4", 4)])
def test_a_solver_evaluates_at_its_nodes(method, nodes):
  times = []

  def velocity(x, t_b):
    jax.debug.callback(lambda t: times.append(float(t)), t_b[0], ordered=True)
    return x

  jax.block_until_ready(flow.sample(velocity, jnp.ones((1, 1, 1, 1)), steps=3, method=method))
  jax.effects_barrier()
  assert len(times) == 3 * nodes
  step = {1: [0], 2: [0, 1 / 2], 4: [0, 1 / 2, 1 / 2, 1]}[nodes]
  want = [(i + node) / 3 for i in range(3) for node in step]
  np.testing.assert_allclose(times, want, atol=1e-6)


def test_two_steps_of_adams_and_bashforth_by_hand():
  x = jnp.full((1, 1, 1, 1), 2.0)
  got = flow.sample(lambda x, t_b: x * (1 + t_b[:, None, None, None]), x, steps=2, method="ab2")
  first = 2.0 + 0.5 * 2.0
  np.testing.assert_allclose(got, first + 0.5 * (1.5 * first * 1.5 - 0.5 * 2.0), rtol=1e-6)


def test_fewer_evaluations_of_higher_order_reach_euler_25():
  """On a mixture of Gaussians, whose flow is known in closed form."""
  x0 = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 200, 1)), jnp.float32)
  truth = solvers.exact(np.asarray(x0))

  def error(method, steps):
    x = flow.sample(solvers.mixture_velocity, x0, steps=steps, method=method)
    return np.sqrt(np.square(x - truth).mean())

  assert error("rk4", 60) < 2e-4  # The truth is the truth.
  assert error("ab2", 8) < error("euler", 25)
  assert error("midpoint", 5) < error("euler", 25)


def test_an_unknown_method_is_refused():
  with pytest.raises(ValueError, match="unknown method 'rk9', have: euler, ab2, midpoint, rk4"):
    flow.sample(lambda x, t_b: x, jnp.zeros((1, 1, 1, 1)), steps=1, method="rk9")


def test_exchanged_ears_of_noise_and_condition_give_exchanged_ears():
  cond, x, _ = setting()
  mirrored = cond | {"spatial_bvk": -cond["spatial_bvk"]}  # The fake network's law of mirrors.

  def run(cond, x):
    velocity = flow.guided(NET, 0.3, {}, cond, latent_len=5, guidance=2.0, spatial_guidance=4.0)
    return flow.sample(velocity, x, steps=5)

  np.testing.assert_allclose(run(mirrored, x[:, ::-1]), run(cond, x)[:, ::-1], atol=1e-5)


def test_what_knows_neither_picture_nor_words_knows_no_place(monkeypatch):
  """Guidance subtracts what the network says of nothing at all: one clip in a hundred is that."""
  seen = {}

  class Net(FakeNet):
    def condition(self, params, stats, cond, drop, **options):
      seen.update(drop)
      return super().condition(params, stats, cond, drop, **options)

  flow.loss(jnp.ones(()), {"calls": 0}, batch_of(20_000), KEY, net=Net(), config=flow.LossConfig())
  video, text, spatial = (np.asarray(seen[name]) for name in ("video", "text", "spatial"))
  assert spatial[video & text].all() and 0.007 < (video & text).mean() < 0.013
  for name, share in (("video", 0.1), ("text", 0.1), ("spatial", 0.109)):
    assert np.asarray(seen[name]).mean() == pytest.approx(share, abs=0.008)
