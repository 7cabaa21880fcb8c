"""What stands beside shards."""

import json
import os
import pathlib

import numpy as np
import pytest

from data import layout, shards, tfrecord
from spatialv2a_jax.errors import UserError
from tests.data.test_shards import ITEMS, build


def test_what_tensorflow_datasets_is_told(tmp_path):
  """The two files as it writes them itself, of which it needs no code of ours."""
  items = [item._replace(split="test" if item.payload < 6 else "train") for item in ITEMS]
  build(tmp_path, items=items, name="mine", description="Clips.")
  info = json.loads((tmp_path / "dataset_info.json").read_text())
  assert (info["name"], info["version"], info["fileFormat"]) == ("mine", "1.0.0", "tfrecord")
  assert info["description"] == "Clips." and [s["name"] for s in info["splits"]] == [
    "test",
    "train",
  ]
  for split in info["splits"]:
    template = split["filepathTemplate"]
    counts = [int(length) for length in split["shardLengths"]]
    for number, count in enumerate(counts):
      fields = {"{DATASET}": "mine", "{SPLIT}": split["name"], "{FILEFORMAT}": "tfrecord"}
      name = template.replace("{SHARD_X_OF_Y}", f"{number:05d}-of-{len(counts):05d}")
      for field, value in fields.items():
        name = name.replace(field, value)
      assert len(tfrecord.read_index(tmp_path / name)) == count
    files = tmp_path.glob(f"mine-{split['name']}.tfrecord-*-of-00003")
    assert int(split["numBytes"]) == sum(path.stat().st_size for path in files)
  features = json.loads((tmp_path / "features.json").read_text())
  assert features["pythonClassName"].endswith("features_dict.FeaturesDict")
  assert features["featuresDict"]["features"]["x"] == {
    "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
    "tensor": {"dtype": "float16", "encoding": "bytes", "shape": {"dimensions": ["2", "3"]}},
  }


def test_tensorflow_datasets_reads_the_folder(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  build(tmp_path)
  info = tfds.builder_from_directory(str(tmp_path)).info
  assert info.splits["train"].num_examples == 20
  assert [pathlib.Path(p).name for p in info.splits["train"].filepaths] == [
    path.name for path in shards.paths(tmp_path)
  ]
  example = info.features.deserialize_example_np(tfrecord.TFRecordSource(shards.paths(tmp_path))[0])
  number = int(example["id"].decode().removeprefix("clip"))
  np.testing.assert_array_equal(example["x"], np.full((2, 3), number, np.float16))
  assert example["x"].dtype == np.float16 and example["caption"].decode() == f"clip {number}"


def test_a_missing_shard_or_manifest_is_named(tmp_path):
  with pytest.raises(UserError, match=f"no shards in {tmp_path}"):
    shards.paths(tmp_path)
  build(tmp_path)
  shards.paths(tmp_path)[2].unlink()
  with pytest.raises(UserError, match="1 shards are missing.*00002-of-00003"):
    shards.paths(tmp_path)


def test_a_shard_that_lacks_a_record_is_refused_also_without_its_index(tmp_path):
  """An index that is made anew cannot know what was there."""
  build(tmp_path)
  path = shards.paths(tmp_path)[1]
  offset = int(tfrecord.read_index(path)[-1, 0])
  os.truncate(path, offset)
  tfrecord.index_path(path).unlink()
  with pytest.raises(UserError, match=rf"{path.name}: the shard is cut short, {offset} of \d+ byt"):
    shards.paths(tmp_path)
  path.write_bytes(bytes(10**6))
  with pytest.raises(UserError, match=f"{path.name}: the shard is of another build"):
    shards.paths(tmp_path)


def test_the_digest_tells_one_content_from_another(tmp_path):
  for name, config in (("a", 1), ("b", 1), ("c", 2)):
    build(tmp_path / name, config={"seed": config})
  digests = [layout.digest(tmp_path / name, "train") for name in "abc"]
  assert digests[0] == digests[1]
  manifest = tmp_path / "c" / "manifest.json"
  manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
  assert layout.digest(tmp_path / "c", "train") != digests[0]
