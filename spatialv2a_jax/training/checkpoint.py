"""Checkpoints of a run (Orbax, any mesh); model folders are those of `model_folder`.

A checkpoint has two items: `state`, the arrays of `train_step.State`, and `run`, a JSON object
with the data position, the configuration and the versions.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from spatialv2a_jax.errors import MissingAssetError, UserError, first_line
from spatialv2a_jax.model_folder import CHECKPOINTS as FOLDER
from spatialv2a_jax.model_folder import Path
from spatialv2a_jax.training import cluster, save_failures
from spatialv2a_jax.training.optim import names

_FULL = ("No space left", "RESOURCE_EXHAUSTED", "File too large", "quota exceeded")
_DAMAGED = "damaged-"  # Begins the name of a checkpoint that was set aside, before its step.
_EARLIER = (
  "was saved by an earlier version, without averages of running statistics; use another --workdir, "
  "with the weights as init_from"
)


class Checkpoints:
  """The checkpoints of one run: saved in the background, complete or invisible."""

  def __init__(
    self,
    workdir: Path,
    *,
    keep: int = 3,
    keep_every: int | None = None,
    read_only: bool = False,
  ):
    """Opens WORKDIR/checkpoints, which need not exist.

    Args:
      workdir: of the run, on a disk that all processes see.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints whose step is a multiple of it also stay, for ever.
      read_only: touches nothing, not even what an interrupted save left.
    """
    self.folder = pathlib.Path(workdir).absolute() / FOLDER
    self._saving: tuple[int, float] | None = None  # Step and time of the newest save.
    self._good: tuple[int, float] | None = None  # Of the newest save that is complete.
    more: dict[str, Any] = {"read_only": True}
    if not read_only:
      more = {"max_to_keep": keep, "keep_period": keep_every, "cleanup_tmp_directories": True}
    # Process 0 says which checkpoints there are: others may see an old state of a shared disk.
    options = ocp.CheckpointManagerOptions(single_host_load_and_broadcast=True, **more)
    self._failures: list[BaseException] = []  # Of saves in the background.
    handlers = {
      "state": save_failures.noted(tree_handler(), self._failures),
      "run": save_failures.noted(ocp.JsonCheckpointHandler(), self._failures),
    }
    self._manager = ocp.CheckpointManager(
      self.folder, options=options, item_names=tuple(handlers), item_handlers=handlers
    )

  def save(self, step: int, state: Any, run: Mapping[str, Any]) -> None:
    """Starts to save; the arrays may be donated as soon as this returns.

    Raises:
      UserError: if this or the save before failed (exit code 1).
    """
    items = {
      "state": ocp.args.PyTreeSave(state),  # pyright: ignore[reportCallIssue]
      "run": ocp.args.JsonSave({**run, "time": time.time()}),  # pyright: ignore[reportCallIssue]
    }
    self.wait()  # As Orbax does: one at a time. That one is good now.
    with self._loud(step):
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    self._saving = (step, time.time())

  def check(self) -> None:
    """Raises the error of a save that failed in the background (exit code 1)."""
    if self._failures or (self._saving and not save_failures.running(self._manager)):
      self.wait()

  def good(self) -> int | None:
    """Returns the newest step that is known to be on disk; `latest` may still be on its way."""
    return None if self._good is None else self._good[0]

  def age(self) -> float | None:
    """Returns the seconds since the newest complete checkpoint was saved; None: there is none."""
    self.check()
    return None if self._good is None else max(time.time() - self._good[1], 0.0)

  @contextlib.contextmanager
  def _loud(self, step: int | None = None) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise for a save into one line."""
    try:
      yield
    except Exception as error:
      full = any(sign in str(error) for sign in _FULL)
      last = "there is none" if self._good is None else f"that of step {self._good[0]} is intact"
      step = self._saving[0] if self._saving and step is None else step
      which = "" if step is None else f" of step {step}"
      raise UserError(
        f"{'the disk is full: ' if full else ''}the checkpoint{which} in {self.folder} cannot be "
        f"written ({save_failures.reason(error)}); the last good one: {last}; mend it and run the "
        "same command",
        exit_code=cluster.EXIT_CODE if cluster.lost(error) else 1,
      ) from error

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint, which may be on its way; None: there is none."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, in order."""
    return sorted(self._manager.all_steps())

  def run(self, step: int) -> dict[str, Any]:
    """Returns the `run` item of a checkpoint."""
    args = ocp.args.Composite(run=ocp.args.JsonRestore())
    return dict(self._manager.restore(step, args=args)["run"])

  def restore(
    self, abstract: Any, kind: str | None = None, warn: Callable[[str], None] = print
  ) -> tuple[Any, dict[str, Any]] | None:
    """Returns (state, run) of the newest readable checkpoint, or None if there is none.

    A checkpoint whose files are damaged is set aside (renamed, never deleted) if one before it
    can be used; `warn` is told. Several processes could disagree on what is readable: the first
    that meets with it sets it aside, and all of them must start again.

    Args:
      abstract: shapes with shardings, of this run's mesh and not of the one that saved.
      kind: of the run; None: any.
      warn: called with one line per checkpoint set aside.

    Raises:
      UserError: if the checkpoint holds another model or another optimiser's state, or none can be
        read; with exit code 43 if one was set aside for several processes.
    """
    damaged: dict[int, str] = {}
    args = _restore_args(abstract)
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        run = self.run(step)
        if kind is not None and run.get("kind") != kind:
          there = run.get("kind")
          raise UserError(f"{self.folder} holds a run of kind {there!r}, not {kind!r}")
        self._check_layout(step, abstract)
        state = self._manager.restore(step, args=args)["state"]
      except UserError:
        raise
      except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
        if cluster.lost(error):
          raise  # Another process is gone, and nothing is damaged.
        damaged[step] = first_line(error)
        if jax.process_count() > 1:
          self._set_aside_for_all(step, damaged[step])
          break
        continue
      for bad, reason in damaged.items():
        warn(self._set_aside(bad, reason))
      if damaged:
        self._manager.reload()
      self._good = (step, float(run["time"]))
      return state, run
    if damaged:
      step, reason = next(iter(damaged.items()))
      before = max((other for other in self.steps() if other not in damaged), default=None)
      then = "" if before is None else f"; move it away, and the run goes on from step {before}"
      raise UserError(f"cannot read checkpoint {self.folder}/{step}: {reason}{then}")
    return None

  def _set_aside(self, step: int, reason: str) -> str:
    aside = self.folder.parent / f"{_DAMAGED}{step}-{time.time_ns()}"
    (self.folder / str(step)).rename(aside)
    return f"checkpoint {step} is damaged, set aside as {aside}: {reason}"

  def _set_aside_for_all(self, step: int, reason: str) -> None:
    """Raises what starts the job again without a checkpoint; does nothing if that has not helped.

    What fails in one process after the other, such as memory or a disk, is no damage: nothing is
    set aside while what was set aside before is newer than all that was saved since.
    """
    names = (path.name.split("-") for path in self.folder.parent.glob(f"{_DAMAGED}*-*"))
    stuck = any(int(name[1]) > step for name in names)
    before = max((other for other in self.steps() if other < step), default=None)
    there = (self.folder / str(step)).is_dir()  # If not, another process was faster.
    if before is None or (stuck and there):
      return
    told = f"checkpoint {step} is damaged and was set aside by another process"
    if there:
      with contextlib.suppress(FileNotFoundError):
        told = self._set_aside(step, reason)
    raise UserError(
      f"{told}; start all processes again: they go on from step {before}",
      exit_code=cluster.EXIT_CODE,
    )

  def read(self, step: int, abstract: Any) -> Any:
    """Returns the state of one checkpoint.

    Args:
      step: of the checkpoint.
      abstract: as in `restore`.

    Raises:
      UserError: if it holds another model, or cannot be read.
    """
    args = _restore_args(abstract)
    try:
      self._check_layout(step, abstract)
      return self._manager.restore(step, args=args)["state"]
    except UserError:
      raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
      if cluster.lost(error):
        raise
      raise UserError(
        f"cannot read checkpoint {self.folder}/{step}: {save_failures.reason(error)}"
      ) from error

  def _check_layout(self, step: int, abstract: Any) -> None:
    """Raises UserError, naming what differs first, unless the checkpoint holds such a state."""
    where, there = f"{self.folder}/{step}", _metadata(self._manager, step)
    if "means" not in there:
      raise UserError(f"{where} {_EARLIER}")
    saved, wanted = _shapes(there), _shapes(abstract)
    other = {name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)}
    order = ("params", "beside", "opt", "stats")

    def detail(part: str) -> str:
      name = min(x for x in other if x.startswith(part))
      return f"{name} has shape {saved.get(name, 'none')} there, {wanted.get(name, 'none')} here"

    parts = {name.split("/")[0] for name in other}
    part = next((part for part in (*order, *sorted(parts)) if part in parts), None)
    if part == "beside":
      raise UserError(
        f"{where} holds {len(there.get('beside') or ())} averages besides the first, not "
        f"{len(abstract.beside)}: leave ema.beside as it was, or use another --workdir"
      )
    if part == "opt":
      raise UserError(
        f"{where} holds another state of the optimiser: {detail(part)}; leave optim (such as "
        "optim.freeze) as it was, or use another --workdir, with the weights as init_from"
      )
    if part is not None:
      raise UserError(f"{where} holds another model: {detail(part)}; use another --workdir")

  def wait(self) -> None:
    """Blocks until what was saved is on disk.

    Raises:
      UserError: if it could not be written (exit code 1).
    """
    if self._saving or self._failures:
      with self._loud():
        save_failures.wait(self._manager, self._failures)
      self._good, self._saving = self._saving, None

  def close(self) -> None:
    """Waits, then releases the threads."""
    self.wait()
    self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
    if error is None:
      self.close()
    elif not cluster.lost(error) and not self._failures:
      # Else a save would wait for the process that is gone, or is to hear of this one's fault.
      with contextlib.suppress(Exception):  # The first error is the one to tell.
        self.close()


