"""TFRecord shards without TensorFlow: framing, index sidecars, random access, `tf.train.Example`.

A record is its length (uint64), the masked CRC-32C of the length, the payload and the masked
CRC-32C of the payload, all little-endian: the same bytes as `tf.io.TFRecordWriter`'s. A payload is
a `tf.train.Example` whose features are `bytes_list`s of one value: a tensor's raw little-endian
bytes, or text; their shapes and dtypes stand beside the shards (`data.shards`).

Axes: r record; column 0 the record's offset in its shard, column 1 the length of its payload.
"""

import functools
import hashlib
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c
import ml_dtypes  # noqa: F401  (makes numpy know "bfloat16")
import numpy as np

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError

HEADER, FOOTER = 12, 4
MAX_FRAMINGS = 1024  # Ids and captions of other lengths make other ones.
MAX_OPEN_FILES = 128  # Of 1024 that a process usually may open, for a thousand shards.


class CorruptRecordError(UserError):
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


class Tensor(NamedTuple):
  """What `features.json` says of one field; `dtype` "text" marks a string."""

  dtype: str
  shape: tuple[int, ...] = ()


def masked_crc(data: bytes | np.ndarray) -> bytes:
  """Returns the four bytes of the checksum that TFRecord stores."""
  crc = google_crc32c.value(data)
  return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def frame(payload: bytes) -> bytes:
  """Returns the payload as one TFRecord."""
  length = struct.pack("<Q", len(payload))
  return b"".join([length, masked_crc(length), payload, masked_crc(payload)])


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
    self._indices = [read_index(path) for path in self.paths]
    self._starts = np.cumsum([0, *(len(index_r2) for index_r2 in self._indices)])
    lengths = [int(index_r2[:, 1].max()) for index_r2 in self._indices if len(index_r2)]
    self.longest = HEADER + max(lengths, default=0) + FOOTER

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __repr__(self) -> str:
    return f"TFRecordSource({len(self.paths)} shards, {len(self)} records)"

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name != "_open"}

  @functools.cached_property
  def _open(self):
    # A file leaves the cache by losing a reference; a thread that still reads it holds another.
    return functools.lru_cache(MAX_OPEN_FILES)(functools.partial(open, mode="rb", buffering=0))

  def locate(self, index: int) -> tuple[str, int]:
    """Returns the shard of a record and its position there."""
    shard, record = self._locate(index)
    return self.paths[shard], record

  def _locate(self, index: int) -> tuple[int, int]:
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    shard = int(np.searchsorted(self._starts, index, side="right")) - 1
    return shard, index - int(self._starts[shard])

  def __getitem__(self, index: int) -> bytes:
    """Returns the payload of a record.

    Raises:
      CorruptRecordError: a checksum does not match.
      UserError: the index is that of another shard.
    """
    place, file, offset, length = self._find(index)
    descriptor = file.fileno()
    header = os.pread(descriptor, HEADER, offset)
    payload = os.pread(descriptor, length, offset + HEADER)  # Apart: a slice would copy it.
    footer = os.pread(descriptor, FOOTER, offset + HEADER + length)
    _verify(*place, length, header, payload, footer)
    return payload

  def read(self, index: int, room: np.ndarray) -> memoryview:
    """Returns the payload of a record as part of `room`, uint8 [`longest`]; raises as `[]`.

    Memory that is used again and again stays in the processor's cache.
    """
    place, file, offset, length = self._find(index)
    got = os.preadv(file.fileno(), [room[: HEADER + length + FOOTER].data], offset)
    header, payload, footer = room[:HEADER], room[HEADER : HEADER + length], room[HEADER + length :]
    kept = min(max(got - HEADER - length, 0), FOOTER)
    _verify(*place, length, header.tobytes()[:got], payload, footer[:kept].tobytes())
    return payload.data

  def _find(self, index: int) -> tuple[tuple[str, int], Any, int, int]:
    """Returns where a record is: shard and position there, its file, offset, length."""
    shard, record = self._locate(int(index))
    path = self.paths[shard]
    offset, length = self._indices[shard][record].tolist()
    return (path, record), self._open(path), offset, length  # A file that is held stays open.


def _verify(
  path: str, record: int, length: int, header: bytes, payload: bytes | np.ndarray, footer: bytes
) -> None:
  """Raises CorruptRecordError or UserError if what was read is no record of that length."""
  if len(header) + len(payload) + len(footer) != HEADER + length + FOOTER:
    raise CorruptRecordError(path, record, "the file ends inside it")
  if masked_crc(header[:8]) != header[8:]:
    raise CorruptRecordError(path, record, "checksum of the length")
  if struct.unpack("<Q", header[:8])[0] != length:
    raise UserError(f"{path}: {path}.index belongs to another shard; delete the index")
  if masked_crc(payload) != footer:
    raise CorruptRecordError(path, record, "checksum of the payload")


