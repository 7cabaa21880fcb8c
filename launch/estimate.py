r"""Says what a training run needs and how long it takes, without the chips it is for.

python -m launch.estimate --config configs/NAME.py[:VARIANT] --topology CHIP:SHAPE \
  [--config.KEY=VALUE ...] [--quick] [--out FILE.json] [--layout FILE] [--hlo FILE]

  --topology CHIP:SHAPE   v5e:16x16, v5p:4x4x4, v6e:16x16, h200:8, cpu:8; v5e:4x16x16
                          is four slices, h200:2x8 two hosts
  --quick                 TPU: half the time; all but step time and what follows from it
  --out FILE.json         gets all numbers
  --layout FILE           gets name, dtype, shape and split of every array of the state
  --hlo FILE              gets the compiled program

Compiles the very step that `launch.train` runs, from shapes alone: nothing is allocated. TPU needs
the compiler of `pip install 'spatialv2a_jax[estimate]'`, H200 that of `jax[cuda12]`; no driver.
Times: the TPU compiler's own cycle estimates; elsewhere the time at the matrix peak and the speed
of memory, a bound. Neither holds what collectives add where nothing hides them (shown apart).
A whole step takes a TPU's compiler about ten minutes of one core, nearly all of it to make machine
code, which it does on all cores; --quick ends before that.

Exit codes: 0 fits, 1 does not fit, 2 bad input, 3 the compiler for the chip is missing.
"""

import dataclasses
import json
import logging
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from launch import command, early, hlo, hlo_cost, roofline, targets, tasks
from spatialv2a_jax import compile_cache, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.io import atomic_path, check_writable
from spatialv2a_jax.training import cluster, train_step, waiting