def tree_handler() -> ocp.PyTreeCheckpointHandler:
  """Returns what saves and restores trees of arrays for Orbax.

  What many devices hold is written by the first of them. By default Orbax has each write a slice,
  for which every process compiles a program per shape and device in its first save (Orbax's issue
  2934), while the devices wait.
  """
  arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def saved_runs(workdir: Path) -> dict[int, pathlib.Path]:
  """Returns the file of the `run` item of each complete checkpoint, by step, in order.

  Without Orbax, which would start JAX's devices: before flags for them are set, before processes
  have met.
  """
  paths = (pathlib.Path(workdir) / FOLDER).glob("*/run/metadata")
  steps = {path.parts[-3]: path for path in paths}
  return dict(sorted((int(step), path) for step, path in steps.items() if step.isdigit()))


def load_params(
  folder: Path, which: int | None = 0, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Returns (params, stats, config) of a run as numpy arrays, whatever mesh saved them.

  Args:
    folder: working directory of the run, or its `checkpoints`.
    which: number of an average, as `optim.Ema.widths` has them; None: what is being trained.
    step: the newest complete checkpoint by default.

  Raises:
    MissingAssetError: if there is no complete checkpoint.
    UserError: if the checkpoint is damaged.
  """
  if which is None:
    state, run = _read(folder, step, ("params", "stats"))
    return state["params"], state["stats"], dict(run["config"])
  part = "beside" if which else "ema"
  state, run = _read(folder, step, (part, "means"))
  found = state["beside"][which - 1] if which else state["ema"]
  return found, state["means"][which], dict(run["config"])


def whole(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
  """Returns all arrays of a checkpoint by name, such as "params/block/kernel".

  Args:
    folder: as in `load_params`, and what it raises as well.
    step: the newest complete checkpoint by default.
  """
  state, _ = _read(folder, step)
  return dict(zip(names(state), jax.tree.leaves(state), strict=True))


def _read(
  folder: Path, step: int | None, parts: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns parts of the state as numpy arrays (None: all of it), and the `run` item."""
  where = pathlib.Path(folder)
  if not where.is_dir():
    raise MissingAssetError(f"no such folder: {where}")
  where = where / FOLDER if (where / FOLDER).is_dir() else where
  options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False)
  handlers = {"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
  with ocp.CheckpointManager(
    where.absolute(), options=options, item_handlers=handlers, item_names=("state", "run")
  ) as manager:
    steps = manager.all_steps()
    if not steps or (step is not None and step not in steps):
      wanted = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
      raise MissingAssetError(f"{wanted} in {where}; have: {sorted(steps) or 'none'}")
    step = max(steps) if step is None else step
    try:
      tree = _metadata(manager, step)
      if "means" not in tree:
        raise UserError(f"it {_EARLIER}")
      item = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree[name] or {})
        for name in parts or tree
      }
      restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
      args = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(  # pyright: ignore[reportCallIssue]
          item=item, restore_args=restore_args, partial_restore=True
        ),
        run=ocp.args.JsonRestore(),
      )
      got = manager.restore(step, args=args)
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
      raise UserError(f"cannot read checkpoint {where}/{step}: {first_line(error)}") from error
  return got["state"], dict(got["run"])


def _restore_args(abstract: Any) -> ocp.args.Composite:
  """Returns what asks Orbax for a state with the shardings of `abstract`."""
  shardings = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.args.Composite(
    state=ocp.args.PyTreeRestore(item=abstract, restore_args=shardings)  # pyright: ignore[reportCallIssue]
  )


def _metadata(manager: ocp.CheckpointManager, step: int) -> Any:
  """Returns the tree of what a checkpoint says of its arrays; ValueError if it says nothing."""
  metadata = manager.item_metadata(step)["state"]
  if metadata is None:  # Which is what Orbax returns if it finds no such file.
    raise ValueError("what describes its arrays is missing")
  return getattr(metadata, "tree", metadata)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {
    name: tuple(leaf.shape) for name, leaf in zip(names(tree), jax.tree.leaves(tree), strict=True)
  }
