"""Media files: sampling by time, orientation, lossless stereo, one-line errors, atomic outputs."""

import math
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.io.video import Picture, fit

NTSC = Fraction(30000, 1001)
FILM = Fraction(24000, 1001)


def numbered(count, height=32, width=64):
  """Frames that say their index: its two base-16 digits are the grey levels of the two halves."""
  for index in range(count):
    frame = np.empty((height, width, 3), np.uint8)
    frame[:, : width // 2] = 24 + 13 * (index // 16)
    frame[:, width // 2 :] = 24 + 13 * (index % 16)
    yield frame


def number(frames):
  width = frames.shape[2]
  level = lambda part: np.rint((part.mean((1, 2, 3)) - 24) / 13).astype(int)  # noqa: E731
  return 16 * level(frames[:, :, 4 : width // 2 - 4]) + level(frames[:, :, width // 2 + 4 : -4])


def noise(seconds, rate=16000, seed=0):
  return np.random.default_rng(seed).uniform(-0.9, 0.9, (2, int(seconds * rate))).astype("f")


def packets(path):
  with av.open(str(path)) as container:
    return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """One clip of about 8 s per frame rate."""
  folder = tmp_path_factory.mktemp("clips")
  rates = {"film": FILM, "cinema": Fraction(24), "pal": Fraction(25), "ntsc": NTSC, "fast": 50}
  paths = {}
  for name, fps in rates.items():
    paths[name] = folder / f"{name}.mp4"
    io.write_video(paths[name], numbered(min(256, math.ceil(8 * fps))), fps, noise(8), 16000)
  return rates, paths


@pytest.mark.parametrize("name", ["film", "cinema", "pal", "ntsc"])
def test_eight_seconds_are_200_frames_at_25_and_64_at_8_whatever_the_rate(clips, name):
  rates, paths = clips
  fps = Fraction(rates[name])
  total = math.ceil(8 * fps)
  views = {"sync": io.View(25, (32, 64)), "clip": io.View(8, (32, 64))}
  got = io.read_views(paths[name], views, duration=8)
  for view, rate in (("sync", 25), ("clip", 8)):
    assert len(got[view]) == 8 * rate
    expected = [min(math.ceil(Fraction(k, rate) * fps), total - 1) for k in range(8 * rate)]
    np.testing.assert_array_equal(number(got[view]), expected)


def test_start_and_seek_agree_with_reading_everything(clips):
  _, paths = clips
  whole = io.read_video(paths["ntsc"], 8, (32, 64))
  for start in (0.5, 6):  # The second one is far enough for a seek.
    part = io.read_video(paths["ntsc"], 8, (32, 64), start=start, duration=1)
    np.testing.assert_array_equal(part, whole[int(start * 8) :][:8])


def test_windows_tile_the_whole_video_and_share_the_overlap(clips):
  _, paths = clips
  views = {"a": io.View(8, (16, 16)), "b": io.View(25, (8, 16))}
  whole = io.read_views(paths["pal"], views)
  windows = list(io.iter_views(paths["pal"], views, window_s=3, overlap_s=1))
  assert [window.start_s for window in windows] == [0, 2, 4, 6][: len(windows)]
  assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
  for name, fps in (("a", 8), ("b", 25)):
    for window in windows:
      lo = int(window.start_s * fps)
      np.testing.assert_array_equal(window.frames[name], whole[name][lo : lo + 3 * fps])
    assert len(windows[-1].frames[name]) > fps


def test_long_videos_need_no_more_memory_than_a_window(clips):
  _, paths = clips
  views = {"a": io.View(25, (128, 128))}
  tracemalloc.start()
  for _ in io.iter_views(paths["pal"], views, window_s=1):
    pass
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 4 * 25 * 128 * 128 * 3  # The whole video is eight windows.


def test_uneven_timestamps_pick_the_first_frame_at_or_after_each_target(tmp_path):
  times = [Fraction(t, 100) for t in (0, 4, 9, 30, 31, 52, 70, 90)]
  with av.open(str(tmp_path / "vfr.mp4"), "w") as output:
    stream = output.add_stream("libx264", rate=100, options={"crf": "12"})
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
    stream.codec_context.time_base = Fraction(1, 100)
    for time, pixels in zip(times, numbered(len(times)), strict=True):
      frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
      frame.pts, frame.time_base = int(time * 100), Fraction(1, 100)
      output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
  got = number(io.read_video(tmp_path / "vfr.mp4", 10, (32, 64), duration=0.9))
  expected = [next(i for i, t in enumerate(times) if t >= Fraction(k, 10)) for k in range(9)]
  np.testing.assert_array_equal(got, expected)


def test_frames_stored_out_of_order_are_shown_in_order(tmp_path):
  order = [0, 2, 1, 4, 3, 6, 5, 7]
  pictures = list(numbered(8))
  with av.open(str(tmp_path / "x.mkv"), "w") as output:
    stream = output.add_stream("mjpeg", rate=10, options={"qscale": "2"})
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
    for place, index in enumerate(order):
      frame = av.VideoFrame.from_ndarray(pictures[index], format="rgb24")
      for packet in stream.encode(frame):
        packet.time_base, packet.dts, packet.pts = Fraction(1, 10), place - 1, index
        output.mux(packet)
  np.testing.assert_array_equal(number(io.read_video(tmp_path / "x.mkv", 10)), range(8))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [False, True])
def test_orientation_decides_what_is_left(tmp_path, degrees, mirror):
  stored = np.zeros((64, 96, 3), np.uint8)
  stored[:32, :48], stored[:32, 48:], stored[32:, :48] = (230, 20, 20), (20, 230, 20), (20, 20, 230)
  path = tmp_path / "turned.mp4"
  with av.open(str(path), "w") as output:
    stream = output.add_stream("libx264", rate=25)
    stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
    stream.set_display_rotation(degrees, hflip=mirror)
    for _ in range(3):
      output.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
    output.mux(stream.encode(None))
  shown = np.rot90(stored, degrees // 90)
  shown = shown[:, ::-1] if mirror else shown
  got = io.read_video(path, 25)
  info = io.probe(path)
  assert got.shape[1:] == shown.shape == (info.height, info.width, 3)
  assert np.abs(got[0].astype(int) - shown).mean() < 12
  half = (shown.shape[0] // 2, shown.shape[1] // 2)
  quick = io.read_views(path, {"view": io.View(25, half, quick=True)})["view"]
  assert np.abs(quick.astype(int) - io.read_video(path, 25, half)).mean() < 4
  io.remux(path, noise(1), 16000, tmp_path / "out.mp4")
  np.testing.assert_array_equal(io.read_video(tmp_path / "out.mp4", 25), got)


def test_one_converter_for_a_stream_changes_no_pixel(tmp_path):
  """Each frame is as a converter of its own makes it, in its first size and its second."""
  rng, paths = np.random.default_rng(0), (tmp_path / "a.mp4", tmp_path / "b.mp4")
  for path, size in zip(paths, ((50, 70, 3), (64, 96, 3)), strict=True):
    io.write_video(path, rng.integers(0, 256, (3, *size), np.uint8), 25)
  whole, small = Picture(threads=1), Picture((24, 40), threads=1)
  for path in paths:
    with av.open(str(path)) as container:
      decoded = list(container.decode(video=0))
    alone = [frame.to_ndarray(format="rgb24") for frame in decoded]
    np.testing.assert_array_equal([whole(frame) for frame in decoded], alone)
    np.testing.assert_array_equal(io.read_video(path, 25), alone)
    shrunk = [Picture((24, 40))(frame) for frame in decoded]
    np.testing.assert_array_equal([small(frame) for frame in decoded], shrunk)
    quick = io.read_views(path, {"view": io.View(25, (24, 40), quick=True)}, threads=1)["view"]
    np.testing.assert_array_equal(quick, shrunk)


def test_crop_and_squash_follow_the_encoders(tmp_path):
  ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[None, :, None], (64, 128, 3))
  io.write_video(tmp_path / "ramp.mp4", [ramp] * 2, 25)
  cropped = io.read_video(tmp_path / "ramp.mp4", 25, short_side=32, crop=32)[0]
  squashed = io.read_video(tmp_path / "ramp.mp4", 25, size=(32, 32))[0]
  assert cropped.shape == squashed.shape == (32, 32, 3)
  assert abs(cropped[:, 0].mean() - 32) < 3 and abs(cropped[:, -1].mean() - 95) < 3
  assert squashed[:, 0].mean() < 5 and squashed[:, -1].mean() > 122


@pytest.mark.parametrize("crop", [None, 30])
def test_a_picture_on_its_side_is_resized_as_one_that_lies(crop):
  lying = np.random.default_rng(0).integers(90, 160, (60, 101, 3), np.uint8)
  view = io.View(25, short_side=40, crop=crop)
  flat, upright = fit(lying, view), fit(lying.swapaxes(0, 1), view)
  assert flat.shape == ((30, 30, 3) if crop else (40, 67, 3))
  assert np.abs(upright.swapaxes(0, 1).astype(int) - flat).max() <= 2  # Rows or columns first.


def test_odd_sides_lose_their_last_row_and_column(tmp_path):
  ramp = np.add.outer(np.arange(33), 2 * np.arange(65)).astype(np.uint8)
  io.write_video(tmp_path / "x.mp4", [np.repeat(ramp[..., None], 3, axis=2)] * 2, 25)
  got = io.read_video(tmp_path / "x.mp4", 25)[0]
  assert got.shape == (32, 64, 3)
  assert np.abs(got.mean(axis=2) - ramp[:32, :64]).mean() < 3


@pytest.mark.parametrize("codec", ["flac", "alac"])
def test_remux_keeps_every_packet_and_every_sample_of_both_ears(clips, tmp_path, codec):
  _, paths = clips
  sound = noise(9, seed=1)
  out = tmp_path / "out.mp4"
  io.remux(paths["film"], sound, 16000, out, codec=codec)
  assert packets(out) == packets(paths["film"])
  back = io.read_audio(out)
  before, after = io.probe(paths["film"]), io.probe(out)
  assert abs(after.duration_s - before.duration_s) < 1 / float(FILM)
  assert abs(back.shape[1] / 16000 - before.duration_s) < 1 / float(FILM)
  assert np.abs(back - sound[:, : back.shape[1]]).max() < 2**-22
  with av.open(str(out)) as container:
    assert [stream.type for stream in container.streams] == ["video", "audio"]
    assert container.streams.audio[0].codec_context.layout.name == "stereo"
    assert [stream.start_time for stream in container.streams] == [0, 0]
  head = out.read_bytes()
  assert head.index(b"moov") < head.index(b"mdat")


def test_remux_can_stop_early(clips, tmp_path):
  _, paths = clips
  io.remux(paths["pal"], noise(8), 16000, tmp_path / "out.mp4", duration=2)
  assert 2 <= io.probe(tmp_path / "out.mp4").duration_s < 2.3


def test_remux_encodes_anew_what_mp4_cannot_hold(tmp_path):
  with av.open(str(tmp_path / "old.avi"), "w") as output:
    stream = output.add_stream("mjpeg", rate=25, options={"qscale": "2"})
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
    for pixels in numbered(20):
      output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    output.mux(stream.encode(None))
  sound = noise(0.8)
  io.remux(tmp_path / "old.avi", sound, 16000, tmp_path / "new.mp4")
  np.testing.assert_array_equal(number(io.read_video(tmp_path / "new.mp4", 25)), range(20))
  assert np.abs(io.read_audio(tmp_path / "new.mp4") - sound).max() < 2**-22
  io.remux(tmp_path / "old.avi", sound, 16000, tmp_path / "cut.mp4", duration=0.4)
  np.testing.assert_array_equal(number(io.read_video(tmp_path / "cut.mp4", 25)), range(10))
  assert io.read_audio(tmp_path / "cut.mp4").shape == (2, 6400)


@pytest.mark.parametrize(
  "codec, suffix, tag",
  [
    ("libx265", ".mp4", "hvc1"), ("libx265", ".mp4", "hev1"), ("libx265", ".mkv", "hvc1"),
    ("libx265", ".ts", "hvc1"), ("libvpx-vp9", ".webm", "vp09"), ("libsvtav1", ".mp4", "av01"),
  ],
)  # fmt: skip
def test_remux_keeps_the_picture_that_phones_and_sites_give(tmp_path, codec, suffix, tag):
  if codec not in av.codecs_available:
    pytest.skip(f"PyAV has no {codec}")
  path = tmp_path / f"x{suffix}"
  with av.open(str(path), "w") as output:
    stream = output.add_stream(codec, rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    if suffix == ".mp4":
      stream.codec_context.codec_tag = tag
    for pixels in numbered(8, 64, 64):
      output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    output.mux(stream.encode(None))
  io.remux(path, noise(0.32), 16000, tmp_path / "out.mp4")
  if suffix != ".ts":  # Which frames its packets in another way.
    assert packets(tmp_path / "out.mp4") == packets(path)
  np.testing.assert_array_equal(*(io.read_video(x, 25) for x in (path, tmp_path / "out.mp4")))
  with av.open(str(tmp_path / "out.mp4")) as container:
    assert container.streams.video[0].codec_context.codec_tag == tag


def test_sound_of_a_video_is_cut_to_its_stream_and_starts_with_the_picture(tmp_path):
  sound = noise(1.03)
  io.write_video(tmp_path / "x.mp4", numbered(25), 25, sound, 16000)
  assert io.read_audio(tmp_path / "x.mp4").shape == (2, 16000)
  io.write_video(tmp_path / "aac.mp4", numbered(25), 25, sound, 16000, codec="aac")
  assert io.read_audio(tmp_path / "aac.mp4").shape == (2, 48000)  # Decoded blocks end later.
  part = io.read_audio(tmp_path / "x.mp4", start=0.25, duration=0.5)
  np.testing.assert_allclose(part, sound[:, 4000:12000], atol=2**-22)


def test_equal_frames_give_equal_bytes(tmp_path):
  hashes = set()
  for _ in range(12):  # Several times: unset memory in an encoder shows only now and then.
    io.write_video(tmp_path / "x.mp4", numbered(24), 25, noise(1), 16000)
    hashes.add(io.file_hash(tmp_path / "x.mp4"))
  assert len(hashes) == 1


def test_damaged_input_is_one_line_that_names_the_file(clips, tmp_path):
  _, paths = clips
  good = paths["pal"].read_bytes()
  cut = tmp_path / "cut.mp4"
  cut.write_bytes(good[: len(good) * 2 // 3])  # The index is in front, so the file still opens.
  with av.open(str(tmp_path / "whole.mkv"), "w") as output:
    stream = output.add_stream("mjpeg", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
    for pixels in numbered(75):
      output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    output.mux(stream.encode(None))
  early = tmp_path / "early.mkv"
  early.write_bytes((tmp_path / "whole.mkv").read_bytes()[:20_000])
  (tmp_path / "empty.mp4").touch()
  (tmp_path / "text.mp4").write_text("not a video " * 99)
  io.write_video(tmp_path / "mute.mp4", numbered(5), 25)
  io.write_audio(tmp_path / "sound.wav", noise(0.1), 16000)
  io.write_audio(tmp_path / "none.wav", np.zeros((2, 0)), 16000)
  (tmp_path / "folder").mkdir()
  cases = [
    (io.read_video, cut, "could be decoded"),
    (io.read_video, early, "stops early"),
    (io.read_video, tmp_path / "empty.mp4", "empty"),
    (io.read_video, tmp_path / "text.mp4", "not a media file"),
    (io.read_video, tmp_path / "absent.mp4", "no such file"),
    (io.read_video, tmp_path / "sound.wav", "no video stream"),
    (io.read_video, tmp_path / "folder", "folder"),
    (io.read_audio, tmp_path / "mute.mp4", "no audio stream"),
    (io.read_audio, tmp_path / "none.wav", "zero samples"),
    (io.read_audio, tmp_path / "text.mp4", "not a media file"),
    (io.probe, tmp_path / "text.mp4", "not a media file"),
    (io.list_media, tmp_path / "folder", "no media"),
    (io.file_hash, tmp_path / "absent.mp4", "cannot read"),
  ]
  for call, path, words in cases:
    with pytest.raises(UserError, match=words) as caught:
      call(path, *([8] if call is io.read_video else []))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
  with pytest.raises(UserError, match="lasts 0.20 s"):
    io.read_video(tmp_path / "mute.mp4", 8, start=3)
