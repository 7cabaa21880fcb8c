"""Small shards for the tests of the loader: every clip and ear has its own numbers."""

import itertools
import pathlib

import numpy as np

from data import captions, pipeline, shards, tfrecord
from spatialv2a_jax import schema

CLIPS = 22
SHAPES = {
  "mean": (2, 4, 3),
  "std": (2, 4, 3),
  "clip": (5, 2),
  "sync": (6, 2),
  "text": (3, 2),
  "spatial": (5, 5),
}
NUMBER = {schema.clip_id(f"clip{i}"): i for i in range(CLIPS)}


def record(item: shards.Item) -> dict[str, np.ndarray | str]:
  """Ears, mirrored features and clips all differ, and are exact in 16 bits."""
  n = item.payload
  fields: dict[str, np.ndarray | str] = {
    field: np.full(shape, n, np.float32) for field, shape in SHAPES.items()
  }
  ears_e11 = np.array([0, 0.5], np.float32)[:, None, None]
  for field in ("mean", "std"):
    fields[field] = np.asarray(fields[field]) + ears_e11
  for field in ("clip", "sync"):
    fields[f"{field}_mirror"] = np.full(SHAPES[field], 100 + n, np.float16)
    fields[field] = np.asarray(fields[field]).astype("float16")
  del fields["text"]  # It stands in the table of captions, which are fewer than clips.
  fields["caption"] = f"caption {n % 5}"
  fields["spatial_mirror"] = np.float32(-n) * np.ones(SHAPES["spatial"], np.float32)
  fields["audio"] = np.full((2, 8), n * 256, np.int16) * np.array([[1], [-1]], np.int16)
  return fields


def text(caption: str) -> np.ndarray:
  return np.full(SHAPES["text"], float(caption.removeprefix("caption ")))


def damage(path: pathlib.Path, place: int) -> None:
  """Flips one bit in the payload of a record."""
  offset, length = tfrecord.read_index(path)[place].tolist()
  blob = bytearray(path.read_bytes())
  blob[offset + 12 + length // 2] ^= 1
  path.write_bytes(blob)


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
  return [NUMBER[i] for i in batch["id_b"].tolist()]


def stream(paths, steps: int, **options) -> list[int]:
  """Which clips the first steps deliver, in order."""
  batches = pipeline.loader(paths, **{"batch_size": 4, "seed": 7, **options})
  return [n for batch in itertools.islice(batches, steps) for n in numbers(batch)]


def build(folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes three shards and their texts."""
  items = [shards.Item(f"clip{i}", i) for i in range(CLIPS)]
  shards.build(items, record, folder, shards=3, config={})
  named = [f"caption {i % 5}" for i in range(CLIPS)]
  captions.build(named, text, folder, config={}, storage="bfloat16")
  return shards.paths(folder)
