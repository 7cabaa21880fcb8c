"""Ends a run that no longer moves: names what it waits for and shows where every thread stands.

Each process watches itself. The first that runs out of time tells the others, which write the
stacks of their threads as well before all of them leave. One that stops for a fault of its own
tells them too: they would wait for it in a collective, and then start again for nothing.

Where not even this thread gets to run, as something holds the interpreter, an alarm of the system
writes the stacks to standard error and ends the process by its signal.
"""

import faulthandler
import itertools
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.goodput import Ledger
from spatialv2a_jax.training import cluster, meter

FOLDER = "stacks"  # Inside a working directory.
# What does not move, by the phase of the ledger; the limits are in seconds, 0 is none.
NAMES = {
  "init": "hung start",
  "data": "data stall: no batch",
  "step": "hung step: the devices did not finish",
  "compile": "hung compilation",
  "eval": "hung evaluation",
  "save": "hung save of a checkpoint or model",
  "restore": "hung restore of a checkpoint",
}
LIMITS = {
  "init": 3600.0,
  "data": 1800.0,
  "step": 1800.0,
  "compile": 7200.0,
  "eval": 7200.0,
  "save": 3600.0,
  "restore": 3600.0,
}
_GRACE_SECONDS = 10.0  # For the other processes to write their stacks.
_ALARM_SECONDS = 30.0  # After the limit, for all of that.
_FAULT_SECONDS = 2.0  # For them to stop by themselves, most often for the same reason.
_FAULT = "stopped "  # Begins the message of a process that stops for a fault of its own.


class Watchdog:
  """Context in which a phase of the ledger that lasts too long ends the process with code 43."""

  _numbers = itertools.count()  # Processes open their contexts in the same order.

  def __init__(
    self, ledger: Ledger, workdir: str | os.PathLike, limits: Mapping[str, float] | None = None
  ):
    """Sets the limits.

    Args:
      ledger: tells the phase, and since when; `enter` of the same phase is a sign of life.
      workdir: gets `stacks/process-RANK.txt`.
      limits: seconds per phase, replacing some of `LIMITS`; 0: no limit.

    Raises:
      UserError: if a limit names no phase.
    """
    if unknown := sorted(set(limits or {}) - set(LIMITS)):
      raise UserError(f"limits has no {unknown}, have: {sorted(LIMITS)}")
    self._ledger, self._limits = ledger, {**LIMITS, **(limits or {})}
    self._folder = pathlib.Path(workdir) / FOLDER
    self._closed = threading.Event()
    self._firing = threading.Lock()
    self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
    self._watch: cluster.Watch | None = None
    self._prefix = f"fault/{next(self._numbers)}"
    self.step = 0  # That is being done, for the message.

  def __enter__(self) -> "Watchdog":
    self._rank, self._count = cluster.place()
    faulthandler.register(signal.SIGALRM, sys.__stderr__ or 2, all_threads=True, chain=True)
    self._ledger.beat = self._set_alarm
    self._ledger.enter(self._ledger.phase)  # To wait for the other hosts had a limit of its own.
    self._watch = cluster.Watch(f"{self._prefix}/text", self._hear)
    self._thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._closed.set()
    self._thread.join()
    self._ledger.beat = lambda: None
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.unregister(signal.SIGALRM)
    if self._watch is None:
      return
    if isinstance(error, Exception) and not cluster.lost(error):
      code = error.exit_code if isinstance(error, UserError) else 1
      self._watch.close(f"{_FAULT}{code} process {self._rank} on {socket.gethostname()}")
    else:
      self._watch.close()

  def _set_alarm(self) -> None:
    limit = self._limits.get(self._ledger.phase, 0.0)
    signal.setitimer(signal.ITIMER_REAL, limit + _ALARM_SECONDS if limit else 0.0)

  def _hear(self, text: str) -> None:
    """Leaves because another process does."""
    if not text.startswith(_FAULT):
      self._end(text, first=False)
    elif not self._closed.wait(_FAULT_SECONDS):
      _, code, who = text.split(" ", 2)
      print(f"\n{who} stopped with code {code}, and so does this one", file=sys.stderr, flush=True)
      cluster.part()
      cluster.leave(int(code))

  def _run(self):
    shortest = min((limit for limit in self._limits.values() if limit), default=60.0)
    while not self._closed.wait(min(1.0, shortest / 4)):
      phase, since = self._ledger.phase, self._ledger.since
      limit = self._limits.get(phase, 0.0)
      waited = time.monotonic() - since
      if limit and waited > limit:
        what = f"{NAMES[phase]} for {meter.duration(waited)} at step {self.step}"
        where = f"process {self._rank} on {socket.gethostname()}"
        self._end(f"{what} ({where}; limits.{phase}={limit:g})", first=True)

  def _end(self, text: str, first: bool) -> None:
    """Writes the stacks, waits until the others have, and leaves."""
    with self._firing:
      print(f"\n{text}", file=sys.stderr, flush=True)
      try:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"process-{self._rank}.txt"
        with open(path, "w", encoding="utf-8") as file:
          file.write(text + "\n")
          file.flush()
          faulthandler.dump_traceback(file, all_threads=True)
        print(f"stacks of all threads: {path}", file=sys.stderr, flush=True)
      except OSError:
        pass  # A full disk; standard error has them.
      faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
      sys.stderr.flush()
      self._wait_for_the_others(text, first)
      cluster.leave(cluster.EXIT_CODE)

  def _wait_for_the_others(self, text: str, first: bool) -> None:
    store = cluster.client()
    if store is None or self._watch is None:
      return
    try:
      if first:
        self._watch.tell(text)
      store.key_value_set(f"{self._prefix}/written/{self._rank}", "", allow_overwrite=True)
      end = time.monotonic() + _GRACE_SECONDS
      for rank in range(self._count):
        left = max(100, round(1000 * (end - time.monotonic())))
        store.blocking_key_value_get(f"{self._prefix}/written/{rank}", left)
    except RuntimeError:
      pass  # A process that cannot answer; it will not keep the others.
    if self._rank == 0:
      time.sleep(0.5)  # It serves the store: the others end with it.
