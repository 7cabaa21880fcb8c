"""Replays steps of a run from one of its checkpoints and compares: the proof that it repeats.

On the same mesh, devices and versions every logged number and every saved array must come out with
the same bits. Elsewhere sums have another order, which moves losses by the rounding of the type
that the network computes in, averaged over the values of a batch; every replayed step adds to it,
as in a random walk. So losses must agree to `TOLERANCE` times the root of the steps since the
checkpoint; arrays are only reported.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.logbook import read_metrics
from spatialv2a_jax.training import checkpoint, faults, optim, train
from spatialv2a_jax.training.checkpoint import Checkpoints
from spatialv2a_jax.training.meter import Meter
from spatialv2a_jax.training.recipe import Recipe
from spatialv2a_jax.training.train_step import State

# Of the loss after one step on another mesh, relative, by the type that the network computes in:
# about 80 roundings of float32, an eighth of one of bfloat16.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}
JUDGED = ("good", "skipped", "burst", "sigmas")  # Metrics of the guard, not means of a log line.


def settings(run: str | pathlib.Path, start: int | None = None) -> dict[str, Any]:
  """Returns the configuration of the steps after `start` (as `verify` takes it); starts no device.

  Raises:
    MissingAssetError: if there is no such run, or nothing was saved of it.
    UserError: if it cannot be read.
  """
  if not pathlib.Path(run).is_dir():
    raise MissingAssetError(f"no such run: {run}")
  files = checkpoint.saved_runs(run)
  begin = _begin([0, *files]) if start is None else start
  path = files.get(next((step for step in files if step > begin), max(files, default=0)))
  path = path or pathlib.Path(run) / "config.json"
  if not path.is_file():
    raise MissingAssetError(f"no complete checkpoint in {run}")
  try:
    content = json.loads(path.read_text())
    return dict(content["config"] if files else content)
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} cannot be read: {error}") from error


def verify(
  run: str | pathlib.Path,
  recipe: Recipe,
  *,
  dtype: str = "float32",
  config: Mapping[str, Any] | None = None,
  start: int | None = None,
  steps: int | None = None,
  say: Callable[[str], None] = print,
) -> bool:
  """Returns whether the replayed steps agree with the record; writes nothing.

  Args:
    run: working directory of the run.
    recipe: that of the run; its mesh need not be.
    dtype: coarsest type that the network computes in, a key of `TOLERANCE`.
    config: from which the recipe was made; where the run's was another one, that is told.
    start: step of the checkpoint to begin with, or with the one before if it is gone; 0: the
      beginning of the run; None: the last but one, or the beginning if there is only one.
    steps: how many to replay; None: up to the next checkpoint.
    say: prints one line per comparison.

  Raises:
    UserError: if there is no such checkpoint, or nothing to compare.
  """
  create, abstract, layout = recipe.state()
  with _open(run) as checkpoints:
    saved = [0, *checkpoints.steps()]
    start = _begin(saved) if start is None else start
    if start < saved[-1] and start not in saved:
      before = max(step for step in saved if step < start)
      say(f"{run} has no checkpoint of step {start} any more: from step {before}")
      start, steps = before, None if steps is None else steps + start - before
    if start not in saved:
      raise UserError(f"{run} has no checkpoint of step {start}, only {saved[1:]} and 0")
    rows = {row["step"]: row for row in read_metrics(run) if "loss" in row}
    reports = faults.reports(pathlib.Path(run))
    ends = [step for step in [*saved, max(rows, default=0)] if step > start]
    if not ends and steps is None:
      raise UserError(f"nothing was logged or saved after step {start} of {run}")
    end = min(ends) if steps is None else start + steps
    about = checkpoints.run(start) if start else {}
    state = checkpoints.read(start, abstract) if start else recipe.begin(create())
    if start and config is not None:
      state = train.judged(state, about, {**about, "config": config})
    step, feed = recipe.step(layout), recipe.feed(int(about.get("examples", 0)))
    say(f"replaying steps {start + 1} to {end} of {run}")
    meter, agreed, compared = Meter(**about.get("meter", {})), True, 0
    same = everywhere = True
    for done in range(start + 1, end + 1):
      if done == start + 1 or done - 1 in saved:  # What follows may be another process's work.
        by = next((step for step in saved if step >= done), saved[-1])
        same = _same(checkpoints.run(by) if by else {}, recipe.mesh, config, say)
        everywhere &= same
      state, metrics = step(state, next(feed).whole)
      bound = 0.0 if same else TOLERANCE[dtype] * math.sqrt(done - start)
      got = {name: float(value) for name, value in jax.device_get(metrics).items()}
      if got["good"]:
        meter.add({name: value for name, value in got.items() if name not in JUDGED})
      else:
        say(f"step {done}: left out, loss {got['loss']:.6g}, norm {got['grad_norm']:.6g}")
      if done in reports:
        agreed &= _compare_report(done, got, reports[done], bound, say)
        compared += 1
      if done in rows:
        agreed &= _compare_row(done, meter.means(), rows[done], bound, say)
        meter, compared = Meter(), compared + 1
      if done in saved:
        agreed &= _compare_state(done, state, checkpoints.read(done, abstract), same, say)
        compared += 1
  if not compared:
    raise UserError(f"no line of the log and no checkpoint between steps {start} and {end}")
  how = f"to {TOLERANCE[dtype]:g} times the root of the steps ({dtype}, another machine or mesh)"
  how = "bit for bit" if everywhere else how
  say(f"the run {'repeats' if agreed else 'does NOT repeat'} {how}")
  return agreed


def _open(run: str | pathlib.Path) -> Checkpoints:
  if not pathlib.Path(run).is_dir():
    raise MissingAssetError(f"no such run: {run}")
  return Checkpoints(run, read_only=True)


def _begin(saved: Sequence[int]) -> int:
  """Returns where a replay begins by default."""
  return saved[max(len(saved) - 2, 0)]


def _same(
  about: Mapping[str, Any],
  mesh: Mesh,
  config: Mapping[str, Any] | None,
  say: Callable[[str], None],
) -> bool:
  """Returns whether the bits must be those of the run; tells what is different."""
  then = {"machine": about.get("machine"), "versions": about.get("versions")}
  now = {"machine": train.machine(mesh), "versions": train.versions()}
  told = list(train.changes(then, now, "run"))
  # Another commit of ours still has to give the same bits: to find that it does not is the point.
  changes = [line for line in told if not line.startswith("run.versions.commit ")]
  if config is not None and "config" in about:
    plain = json.loads(json.dumps(config))
    told += train.changes(about["config"], plain, "config")
    # What is split otherwise is summed up in another order.
    changes += train.changes(about["config"].get("rules"), plain.get("rules"), "rules")
  for line in told:
    say(f"differs from the run: {line}")
  return not changes


def _compare_report(step, got, report, bound, say) -> bool:
  """Compares an update that the run left out; all its numbers if `bound` is 0."""
  off = [name for name, value in report.items() if _distance(got.get(name), value)]
  say(f"step {step}: left out by the run; {'other: ' + ', '.join(off) if off else 'equal'}")
  close = _distance(got["loss"], report["loss"]) <= bound if bound else not off
  return close and not got["good"]


def _compare_row(step, got, row, bound, say) -> bool:
  """Compares a line of the log; all its numbers if `bound` is 0."""
  names = sorted(name for name in got if name in row)
  worst = max((_distance(got[name], row[name]) for name in names), default=math.inf)
  loss = _distance(got.get("loss"), row["loss"])
  good = loss <= bound if bound else worst == 0
  off = [name for name in names if _distance(got[name], row[name])]
  detail = f"{len(names)} numbers are equal" if not off else f"other: {', '.join(off)}"
  say(f"step {step}: loss {got.get('loss')!r}, logged {row['loss']!r}; {detail}")
  return good


def _distance(a: float | None, b: float | None) -> float:
  """Returns the relative distance; what is not a number equals itself, in the log it is null."""
  a, b = (math.nan if x is None else x for x in (a, b))
  if a == b or (math.isnan(a) and math.isnan(b)):
    return 0.0
  return abs(a - b) / max(abs(b), 1e-30) if math.isfinite(a - b) else math.inf


def _compare_state(step: int, got: State, saved: State, same: bool, say) -> bool:
  counts = jax.device_get(jax.jit(lambda a, b: jax.tree.map(_unequal, a, b))(got, saved))
  off = {
    name: int(count)
    for name, count in zip(optim.names(counts), jax.tree.leaves(counts), strict=True)
    if count
  }
  total = len(jax.tree.leaves(counts))
  if not off:
    say(f"step {step}: all {total} arrays of the checkpoint are equal, bit for bit")
  else:
    name, count = max(off.items(), key=lambda item: item[1])
    say(f"step {step}: {len(off)} of {total} arrays differ, most of all {name} in {count} values")
  return not off or not same


def _unequal(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns how many values differ in a bit."""
  if jnp.issubdtype(a.dtype, jnp.inexact):
    kind = np.dtype(f"uint{8 * a.dtype.itemsize}")
    a, b = (jax.lax.bitcast_convert_type(x, kind) for x in (a, b))
  return (a != b).sum()
