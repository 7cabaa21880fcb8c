"""The tokenizer against open_clip's ids, with those of CLIP's merges that the captions need."""

import gzip
import importlib.metadata
import json
import pathlib
import sys

import numpy as np
import pytest

from spatialv2a_jax import tokenizer
from spatialv2a_jax.errors import MissingAssetError, UserError

GOLDEN = pathlib.Path(__file__).parent / "golden"
MERGES = GOLDEN / "clip_merges.txt.gz"


@pytest.fixture(scope="module")
def tokenize():
  return tokenizer.Tokenizer(MERGES)


def test_ids_are_open_clips(tokenize):
  golden = json.loads((GOLDEN / "clip_tokenizer.json").read_text())
  ids_bw = tokenize(golden["captions"])
  assert ids_bw.shape == (len(golden["ids"]), 77) and ids_bw.dtype == np.int32
  for row, ids in zip(ids_bw, golden["ids"], strict=True):
    np.testing.assert_array_equal(row, ids + [0] * (77 - len(ids)))


@pytest.mark.parametrize("kind, count", [("labels", 309), ("odd", 30)])
def test_class_names_of_vggsound_and_odd_texts(tokenize, kind, count):
  known = json.loads((GOLDEN / "vggsound_tokens.json").read_text())[kind]
  assert len(known) == count
  for row, (text, ids) in zip(tokenize(list(known)), known.items(), strict=True):
    np.testing.assert_array_equal(row, ids + [0] * (77 - len(ids)), text)


@pytest.mark.parametrize(
  "text, ids",
  [
    ("", []),
    ("waves, seagulls", [7882, 267, 42215]),
    ("A photo of", [320, 1125, 539]),
    ("!", [256]),
  ],
)
def test_known_ids(tokenize, text, ids):
  assert tokenize.encode(text) == ids


def test_text_that_spells_a_special_token_is_that_token(tokenize):
  assert tokenize.encode("<END_OF_TEXT>") == [49407]


def test_long_text_is_cut_and_still_ends(tokenize):
  row = tokenize(["a photo of " * 40])[0]
  assert row[0] == 49406 and row[-1] == 49407 and (row > 0).all()
  assert (row[1:-1] < 49406).all()


def test_merges_are_found_inside_open_clip_without_importing_it(monkeypatch, tmp_path):
  (tmp_path / "open_clip").mkdir()
  (tmp_path / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(MERGES.read_bytes())
  (tmp_path / "open_clip" / "__init__.py").write_text("raise RuntimeError('imported')")
  about = tmp_path / "open_clip_torch-3.3.0.dist-info"
  about.mkdir()
  (about / "METADATA").write_text("Metadata-Version: 2.1\nName: open_clip_torch\nVersion: 3.3.0\n")
  monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
  importlib.invalidate_caches()
  assert tokenizer.Tokenizer().encode("A photo of") == [320, 1125, 539]
  assert tokenizer.keep(tmp_path / "model")  # A converted CLIP carries them.
  assert (tmp_path / "model" / tokenizer.FILE).read_bytes() == MERGES.read_bytes()


def test_without_merges_the_message_says_what_to_do(monkeypatch, tmp_path):
  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "distribution", missing)
  with pytest.raises(MissingAssetError, match="pip install --no-deps open_clip_torch"):
    tokenizer.Tokenizer()
  assert not tokenizer.keep(tmp_path)
  with pytest.raises(MissingAssetError, match="no such merges file"):
    tokenizer.Tokenizer(tmp_path / "none.gz")


@pytest.mark.parametrize("package", ["ftfy", "regex"])
def test_without_a_package_the_message_says_what_to_install(monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(MissingAssetError, match=rf"needs the package {package}.*\[encoders\]"):
    tokenizer.Tokenizer(MERGES)


@pytest.mark.parametrize(
  "raw", [b"", b"a b\n" * 10, b"\x1f\x8bbroken", b"x\n" + b"a b c\n" * 48894]
)
def test_another_file_is_refused(tmp_path, raw):
  path = tmp_path / "merges.txt"
  path.write_bytes(raw if raw.startswith(b"\x1f") else gzip.compress(raw))
  with pytest.raises(UserError, match="is no merges file"):
    tokenizer.Tokenizer(path)
