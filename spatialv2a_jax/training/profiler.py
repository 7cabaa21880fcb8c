"""A trace of some steps of a run, for TensorBoard's or Perfetto's viewer."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax

FOLDER = "profile"  # Inside a working directory.


class Profiler:
  """Traces the steps from `first` to `last`; (0, 0) traces none."""

  def __init__(self, workdir: pathlib.Path, steps: tuple[int, int], say: Callable[[str], None]):
    """Sets the range of steps; the trace goes to WORKDIR/profile."""
    self._folder, self._say = workdir / FOLDER, say
    self._first, self._last = steps
    self._tracing = False

  def step(self, step: int) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a step is dispatched."""
    if self._first <= step <= self._last and not self._tracing:
      jax.profiler.start_trace(self._folder)
      self._tracing = True
    if self._tracing:
      return jax.profiler.StepTraceAnnotation("train", step_num=step)
    return contextlib.nullcontext()

  def end(self, step: int, results: Any) -> None:
    """Ends the trace once the results of its last step are there."""
    if self._tracing and step >= self._last:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Ends the trace if there is one."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
      self._say(f"profiler trace: {self._folder}")
