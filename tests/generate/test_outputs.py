"""Outputs on disk: what is left alone, what is made again, and faults of single files."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from spatialv2a_jax import generate, generator, io
from spatialv2a_jax.errors import DamagedAssetError, MissingAssetError, UserError
from spatialv2a_jax.generator import Window
from tests import tiny
from tests.generate.test_generate import about, names, sound


def test_what_is_done_is_left_alone_until_a_setting_changes(films, make, monkeypatch, tmp_path):
  calls = []
  run = generator.Generator.sample
  monkeypatch.setattr(generator.Generator, "sample", lambda *a: calls.append(1) or run(*a))
  path, track = films / "left.mp4", tmp_path / "track.csv"
  track.write_text("time_s,azimuth_deg\n0,30\n")

  def ran(**changes):
    calls.clear()
    make(path, **changes)
    return bool(calls)

  assert ran() and not ran()
  assert not ran(low_memory=True)  # It does not change the sound.
  assert ran(seed=1) and not ran(seed=1)
  by_track = {"localizer": f"track:{track}"}
  assert ran(**by_track) and not ran(**by_track)
  track.write_text("time_s,azimuth_deg\n0,-30\n")
  assert ran(**by_track)
  (tmp_path / "out" / "left.mp4").unlink()
  assert ran(**by_track)
  assert ran(format="flac", video=False)
  assert names(tmp_path / "out") == ["left.flac", "left.json"]  # No older sound beside the new.


def test_files_done_before_do_not_keep_others_from_being_written(films, make):
  make(films / "right.mp4")
  out = make(films)  # The last one is done already.
  assert (out / "left.wav").is_file() and (out / "left.json").is_file()


def test_a_faulty_file_does_not_stop_the_others(films, make, tmp_path, capsys):
  cut = tmp_path / "cut.mp4"
  cut.write_bytes((films / "left.mp4").read_bytes()[:2000])
  tone = tmp_path / "tone.wav"
  io.write_audio(tone, np.ones((2, 100), np.float32), 16_000)
  out = make(films / "left.mp4", cut, tone, "absent.mp4", films / "right.mp4", code=4)
  captured = capsys.readouterr()
  assert "2 of 5 files are in" in captured.out
  failures = [line for line in captured.err.splitlines() if line.startswith("failed: ")]
  assert [line.split(": ")[1] for line in failures] == [str(cut), str(tone), "absent.mp4"]
  assert "no video stream" in failures[1] and "no such file" in failures[2]
  assert {name.split(".")[0] for name in names(out)} == {"left", "right"}


def test_an_output_that_cannot_be_written_is_the_fault_of_its_file(films, make, tmp_path, capsys):
  (tmp_path / "out" / "left.wav").mkdir(parents=True)
  out = make(films, code=4)
  assert "left.wav" in capsys.readouterr().err
  assert (out / "right.json").is_file() and not (out / "left.json").exists()


@pytest.mark.parametrize("kind", [MissingAssetError, DamagedAssetError])
def test_a_fault_of_the_weights_ends_the_run(films, make, model, monkeypatch, tmp_path, kind):
  """However many films there are: it is the fault of none."""

  def torn(*_):
    raise kind("vae.safetensors")

  monkeypatch.setattr(model, "look", torn)
  with pytest.raises(kind):
    make(films)
  assert not names(tmp_path / "out")


def test_films_of_one_window_and_of_several_get_latents_of_their_own(monkeypatch):
  monkeypatch.setattr(generate, "clip_key", lambda seed, sha256: (seed, sha256))
  jobs = [
    generate.Job(pathlib.Path(), 1.0, str(i), [Window(i, {})] * count, 0.0)
    for i, count in enumerate((1, 3, 1, 2, 1))
  ]
  batches, told = [], []

  def sample(windows, keys, settings, rows):
    batches.append((len(windows), rows))
    return [(window.first, key) for window, key in zip(windows, keys, strict=True)]

  def latents(windows, key, settings, advance):
    for _ in range(4):
      advance(0.25)
    return windows[0].first, key

  model = types.SimpleNamespace(sample=sample, latents=latents)
  progress = types.SimpleNamespace(advance=told.append)
  found = generate.sample_all(model, jobs, dataclasses.replace(tiny.BASE, seed=7), 2, progress)
  assert found == [(i, (7, str(i))) for i in range(5)]
  assert batches == [(2, 2), (1, 2)] and sum(told) == 8


def test_sound_that_is_not_finite_is_refused(films, make, monkeypatch):
  broken = lambda *_: np.full((1, 2, 40, 20), np.nan, np.float32)  # noqa: E731
  monkeypatch.setattr(generator.Generator, "sample", broken)
  with pytest.raises(UserError, match="lower --guidance"):
    make(films / "left.mp4")


@pytest.mark.parametrize("inside", [True, False])
def test_outputs_never_replace_inputs(films, make, tmp_path, inside):
  shutil.copytree(films, tmp_path / "out")
  before = {name: io.file_hash(tmp_path / "out" / name) for name in names(films)}
  with pytest.raises(UserError, match="choose another --out"):
    make(tmp_path / "out" if inside else tmp_path / "out" / ".." / "out" / "left.mp4")
  assert {name: io.file_hash(tmp_path / "out" / name) for name in names(films)} == before


def test_two_files_of_one_name_are_refused(films, make, tmp_path):
  shutil.copy(films / "left.mp4", tmp_path / "left.mov")
  with pytest.raises(UserError, match="share outputs named left"):
    make(films, tmp_path / "left.mov")


def test_an_interrupted_run_is_not_taken_for_finished(films, make, monkeypatch, tmp_path):
  def interrupted(*_, **__):
    raise KeyboardInterrupt

  out = make(films / "left.mp4")
  with monkeypatch.context() as patch:
    patch.setattr(generate.io, "remux", interrupted)
    with pytest.raises(KeyboardInterrupt):
      make(films / "left.mp4", seed=1)
  assert names(out) == ["left.json", "left.wav"]
  assert about(out)["seed"] == 1 and not about(out)["outputs"]  # No other sound is described.
  make(films / "left.mp4", seed=1)
  fresh = make(films / "left.mp4", out="fresh", seed=1)
  for name in ("left.wav", "left.mp4"):
    assert (out / name).read_bytes() == (fresh / name).read_bytes()


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files_only(model_folder, tmp_path):
  media, out = tmp_path / "media", tmp_path / "out"
  for i in range(24):
    tiny.film(media / f"clip{i:02d}.mp4", seed=i, sound=True)
  command = [
    sys.executable, "-m", "spatialv2a_jax.cli", "generate", media, "--low-memory",
    "--steps", "2", "--checkpoint", model_folder, "--out", out,
  ]  # fmt: skip
  root = pathlib.Path(__file__).parents[2]
  process = subprocess.Popen(list(map(str, command)), cwd=root, stderr=subprocess.DEVNULL)
  while process.poll() is None and len(list(out.glob("*.json"))) < 3:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  whole = [path for path in out.iterdir() if not path.name.startswith(".")]
  assert 3 <= len(list(out.glob("*.json"))) < 24
  for path in whole:
    if path.suffix == ".json":
      assert (made := json.loads(path.read_text()))["input"] == f"{path.stem}.mp4"
      if not made["outputs"]:
        continue  # At work when it was killed.
      assert sound(out, path.stem).shape == sound(out, path.stem, "mp4").shape == (2, 20_480)
  assert subprocess.run(list(map(str, command)), cwd=root, capture_output=True).returncode == 0
  assert len(list(out.glob("*.json"))) == len(list(out.glob("*.wav"))) == 24


def test_what_was_changed_or_cut_short_is_made_again(films, make):
  out = make(films / "left.mp4")
  whole = (out / "left.wav").read_bytes()
  for other in (b"", whole[:-4], bytes(reversed(whole))):
    (out / "left.wav").write_bytes(other)
    make(films / "left.mp4")
    assert (out / "left.wav").read_bytes() == whole


@pytest.mark.parametrize("name", ["left.wav", "left.mp4", "left.json"])
def test_files_that_were_not_made_of_this_video_are_not_replaced(films, make, tmp_path, name):
  out = tmp_path / "out"
  out.mkdir()
  (out / name).write_bytes(b"mine")
  with pytest.raises(UserError, match=f"holds {name}, which was not made of left.mp4"):
    make(films / "left.mp4")
  assert names(out) == [name] and (out / name).read_bytes() == b"mine"


def test_another_film_of_the_same_name_is_refused(films, make, tmp_path):
  out = make(films / "left.mp4")
  before = (out / "left.wav").read_bytes()
  other = tmp_path / "left.mkv"
  other.write_bytes((films / "right.mp4").read_bytes())
  with pytest.raises(UserError, match="which was not made of left.mkv"):
    make(other)
  assert (out / "left.wav").read_bytes() == before
