"""Clips that stay in memory are those of the records, and are not read again."""

import os
import pathlib
import shutil

import numpy as np
import pytest

from data import pipeline, shards, tfrecord
from data.kept import Kept, Key, available
from data.rows import Rows
from spatialv2a_jax import schema
from spatialv2a_jax.errors import UserError
from tests.loader_shards import CLIPS, build, damage

EPOCHS = 4


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  return build(tmp_path_factory.mktemp("shards"))


def batches(paths, **options):
  """Returns the batches of some epochs; the last ones are filled up."""
  options = {"batch_size": 4, "seed": 7, "epochs": EPOCHS, **options}
  return list(pipeline.loader(paths, **options))


@pytest.fixture
def reads(monkeypatch):
  """The numbers of the records that are read, as they are."""
  read, numbers = tfrecord.TFRecordSource.read, []

  def listen(source, place, parts):
    numbers.append((source.paths[place.shard], place.record))
    read(source, place, parts)

  monkeypatch.setattr(tfrecord.TFRecordSource, "read", listen)
  return numbers


def same(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for name, array in one.items():
      assert array.dtype == other[name].dtype
      np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize("rows", [0, 1, 9, 100])
@pytest.mark.parametrize("mirror", [False, True])
def test_batches_are_those_that_are_read(built, mirror, rows):
  """Whether all clips fit, some, or none."""
  shapes = {"mean": (2, 4, 3), "clip_mirror": (5, 2)} if mirror else {}
  options = {"mirror": mirror, "shapes": shapes, "batch_size": 6}
  expected = batches(built, **options)
  size = sum(x[0].nbytes for x in expected[0].values())
  same(batches(built, **options, cache_gb=(rows + 0.5) * size / 2**30), expected)
  assert 0 < expected[-1]["weight_b"].sum() < 6  # Clips that were kept with weight 1 fill up.


def test_sound_too_and_by_several_threads(built):
  for options in ({"kind": "audio"}, {"threads": 4}):
    same(batches(built, **options, cache_gb=1), batches(built, **options))


def clip_reads(numbers):
  return [where for where in numbers if "/text/" not in where[0]]


def test_what_was_read_once_is_not_read_again(built, reads):
  batches(built, cache_gb=1)
  assert len(clip_reads(reads)) == CLIPS
  reads.clear()
  batches(built, cache_gb=1, mirror=True)
  found = clip_reads(reads)
  assert all(found.count(where) <= 2 for where in found)  # As it is, and mirrored.
  assert CLIPS < len(found) < EPOCHS * CLIPS


def test_what_does_not_fit_is_read_each_epoch(built, reads):
  size = sum(x[0].nbytes for x in batches(built, epochs=1)[0].values())
  reads.clear()
  batches(built, batch_size=CLIPS, cache_gb=10.5 * size / 2**30)
  assert len(clip_reads(reads)) == CLIPS + (EPOCHS - 1) * (CLIPS - 10)


def test_a_clip_takes_one_place_and_there_are_as_many_as_clips():
  """Two threads may read the same one, or a batch have it twice."""
  kept, batch = Kept(1 << 20, 2), {"x": np.arange(4.0)}
  for record in (5, 5, 6, 7):
    kept.add(Key(record, False), f"clip{record}", batch, record - 5)
  assert [kept.find(Key(record, False)) for record in (5, 6, 7)] == [0, 1, None]
  found = {"x": np.zeros(3)}
  kept.copy({2: 1, 0: 0}, found)
  assert found["x"].tolist() == [0, 0, 1]


def test_what_another_thread_read_meanwhile_is_found(built, monkeypatch):
  """Even the first clips, before which nobody knows what a batch holds."""
  find = Rows._slots

  def late(rows, wanted):
    monkeypatch.setattr(Rows, "_slots", find)
    rows(0)  # By another thread.
    return find(rows, wanted)

  monkeypatch.setattr(Rows, "_slots", late)
  same(batches(built, epochs=1, cache_gb=1), batches(built, epochs=1))


def test_a_run_that_goes_on_reads_what_it_needs(built):
  expected = batches(built)
  same(batches(built, cache_gb=1, start_step=9), expected[9:])


def test_damaged_records_are_replaced_and_named_each_time(built, tmp_path):
  shutil.copytree(built[0].parent, tmp_path / "shards")
  paths = shards.paths(tmp_path / "shards")
  damage(paths[1], 2)
  plain, cached = (
    pipeline.loader(paths, batch_size=4, seed=7, epochs=EPOCHS, cache_gb=gb) for gb in (0, 1)
  )
  same(list(cached), list(plain))
  assert cached.bad == plain.bad and len(cached.bad) == 1


def test_a_batch_that_is_handed_out_is_nobody_elses(built):
  """What is done to it must not reach the clips in memory."""
  expected = batches(built)
  for batch, other in zip(
    pipeline.loader(built, batch_size=4, seed=7, epochs=EPOCHS, cache_gb=1), expected, strict=True
  ):
    np.testing.assert_array_equal(batch["mean_betc"], other["mean_betc"])
    for array in batch.values():
      array[:] = 0


def test_sixteen_bits_take_half_the_memory(built, reads):
  """As a batch has them; else the limit would mean another number of clips."""
  batch = batches(built, epochs=1)[0]
  assert batch["clip_bvf"].dtype == "float16"
  wide = sum(x[0].nbytes for x in schema.widen(batch).values())
  reads.clear()
  batches(built, batch_size=CLIPS, epochs=2, cache_gb=15 * wide / 2**30)
  assert len(clip_reads(reads)) < CLIPS + CLIPS - 15


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"cache_gb": -1}, "cache_gb=-1 is less than 0"),
    ({"cache_gb": float("nan")}, "cache_gb=nan is less than 0"),
    ({"cache_gb": 1, "workers": 2}, "cache_gb=1 needs workers=0"),
    ({"cache_gb": 1, "kind": "pairs"}, "pairs are mixed anew"),
  ],
)
def test_limits_without_sense_are_refused(built, options, message):
  with pytest.raises(UserError, match=message):
    pipeline.loader(built, batch_size=4, seed=7, **options)


def test_clips_that_do_not_fit_into_memory_are_refused_at_once(built, monkeypatch):
  """However much is asked for, it is those that there are which must fit."""
  size = sum(x[0].nbytes for x in batches(built, epochs=1)[0].values())
  monkeypatch.setattr("data.kept.available", lambda: CLIPS * size)
  batches(built, cache_gb=2)
  monkeypatch.setattr("data.kept.available", lambda: CLIPS * size - 1)
  with pytest.raises(UserError, match=r"cache_gb=2\.0: the clips take 0\.0 GiB, of which"):
    batches(built, cache_gb=2)
  monkeypatch.setattr("data.kept.available", lambda: None)  # Where nobody knows.
  batches(built, cache_gb=2)


def test_what_is_left_of_the_memory_is_what_the_system_says():
  left, pages = available(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  assert left is None or 2**24 < left <= pages


@pytest.mark.parametrize(("limit", "left"), [("max", 8192), ("9999", 8192), ("4096", 4096)])
def test_a_container_has_no_more_than_its_limit(monkeypatch, limit, left):
  files = {
    "/proc/meminfo": "MemTotal:       16 kB\nMemAvailable:    8 kB\n",
    "/sys/fs/cgroup/memory.max": f"{limit}\n",
  }
  monkeypatch.setattr(pathlib.Path, "read_text", lambda path: files[str(path)])
  assert available() == left
