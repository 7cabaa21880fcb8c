import gc
import itertools
import json
import pathlib
import pickle
import shutil
import weakref

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import captions, pipeline, shards, tf_example, tfrecord
from spatialv2a_jax.errors import UserError
from tests.loader_shards import CLIPS, build, damage, numbers, stream, text


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[pathlib.Path]:
  return build(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def paths(built, tmp_path) -> list[pathlib.Path]:
  """A copy that a test may damage."""
  shutil.copytree(built[0].parent, tmp_path / "shards")
  return shards.paths(tmp_path / "shards")


def test_one_damaged_record_in_a_hundred_is_put_up_with(built):
  for times, most in ((1, 5), (40, 40 * CLIPS // 100)):
    batches = pipeline.loader(built * times, batch_size=4, seed=0)
    assert batches.max_bad == most
    batches.close()


def test_damaged_records_are_replaced_by_their_successor_and_named(paths):
  place = len(tfrecord.read_index(paths[1])) - 1
  before = tfrecord.TFRecordSource(paths)
  record_number = len(tfrecord.read_index(paths[0])) + place
  ids = [bytes(tf_example.decode(before[i])["id"]).decode() for i in range(CLIPS)]
  lost, successor = ids[record_number], ids[record_number + 1]
  clean = stream(paths, 11)
  damage(paths[1], place)
  batches = pipeline.loader(paths, batch_size=4, seed=7)
  seen = [n for batch in itertools.islice(batches, 11) for n in numbers(batch)]
  assert seen == [
    int((successor if f"clip{n}" == lost else f"clip{n}").removeprefix("clip")) for n in clean
  ]
  assert batches.bad == {record_number: f"{paths[1]}: record {place} (clip {lost})"}


def test_the_last_record_is_succeeded_by_the_first(paths):
  damage(paths[2], len(tfrecord.read_index(paths[2])) - 1)
  seen = stream(paths, 1, batch_size=CLIPS, seed=None)
  assert seen[-1] == seen[0]


@settings(
  max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 5), byte=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_costs_one_record(paths, place, byte, bit):
  """In the length, the checksums or the payload: found, named, skipped and counted once."""
  offset, length = tfrecord.read_index(paths[0])[place].tolist()
  whole = paths[0].read_bytes()
  blob = bytearray(whole)
  blob[offset + int(byte * (12 + length + 4))] ^= 1 << bit
  paths[0].write_bytes(blob)
  batches = pipeline.loader(paths, batch_size=CLIPS, seed=7, epochs=1)
  (batch,) = batches
  paths[0].write_bytes(whole)
  assert batches.bad.keys() == {place}
  assert batches.bad[place].startswith(f"{paths[0]}: record {place} (clip ")
  assert len(set(numbers(batch))) == CLIPS - 1


def test_a_damaged_text_ends_the_run(paths):
  """No other text can stand in for it, and it would cost every clip with that caption."""
  (table,) = shards.paths(paths[0].parent / "text")
  damage(table, 2)
  with pytest.raises(UserError, match=f"{table}: record 2 is damaged") as error:
    list(pipeline.loader(paths, batch_size=CLIPS, seed=0, epochs=1))
  assert not isinstance(error.value, tfrecord.CorruptRecordError)


def test_texts_stay_in_memory_as_they_were_read(paths, monkeypatch):
  monkeypatch.setattr(captions, "KEPT", 2)
  table = captions.Table(paths[0].parent)
  before = table["caption 2"]
  assert not before.flags.writeable
  (shard,) = shards.paths(paths[0].parent / "text")
  damage(shard, json.loads(shards.sidecar(shard).read_text())["ids"].index("caption 2"))
  assert table["caption 2"] is before
  table["caption 0"], table["caption 1"]
  for other in (table, pickle.loads(pickle.dumps(table))):  # No longer, and never kept.
    with pytest.raises(UserError, match="is damaged"):
      other["caption 2"]


def test_a_table_leaves_its_memory_and_files_with_its_last_user(paths):
  """Each evaluation has one of its own, and the collector of cycles may come late."""
  table = captions.Table(paths[0].parent)
  source = weakref.ref(table._source)
  assert table["caption 2"].size
  gc.disable()
  try:
    del table
    assert source() is None
  finally:
    gc.enable()


@pytest.mark.parametrize("content", [None, "{", "{}", '{"ids": ["caption 1"]}'])
def test_a_table_whose_captions_are_damaged_is_one_line(paths, content):
  (shard,) = shards.paths(paths[0].parent / "text")
  if content is None:
    shards.sidecar(shard).unlink()
  else:
    shards.sidecar(shard).write_text(content)
  with pytest.raises(UserError, match="text.*encode"):
    captions.Table(paths[0].parent)


def test_the_table_of_texts_must_know_every_caption(paths):
  captions.build(["caption 1"], text, paths[0].parent, config={}, storage="bfloat16")
  with pytest.raises(UserError, match="text: it has no caption 'caption [0234]'"):
    list(pipeline.loader(paths, batch_size=CLIPS, seed=0, epochs=1))


def test_too_many_damaged_records_end_the_run(paths):
  for path in paths:
    damage(path, 0)
    damage(path, 2)
  list(pipeline.loader(paths, batch_size=CLIPS, seed=0, epochs=1, max_bad=6))
  with pytest.raises(UserError, match="damaged.*tfrecord") as error:
    list(pipeline.loader(paths, batch_size=CLIPS, seed=0, epochs=1))
  assert "\n" not in str(error.value)


def test_as_many_damaged_neighbours_as_are_put_up_with_cost_themselves_alone(paths):
  for place in (1, 2):
    damage(paths[0], place)
  batches = pipeline.loader(paths, batch_size=CLIPS, seed=0, epochs=1, max_bad=2)
  assert len(set(numbers(next(batches)))) == CLIPS - 2 and batches.bad.keys() == {1, 2}
  with pytest.raises(UserError, match="damaged"):
    list(pipeline.loader(paths, batch_size=CLIPS, seed=0, epochs=1, max_bad=1))


def test_a_wholly_damaged_dataset_does_not_loop(paths):
  for path in paths:
    for place in range(len(tfrecord.read_index(path))):
      damage(path, place)
  with pytest.raises(UserError, match="damaged"):
    next(pipeline.loader(paths, batch_size=4, seed=0, max_bad=1000))
