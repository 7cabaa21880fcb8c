"""Updates that were left out: told, written down so that they can be replayed, and counted."""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (makes numpy know "bfloat16")
import numpy as np
from jax.experimental import multihost_utils

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.io import atomic_path

FOLDER = "faults"  # Inside a working directory.


@dataclasses.dataclass
class Faults:
  """Reads the judgement of `guard.judge` from the metrics of each step.

  Attributes:
    workdir: gets `faults/step-NNNNNNNN.json` for each update that was left out.
    cap: as in `guard.Config`.
    newest: returns the step of the newest complete checkpoint, if there is one.
    say: prints a line.
    skipped: updates left out so far.
    first: step at which the process begins; it takes back what was written of later ones, which
      it does again, by adding ".old" to the names.
    names: returns the names of clips by their numbers, as far as they are known.
  """

  workdir: pathlib.Path
  cap: int
  newest: Callable[[], int | None]
  say: Callable[[str], None]
  skipped: int = 0
  first: int = 0
  names: Callable[[], Mapping[int, str]] = dict

  def __post_init__(self):
    if jax.process_index() == 0:
      for step, path in _paths(self.workdir).items():
        if step > self.first:
          path.replace(path.with_name(path.name + ".old"))

  def check(
    self,
    step: int,
    metrics: Mapping[str, float],
    whole: Mapping[str, jax.Array],
    local: Mapping[str, np.ndarray],
  ) -> dict[str, float] | None:
    """Returns the metrics of the loss and the optimiser; None if the update was left out.

    Args:
      step: whose metrics these are.
      metrics: of `train_step`, on the host.
      whole: its batch on the devices; `id_b` names the clips.
      local: the rows of this process.

    Raises:
      UserError: if more updates than `cap` were left out (exit code 1).
    """
    values = dict(metrics)
    self.skipped, burst = int(values.pop("skipped")), int(values.pop("burst"))
    sigmas = values.pop("sigmas")
    if values.pop("good"):
      return values
    named = f"loss {values['loss']:.6g}, gradient norm {values['grad_norm']:.6g}"
    finite = np.isfinite([values["loss"], values["grad_norm"]]).all()
    reason = f"{named}: " + (f"{sigmas:.1f} sigma above the mean" if finite else "not finite")
    clips = [int(i) for i in _on_host(whole.get("id_b", ()))]
    path, names = self._write(step, values, reason, clips)
    shown = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
    self._write_rows(path, local)
    text = f"update of step {step} left out ({reason}); clips {shown}; see {path}"
    if burst <= self.cap:
      self.say(f"{text}; {burst} of at most {self.cap}")
      return None
    raise UserError(
      f"{text} and its rows; that makes {burst} of at most {self.cap} (guard.cap); "
      f"newest checkpoint: {self.newest()}",
      exit_code=1,
    )

  def _write_rows(self, path: pathlib.Path, local: Mapping[str, np.ndarray]) -> None:
    """Keeps the rows of this process, and those of the last `cap` updates before."""
    end = f"-rows-{jax.process_index()}.npz"
    with atomic_path(path.with_name(path.stem + end)) as temporary:
      arrays: dict[str, Any] = {name: np.asarray(x) for name, x in local.items()}
      for name, x in arrays.items():
        if x.dtype == "bfloat16":  # In numpy's files it would be bytes without a meaning.
          arrays[name] = x.astype(np.float32)
      np.savez(temporary, **arrays)
    kept = sorted(path.parent.glob(f"step-*{end}"), key=lambda path: path.stat().st_mtime_ns)
    for old in kept[: -self.cap - 1]:
      old.unlink()

  def _write(self, step, values, reason, clips) -> tuple[pathlib.Path, list[str | int]]:
    """Writes what it takes to replay the step; returns where, and the clips by name or number."""
    folder = self.workdir / FOLDER
    path = folder / f"step-{step:08d}.json"
    newest = self.newest()
    begin = newest or 0
    known = self.names() if jax.process_index() == 0 else {}
    names = [known.get(clip, clip) for clip in clips]
    about = {
      "step": step,
      "reason": reason,
      "clips": clips,
      "names": names if known else None,
      "metrics": {name: str(value) for name, value in values.items()},
      "newest_checkpoint": newest,
      "replay": f"python -m launch.train --verify {shlex.quote(str(self.workdir))} "
      f"--start {begin} --steps {step - begin}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      with atomic_path(path) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(about, indent=2) + "\n")
    return path, names


def reports(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
  """Returns the metrics of the updates that a run has left out, by step."""
  return {
    step: {name: float(x) for name, x in json.loads(path.read_text())["metrics"].items()}
    for step, path in _paths(workdir).items()
  }


def _paths(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
  paths = sorted((workdir / FOLDER).glob("step-*.json"))
  return {int(path.stem.removeprefix("step-")): path for path in paths}


def _on_host(x: Any) -> np.ndarray:
  """Returns a whole array; every process must ask."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)
