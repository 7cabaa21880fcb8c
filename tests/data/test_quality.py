"""Scores of sound quality, with a stand-in for the package that speaks its interface."""

import json
import pickle
import sys
import types

import numpy as np
import pytest

from data import quality
from launch import data as command
from spatialv2a_jax.errors import MissingAssetError
from tests.data import clips
from tests.data.clips import RATE, noise


@pytest.fixture
def package(monkeypatch) -> list[str | None]:
  """Installs the stand-in: it scores loudness. Returns the weights that were loaded."""
  loaded: list[str | None] = []

  class Predictor:  # As AesPredictor of version 0.0.4: a str in "path" would be read as a file.
    def forward(self, batch):
      assert all(item.keys() == {"path", "sample_rate"} for item in batch)
      assert all(item["path"].ndim == 2 and len(item["path"]) == 1 for item in batch)
      assert all(item["path"].dtype == np.float32 and item["sample_rate"] == RATE for item in batch)
      level = [float(np.sqrt(np.mean(item["path"] ** 2))) for item in batch]
      return [{"CE": 5.0, "CU": 5.0, "PC": 1.0, "PQ": 40 * one} for one in level]

  def initialize_predictor(ckpt=None):
    loaded.append(ckpt)
    return Predictor()

  infer = types.ModuleType("audiobox_aesthetics.infer")
  vars(infer)["initialize_predictor"] = initialize_predictor
  parent = types.ModuleType("audiobox_aesthetics")
  vars(parent)["infer"] = infer
  torch = types.ModuleType("torch")
  vars(torch)["from_numpy"] = lambda array: array
  vars(torch)["set_num_threads"] = lambda count: None
  for module in (parent, infer, torch):
    monkeypatch.setitem(sys.modules, module.__name__, module)
  return loaded


def test_weights_are_local_and_loaded_once(package, tmp_path):
  (tmp_path / "checkpoint.pt").write_bytes(b"weights")
  judge = quality.Aesthetics(tmp_path / "checkpoint.pt")
  assert not package  # Nothing is loaded before it is needed.
  for _ in range(2):
    scores = judge(noise(1, level=0.1), RATE)
  assert package == [str(tmp_path / "checkpoint.pt")]
  assert scores["PQ"] == pytest.approx(4, rel=0.05)
  again = pickle.loads(pickle.dumps(judge))  # As to a worker process.
  assert again(noise(1), RATE)["CE"] == 5 and len(package) == 2


def test_without_weights_nothing_is_fetched(package, tmp_path):
  with pytest.raises(MissingAssetError, match="no such file"):
    quality.Aesthetics(tmp_path / "checkpoint.pt")
  assert not package


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "audiobox_aesthetics", None)
  (tmp_path / "checkpoint.pt").write_bytes(b"weights")
  with pytest.raises(MissingAssetError, match=r"spatialv2a_jax\[aesthetics\]"):
    quality.Aesthetics(tmp_path / "checkpoint.pt")


def test_a_build_scores_and_drops(package, tmp_path):
  for name, level in (("loud", 0.2), ("faint", 0.05)):
    clips.write(tmp_path / "v" / f"{name}.mp4", audio_ep=noise(1, level=level)[None].repeat(2, 0))
  (tmp_path / "checkpoint.pt").write_bytes(b"weights")
  given = ["--videos", tmp_path / "v", "--out", tmp_path / "out", "--seconds", "1", "--jobs", "1"]
  given += ["--quality-weights", tmp_path / "checkpoint.pt"]
  assert command.main(["vggsound", *map(str, given)]) == 0
  (drop,) = json.loads((tmp_path / "out" / "funnel.json").read_text())["clips"].items()
  assert drop[0] == "faint" and drop[1]["reason"] == "quality" and "PQ" in drop[1]["detail"]
  (tmp_path / "scores.csv").write_text("id,PQ\nloud,1\nfaint,6\n")  # A list has the last word.
  assert (
    command.main(["vggsound", *map(str, given), f"--quality-scores={tmp_path}/scores.csv"]) == 0
  )
  (drop,) = json.loads((tmp_path / "out" / "funnel.json").read_text())["clips"]
  assert drop == "loud"


def test_weights_given_later_score_what_was_heard_without(package, tmp_path):
  clips.write(tmp_path / "v" / "a.mp4", audio_ep=noise(1, level=0.2)[None].repeat(2, 0))
  (tmp_path / "checkpoint.pt").write_bytes(b"weights")
  given = ["--videos", tmp_path / "v", "--out", tmp_path / "out", "--seconds", "1", "--jobs", "1"]
  for more in ([], ["--quality-weights", tmp_path / "checkpoint.pt"]):
    assert command.main(["vggsound", *map(str, [*given, *more])]) == 0
  (summary,) = (tmp_path / "out" / "slices").glob("*/summary.json")
  assert json.loads(summary.read_text())["scores"]["CE"] == [5.0, 1]
