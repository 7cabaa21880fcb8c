"""TFRecord shards without TensorFlow: framing, index sidecars, random access.

A record is its length (uint64), the masked CRC-32C of the length, the payload and the masked
CRC-32C of the payload, all little-endian: the same bytes as `tf.io.TFRecordWriter`'s. What a
payload holds is the matter of `data.tf_example`.

Axes: r record; column 0 the record's offset in its shard, column 1 the length of its payload.
"""

import contextlib
import errno
import functools
import hashlib
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from spatialv2a_jax import io
from spatialv2a_jax.errors import DamagedAssetError, UserError

HEADER, FOOTER = 12, 4
ADVICE = 1 << 17  # Bytes; of one piece of advice many systems heed no more.
MAX_OPEN_FILES = 128  # Of 1024 that a process usually may open, for a thousand shards.


class CorruptRecordError(DamagedAssetError):
  """A record whose checksum does not match its bytes.

  Attributes:
    path: the shard.
    record: its position in the shard.
  """

  def __init__(self, path: str, record: int, why: str):
    super().__init__(f"{path}: record {record} is damaged ({why}); restore the shard")
    self.path, self.record, self.why = path, record, why

  def __reduce__(self):
    return type(self), (self.path, self.record, self.why)


class Place(NamedTuple):
  """Where a record is.

  Attributes:
    index: its number among all of a source.
    shard: number of its shard.
    record: its position there.
    offset: of its first byte.
    length: of its payload.
  """

  index: int
  shard: int
  record: int
  offset: int
  length: int


def masked_crc(data: bytes) -> bytes:
  """Returns the four bytes of the checksum that TFRecord stores."""
  return _masked(google_crc32c.value(data))


def _masked(crc: int) -> bytes:
  return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.lru_cache
def _header(length: int) -> bytes:
  """Returns the length of a payload and the checksum of it."""
  packed = struct.pack("<Q", length)
  return packed + masked_crc(packed)


def frame(payload: bytes) -> bytes:
  """Returns the payload as one TFRecord."""
  return b"".join([_header(len(payload)), payload, masked_crc(payload)])


def write(path: str | pathlib.Path, payloads: Iterable[bytes]) -> str:
  """Writes a shard and its index, each under a temporary name first.

  Args:
    path: the shard; the index goes to `<path>.index`.
    payloads: one per record.

  Returns:
    The SHA-256 of the shard, in hexadecimal.
  """
  rows, offset, digest = [], 0, hashlib.sha256()
  with io.atomic_path(path) as temporary, open(temporary, "wb") as file:
    for payload in payloads:
      record = frame(payload)
      file.write(record)
      digest.update(record)
      rows.append((offset, len(payload)))
      offset += len(record)
  _write_index(path, np.array(rows, np.int64).reshape(-1, 2))
  return digest.hexdigest()


def read_index(path: str | pathlib.Path) -> np.ndarray:
  """Returns int64 [r, 2] for a shard, from its sidecar or, if that is missing or stale, by a scan.

  Raises:
    UserError: the shard is missing, cut short, or not a TFRecord file.
  """
  try:
    size = os.path.getsize(path)
  except OSError as error:
    raise UserError(f"{path}: cannot read the shard ({error.strerror})") from error
  known_r2 = _load_index(path)
  if known_r2 is not None and _end(known_r2) == size:
    return known_r2
  index_r2 = _scan(path, size)
  kept = len(index_r2)
  if known_r2 is not None and len(known_r2) > kept and np.array_equal(known_r2[:kept], index_r2):
    raise _truncated(path, kept, f" of {len(known_r2)}")
  try:
    _write_index(path, index_r2)
  except OSError:  # A read-only folder: the scan is repeated next time.
    pass
  return index_r2


