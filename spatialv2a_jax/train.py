"""The training loop: restore or begin, step, log, evaluate, save, stop. Knows no file and no flag.

A run is a function of its seed, its configuration and the step: killed at any moment and started
again on the same machine, it ends with the same bits as one that was never killed.
"""

import dataclasses
import json
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import spatialv2a_jax
from spatialv2a_jax import optim, sharding
from spatialv2a_jax.checkpoint import Checkpoints
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.io import atomic_path
from spatialv2a_jax.logbook import Logbook
from spatialv2a_jax.preemption import Interrupted, StopSignal
from spatialv2a_jax.train_step import Loss, State, init_state, make_train_step, overwrite

Batches = Callable[[int], Iterator[Mapping[str, np.ndarray]]]

# Dense bfloat16 FLOP/s of one device, as the vendors publish them.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "A100": 312e12,
  "H100": 989e12,
  "H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class Every:
  """How often things happen, in steps; 0 turns `eval` off and keeps no old checkpoints.

  Attributes:
    log: between lines of the log; their values are means since the line before.
    eval: between calls of the evaluation hook.
    checkpoint: between checkpoints.
    keep: checkpoints whose step is a multiple of it stay for ever; of the others, the newest 3.
  """

  log: int = 50
  eval: int = 0
  checkpoint: int = 1000
  keep: int = 0


@dataclasses.dataclass
class _Meter:
  """What is measured since the last line of the log."""

  sums: dict[str, float] = dataclasses.field(default_factory=dict)
  steps: int = 0
  waited: float = 0.0
  since: float = dataclasses.field(default_factory=time.perf_counter)

  def add(self, values: Mapping[str, float]) -> None:
    self.steps += 1
    for name, value in values.items():
      self.sums[name] = self.sums.get(name, 0.0) + value

  def means(self) -> dict[str, float]:
    return {name: value / max(self.steps, 1) for name, value in self.sums.items()}


