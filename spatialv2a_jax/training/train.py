"""A training run: restore or begin, then the loop. Knows no file and no flag.

A run is a function of its seed, its configuration and the step: killed at any moment and started
again on the same machine, it ends with the same bits as one that was never killed.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import spatialv2a_jax
from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.goodput import Ledger
from spatialv2a_jax.io import atomic_path
from spatialv2a_jax.logbook import Logbook, read_metrics
from spatialv2a_jax.training import averages, cluster, optim, waiting
from spatialv2a_jax.training import guard as guards
from spatialv2a_jax.training import recipe as recipes
from spatialv2a_jax.training.checkpoint import Checkpoints
from spatialv2a_jax.training.faults import Faults
from spatialv2a_jax.training.loop import Every, Loop
from spatialv2a_jax.training.meter import Meter, duration
from spatialv2a_jax.training.preemption import Interrupted, StopSignal
from spatialv2a_jax.training.recipe import Recipe
from spatialv2a_jax.training.train_step import State
from spatialv2a_jax.training.watchdog import Watchdog

Hook = Callable[[State, int, Logbook, StopSignal], Mapping[str, float] | None]


def fit(
  workdir: str | pathlib.Path,
  recipe: Recipe,
  *,
  kind: str,
  config: Mapping[str, Any],
  steps: int,
  every: Every | None = None,
  limits: Mapping[str, float] | None = None,
  evaluate: Hook | None = None,
  flops_per_clip: float | None = None,
  tokens_per_clip: int | None = None,
  ledger: Ledger | None = None,
  watchdog: Watchdog | None = None,
  say: Callable[[str], None] = print,
) -> State:
  """Trains to `steps`, from the newest checkpoint of `workdir` if there is one.

  Args:
    workdir: gets checkpoints/, metrics.jsonl, config.json and TensorBoard events; faults/,
      stacks/ and profile/ where there is need.
    recipe: what the steps are made of.
    kind: what is trained, such as "flow"; a checkpoint of another kind is refused.
    config: the resolved configuration, JSON-able; stored with every checkpoint.
    steps: updates of the whole run.
    every: how often to log, evaluate and save.
    limits: seconds after which a phase counts as hung, as `watchdog.LIMITS`.
    evaluate: hook (state, step, logbook, stop) -> scalars to log. It may ask `stop.poll()` at the
      same places in every process, and returns None if the answer is yes; it is then called
      again when the run goes on. The names of the scalars begin with "eval/".
    flops_per_clip: of forward and backward pass, for the model FLOP utilisation.
    tokens_per_clip: for the rate of tokens.
    ledger: that of a process which began before this call.
    watchdog: of that ledger, which then has the limits; None: one for this call alone.
    say: prints one line.

  Returns:
    The state after the last step.

  Raises:
    Interrupted: after SIGTERM or SIGINT, once the state is saved (exit code 42).
    UserError: if the workdir holds another model, the data ends early, a checkpoint cannot be
      written, or too many updates were left out (the last two with exit code 1).

  A phase that hangs ends the process with exit code 43 and the stacks of its threads.
  """
  workdir, every, ledger = pathlib.Path(workdir), every or Every(), ledger or Ledger()
  say = say if jax.process_index() == 0 else lambda _: None
  widths = recipe.ema.widths if recipe.ema else ()
  if every.average and not any(widths):
    raise UserError(
      "every.average keeps snapshots of power-function averages: set ema.sigma_rel or ema.beside"
    )
  config = json.loads(json.dumps(config))
  about = {"kind": kind, "config": config, "versions": versions(), "machine": machine(recipe.mesh)}
  about["data"] = getattr(recipe.batches, "digests", dict)()
  about["averages"] = list(widths)

  with contextlib.ExitStack() as stack:
    watchdog = watchdog or stack.enter_context(Watchdog(ledger, workdir, limits))
    cluster.see_same(workdir)
    cluster.agree("data", json.dumps(about["data"]))
    checkpoints = stack.enter_context(Checkpoints(workdir, keep_every=every.keep or None))
    stop = stack.enter_context(StopSignal())
    if recipe.values is not None:
      read, origin = recipe.values, config.get("init_from", "")

      def values() -> recipes.Values:
        found = _patient(read, ledger, stop, say)
        if origin:
          say(_taken(found, abstract.params, origin))
        return found

      recipe = dataclasses.replace(recipe, values=values)
    create, abstract, layout = recipe.state()

    def new() -> State:
      with ledger.during("compile"):  # Which is what creating takes.
        state = create()
      return recipe.begin(state)

    with ledger.during("restore"):
      state, run = _begin(checkpoints, new, abstract, about, say)
      start, rows = int(state.step), read_metrics(workdir)
      evaluations = _evaluations(rows, start)
      evaluated = _agreed(start, bool(evaluations), workdir)
    ledger.resume(run.get("ledger"), rows, evaluations)
    evaluated = evaluated or evaluate is None or not every.evaluates(start, steps)
    # Opened also to delete: snapshots after `start` would pass for those of the steps to come.
    there = every.average or (workdir / averages.FOLDER).is_dir()
    snapshots = stack.enter_context(averages.Snapshots(workdir, widths if there else (), start))
    if start and every.averages(start, steps) and start not in snapshots:
      snapshots.save(start, state.averages())  # Killed before it was on disk.
    if start > steps or (start == steps and evaluated):
      say(f"this run is finished: {workdir} holds step {start} of {steps}; nothing to do")
      return state
    if any(every.profile) and not (every.profile[0] <= steps and every.profile[1] > start):
      say(f"every.profile={every.profile} traces nothing: steps {start + 1} to {steps} are left")
    _describe(state, recipe, workdir, config, say)
    book = stack.enter_context(Logbook(workdir, start + 1, writer=jax.process_index() == 0))
    loop = Loop(
      workdir=workdir,
      first=start,
      examples=int(run.get("examples", 0)),
      bad=run.get("bad_records", ()),
      steps=steps,
      batch_size=recipe.batch_size,
      every=every,
      checkpoints=checkpoints,
      snapshots=snapshots,
      run=about,
      meter=Meter(**run.get("meter", {})),
      faults=Faults(
        workdir,
        recipe.guard.cap,
        checkpoints.good,
        say,
        int(state.guard.skipped),
        start,
        getattr(recipe.batches, "names", dict),
      ),
      ledger=ledger,
      book=book,
      stop=stop,
      watchdog=watchdog,
      evaluate=evaluate,
      flops_per_clip=flops_per_clip,
      tokens_per_clip=tokens_per_clip,
      say=say,
    )
    feed = iter(()) if start == steps else recipe.feed(loop.examples)
    return loop(state, recipe.step(layout), feed, evaluated)


def _patient(
  values: Callable[[], recipes.Values],
  ledger: Ledger,
  stop: StopSignal,
  say: Callable[[str], None],
) -> recipes.Values:
  """Returns `values()`, which may read data, after a wait that heeds signals."""
  found: recipes.Values = {}
  with ledger.during("data"), contextlib.suppress(waiting.GivenUpError):
    found = waiting.run(values, stop.due)
    waiting.run(cluster.meet, stop.due)  # None goes on while another can still be asked to stop.
  if stop.poll():
    say("stopped at step 0 before the first step; the same command goes on from there")
    raise Interrupted
  return found


def _taken(found: recipes.Values, params: Any, origin: str) -> str:
  """Returns the line that says how much of a network comes from another; UserError if nothing."""
  taken = set(optim.names(found[0] if isinstance(found, tuple) else found))
  known = optim.names(params)
  rest = [name for name in known if name not in taken]
  if len(rest) == len(known):
    raise UserError(f"config.init_from: nothing in {origin} is a parameter of this network")
  some = ", ".join(rest[:5]) + (", ..." if len(rest) > 5 else "")
  others = f", others as initialised: {some}" if rest else ""
  return f"{len(known) - len(rest)} of {len(known)} parameters from {origin}{others}"


def _begin(checkpoints, create, abstract, about, say) -> tuple[State, dict[str, Any]]:
  """Returns the newest state and its `run` item, or a new state and an empty one."""
  found = checkpoints.restore(abstract, about["kind"], warn=say)
  if found is None:
    return create(), {}
  state, run = found
  if (widths := run.get("averages", about["averages"])) != about["averages"]:
    raise UserError(
      f"the checkpoint's averages are of widths {widths}, not {about['averages']}: leave ema as it "
      "was, or use another --workdir, with the weights as init_from"
    )
  age = max(time.time() - run["time"], 0)
  say(f"resumed at step {int(state.step)} from a checkpoint saved {duration(age)} ago")
  for name in ("config", "machine", "versions", "data"):
    for line in changes(run.get(name), about[name], name) if name in run else ():
      say(f"  changed since then: {line}")
  return judged(state, run, about), run


def judged(state: State, then: Mapping[str, Any], now: Mapping[str, Any]) -> State:
  """Returns a state whose guard begins anew if losses or gradients may be other ones than before.

  What it left out never enters what it takes for usual: it would leave out all that follows.

  Args:
    state: of a checkpoint.
    then: "config" and "data" of the run that saved it.
    now: those of the steps to come.
  """

  def causes(about: Mapping[str, Any]) -> list[Any]:
    config = about.get("config") or {}
    optimizer, data = (config.get(name) or {} for name in ("optim", "data"))
    return [
      *(config.get(name) for name in ("model", "loss", "seconds")),
      optimizer.get("freeze"),
      *(data.get(name) for name in ("batch_size", "mirror")),
      (about.get("data") or {}).get("path"),
    ]

  if causes(then) == causes(json.loads(json.dumps(now))):
    return state
  return state.replace(guard=guards.anew(state.guard))  # pyright: ignore[reportAttributeAccessIssue]


def _agreed(start: int, evaluated: bool, workdir: pathlib.Path) -> bool:
  """Returns what process 0 has of `evaluated`; UserError if it begins at another step."""
  first, there = multihost_utils.broadcast_one_to_all(np.array([start, evaluated]))
  if first != start:
    raise UserError(
      f"process {jax.process_index()} has restored step {start}, process 0 step {first}: do all "
      f"processes see the same {workdir}?",
      exit_code=1,
    )
  return bool(there)


def _evaluations(rows: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
  """Returns the rows of the record, of which `rows` are all, with the evaluation of a step."""
  return [x for x in rows if x["step"] == step and any(k.startswith("eval/") for k in x)]


def machine(mesh: Mesh) -> dict[str, Any]:
  """Returns what the bits of a run depend on besides configuration and versions, JSON-able."""
  kind = mesh.devices.flat[0].device_kind
  flags = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
  about = {
    "axes": {name: int(size) for name, size in mesh.shape.items()},
    "device": kind,
    "processes": jax.process_count(),
    # Draws hang on it.
    "threefry_partitionable": bool(jax.config.jax_threefry_partitionable),  # pyright: ignore
    "runtime": mesh.devices.flat[0].client.platform_version,
    "xla_flags": sorted(x for x in flags.split() if not x.startswith("--xla_dump")),
  }
  if kind == "cpu":  # Sums are split over the threads of the pool.
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0]
    about["threads"] = int(os.environ.get("NPROC") or len(cores))
  return about


def _describe(state, recipe, workdir, config, say) -> None:
  """Prints what is about to be trained, and writes config.json."""
  count = sum(x.size for x in jax.tree.leaves(state.params))
  size = sharding.bytes_per_device(state) / 2**20
  mesh = recipe.mesh
  axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
  kind = mesh.devices.flat[0].device_kind
  say(
    f"{count / 1e6:.2f} M parameters, {size:.0f} MiB of state per device; "
    f"mesh {axes} on {mesh.size} x {kind}; batch {recipe.batch_size}"
  )
  for line in sharding.zero_remarks(sharding.zero_whole(state.opt, mesh, recipe.rules.zero)):
    say(line)
  if jax.process_index() == 0:
    with atomic_path(workdir / "config.json") as temporary:
      pathlib.Path(temporary).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def changes(old: Any, new: Any, name: str) -> Iterator[str]:
  """Yields one line per entry that differs."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    for key in sorted(old.keys() | new.keys()):
      yield from changes(old.get(key), new.get(key), f"{name}.{key}")
  elif old != new:
    yield f"{name} {old!r} -> {new!r}"


@functools.cache
def versions() -> dict[str, str]:
  """Returns the versions that a checkpoint names; `commit` if this is a checkout or a copy of one.

  A copy says it in a file COMMIT.
  """
  found = {"spatialv2a_jax": spatialv2a_jax.__version__}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain"):
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  root = pathlib.Path(__file__).parents[2]
  if (root / ".git").exists():
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
      done = subprocess.run(
        [*describe, "--exclude=*"], capture_output=True, text=True, check=True, timeout=30
      )
      found["commit"] = done.stdout.strip()
  elif (root / "COMMIT").is_file():
    found["commit"] = (root / "COMMIT").read_text().strip()
  return found
