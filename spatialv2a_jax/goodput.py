"""Where the time of a run goes: every second since its first start belongs to exactly one phase.

The ledger is carried through checkpoints and `metrics.jsonl`, so that it covers all attempts of a
run: steps after the checkpoint that a later attempt starts from are moved to `lost`, and the time
between the last line that an attempt left in `metrics.jsonl` and the next attempt is `down`.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

PHASES = ("init", "restore", "compile", "data", "step", "eval", "save", "lost", "down")
PRODUCTIVE = "step"
REDONE = ("data", "step", "eval")  # By the next attempt, since the checkpoint it starts from.


class Ledger:
  """A clock that is always in one phase; a new one is in `init`.

  Attributes:
    phase: what this process does now.
    since: when it began to, on the monotonic clock; a beat renews it.
    beat: called after that.
  """

  def __init__(self, began: float | None = None):
    """Starts the clock.

    Args:
      began: Unix time at which this process began, if that was earlier.
    """
    self.began = time.time() if began is None else began
    self.phase = "init"
    self.beat: Callable[[], None] = lambda: None
    self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    # A change of the wall clock while the process runs must not change the sums.
    self._counted = self.since = time.monotonic() - max(time.time() - self.began, 0.0)
    self._first, self._attempts = self.began, 1  # Of the run.

  def enter(self, phase: str) -> None:
    """Ends the phase before and begins this one; the same phase again is a beat."""
    now = time.monotonic()
    self._seconds[self.phase] += now - self._counted
    self.phase, self._counted, self.since = phase, now, now
    self.beat()

  @contextlib.contextmanager
  def during(self, phase: str) -> Iterator[None]:
    """Context spent in a phase, after which the phase before goes on."""
    before = self.phase
    self.enter(phase)
    try:
      yield
    finally:
      self.enter(before)

  def seconds(self) -> dict[str, float]:
    """Returns what every phase has taken so far, over all attempts of the run."""
    now = dict(self._seconds)
    now[self.phase] += time.monotonic() - self._counted
    return now

  def state(self) -> dict[str, Any]:
    """Returns what a checkpoint keeps."""
    about = {"first": self._first, "time": time.time(), "attempts": self._attempts}
    return {"seconds": self.seconds(), **about}

  def row(self) -> dict[str, float]:
    """Returns the ledger as values of a row of `metrics.jsonl`.

    `time` is the Unix time, `goodput` the share of the time spent in steps that count, and
    `goodput/PHASE_s` the seconds of each phase since the run first began; `goodput/wall_s` is the
    time since then by the wall clock, and `goodput/attempts` the number of processes it took.
    """
    seconds = self.seconds()
    now = time.time()
    shares = {f"goodput/{phase}_s": value for phase, value in seconds.items()}
    goodput = seconds[PRODUCTIVE] / max(sum(seconds.values()), 1e-9)
    return {
      "time": now,
      "goodput": goodput,
      "goodput/wall_s": now - self._first,
      "goodput/attempts": self._attempts,
      **shares,
    }

  def resume(
    self,
    saved: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]] = (),
  ) -> None:
    """Goes on with the ledger of the attempts before.

    Args:
      saved: `state()` as the checkpoint has it that this attempt starts from; None: there is none.
      rows: `metrics.jsonl`; its newest row with a time is the last sign of life.
      kept: those of what came after the checkpoint, and is not done again.
    """
    last = next((row for row in reversed(rows) if row.get("time")), None)
    if saved is None:
      if last is None:
        return
      first = last["time"] - last["goodput/wall_s"]
      saved = {"seconds": {}, "first": first, "time": first, "attempts": 0}
    then = {phase: float(saved["seconds"].get(phase, 0.0)) for phase in PHASES}
    for row in kept:
      then |= {x: max(then[x], float(row.get(f"goodput/{x}_s") or 0.0)) for x in REDONE}
    alive, seen, attempts = dict(then), float(saved["time"]), int(saved["attempts"])
    if last and last["time"] > seen:
      alive = {phase: float(last.get(f"goodput/{phase}_s") or 0.0) for phase in PHASES}
      seen, attempts = float(last["time"]), int(last["goodput/attempts"])
    for phase in REDONE:
      alive["lost"] += max(alive[phase] - then[phase], 0.0)
      alive[phase] = min(alive[phase], then[phase])
    alive["down"] += max(self.began - seen, 0.0)
    for phase, value in alive.items():
      self._seconds[phase] += value
    self._first, self._attempts = float(saved["first"]), attempts + 1


def process_began() -> float:
  """Returns the Unix time at which this process began; now, where the system does not tell."""
  try:
    with open("/proc/self/stat", "rb") as file:
      ticks = int(file.read().rsplit(b")", 1)[1].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
  except (OSError, AttributeError, ValueError, IndexError):
    age = 0.0
  return time.time() - age
