"""The rows of a batch: values of records are read straight to their place in its memory.

Those that are stored in another way than the batch has them, or mirrored, go by way of memory for
one record, which stays in the processor's cache.

Axes: b clip, e ear (0 left, 1 right); the others as in `spatialv2a_jax.schema`.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data import captions, tf_example, tfrecord
from data.kept import Kept, Key
from data.memory import Memory
from spatialv2a_jax import schema
from spatialv2a_jax.errors import UserError

MIRRORED = {  # Stored beside the field they replace.
  "clip": "clip_mirror",
  "sync": "sync_mirror",
  "spatial": "spatial_mirror",
}
EARS = ("mean", "std", "audio")  # Fields whose first axis is the ear.


@dataclasses.dataclass(frozen=True)
class Rows:
  """Reads the rows that one host has of a global batch. Pickled to workers."""

  source: tfrecord.TFRecordSource
  order: Any  # grain.MapDataset: record numbers by position, of any epoch.
  fields: Mapping[str, str]  # Name in the records -> name in the batch.
  layouts: Mapping[str, Mapping[str, tf_example.Tensor]]  # Folder -> fields of its records.
  tables: Mapping[str, captions.Table]  # Folder -> text features of its captions.
  dtypes: Mapping[str, str]  # Name in the batch -> what all folders can be in.
  straight: Mapping[str, Mapping[str, str]]  # Folder -> `fields` that are stored as in the batch.
  seed: int
  batch_size: int
  first: int
  last: int
  total: int | None
  mirror: bool
  max_bad: int
  offset: int = 0
  memory: Memory = dataclasses.field(default_factory=Memory)
  kinds: dict[str, Any] = dataclasses.field(default_factory=dict)  # Of a batch, once known.
  kept: Kept | None = None

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    """Returns this host's rows of the batch of a step."""
    start, length = self.offset + step * self.batch_size, len(self.source)
    positions = range(start + self.first, start + self.last)
    wanted = [(self.order[position], position // length) for position in positions]
    slots = self._slots(wanted)  # First: who finds some knows the kinds of a batch, too.
    batch = self.memory.arrays(self.kinds) if self.kinds else {}
    if self.kept:
      self.kept.copy(slots, batch)
    missing = [row for row in range(len(wanted)) if row not in slots]
    places = self.source.find([wanted[row][0] for row in missing])
    self.source.advise(places)
    bad: list[int] = []
    room = _Room(np.empty(self.source.longest, np.uint8), _bytes(batch))
    for row, place in zip(missing, places, strict=True):
      place, clip, example, skipped = self._read(place, wanted[row][1], row, room)
      if not batch:
        kinds = {name: self._kind(name, value) for name, value in example.items()}
        self.kinds.update({**kinds, "weight_b": ((len(positions),), np.dtype(np.float32))})
        batch = self.memory.arrays(self.kinds)
        room.rows_bx |= _bytes(batch)
      for name, value in example.items():  # Before the next record takes its place in the room.
        same = value.dtype == batch[name].dtype
        batch[name][row] = value if same else schema.as_float32(value)
      if self.kept:
        self.kept.add(self._key(place.index, wanted[row][1], clip), clip, batch, row)
      bad += skipped
    batch["weight_b"][:] = [self.total is None or p < self.total for p in positions]
    return {**batch, "bad_records": np.array(bad, np.int64)}

  def _kind(self, name: str, value: np.ndarray) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and dtype of the array of a batch that takes a value from each clip."""
    dtype = np.dtype(self.dtypes.get(name, value.dtype))
    shape = value.shape if dtype == value.dtype else schema.shape_of(value)
    return (self.last - self.first, *shape), dtype

  def _key(self, record: int, epoch: int, clip: str) -> Key:
    return Key(record, self.mirror and is_mirrored(self.seed, epoch, clip))

  def _slots(self, wanted: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Returns where rows are kept, as far as they are, by their place in the batch."""
    found: dict[int, int] = {}
    if self.kept is None:
      return found
    for row, (record, epoch) in enumerate(wanted):
      clip = self.kept.clips.get(record)
      slot = None if clip is None else self.kept.find(self._key(record, epoch, clip))
      if slot is not None:
        found[row] = slot
    return found

  def _read(
    self, place: tfrecord.Place, epoch: int, row: int, room: "_Room"
  ) -> tuple[tfrecord.Place, str, dict[str, np.ndarray], list[int]]:
    """Reads a record, or the next intact one, into a row.

    Returns:
      which record, whose clip, what is still to be copied to the row, which records were skipped.
    """
    skipped = []
    while True:
      try:
        return place, *self._clip(place, epoch, row, room), skipped
      except tfrecord.CorruptRecordError:
        skipped.append(place.index)
        if len(skipped) > self.max_bad:
          raise
        [place] = self.source.find([(place.index + 1) % len(self.source)])

  def _clip(
    self, place: tfrecord.Place, epoch: int, row: int, room: "_Room"
  ) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the clip of a record, and those of its values that are not in their row yet."""
    folder, fields = self.folder(place), self.fields
    straight, framing = self.straight.get(folder, {}), tf_example.framing(place.length)
    parts = room.parts(row, folder, framing, straight) if framing else None
    raw = None
    if framing and parts:
      self.source.read(place, parts)
      raw = framing.rest(room.record_x.data, straight)
      fields = {field: name for field, name in self.fields.items() if field not in straight}
    if raw is None:
      payload, fields = room.record_x[: place.length], self.fields
      self.source.read(place, [payload])
      raw = self.decode(place, payload.data)
    clip = self.clip(place, raw)
    return clip, self.parse(place, clip, raw, epoch, fields)

  def parse(
    self,
    place: tfrecord.Place,
    clip: str,
    raw: Mapping[str, memoryview],
    epoch: int,
    fields: Mapping[str, str],
  ) -> dict[str, np.ndarray]:
    """Returns some of the `fields` of one clip by their names in a batch, as views of `raw`."""
    folder = self.folder(place)
    stored = self.layouts[folder]
    mirrored = self.mirror and is_mirrored(self.seed, epoch, clip)
    example: dict[str, Any] = {"id_b": np.uint32(schema.clip_id(clip))}
    for wanted, name in fields.items():
      field = wanted.removesuffix("_mirror")
      source = MIRRORED.get(field, field) if mirrored != (field != wanted) else field
      value = self.value(place, raw, stored, source if source in stored else "caption")
      if isinstance(value, str):
        value = self.tables[folder][value]
      if mirrored and field in EARS:
        value = value[::-1]
      example[name] = value
    return example

  def decode(self, place: tfrecord.Place, payload: bytes | memoryview) -> dict[str, memoryview]:
    """Returns the bytes of each field of a record; UserError if it is none."""
    try:
      return tf_example.decode(payload)
    except ValueError as error:
      raise self._unreadable(place, f" cannot be read ({error})") from error

  def clip(self, place: tfrecord.Place, raw: Mapping[str, memoryview]) -> str:
    """Returns the id of a record; UserError if it has none."""
    try:
      return bytes(raw["id"]).decode()
    except (ValueError, KeyError) as error:
      raise self._unreadable(place, f" cannot be read ({error})") from error

  def value(
    self,
    place: tfrecord.Place,
    raw: Mapping[str, memoryview],
    fields: Mapping[str, tf_example.Tensor],
    field: str,
  ) -> np.ndarray | str:
    """Returns a field of a record; UserError if it is missing or has another size."""
    try:
      if field in raw:
        return tf_example.value_of(raw[field], fields[field])
      problem = f" has no field {field}, only {sorted(raw)}"
    except ValueError as error:
      problem = f", field {field}: {error}"
    raise self._unreadable(place, problem)

  def folder(self, place: tfrecord.Place) -> str:
    """Returns the folder of a record's shard, which names its layout."""
    return _folder(self.source.paths[place.shard])

  def _unreadable(self, place: tfrecord.Place, problem: str) -> UserError:
    return UserError(f"{self.source.paths[place.shard]}: record {place.record}{problem}")


def _bytes(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the bytes of the arrays of a batch, [b, x]."""
  return {name: x.reshape(len(x), -1).view(np.uint8) for name, x in batch.items()}


_folder = functools.lru_cache(1 << 16)(os.path.dirname)


@dataclasses.dataclass
class _Room:
  """Where the records of a batch are read to.

  Attributes:
    record_x: uint8, as long as the longest record, for what has no place in the batch.
    rows_bx: the bytes of the batch's arrays, by name; none until its size is known.
  """

  record_x: np.ndarray
  rows_bx: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  _known: dict[tuple[str, int], Any] = dataclasses.field(default_factory=dict)

  def parts(
    self, row: int, folder: str, framing: tf_example.Framing, straight: Mapping[str, str]
  ) -> list[np.ndarray] | None:
    """Returns the memory for a record of a framing; None if not all of `straight` has a place."""
    key = folder, framing.length
    known, places = self._known.get(key, (None, None))
    if known is not framing:
      if not self.rows_bx.keys() >= set(straight.values()):
        return None
      places = framing.parts({field: len(self.rows_bx[x][0]) for field, x in straight.items()})
      self._known[key] = framing, places  # The same for all rows.
    if places is None:
      return None
    return [
      self.record_x[x] if isinstance(x, slice) else self.rows_bx[straight[x]][row] for x in places
    ]


def is_mirrored(seed: int, epoch: int, clip: str) -> bool:
  """Returns whether a clip is mirrored in an epoch: a fair coin of (seed, epoch, clip)."""
  return bool(hashlib.blake2b(f"{seed}/{epoch}/{clip}".encode(), digest_size=1).digest()[0] & 1)
