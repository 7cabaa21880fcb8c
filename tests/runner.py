"""A run of the toy problem in a process of its own, with faults on request.

python -m tests.runner JSON, with the fields of `Options`; exit codes are those of `launch.train`.
"""

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import pipeline, shards
from launch import evaluation
from launch import train as launcher
from spatialv2a_jax import goodput, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import checkpoint, cluster, guard, optim, recipe, replay
from tests.training import test_train_step as toy

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class Options:
  """What to run; a fault strikes when the batch of index `at` is asked for, or in its step."""

  workdir: str
  steps: int = 8
  fault: str = ""
  at: int = 5
  rank: int = 0  # Of the process that the fault strikes.
  log: int = 1
  checkpoint: int = 2
  keep: int = 0
  average: int = 0
  eval: int = 0
  limits: dict = dataclasses.field(default_factory=dict)
  guard: dict = dataclasses.field(default_factory=lambda: {"sigma": 0.0})
  pause: float = 0.0  # Seconds before each batch.
  shards: str = ""
  digest: str = ""  # Of the data.
  workers: int = 0
  shape: tuple = (1, 1, 1)
  batch_size: int = 8
  sgd: bool = False
  ballast: int = 0  # Random values in the state that never change.
  join: dict | None = None
  verify: bool = False


def command(**options) -> list[str]:
  return [sys.executable, "-m", "tests.runner", json.dumps(options)]


def environment(devices: int = 1) -> dict[str, str]:
  """Bits depend on the size of the thread pool, and so does progress with forced devices."""
  more = {"JAX_PLATFORMS": "cpu", "NPROC": "16", "JAX_NUM_CPU_DEVICES": str(devices)}
  return {**os.environ, **more, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def hang() -> None:
  print("hanging", flush=True)
  time.sleep(1000)


def fill(folder: str) -> None:
  """Fills a small disk that was made for it; elsewhere files can grow no more."""
  if shutil.disk_usage(folder).total > 64 << 20:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return
  with open(pathlib.Path(folder) / "fill", "wb", buffering=0) as file:
    for size in (1 << 16, 1):
      with contextlib.suppress(OSError):
        while file.write(bytes(size)):
          pass


class Late:
  """What Orbax waits for in the background, which is there later, or not at all."""

  def __init__(self, future, folder: pathlib.Path, fails: bool):
    self.future, self.folder, self.fails = future, folder, fails
    self.before = self.complete()

  def complete(self) -> set[str]:
    return {path.name for path in self.folder.glob("*") if path.name.isdigit()}

  def result(self, timeout=None):
    if self.fails:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    time.sleep(2)
    assert self.complete() == self.before, "complete before all of it is written"
    return self.future.result(timeout)


def handlers(options: Options):
  """Makes handlers of arrays, of which that of checkpoints is late or that of averages fails."""
  made = []
  make = checkpoint.tree_handler
  struck = {"late checkpoint": 0, "no average": 1}.get(options.fault)

  def handler():
    one = make()
    save, number = one.async_save, len(made)
    made.append(one)

    async def async_save(*arguments, **more):
      folder = pathlib.Path(options.workdir) / ("checkpoints", "averages")[number]
      futures = await save(*arguments, **more) or []
      return [Late(future, folder, fails=number == 1) for future in futures]

    if number == struck and jax.process_index() == options.rank:
      one.async_save = async_save
    return one

  return handler


def loss(options: Options):
  """That of the toy problem; a step with `slow_b` hangs, and tracing can be made to last."""

  def wait():
    time.sleep(1000)

  def function(params, stats, batch, key):
    if options.fault == "compile":
      hang()
    if "mean_betc" in batch:
      rows = batch["mean_betc"].shape[0]
      batch = {**batch, "x_bw": 0.02 * batch["mean_betc"].reshape(rows, -1)[:, :8]}
    if options.fault == "step":
      jax.lax.cond(batch["slow_b"].any(), lambda: jax.debug.callback(wait), lambda: None)
    value, (metrics, new) = toy.toy_loss(params, stats, batch, key)
    return value, (metrics, stats | new)

  return function


def batches(options: Options, mesh):
  """Returns the source of the rows of this process."""
  rules = sharding.Rules()
  first, last = sharding.local_rows(mesh, rules, options.batch_size)

  def plain(start):
    if options.shards:
      return pipeline.loader(
        shards.paths(options.shards),
        batch_size=options.batch_size,
        seed=3,
        mirror=True,
        start_step=start,
        workers=options.workers,
        rows=(first, last),
      )
    made = (toy.toy_batch(i, options.batch_size) for i in range(start, 10**9))
    return ({name: x[first:last] for name, x in batch.items()} for batch in made)

  class Source:
    digests = staticmethod(lambda: {"path": options.digest} if options.digest else {})

    def __init__(self, start):
      self.inner, self.index = plain(start), start
      self.bad = {}

    def __iter__(self):
      return self

    def __next__(self):
      time.sleep(options.pause)
      batch = dict(next(self.inner))
      self.bad = getattr(self.inner, "bad", {})
      if options.fault == "step":
        slow = self.index == options.at and options.rank == jax.process_index()
        batch["slow_b"] = np.full(last - first, slow)
      elif self.index >= options.at and options.rank == jax.process_index():
        self.strike(batch)
      self.index += 1
      return batch

    def strike(self, batch):
      if options.fault in ("nan", "spike"):
        if self.index == options.at or options.fault == "nan":
          batch["x_bw"] = batch["x_bw"] * (np.nan if options.fault == "nan" else 1e3)
      elif self.index > options.at:
        return
      elif options.fault == "mistake":
        raise UserError("a mistake")
      elif options.fault == "error":
        raise ZeroDivisionError
      elif options.fault == "data":
        hang()
      elif options.fault == "interpreter":
        ctypes.PyDLL(None).sleep(1000)  # Unlike `time.sleep`, this keeps all threads from running.
      elif options.fault == "disk":
        last = self.index // options.checkpoint * options.checkpoint
        while not (pathlib.Path(options.workdir) / "checkpoints" / str(last)).is_dir():
          time.sleep(0.01)
        fill(options.workdir)
      elif options.fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, options.fault))

  return Source


