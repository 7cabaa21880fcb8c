"""Writes the model folder of a run from one of its checkpoints, such as while it still trains.

python -m launch.export --run DIR --out FOLDER [--step N] [--average WIDTH]

  --run DIR     working directory of `launch.train`
  --out FOLDER  gets the averaged weights, as DIR/model does when the run is finished
  --step N      checkpoint to take; by default the newest
  --average W   which of the averages that the run tracks: a relative width, or 0 for the plain
                one; by default that of config.ema.sigma_rel

Exit codes: 0 written, 2 bad input, 3 no such checkpoint.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax

from launch import tasks
from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import checkpoint, optim


def export(
  run: str | pathlib.Path,
  out: str | pathlib.Path,
  step: int | None = None,
  average: float | None = None,
) -> None:
  """Writes a model folder; touches nothing of the run.

  Args:
    run: working directory.
    out: model folder to write.
    step: of the checkpoint; the newest by default.
    average: which of `optim.Ema.widths`; the first by default.

  Raises:
    MissingAssetError: if there is no such checkpoint.
    UserError: if it cannot be read, or does not hold that average.
  """
  if step is None:  # Both reads must take the same one.
    step = max(checkpoint.saved_runs(run), default=None)
  params, stats, config = checkpoint.load_params(run, 0, step)
  if average is not None:
    widths = optim.Ema(**config["ema"]).widths
    if average not in widths:
      have = ", ".join(f"{width:g}" for width in widths)
      raise UserError(f"{run} tracks no average {average:g}, have: {have} (0 is the plain one)")
    params, stats, _ = checkpoint.load_params(run, widths.index(average), step)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  if "attention" in config["model"]:  # Not every way of the run may be there on this machine.
    config["model"]["attention"] = "auto"
  tasks.build(config, mesh, sharding.Rules()).export(pathlib.Path(out), params, stats)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code."""
  parser = argparse.ArgumentParser(
    prog="launch.export",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--run", required=True, metavar="DIR")
  parser.add_argument("--out", required=True, metavar="FOLDER")
  parser.add_argument("--step", type=int, metavar="N")
  parser.add_argument("--average", type=float, metavar="W")
  args = parser.parse_args(argv)
  try:
    export(args.run, args.out, args.step, args.average)
  except UserError as error:
    print(f"launch.export: {error}", file=sys.stderr)
    return error.exit_code
  print(f"model folder: {args.out}")
  return 0


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")  # A run that still trains holds the others.
  sys.exit(main())
