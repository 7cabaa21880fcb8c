"""Memory for batches that is used again: new memory costs as much time as what is read into it."""

import weakref

import numpy as np

ALIGNED = 64  # Bytes; JAX's CPU takes arrays at such addresses as they are.


class Memory:
  """Pieces of memory, each handed out again once no array lives in it; none when unpickled.

  Threads may share it. It never holds more than were in use at a time.
  """

  def __init__(self):
    self._free: list[np.ndarray] = []

  def __reduce__(self):
    return Memory, ()

  def piece(self, size: int) -> np.ndarray:
    """Returns uint8 [size] of any content; it and whatever views it keep the piece from others."""
    try:
      owner = self._free.pop()
    except IndexError:
      owner = np.empty(0, np.uint8)
    if len(owner) < size + ALIGNED:
      owner = np.empty(size + ALIGNED, np.uint8)
    start = -owner.ctypes.data % ALIGNED
    # Views refer to this array and not to the owner, since there is a memoryview between the two.
    piece = np.frombuffer(owner.data[start : start + size], np.uint8)
    weakref.finalize(piece, self._free.append, owner).atexit = False
    return piece

  def arrays(self, kinds: dict[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
    """Returns arrays of these shapes and dtypes, by name, in one piece."""
    ends, end = {}, 0
    for name, (shape, dtype) in kinds.items():
      ends[name] = (end, end + int(np.prod(shape)) * dtype.itemsize)
      end = -(-ends[name][1] // ALIGNED) * ALIGNED
    piece = self.piece(end)
    return {
      name: piece[slice(*ends[name])].view(dtype).reshape(shape)
      for name, (shape, dtype) in kinds.items()
    }
