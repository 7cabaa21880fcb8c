"""Values that are read straight into a batch are those that the records hold."""

import itertools

import numpy as np
import pytest

from data import pipeline, rows, shards, tf_example, tfrecord
from spatialv2a_jax import schema
from spatialv2a_jax.errors import UserError
from tests.loader_shards import SHAPES, damage


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Two folders; records of one length with other lengths of ids; `mean` in 32 and in 16 bits."""
  root = tmp_path_factory.mktemp("rows")

  def record(item: shards.Item) -> shards.Record:
    rng = np.random.default_rng(item.payload)
    fields: dict[str, np.ndarray | str] = {
      name: rng.integers(-99, 99, shape).astype("float16") for name, shape in SHAPES.items()
    }
    if item.payload < 100:
      fields["mean"] = rng.standard_normal(SHAPES["mean"], np.float32)
    return {**fields, "caption": "x" * (20 - len(item.id))}

  for first in (0, 100):
    items = [shards.Item("n" * (1 + i // 4 % 3) + f"{first + i:03d}", first + i) for i in range(24)]
    shards.build(items, record, root / f"{first}", shards=2, config={})
  return [shards.paths(root / f"{first}") for first in (0, 100)]


def stored(paths) -> dict[int, dict[str, np.ndarray]]:
  """Returns the fields of each clip by its id, parsed one record at a time."""
  source, found = tfrecord.TFRecordSource(paths), {}
  for i in range(len(source)):
    raw = tf_example.decode(source[i])
    tensor = {
      name: tf_example.Tensor(
        "float32" if len(raw[name]) == 96 and name == "mean" else "float16", x
      )
      for name, x in SHAPES.items()
    }
    found[schema.clip_id(bytes(raw["id"]).decode())] = {
      name: np.asarray(tf_example.value_of(raw[name], x)) for name, x in tensor.items()
    }
  return found


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_a_batch_is_what_its_records_hold(folders, which):
  paths = [path for i in which for path in folders[i]]
  expected, seen = stored(paths), set()
  batches = pipeline.loader(paths, batch_size=8, seed=2, shapes=SHAPES)
  for batch in itertools.islice(batches, 12):
    assert batch["mean_betc"].dtype == ("float16" if which == (1,) else "float32")
    for row, clip in enumerate(batch["id_b"].tolist()):
      seen.add(clip)
      for field, name in schema.AXES.items():
        np.testing.assert_array_equal(batch[name][row], expected[clip][field])
  assert seen == expected.keys()


def test_only_what_is_stored_otherwise_is_copied(folders, monkeypatch):
  """The first row of a batch is: it says how large the batch is."""
  read, taken = tfrecord.TFRecordSource.read, []

  def listen(source, place, parts):
    taken.append(parts)
    read(source, place, parts)

  monkeypatch.setattr(tfrecord.TFRecordSource, "read", listen)
  batch = next(pipeline.loader(folders[0], batch_size=12, seed=2, shapes=SHAPES))
  straight = {
    name for name in batch for parts in taken for x in parts if np.shares_memory(x, batch[name])
  }
  assert straight == set(schema.AXES.values())


def test_the_records_of_a_batch_are_asked_for_before_the_first_is_read(folders, monkeypatch):
  """The disk then fetches them at the same time."""
  heard, read = [], tfrecord.TFRecordSource.read

  def listen(source, place, parts):
    heard.append((source, place))
    read(source, place, parts)

  monkeypatch.setattr(tfrecord.TFRecordSource, "read", listen)
  monkeypatch.setattr(tfrecord.TFRecordSource, "advise", lambda *given: heard.append(given))
  batches = pipeline.loader(folders[0], batch_size=48, seed=2, shapes=SHAPES, epochs=1, rows=(3, 9))
  assert len(list(batches)) == 1
  # Threads of earlier tests may still read ahead.
  asked, *rest = (what for source, what in heard if source is batches._source)
  assert len(asked) == 6 and list(dict.fromkeys(rest)) == asked


def test_coins_are_those_of_every_version():
  """A run goes on with the clips mirrored that it would have had."""
  coins = [rows.is_mirrored(7, epoch, f"clip{n}") for epoch in (0, 3) for n in range(12)]
  assert "".join(map(str, map(int, coins))) == "100111000011111010111001"


def test_damage_leaves_its_row_to_the_next_record(folders, tmp_path):
  paths = [tmp_path / path.name for path in folders[0]]
  for path in folders[0][0].parent.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  expected = stored(paths)
  damage(paths[0], 3)
  damaged = next(
    batch
    for batch in pipeline.loader(paths, batch_size=24, seed=0, shapes=SHAPES)
    if len(set(batch["id_b"].tolist())) == 23
  )
  for row, clip in enumerate(damaged["id_b"].tolist()):
    np.testing.assert_array_equal(damaged["clip_bvf"][row], expected[clip]["clip"])


def test_what_a_record_lacks_is_missed_even_if_one_like_it_was_seen(tmp_path):
  """Else its row would keep what an earlier batch had there."""

  def record(item: shards.Item) -> shards.Record:
    return {name: np.ones(shape, np.float16) for name, shape in SHAPES.items()}

  shards.build([shards.Item(f"{i}", i) for i in range(8)], record, tmp_path, shards=1, config={})
  [path] = shards.paths(tmp_path)
  payloads = list(map(tfrecord.TFRecordSource([path]).__getitem__, range(8)))
  raw = {name: np.frombuffer(x, np.uint8) for name, x in tf_example.decode(payloads[3]).items()}
  del raw["std"]
  payloads[3] = tf_example.encode(raw)
  tf_example.decode(payloads[3])
  tfrecord.write(path, payloads)
  with pytest.raises(UserError, match="record 3 has no field std"):
    next(pipeline.loader([path], batch_size=8, seed=None, shapes=SHAPES))
