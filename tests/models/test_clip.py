"""CLIP's two towers against upstream's definition, at small sizes and at the full one's count."""

import jax
import numpy as np
import pytest

from spatialv2a_jax.convert import clip as table
from spatialv2a_jax.convert import engine
from spatialv2a_jax.models import clip
from tests.models import encoder_reference, encoder_states

IDS = np.array([[57, 3, 17, 59, 0, 0, 0, 0, 0], [57, 4, 4, 8, 1, 9, 30, 2, 59]])
ROWS = 45  # Three patches of 14 fit; three rows and columns are left over.


@pytest.fixture(scope="module")
def small():
  state = encoder_states.clip()
  config, params = engine.convert(table.SOURCE, state, "state")
  net = clip.build(config)
  return state, params, clip.Clip(net.init, jax.jit(net.image), jax.jit(net.text))


@pytest.fixture(scope="module")
def frames():
  return np.random.default_rng(1).integers(0, 256, (2, ROWS, ROWS, 3), np.uint8)


def test_pictures_are_encoded_as_upstream(small, frames):
  state, params, net = small
  got = net.image(params, frames)
  for row, frame in zip(got, frames, strict=True):
    want = encoder_reference.clip_image(state, frame.transpose(2, 0, 1), heads=2, layers=2)
    np.testing.assert_allclose(row, want, atol=2e-5)
    assert want.std() > 0.3


def test_all_states_and_the_pooled_text_are_upstreams(small):
  state, params, net = small
  hidden, pooled = net.text(params, IDS)
  for i, ids in enumerate(IDS):
    want, want_pooled = encoder_reference.clip_text(state, ids, heads=2, layers=2)
    np.testing.assert_allclose(hidden[i], want, atol=2e-5)
    np.testing.assert_allclose(pooled[i], want_pooled, atol=2e-5)


def test_pixels_beyond_the_last_patch_are_unseen(small, frames):
  _, params, net = small
  other = frames.copy()
  other[:, 42:], other[:, :, 42:] = 0, 255
  np.testing.assert_array_equal(net.image(params, other), net.image(params, frames))
  other[0, 41, 41] ^= 255
  assert abs(net.image(params, other) - net.image(params, frames))[0].max() > 1e-3


def test_no_state_depends_on_a_later_token(small):
  _, params, net = small
  later = IDS.copy()
  later[:, 5:] = 7
  hidden, changed = net.text(params, IDS)[0], net.text(params, later)[0]
  np.testing.assert_array_equal(hidden[:, :5], changed[:, :5])
  assert abs(hidden[0, 5:] - changed[0, 5:]).min(axis=1).max() > 0


def test_normalize_gives_unit_length_and_survives_zero():
  x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
  np.testing.assert_allclose(clip.normalize(x), [[0.6, 0.8], [0, 0]], atol=1e-7)


def test_the_released_size_has_its_number_of_parameters():
  shapes = jax.eval_shape(clip.build(clip.Config()).init, jax.random.key(0))
  count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}
  assert count == {"image": 632_682_240, "text": 354_032_640, "logit_scale": 1}
  assert sum(count.values()) == 986_714_881