def evaluate(options: Options, mesh):
  """Returns a hook that takes long if that is the fault, and heeds no signal if it is "blind"."""

  def hook(state, step, book, leave):
    if options.fault in ("eval", "blind") and step == options.at:
      print("evaluating", flush=True)
      for _ in range(10_000):
        time.sleep(0.1)
        if options.fault == "eval" and leave.poll():
          return None
    return {"eval/norm": float(jnp.square(state.params["up"]["kernel"]).sum())}

  class Source:
    """The second evaluation has no data beyond its first batch."""

    evaluations = 0

    def read(self, path, **_):
      self.evaluations += 1
      yield next(batches(options, mesh)(0))
      if self.evaluations == 2 and options.fault == "eval data":
        hang()

  if options.eval and options.fault == "eval data":
    data = {"eval": "held out", "eval_batches": 2, "batch_size": options.batch_size}
    config = {"data": data, "seed": 0}
    return evaluation.Evaluation(loss(options), config, mesh, sharding.Rules(), Source())
  return hook if options.eval else None


def made_of(options: Options) -> recipe.Recipe:
  """Returns what the steps are made of."""
  devices = jax.devices()[: int(np.prod(options.shape))]
  mesh = sharding.make_mesh(*options.shape, devices=devices)
  shapes = jax.eval_shape(toy.toy_init, jax.random.key(0))
  stats: dict[str, Any] = {"mean": np.zeros(8, np.float32)}
  if options.ballast:  # Split by `fsdp`: what all processes hold alike, one of them writes.
    ballast = np.random.default_rng(0).standard_normal(options.ballast, np.float32)
    stats["ballast"] = nn.LogicallyPartitioned(ballast, ("width",))

  def init(key):
    if options.fault == "init":
      hang()
    return toy.toy_init(key)

  def values():
    if options.fault == "values":
      hang()
    return {}

  return recipe.Recipe(
    batches=batches(options, mesh),
    batch_size=options.batch_size,
    loss=loss(options),
    init=init,
    values=values,
    stats=stats,
    optimizer=toy.SGD if options.sgd else optim.adamw(optim.Config(lr=1e-2, warmup=2), shapes),
    mesh=mesh,
    ema=optim.Ema(sigma_rel=0.1) if options.average else None,
    guard=guard.Config(**options.guard),
  )


def verify(options: Options, say=print, **span) -> bool:
  return replay.verify(options.workdir, made_of(options), say=say, **span)


def main(options: Options) -> int:
  ledger = goodput.Ledger(goodput.process_began())
  if options.join:
    cluster.start(**options.join)
  if options.verify:
    return 0 if verify(options) else 1
  made = made_of(options)

  def export(path, params, stats):
    if options.fault == "export" and options.rank == jax.process_index():
      hang()

  task = types.SimpleNamespace(
    evaluate=evaluate(options, made.mesh), export=export, flops=lambda: None, tokens=None
  )
  config = {
    "kind": "toy",
    "steps": options.steps,
    "every": {
      name: getattr(options, name) for name in ("log", "eval", "checkpoint", "keep", "average")
    },
    "limits": options.limits,
    "optim": {"lr": 1e-2, "warmup": 2},
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(launcher.tasks, "mesh_of", lambda _: made.mesh)
    patch.setattr(launcher.tasks, "recipe", lambda *_: (task, made))
    patch.setattr(checkpoint, "tree_handler", handlers(options))
    if options.fault == "restore" and options.rank == jax.process_index():
      die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
      patch.setattr(checkpoint.Checkpoints, "_check_layout", die)
    return launcher.run(launcher.Arguments(config, options.workdir), ledger)


if __name__ == "__main__":
  launcher.run_process(lambda: launcher.told(lambda: main(Options(**json.loads(sys.argv[1])))))
