"""Where a demo goes, and what it takes for its own."""

import pathlib

import pytest

from launch import demo
from spatialv2a_jax.errors import UserError


@pytest.fixture
def stages(monkeypatch) -> list[str]:
  """Names of the stages that begin; each ends the demo, as a failure would."""
  begun: list[str] = []

  def stop(self, name, *command):
    begun.append(name)
    raise UserError("stopped", 5)

  monkeypatch.setattr(demo.Stages, "run", stop)
  return begun


@pytest.mark.parametrize("finished", [False, True])
def test_a_smoke_run_is_not_taken_for_the_demo(tmp_path, stages, capsys, finished):
  small, large = ["--out", str(tmp_path), "--smoke"], ["--out", str(tmp_path)]
  assert demo.main(small) == 5
  if finished:
    (tmp_path / "checkpoint").mkdir()
  assert demo.main(large) == 2 and len(stages) == 1
  assert f"{tmp_path} holds a demo of another size" in capsys.readouterr().err
  assert demo.main(small) == 5 and len(stages) == 2


def test_a_checkpoint_of_unknown_size_is_not_taken_for_done(tmp_path, stages):
  (tmp_path / "checkpoint").mkdir()
  assert demo.main(["--out", str(tmp_path)]) == 2 and not stages


def test_both_have_folders_of_their_own(tmp_path, stages, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert demo.main(["--smoke"]) == demo.main([]) == 5
  assert sorted(pathlib.Path("demo_out").rglob("demo.json")) == [
    pathlib.Path("demo_out/demo.json"), pathlib.Path("demo_out/smoke/demo.json"),
  ]  # fmt: skip
