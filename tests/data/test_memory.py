import gc
import pickle
import threading

import jax
import numpy as np
import pytest

from data.memory import ALIGNED, Memory

KINDS = {
  "a": ((3, 5), np.dtype("float32")),
  "b": ((7,), np.dtype("uint8")),
  "c": ((), np.dtype("int16")),
  "d": ((2, 3), np.dtype("bfloat16")),
}


def address(arrays: dict[str, np.ndarray]) -> int:
  return min(x.ctypes.data for x in arrays.values())


def test_arrays_are_those_asked_for_and_apart():
  arrays = Memory().arrays(KINDS)
  assert {name: (x.shape, x.dtype) for name, x in arrays.items()} == KINDS
  assert all(x.ctypes.data % ALIGNED == 0 and x.flags.writeable for x in arrays.values())
  for number, x in enumerate(arrays.values()):
    x[...] = number
  for number, x in enumerate(arrays.values()):
    assert np.all(x == number)


@pytest.mark.parametrize("keep", ["array", "row", "bytes", "jax"])
def test_memory_is_used_again_once_nothing_refers_to_it(keep):
  """Whatever way an array is held, its memory is nobody else's until it is gone."""
  memory = Memory()
  arrays = memory.arrays(KINDS)
  arrays["a"][...] = 1
  first = address(arrays)
  held = {
    "array": lambda x: x,
    "row": lambda x: x[1, ::2],
    "bytes": memoryview,
    "jax": jax.device_put,
  }[keep](arrays["a"])
  del arrays
  for _ in range(3):
    others = [memory.arrays(KINDS) for _ in range(3)]
    for other in others:
      other["a"][...] = 2
    assert np.all(np.asarray(held) == 1)
    del other, others
  del held
  gc.collect()
  assert first in {address(x) for x in [memory.arrays(KINDS) for _ in range(4)]}


def test_as_many_pieces_as_are_in_use_at_a_time():
  memory, seen = Memory(), set()
  for _ in range(20):
    pair = [memory.piece(100_000) for _ in range(2)]
    seen |= {piece.ctypes.data for piece in pair}
    del pair
  assert len(seen) == 2


def test_larger_pieces_replace_smaller_ones():
  memory = Memory()
  for size in (10, 1000, 10, 5000, 0):
    piece = memory.piece(size)
    assert piece.shape == (size,)
    piece[...] = 1


def test_threads_share_it():
  memory, wrong = Memory(), []

  def work(number: int) -> None:
    for _ in range(300):
      piece = memory.piece(4096)
      piece[...] = number
      if not np.all(piece == number):
        wrong.append(number)

  threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_none_goes_to_another_process():
  memory = Memory()
  memory.piece(1 << 20)
  assert len(pickle.dumps(memory)) < 200
  assert pickle.loads(pickle.dumps(memory)).piece(8).shape == (8,)
