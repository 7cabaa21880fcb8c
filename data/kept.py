"""Rows of batches in memory: a clip is read, verified and parsed once.

Which clips a batch has is a matter of its step alone, so every process of a job comes by all of
them in time. Imports no jax.
"""

import contextlib
import pathlib
import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from spatialv2a_jax.errors import UserError


class Key(NamedTuple):
  """What a row depends on: the number of its record, and whether left and right are exchanged."""

  record: int
  mirrored: bool


class Kept:
  """As many rows as a limit allows; threads may share them.

  The first ones stay: of clips that come in another order each epoch, no others would serve more.

  Attributes:
    clips: ids of the clips that were read, by the number of their record.
  """

  def __init__(self, limit: int, rows: int):
    """Keeps nothing yet.

    Args:
      limit: bytes.
      rows: that there are.
    """
    self.clips: dict[int, str] = {}
    self._limit, self._capacity = limit, rows
    self._slots: dict[Key, int] = {}
    self._arrays: dict[str, np.ndarray] = {}  # Name -> a row in each slot.
    self._lock = threading.Lock()

  def find(self, key: Key) -> int | None:
    """Returns the slot of a row; None if it is not kept."""
    return self._slots.get(key)

  def copy(self, slots: Mapping[int, int], batch: Mapping[str, np.ndarray]) -> None:
    """Copies rows to a batch; `slots` has their places here by their places there."""
    for name, array in self._arrays.items():
      target = batch[name]
      for row, slot in slots.items():
        target[row] = array[slot]

  def add(self, key: Key, clip: str, batch: Mapping[str, np.ndarray], row: int) -> None:
    """Keeps a row of a batch, if there is room.

    Args:
      key: of the row.
      clip: its id.
      batch: arrays of rows.
      row: its place there.

    Raises:
      UserError: the system has not that much memory left.
    """
    with self._lock:
      if not self._arrays:
        self._begin(batch)
      slot = len(self._slots)
      if slot == self._capacity or key in self._slots:
        return
      for name, array in self._arrays.items():
        array[slot] = batch[name][row]
      self.clips[key.record] = clip
      self._slots[key] = slot  # Last: others may look for it at this moment.

  def _begin(self, batch: Mapping[str, np.ndarray]) -> None:
    size = sum(x[0].nbytes for x in batch.values())
    self._capacity = min(self._capacity, self._limit // size)
    # Else the process is killed once so much is in use, which may be hours from now.
    needed, left = self._capacity * size, available()
    if left is not None and needed > left:
      raise UserError(
        f"cache_gb={self._limit / 2**30:.1f}: the clips take {needed / 2**30:.1f} GiB, of which "
        f"this machine has {left / 2**30:.1f} left; give less"
      )
    self._arrays = {
      name: np.empty((self._capacity, *x.shape[1:]), x.dtype) for name, x in batch.items()
    }


def available() -> int | None:
  """Returns the bytes of memory that Linux could give this process, or its container; None else."""
  found = []
  with contextlib.suppress(OSError, StopIteration):
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    line = next(line for line in lines if line.startswith("MemAvailable:"))
    found.append(1024 * int(line.split()[1]))
  with contextlib.suppress(OSError, ValueError):  # It says "max" where there is no limit.
    found.append(int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
  return min(found, default=None)
