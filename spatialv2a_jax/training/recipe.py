"""What the steps of a run are made of: what its bits depend on, and nothing else."""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import guard as guards
from spatialv2a_jax.training import optim
from spatialv2a_jax.training.loop import Batch
from spatialv2a_jax.training.train_step import Loss, State, init_state, make_train_step, overwrite

Batches = Callable[..., Iterator[Mapping[str, np.ndarray]]]
# Parts of the parameter tree, or of it and of the running statistics.
Values = Mapping[str, Any] | tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The state of a run, its step and its data are functions of this and of the step number.

  Attributes:
    batches: from the index of a batch to the iterator that begins there. A batch is a dict of
      arrays with the rows that `sharding.local_rows` gives this process; `id_b` names its clips.
      The iterator's attribute `bad`, if it has one, holds the numbers of damaged records; the
      function's attribute `names`, if it has one, returns the names of clips by their ids. A run
      whose batches were of another size before also gives `offset`, the clips before batch 0.
    batch_size: clips per step over all processes.
    loss: (params, stats, batch, key) -> (value, (metrics, new stats)).
    init: from a key to parameters, boxed with their axis names.
    optimizer: from `optim.adamw`.
    mesh: from `sharding.make_mesh`.
    stats: running statistics to start from.
    values: parts that replace what `init` makes and `stats`; called in a new run only.
    rules: meaning of the axis names.
    ema: moving average of the parameters; None is the default one.
    seed: of parameters and noise.
    accumulate: parts of a batch that are processed one after the other.
    guard: which updates are left out, and when there are too many of them.

  Raises:
    UserError: if the batch does not divide by the devices, or its parts by `accumulate` do not.
  """

  batches: Batches
  batch_size: int
  loss: Loss
  init: Callable[[jax.Array], Any]
  optimizer: optim.Optimizer
  mesh: Mesh
  stats: Any = dataclasses.field(default_factory=dict)
  values: Callable[[], Values] | None = None
  rules: sharding.Rules = dataclasses.field(default_factory=sharding.Rules)
  ema: optim.Ema | None = None
  seed: int = 0
  accumulate: int = 1
  guard: guards.Config = dataclasses.field(default_factory=guards.Config)

  def __post_init__(self):
    sharding.local_rows(self.mesh, self.rules, self.batch_size)
    parts = sharding.batch_parts(self.mesh, self.rules)
    # Otherwise the rows of each part would move between devices.
    if self.accumulate < 1 or self.batch_size % (self.accumulate * parts):
      raise UserError(
        f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate} x {parts} "
        "devices that split the batch; each part must give every device the same number of clips"
      )

  def state(self) -> tuple[Callable[[], State], Any, State]:
    """Returns what makes the state that `begin` takes, its shapes and its shardings."""
    key = _stream(self.seed, "init")
    return init_state(self.init, self.stats, self.optimizer, key, self.mesh, self.rules, self.ema)

  def begin(self, state: State) -> State:
    """Returns the state before the first step: a new one with `values` in it."""
    values = self.values() if self.values else {}
    return overwrite(state, *(values if isinstance(values, tuple) else (values,)))

  def step(self, layout: State) -> Callable[[State, Any], tuple[State, dict[str, jax.Array]]]:
    """Returns the jitted step of a state with these shardings."""
    return make_train_step(
      self.loss,
      self.optimizer,
      key=_stream(self.seed, "train"),
      mesh=self.mesh,
      rules=self.rules,
      layout=layout,
      ema=self.ema,
      accumulate=self.accumulate,
      guard=self.guard,
    )

  def feed(self, examples: int) -> Iterator[Batch]:
    """Returns the batches of all processes after so many examples, on the devices.

    The copy to the devices runs while they compute.
    """
    index, offset = divmod(examples, self.batch_size)
    source = self.batches(index, offset=offset) if offset else self.batches(index)

    def on_devices() -> Iterator[Batch]:
      for batch in source:
        whole = sharding.global_batch(batch, self.mesh, self.rules, self.batch_size)
        yield Batch(
          batch, whole, tuple(getattr(source, "bad", ())), getattr(source, "max_bad", None)
        )

    return on_devices()


def _stream(seed: int, name: str) -> jax.Array:
  """Returns the key of one use of randomness in a run, whatever JAX's default generator is."""
  key = jax.random.key(seed, impl="threefry2x32")  # Of "rbg", draws depend on the batch.
  return jax.random.fold_in(key, zlib.crc32(name.encode()))
