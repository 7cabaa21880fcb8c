"""What a build depends on: after a change of it, a build that goes on is as a first one."""

import pathlib
import shutil

import numpy as np
import pytest

from launch import data as command
from spatialv2a_jax.spatial import hrtf
from tests.data import clips
from tests.data.clips import RATE, noise
from tests.launch.test_vggsound import digests, records


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
  """One channel, trimmed; true stereo that ends in silence; and a clip that is too short."""
  folder = tmp_path_factory.mktemp("videos")
  clips.write(folder / "mono.mp4", 1.16, noise(1.16)[None], column=0.2)
  stereo_ep = np.stack([noise(1.2, 1), noise(1.2, 2)])
  stereo_ep[:, round(0.9 * RATE) :] = 0
  clips.write(folder / "stereo.mp4", 1.2, stereo_ep, seed=1)
  clips.write(folder / "short.mp4", 1.0, seed=2, column=0.8)
  (folder / "track.csv").write_text("time_s,azimuth_deg\n0,-30\n")
  write_tags(folder, 0.1)
  return folder


def write_tags(folder: pathlib.Path, speech: float) -> None:
  (folder / "tags.csv").write_text(f"id,speech\nmono,{speech}\n")


def built(videos: pathlib.Path, out: pathlib.Path, *more: str) -> pathlib.Path:
  given = ["--videos", videos, "--out", out, "--seconds", 1.2, "--jobs", 1, "--clips-per-shard", 8]
  given += ["--tags", videos / "tags.csv", "--most-tag", "speech=0.5", *more]
  assert command.main(["vggsound", *map(str, given)]) == 0
  return out


@pytest.fixture(scope="module")
def out(videos, tmp_path_factory) -> pathlib.Path:
  return built(videos, tmp_path_factory.mktemp("build") / "out")


def test_records_say_what_the_file_held_and_what_became_of_it(out):
  found = records(out)
  mono, stereo = found["mono"], found["stereo"]
  assert (mono["source_channels"], stereo["source_channels"]) == (1, 2)
  assert np.isnan(mono["correlation"]) and abs(stereo["correlation"]) < 0.05
  assert (mono["silence"], stereo["silence"]) == (0, pytest.approx(0.25))
  assert (mono["spatializer"], mono["hrtf"]) == ("sphere", hrtf.sphere(RATE).hash)
  assert (stereo["spatializer"], stereo["hrtf"]) == ("recorded", "")
  level_ep = np.abs(mono["audio"].astype(int)).reshape(2, 60, -1).max(2)  # Of every 20 ms.
  assert level_ep[:, :58].min() > 1000 and level_ep[:, 59].max() < 20


@pytest.mark.parametrize(
  "change",
  [
    ("--localizer", "track:{0}/track.csv"),
    ("--spatializer", "paper"),
    ("--stereo", "render"),
    ("--audio", "44k"),
    ("--seconds", "1.1"),
    ("--tolerance", "0.4"),
  ],
)
def test_other_settings(videos, out, tmp_path, change):
  more = [word.format(videos) for word in change]
  changed = built(videos, shutil.copytree(out, tmp_path / "copy"), *more)
  fresh = built(videos, tmp_path / "fresh", *more)
  assert digests(out) != digests(changed) == digests(fresh)


@pytest.mark.parametrize("change", ["video", "tag"])
def test_other_files(videos, tmp_path, change):
  folder = shutil.copytree(videos, tmp_path / "videos")
  first = digests(built(folder, tmp_path / "out"))
  if change == "video":
    clips.write(folder / "mono.mp4", 1.16, noise(1.16)[None], column=0.8)
  else:
    write_tags(folder, 0.9)
  assert first != digests(built(folder, tmp_path / "out"))
  assert digests(tmp_path / "out") == digests(built(folder, tmp_path / "fresh"))


@pytest.mark.parametrize(
  ("more", "why"),
  [
    (["--jobs", "0"], "--jobs 0: give 1 or more"),
    (["--clips-per-shard", "0"], "--clips-per-shard 0: give 1 or more"),
    (["--seconds", "0.9"], "--seconds 0.9"),
    (["--seconds", "1", "--tolerance", "1"], "--tolerance 1"),
    (["--max-failures", "5"], "--max-failures 5: give a share"),
    (["--max-failures", "nan"], "--max-failures nan: give a share"),
    (["--least-quality", "PQ=1"], "--least-quality needs"),
    (["--most-tag", "speech=1"], "--most-tag needs --tags"),
    (["--quality-scores", "{0}/tags.csv"], "no column of CE, CU, PC, PQ"),
    (["--mirror"], "need --features"),
    (["--storage", "mxint8"], "need --features"),
    (["--vae", "vae"], "need --features"),
  ],
)
def test_options_that_cannot_be_meant(videos, tmp_path, capsys, more, why):
  given = ["vggsound", "--videos", videos, "--out", tmp_path / "out", *more]
  assert command.main([str(word).format(videos) for word in given]) == 2
  assert why in capsys.readouterr().err and not (tmp_path / "out").exists()