GIB = targets.GIB
_OOM = re.compile(r"CompileTimeHbmOom.*?\(([\d.]+)([KMG])\) exceeds available HBM", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Program:
  """The train step of a config on a mesh, and what surrounds it.

  Attributes:
    step: the jitted function, not compiled.
    state: shapes and shardings of its first argument.
    batch: shapes of its second.
    flops_per_clip: function of nothing; what the model needs for one clip, forward and backward.
  """

  step: Any
  state: train_step.State
  batch: dict[str, jax.ShapeDtypeStruct]
  flops_per_clip: Callable[[], float | None]


def program(config: Mapping[str, Any], devices: Sequence[Any]) -> Program:
  """Returns the step that `launch.train` runs with this config on these devices.

  Raises:
    UserError: for a mistake in the config, or a mesh that it does not fit.
  """
  task, recipe = tasks.recipe(config, tasks.mesh_of(config, devices))
  _, state, layout = recipe.state()
  batch = {
    name: jax.ShapeDtypeStruct((recipe.batch_size, *row.shape[1:]), row.dtype)
    for name, row in task.row().items()
  }
  return Program(recipe.step(layout), state, batch, task.flops)


def estimate(
  config: Mapping[str, Any],
  target: targets.Target,
  *,
  quick: bool = False,
  hlo_path: str = "",
  layout_path: str = "",
) -> dict[str, Any]:
  """Returns all numbers of a run on a target; `show` prints most of them.

  Args:
    config: sections as in `configs/tiny.py`.
    target: devices to compile for.
    quick: leaves out the times, and the compiler behind (see `early.read`).
    hlo_path: file that gets the compiled program, or "".
    layout_path: file that gets the layout of the state, or "".

  Raises:
    UserError: for a mistake in the config, or a mesh that it does not fit.
  """
  devices = targets.devices(target)
  prog = program(config, devices)
  mesh = jax.tree.leaves(prog.state)[0].sharding.mesh
  if layout_path:
    _write(layout_path, "\n".join(sharding.table(prog.state)) + "\n")
  report: dict[str, Any] = {
    "topology": target.text,
    "chip": target.chip.name,
    "chips": target.count,
    "mesh": dict(mesh.shape),
    "batch_size": config["data"]["batch_size"],
    "accumulate": config["accumulate"],
    "remat": config["model"].get("remat", "full"),
    "steps": config["steps"],
    "parameters": parameters(prog.state.params),
    "state_bytes": {
      "params": sharding.bytes_per_device(prog.state.params),
      "opt": sharding.bytes_per_device(prog.state.opt),
      "averages": sharding.bytes_per_device(prog.state.averages()),
    },
  }
  report["zero_whole"] = sharding.zero_whole(prog.state.opt, mesh, config["rules"].get("zero"))
  lowered = prog.step.lower(prog.state, prog.batch)
  start = time.perf_counter()
  try:
    if quick:
      text, used = early.read(lowered)
    else:
      compiled = lowered.compile()
      text, used = compiled.as_text(), memory_of(compiled)
  except jax.errors.JaxRuntimeError as error:
    if not (found := _OOM.search(str(error))):
      raise
    temporaries = float(found.group(1)) * {"K": 2**10, "M": 2**20, "G": GIB}[found.group(2)]
    memory = {"temporaries": temporaries, "peak": temporaries, "available": target.chip.memory}
    return report | {"memory": memory, "fits": False, "advice": advice(report | {"memory": memory})}
  report["compile_seconds"] = time.perf_counter() - start
  if hlo_path:
    _write(hlo_path, text)
  report["memory"] = used | {"available": target.chip.memory}
  report["memory"].setdefault("peak", sum(used.values()))
  module = hlo.parse(text)
  report |= work(module, target, report["batch_size"], prog.flops_per_clip())
  if not quick:
    report |= times(module, target, report["batch_size"], report["flops"]["model_per_chip"])
    report["days"] = config["steps"] * report["seconds"] / 86_400
  report["fits"] = report["memory"]["peak"] <= target.chip.memory
  return report | {"advice": advice(report)}


def parameters(params: Any) -> dict[str, int]:
  """Returns the number of parameters of each module, and their total."""
  counts: dict[str, int] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    module = sharding.parameter_name(path).split("/")[0]
    counts[module] = counts.get(module, 0) + x.size
  return counts | {"total": sum(counts.values())}


def memory_of(compiled: Any) -> dict[str, float]:
  """Returns the bytes of one device while a step runs."""
  stats = compiled.memory_analysis()
  new = stats.output_size_in_bytes - stats.alias_size_in_bytes
  whole = stats.argument_size_in_bytes + stats.temp_size_in_bytes + new
  return {
    "arguments": stats.argument_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "donated": stats.alias_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
    "peak": max(whole, stats.peak_memory_in_bytes) + stats.generated_code_size_in_bytes,
  }


def work(
  module: hlo.Module, target: targets.Target, rows: int, flops_per_clip: float | None
) -> dict[str, Any]:
  """Returns FLOPs and collectives of one step of an optimised program."""
  chip, near = target.chip, target.count // target.parts if target.parts > 1 else None
  found = hlo_cost.collectives(module, near)
  seconds = hlo_cost.collective_seconds(found.values(), chip.interconnect, chip.network)
  return {
    "flops": {
      "model_per_clip": flops_per_clip,
      "model_per_chip": flops_per_clip and flops_per_clip * rows / target.count,
      "compiled_per_chip": hlo_cost.flops(module),
    },
    "collectives": {kind: {"count": c.count, "bytes": c.bytes} for kind, c in found.items()},
    "collective_seconds": seconds,
    "host_transfers": hlo_cost.host_transfers(module),
    "unknown_loops": hlo.unknown_loops(module),
  }


def times(
  module: hlo.Module, target: targets.Target, rows: int, useful_flops: float | None
) -> dict[str, Any]:
  """Returns the times of one step of a compiled program, and the rates that follow from them."""
  chip, cycles = target.chip, hlo_cost.cycles(module)
  if chip.clock:
    seconds, source = sum(cycles.values()) / chip.clock, "compiler's cycles"
    matrix = cycles["matrix"] / max(sum(cycles.values()), 1)
    optional = hlo_cost.optional_cycles(module) / chip.clock
    scopes = [(name, n / chip.clock) for name, n in hlo_cost.cycles_by_scope(module)]
  else:
    seconds = roofline.seconds(module, chip.peak_flops, chip.bandwidth)
    source, matrix, optional, scopes = "bound by peak and memory", None, 0.0, []
  return {
    "seconds": seconds,
    "seconds_from": source,
    "seconds_optional": optional,
    "matrix_share": matrix,
    "scopes": scopes,
    "mfu": useful_flops and useful_flops / (seconds * chip.peak_flops),
    "clips_per_s": rows / seconds,
  }


def advice(report: Mapping[str, Any]) -> list[str]:
  """Returns what to change, the most useful first."""
  memory, chips, mesh = report["memory"], report["chips"], report["mesh"]
  state = sum(report["state_bytes"].values())
  lines = []
  rows = report["batch_size"] // (mesh["data"] * mesh["fsdp"])
  per_chip = rows / report["accumulate"]
  if memory["peak"] > memory["available"]:
    if state > memory["available"] / 2:
      more = next((n for n in (2, 4, 8, 16, 32, 64) if state / n < memory["available"] / 4), 64)
      split = mesh["fsdp"] * more
      fits = chips // mesh["tensor"] % split == 0
      ask = f"--config.mesh.data=-1 --config.mesh.fsdp={split}" if fits else "more chips"
      lines.append(f"the state alone takes {state / GIB:.1f} GiB of a chip: split it, {ask}")
    room = max(memory["available"] - state, 1)
    parts = max(2, memory["temporaries"] / room) * report["accumulate"]
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n >= parts]
    if fitting:
      lines.append(
        f"activations are too large: process the batch in parts, --config.accumulate={fitting[0]}"
      )
    if report.get("remat", "full") != "full":
      lines.append("recompute more in the backward pass: --config.model.remat=full")
  elif per_chip < 8:
    lines.append(
      f"{per_chip:g} clips a chip leave much of the step to the optimiser: use fewer chips, or a "
      "larger --config.data.batch_size"
    )
  lines += sharding.zero_remarks(report.get("zero_whole", 0.0))
  if report.get("unknown_loops"):
    lines.append(f"loops of unknown length count once: {', '.join(report['unknown_loops'])}")
  if report.get("host_transfers"):
    lines.append(f"the step talks to the host: {', '.join(report['host_transfers'])}")
  return lines


