"""The loop of a run, between the first batch and the last checkpoint.

Every process goes through the same sequence of steps, saves and points at which the run may be
left; only waiting (for data, for the compiler) is done in threads, so that signals are heeded.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from spatialv2a_jax import compile_cache
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.goodput import Ledger
from spatialv2a_jax.logbook import Logbook
from spatialv2a_jax.training import cluster, waiting
from spatialv2a_jax.training import meter as meters
from spatialv2a_jax.training.averages import Snapshots
from spatialv2a_jax.training.checkpoint import Checkpoints
from spatialv2a_jax.training.faults import Faults
from spatialv2a_jax.training.preemption import Interrupted, StopSignal
from spatialv2a_jax.training.profiler import Profiler
from spatialv2a_jax.training.train_step import State
from spatialv2a_jax.training.watchdog import Watchdog

_MOST_BAD = 10_000  # Numbers of damaged records that a checkpoint keeps.


@dataclasses.dataclass(frozen=True)
class Every:
  """How often things happen, in steps.

  Attributes:
    log: between lines of the log; their values are means since the line before.
    eval: between calls of the evaluation hook, which always follows the last step; 0: only that.
    checkpoint: between checkpoints.
    keep: checkpoints whose step is a multiple of it stay for ever; of the others, the newest 3. 0:
      none stays for ever.
    average: between snapshots of the power-function averages (`averages`); 0 keeps none.
    profile: first and last step of a profiler trace, written to WORKDIR/profile; (0, 0): none.
  """

  log: int = 50
  eval: int = 0
  checkpoint: int = 1000
  keep: int = 0
  average: int = 0
  profile: tuple[int, int] = (0, 0)

  def __post_init__(self):
    for name, least in {"log": 1, "eval": 0, "checkpoint": 1, "keep": 0, "average": 0}.items():
      if getattr(self, name) < least:
        raise UserError(f"every.{name}={getattr(self, name)} is less than {least}")
    steps = tuple(self.profile)
    if len(steps) != 2 or not (steps == (0, 0) or 1 <= steps[0] <= steps[1]):
      raise UserError(
        f"every.profile={self.profile} is not (first step, last step), from 1 on, or (0, 0)"
      )

  def evaluates(self, step: int, steps: int) -> bool:
    """Returns whether the evaluation hook is called after `step`."""
    return step == steps or bool(self.eval and step and step % self.eval == 0)

  def averages(self, step: int, steps: int) -> bool:
    """Returns whether a snapshot of the averages is taken after `step`."""
    return bool(self.average) and (step == steps or step % self.average == 0)


class Batch(NamedTuple):
  """One batch.

  Attributes:
    local: the rows of this process.
    whole: the arrays of all processes, on the devices.
    bad: numbers of the damaged records that were passed over so far.
    max_bad: how many of all processes are put up with; None: any number.
  """

  local: Mapping[str, np.ndarray]
  whole: Mapping[str, jax.Array]
  bad: Sequence[int] = ()
  max_bad: int | None = None


class _Done(NamedTuple):
  """A step whose metrics were not read yet."""

  step: int
  metrics: Mapping[str, jax.Array]
  batch: Batch


@dataclasses.dataclass
class Loop:
  """What the loop needs besides the state.

  Attributes:
    workdir: of the run.
    first: step at which this process begins.
    examples: clips the run had seen before that step.
    bad: numbers of the damaged records it had passed over before that step.
    steps: of the whole run.
    batch_size: clips per step over all processes.
    every: how often things happen.
    checkpoints: where the state is saved.
    snapshots: where averages of the parameters are.
    run: JSON object saved with it.
    meter: sums since the last line of the log.
    faults: looks after updates that were left out.
    ledger: where the time goes.
    book: the record.
    stop: requests to stop.
    watchdog: ends a run that hangs.
    evaluate: hook (state, step, book, stop) -> scalars, or None if `stop` said to leave.
    flops_per_clip: for the utilisation.
    tokens_per_clip: for the rate of tokens.
    say: prints a line.
  """

  workdir: pathlib.Path
  first: int
  examples: int
  bad: Sequence[int]
  steps: int
  batch_size: int
  every: Every
  checkpoints: Checkpoints
  snapshots: Snapshots
  run: Mapping[str, Any]
  meter: meters.Meter
  faults: Faults
  ledger: Ledger
  book: Logbook
  stop: StopSignal
  watchdog: Watchdog
  evaluate: Callable[..., Mapping[str, float] | None] | None
  flops_per_clip: float | None
  tokens_per_clip: int | None
  say: Callable[[str], None]

  def __post_init__(self):
    self._mark = (self.first, self.ledger.seconds())
    self._bad: Sequence[int] = ()  # Of this process, since it began.
    self._max_bad: int | None = None

  def __call__(self, state: State, step: Any, source: Iterator[Batch], evaluated: bool) -> State:
    """Trains to the last step.

    Args:
      state: to begin with; donated.
      step: the jitted step.
      source: batches from the first step on.
      evaluated: whether the evaluation of the first step was done by the process before.

    Raises:
      Interrupted: if asked to stop, once the state is saved.
      UserError: as `train.fit` says.
    """
    self.book.scalars(self.first, self.ledger.row())
    if not evaluated:
      self._evaluate(state, self.first, saved=True)
    if self.first == self.steps:
      return self._finish(state)
    # Un-awaited collectives of several CPU devices can wait for each other's threads for ever.
    lockstep = jax.default_backend() == "cpu" and jax.device_count() > 1
    feed = waiting.Feed(source)
    compiled, batch = self._prepare(state, step, feed)
    pending: _Done | None = None
    profiler = Profiler(self.workdir, self.every.profile, self.say)
    with contextlib.closing(profiler):
      for done in range(self.first + 1, self.steps + 1):
        self._enter("step", done)
        with profiler.step(done):
          state, metrics = compiled(state, batch.whole)
        profiler.end(done, metrics)
        if lockstep:
          jax.block_until_ready(metrics)
        current = _Done(done, metrics, batch)
        if done < self.steps:
          with contextlib.suppress(
            waiting.GivenUpError
          ):  # The next point to leave at is just ahead.
            batch = self._next(feed, done + 1, metrics)
        # One step late: the device works on step n while the host reads step n - 1.
        self._settle(pending)
        pending = current
        self.checkpoints.check()
        self.snapshots.check()

        stopping = self.stop.poll()
        evaluates = self.every.evaluates(done, self.steps)
        logs = done == self.steps or done % self.every.log == 0
        saves = done == self.steps or done % self.every.checkpoint == 0
        if stopping or evaluates or logs or saves:
          self._settle(pending)  # A state is never saved before its metrics were seen.
          pending = None
        if logs:
          self._log(done)
        if saves or stopping:
          self._save(done, state)
        if self.every.averages(done, self.steps):
          with self.ledger.during("save"):
            self.snapshots.save(done, state.averages())
        if stopping and done < self.steps:
          self._leave(done)
        if evaluates:
          self._evaluate(state, done, saved=saves)
    return self._finish(state)

  def _prepare(self, state, step, feed) -> tuple[Any, Batch]:
    """Returns the compiled step and the first batch."""
    try:
      batch = self._next(feed, self.first + 1)
      self._enter("compile", self.first + 1)
      self.say("compiling the train step ...")
      clock, known = time.perf_counter(), compile_cache.found()
      lowered = waiting.run(lambda: step.lower(state, batch.whole), self.stop.due)
      traced = time.perf_counter()
      compiled = waiting.run(lowered.compile, self.stop.due)
      took = time.perf_counter() - traced
      # A collective of CPUs waits 30 s for the others, which may take longer to compile.
      waiting.run(cluster.meet, self.stop.due)
    except waiting.GivenUpError:
      self._leave(self.first)
    if self.stop.poll():
      self._leave(self.first)
    self._mark = (self.first, self.ledger.seconds())  # What a start takes is in no rate.
    how = "compiled" if compile_cache.found() == known else "found compiled, read"
    self.say(
      f"traced in {traced - clock:.1f} s, {how} in {took:.1f} s; training to step {self.steps}"
    )
    return compiled, batch

  def _enter(self, phase: str, step: int) -> None:
    self.watchdog.step = step
    self.ledger.enter(phase)

  def _next(self, feed, step, running=()) -> Batch:
    """Returns the batch of a step; time counts as `data` once what was dispatched is done.

    Args:
      feed: where it comes from.
      step: that it is for.
      running: results of the step before, which the devices may still be at.
    """
    results = jax.tree.leaves(running)
    feed.wait(lambda: all(x.is_ready() for x in results) or self.stop.due())
    with self.ledger.during("data"):
      self.watchdog.step = step
      try:
        batch = feed.next(self.stop.due)
      except StopIteration:
        raise UserError(f"the data ended before step {step} of {self.steps}") from None
      self._bad, self._max_bad = batch.bad, batch.max_bad
      return batch

  def _save(self, step: int, state: State) -> None:
    examples = self.examples + (step - self.first) * self.batch_size
    with self.ledger.during("save"):
      self.book.sync()
      self.snapshots.wait()  # A run that goes on from here does no earlier one again.
      self.checkpoints.save(
        step,
        state,
        {
          **self.run,
          "step": step,
          "examples": examples,
          "bad_records": sorted({*self.bad, *self._bad_records()})[:_MOST_BAD],
          "meter": self.meter.state(),
          "ledger": self.ledger.state(),
        },
      )

  def _evaluate(self, state: State, step: int, saved: bool) -> None:
    """Calls the hook; if the run is to stop meanwhile, the next process does it again."""
    if self.evaluate is None:
      return
    before = self.ledger.seconds()["data"]
    with self.ledger.during("eval"):
      self.watchdog.step = step
      scalars = self.evaluate(state, step, self.book, self.stop)
    self._mark[1]["data"] += self.ledger.seconds()["data"] - before  # No step waited for it.
    if scalars is not None:
      self.book.scalars(step, {**scalars, **self.ledger.row()})
    if self.stop.poll() and (scalars is None or step < self.steps):
      if not saved:
        self._save(step, state)
      self._leave(step)

  def _leave(self, step: int) -> NoReturn:
    """Ends the process for a stop; the state of `step` was saved, or is that it began with."""
    with self.ledger.during("save"):
      self.checkpoints.wait()
      self.snapshots.wait()
    self.book.scalars(step, self.ledger.row())
    saved = "and saved" if step else "before the first step"
    self.say(f"stopped at step {step} {saved}; the same command goes on from there")
    raise Interrupted

  def _finish(self, state: State) -> State:
    with self.ledger.during("save"):
      self.checkpoints.wait()
      self.snapshots.wait()
    self.book.scalars(self.steps, self.ledger.row())
    self.say(f"finished: step {self.steps} saved in {self.workdir}")
    return state

  def _settle(self, done: _Done | None) -> None:
    """Fetches the metrics of a step."""
    if done is None:
      return
    values = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
    counted = self.faults.check(done.step, values, done.batch.whole, done.batch.local)
    if counted is not None:
      self.meter.add(counted)

  def _bad_records(self) -> set[int]:
    """Returns those of all processes since they began; each counts once."""
    return cluster.union("bad", self._bad)

  def _log(self, step: int) -> None:
    """Writes a line of the log.

    Times are those of process 0, whose devices wait for those of the others within a step;
    `data_wait` is the largest share of all processes, of another one at most a line old.
    """
    before, seconds = self._mark[1], self.ledger.seconds()
    self._mark, steps = (step, seconds), step - self._mark[0]
    waited = seconds["data"] - before["data"]
    spent = max(waited + seconds["step"] - before["step"], 1e-9)
    share = cluster.most("data_wait", waited / spent)
    bad = self._bad_records()
    if self._max_bad is not None and len(bad) > self._max_bad:
      raise UserError(
        f"{len(bad)} damaged records, more than {self._max_bad} (the log of each process names "
        "its own); restore the shards"
      )
    clips = steps * self.batch_size / spent
    age = self.checkpoints.age()
    values = self.meter.means() | {
      "skipped": self.faults.skipped,
      "bad_records": len({*self.bad, *bad}),
      "clips_per_s": clips,
      "tokens_per_s": clips * (self.tokens_per_clip or np.nan),
      "data_wait": share,
      "mfu": meters.mfu(self.flops_per_clip, clips),
      "checkpoint_age_s": np.nan if age is None else age,
    }
    self.meter = meters.Meter()
    row = self.ledger.row()
    self.book.scalars(step, values | meters.memory() | row)
    left = meters.duration((self.steps - step) * self.batch_size / clips)
    loss, grad = values.get("loss", np.nan), values.get("grad_norm", np.nan)
    safe = "none yet" if age is None else f"{meters.duration(age)} old"
    skipped = f"{self.faults.skipped} skipped  " if self.faults.skipped else ""
    self.say(
      f"step {step}/{self.steps}  loss {loss:.4f}  grad {grad:.3f}  {skipped}"
      f"{clips:.1f} clips/s  data {100 * share:.0f} %  "
      f"goodput {100 * row['goodput']:.0f} %  checkpoint {safe}  {left} left"
    )
