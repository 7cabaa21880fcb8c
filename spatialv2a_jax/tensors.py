"""Safetensors files, written one array at a time and read as memory maps.

The `safetensors` package builds a whole file in memory and copies what it reads; a network of
several gigabytes then needs three times its size. The format is the same.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_ALIGN = 64  # Bytes; arrays that begin there reach XLA:CPU without a copy.
_MOST_HEADER = 100_000_000  # As the `safetensors` package allows.


def write(path: pathlib.Path, arrays: Mapping[str, Any]) -> str:
  """Writes arrays; no more than one of them is copied at a time.

  Args:
    path: of the file, which is replaced without further ado: give a temporary one.
    arrays: NumPy's or JAX's, by name. bfloat16, which readers may lack, becomes float32.

  Returns:
    The SHA-256 of the file.
  """

  def kind(array):
    dtype = np.dtype(array.dtype)
    return np.dtype(np.float32) if dtype == ml_dtypes.bfloat16 else dtype

  def size(name):
    return math.prod(arrays[name].shape) * kind(arrays[name]).itemsize

  names = sorted(arrays, key=lambda name: (size(name) % _ALIGN > 0, name))  # Odd sizes go last.
  table, at = {}, 0
  for name in names:
    shape = list(map(int, arrays[name].shape))
    offsets = [at, at + size(name)]
    table[name] = {"dtype": _CODES[kind(arrays[name])], "shape": shape, "data_offsets": offsets}
    at = offsets[1]
  header = json.dumps(table, separators=(",", ":")).encode()
  header += b" " * (-(8 + len(header)) % _ALIGN)
  digest = hashlib.sha256()
  with open(path, "wb") as file:

    def put(data):
      file.write(data)
      digest.update(data)

    put(len(header).to_bytes(8, "little"))
    put(header)
    for name in names:
      array = np.ascontiguousarray(np.asarray(arrays[name]), kind(arrays[name]))
      put(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the arrays, read-only views of a memory map, and the metadata of a file.

  Raises:
    ValueError: the file is no safetensors file, or not whole.
    OSError: it cannot be read.
  """
  path = pathlib.Path(path)
  total = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if total < 8 or not 0 < length <= min(total - 8, _MOST_HEADER):
      raise ValueError("no safetensors header")
    try:
      table = json.loads(file.read(length))
      metadata = table.pop("__metadata__", {})
    except (ValueError, AttributeError, TypeError) as error:
      raise ValueError(f"no safetensors header ({error})") from None
  begin = 8 + length
  data = np.memmap(path, np.uint8, "r", begin) if total > begin else np.zeros(0, np.uint8)
  arrays = {}
  for name, entry in table.items():
    try:
      dtype = np.dtype(_DTYPES[entry["dtype"]])
      shape = tuple(map(int, entry["shape"]))
      first, last = map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f"{name} is of an unknown kind ({error})") from None
    if not 0 <= first <= last <= len(data) or min(shape, default=0) < 0:
      raise ValueError(f"{name} lies beyond the end of the file")
    if last - first != math.prod(shape) * dtype.itemsize:
      raise ValueError(f"{name} has another size than its shape")
    arrays[name] = np.asarray(data[first:last]).view(dtype).reshape(shape)
  return arrays, metadata


def digest(path: str | pathlib.Path) -> str:
  """Returns the SHA-256 of a file, read in blocks."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