def show(report: Mapping[str, Any]) -> str:
  """Returns the report for people."""
  mesh = " ".join(f"{name}={size}" for name, size in report["mesh"].items())
  counts, memory = dict(report["parameters"]), report["memory"]
  total = counts.pop("total")
  modules = ", ".join(f"{name} {n / 1e6:.2f}" for name, n in counts.items())
  lines = [
    f"{report['chips']} x {report['chip']} ({report['topology']}), mesh {mesh}, "
    f"batch {report['batch_size']}",
    f"parameters   {total / 1e6:.2f} M: {modules}",
    "state        " + ", ".join(f"{n} {_size(b)}" for n, b in report["state_bytes"].items()),
    "memory       "
    + ", ".join(f"{name} {_size(b)}" for name, b in memory.items() if name != "available")
    + f" of {_size(memory['available'])} per chip",
  ]
  if "flops" in report:
    flops = report["flops"]
    lines.append(
      f"FLOPs        {_count(flops['model_per_clip'])} per clip; per chip and step "
      f"{_count(flops['model_per_chip'])} needed, {_count(flops['compiled_per_chip'])} computed"
    )
    for kind, c in report["collectives"].items():
      lines.append(f"collectives  {kind}: {c['count']} with {_size(c['bytes'])} per chip")
    lines.append(
      f"             {1e3 * report['collective_seconds']:.1f} ms where nothing hides them"
    )
  if "seconds" in report:
    share = report["matrix_share"]
    lines.append(
      f"step         {1e3 * report['seconds']:.1f} ms ({report['seconds_from']}"
      + ("" if share is None else f"; {100 * share:.0f} % of it with the matrix unit at work")
      + "), collectives apart"
    )
    if report["seconds_optional"]:
      lines.append(f"             {1e3 * report['seconds_optional']:.1f} ms of it if need be only")
    lines += [f"             {1e3 * s:8.2f} ms  {name}" for name, s in report["scopes"]]
    mfu = "unknown" if report["mfu"] is None else f"{100 * report['mfu']:.1f} %"
    whole = report["seconds"] + report["collective_seconds"]
    lines.append(
      f"rate         MFU {mfu}, {report['clips_per_s']:,.0f} clips/s "
      f"({report['batch_size'] / whole:,.0f} if nothing hides the collectives), "
      f"{report['days']:.2f} days for {report['steps']:,} steps"
    )
  fits = memory["peak"] / memory["available"]
  verdict = "fits" if report["fits"] else "DOES NOT FIT"
  lines.append(f"verdict      {verdict}: {100 * fits:.0f} % of the memory of a chip")
  return "\n".join(lines + [f"             {line}" for line in report["advice"]])


def _size(count: float) -> str:
  return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _count(number: float | None) -> str:
  if number is None:
    return "unknown"
  for power, prefix in ((12, "T"), (9, "G"), (6, "M")):
    if number >= 10**power:
      return f"{number / 10**power:.1f} {prefix}"
  return f"{number:.0f}"


def _write(path: str, text: str) -> None:
  with atomic_path(path) as temporary:
    pathlib.Path(temporary).write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code."""
  argv = list(sys.argv if argv is None else argv)
  if {"-h", "--help", "-help"} & set(argv):
    print(__doc__)
    return 0
  logging.getLogger("absl").setLevel(logging.ERROR)
  try:
    values = flags.FlagValues()
    for name in ("topology", "out", "layout", "hlo"):
      flags.DEFINE_string(name, "", "see above", flag_values=values)
    flags.DEFINE_boolean("quick", False, "see above", flag_values=values)
    config = command.parse(argv, values)
    given = {name: values[name].value or "" for name in ("topology", "out", "layout", "hlo")}
    if config is None or not given["topology"]:
      raise UserError("give --config configs/NAME.py[:VARIANT] and --topology CHIP:SHAPE")
    target, quick = targets.parse(given["topology"]), bool(values["quick"].value)
    if quick and target.chip.platform != "tpu":
      raise UserError(f"--quick is for TPUs; {target.text} needs no shortcut")
    targets.prepare(target)
    compile_cache.keep()
    paths = {"hlo_path": given["hlo"], "layout_path": given["layout"]}
    for path in filter(None, (given["out"], *paths.values())):  # Not only after minutes.
      check_writable(pathlib.Path(path).absolute().parent)
    report = estimate(config, target, quick=quick, **paths)
    print(show(report), flush=True)
    if given["out"]:
      _write(given["out"], json.dumps(report, indent=2) + "\n")
  except UserError as error:
    print(f"launch.estimate: {error}", file=sys.stderr)
    return error.exit_code
  return 0 if report["fits"] else 1


if __name__ == "__main__":
  code = main()
  sys.stdout.flush()
  if waiting.abandoned():
    cluster.leave(code)
  sys.exit(code)