def stream(seed: int, name: str) -> jax.Array:
  """Returns the key of one use of randomness in a run."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def fit(
  workdir: str | pathlib.Path,
  *,
  kind: str,
  config: Mapping[str, Any],
  batches: Batches,
  batch_size: int,
  loss: Loss,
  init: Callable[[jax.Array], Any],
  optimizer: optim.Optimizer,
  mesh: Mesh,
  steps: int,
  stats: Any = None,
  values: Callable[[], Mapping[str, Any]] | None = None,
  rules: sharding.Rules | None = None,
  ema: optim.Ema | None = None,
  seed: int = 0,
  every: Every | None = None,
  accumulate: int = 1,
  evaluate: Callable[[State, int, Logbook], Mapping[str, float] | None] | None = None,
  flops_per_clip: float | None = None,
  say: Callable[[str], None] = print,
) -> State:
  """Trains to `steps`, from the newest checkpoint of `workdir` if there is one.

  Args:
    workdir: gets checkpoints/, metrics.jsonl, config.json and TensorBoard events.
    kind: what is trained, "flow" or "vae"; a checkpoint of another kind is refused.
    config: the resolved configuration, JSON-able; stored with every checkpoint.
    batches: from the index of a batch to the iterator that begins there. A batch is a dict of
      arrays with the rows that `sharding.local_rows` gives this process; `id_b` names its clips.
    batch_size: clips per step over all processes.
    loss: (params, stats, batch, key) -> (value, (metrics, new stats)).
    init: from a key to parameters, boxed with their axis names.
    optimizer: from `optim.adamw`.
    mesh: from `sharding.make_mesh`.
    steps: updates of the whole run.
    stats: running statistics to start from.
    values: part of the parameter tree that replaces what `init` makes; called in a new run only.
    rules: meaning of the axis names.
    ema: moving average of the parameters.
    seed: of parameters and noise.
    every: how often to log, evaluate and save.
    accumulate: parts of a batch that are processed one after the other.
    evaluate: hook (state, step, logbook) -> scalars to log, or None.
    flops_per_clip: of forward and backward pass, for the model FLOP utilisation.
    say: prints one line.

  Returns:
    The state after the last step.

  Raises:
    Interrupted: after SIGTERM or SIGINT, once the state is saved (exit code 42).
    UserError: if the workdir holds another model, the data ends early, or the loss is not finite
      (exit code 1; `stopped.json` then names the clips of that step).
  """
  workdir, every = pathlib.Path(workdir), every or Every()
  rules, stats = rules or sharding.Rules(), {} if stats is None else stats
  say = say if jax.process_index() == 0 else lambda _: None
  sharding.local_rows(mesh, rules, batch_size)  # Fails before anything is built.
  if batch_size % accumulate:
    raise UserError(f"batch_size {batch_size} does not divide by accumulate {accumulate}")
  config = json.loads(json.dumps(config))
  create, abstract, layout = init_state(init, stats, optimizer, stream(seed, "init"), mesh, rules)

  checkpoints = Checkpoints(workdir, keep_every=every.keep or None)
  try:
    state, run = _begin(checkpoints, create, values, abstract, kind, config, say)
    start = int(state.step)
    if start >= steps:
      say(f"this run is finished: {workdir} holds step {start} of {steps}; nothing to do")
      return state
    _describe(state, mesh, batch_size, workdir, config, say)
    loop = _Loop(
      workdir=workdir,
      steps=steps,
      batch_size=batch_size,
      every=every,
      checkpoints=checkpoints,
      run={"kind": kind, "config": config, "versions": _versions()},
      first=(start, int(run.get("examples", 0))),
      evaluate=evaluate,
      flops_per_clip=flops_per_clip,
      say=say,
    )
    step = make_train_step(
      loss,
      optimizer,
      key=stream(seed, "train"),
      mesh=mesh,
      rules=rules,
      layout=layout,
      ema=ema,
      accumulate=accumulate,
    )
    with Logbook(workdir, start + 1, writer=jax.process_index() == 0) as book, StopSignal() as stop:
      source = batches(loop.examples(start) // batch_size)
      rows = _rows(source, mesh, rules, batch_size)
      return loop(state, step, rows, mesh, book, stop)
  finally:
    checkpoints.close()


def _begin(
  checkpoints, create, values, abstract, kind, config, say
) -> tuple[State, dict[str, Any]]:
  """Returns the newest state and its `run` item, or a new state and an empty one."""
  latest = checkpoints.latest()
  if latest is not None and (there := checkpoints.run(latest).get("kind")) != kind:
    raise UserError(f"{checkpoints.folder} holds a run of kind {there!r}, not {kind!r}")
  found = checkpoints.restore(abstract, warn=say)
  if found is None:
    return overwrite(create(), values() if values else {}), {}
  state, run = found
  age = max(time.time() - run["time"], 0)
  say(f"resumed at step {int(state.step)} from a checkpoint saved {_duration(age)} ago")
  for line in _changes(run["config"], config):
    say(f"  changed since then: {line}")
  return state, run


def _rows(source, mesh, rules, batch_size):
  """Yields (clip ids, global batch); the copy to the devices runs while they compute."""
  for batch in source:
    ids = np.asarray(batch.get("id_b", ()))
    yield ids, sharding.global_batch(batch, mesh, rules, batch_size)


@dataclasses.dataclass
class _Loop:
  """The loop itself, between the first batch and the last checkpoint."""

  workdir: pathlib.Path
  steps: int
  batch_size: int
  every: Every
  checkpoints: Checkpoints
  run: dict[str, Any]
  first: tuple[int, int]  # Step and number of examples seen where this process began.
  evaluate: Callable[..., Any] | None
  flops_per_clip: float | None
  say: Callable[[str], None]

  def examples(self, step: int) -> int:
    """Returns the data position: how many clips the run has seen before `step`."""
    return self.first[1] + (step - self.first[0]) * self.batch_size

  def save(self, step: int, state: State) -> None:
    self.checkpoints.save(step, state, {**self.run, "step": step, "examples": self.examples(step)})

  def __call__(self, state, jitted, rows, mesh, book, stop) -> State:
    # Un-awaited collectives of several CPU devices can wait for each other's threads for ever.
    lockstep = jax.default_backend() == "cpu" and mesh.size > 1
    start = self.first[0]
    ids, batch = self._next(rows, start, _Meter())
    clock = time.perf_counter()
    compiled = jitted.lower(state, batch).compile()
    self.say(f"compiled in {time.perf_counter() - clock:.1f} s; training to step {self.steps}")
    meter, pending = _Meter(), None
    for step in range(start, self.steps):
      state, metrics = compiled(state, batch)
      if lockstep:
        jax.block_until_ready(metrics)
      done, seen = step + 1, ids
      if done < self.steps:
        ids, batch = self._next(rows, done, meter)
      # One step late: the device works on step n while the host reads step n - 1.
      if pending:
        self._settle(*pending, meter)
      pending = (done, metrics, seen)

      stopping = stop.asked(done)
      saves = stopping or done == self.steps or done % self.every.checkpoint == 0
      evaluates = done == self.steps or bool(self.every.eval and done % self.every.eval == 0)
      logs = saves or done % self.every.log == 0
      if logs or evaluates:
        self._settle(*pending, meter)  # A state is never saved before its loss was seen.
        pending = None
      if done % self.every.log == 0 or done == self.steps or stopping:
        self._log(done, meter, book)
        meter = _Meter()
      pause = time.perf_counter()
      if saves:
        self.save(done, state)
      if evaluates and self.evaluate and (scalars := self.evaluate(state, done, book)):
        book.scalars(done, scalars)
      meter.since += time.perf_counter() - pause
      if stopping and done < self.steps:
        self.checkpoints.wait()
        self.say(f"stopped at step {done} and saved; the same command goes on from there")
        raise Interrupted
    self.checkpoints.wait()
    self.say(f"finished: step {self.steps} saved in {self.workdir}")
    return state

  def _next(self, rows, step, meter):
    clock = time.perf_counter()
    try:
      return next(rows)
    except StopIteration:
      raise UserError(f"the data ended before step {step} of {self.steps}") from None
    finally:
      meter.waited += time.perf_counter() - clock

  def _settle(self, step, metrics, ids, meter) -> None:
    """Fetches the metrics of a step and stops the run if they are not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    meter.add(values)
    if all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
      return
    clips = [int(i) for i in ids]
    with atomic_path(self.workdir / "stopped.json") as temporary:
      report = {"step": step, "clips": clips, "metrics": {k: str(v) for k, v in values.items()}}
      pathlib.Path(temporary).write_text(json.dumps(report))
    shown = ", ".join(map(str, clips[:8])) + (", ..." if len(clips) > 8 else "")
    raise UserError(
      f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}; clips {shown} "
      f"(all in {self.workdir}/stopped.json); newest checkpoint: {self.checkpoints.latest()}",
      exit_code=1,
    )

  def _log(self, step, meter, book) -> None:
    seconds = max(time.perf_counter() - meter.since, 1e-9)
    clips = meter.steps * self.batch_size / seconds
    values = meter.means() | {"clips_per_s": clips, "data_wait": meter.waited / seconds}
    values["mfu"] = mfu(self.flops_per_clip, clips)
    book.scalars(step, values)
    left = _duration((self.steps - step) * self.batch_size / clips)
    self.say(
      f"step {step}/{self.steps}  loss {values['loss']:.4f}  grad {values['grad_norm']:.3f}  "
      f"{clips:.1f} clips/s  data {100 * values['data_wait']:.0f} %  {left} left"
    )


