import dataclasses
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import schema

SIZES: dict[str, Any] = dict(clip_dim=6, sync_dim=5, text_len=4, text_dim=3)


@pytest.mark.parametrize(
  "rate, seconds, expected",
  [
    ("16k", 8.0, (250, 128_000, 64, 192)),
    ("44k", 8.0, (345, 353_280, 64, 192)),
    ("16k", 5.0, (157, 80_384, 40, 112)),
    ("44k", 5.0, (216, 221_184, 40, 112)),
    ("16k", 10.0, (313, 160_256, 80, 240)),
    ("44k", 10.0, (431, 441_344, 80, 240)),
    ("16k", 0.64, (20, 10_240, 5, 8)),
    ("44k", 0.64, (28, 28_672, 5, 8)),
  ],
)
def test_lengths_are_those_of_mmaudio(rate, seconds, expected):
  assert dataclasses.astuple(schema.lengths(seconds, schema.AUDIO[rate])) == expected


def test_lengths_of_whole_frames_have_no_rounding_errors():
  for frames in range(16, 1000):
    n = schema.lengths(frames / 25, schema.AUDIO["16k"])
    exact = Fraction(frames, 25)
    assert n.sync == ((frames - 16) // 8 + 1) * 8, frames
    assert n.clip == exact * 8 // 1, frames
    assert n.latent == -(-exact * 16000 // 512), frames


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.6399, -1.0])
def test_clips_shorter_than_a_segment_are_refused(seconds):
  with pytest.raises(ValueError, match="shorter than one segment of 0.64 s"):
    schema.lengths(seconds, schema.AUDIO["16k"])


def test_sound_is_a_whole_number_of_latent_frames_and_covers_the_clip():
  for audio in schema.AUDIO.values():
    for seconds in (0.64, 1.0, 3.3, 7.77, 60.0):
      n = schema.lengths(seconds, audio)
      assert n.samples == n.latent * 2 * audio.hop
      assert 0 <= n.samples - seconds * audio.sample_rate < 2 * audio.hop
    assert audio.latent_rate * 2 * audio.hop == audio.sample_rate


def test_ids_are_stable_32_bit_numbers():
  assert schema.clip_id("scene_0_000000") == 2568108731
  assert schema.clip_id("noise") != schema.clip_id("Noise")
  assert all(0 <= schema.clip_id(str(i)) < 2**32 for i in range(100))


def test_whole_frames_of_decimal_seconds():
  assert [schema.whole_frames(s, 25) for s in (8.04, 4.0, 7.68, 0.039, 0.04)] == [
    201,
    100,
    192,
    0,
    1,
  ]


def batch_and_shapes():
  shapes = schema.feature_shapes(1.0, schema.AUDIO["16k"], **SIZES)
  return schema.synthetic_batch(shapes, 3, seed=0), shapes


def test_synthetic_batches_keep_the_contract_and_repeat():
  batch, shapes = batch_and_shapes()
  schema.check_batch(batch, shapes)
  again, _ = batch_and_shapes()
  assert batch["mean_betc"].shape == (3, 2, 32, 20) and batch["spatial_bvk"].shape == (3, 8, 5)
  for name in batch:
    np.testing.assert_array_equal(batch[name], again[name])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int16"])
def test_what_has_16_bits_is_widened_exactly(library, dtype):
  every = np.arange(2**16, dtype=np.uint16).view(dtype)
  other = {"id_b": np.arange(3, dtype=np.uint32), "image_byxc": np.arange(3, dtype=np.uint8)}
  batch = {"x_b": every, "y_b": np.arange(3, dtype=np.float32), **other}
  wide = schema.widen({name: library.asarray(x) for name, x in batch.items()})
  assert wide["x_b"].dtype == np.float32
  share = 32768 if dtype == "int16" else 1  # Sound is in -1..1.
  exact = every.astype(np.float64) / share
  np.testing.assert_array_equal(np.asarray(wide["x_b"]).astype(np.float64), exact)
  for name in batch.keys() - {"x_b"}:
    assert wide[name].dtype == batch[name].dtype
    np.testing.assert_array_equal(wide[name], batch[name])


def test_a_narrow_batch_is_what_records_hold():
  batch, shapes = batch_and_shapes()
  batch["audio_bep"] = np.array([0.0, 0.5, -1.0, 1.0, 1e-5, -2.0], np.float32)
  narrow = schema.narrow(batch)
  schema.check_batch(narrow, shapes)
  assert {name for name, x in narrow.items() if x.dtype == "bfloat16"} == {
    "std_betc", "clip_bvf", "sync_bsf", "text_bwf"
  }  # fmt: skip
  wide = schema.widen(narrow)
  assert wide["audio_bep"].tolist() == [0.0, 0.5, -1.0, 32767 / 32768, 0.0, -1.0]
  for name in shapes:
    name = schema.AXES[name]
    np.testing.assert_allclose(wide[name], batch[name], rtol=2**-8)
    np.testing.assert_array_equal(schema.narrow(wide)[name], narrow[name])


@pytest.mark.parametrize(
  "change, message",
  [
    ({"clip_bvf": None}, "clip_bvf is missing"),
    ({"id_b": np.zeros(3, np.int64)}, "id_b has dtype int64, expected uint32"),
    ({"id_b": None}, "id_b is missing"),
    ({"weight_b": None}, "weight_b is missing"),
    ({"clip_bvf": np.zeros((3, 8, 6))}, "clip_bvf has dtype float64, expected float32, bf"),
    ({"weight_b": np.ones(2, np.float32)}, r"weight_b has shape \(2,\), expected \(3,\)"),
    ({"text_bwf": np.zeros((3, 4, 7), np.float32)}, r"text_bwf has shape .*\(3, 4, 3\)"),
    ({"mean_betc": np.zeros((2, 2, 32, 20), np.float32)}, "mean_betc has shape"),
  ],
)
def test_a_broken_batch_names_its_field(change, message):
  batch, shapes = batch_and_shapes()
  batch = {name: value for name, value in (batch | change).items() if value is not None}
  with pytest.raises(ValueError, match=message):
    schema.check_batch(batch, shapes)
