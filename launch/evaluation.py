"""What a run is judged by while it trains: held-out clips, and some sound.

Axes: as in `launch.tasks`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from launch.listen import Listener
from spatialv2a_jax import goodput, sharding
from spatialv2a_jax.logbook import Logbook
from spatialv2a_jax.training import cluster, preemption, train_step, waiting


@dataclasses.dataclass
class Evaluation:
  """Hook of the loop: the loss of the averaged weights on held-out clips, and some sound."""

  loss: train_step.Loss
  config: Mapping[str, Any]
  mesh: Mesh
  rules: sharding.Rules
  source: Any  # `tasks.Source`.
  listener: Listener | None = None
  step: Callable[..., Any] | None = None
  ledger: goodput.Ledger = dataclasses.field(default_factory=goodput.Ledger)  # Of the process.

  def __call__(
    self, state: train_step.State, step: int, book: Logbook, leave: preemption.StopSignal
  ) -> Mapping[str, float] | None:
    """Returns the means over the held-out clips; None if the run must stop meanwhile."""
    data = self.config["data"]
    total: dict[str, float] = {}
    weight, first = 0.0, None
    feed = waiting.Feed(self._batches())
    for _ in range(data["eval_batches"]):
      try:
        local = self._next(feed, leave.due)
        if local is None:
          break
        batch = sharding.global_batch(local, self.mesh, self.rules, data["batch_size"])
        evaluate = self._compile(state, batch, leave.due)
        waiting.run(cluster.meet, leave.due)
      except waiting.GivenUpError:
        return None
      if leave.poll():  # Before, and not after, all processes work on the batch together.
        return None
      first = local if first is None else first
      values = jax.device_get(evaluate(*state.averages()[0], batch))
      clips = float(values.pop("clips"))
      total = {name: total.get(name, 0.0) + clips * float(value) for name, value in values.items()}
      weight += clips
    listen = self.listener
    if listen is not None and first is not None:
      params, stats = state.averages()[0]
      if jax.process_count() > 1:  # All of them gather, one listens.
        params, stats = gather(params), gather(stats)
      with contextlib.suppress(waiting.GivenUpError):
        if jax.process_index() == 0:
          waiting.run(lambda: listen(params, stats, first, step, book), leave.due)
        waiting.run(cluster.meet, leave.due)
      if leave.poll():
        return None
    return {f"eval/{name}": value / max(weight, 1.0) for name, value in total.items()}

  def check(self) -> None:
    """Raises UserError if the held-out clips cannot be read or are none of this run's."""
    self._read().close()

  def _read(self) -> Any:
    return self.source.read(self.config["data"]["eval"], seed=None, epochs=1)

  def _batches(self) -> Iterator[Mapping[str, np.ndarray]]:
    yield from self._read()

  def _next(self, feed: waiting.Feed, leave: Callable[[], bool]) -> Mapping[str, np.ndarray] | None:
    """Returns the next batch, or None after the last."""
    with self.ledger.during("data"):
      try:
        return feed.next(leave)
      except StopIteration:
        return None

  def _compile(self, state, batch, leave) -> Callable[..., Any]:
    """Compiles the evaluation step once; no layout or shape changes in a run."""
    if self.step is None:
      step: Any = train_step.make_eval_step(
        self.loss,
        key=jax.random.key(self.config["seed"], impl="threefry2x32"),
        mesh=self.mesh,
        rules=self.rules,
        layout=_averages(jax.tree.map(lambda x: x.sharding, state)),
      )
      with self.ledger.during("compile"):
        self.step = waiting.run(lambda: step.lower(*state.averages()[0], batch).compile(), leave)
    return self.step  # pyright: ignore[reportReturnType]


def _averages(layout: train_step.State) -> train_step.State:
  """Returns a layout whose parameters lie where the averages do, which are what is evaluated."""
  return layout.replace(params=layout.ema, stats=layout.means[0])  # pyright: ignore


def gather(tree: Any) -> Any:
  """Returns whole arrays on the host of every process."""
  if jax.process_count() > 1:
    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_get(tree)
