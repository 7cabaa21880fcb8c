"""Joined recordings, whose times go back and whose channels change; AAC; frames in memory."""

import errno
import os
import pathlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from spatialv2a_jax import io
from spatialv2a_jax.errors import UnreachableError, UserError
from spatialv2a_jax.io.video import timed_frames
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
  with pytest.raises(UserError, match="at a rate above 0"):
    io.Frames(held.pixels, 0)
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


def film(path, count=150, cut=0.0, hole=(0.0, 0.0), twice=(0.0, 0.0), sound_s=None):
  """Writes a film of key frames 2 s apart that turns white, and clicks, at 4 s.

  Args:
    path: its suffix says how.
    count: frames, 25 a second.
    cut: packets before that time are left out, as a copy without encoding does.
    hole: sound between these times is left out.
    twice: sound between these times comes twice, at the same times.
    sound_s: length of the sound.
  """
  whole = path.with_name(f"whole{path.suffix}")
  rate, seconds = 48_000, count / 25 if sound_s is None else sound_s
  sound_ep = np.zeros((2, round(seconds * rate)), np.float32)
  sound_ep[:, 4 * rate : 4 * rate + 400] = 0.8 * np.sin(0.3 * np.arange(400))
  options = {"preset": "ultrafast", "bf": "0", "sc_threshold": "0", "g": "50"}
  with av.open(str(whole), "w") as output:
    video = output.add_stream("libx264", rate=25, options=options)
    video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
    audio = output.add_stream("aac", rate=rate, layout="stereo")
    assert isinstance(audio, av.AudioStream)
    for i in range(max(count, round(25 * seconds))):
      if i < count:
        pixels = np.full((64, 64, 3), 20 + i // 4 if i < 100 else 255, np.uint8)
        output.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
      block = np.ascontiguousarray(sound_ep[:, i * rate // 25 : (i + 1) * rate // 25])
      if block.shape[1]:
        frame = av.AudioFrame.from_ndarray(block, "fltp", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, i * rate // 25, Fraction(1, rate)
        output.mux(audio.encode(frame))
    for stream in (video, audio):
      output.mux(stream.encode(None))
  with av.open(str(whole)) as source, av.open(str(path), "w") as output:
    streams = {x.index: output.add_stream_from_template(x) for x in source.streams}
    start = float(source.streams.video[0].start_time * source.streams.video[0].time_base)
    for packet in source.demux():
      if packet.dts is None:
        continue
      time = float(packet.pts * packet.time_base) - start
      lost = packet.stream.type == "audio" and hole[0] <= time < hole[1]
      if time >= cut and not lost:
        again = av.Packet(bytes(packet))
        again.pts, again.dts, again.time_base = packet.pts, packet.dts, packet.time_base
        again.stream = packet.stream = streams[packet.stream.index]
        output.mux(packet)
        if again.stream.type == "audio" and twice[0] <= time < twice[1]:
          output.mux(again)
  return path


def flash_and_click(path):
  """Returns the seconds at which the picture turns white and the sound clicks."""
  frames, audio_ep = io.read_video(path, 25, (8, 8)), io.read_audio(path, 16_000)
  flash = np.flatnonzero(frames.mean((1, 2, 3)) > 180)[0] / 25
  return flash, np.flatnonzero(np.abs(audio_ep).max(0) > 0.2)[0] / 16_000


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".mp4"])
def test_sound_and_picture_of_a_copy_that_lacks_its_first_whole_picture_line_up(tmp_path, suffix):
  flash, click = flash_and_click(film(tmp_path / f"x{suffix}", cut=1.0))
  assert flash == 2.0 and click == pytest.approx(flash, abs=2e-3)


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".mp4"])
def test_new_sound_lines_up_with_the_picture_of_such_a_copy(tmp_path, suffix):
  path = film(tmp_path / f"x{suffix}", cut=1.0)
  sound_ep = io.read_audio(path, 16_000)
  assert io.probe(path).duration_s == pytest.approx(4.0, abs=0.05)
  io.remux(path, sound_ep, 16_000, tmp_path / "y.mp4")
  assert flash_and_click(tmp_path / "y.mp4") == (2.0, pytest.approx(2.0, abs=2e-3))


