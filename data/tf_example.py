"""`tf.train.Example` without TensorFlow: what a record of training data holds.

An Example's features are `bytes_list`s of one value: a tensor's raw little-endian bytes, or text;
their shapes and dtypes stand beside the shards (`data.layout`).
"""

import functools
import math
from collections.abc import Container, Mapping
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (makes numpy know "bfloat16")
import numpy as np

MAX_FRAMINGS = 1024  # Ids and captions of other lengths make other ones.


class Tensor(NamedTuple):
  """What `features.json` says of one field; `dtype` "text" marks a string."""

  dtype: str
  shape: tuple[int, ...] = ()


def encode(fields: Mapping[str, np.ndarray | str]) -> bytes:
  """Returns a serialised `tf.train.Example`, keys sorted as in protobuf's deterministic mode."""
  entries = []
  for name, value in sorted(fields.items()):
    raw = value.encode() if isinstance(value, str) else _little_endian(value).tobytes()
    bytes_list = _delimited(1, _delimited(1, raw))
    entries.append(_delimited(1, _delimited(1, name.encode()) + _delimited(2, bytes_list)))
  return _delimited(1, b"".join(entries))


def decode(payload: bytes | memoryview) -> dict[str, memoryview]:
  """Returns the bytes of each feature of a serialised `tf.train.Example`, not copied.

  Raises:
    ValueError: not an Example, or a feature is not a `bytes_list` of one value.
  """
  message = memoryview(payload)
  known = framing(len(message))
  found = known.rest(message, ()) if known else None
  if found is not None:
    return found
  if len(_framings) >= MAX_FRAMINGS:
    _framings.clear()
  known = _framings[len(message)] = Framing.of(message)
  return {name: message[a:b] for name, a, b in known.spans}


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


class Framing(NamedTuple):
  """What an Example is besides its values: the same in most records of a data set.

  Where the values are follows from these bytes alone, so that records which agree in them need not
  be parsed again.

  Attributes:
    spans: name, start and end of each value, in their order.
    between: start, end and bytes of what is before, between and after them.
  """

  spans: list[tuple[str, int, int]]
  between: list[tuple[int, int, bytes]]

  @property
  def length(self) -> int:
    """Of the whole Example, in bytes."""
    return self.between[-1][1]

  @classmethod
  def of(cls, message: memoryview) -> "Framing":
    """Parses an Example; ValueError as `decode`."""
    spans = sorted(((name, *span) for name, span in _parse(message).items()), key=lambda x: x[1])
    ends = [0, *(edge for _, *span in spans for edge in span), len(message)]
    gaps = zip(ends[::2], ends[1::2], strict=True)
    return cls(spans, [(a, b, bytes(message[a:b])) for a, b in gaps])

  def parts(self, apart: Mapping[str, int]) -> list[str | slice] | None:
    """Returns what of an Example goes where, in the order of its bytes, to read it in one go.

    Args:
      apart: names and sizes in bytes of values that go to a place of their own.

    Returns:
      those names, and the parts of the Example between them; None if it has not all of these
      values, or in another size.
    """
    spans = [(name, a, b) for name, a, b in self.spans if name in apart]
    if {name: b - a for name, a, b in spans} != dict(apart):
      return None
    found: list[str | slice] = []
    start = 0
    for name, a, b in spans:
      found += [slice(start, a), name]
      start = b
    return [*found, slice(start, self.length)]

  def rest(self, message: memoryview, apart: Container[str]) -> dict[str, memoryview] | None:
    """Returns the values that are not `apart`; None if the Example has another framing."""
    for a, b, expected in self.between:
      if message[a:b] != expected:
        return None
    return {name: message[a:b] for name, a, b in self.spans if name not in apart}


_framings: dict[int, Framing] = {}  # By the length of the record.


def framing(length: int) -> Framing | None:
  """Returns the framing of the last Example of that length that was parsed."""
  return _framings.get(length)


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
