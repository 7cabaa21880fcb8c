"""Weight averages of any width after the run (post-hoc EMA, Karras et al., arXiv 2312.02696).

A run keeps snapshots of one or two power-function averages while it trains. Each snapshot is a
known weighting of the parameters over the steps; the weighting of another width, at any of its
steps, is their least-squares mixture. Weightings here are those of `optim.Ema.take` step by step,
not their continuous limit, so that a width that was tracked comes back as it was.

No average moves in a step that the guard left out. Weightings take it for one in which the
parameters stayed as they were: many such steps make the error that is told too small.

Axes: i snapshot, s step.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from spatialv2a_jax import model_folder
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.training import checkpoint, cluster, optim, save_failures

FOLDER = "averages"  # Inside a working directory.
STORED = jnp.float16  # Half the bytes; its 11 bits suffice for sums of a few snapshots.
WORST = 0.1  # A mixture further from what was asked for, as a share of its norm, is refused,
NOISIEST = 0.02  # and one that lets the rounding of the snapshots grow to this share.
_STEPS = 16_384  # Of weightings held in memory at once.


class Snapshots:
  """Snapshots of a run's averages: saved in the background, complete or invisible."""

  def __init__(self, workdir: str | pathlib.Path, widths: Sequence[float], start: int = 0):
    """Opens WORKDIR/averages and deletes what lies beyond `start`, which this run will redo.

    Args:
      workdir: of the run, on a disk that all processes see.
      widths: relative widths of the averages, in the order that `save` gets them; 0 is one that
        no other can be made of, and is left out. Without any, nothing is opened.
      start: steps done.
    """
    self.folder = pathlib.Path(workdir).absolute() / FOLDER
    self._widths = tuple(widths)
    self._manager, self._saving = None, False
    self._failures: list[BaseException] = []  # Of saves in the background.
    if not any(widths):
      return
    # Barriers of their own: one process's checkpoint of a step would meet another's snapshot of it
    # at Orbax's, and count as complete while it is still being written.
    apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=FOLDER)
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        single_host_load_and_broadcast=True,
        multiprocessing_options=apart,
      ),
      item_handlers=save_failures.noted(checkpoint.tree_handler(), self._failures),
    )
    for step in self._manager.all_steps():
      if step > start:
        self._manager.delete(step)
    self._half = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(STORED), tree))

  def __contains__(self, step: int) -> bool:
    """Returns whether there is a snapshot of a step."""
    return self._manager is not None and step in self._manager.all_steps()

  def save(self, step: int, averages: Sequence[tuple[Any, Any]]) -> None:
    """Starts to save parameters and running statistics, which may be donated once this returns.

    Raises:
      UserError: if this or the save before failed (exit code 1).
    """
    assert self._manager is not None
    pairs = zip(self._widths, averages, strict=True)
    tree = {
      f"{width:g}": {"params": self._half(params), "stats": stats}
      for width, (params, stats) in pairs
      if width
    }
    self.wait()
    with self._loud():
      self._manager.save(step, args=ocp.args.PyTreeSave(tree))  # pyright: ignore[reportCallIssue]
    self._saving = True

  def check(self) -> None:
    """Raises the error of a save that failed in the background (exit code 1)."""
    if self._saving and (self._failures or not save_failures.running(self._manager)):
      self.wait()

  def wait(self) -> None:
    """Blocks until all is on disk.

    Raises:
      UserError: if a save failed (exit code 1).
    """
    if self._saving:
      with self._loud():
        save_failures.wait(self._manager, self._failures)
      self._saving = False

  @contextlib.contextmanager
  def _loud(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many kinds.
      raise UserError(
        f"cannot write to {self.folder} ({save_failures.reason(error)}); mend it and run the same "
        "command",
        exit_code=cluster.EXIT_CODE if cluster.lost(error) else 1,
      ) from error

  def __enter__(self) -> "Snapshots":
    return self

  def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
    # A save would wait for who is gone, or is to hear of this one's fault.
    if self._manager is None or cluster.lost(error) or self._failures:
      return
    if error is None:
      self.wait()
    with contextlib.suppress(Exception):  # The first error is the one to tell.
      self._manager.close()


class Mixture(NamedTuple):
  """How to mix snapshots.

  Attributes:
    share_i: coefficient of each snapshot; their sum is 1.
    error: norm of the difference to the weighting asked for, as a share of its norm.
  """

  share_i: np.ndarray
  error: float

  @property
  def rounding(self) -> float:
    """Share of a parameter that half precision may change: large shares cancel each other."""
    return float(np.abs(self.share_i).sum() * jnp.finfo(STORED).eps / 2)


def weighting(sigma_rel: float, updates: int, step_s: np.ndarray) -> np.ndarray:
  """Returns the weights that an average after `updates` updates gives to the parameters of steps.

  What `optim.Ema.take` leaves of the old average telescopes: after n updates, steps 1..s together
  hold ((s+1)(s+2) / ((n+1)(n+2)))^((1+gamma)/2).

  Args:
    sigma_rel: relative width.
    updates: n, counted from 1.
    step_s: steps, counted from 1.
  """
  power = (1 + optim.power_gamma(sigma_rel)) / 2

  def held(s):
    s = np.minimum(np.asarray(s, np.float64), updates)
    logs = np.log(s + 1) + np.log(s + 2) - np.log(updates + 1) - np.log(updates + 2)
    return np.where(s < 1, 0.0, np.exp(power * logs))

  return held(step_s) - held(np.asarray(step_s) - 1)


def mix(snapshots: Sequence[tuple[float, int]], sigma_rel: float, step: int) -> Mixture:
  """Returns the mixture of snapshots that comes nearest to another average.

  Args:
    snapshots: (relative width, updates) of each.
    sigma_rel: relative width asked for.
    step: number of updates after which it would have been taken.
  """
  wanted = [*snapshots, (sigma_rel, step)]
  gram_ii = np.zeros((len(wanted), len(wanted)))
  last = max(n for _, n in wanted)
  for first in range(1, last + 1, _STEPS):
    step_s = np.arange(first, min(first + _STEPS, last + 1))
    weight_is = np.stack([weighting(width, n, step_s) for width, n in wanted])
    gram_ii += weight_is @ weight_is.T
  # Each snapshot at unit norm, for the conditioning; the last row makes the shares sum to 1.
  norm_i = np.sqrt(np.diag(gram_ii))
  gram_ii /= np.outer(norm_i, norm_i)
  count, one_i = len(snapshots), 1 / norm_i[:-1]
  system = np.block([[gram_ii[:-1, :-1], one_i[:, None]], [one_i[None], np.zeros((1, 1))]])
  right = np.append(gram_ii[:-1, -1], 1 / norm_i[-1])
  unit_i = np.linalg.lstsq(system, right, rcond=1e-13)[0][:count]
  left = np.append(unit_i, -1.0)
  error = np.sqrt(max(left @ gram_ii @ left, 0.0))
  return Mixture(unit_i * norm_i[-1] / norm_i[:-1], float(error))


def write_model(
  workdir: str | pathlib.Path,
  out: str | pathlib.Path,
  sigma_rel: float,
  step: int | None = None,
  say: Callable[[str], None] = print,
) -> None:
  """Writes the model folder of a finished run again, with averages of another width.

  Args:
    workdir: of the run; it holds model/ and averages/.
    out: model folder to write.
    sigma_rel: relative width, above 0 and below 0.28.
    step: end of the average, that of a snapshot; the last by default.
    say: prints one line.

  Raises:
    MissingAssetError: if the run is not finished or kept no snapshots.
    UserError: if the width cannot be mixed from the snapshots, or they are another model's or
      damaged.
  """
  optim.Ema(sigma_rel=sigma_rel)  # Checks the width.
  workdir = pathlib.Path(workdir)
  model = model_folder.load_model(workdir)
  folder = workdir.absolute() / FOLDER
  if not folder.is_dir():
    raise MissingAssetError(f"{workdir} has no {FOLDER}/: train with widths in ema, every.average")
  run = json.loads((workdir / "config.json").read_text())
  name = run["kind"]
  with ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(create=False),
    item_handlers=ocp.PyTreeCheckpointHandler(),
  ) as manager:
    steps = sorted(manager.all_steps())
    step = max(steps, default=0) if step is None else step
    if step not in steps:
      raise MissingAssetError(f"{folder} holds no snapshot of step {step}, have: {steps}")
    steps = steps[: steps.index(step) + 1]
    snapshots: list[tuple[str, int]] = []
    for at in steps:
      with _readable(folder, at):
        snapshots += [(width, at) for width in _tracked(manager, at)]
    mixture = mix([(float(width), at) for width, at in snapshots], sigma_rel, step)
    widths = ", ".join(sorted({width for width, _ in snapshots}, key=float))
    told = f"width {sigma_rel:g} at step {step} from {len(steps)} snapshots of {widths}"
    if mixture.error > WORST or mixture.rounding > NOISIEST:
      raise UserError(
        f"{told} would be {100 * mixture.error:.2g} % off, and off by {100 * mixture.rounding:.2g} "
        "% of rounding; ask for a width nearer to them"
      )
    trees = (_read(manager, at, width, folder) for width, at in snapshots)
    mixed = _flat(model.params[name])
    frozen = optim.lookup(optim.from_mapping(run["optim"]).freeze, list(mixed), "freeze")
    trained = {key: x for key, x in mixed.items() if not frozen[key]}
    like = _flat({"params": trained, "stats": model.stats.get(name, {})})
    flat = _sum(like, zip(mixture.share_i, trees, strict=True), folder)
  found = traverse_util.unflatten_dict(flat, sep="/")
  mixed |= _flat(found["params"])
  about = {"sigma_rel": sigma_rel, "step": step, "snapshots": len(steps), "error": mixture.error}
  params = {**model.params, name: traverse_util.unflatten_dict(mixed, sep="/")}
  stats = {**model.stats, name: found.get("stats", {})}
  model_folder.save_model(out, params, stats, {**model.config, f"{name}_average": about})
  say(f"{told}, {100 * mixture.error:.2g} % off: {out}")


