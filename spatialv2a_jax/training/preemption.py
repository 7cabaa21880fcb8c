"""Leaving a run in good order: the first request to stop is a flag that the loop reads.

A machine that is about to be taken away sends SIGTERM; a person sends SIGINT (Ctrl-C).
"""

import itertools
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import jax

from spatialv2a_jax.training import cluster

_REPEAT_SECONDS = 5.0  # A signal to a whole group comes again from the launcher within it.
EXIT_CODE = 42  # Tells a launcher that the run was interrupted, has saved, and can go on.


class Interrupted(SystemExit):
  """The run was told to stop and has saved its state; the process leaves with `EXIT_CODE`."""

  def __init__(self):
    super().__init__(EXIT_CODE)


def leave_at_once() -> None:
  """Makes the first SIGTERM or SIGINT end this process with `EXIT_CODE` while nothing is trained.

  For the time before and after `StopSignal`, when all there is to save is saved.
  """
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
  del frame
  signal.signal(number, signal.SIG_DFL)
  print("stopped outside of the steps; the same command goes on from there", flush=True)
  cluster.leave(EXIT_CODE)  # Others that wait for this process would keep an orderly end.


class StopSignal:
  """Context in which the first SIGTERM or SIGINT is a flag, so that no step is cut in two.

  Another one ends the process at once, but for those that come within seconds of the first.

  The loop passes a sequence of points at which it may leave, the same in every process. One signal
  to one process is enough: all processes agree on the first point that none of them has passed.
  """

  _numbers = itertools.count()  # Processes open their contexts in the same order.

  def __init__(self):
    self._flag = self._told = False
    self._asked = 0.0  # When, on the monotonic clock.
    self._passed = 0
    self._leave_at: int | None = None
    self._lock = threading.Lock()
    self._old: dict[int, Any] = {}
    self._prefix = f"stop/{next(self._numbers)}"
    self._watch: cluster.Watch | None = None

  def __enter__(self) -> "StopSignal":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        # None: a handler from outside Python, such as that of `jax.distributed`.
        self._old[number] = signal.signal(number, self._handle) or signal.SIG_DFL
    if cluster.client() is not None:
      self._watch = cluster.Watch(f"{self._prefix}/asked", self._agree)
    return self

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if not self._flag:
      self._flag, self._asked = True, time.monotonic()
    elif time.monotonic() - self._asked > _REPEAT_SECONDS:
      # Does what it did before; the state is not saved, and so the code is not 42.
      before = self._old[number]
      signal.signal(number, signal.SIG_DFL if before is _leave else before)
      signal.raise_signal(number)

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if self._watch is not None:
      self._watch.close()

  def _agree(self, _: str) -> None:
    """Runs in the thread of the watch of each process, once one of them was asked to stop."""
    store = cluster.client()
    with self._lock:  # No process passes a point while the last one passed is being found.
      store.key_value_set(f"{self._prefix}/passed/{jax.process_index()}", str(self._passed))
      keys = [f"{self._prefix}/passed/{rank}" for rank in range(jax.process_count())]
      self._leave_at = max(int(store.blocking_key_value_get(key, 600_000)) for key in keys) + 1

  def poll(self) -> bool:
    """Passes a point; returns whether to leave here, the same in every process."""
    with self._lock:
      self._passed += 1
    return self._leaves(self._passed)

  def due(self) -> bool:
    """Returns whether the next point is the one to leave at; ask as often as you like."""
    return self._leaves(self._passed + 1)

  def _leaves(self, point: int) -> bool:
    if self._watch is None:
      return self._flag
    if self._flag and not self._told:
      self._told = True
      self._watch.tell("stop")
    with self._lock:
      return self._leave_at is not None and point >= self._leave_at