def test_damage_after_a_seek_is_met_once(tmp_path):
  path = film(tmp_path / "x.mp4", count=500)
  with av.open(str(path)) as container:
    late = (x for x in container.demux(video=0) if x.pts * x.time_base >= 14)
    at, size = next((x.pos, x.size) for x in late)
  data = bytearray(path.read_bytes())
  data[at : at + 20 * size] = bytes(20 * size)
  path.write_bytes(data)
  times = []
  with av.open(str(path)) as container, pytest.raises(UserError, match="is damaged"):
    for time, _, _ in timed_frames(container, container.streams.video[0], path, Fraction(8)):
      times.append(time)
  assert 100 < len(times) == len(set(times)) and times == sorted(times)


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".mp4"])
def test_what_comes_after_a_hole_in_the_sound_is_in_its_place(tmp_path, suffix):
  flash, click = flash_and_click(film(tmp_path / f"x{suffix}", hole=(1.5, 2.5)))
  assert flash == 4.0 and click == pytest.approx(flash, abs=2e-3)


def test_sound_that_comes_twice_is_heard_once(tmp_path):
  flash, click = flash_and_click(film(tmp_path / "x.mkv", twice=(1.5, 2.5)))
  assert flash == 4.0 and click == pytest.approx(flash, abs=0.06)


@pytest.mark.parametrize("start", [4.6, 5.0, 5.8])
def test_a_stream_without_an_index_is_read_from_where_it_is_asked(tmp_path, start):
  path = film(tmp_path / "x.ts")
  whole = io.read_video(path, 25, (8, 8))
  part = io.read_video(path, 25, (8, 8), start=start, duration=0.12)
  first = round(25 * start)
  np.testing.assert_array_equal(part, whole[first : first + 3])


def test_a_stream_of_pictures_without_times_is_read_from_where_it_is_asked(tmp_path):
  with av.open(str(tmp_path / "x.h264"), "w") as output:
    stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "50"})
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for i in range(150):
      pixels = np.full((64, 64, 3), 20 + i, np.uint8)
      output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    output.mux(stream.encode(None))
  whole = io.read_video(tmp_path / "x.h264", 25, (8, 8))
  assert np.abs(whole.mean((1, 2, 3)) - 20 - np.arange(150)).max() < 2  # Each once.
  part = io.read_video(tmp_path / "x.h264", 25, (8, 8), start=5, duration=0.12)
  np.testing.assert_array_equal(part, whole[125:128])


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_a_film_is_as_long_as_its_picture_not_as_its_sound(tmp_path, suffix):
  path = film(tmp_path / f"x{suffix}", count=110, sound_s=9.0)
  assert io.probe(path).duration_s == pytest.approx(4.4, abs=0.05)


def test_a_disk_that_cannot_read_a_film_is_told_from_a_damaged_film(tmp_path, monkeypatch):
  """libav calls both an input/output error."""
  path = film(tmp_path / "x.mp4")
  path.write_bytes(path.read_bytes()[:2000])
  with pytest.raises(UserError) as damage:
    io.probe(path)
  assert not isinstance(damage.value, UnreachableError)

  def broken(name, *arguments, **options):
    if pathlib.Path(name) == path:
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return open(name, *arguments, **options)

  monkeypatch.setitem(io.files.__dict__, "open", broken)
  with pytest.raises(UnreachableError, match=f"cannot read {path}: Input/output error"):
    io.probe(path)
  with pytest.raises(UnreachableError, match="no such file"):
    io.probe(tmp_path / "gone.mp4")


def test_names_that_are_not_utf_8_and_sounds_too_long_for_wav(tmp_path):
  name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
  sound_ep = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 800)).astype(np.float32)
  for suffix in (".wav", ".flac"):
    io.write_audio(name + suffix, sound_ep, 16_000)
    np.testing.assert_allclose(io.read_audio(name + suffix), sound_ep, atol=2**-22)
  with pytest.raises(UserError, match="wav holds at most 4 GiB; use --format flac"):
    io.write_audio(tmp_path / "x.wav", np.broadcast_to(np.float32(0), (2, 2**29)), 16_000)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tiff"])
def test_a_photo_is_no_video(tmp_path, suffix):
  """It passed for one of 0.04 s, and got sound."""
  path = tmp_path / f"photo.{suffix}"
  Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(path)
  for read in (io.probe, io.read_audio):
    with pytest.raises(UserError, match="photo.* is a single picture; give a video"):
      read(path)
