"""Joined recordings, whose times go back and whose channels change; AAC; frames in memory."""

import pathlib

import av
import numpy as np
import pytest

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import summary

CHANNELS = {"mono": 1, "stereo": 2, "5.1": 6}


def broadcast(path, grey, count=25):
  """Writes an MPEG transport stream of `count` frames whose times begin where all begin."""
  with av.open(str(path), "w", format="mpegts") as output:
    stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
    for _ in range(count):
      pixels = np.full((32, 64, 3), grey, np.uint8)
      output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    output.mux(stream.encode(None))
  return path.read_bytes()


def tone(path, layout, rate, seconds=1.0, silent=0.0):
  """Writes bare AAC: 500 Hz at an amplitude of 0.25 in all channels, then silence."""
  time = np.arange(round(seconds * rate)) / rate
  wave = np.where(time < seconds - silent, 0.25 * np.sin(1000 * np.pi * time), 0)
  with av.open(str(path), "w", format="adts") as output:
    stream = output.add_stream("aac", rate=rate, layout=layout)
    assert isinstance(stream, av.AudioStream)
    sound = np.repeat(wave[None].astype(np.float32), CHANNELS[layout], axis=0)
    frame = av.AudioFrame.from_ndarray(sound, "fltp", layout)
    frame.sample_rate = rate
    output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
  return path.read_bytes()


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_aac_keeps_both_ears_in_time_and_level(tmp_path, rate):
  noise_p = np.random.default_rng(0).standard_normal(2 * rate) * 0.1
  ears = np.stack([noise_p, 0.5 * np.roll(noise_p, round(400e-6 * rate))]).astype("f4")
  pixels = np.zeros((50, 32, 64, 3), np.uint8)
  io.write_video(tmp_path / "x.mp4", pixels, 25, ears, rate, codec="aac")
  with av.open(str(tmp_path / "x.mp4")) as container:
    assert container.streams.audio[0].bit_rate > 250_000
  back = io.read_audio(tmp_path / "x.mp4", rate)
  assert back.shape == ears.shape
  (before, after) = (summary.spatial_cues(x, rate) for x in (ears, back))
  assert after["itd_xc_clip_us"] == pytest.approx(before["itd_xc_clip_us"], abs=1)
  assert after["ild_clip_db"] == pytest.approx(before["ild_clip_db"], abs=0.2)
  assert np.square(back - ears).mean() < 0.1 * np.square(ears).mean()  # No sample late.


@pytest.mark.parametrize("fps", [25, 24_000 / 1001])
def test_frames_in_memory_are_seen_as_those_of_a_file(tmp_path, fps):
  pixels = np.random.default_rng(0).integers(0, 255, (40, 24, 32, 3), np.uint8)
  io.write_video(tmp_path / "x.mp4", pixels, fps)
  held = io.Frames(io.read_video(tmp_path / "x.mp4", fps), fps)
  views = {"a": io.View(8, (16, 16)), "b": io.View(25, short_side=16, crop=16)}
  assert held.seconds == pytest.approx(io.probe(tmp_path / "x.mp4").duration_s, abs=1e-3)
  for start, duration in ((0, None), (0.3, None), (0.5, 0.6), (0, 9)):
    seen = io.read_views(tmp_path / "x.mp4", views, start, duration)
    kept = held.views(views, start, duration)
    for name in views:
      np.testing.assert_array_equal(kept[name], seen[name])
  assert held.sha256 != io.Frames(held.pixels, 30).sha256
  for bad in (held.pixels[0], held.pixels.astype(np.float32), held.pixels[:0]):
    with pytest.raises(UserError, match="uint8 RGB"):
      io.Frames(bad, fps)
  with pytest.raises(UserError, match="nothing from 9.00 s on"):
    held.views(views, start=9)


def join(path: pathlib.Path, *parts: bytes) -> pathlib.Path:
  path.write_bytes(b"".join(parts))
  return path


def test_a_picture_whose_times_go_back_is_encoded_anew(tmp_path):
  parts = [broadcast(tmp_path / f"{grey}.ts", grey, n) for grey, n in ((60, 25), (200, 50))]
  film = join(tmp_path / "joined.ts", *parts)
  seconds = io.probe(film).duration_s
  sound = np.random.default_rng(0).uniform(-0.1, 0.1, (2, round(seconds * 16_000))).astype("f4")
  io.remux(film, sound, 16_000, tmp_path / "out.mp4")
  assert io.probe(tmp_path / "out.mp4").duration_s == pytest.approx(seconds, abs=1 / 25)
  assert np.abs(io.read_audio(tmp_path / "out.mp4") - sound).max() < 2**-22
  # What is shown is what the encoders saw.
  seen, kept = (io.read_video(path, 25, (8, 8)) for path in (film, tmp_path / "out.mp4"))
  assert np.abs(seen.astype(int) - kept).max() < 8 and len({*seen.mean((1, 2, 3)).round()}) == 2
  assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
  "first, then", [(("stereo", 16_000), ("5.1", 16_000)), (("mono", 16_000), ("stereo", 32_000))]
)
def test_sound_keeps_the_channels_and_the_rate_of_its_head(tmp_path, first, then):
  parts = [tone(tmp_path / f"{i}.aac", *kind) for i, kind in enumerate((first, then))]
  audio_ep = io.read_audio(join(tmp_path / "joined.aac", *parts))
  channels, rate = CHANNELS[first[0]], first[1]
  assert audio_ep.shape[0] == channels and abs(audio_ep.shape[1] - 2.1 * rate) < 0.15 * rate
  for start in (0.2, 1.3):  # The pitch tells whether time runs on as before.
    part_p = audio_ep[0, round(start * rate) : round((start + 0.6) * rate)]
    spectrum = np.abs(np.fft.rfft(part_p * np.hanning(len(part_p))))
    assert abs(np.argmax(spectrum) / 0.6 - 500) < 4 and spectrum.max() > 100


def test_an_estimate_of_the_length_cuts_nothing_off(tmp_path):
  tone(tmp_path / "x.aac", "mono", 16_000, seconds=4.0, silent=3.0)  # Its bit rate falls.
  assert io.probe(tmp_path / "x.aac").duration_s < 3.5  # What libav guesses from the rate.
  assert abs(io.read_audio(tmp_path / "x.aac").shape[1] - 4.1 * 16_000) < 0.1 * 16_000
