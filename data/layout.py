"""What stands beside shards so that others can read them: tensorflow-datasets' two JSON files.

`features.json` names the fields of a record with their shapes and dtypes, `dataset_info.json` the
splits and the number of records in each shard; `tfds.builder_from_directory` needs no more.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data import tf_example
from spatialv2a_jax import io
from spatialv2a_jax.errors import MissingAssetError, UserError

VERSION = "1.0.0"
_CLASS = "tensorflow_datasets.core.features."


def shard_name(name: str, split: str, number: int, count: int) -> str:
  """Returns the file name of a shard, as the template in `dataset_info.json` has it."""
  return f"{name}-{split}.tfrecord-{number:05d}-of-{count:05d}"


def write_features(folder: str | pathlib.Path, fields: Mapping[str, tf_example.Tensor]) -> None:
  """Writes `features.json`, from which readers know the shapes and dtypes of all records."""
  features: dict[str, Any] = {}
  for name, (dtype, shape) in sorted(fields.items()):
    if dtype == "text":
      features[name] = {"pythonClassName": f"{_CLASS}text_feature.Text", "text": {}}
    else:
      tensor = {
        "dtype": dtype,
        "encoding": "bytes",
        "shape": {"dimensions": [str(size) for size in shape]},
      }
      features[name] = {"pythonClassName": f"{_CLASS}tensor_feature.Tensor", "tensor": tensor}
  write_json(
    pathlib.Path(folder) / "features.json",
    {
      "featuresDict": {"features": features},
      "pythonClassName": f"{_CLASS}features_dict.FeaturesDict",
    },
  )


def read_features(folder: str | pathlib.Path) -> dict[str, tf_example.Tensor]:
  """Reads `features.json`.

  Raises:
    UserError: it is missing or says something else.
  """
  path = pathlib.Path(folder) / "features.json"
  try:
    features = json.loads(path.read_text())["featuresDict"]["features"]
    return {
      name: tf_example.Tensor("text")
      if "text" in feature
      else tf_example.Tensor(
        feature["tensor"]["dtype"],
        tuple(int(size) for size in feature["tensor"]["shape"].get("dimensions", ())),
      )
      for name, feature in features.items()
    }
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path}: cannot read it ({error}); it is written with the shards") from error


def write_info(
  folder: str | pathlib.Path,
  name: str,
  description: str,
  splits: Mapping[str, Sequence[Mapping[str, int]]],
) -> None:
  """Writes `dataset_info.json`.

  Args:
    folder: of the shards.
    name: of the data set, with which the file names begin.
    description: what the data set is.
    splits: of each split the shards in order, with their "records" and "bytes".
  """
  write_json(
    pathlib.Path(folder) / "dataset_info.json",
    {
      "name": name,
      "version": VERSION,
      "description": description,
      "fileFormat": "tfrecord",
      "splits": [
        {
          "name": split,
          "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
          "numBytes": str(sum(shard["bytes"] for shard in shards)),
          "shardLengths": [str(shard["records"]) for shard in shards],
        }
        for split, shards in splits.items()
      ],
    },
  )


def write_json(path: str | pathlib.Path, content: Any) -> None:
  """Writes JSON atomically, with sorted keys: equal contents are equal bytes."""
  with io.atomic_path(path) as temporary:
    pathlib.Path(temporary).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads JSON; {} if the file is not there or damaged."""
  try:
    return json.loads(pathlib.Path(path).read_text())
  except (OSError, ValueError):
    return {}


def forget(shard: pathlib.Path) -> None:
  """Removes the manifest that knows a shard which is about to be written anew.

  It would let a part of one build and a part of the next pass for one.
  """
  manifest = shard.with_name("manifest.json")
  if any(known["file"] == shard.name for known in read_json(manifest).get("shards", ())):
    manifest.unlink(missing_ok=True)


def remove_unlisted(folder: pathlib.Path, name: str) -> None:
  """Removes the shards of a data set that a finished manifest does not list: of an earlier cut."""
  listed = {shard["file"] for found in read_manifest(folder).values() for shard in found}
  ours = re.compile(rf"({re.escape(name)}-\w+\.tfrecord-\d+-of-\d+)(\.index|\.json)?")
  for path in folder.iterdir():
    if (found := ours.fullmatch(path.name)) and found[1] not in listed:
      path.unlink()


def digest(folder: str | pathlib.Path, split: str) -> str:
  """Returns what tells the content of a split from any other one; UserError as `read_manifest`."""
  found = [(shard["file"], shard["sha256"]) for shard in read_manifest(folder).get(split, [])]
  return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def read_manifest(folder: str | pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Returns file, records, bytes and sha256 of the shards of each split.

  Raises:
    MissingAssetError: there are none.
    UserError: they are not finished.
  """
  folder = pathlib.Path(folder)
  manifest = folder / "manifest.json"
  if not manifest.exists() and not next(folder.glob("*.tfrecord-*"), None):
    inside = [name for name in ("latents", "clips", "raw") if (folder / name).is_dir()]
    hint = f"; it has {', '.join(f'{folder}/{name}' for name in inside)}" if inside else ""
    raise MissingAssetError(f"no shards in {folder}{hint}")
  found: dict[str, list[dict[str, Any]]] = {}
  try:
    for shard in json.loads(manifest.read_text())["shards"]:
      found.setdefault(shard["split"], []).append(
        {name: shard[name] for name in ("file", "records", "bytes", "sha256")}
      )
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{manifest}: cannot read it ({error}); finish building the shards") from error
  return found
