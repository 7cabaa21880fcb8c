"""Features of pre-trained encoders kept on disk, so that a film is encoded once.

An entry is found by a hash of all that determines it: the content of the video, the stretch and
its sampling, the weights, their sizes and precision, the words of a prompt, and the program
itself (the sources of the modules that compute it and the versions of what they stand on). So an
entry cannot be out of date: whatever changes, its name does too. A damaged entry counts as none.
Past a size, the entries that were not used for longest are deleted.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.io import atomic_path

VARIABLE = "SPATIALV2A_FEATURE_CACHE"
LIMIT = 20 * 10**9  # Bytes; 8 s of video take about 0.9 MB.
_SHARE = 16  # A folder is looked through whenever this part of the limit was written.
_SOURCES = (
  "encoders.py", "features.py", "groups.py", "localizers.py", "sound_prompt.py", "tokenizer.py",
  "schema.py",
)  # fmt: skip
_FOLDERS = ("models", "io")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow", "av")
_DIGEST = 32  # Bytes of the checksum at the beginning of an entry.


class Cache:
  """A folder of entries; several processes may use it at once."""

  def __init__(self, folder: str | os.PathLike, limit: int = LIMIT):
    """Entries go to `folder`, made when the first one is written, up to about `limit` bytes."""
    self.folder, self.limit = pathlib.Path(folder), limit
    self._unseen = limit  # Bytes written since the folder was last looked through.

  def path(self, key: Mapping[str, Any]) -> pathlib.Path:
    """Returns the file of an entry; `key` holds JSON values that determine it."""
    whole = {"key": key, "program": program()}
    name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    return self.folder / name[:2] / f"{name}.features"

  def get(self, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Returns the arrays of an entry, None if there is none that is whole."""
    path = self.path(key)
    try:
      raw = path.read_bytes()
      with contextlib.suppress(OSError):  # Where it may only be read.
        os.utime(path)  # Used now.
      if hashlib.sha256(raw[_DIGEST:]).digest() != raw[:_DIGEST]:
        return None
      return safetensors.numpy.load(raw[_DIGEST:])
    except (OSError, SafetensorError):
      return None

  def put(self, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an entry, complete or not at all; a disk that is full costs the entry only."""
    raw = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
    try:
      with atomic_path(self.path(key)) as temporary:
        temporary.write_bytes(hashlib.sha256(raw).digest() + raw)
      self._unseen += len(raw)
      if self._unseen * _SHARE > self.limit:
        self._prune()
    except (OSError, UserError):
      return

  def _prune(self) -> None:
    """Deletes the entries that were not used for longest, until the rest is within the limit."""
    entries = [(path, path.stat()) for path in self.folder.rglob("*.features")]
    size = sum(stat.st_size for _, stat in entries)
    for path, stat in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
      if size <= self.limit:
        break
      path.unlink(missing_ok=True)
      size -= stat.st_size
    self._unseen = 0


def open_cache(folder: str | None = None) -> Cache | None:
  """Returns the cache in a folder, in that of the environment, or in the user's; "none" is none."""
  chosen = folder or os.environ.get(VARIABLE) or "~/.cache/spatialv2a_jax/features"
  return None if chosen == "none" else Cache(pathlib.Path(chosen).expanduser())


@functools.cache
def program() -> str:
  """Returns a hash of the code that makes features, and of what it stands on."""
  root = pathlib.Path(__file__).parent
  files = [root / name for name in _SOURCES]
  files += [file for folder in _FOLDERS for file in sorted((root / folder).glob("*.py"))]
  precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
  digest = hashlib.sha256(f"{jax.default_backend()} {precision}\n".encode())
  for name in _PACKAGES:
    digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
  for file in files:
    digest.update(file.read_bytes())
  return digest.hexdigest()