def encode_example(fields: Mapping[str, np.ndarray | str]) -> bytes:
  """Returns a serialised `tf.train.Example`, keys sorted as in protobuf's deterministic mode."""
  entries = []
  for name, value in sorted(fields.items()):
    raw = value.encode() if isinstance(value, str) else _little_endian(value).tobytes()
    bytes_list = _delimited(1, _delimited(1, raw))
    entries.append(_delimited(1, _delimited(1, name.encode()) + _delimited(2, bytes_list)))
  return _delimited(1, b"".join(entries))


def decode_example(payload: bytes | memoryview) -> dict[str, memoryview]:
  """Returns the bytes of each feature of a serialised `tf.train.Example`, without copying them.

  Raises:
    ValueError: not an Example, or a feature is not a `bytes_list` of one value.
  """
  message = memoryview(payload)
  known = _framings.get(len(message))
  if known is None or not all(message[a:b] == framing for a, b, framing in known.framing):
    known = _Framing.of(message)
    if len(_framings) >= MAX_FRAMINGS:
      _framings.clear()
    _framings[len(message)] = known
  return {name: message[a:b] for name, (a, b) in known.spans.items()}


def _parse(message: memoryview) -> dict[str, tuple[int, int]]:
  """Returns where the value of each feature of an Example is."""
  fields = {}
  for features in _spans(message, 0, len(message), 1):
    for entry in _spans(message, *features, 1):
      name = b"".join(message[slice(*span)] for span in _spans(message, *entry, 1)).decode()
      values = [
        value
        for feature in _spans(message, *entry, 2)
        for bytes_list in _spans(message, *feature, 1)
        for value in _spans(message, *bytes_list, 1)
      ]
      if len(values) != 1:
        raise ValueError(f"feature {name!r} is not a bytes_list of one value")
      fields[name] = values[0]
  return fields


class _Framing(NamedTuple):
  """What an Example is besides its values: the same in most records of a data set.

  Where the values are follows from these bytes alone, so that records which agree in them need not
  be parsed again.
  """

  spans: dict[str, tuple[int, int]]
  framing: list[tuple[int, int, bytes]]

  @classmethod
  def of(cls, message: memoryview) -> "_Framing":
    spans = _parse(message)
    ends = [0, *(edge for span in sorted(spans.values()) for edge in span), len(message)]
    gaps = zip(ends[::2], ends[1::2], strict=True)
    return cls(spans, [(a, b, bytes(message[a:b])) for a, b in gaps])


_framings: dict[int, _Framing] = {}  # By the length of the record.


def value_of(raw: memoryview, tensor: Tensor) -> np.ndarray | str:
  """Returns a decoded feature as the text or tensor that `features.json` says it is.

  Raises:
    ValueError: the number of bytes is another.
  """
  if tensor.dtype == "text":
    return bytes(raw).decode()
  dtype, size = _kind(tensor)
  if len(raw) != size:
    raise ValueError(f"{len(raw)} bytes, but features.json says {tensor.dtype} {tensor.shape}")
  return np.frombuffer(raw, dtype).reshape(tensor.shape)


@functools.lru_cache
def _kind(tensor: Tensor) -> tuple[np.dtype, int]:
  """Returns the dtype of a tensor and its bytes; looking them up takes as long as the rest."""
  dtype = np.dtype(tensor.dtype)
  return dtype, math.prod(tensor.shape) * dtype.itemsize


def tensor_of(value: np.ndarray | str) -> Tensor:
  """Returns what `features.json` has to say of a value."""
  return Tensor("text") if isinstance(value, str) else Tensor(value.dtype.name, value.shape)


def _scan(path: str | pathlib.Path, size: int) -> np.ndarray:
  """Follows the lengths from record to record, reading 12 bytes of each."""
  rows, offset = [], 0
  with open(path, "rb") as file:
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


def _little_endian(value: np.ndarray) -> np.ndarray:
  return value.astype(value.dtype.newbyteorder("<"), copy=False)


def _varint(number: int) -> bytes:
  groups = []
  while number > 0x7F:
    groups.append(number & 0x7F | 0x80)
    number >>= 7
  return bytes([*groups, number])


def _delimited(field: int, payload: bytes) -> bytes:
  """Returns one length-delimited field (wire type 2) of a protocol buffer."""
  return b"".join([_varint(field << 3 | 2), _varint(len(payload)), payload])


def _spans(message: memoryview, start: int, end: int, wanted: int) -> list[tuple[int, int]]:
  """Returns where the length-delimited fields of one number are; other numbers are passed over."""
  spans = []
  while start < end:
    tag, start = _read_varint(message, start, end)
    if tag & 7 != 2:
      raise ValueError("not a tf.train.Example: a field is not length-delimited")
    length, start = _read_varint(message, start, end)
    if start + length > end:
      raise ValueError("not a tf.train.Example: a field runs past the end")
    if tag >> 3 == wanted:
      spans.append((start, start + length))
    start += length
  return spans


def _read_varint(message: memoryview, position: int, end: int) -> tuple[int, int]:
  if position < end and (number := message[position]) < 0x80:  # Most are.
    return number, position + 1
  number = shift = 0
  while position < end:
    byte = message[position]
    number |= (byte & 0x7F) << shift
    position, shift = position + 1, shift + 7
    if byte < 0x80:
      return number, position
  raise ValueError("not a tf.train.Example: it ends inside a number")
