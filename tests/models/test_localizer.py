"""CLIPSeg against upstream's definition, and ACL's calibration around it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax.convert import clipseg as table
from spatialv2a_jax.convert import engine
from spatialv2a_jax.models import localizer
from tests.models import encoder_reference, encoder_states

IDS = np.array([[57, 3, 17, 59, 0, 0, 0, 0, 0], [57, 4, 4, 8, 1, 9, 30, 2, 59]])


@pytest.fixture(scope="module")
def small():
  state = encoder_states.clipseg()
  config, params = engine.convert(table.SOURCE, state, "state")
  net = localizer.build(config)
  jitted = {name: jax.jit(f) for name, f in net._asdict().items() if name != "init"}
  return state, params, net._replace(**jitted)


@pytest.fixture(scope="module")
def frames():
  return np.random.default_rng(1).integers(0, 256, (1, 352, 352, 3), np.uint8)


def test_texts_are_embedded_as_upstream(small):
  state, params, net = small
  got = net.text(params, IDS)
  for row, ids in zip(got, IDS, strict=True):
    _, want = encoder_reference.clipseg_text(state, ids, heads=1, layers=2)
    np.testing.assert_allclose(row, want, atol=2e-5)


def test_a_sound_stands_where_a_word_would(small):
  """The embedding of a prompt is that of the text if the word is the token's own vector."""
  _, params, net = small
  words = np.array([17, 30])
  texts = np.array([[57, 3, 8, 4, word, 59, 0, 0, 0] for word in words])
  word_bd = params["text"]["tokens"][words]
  got = net.sound(params, word_bd, np.array([57, 3, 8, 4, 59]))
  np.testing.assert_allclose(got, net.text(params, texts), atol=1e-5)
  other = net.sound(params, word_bd[::-1], np.array([57, 3, 8, 4, 59]))
  np.testing.assert_allclose(other, got[::-1], atol=1e-5)
  assert abs(got[0] - got[1]).max() > 0.01


def test_logits_of_every_sound_are_upstreams(small, frames):
  state, params, net = small
  e_of = np.random.default_rng(2).normal(size=(2, 20)).astype(np.float32)
  got = net.logits(params, frames, e_of)
  assert got.shape == (2, 1, 352, 352)
  pooled, hidden = encoder_reference.clipseg_image(
    state, frames[0].transpose(2, 0, 1), heads=1, layers=11
  )
  np.testing.assert_allclose(net.image(params, frames)[0], pooled, atol=2e-5)
  for logits, embedding in zip(got, e_of, strict=True):
    want = encoder_reference.clipseg_logits(state, hidden, embedding)
    np.testing.assert_allclose(logits[0], want, atol=1e-5 * abs(want).max())
  assert abs(got[0] - got[1]).max() > 0.1 * abs(got).max()

  shift = 0.3
  maps = net.heat(params, frames, e_of, shift)
  one = nn.sigmoid(got + shift)
  np.testing.assert_allclose(maps, 1 - (1 - one[0]) * (1 - one[1]), atol=1e-6)


def test_shift_and_not_slope_makes_the_heat_map():
  logits = np.array([-1.4, 0.0, -localizer.SHIFT - 1], np.float32).reshape(1, 1, 1, 3)
  want = 1 / (1 + np.exp([0.0, -1.4, 1.0]))
  np.testing.assert_allclose(localizer.heat(jnp.asarray(logits))[0, 0], want, atol=1e-6)


def test_averaging_with_the_mirror_is_a_mean_of_two_maps():
  """Of a network that likes the right side: its map of the mirrored picture is turned back."""
  rng = np.random.default_rng(0)
  frames, liking_x = rng.integers(0, 256, (2, 3, 4, 3), np.uint8), np.arange(4) / 4

  def heat_of(params, frames_byxc, scale):
    return params * scale * jnp.asarray(frames_byxc)[..., 0] * liking_x[None, None]

  got = localizer.mirror_tta(heat_of)(0.5, frames, 0.01)
  want = 0.5 * 0.01 * frames[..., 0] * ((liking_x + liking_x[::-1]) / 2)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_synonyms_get_a_prompt_each():
  assert localizer.prompts("dog barking") == ["A photo of dog barking"]
  assert localizer.prompts(" car, truck ,") == ["A photo of car", "A photo of truck"]
  assert localizer.prompts("") == []


def test_the_released_size_has_its_number_of_parameters():
  """Upstream has 197 rows of picture positions, which conversion resizes to 485."""
  shapes = jax.eval_shape(localizer.build(localizer.Config()).init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 150_747_746 + (485 - 197) * 768
