"""Reads foreign checkpoints as numpy arrays: safetensors, and PyTorch's files without PyTorch.

A .pth, .pt or .bin file is a zip archive of a pickle and raw tensor data. A pickle is a program;
this one may call nothing but the reader below and build nothing but dictionaries, lists and plain
values. Every other name in it is refused before anything runs.

Axes: arrays have whatever axes the file says.
"""

import collections
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from spatialv2a_jax import tensors
from spatialv2a_jax.errors import MissingAssetError, UserError, first_line

_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
_BLOCK = 1 << 24  # Bytes of which a checksum is taken at once.
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # Files of PyTorch before 1.6.


class _Kind(NamedTuple):
  """Stands for a storage class; being a tuple, a pickle cannot change it."""

  dtype: Any


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads a checkpoint: nested dictionaries of arrays and plain values.

  The arrays are memory maps: converting a file takes the memory of its result, not of both.

  Raises:
    MissingAssetError: no such file.
    UserError: damaged, in another format, or a pickle that asks for anything but tensors.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise MissingAssetError(f"no such file: {path}; download the checkpoint and give its path")
  with path.open("rb") as file:
    head = file.read(len(_OLD_MAGIC))
  if head == _OLD_MAGIC:
    raise UserError(
      f"{path} is in PyTorch's format from before 1.6; load and save it once with a newer PyTorch"
    )
  if head.startswith(b"PK"):
    return read_torch(path)
  return read_safetensors(path)[0]


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the tensors (bfloat16 as such), memory mapped, and the metadata of a file."""
  try:
    return tensors.read(path)
  except (ValueError, OSError) as error:
    raise UserError(
      f"{path} is neither safetensors nor a PyTorch zip file: {first_line(error)}"
    ) from None


def read_torch(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file that `torch.save` wrote (1.6 and later); it runs no code of the file."""
  try:
    with zipfile.ZipFile(path) as archive:
      pickles = [n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl")]
      if len(pickles) != 1:
        raise UserError(f"{path} is a zip file without one data.pkl: no PyTorch checkpoint")
      with archive.open(pickles[0]) as file:
        content = _Reader(file, archive, pickles[0].removesuffix("data.pkl"), path).load()
  except UserError:
    raise
  except Exception as error:  # A damaged pickle can fail in any way; none of its code has run.
    raise UserError(f"{path} is damaged or no PyTorch checkpoint: {first_line(error)}") from None
  if not isinstance(content, dict):
    raise UserError(f"{path} holds a {type(content).__name__}, a dictionary of tensors is needed")
  return content


class _Reader(pickle.Unpickler):
  """An unpickler that knows tensors, ordered dictionaries and nothing else."""

  def __init__(self, file, archive: zipfile.ZipFile, prefix: str, path: pathlib.Path):
    super().__init__(file, encoding="utf-8")
    self._archive, self._prefix, self._path = archive, prefix, path
    self._loaded: dict[str, np.ndarray] = {}
    self._big = f"{prefix}byteorder" in archive.namelist() and (
      archive.read(f"{prefix}byteorder") == b"big"
    )
    # Bound methods and tuples: a pickle's BUILD instruction can set no attribute of these.
    self._allowed: dict[tuple[str, str], Any] = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch._utils", "_rebuild_tensor"): self._tensor,
      ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
      ("torch._utils", "_rebuild_parameter"): self._parameter,
      **{("torch", name): _Kind(dtype) for name, dtype in _STORAGES.items()},
    }

  def find_class(self, module: str, name: str) -> Any:
    """Returns the reader's own stand-in of an allowed name."""
    if (module, name) not in self._allowed:
      raise UserError(
        f"{self._path} wants to run {module}.{name}, which no weights need; "
        "do not trust it, get a safetensors file or a plain state dict"
      )
    return self._allowed[module, name]

  def persistent_load(self, pid: Any) -> np.ndarray:
    """Returns the elements of one storage."""
    tag, kind, key, _, count = pid
    if tag != "storage" or not isinstance(kind, _Kind):
      raise ValueError("a persistent object that is no tensor storage")
    if key not in self._loaded:
      info = self._archive.getinfo(f"{self._prefix}data/{key}")
      if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed tensor data")
      self._loaded[key] = self._map(info).view(kind.dtype)
      if self._big:
        self._loaded[key] = self._loaded[key].byteswap()
    if self._loaded[key].size < count or self._loaded[key].dtype != kind.dtype:
      raise ValueError(f"storage {key} is not what its tensors say")
    return self._loaded[key]

  def _map(self, info: zipfile.ZipInfo) -> np.ndarray:
    """Returns the bytes of a stored entry as a memory map, its checksum verified."""
    if not info.file_size:
      return np.zeros(0, np.uint8)
    with self._path.open("rb") as file:
      file.seek(info.header_offset)
      header = file.read(30)
      if header[:4] != b"PK\3\4":
        raise ValueError(f"{info.filename} has no header")
      begin = file.tell() + sum(struct.unpack("<HH", header[26:]))
    data = np.memmap(self._path, np.uint8, "r", begin, (info.file_size,))
    checksum = 0
    for at in range(0, len(data), _BLOCK):
      checksum = zlib.crc32(data[at : at + _BLOCK].data, checksum)
    if checksum != info.CRC:
      raise ValueError(f"{info.filename} has another checksum than the file says")
    return np.asarray(data)

  def _tensor(
    self, storage: np.ndarray, offset: int, shape: Sequence[int], stride: Sequence[int], *rest: Any
  ) -> np.ndarray:
    """A view of a storage; its bounds are checked, for strides could reach any memory."""
    del rest  # Gradient flags and hooks.
    if min([offset, *shape, *stride], default=0) < 0 or len(shape) != len(stride):
      raise ValueError("a tensor with a negative size")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 in shape:
      return np.zeros(tuple(shape), storage.dtype)
    if last >= storage.size:
      raise ValueError("a tensor larger than its storage")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(shape), steps, writeable=False)

  def _parameter(self, data: np.ndarray, *rest: Any) -> np.ndarray:
    del rest
    return data
