"""Leaving a run in good order: the first request to stop is a flag that the loop reads.

A machine that is about to be taken away sends SIGTERM; a person sends SIGINT (Ctrl-C).
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 42  # Tells a launcher that the run was interrupted, has saved, and can go on.


class Interrupted(SystemExit):
  """The run was told to stop and has saved its state; the process leaves with `EXIT_CODE`."""

  def __init__(self):
    super().__init__(EXIT_CODE)


class StopSignal:
  """Context in which the first SIGTERM or SIGINT is a flag, so that no step is cut in two.

  With `jax.distributed` the runtime owns SIGTERM (a handler of ours would be overridden), and all
  processes agree on the step at which they leave.
  """

  def __init__(self):
    self._flag = False
    self._shared = jax.distributed.is_initialized()
    self._old: dict[int, Any] = {}

  def __enter__(self) -> "StopSignal":
    if not self._shared and threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._flag = True
    signal.signal(number, self._old[number])  # A second one does what it did before.

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def asked(self, step: int) -> bool:
    """Returns whether to stop after `step`; the same answer in every process."""
    if self._shared:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._flag
