"""`python -m launch.data vggsound`, from files to shards."""

import concurrent.futures
import hashlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import soxr

from data import filters, layout, pipeline, shards, stages, tf_example, tfrecord
from launch import data as command
from launch import encode
from tests.data import clips
from tests.data.clips import RATE

CONFIGS = pathlib.Path(shards.__file__).parents[1] / "configs"
GOOD = ("left", "middle", "right")
TINY = f"{CONFIGS}/tiny.py:smoke"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
  """Three good clips and one of every way to be bad."""
  folder = tmp_path_factory.mktemp("videos")
  (folder / "deep" / "er").mkdir(parents=True)
  for n, (name, column) in enumerate(zip(GOOD, (0.2, 0.5, 0.8), strict=True)):
    clips.write(folder / "deep" / f"{name}.mp4", seed=n, column=column)
  clips.write(folder / "deep" / "er" / "short.mp4", 0.8)
  clips.write(folder / "silent.mp4", audio_ep=np.zeros((2, RATE), np.float32))
  clips.write(folder / "mute.mp4", sound=False)
  clips.write(folder / "speech.mp4")
  clips.write(folder / "poor.mp4")
  clips.write(folder / "unlisted.mp4")
  blob = clips.write(folder / "cut.mp4").read_bytes()
  (folder / "cut.mp4").write_bytes(blob[: len(blob) // 2])
  (folder / "empty.mp4").touch()
  names = (*GOOD, "short", "silent", "mute", "speech", "poor", "cut", "empty", "gone")
  lines = [f"{name},{name} label,{'test' if name == 'right' else 'train'}" for name in names]
  (folder / "labels.csv").write_text("id,label,split\n" + "\n".join(lines))
  (folder / "scores.csv").write_text("id,CE,CU,PC,PQ\npoor,4,4,4,3.5\nleft,4,5,3,6\n")
  (folder / "few.csv").write_text("id,CE\nleft,4\n")
  (folder / "tags.csv").write_text("id,speech\nspeech,0.9\nleft,0.1\n")
  return folder


def arguments(videos: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
  return [
    "vggsound", "--videos", str(videos), "--labels", str(videos / "labels.csv"), "--out", str(out),
    "--seconds", "1", "--clips-per-shard", "4", "--jobs", "1", "--quality-scores",
    str(videos / "scores.csv"), "--tags", str(videos / "tags.csv"), "--most-tag", "speech=0.5",
    *more,
  ]  # fmt: skip


def built(videos: pathlib.Path, out: pathlib.Path, *more: str) -> pathlib.Path:
  assert command.main(arguments(videos, out, *more)) == 0
  return out


@pytest.fixture(scope="module")
def out(videos, tmp_path_factory) -> pathlib.Path:
  return built(videos, tmp_path_factory.mktemp("build") / "10:30")


def records(out: pathlib.Path, split: str = "train") -> dict[str, dict[str, Any]]:
  fields = layout.read_features(out / "raw")
  source = tfrecord.TFRecordSource(shards.paths(out / "raw", split))
  decoded = (tf_example.decode(source[i]) for i in range(len(source)))
  rows = [{name: tf_example.value_of(raw[name], fields[name]) for name in raw} for raw in decoded]
  return {str(row["id"]): row for row in rows}


def digests(out: pathlib.Path) -> dict[str, str]:
  """The shards, by name."""
  files = (out / "raw").glob("*.tfrecord-?????-of-?????")
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_clip_has_one_fate(videos, out):
  funnel = json.loads((out / "funnel.json").read_text())
  assert {name: drop["reason"] for name, drop in funnel["clips"].items()} == {
    "short": "short", "silent": "silent", "mute": "no_sound", "speech": "tag", "poor": "quality",
    "cut": "unreadable", "empty": "unreadable", "unlisted": "unlisted",
  }  # fmt: skip
  assert set(funnel["dropped"]) == set(filters.REASONS)
  assert (funnel["listed"], funnel["missing"], funnel["files"], funnel["kept"]) == (11, 1, 11, 3)
  assert funnel["kept"] + sum(funnel["dropped"].values()) == funnel["files"]
  assert "empty.mp4" in funnel["clips"]["empty"]["detail"] and str(videos) not in json.dumps(funnel)
  table = (out / "funnel.txt").read_text().splitlines()
  assert table[0].split() == ["listed", "11"] and table[-2].split() == ["kept", "3"]
  assert table[-1].split()[:3] == ["sphere", "3", "100%"] and funnel["layout"] == {"dual_mono": 3}
  assert json.loads((out / "coverage.json").read_text())["missing"] == ["gone"]


def test_records_say_what_was_done(out):
  train = records(out)
  assert set(train) == {"left", "middle"} and set(records(out, "test")) == {"right"}
  left = train["left"]
  assert left["caption"] == left["label"] == "left label" and left["video"] == "deep/left.mp4"
  assert left["audio"].shape == (2, RATE) and left["audio"].dtype == np.int16
  assert left["layout"] == "dual_mono" and left["spatializer"] == "sphere"
  np.testing.assert_array_equal(left["aes"], [4, 5, 3, 6])
  assert np.isnan(train["middle"]["aes"]).all()
  right = records(out, "test")["right"]
  level = stages.CUES.index("ild_clip_db")
  assert left["cues"][level] > 4 and right["cues"][level] < -4
  assert left["azimuth"].mean() > 20 and right["azimuth"].mean() < -20


def test_cues_do_not_depend_on_the_rate():
  audio_ep = np.stack([clips.noise(1), 0.5 * np.roll(clips.noise(1), 5)])
  audio_ep = soxr.resample(soxr.resample(audio_ep.T, RATE, 8000), 8000, RATE).T
  faster_ep = soxr.resample(audio_ep.T, RATE, 44_100).T
  np.testing.assert_allclose(
    stages.cues(faster_ep, 44_100), stages.cues(audio_ep, RATE), rtol=0.02, atol=0.02
  )


def test_the_shards_can_be_trained_on(out):
  (batch,) = pipeline.loader(
    shards.paths(out / "raw"), batch_size=2, seed=0, epochs=1, kind="audio",
    shapes={"audio": (2, RATE)},
  )  # fmt: skip
  assert batch["audio_bep"].shape == (2, 2, RATE)


def test_a_second_run_changes_nothing_and_looks_at_no_file(videos, out, monkeypatch):
  before = {path: path.stat().st_mtime_ns for path in out.glob("raw/*.tfrecord-*")}
  monkeypatch.setattr(filters, "probe", lambda *_: pytest.fail("probed again"))
  built(videos, out)
  assert {path: path.stat().st_mtime_ns for path in out.glob("raw/*.tfrecord-*")} == before


def test_other_limits_need_no_second_look(videos, out, tmp_path, monkeypatch):
  """Measurements are kept, decisions are made again."""
  copy = tmp_path / "copy"
  shutil.copytree(out, copy)
  monkeypatch.setattr(filters, "probe", lambda *_: pytest.fail("probed again"))
  monkeypatch.setattr(filters, "measure", lambda *_: pytest.fail("measured again"))
  built(videos, copy, "--least-quality", "PQ=1")
  assert json.loads((copy / "funnel.json").read_text())["dropped"]["quality"] == 0
  assert "poor" in records(copy)


def test_other_labels_need_no_second_look(videos, out, tmp_path, monkeypatch):
  copy, folder = tmp_path / "copy", tmp_path / "lists"
  shutil.copytree(out, copy)
  folder.mkdir()
  text = (videos / "labels.csv").read_text().replace("left label", "a bell").replace("poor,", "x,")
  (folder / "labels.csv").write_text(text)
  monkeypatch.setattr(filters, "probe", lambda *_: pytest.fail("probed again"))
  built(videos, copy, "--labels", str(folder / "labels.csv"))
  assert records(copy)["left"]["caption"] == "a bell"
  funnel = json.loads((copy / "funnel.json").read_text())
  assert funnel["clips"]["poor"]["reason"] == "unlisted" and funnel["missing"] == 2


def test_nothing_left_is_an_error_after_the_report(tmp_path, capsys):
  clips.write(tmp_path / "mute.mp4", sound=False)
  given = ["vggsound", "--videos", str(tmp_path), "--out", str(tmp_path / "out"), "--seconds", "1"]
  assert command.main([*given, "--jobs", "1"]) == 2
  said = capsys.readouterr()
  assert "mute: no_sound" in said.out and "not one clip could be used" in said.err


def test_an_interrupted_new_cut_leaves_both_the_old_build_and_what_is_done(
  videos, out, tmp_path, monkeypatch
):
  copy, probe, probed = tmp_path / "copy", filters.probe, []
  shutil.copytree(out, copy)

  def interrupted(path, limits):
    probed.append(path)
    if len(probed) > 6:
      raise KeyboardInterrupt
    return probe(path, limits)

  with monkeypatch.context() as patched:
    patched.setattr(filters, "probe", interrupted)
    assert command.main(arguments(videos, copy, "--clips-per-shard", "2")) == 130
  assert digests(out).items() <= digests(copy).items() and set(records(copy)) == {"left", "middle"}
  new = digests(copy).keys() - digests(out).keys()
  assert len(new) >= 2
  funnel = json.loads((copy / "funnel.json").read_text())
  assert 0 < funnel["waiting"] < funnel["files"] and funnel["kept"] < 3
  fates = funnel["kept"] + sum(funnel["dropped"].values()) + funnel["waiting"]
  assert fates == funnel["files"]  # Shards of the old cut are not counted.
  kept = {name: (copy / "raw" / name).stat().st_mtime_ns for name in new}
  built(videos, copy, "--clips-per-shard", "2")
  assert {name: (copy / "raw" / name).stat().st_mtime_ns for name in new} == kept
  assert not [name for name in digests(copy) if name.endswith("-of-00004")]
  assert {path.name[-5:] for path in (copy / "slices").iterdir()} == {"00001", "00008"}
  assert set(records(copy)) == {"left", "middle"}


def test_parts_make_the_same_bytes(videos, out, tmp_path, capsys):
  parts = tmp_path / "parts"
  built(videos, parts, "--slice", "1/2")
  assert "not complete" in capsys.readouterr().out
  assert not (parts / "raw" / "manifest.json").exists()
  built(videos, parts, "--slice", "0/2")
  assert digests(parts) == digests(out) and len(digests(out)) == 5
  names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
  assert sorted(str(path.relative_to(parts)) for path in parts.rglob("*")) == names


def test_features_follow_on_demand(videos, out, tmp_path, capsys):
  copy = tmp_path / "10:30"
  shutil.copytree(out, copy)
  built(videos, copy, "--features", "--config", TINY)
  assert "clips: 3 of 3 clips" in capsys.readouterr().out
  fields = layout.read_features(copy / "clips")
  samples = fields["audio"].shape[1]
  assert {"clip", "sync", "spatial", "audio", "caption"} <= set(fields)
  for split, names in {"train": {"left", "middle"}, "test": {"right"}}.items():
    source = tfrecord.TFRecordSource(shards.paths(copy / "clips", split))
    encoded = [tf_example.decode(source[i]) for i in range(len(source))]
    assert {bytes(raw["id"]).decode() for raw in encoded} == names
    for raw in encoded:
      name = bytes(raw["id"]).decode()
      heard = tf_example.value_of(raw["audio"], fields["audio"])
      np.testing.assert_array_equal(heard, records(copy, split)[name]["audio"][:, :samples])
      assert bytes(raw["caption"]).decode() == f"{name} label"


def test_features_that_fail_end_a_build_before_its_audit(videos, out, tmp_path, monkeypatch):
  copy = shutil.copytree(out, tmp_path / "10:30")
  monkeypatch.setattr(encode, "run", lambda _: 4)
  for more in (["--audit"], ["--slice", "1/2"]):  # An array makes features, too.
    assert command.main(arguments(videos, copy, "--features", "--config", TINY, *more)) == 4
  assert not list(copy.glob("audit.*"))


def test_reports_are_of_this_build_alone(videos, out, tmp_path, capsys):
  """Of an earlier one with other settings, half of the shards are still there."""
  copy = tmp_path / "copy"
  shutil.copytree(out, copy)
  built(videos, copy, "--spatializer", "paper", "--slice", "0/2")
  told, funnel = capsys.readouterr(), json.loads((copy / "funnel.json").read_text())
  assert set(funnel["spatializer"]) <= {"paper", "recorded"}
  fates = funnel["kept"] + sum(funnel["dropped"].values()) + funnel["waiting"]
  assert fates == funnel["files"] and funnel["waiting"] > 0
  assert "slices: 3/3" in told.err  # Of five; the others are not this call's.


def test_files_that_are_not_listed_are_no_failures(tmp_path, capsys):
  """Such as downloads that are not finished."""
  for n in range(6):
    (tmp_path / f"part{n}.mp4").write_bytes(b"no video")
  clips.write(tmp_path / "good.mp4")
  (tmp_path / "list.csv").write_text("id,label\ngood,dog\n")
  given = ["vggsound", "--videos", str(tmp_path), "--labels", str(tmp_path / "list.csv")]
  given += ["--out", str(tmp_path / "out"), "--seconds", "1", "--jobs", "1"]
  assert command.main(given) == 0
  funnel = json.loads((tmp_path / "out" / "funnel.json").read_text())
  assert funnel["failures"] == 0 and funnel["dropped"]["unlisted"] == 6 and funnel["kept"] == 1


def test_an_audit_on_demand_decides_the_exit_code(videos, out, tmp_path, capsys):
  copy = tmp_path / "10:30"
  shutil.copytree(out, copy)
  code = command.main(arguments(videos, copy, "--audit"))
  found = json.loads((copy / "audit.json").read_text())
  assert code == (0 if found["fit"] else 1) and (copy / "audit.html").exists()
  assert not found["fit"]  # Three of eleven clips are no build to publish.
  assert "not fit for release" in capsys.readouterr().err


def test_the_audit_waits_for_the_run_of_the_whole(videos, out, tmp_path, capsys):
  copy = tmp_path / "copy"
  shutil.copytree(out, copy)
  built(videos, copy, "--audit", "--slice", "0/2")
  assert "complete; run once more without --slice to audit" in capsys.readouterr().out
  assert not list(copy.glob("audit.*"))


def test_too_many_unreadable_files_are_said_by_the_exit_code(tmp_path, capsys):
  for n in range(6):
    (tmp_path / f"{n}.mp4").write_bytes(b"no video")
  clips.write(tmp_path / "good.mp4")
  given = ["vggsound", "--videos", str(tmp_path), "--out", str(tmp_path / "out"), "--seconds", "1"]
  assert command.main([*given, "--jobs", "1"]) == 1
  assert "6 clips could not be read, more than 5" in capsys.readouterr().err
  assert len(records(tmp_path / "out")) == 1
  assert command.main([*given, "--jobs", "1", "--max-failures", "0.9"]) == 0


@pytest.mark.parametrize(
  ("more", "code", "why"),
  [
    (["--spatializer", "moon"], 2, "moon"),
    (["--silence", "2"], 2, "--silence 2"),
    (["--least-quality", "XX=1"], 2, "no axis 'XX'"),
    (["--least-quality", "PQ=1", "--quality-scores", "{0}/few.csv"], 2, "no column PQ, have"),
    (["--most-tag", "Speech=0.5"], 2, "it has no column Speech, have id, speech"),
    (["--quality-weights", "no.pt"], 3, "no.pt: no such file"),
    (["--beam-option", "a=b"], 2, "--beam-option needs --beam"),
    (["--features"], 2, "--features and --config FILE go together"),
    (["--features", "--config", "no.py"], 2, "no.py: no such file"),
    (["--features", "--config", TINY, "--audio", "44k"], 2, "--audio 44k: give 16k, as"),
    (["--features", "--config", f"{CONFIGS}/tiny.py:demo"], 2, "--seconds 1: give 4 or more, as"),
  ],
)
def test_mistakes_are_said_before_the_work_starts(videos, tmp_path, capsys, more, code, why):
  more = [word.format(videos) for word in more]
  assert command.main(arguments(videos, tmp_path / "out", *more)) == code
  assert why in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--vae", "--parts"])
@pytest.mark.parametrize("thread", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_networks_that_are_not_there_are_said_before_the_work_starts(
  videos, tmp_path, capsys, monkeypatch, flag, thread
):
  if thread:  # A process of its own, as it is without this, takes seconds to import JAX.
    pool = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda n, **_: pool(n))
  more = ["--features", "--config", TINY, flag, str(tmp_path / "nowhere")]
  assert command.main(arguments(videos, tmp_path / "out", *more)) == 3
  assert "no model folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
