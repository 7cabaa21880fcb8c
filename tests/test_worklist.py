"""Which files a command works on, and what it says in the end."""

import os
import pathlib

import pytest

from spatialv2a_jax import worklist
from spatialv2a_jax.errors import UserError


def test_files_that_outputs_would_replace_are_refused_however_the_folder_is_written(
  tmp_path, monkeypatch
):
  (tmp_path / "a.mp4").touch()
  (tmp_path / "link").symlink_to(tmp_path)
  monkeypatch.chdir(tmp_path)
  assert worklist.collect(["a.mp4"], pathlib.Path("out")) == [pathlib.Path("a.mp4")]
  for out in (".", "out/..", str(tmp_path), "link"):
    os.makedirs("out", exist_ok=True)
    with pytest.raises(UserError, match="a.mp4 lies in .*choose another --out"):
      worklist.collect(["a.mp4"], pathlib.Path(out))


def test_folders_give_files_of_known_suffixes_and_names_any(tmp_path):
  for name in ("b.mp4", "a.MOV", "c.wav", "notes.txt"):
    (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "in" / name).touch()

  def names(*inputs, **options):
    return [path.name for path in worklist.collect(inputs, tmp_path / "out", **options)]

  assert names(tmp_path / "in") == ["a.MOV", "b.mp4"]
  assert names(tmp_path / "in", extensions={".wav"}) == ["c.wav"]
  assert names(tmp_path / "in" / "notes.txt", tmp_path / "gone") == ["notes.txt", "gone"]


def test_one_failure_among_many_is_told(capsys):
  out = pathlib.Path("out")
  assert worklist.conclude(3, {}, out) == 0
  assert worklist.conclude(3, {pathlib.Path("a.mp4"): UserError("is empty")}, out) == 4
  told = capsys.readouterr()
  assert told.out == "3 of 3 files are in out\n2 of 3 files are in out\n"
  assert told.err == "failed: a.mp4: is empty\n"
