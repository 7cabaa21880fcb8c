import pathlib

import numpy as np
import pytest

from data import captions, pipeline, shards
from spatialv2a_jax import microscaling, schema
from tests.loader_shards import SHAPES, build, numbers, record, text


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[pathlib.Path]:
  return build(tmp_path_factory.mktemp("shards"))


def test_batches_keep_the_dtypes_of_the_records(built):
  batch = next(pipeline.loader(built, batch_size=4, seed=0, shapes=SHAPES))
  assert {name: x.dtype.name for name, x in batch.items()} == {
    "id_b": "uint32",
    "weight_b": "float32",
    "mean_betc": "float32",
    "std_betc": "float32",
    "clip_bvf": "float16",
    "sync_bsf": "float16",
    "text_bwf": "bfloat16",
    "spatial_bvk": "float32",
  }
  assert all(x.ctypes.data % 64 == 0 for name, x in batch.items())


def test_folders_of_other_dtypes_meet_in_32_bits(built, tmp_path):
  """Whatever clips a batch happens to have: its dtypes are part of the compiled step."""

  def wide(item):
    fields = record(item)
    fields["sync"] = np.asarray(fields["sync"]).astype("bfloat16")
    fields["clip_mirror"] = np.asarray(fields["clip_mirror"]).astype(np.float32)
    return fields

  shards.build([shards.Item("clip1", 1)], wide, tmp_path, shards=1, config={})
  captions.build(["caption 1"], text, tmp_path, config={}, storage="float32")
  paths = [*built, *shards.paths(tmp_path)]
  names = ("sync_bsf", "text_bwf", "clip_bvf")
  for mirror, expected in ((False, ["float32", "float32", "float16"]), (True, 3 * ["float32"])):
    for batch in pipeline.loader(paths, batch_size=1, seed=0, epochs=1, mirror=mirror):
      assert [batch[name].dtype.name for name in names] == expected
      assert np.all(batch["text_bwf"] == numbers(batch)[0] % 5)
      assert np.all(batch["sync_bsf"] % 100 == numbers(batch)[0])


def as_mxint8(item: shards.Item) -> dict[str, np.ndarray | str]:
  """What `record` holds, in 8 bits: 128 and more would be rounded."""
  fields = record(item)
  for field in ("clip", "sync", "clip_mirror", "sync_mirror"):
    fields[field] = microscaling.pack(np.asarray(fields[field]))
  return fields


@pytest.mark.parametrize("mirror", [False, True])
def test_features_in_8_bits_reach_the_devices_as_such(built, tmp_path, mirror):
  shards.build(
    [shards.Item(f"clip{i}", i) for i in range(8)], as_mxint8, tmp_path, shards=1, config={}
  )
  captions.build([f"caption {i}" for i in range(5)], text, tmp_path, config={}, storage="mxint8")
  short, mixed = (
    list(pipeline.loader(paths, batch_size=2, seed=0, epochs=1, mirror=mirror, shapes=SHAPES))
    for paths in (shards.paths(tmp_path), [*built, *shards.paths(tmp_path)])
  )
  names = ("clip_bvf", "sync_bsf", "text_bwf")
  for batch in short:
    schema.check_batch(batch, SHAPES)
    assert [batch[name].dtype.name for name in names] == 3 * ["int8"]
  assert {batch[name].dtype.name for batch in mixed for name in names} == {"float32"}
  for batch in map(schema.widen, [*short, *mixed]):
    for row, n in enumerate(numbers(batch)):
      seen = {*batch["clip_bvf"][row].flat, *batch["sync_bsf"][row].flat}
      assert len(seen) == 1 and seen <= ({n, 100 + n} if mirror else {n})
      assert np.all(batch["text_bwf"][row] == n % 5)
