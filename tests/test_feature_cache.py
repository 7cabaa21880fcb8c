"""Features on disk: found again, and anew whenever anything that determines them changes."""

import os
import pathlib
import shutil

import numpy as np
import pytest

from spatialv2a_jax import feature_cache, model_folder
from spatialv2a_jax.encoders import Encoders
from spatialv2a_jax.models import clip
from tests import tiny, tiny_mmaudio
from tests.tiny_mmaudio import SECONDS, open_encoders, read

pytest.importorskip("ftfy", reason="the tokenizer is in the extra `encoders`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  names = ("clip", "synchformer", "clipseg")
  return tiny_mmaudio.save(tmp_path_factory.mktemp("encoders") / "parts", names)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  return [tiny.film(tmp_path_factory.mktemp("films") / "x.mp4", SECONDS, side=0.3, size=(72, 128))]


@pytest.fixture
def counted(monkeypatch):
  """Counts the stages that run."""
  calls = []
  run = Encoders._run

  def count(self, what, *args):
    calls.append(what)
    return run(self, what, *args)

  monkeypatch.setattr(Encoders, "_run", count)
  return calls


def cached(folder, tmp_path, **options):
  return open_encoders(folder, cache=feature_cache.Cache(tmp_path / "cache"), **options)


def test_a_film_is_encoded_once(folder, films, tmp_path, counted):
  first = read(cached(folder, tmp_path), films[0], sha256="a")
  assert len(counted) == 3 and len(list((tmp_path / "cache").rglob("*.features"))) == 3
  second = read(cached(folder, tmp_path), tmp_path / "gone.mp4", sha256="a")  # Not even opened.
  assert len(counted) == 3 and second.keys() == first.keys()
  for name in first:
    np.testing.assert_array_equal(second[name], first[name], strict=True)
  without = read(open_encoders(folder), films[0])
  np.testing.assert_array_equal(first["clip_vf"], without["clip_vf"])
  assert not [p for p in (tmp_path / "cache").rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize(
  "change, again",
  [
    ({"sha256": "b"}, 3),
    ({"start": 0.08}, 3),
    ({"available": 0.5}, 3),
    ({"prompt": "a train"}, 1),
    ({"prompt": "A DOG "}, 0),
  ],
)
def test_whatever_changes_is_encoded_anew(folder, films, tmp_path, counted, change, again):
  encoders_ = cached(folder, tmp_path)
  base = {"sha256": "a", "start": 0.0, "available": 0.9}
  read(encoders_, films[0], **base)
  read(encoders_, films[0], **(base | change))
  assert len(counted) == 3 + again


@pytest.mark.slow
def test_other_weights_and_another_precision_are_other_features(folder, films, tmp_path, counted):
  read(cached(folder, tmp_path, localizer="motion"), films[0], sha256="a")
  read(cached(folder, tmp_path, localizer="motion", dtype="bfloat16"), films[0], sha256="a")
  assert len(counted) == 4
  changed = tmp_path / "changed"
  shutil.copytree(folder, changed)
  params = tiny_mmaudio.shaken(clip, tiny_mmaudio.CLIP, 99)
  model_folder.save_model(changed, {"clip": params}, {}, {})
  read(cached(changed, tmp_path, localizer="motion"), films[0], sha256="a")
  assert len(counted) == 5  # CLIP alone.


@pytest.mark.parametrize("part", ["_SOURCES", "_FOLDERS", "_PACKAGES"])
def test_another_program_is_another_entry(tmp_path, monkeypatch, part):
  cache = feature_cache.Cache(tmp_path)
  before = cache.path({"a": 1})
  assert before == cache.path({"a": 1}) != cache.path({"a": 2})
  feature_cache.program.cache_clear()
  monkeypatch.setattr(feature_cache, part, getattr(feature_cache, part)[1:])
  assert cache.path({"a": 1}) != before
  feature_cache.program.cache_clear()


def test_a_damaged_entry_is_made_anew(folder, films, tmp_path, counted):
  first = read(cached(folder, tmp_path), films[0], sha256="a")
  entries = sorted((tmp_path / "cache").rglob("*.features"))
  raw = [entry.read_bytes() for entry in entries]
  entries[0].write_bytes(raw[0][:-1])
  entries[1].write_bytes(raw[1][:60] + b"\1" + raw[1][61:])
  entries[2].write_bytes(b"")
  second = read(cached(folder, tmp_path), films[0], sha256="a")
  assert len(counted) == 6
  for name in first:
    np.testing.assert_array_equal(second[name], first[name])
  assert [entry.read_bytes() for entry in entries] == raw


def test_texts_are_kept_too(folder, tmp_path, monkeypatch):
  encoders_ = cached(folder, tmp_path)
  first = encoders_.text("a dog")
  later = cached(folder, tmp_path)
  monkeypatch.setattr(later.weights, "take", lambda *a, **k: pytest.fail("needs the weights"))
  np.testing.assert_array_equal(later.text("a dog"), first)
  assert encoders_.text("a dog") is encoders_.text("a dog")


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(folder, films, tmp_path):
  (tmp_path / "cache").write_text("a file")
  assert read(cached(folder, tmp_path, localizer="motion"), films[0], sha256="a")


def test_a_cache_that_may_only_be_read_is_read(tmp_path, monkeypatch):
  cache = feature_cache.Cache(tmp_path)
  cache.put({"a": 1}, {"x": np.ones(3, np.float32)})
  monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError))
  found = cache.get({"a": 1})
  assert found is not None and found["x"].tolist() == [1, 1, 1]


def test_where_the_cache_is(monkeypatch, tmp_path):
  def where(chosen=None):
    cache = feature_cache.open_cache(chosen)
    return cache and cache.folder

  monkeypatch.delenv(feature_cache.VARIABLE, raising=False)
  assert where() == pathlib.Path("~/.cache/spatialv2a_jax/features").expanduser()
  monkeypatch.setenv(feature_cache.VARIABLE, str(tmp_path / "e"))
  assert where() == tmp_path / "e" and where(str(tmp_path / "f")) == tmp_path / "f"
  assert where("none") is None
  monkeypatch.setenv(feature_cache.VARIABLE, "none")
  assert where() is None


def test_what_was_not_used_for_longest_makes_room(tmp_path):
  value = {"x": np.zeros(1000, np.float32)}  # Some 4.1 kB.
  cache = feature_cache.Cache(tmp_path, limit=10**9)
  for i in range(4):
    cache.put({"i": i}, value)
    os.utime(cache.path({"i": i}), (i, i))
  assert cache.get({"i": 0})  # Now the one used last.
  small = feature_cache.Cache(tmp_path, limit=13_000)
  small.put({"i": 4}, value)
  assert [i for i in range(5) if small.get({"i": i})] == [0, 3, 4]
  for i in range(5, 9):
    small.put({"i": i}, value)
  assert sum(path.stat().st_size for path in tmp_path.rglob("*.features")) <= 13_000
  assert small.get({"i": 8})