class TFRecordSource:
  """Random access to the records of some shards, as Grain wants it: `len`, `[]`, picklable.

  Files are opened lazily in each process; threads may share a source. Both checksums of a record
  are verified whenever it is read.

  Attributes:
    paths: the shards.
    longest: bytes of the longest record, checksums included.
  """

  def __init__(self, paths: Sequence[str | pathlib.Path]):
    """Reads or rebuilds the indices.

    Args:
      paths: shards, in the order that numbers their records.

    Raises:
      UserError: a shard is missing or cut short.
    """
    self.paths = [str(path) for path in paths]
    indices = [read_index(path) for path in self.paths]
    self._starts = np.cumsum([0, *(len(index_r2) for index_r2 in indices)])
    self._index_r2 = np.concatenate([np.empty((0, 2), np.int64), *indices])
    self.longest = HEADER + int(self._index_r2[:, 1].max(initial=0)) + FOOTER

  def __len__(self) -> int:
    return len(self._index_r2)

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name != "_open"}

  @functools.cached_property
  def _open(self):
    # A file leaves the cache by losing a reference; a thread that still reads it holds another.
    return functools.lru_cache(MAX_OPEN_FILES)(functools.partial(open, mode="rb", buffering=0))

  def find(self, indices: Sequence[int]) -> list[Place]:
    """Returns where records are, all at once; IndexError if there is no such record."""
    index_r = np.asarray(indices, np.int64)
    if index_r.size and not 0 <= index_r.min() <= index_r.max() < len(self):
      raise IndexError(f"record {index_r.min()} or {index_r.max()} of {len(self)}")
    shard_r = np.searchsorted(self._starts, index_r, side="right") - 1
    columns = (index_r, shard_r, index_r - self._starts[shard_r], *self._index_r2[index_r].T)
    return [Place(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

  def locate(self, index: int) -> tuple[str, int]:
    """Returns the shard of a record and its position there."""
    [place] = self.find([index])
    return self.paths[place.shard], place.record

  def __getitem__(self, index: int) -> bytes:
    """Returns the payload of a record.

    Raises:
      CorruptRecordError: a checksum does not match, or the disk cannot read it.
      UserError: the index is that of another shard, which may also be gone.
    """
    [place] = self.find([index])
    payload = np.empty(place.length, np.uint8)
    self.read(place, [payload])
    return payload.tobytes()

  def read(self, place: Place, parts: Sequence[np.ndarray]) -> None:
    """Reads the payload of a record into uint8 arrays, one after the other; raises as `[]`.

    Args:
      place: from `find`.
      parts: together as long as the payload.
    """
    header, footer = bytearray(HEADER), bytearray(FOOTER)
    path = self.paths[place.shard]
    memory = [header, *(part.data for part in parts), footer]
    try:
      file = self._open(path)  # A file that is held stays open.
      got = os.preadv(file.fileno(), memory, place.offset)
    except OSError as error:
      if error.errno == errno.EIO:  # Of these bytes; another record may be read.
        raise CorruptRecordError(path, place.record, str(error.strerror)) from error
      raise UserError(f"{path}: cannot read the shard ({error.strerror})") from error
    if got != HEADER + place.length + FOOTER:
      raise CorruptRecordError(path, place.record, "the file ends inside it")
    if header != _header(place.length):
      if masked_crc(bytes(header[:8])) != header[8:]:
        raise CorruptRecordError(path, place.record, "checksum of the length")
      raise UserError(f"{path}: {path}.index belongs to another shard; delete the index")
    if _masked(functools.reduce(google_crc32c.extend, parts, 0)) != footer:
      raise CorruptRecordError(path, place.record, "checksum of the payload")

  def advise(self, places: Iterable[Place]) -> None:
    """Has the system fetch records at the same time, ahead of their reading, where it can."""
    with contextlib.suppress(OSError):  # Of a file that cannot be read, reading will say so.
      for place in places if hasattr(os, "posix_fadvise") else ():
        file = self._open(self.paths[place.shard])
        for start in range(place.offset, place.offset + HEADER + place.length + FOOTER, ADVICE):
          os.posix_fadvise(file.fileno(), start, ADVICE, os.POSIX_FADV_WILLNEED)


def _scan(path: str | pathlib.Path, size: int) -> np.ndarray:
  """Follows the lengths from record to record, reading 12 bytes of each."""
  rows, offset = [], 0
  try:
    opened = open(path, "rb")
  except OSError as error:
    raise UserError(f"{path}: cannot read the shard ({error.strerror})") from error
  with opened as file:
    while offset < size:
      file.seek(offset)
      header = file.read(HEADER)
      if len(header) < HEADER:
        raise _truncated(path, len(rows))
      if masked_crc(header[:8]) != header[8:]:
        raise UserError(
          f"{path}: the length of record {len(rows)} is damaged and there is no index to go past"
          f" it; {len(rows)} records before it are intact; restore the shard"
        )
      length = struct.unpack("<Q", header[:8])[0]
      rows.append((offset, length))
      offset += HEADER + length + FOOTER
      if offset > size:
        raise _truncated(path, len(rows) - 1)
  return np.array(rows, np.int64).reshape(-1, 2)


def _truncated(path: str | pathlib.Path, intact: int, of: str = "") -> UserError:
  return UserError(f"{path}: the shard is cut short, {intact}{of} records are intact; restore it")


def _end(index_r2: np.ndarray) -> int:
  return int(index_r2[-1].sum()) + HEADER + FOOTER if len(index_r2) else 0


def index_path(path: str | pathlib.Path) -> pathlib.Path:
  """Returns the sidecar of a shard that holds the offsets of its records."""
  return pathlib.Path(f"{path}.index")


def _load_index(path: str | pathlib.Path) -> np.ndarray | None:
  try:
    with open(index_path(path), "rb") as file:
      index_r2 = np.load(file, allow_pickle=False)
  except (OSError, ValueError, EOFError):
    return None
  return index_r2 if index_r2.ndim == 2 and index_r2.shape[1] == 2 else None


def _write_index(path: str | pathlib.Path, index_r2: np.ndarray) -> None:
  with io.atomic_path(index_path(path)) as temporary, open(temporary, "wb") as file:
    np.save(file, index_r2)
