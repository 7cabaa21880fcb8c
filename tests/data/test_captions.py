"""The table of texts: of several shards, made by several, and made anew for other features."""

import hashlib
import json
import pathlib

import numpy as np
import pytest

from data import captions, shards
from spatialv2a_jax.errors import UserError
from tests.loader_shards import text

NAMED = [f"caption {n}" for n in (4, 2, 0, 2, 3, 1)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(captions, "PER_SHARD", 2)


def build(folder: pathlib.Path, named=NAMED, **options) -> list[str]:
  """Makes a table and returns which captions were encoded for it."""
  encoded = []

  def encode(caption: str) -> np.ndarray:
    encoded.append(caption)
    return text(caption)

  captions.build(named, encode, folder, **{"config": {}, "storage": "float32", **options})
  return encoded


def contents(folder: pathlib.Path) -> dict[str, str]:
  paths = (folder / captions.FOLDER).iterdir()
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_texts_of_every_shard_are_found(tmp_path):
  build(tmp_path)
  assert len(shards.paths(tmp_path / captions.FOLDER)) == 3
  table = captions.Table(tmp_path)
  for caption in NAMED:
    np.testing.assert_array_equal(table[caption], text(caption))


def test_neither_the_order_of_clips_nor_who_makes_what_changes_a_byte(tmp_path):
  """Processes iterate over the same set in different orders."""
  build(tmp_path / "whole")
  sidecars = map(shards.sidecar, shards.paths(tmp_path / "whole" / captions.FOLDER))
  ids = [json.loads(path.read_text())["ids"] for path in sidecars]
  assert sorted(map(sorted, ids)) == ids
  made = [build(tmp_path / "parts", NAMED[::-1], part=(i, 2)) for i in (1, 0)]
  assert sorted(sum(made, [])) == sorted(set(NAMED)) and all(made)
  assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_other_features_are_encoded_anew(tmp_path):
  build(tmp_path)
  assert build(tmp_path) == []
  for change in ({}, {"config": {"encoder": 2}}):
    assert sorted(build(tmp_path, storage="bfloat16", **change)) == sorted(set(NAMED))


def test_a_text_that_cannot_be_encoded_is_named(tmp_path):
  """It would be missed by each of its clips, epochs later."""
  with pytest.raises(UserError, match="caption 'caption x' cannot be encoded: ValueError"):
    build(tmp_path, [*NAMED, "caption x"])
