"""Sound files, and how outputs come to be."""

import errno
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from tests.test_io import noise, numbered


@pytest.mark.parametrize("suffix,error", [(".wav", 0), (".flac", 2**-23)])
def test_sound_files_keep_left_first_and_their_level(tmp_path, suffix, error):
  sound = noise(0.5) * np.array([[0.9], [0.01]], np.float32)
  path = tmp_path / f"x{suffix}"
  io.write_audio(path, sound, 44100)
  again = path.read_bytes()
  io.write_audio(path, sound, 44100)
  assert path.read_bytes() == again
  assert np.abs(io.read_audio(path) - sound).max() <= error
  assert soundfile.info(path).samplerate == 44100
  np.testing.assert_allclose(io.read_audio(path, mono=True)[0], sound.mean(0), atol=2**-22)


def test_wav_keeps_what_flac_clips_and_says_so(tmp_path):
  loud = noise(0.1) * 3
  io.write_audio(tmp_path / "x.wav", loud, 16000)
  np.testing.assert_array_equal(io.read_audio(tmp_path / "x.wav"), loud)
  with pytest.warns(UserWarning, match="clipped"):
    io.write_audio(tmp_path / "x.flac", loud, 16000)
  assert np.abs(io.read_audio(tmp_path / "x.flac")).max() <= 1


def test_resampling_keeps_interaural_time(tmp_path):
  rate, lag = 44100, 20
  tone = np.random.default_rng(0).standard_normal(rate)
  tone = np.convolve(tone, np.hanning(32) / 16, "same").astype("f") * 0.2
  io.write_audio(tmp_path / "x.wav", np.stack([tone, np.roll(tone, lag)]), rate)
  left, right = io.read_audio(tmp_path / "x.wav", 16000)
  spectrum = np.fft.rfft(right) * np.conj(np.fft.rfft(left))
  k = np.arange(50, 1500)
  slope = np.polyfit(k, np.unwrap(np.angle(spectrum[k])), 1)[0]
  delay_s = -slope * len(left) / (2 * np.pi) / 16000
  assert abs(delay_s - lag / rate) < 2e-6
  assert left.shape == (16000,)


def test_libav_prints_nothing(tmp_path):
  (tmp_path / "bad.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 99)
  code = (
    "import sys\nfrom spatialv2a_jax import io\n"
    "try: io.probe(sys.argv[1])\nexcept Exception as e: print(type(e).__name__)\n"
    "print('jax' in sys.modules)"
  )
  got = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path / "bad.mp4")],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
  )
  assert got.stdout.split() == ["UserError", "False"] and got.stderr == ""


def test_outputs_appear_whole_or_not_at_all(tmp_path):
  target = tmp_path / "new" / "x.txt"
  with io.atomic_path(target) as temporary:
    assert temporary.suffix == ".txt" and temporary.parent == target.parent
    temporary.write_text("one")
    assert not target.exists()
  (target.parent / "plain").touch()
  assert target.stat().st_mode == (target.parent / "plain").stat().st_mode  # For others to read.
  (target.parent / "plain").unlink()
  with pytest.raises(RuntimeError), io.atomic_path(target) as temporary:
    temporary.write_text("two")
    raise RuntimeError
  assert target.read_text() == "one" and os.listdir(target.parent) == ["x.txt"]

  def failing():
    yield from numbered(3)
    raise RuntimeError("mid-way")

  with pytest.raises(RuntimeError, match="mid-way"):
    io.write_video(target.parent / "x.mp4", failing(), 25)
  assert os.listdir(target.parent) == ["x.txt"]
  for bad in (target / "x.wav", target.parent):  # A file is no folder, a folder is no file.
    with pytest.raises(UserError, match="cannot write"), io.atomic_path(bad):
      pass


@pytest.mark.parametrize("stem", ["x" * 250, "\u72d7" * 83, "\U0001f436" * 62])
def test_the_longest_names_that_a_disk_takes_can_be_written(tmp_path, stem):
  io.write_audio(tmp_path / f"{stem}.wav", noise(0.01), 16000)
  assert os.listdir(tmp_path) == [f"{stem}.wav"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
  path = tmp_path / "a.tfrecord-00000-of-00002"
  with io.atomic_path(path) as temporary:
    left = temporary
  neighbours = [path, left.with_suffix(".tfrecord-00001-of-00002"), tmp_path / ".b.01234567.json"]
  for file in (left, *neighbours):
    file.touch()
  io.remove_leftovers(path)
  assert sorted(tmp_path.iterdir()) == sorted(neighbours)
  io.remove_leftovers(tmp_path / "no" / "folder")


def test_what_may_not_be_read_is_one_line(tmp_path, monkeypatch):
  def refused(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")

  for method, call in (("iterdir", io.list_media), ("stat", io.probe)):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot read .*: Perm"):
      patch.setattr(pathlib.Path, method, refused)
      call(tmp_path)


def test_list_media_is_sorted_and_passes_over_other_files(tmp_path):
  for name in ("b.MP4", "a.mov", "notes.txt", ".hidden.mp4"):
    (tmp_path / name).touch()
  (tmp_path / "folder.mp4").mkdir()
  assert [path.name for path in io.list_media(tmp_path)] == ["a.mov", "b.MP4"]
