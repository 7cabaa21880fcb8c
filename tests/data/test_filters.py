"""What is measured of a clip's sound and what drops it."""

import dataclasses
import math
import pathlib

import av
import numpy as np
import pytest

from data import filters
from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from tests.data import clips
from tests.data.clips import RATE, noise

LIMITS = filters.Limits()


def streamed(path: pathlib.Path, seconds: float) -> str:
  """Writes a video as browsers record it: nothing in the file says how long it lasts."""
  source = clips.write(path.with_suffix(".mp4"), seconds)
  with av.open(source) as held, av.open(path, "w", "matroska", {"live": "1"}) as output:
    streams = [output.add_stream_from_template(stream) for stream in held.streams]
    for packet in held.demux():
      if packet.dts is not None:
        packet.stream = streams[packet.stream.index]
        output.mux(packet)
  return str(path)


@pytest.mark.parametrize(("seconds", "dropped"), [(0.8, True), (1.0, False), (1.2, False)])
def test_a_length_that_is_not_stated_is_counted(tmp_path, seconds, dropped):
  path = streamed(tmp_path / "clip.mkv", seconds)
  assert io.probe(path).duration_s == pytest.approx(seconds)
  if dropped:
    with pytest.raises(filters.DropError, match="short: 0.80 s of 1 s"):
      filters.probe(path, filters.Limits(seconds=1))
  else:
    found = filters.probe(path, filters.Limits(seconds=1))
    assert found["duration_s"] == pytest.approx(seconds)


def tone(seconds: float, level: float = 1.0) -> np.ndarray:
  return (level * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)).astype("f4")


def at_rms_db(level_db: float, seconds: float = 10.0) -> np.ndarray:
  mono_p = noise(seconds)
  return mono_p * np.float32(10 ** (level_db / 20) / np.sqrt(np.mean(mono_p.astype("f8") ** 2)))


def reason(audio_ep: np.ndarray, scores=None, tags=None, limits=LIMITS) -> str | None:
  try:
    filters.check(filters.measure(audio_ep, RATE), scores or {}, tags or {}, limits)
  except filters.DropError as drop:
    return drop.reason
  return None


def test_share_of_silence():
  assert filters.silent_share(np.zeros(RATE, "f4"), RATE) == 1
  assert filters.silent_share(tone(10), RATE) == 0
  assert filters.silent_share(np.concatenate([tone(2), 0 * tone(8)]), RATE) == 0.8
  assert filters.silent_share(np.concatenate([tone(2.05), 0 * tone(7.95)]), RATE) == 0.795


@pytest.mark.parametrize(
  ("mono_p", "dropped"),
  [
    (np.concatenate([tone(2), 0 * tone(8)]), True),  # The boundary belongs to the dropped.
    (np.concatenate([tone(2.05), 0 * tone(7.95)]), False),
    (at_rms_db(-42), True),
    (at_rms_db(-38), False),
  ],
)
def test_silence_drops(mono_p, dropped):
  assert reason(mono_p[None]) == ("silent" if dropped else None)


@pytest.mark.parametrize(
  ("seconds", "dropped"), [(9.94, True), (9.95, False), (10.0, False), (10.02, False)]
)
def test_length_with_tolerance(seconds, dropped):
  assert reason(noise(seconds)[None]) == ("short" if dropped else None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite(value):
  mono_p = noise(10)
  mono_p[77] = value
  assert reason(mono_p[None]) == "not_finite"


def test_scores_drop_only_if_they_are_known():
  loud = noise(10)[None]
  assert reason(loud, {"CE": 2.2, "CU": 3.5, "PQ": 4.0, "PC": 0.0}) is None
  assert reason(loud, {"PQ": 3.99}) == reason(loud, {"CU": 3.4}) == "quality"
  assert reason(loud, {"PQ": math.nan}) is None


def test_tags_drop_above_their_limit():
  limits = dataclasses.replace(LIMITS, tags=(("speech", 0.5),))
  loud = noise(10)[None]
  assert reason(loud, tags={"speech": 0.5, "music": 1}, limits=limits) is None
  assert reason(loud, tags={"speech": 0.51}, limits=limits) == "tag"
  assert reason(loud, tags={"speech": 0.51}) is None


def test_one_reason_though_several_apply():
  assert reason(np.zeros((1, RATE), "f4"), {"PQ": 1}) == "short"
  assert reason(np.zeros((1, 10 * RATE), "f4"), {"PQ": 1}) == "silent"


@pytest.mark.parametrize(
  ("left", "right", "layout"),
  [
    (noise(1), noise(1, 1), "stereo"),
    (noise(1), 0.5 * noise(1), "stereo"),  # One source, panned.
    (noise(1), noise(1), "dual_mono"),
    (noise(1), noise(1) + 0.02 * noise(1, 1), "dual_mono"),  # What a lossy codec adds.
    (noise(1), -0.8 * noise(1), "antiphase"),
    (noise(1), 0.005 * noise(1, 1), "one_sided"),
    (0 * noise(1), noise(1, 1), "one_sided"),
    (0 * noise(1), 0 * noise(1), "dual_mono"),
  ],
)
def test_what_two_channels_hold(left, right, layout):
  assert filters.measure(np.stack([left, right]), RATE)["layout"] == layout


def test_levels_are_measured_in_decibels():
  found = filters.measure(np.stack([tone(1), 0.5 * tone(1)]), RATE)
  half_db = 20 * math.log10(2)
  assert found["peak_db"] == pytest.approx([0, -half_db], abs=0.01)
  assert found["level_db"] == pytest.approx([-half_db / 2, -1.5 * half_db], abs=0.01)
  assert found["correlation"] == pytest.approx(1)
  assert found["side_db"] == pytest.approx(20 * math.log10(0.5 / 1.5))
  mixed = filters.measure(np.stack([noise(1), noise(1) + 3**0.5 * noise(1, 1)]), RATE)
  assert mixed["correlation"] == pytest.approx(0.5, abs=0.02)


def test_one_channel_out_of_any():
  left, right = noise(1), noise(1, 1, 0.2)
  both = np.stack([left, right])
  np.testing.assert_allclose(filters.mono(both, "stereo"), (left + right) / 2, rtol=1e-6)
  np.testing.assert_array_equal(filters.mono(both, "antiphase"), right)
  np.testing.assert_array_equal(filters.mono(both[::-1], "one_sided"), right)
  assert filters.measure(np.tile(left, (6, 1)), RATE)["layout"] == "surround"


def test_probing_files(tmp_path):
  def probed(path) -> str | None:
    try:
      filters.probe(str(path), filters.Limits(seconds=1.0))
    except filters.DropError as drop:
      return drop.reason
    return None

  assert probed(clips.write(tmp_path / "good.mp4")) is None
  assert probed(clips.write(tmp_path / "mute.mp4", sound=False)) == "no_sound"
  assert probed(clips.write(tmp_path / "short.mp4", 0.8)) == "short"
  io.write_audio(tmp_path / "sound.wav", noise(1)[None].repeat(2, 0), RATE)
  assert probed(tmp_path / "sound.wav") == "no_video"


def test_damage_explains_why_a_file_is_short(tmp_path):
  path = clips.write(tmp_path / "short.mp4", 0.8)
  blob = bytearray(path.read_bytes())
  begin = len(blob) // 4  # Behind the first picture.
  blob[begin : begin + 3000] = bytes(3000)
  path.write_bytes(blob)
  io.probe(path)
  with pytest.raises(UserError):
    filters.probe(str(path), filters.Limits(seconds=1))