def peak_flops() -> float | None:
  """Returns the bfloat16 FLOP/s of one device of this machine; None if it is not in the table."""
  kind = jax.devices()[0].device_kind
  return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def mfu(flops_per_clip: float | None, clips_per_s: float) -> float:
  """Returns the share of the devices' peak that the model needs; NaN where it is unknown."""
  peak = peak_flops()
  if peak is None or flops_per_clip is None:
    return math.nan
  return flops_per_clip * clips_per_s / (peak * jax.device_count())


def _describe(state, mesh, batch_size, workdir, config, say) -> None:
  """Prints what is about to be trained, and writes config.json."""
  count = sum(x.size for x in jax.tree.leaves(state.params))
  size = sharding.bytes_per_device(state) / 2**20
  axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
  kind = mesh.devices.flat[0].device_kind
  say(
    f"{count / 1e6:.2f} M parameters, {size:.0f} MiB of state per device; "
    f"mesh {axes} on {mesh.size} x {kind}; batch {batch_size}"
  )
  if jax.process_index() == 0:
    with atomic_path(workdir / "config.json") as temporary:
      pathlib.Path(temporary).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _changes(old: Any, new: Any, name: str = "config") -> Iterator[str]:
  """Yields one line per entry that differs."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    for key in sorted(old.keys() | new.keys()):
      yield from _changes(old.get(key), new.get(key), f"{name}.{key}")
  elif old != new:
    yield f"{name} {old!r} -> {new!r}"


def _versions() -> dict[str, str]:
  return {"spatialv2a_jax": spatialv2a_jax.__version__, "jax": jax.__version__}


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
