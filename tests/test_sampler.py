"""Windows that are sampled together: what they share keeps the statistics of the data."""

import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax import flow
from spatialv2a_jax.models.flow_net import FlowNet
from spatialv2a_jax.sampler import Choice, Condition, Sampler
from spatialv2a_jax.windows import cross_fade, shares

FRAMES, FADE = 40, 10
FIRSTS = [0, 20, 40]
SPREAD = 0.1
CHOICE = Choice(1.0, None, 50, "euler")


def never(*_):
  raise AssertionError("not asked for")


def coin_net():
  """The exact velocity of data near -1 or 1; a window has an opinion of its own of the odds."""

  def condition(params, stats, cond, drop, *, latent_len, train):
    return cond["clip_bvf"], stats

  def velocity(params, x_betc, t_b, odds_bvf):
    t = t_b[:, None, None, None]
    variance = (1 - t) ** 2 + (t * SPREAD) ** 2
    side = jnp.tanh(t * x_betc / variance + odds_bvf[:, None, :, :])
    return side + (t * SPREAD**2 - (1 - t)) / variance * (x_betc - t * side)

  same = lambda params, x: x  # noqa: E731
  return FlowNet(never, never, condition, velocity, never, same, same)


def given(odds_bvf):
  rows = len(odds_bvf)
  cond = {"clip_bvf": odds_bvf, "text_bwf": np.zeros((rows, 1, 1), np.float32)}
  return Condition(cond, None, np.zeros(rows, bool))


def noise(frames):
  return flow.ear_noise(jax.random.key(0), frames, 8, ears=2, correlation=0.0)


def joint(sampler, odds_bvf, rows, choice=CHOICE, advance=lambda share: None):
  return sampler.together(
    {}, {}, given(odds_bvf), noise(FIRSTS[-1] + FRAMES), choice,
    firsts=FIRSTS, share_bn=shares(FIRSTS, FRAMES, FADE), rows=rows, advance=advance,
  )  # fmt: skip


def test_windows_that_disagree_decide_together():
  rng = np.random.default_rng(1)
  odds_bvf = rng.choice([-0.7, 0.7], (3, FRAMES, 8)).astype(np.float32)
  sampler, start = Sampler(coin_net(), FRAMES), noise(FIRSTS[-1] + FRAMES)
  x_etc = joint(sampler, odds_bvf, rows=2)
  pieces = np.asarray(
    sampler.windows(
      {}, {}, given(odds_bvf), jnp.stack([start[:, f : f + FRAMES] for f in FIRSTS]), CHOICE
    )
  )
  apart_etc = cross_fade(FIRSTS, list(pieces), FADE)
  fading_t = np.zeros(x_etc.shape[1], bool)
  for first, share_n in zip(FIRSTS, shares(FIRSTS, FRAMES, FADE), strict=True):
    fading_t[first : first + FRAMES] |= (share_n > 0.2) & (share_n < 0.8)
  assert 8 < fading_t.sum() < 2 * FADE
  undecided, averaged = (np.mean(np.abs(x[:, fading_t]) < 0.5) for x in (x_etc, apart_etc))
  assert undecided < 0.02 < 0.08 < averaged
  assert np.abs(pieces).min() > 0.5  # Each window by itself has decided.
  for first, piece_enc, share_n in zip(FIRSTS, pieces, shares(FIRSTS, FRAMES, FADE), strict=True):
    own_n = share_n == 1
    assert own_n.any()
    np.testing.assert_allclose(
      x_etc[:, first : first + FRAMES][:, own_n], piece_enc[:, own_n], atol=1e-4
    )


def telling_net():
  """Its velocity says what it is told of: 1 for the picture, 100 for the place, and the text."""

  def condition(params, stats, cond, drop, *, latent_len, train):
    told = {"video": cond["clip_bvf"], "text": cond["text_bwf"], "spatial": cond["spatial_bvk"]}
    told_b = jnp.stack([jnp.where(drop[name], 0, x[:, 0, 0]) for name, x in told.items()]).sum(0)
    return {"told_b": told_b}, stats

  def velocity(params, x_betc, t_b, prepared):
    return prepared["told_b"][:, None, None, None] + 0 * x_betc

  return FlowNet(
    never, never, condition, velocity, never, lambda params, x: x, lambda params, x: 2 * x + 0.5
  )


def test_windows_alone_and_together_obey_all_settings_and_return_latents_of_the_data():
  told = {"clip_bvf": 1.0, "text_bwf": 10.0, "spatial_bvk": 100.0}
  cond = {name: np.full((3, 1, 1), value, np.float32) for name, value in told.items()}
  condition = Condition(cond, np.full((3, 1, 1), 20.0, np.float32), np.array([False, False, True]))
  choice = Choice(guidance=2.0, spatial_guidance=3.0, steps=2, method="euler")
  sampler, start = Sampler(telling_net(), FRAMES), np.asarray(noise(FIRSTS[-1] + FRAMES))
  pieces = np.stack([start[:, first : first + FRAMES] for first in FIRSTS])
  velocity_b = np.array(
    [20 + 2 * (11 - 20) + 300, 20 + 2 * (11 - 20) + 300, 20 + 2 * (1 - 20) + 300]
  )
  apart = sampler.windows({}, {}, condition, pieces, choice)
  np.testing.assert_allclose(apart, 2 * (pieces + velocity_b[:, None, None, None]) + 0.5, rtol=1e-5)
  whole = sampler.together(
    {}, {}, condition, jnp.asarray(start), choice,
    firsts=FIRSTS, share_bn=shares(FIRSTS, FRAMES, FADE), rows=2, advance=lambda share: None,
  )  # fmt: skip
  for at, v in ((0, velocity_b[0]), (-1, velocity_b[2])):
    np.testing.assert_allclose(whole[:, at], 2 * (start[:, at] + v) + 0.5, rtol=1e-5)


def test_a_clip_ignores_how_its_windows_are_grouped_and_follows_every_solver():
  odds_bvf = np.random.default_rng(2).normal(size=(3, FRAMES, 8)).astype(np.float32)
  sampler = Sampler(coin_net(), FRAMES)
  for method in flow.SOLVERS:
    choice = CHOICE._replace(method=method, steps=4)
    work = []
    found = [joint(sampler, odds_bvf, rows, choice, work.append) for rows in (1, 2, 3)]
    np.testing.assert_allclose(sum(work), 3)  # Of each of them the whole is told.
    for other in found[1:]:
      np.testing.assert_allclose(other, found[0], atol=1e-5)
    same_bvf = np.zeros_like(odds_bvf)  # Windows that agree are one clip.
    whole = Sampler(coin_net(), FIRSTS[-1] + FRAMES)
    flat = np.zeros((1, FIRSTS[-1] + FRAMES, 8), np.float32)
    one = whole.windows({}, {}, given(flat), noise(FIRSTS[-1] + FRAMES)[None], choice)[0]
    np.testing.assert_allclose(joint(sampler, same_bvf, 2, choice), one, atol=2e-4)
