"""Trains what a config file describes; run again, it goes on where it stopped.

python -m launch.train --config configs/NAME.py[:VARIANT] --workdir DIR [--config.KEY=VALUE ...]

  --config FILE[:VARIANT]   a file with get_config(variant)
  --config.KEY=VALUE        replaces one value, such as --config.optim.lr=3e-4
  --workdir DIR             gets checkpoints/, metrics.jsonl, config.json, TensorBoard events, and
                            model/ when the run is finished
  --distributed             one process of several: coordinator and rank come from the cluster's
                            environment (SLURM, TPU, GKE), as `jax.distributed` finds them

Compiled programs are kept in ~/.cache/spatialv2a_jax/xla, or in JAX_COMPILATION_CACHE_DIR;
JAX_ENABLE_COMPILATION_CACHE=false turns that off.

Exit codes: 0 finished, 1 the loss is not finite, 2 bad input, 3 missing data or weights,
42 interrupted and saved.
"""

import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from launch import tasks
from spatialv2a_jax import compile_cache, goodput, meter, optim, sharding, train
from spatialv2a_jax import guard as guards
from spatialv2a_jax.errors import UserError


def parse(argv: Sequence[str]) -> tuple[dict[str, Any], str, bool]:
  """Returns the resolved config, the working directory and whether the job is distributed.

  Args:
    argv: the command line, program name first.

  Raises:
    UserError: one line for any mistake in it.
  """
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=list(argv))
  flags.DEFINE_string("workdir", "", "of the run", flag_values=values)
  flags.DEFINE_boolean("distributed", False, "several processes", flag_values=values)
  try:
    rest = values(list(argv))[1:]
    config = values["config"].value
    resolved = None if config is None else config.to_dict()
  except (AttributeError, KeyError) as error:  # Of the config, which knows its nearest key.
    inner = error.args[0] if isinstance(error.args[0], KeyError) else error
    raise UserError(f"the config has no key {inner.args[0]}") from error
  except (flags.Error, OSError) as error:
    # A config file that raises is quoted with its traceback; the last line is the message.
    lines = [line.strip() for line in str(error).strip().splitlines()]
    raise UserError("--config: " + lines[-1].removeprefix("ValueError: ")) from error
  if rest:
    raise UserError(f"unexpected argument {rest[0]!r}")
  if resolved is None or not values["workdir"].value:
    raise UserError("give --config configs/NAME.py[:VARIANT] and --workdir DIR")
  return resolved, values["workdir"].value, bool(values["distributed"].value)


def run(
  config: Mapping[str, Any], workdir: str | pathlib.Path, ledger: goodput.Ledger | None = None
) -> None:
  """Trains, then writes the model folder WORKDIR/model.

  Args:
    config: sections as in `configs/tiny.py`.
    workdir: of the run.
    ledger: that of the process.

  Raises:
    UserError: for a mistake in the config, data that does not fit it, a loss that is not finite.
  """
  workdir = pathlib.Path(workdir)
  mesh = sharding.make_mesh(**config["mesh"])
  rules = sharding.Rules(**{name: axes or None for name, axes in config["rules"].items()})
  task = tasks.build(config, mesh, rules)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  state = train.fit(
    workdir,
    kind=config["kind"],
    config=config,
    batches=task.batches,
    batch_size=config["data"]["batch_size"],
    loss=task.loss,
    init=task.init,
    stats=task.stats,
    values=task.values,
    optimizer=optim.adamw(optim.from_mapping(config["optim"]), shapes),
    mesh=mesh,
    rules=rules,
    ema=optim.Ema(**config["ema"]),
    steps=config["steps"],
    seed=config["seed"],
    every=train.Every(**config["every"]),
    accumulate=config["accumulate"],
    guard=guards.Config(**config.get("guard", {})),
    limits=config.get("limits"),
    evaluate=task.evaluate,
    flops_per_clip=task.flops() if meter.peak_flops() else None,
    tokens_per_clip=task.tokens,
    ledger=ledger,
    say=lambda line: print(line, flush=True),
  )
  task.export(workdir / "model", state)
  if jax.process_index() == 0:
    print(f"model folder: {workdir / 'model'}")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code."""
  ledger = goodput.Ledger(goodput.process_began() if argv is None else None)
  argv = list(sys.argv if argv is None else argv)
  if {"-h", "--help", "-help"} & set(argv):
    print(__doc__)
    return 0
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file it writes.
  try:
    config, workdir, distributed = parse(argv)
    compile_cache.keep()
    if distributed:
      jax.distributed.initialize()
    run(config, workdir, ledger)
  except UserError as error:
    print(f"launch.train: {error}", file=sys.stderr)
    return error.exit_code
  return 0


if __name__ == "__main__":
  sys.exit(main())
