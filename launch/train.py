"""Trains what a config file describes; run again, it goes on where it stopped.

python -m launch.train --config configs/NAME.py[:VARIANT] --workdir DIR [--config.KEY=VALUE ...]
python -m launch.train --verify DIR [--start STEP] [--steps K]

  --config FILE[:VARIANT]   a file with get_config(variant)
  --config.KEY=VALUE        replaces one value, such as --config.optim.lr=3e-4
  --workdir DIR             gets checkpoints/, metrics.jsonl, config.json, TensorBoard events, and
                            model/ when the run is finished; faults/ for updates that were left
                            out, stacks/ after a hang, profile/ for config.every.profile=(N,M)

  --verify DIR              replays steps of the run in DIR, with the config that its checkpoint
                            holds, and compares losses and arrays bit for bit; on another mesh
                            or machine losses alone, to 1e-5 (1e-3 for networks in bfloat16) times
                            the root of the steps since the checkpoint; writes nothing
  --config.KEY=VALUE        may be added for KEY of another place: mesh.*, rules.*, data.path,
                            data.workers, vae, init_from
  --start STEP              checkpoint to begin with; by default the last but one; 0: the beginning
  --steps K                 how many steps; by default up to the next checkpoint

  --distributed             one process of several: coordinator, number and rank come from the
                            cluster's environment (SLURM, TPU, GKE, Open MPI) or from
  --coordinator HOST:PORT   where process 0 listens
  --num_processes N         how many processes there are
  --process_id I            which of them this is, from 0
  --join_timeout S          seconds to wait for all of them; then it says which are missing (300)

Compiled programs are kept in ~/.cache/spatialv2a_jax/xla, or in JAX_COMPILATION_CACHE_DIR;
JAX_ENABLE_COMPILATION_CACHE=false turns that off. On GPUs, --config.deterministic=true makes two
runs equal bit for bit, at some cost in speed (XLA's --xla_gpu_deterministic_ops).

Exit codes: 0 finished (or the replay agrees), 1 stopped by a fault (too many updates left out, a
checkpoint that cannot be written, a replay that differs), 2 bad input, 3 missing data or weights,
42 interrupted and saved, 43 hung (stacks of all threads are on standard error and in DIR/stacks) or
another process is gone or did not come, or a damaged checkpoint was set aside for several of them.
What hangs so that Python itself stands still ends by SIGALRM, with its stacks.
After 42, 43 and death by a signal, which is also how JAX ends processes that lost another one: run
it again.
"""

import hashlib
import json
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags

from launch import command, tasks
from spatialv2a_jax import compile_cache, goodput, io
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import cluster, determinism, meter, preemption, replay, train, waiting
from spatialv2a_jax.training import watchdog as watchdogs

# What a replay may have otherwise than the run: where it happens, not what is computed.
PLACES = tuple(
  f"config.{key}"
  for key in ("mesh.", "rules.", "data.path=", "data.workers=", "vae=", "init_from=")
)


class Arguments(NamedTuple):
  """The command line.

  Attributes:
    config: resolved; of the run to verify if there is one.
    workdir: of the run.
    verify: replays the run instead of training.
    start: first step of the replay.
    steps: length of the replay.
    distributed: arguments of `cluster.start`; None for a single process.
  """

  config: dict[str, Any]
  workdir: str
  verify: bool = False
  start: int | None = None
  steps: int | None = None
  distributed: dict[str, Any] | None = None


def parse(argv: Sequence[str]) -> Arguments:
  """Returns what the command line says.

  Args:
    argv: the command line, program name first.

  Raises:
    UserError: one line for any mistake in it.
  """
  values = flags.FlagValues()
  for name in ("workdir", "verify", "coordinator"):
    flags.DEFINE_string(name, None, "see above", flag_values=values)
  for name in ("start", "steps", "num_processes", "process_id"):
    flags.DEFINE_integer(name, None, "see above", lower_bound=0, flag_values=values)
  flags.DEFINE_float("join_timeout", 300.0, "seconds", flag_values=values)
  flags.DEFINE_boolean("distributed", False, "several processes", flag_values=values)
  verifies = any(re.match("--?verify(=|$)", word) for word in argv)
  places = [word for word in argv if verifies and word.lstrip("-").startswith(PLACES)]
  rest = [word for word in argv if word not in places]
  if verifies and any(re.match("--?(config|workdir)", word) for word in rest):
    raise UserError(
      "--verify DIR takes the config of the run: leave out --config and --workdir; only values of "
      f"another place may be given: {', '.join(PLACES)}"
    )
  resolved = command.parse(rest, values)
  given = {name: values[name].value for name in values}
  verify, workdir = given["verify"], given["workdir"]
  if not verify and (given["start"] is not None or given["steps"] is not None):
    raise UserError("--start and --steps belong to --verify DIR")
  if verify:
    resolved, workdir = command.replaced(replay.settings(verify, given["start"]), places), verify
  if resolved is None or not workdir:
    raise UserError("give --config configs/NAME.py[:VARIANT] and --workdir DIR")
  if "://" in workdir:
    raise UserError(f"--workdir {workdir} is no folder: mount the bucket, or use a shared disk")
  members = {
    "coordinator": given["coordinator"],
    "count": given["num_processes"],
    "index": given["process_id"],
  }
  asked = given["distributed"] or any(value is not None for value in members.values())
  joined = {**members, "timeout": given["join_timeout"]} if asked else None
  return Arguments(resolved, workdir, bool(verify), given["start"], given["steps"], joined)


