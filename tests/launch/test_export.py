"""The model folder of a run that still trains: which of its weights go into it."""

import pathlib
import types

import pytest

from launch import export


@pytest.fixture
def run(monkeypatch):
  """A run of three checkpoints and two averages; what is read of it, and what is written."""
  seen = types.SimpleNamespace(read=[], config=None, written=None)
  ema = {"decay": 0.9, "sigma_rel": 0.1, "beside": (0.2,)}

  def load(folder, which, step):
    seen.read.append((which, step))
    return f"params {which}", f"stats {which}", {"ema": ema, "model": {"attention": "cudnn"}}

  def build(config, mesh, rules):
    assert mesh.size == 1
    seen.config = config
    return types.SimpleNamespace(export=lambda *given: setattr(seen, "written", given))

  monkeypatch.setattr(export.checkpoint, "saved_runs", lambda _: dict.fromkeys((2, 10, 9)))
  monkeypatch.setattr(export.checkpoint, "load_params", load)
  monkeypatch.setattr(export.tasks, "build", build)
  return seen


@pytest.mark.parametrize(
  "more, which, step",
  [
    ([], 0, 10),
    (["--step=2"], 0, 2),
    (["--average=0.1"], 0, 10),
    (["--average=0.2"], 1, 10),
    (["--average=0.2", "--step=9"], 1, 9),
  ],
)
def test_the_newest_checkpoint_or_that_of_a_step_gives_one_of_its_averages(
  run, capsys, more, which, step
):
  assert export.main(["--run=r", "--out=o", *more]) == 0
  assert run.written == (pathlib.Path("o"), f"params {which}", f"stats {which}")
  assert run.read[-1] == (which, step) and {at for _, at in run.read} == {step}
  assert run.config["model"]["attention"] == "auto"  # The way of the run may be elsewhere's.
  assert capsys.readouterr().out == "model folder: o\n"


def test_an_average_that_the_run_does_not_track_is_one_line(run, capsys):
  assert export.main(["--run=r", "--out=o", "--average=0"]) == 2 and run.written is None
  assert capsys.readouterr().err == (
    "launch.export: r tracks no average 0, have: 0.1, 0.2 (0 is the plain one)\n"
  )


def test_a_run_without_checkpoints_is_one_line(tmp_path, capsys):
  assert export.main([f"--run={tmp_path}", f"--out={tmp_path / 'out'}"]) == 3
  told = capsys.readouterr().err
  assert told.startswith("launch.export: ") and told.count("\n") == 1
  assert not (tmp_path / "out").exists()
