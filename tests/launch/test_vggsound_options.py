"""`python -m launch.data vggsound`: every option reaches what it is for."""

import argparse
import importlib.util
import pathlib
import sys
import types

import numpy as np
import pytest

from data import filters, funnel, shards, stages
from launch import data as command
from launch import encode, vggsound
from spatialv2a_jax.errors import UserError
from tests.launch.test_vggsound import TINY


def parsed(*words: str) -> argparse.Namespace:
  parser = argparse.ArgumentParser()
  vggsound.add_arguments(parser.add_subparsers())
  return parser.parse_args(["vggsound", "--videos", "V", "--out", "O", *words])


def test_what_records_depend_on():
  assert vggsound._settings(parsed()) == stages.Settings()
  given = parsed(
    "--seconds", "8", "--tolerance", "0.2", "--silence", "0.5", "--quality-scores", "q.csv",
    "--least-quality", "PQ=5,CE=1", "--tags", "t.csv", "--most-tag", "speech=0.5", "--audio", "44k",
    "--localizer", "acl", "--parts", "P", "--spatializer", "paper", "--stereo", "render",
  )  # fmt: skip
  limits = filters.Limits(8, 0.2, 0.5, (("PQ", 5), ("CE", 1)), (("speech", 0.5),))
  assert vggsound._settings(given) == stages.Settings(limits, "44k", "acl", "P", "paper", False)
  given = parsed("--features", "--config", "c.py", "--parts", "P")
  assert vggsound._settings(given).parts == ""  # Those of the encoders alone: no record's.
  with pytest.raises(UserError, match="--parts needs --features or --localizer acl"):
    vggsound._settings(parsed("--parts", "P"))


def test_a_slice_is_one_of_those_there_are():
  assert (vggsound.part("0/1"), vggsound.part("11/12")) == ((0, 1), (11, 12))
  for wrong in ("1/1", "2/1", "0/0", "-1/2", "1", "a/b", "1/2/3"):
    with pytest.raises(argparse.ArgumentTypeError, match="is not I/N with I from 0 to N - 1"):
      vggsound.part(wrong)


def test_clips_are_long_enough_for_what_trains_on_them():
  given = ["--features", "--config", TINY.replace("smoke", "demo"), "--seconds"]
  vggsound._check_encoding(parsed(*given, "4"))
  with pytest.raises(UserError, match="--seconds 3.96: give 4 or more, as --config"):
    vggsound._check_encoding(parsed(*given, "3.96"))


def test_how_a_build_is_run(tmp_path, monkeypatch, capsys):
  """Links that lead nowhere are named; scores that a network gives depend on that network."""
  taken = {}

  def build(work, make, out, **options):
    taken.update(options, judge=make.judge)
    raise UserError("stopped")

  monkeypatch.setattr(shards, "build", build)
  judge = types.SimpleNamespace(identity="its hash")
  monkeypatch.setattr(vggsound.quality, "Aesthetics", lambda path: judge)
  for n in range(4):
    (tmp_path / f"{n}.mp4").write_bytes(b"video")
  (tmp_path / "link.mp4").symlink_to("gone.mp4")
  argv = ["vggsound", "--videos", tmp_path, "--out", tmp_path / "out", "--jobs", 3]
  argv += ["--slice", "1/2", "--clips-per-shard", 2]
  assert command.main(list(map(str, argv))) == 2
  told = capsys.readouterr()
  assert "1 links lead nowhere, the first is" in told.out and "quality filter: off" in told.out
  assert "stopped" in told.err
  expected = {"jobs": 3, "part": (1, 2), "batched": True, "max_bad": 1.0, "judge": None}
  assert {name: taken[name] for name in expected} == expected and taken["config"]["judge"] is None
  assert command.main([*map(str, argv), "--quality-weights", "w.pt"]) == 2
  assert taken["config"]["judge"] == "its hash" and taken["judge"] is judge
  (tmp_path / "scores.csv").write_text("id,CE\n0,4\n")
  assert command.main([*map(str, argv), "--quality-scores", str(tmp_path / "scores.csv")]) == 2
  assert "quality filter: off" not in capsys.readouterr().out


def test_only_the_first_dropped_clips_are_printed(monkeypatch, capsys):
  monkeypatch.setattr(funnel, "table", lambda found: "table")
  clips = {f"clip{n}": {"reason": "short", "detail": f"{n} s"} for n in range(22)}
  vggsound._print({"clips": clips}, pathlib.Path("O"))
  lines = capsys.readouterr().out.splitlines()
  assert lines[:2] == ["table", "clip0: short, 0 s"] and lines[-2] == "clip19: short, 19 s"
  assert lines[-1] == "... and 2 more in O/funnel.json" and len(lines) == 22


def test_what_follows_a_build_is_told_what_the_build_was_told(monkeypatch):
  taken = []
  monkeypatch.setattr(encode, "run", lambda args: taken.append(args) or 4)
  monkeypatch.setattr(vggsound.audit, "run", lambda args: taken.append(args) or 1)
  more = ["--features", "--config", TINY, "--mirror", "--slice", "1/3", "--max-failures", "0.2"]
  assert vggsound._encode(parsed(*more)) == 4
  assert vggsound._encode(parsed(*more, "--storage", "mxint8", "--vae", "W")) == 4
  assert vggsound._audit(parsed()) == 1
  first, second, audited = map(vars, taken)
  folders = {"raw": pathlib.Path("O/raw"), "videos": pathlib.Path("V"), "out": pathlib.Path("O")}
  options = {"config": TINY, "mirror": True, "slice": (1, 3), "max_bad": 0.2, "vae": None}
  assert first.items() >= {**folders, **options, "storage": "bfloat16"}.items()
  assert (second["storage"], second["vae"]) == ("mxint8", pathlib.Path("W"))
  assert (audited["build"], audited["videos"]) == (pathlib.Path("O"), pathlib.Path("V"))


class Step:
  """What stands right of a label and of `|` in a pipeline of Beam."""

  def __init__(self, apply):
    self.apply = apply

  def __rrshift__(self, label):
    return self

  def __ror__(self, values):
    return self.apply(values)


class Pipeline:
  """One whose work is done as it is described; remembers its options."""

  options: list = []

  def __init__(self, options):
    Pipeline.options.append(options)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    return None


def test_slices_and_options_reach_beam(tmp_path, monkeypatch):
  """The package itself is an extra."""

  def parallel(worker):
    worker.setup()
    return Step(lambda values: [x for value in values for x in worker.process(value)])

  beam: dict = {"DoFn": object, "Pipeline": Pipeline, "ParDo": parallel}
  beam["Create"] = lambda values: Step(lambda _: values)
  options = types.SimpleNamespace(PipelineOptions=lambda flags: flags)
  monkeypatch.setitem(sys.modules, "apache_beam", types.SimpleNamespace(**beam))
  monkeypatch.setitem(sys.modules, "apache_beam.options", types.SimpleNamespace())
  monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", options)
  path = pathlib.Path(shards.__file__).parent / "beam.py"
  spec = importlib.util.spec_from_file_location("beam_of_stand_ins", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  items = [shards.Item(f"{i}", i) for i in range(5)]
  for name, runner in (("here", None), ("there", module.runner("R", ["project=P", "streaming"]))):
    shards.build(
      items, lambda item: {"x": np.full(2, item.payload)}, tmp_path / name, shards=2, config={},
      runner=runner,
    )  # fmt: skip
  assert Pipeline.options == [["--runner=R", "--project=P", "--streaming"]]
  one, other = (shards.paths(tmp_path / name) for name in ("here", "there"))
  assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
