import pathlib

import numpy as np
import pytest

from data import captions, pipeline, shards
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