def _tracked(manager: ocp.CheckpointManager, step: int) -> Mapping[str, Any]:
  """Returns the shapes of each average of a snapshot, by its width."""
  metadata = manager.item_metadata(step)
  if metadata is None:  # Which is what Orbax returns if it finds no such file.
    raise ValueError("what describes its arrays is missing")
  return getattr(metadata, "tree", metadata)


def _read(manager: ocp.CheckpointManager, step: int, width: str, folder: pathlib.Path) -> Any:
  """Returns one average of a snapshot, whatever mesh saved it; UserError if it is damaged."""
  with _readable(folder, step):
    part = {width: _tracked(manager, step)[width]}
    item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), part)
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(  # pyright: ignore[reportCallIssue]
      item=item, restore_args=plain, partial_restore=True
    )
    return manager.restore(step, args=args)[width]


@contextlib.contextmanager
def _readable(folder: pathlib.Path, step: int) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
    raise UserError(
      f"cannot read the snapshot {folder}/{step}: {save_failures.reason(error)}; move it away to "
      "mix the others"
    ) from error


def _sum(
  like: Mapping[str, Any], parts: Iterable[tuple[float, Any]], folder: pathlib.Path
) -> dict[str, np.ndarray]:
  """Returns the weighted sum of trees, in float32; each is let go before the next is read."""
  flat = {name: np.zeros(x.shape, np.float32) for name, x in like.items()}
  for share, tree in parts:
    part = _flat(tree)
    for name, total in flat.items():
      if name not in part or part[name].shape != total.shape:
        raise UserError(f"{folder} holds another model: {name} is missing or has another shape")
      total += np.float32(share) * np.asarray(part[name], np.float32)
  for name, total in flat.items():
    if not np.isfinite(total).all():
      raise UserError(f"{folder}: {name} is too large for half precision")
  return flat


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(tree), sep="/")
