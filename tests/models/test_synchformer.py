"""Synchformer's visual encoder against upstream's definition, and its segments."""

import jax
import numpy as np
import pytest

from spatialv2a_jax.convert import engine
from spatialv2a_jax.convert import synchformer as table
from spatialv2a_jax.models import synchformer
from tests.models import encoder_reference, encoder_states


@pytest.fixture(scope="module")
def small():
  state = encoder_states.synchformer()
  config, params = engine.convert(table.SOURCE, state, "state")
  frames = np.random.default_rng(1).integers(0, 256, (2, 26, 32, 32, 3), np.uint8)
  return state, params, jax.jit(synchformer.build(config).encode), frames


def test_every_segment_is_encoded_as_upstream(small):
  state, params, encode, frames = small
  tokens = encode(params, frames)
  assert tokens.shape == (2, 16, 128)
  for row, video in zip(tokens, frames.transpose(0, 1, 4, 2, 3), strict=True):
    for segment in range(2):
      cut = video[8 * segment : 8 * segment + 16]
      want = encoder_reference.synchformer(state, cut, heads=2, layers=2)
      np.testing.assert_allclose(row[8 * segment : 8 * segment + 8], want, atol=3e-5)


def test_the_norms_have_upstreams_epsilon(small):
  """Faint embeddings and tokens show it: it is much of what the first norms divide by."""
  state, _, encode, frames = small
  parts = ("embed", "cls_token", "vfeat_extractor.norm.")
  faint = {n: x * (1e-3 if any(p in n for p in parts) else 1) for n, x in state.items()}
  _, params = engine.convert(table.SOURCE, faint, "state")
  tokens = encode(params, frames)[1, :8]
  want = encoder_reference.synchformer(
    faint, frames[1, :16].transpose(0, 3, 1, 2), heads=2, layers=2
  )
  np.testing.assert_allclose(tokens, want, atol=1e-4)


def test_frames_after_the_last_segment_are_unseen(small):
  _, params, encode, frames = small
  other = frames.copy()
  other[:, 24:] = 0
  np.testing.assert_array_equal(encode(params, other), encode(params, frames))


@pytest.mark.parametrize("frames, count", [(16, 1), (23, 1), (24, 2), (199, 23), (200, 24)])
def test_segments_overlap_by_half(frames, count):
  index = synchformer.segments(frames)
  assert index.shape == (count, 16)
  np.testing.assert_array_equal(index[:, 0], 8 * np.arange(count))
  assert (np.diff(index, axis=1) == 1).all() and index.max() < frames


def test_less_than_a_segment_is_refused():
  with pytest.raises(ValueError, match="16 frames, got 15"):
    synchformer.segments(15)


def test_the_released_size_has_its_number_of_parameters():
  config = synchformer.Config()
  shapes = jax.eval_shape(synchformer.build(config).init, jax.random.key(0))
  unused = 768 * 3 * 16 * 16 + 768  # Upstream's 2-D patch embedding, which nothing reads.
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 122_440_704 - unused