def run(arguments: Arguments, ledger: goodput.Ledger | None = None) -> int:
  """Trains, then writes the model folder WORKDIR/model; or replays a run.

  Args:
    arguments: of the command line.
    ledger: that of the process.

  Returns:
    The exit code.

  Raises:
    UserError: for a mistake in the config, data that does not fit it, a fault of the run.
  """
  config, workdir = arguments.config, pathlib.Path(arguments.workdir)
  every = tasks.checked(train.Every, "every", config["every"])
  if arguments.verify:
    task, recipe = tasks.recipe(config, tasks.mesh_of(config))
    types = [config["model"].get(name) for name in ("dtype", "activations")]
    options = {
      "dtype": "bfloat16" if "bfloat16" in types else "float32",
      "config": config,
      "start": arguments.start,
      "steps": arguments.steps,
    }
    agreed = replay.verify(workdir, recipe, **options, say=_say)
    return 0 if agreed else 1
  ledger = ledger or goodput.Ledger()
  with watchdogs.Watchdog(ledger, workdir, config.get("limits")) as watchdog:
    task, recipe = tasks.recipe(config, tasks.mesh_of(config))
    of_data = getattr(recipe.batches, "remarks", list)()
    for line in [*tasks.optimizer_of(config).remarks(config["steps"]), *of_data]:
      _say(line)
    peak, kind = meter.peak_flops(), jax.devices()[0].device_kind
    if peak is None and jax.devices()[0].platform != "cpu":
      _say(f"no mfu is logged: the peak FLOP/s of {kind!r} are not in meter.PEAK_FLOPS")
    if isinstance(task.evaluate, tasks.Evaluation):
      task.evaluate.ledger = ledger
      task.evaluate.check()  # Not only after thousands of steps.
    elif every.eval and task.evaluate is None:
      _say(f"every.eval={every.eval} evaluates nothing: config.data.eval is empty")
    state = train.fit(
      workdir,
      recipe,
      kind=config["kind"],
      config=config,
      steps=config["steps"],
      every=every,
      evaluate=task.evaluate,
      flops_per_clip=task.flops() if peak else None,
      tokens_per_clip=task.tokens,
      ledger=ledger,
      watchdog=watchdog,
      say=_say,
    )
    with ledger.during("save"):
      task.export(workdir / "model", *state.averages()[0])
      cluster.meet()  # JAX gives the others 300 s to end, then ends the one that still writes.
  _say(f"model folder: {workdir / 'model'}")
  return 0


def _say(line: str) -> None:
  if jax.process_index() == 0:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code."""
  ledger = goodput.Ledger(goodput.process_began() if argv is None else None)
  argv = list(sys.argv if argv is None else argv)
  if {"-h", "--help", "-help"} & set(argv):
    print(__doc__)
    return 0
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file it writes.
  return told(lambda: _main(argv, ledger))


def _main(argv: Sequence[str], ledger: goodput.Ledger) -> int:
  arguments = parse(argv)
  if arguments.config.get("deterministic"):
    determinism.enforce()
  compile_cache.keep()
  if arguments.distributed is not None:
    text = json.dumps(arguments.config, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    cluster.start(
      **arguments.distributed,
      about={"configuration": digest},
      say=lambda line: print(line, flush=True),
    )
  return run(arguments, ledger)


def told(work: Callable[[], int]) -> int:
  """Returns the exit code of `work`; a mistake or a full disk is one line on standard error."""

  def full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in io.DISK_TROUBLE

  try:
    return work()
  except UserError as error:
    print(f"launch.train: {error}", file=sys.stderr)
    return 1 if full(error.__cause__) else error.exit_code
  except OSError as error:
    if not full(error):
      raise
    print(
      f"launch.train: the disk is full or fails ({error}); the newest checkpoint is intact: make "
      "room and run the same command",
      file=sys.stderr,
    )
    return 1


def leave(code: int) -> None:
  """Ends the process, and at once where waiting for threads or other processes could last."""
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.distributed.is_initialized():
    if code not in (0, preemption.EXIT_CODE):
      cluster.part()  # The orderly end would wait for processes that know of no fault.
      cluster.leave(code)
    if waiting.abandoned():
      jax.distributed.shutdown()
  if waiting.abandoned():
    cluster.leave(code)
  sys.exit(code)


def run_process(work: Callable[[], int]) -> None:
  """Ends the process with the code that `work` returns; a traceback gives 1."""
  preemption.leave_at_once()
  try:
    code = work()
  except preemption.Interrupted as stop:
    code = int(stop.code or 0)
  except Exception as error:  # Raised on, threads and others would keep the interpreter alive.
    traceback.print_exc()
    code = 1
    if cluster.lost(error):
      code = cluster.EXIT_CODE
      print("launch.train: another process of the job is gone; start all again", file=sys.stderr)
  leave(code)


if __name__ == "__main__":
  run_process(main)
