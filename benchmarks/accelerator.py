r"""Times whole train steps on the accelerator at hand, and says what they spend their time on.

Run: python -m benchmarks.accelerator --config configs/NAME.py [--config.KEY=VALUE ...] \
       [--setting "KEY=VALUE ..."] [--setting ...] [--steps 10] [--rounds 5] [--out DIR]

  --setting "KEY=VALUE ..."   values of the config to try, such as "data.batch_size=128
                              model.attention=xla"; given several times, one row each
  --out DIR                   gets a file of numbers, the compiled program and the time of each
                              kernel for each setting

The step is that of `launch.train`, on batches that are on the device: reading is not in it. State
and batch are noise, since products of zeros take less power and so less time. The device's peak is
measured by a product of matrices, the speed of its memory by a copy.
"""

import collections
import dataclasses
import gzip
import hashlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import command, estimate, tasks
from spatialv2a_jax import compile_cache
from spatialv2a_jax.training import determinism, meter

GIB = 2.0**30
SHOWN = 8  # Kernels of each setting that are printed.
# Words in the names of operations and kernels; the first kind of which one is found counts.
KINDS = {
  "attention": ("attention", "sdpa", "flash", "fmha"),
  "convolutions": ("cudnn-conv", "fprop", "wgrad", "dgrad"),
  "products": ("gemm", "nvjet", "cutlass", "wgmma", "matmul"),
  "copies": ("memcpy", "memset", "copy", "transpose"),
}


class Kernel(NamedTuple):
  """One kernel of a step.

  Attributes:
    name: the vendor's or compiler's.
    op: of the compiled program; "" where the profiler does not say.
    calls: of one step.
    seconds: of one step, all calls together.
  """

  name: str
  op: str
  calls: float
  seconds: float

  @property
  def kind(self) -> str:
    """One of `KINDS`, or "fusions"."""
    text = f"{self.op} {self.name}".lower()
    return next((k for k, words in KINDS.items() if any(w in text for w in words)), "fusions")


@dataclasses.dataclass(frozen=True)
class Row:
  """What was measured of one setting.

  Attributes:
    setting: as on the command line.
    seconds: of a step, one of each round.
    clips: of a step.
    devices: that share them.
    flops_per_clip: that the model needs.
    predicted: bytes of the device that the compiler says a step needs.
    compiled: seconds that compiling took.
    kernels: of a step, the longest first.
    busy: seconds of a step in which some kernel runs.
    digest: of the parameters after all steps, which deterministic runs have in common.
  """

  setting: str
  seconds: list[float]
  clips: int
  devices: int
  flops_per_clip: float
  predicted: float
  compiled: float
  kernels: list[Kernel]
  busy: float
  digest: str

  def mfu(self, peak: float) -> float:
    """Returns the share of the peak of a device in FLOP/s that the model needs."""
    work = self.flops_per_clip * self.clips / self.devices
    return work / (statistics.median(self.seconds) * peak)


def ceilings() -> tuple[float, float]:
  """Returns FLOP/s of a large product in bfloat16, and bytes/s that a copy reads and writes."""
  size = 1024 if jax.default_backend() == "cpu" else 8192  # A CPU would take minutes.
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
  large = jnp.zeros(2**29, jnp.float32)
  product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
  return (
    2 * size**3 / statistics.median(_times(lambda: product(a, b), 20, 7)),
    2 * large.nbytes / statistics.median(_times(lambda: copy(large), 10, 7)),
  )


def _times(run: Any, calls: int, rounds: int) -> list[float]:
  """Returns seconds of a call, the mean of some calls for each round."""
  jax.block_until_ready(run())
  times = []
  for _ in range(rounds):
    began = time.perf_counter()
    for _ in range(calls):
      result = run()
    jax.block_until_ready(result)
    times.append((time.perf_counter() - began) / calls)
  return times


def noise(abstract: Any) -> Any:
  """Returns a state of random parameters, as far from zero as trained ones are."""
  rng = np.random.default_rng(0)

  def fill(path, x):
    if x.dtype != np.float32 or not x.ndim:
      return jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
    centre = path[-1].key in ("scale", "cross_mass", "latent_std", "var")
    values = rng.standard_normal(x.shape, np.float32)
    return jax.device_put(centre + np.float32(0.03) * values, x.sharding)

  params = jax.tree_util.tree_map_with_path(fill, abstract.params)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract)
  stats = jax.tree_util.tree_map_with_path(fill, abstract.stats)
  averages = [jax.tree.map(jnp.copy, (params, stats)) for _ in abstract.means]
  (ema, *beside), means = zip(*averages, strict=True)
  return zeros.replace(params=params, stats=stats, ema=ema, beside=tuple(beside), means=means)


def measure(
  config: dict[str, Any], setting: str, state: Any, steps: int, rounds: int, out: pathlib.Path
) -> tuple[Row, Any]:
  """Returns what was measured of a setting, and the state, which was donated."""
  config = command.replaced(config, [f"--config.{word}" for word in setting.split()])
  config["data"] |= {"path": tasks.SYNTHETIC, "eval": ""}
  config["guard"] |= {"sigma": 0.0}
  task, recipe = tasks.recipe(config, tasks.mesh_of(config))
  _, abstract, layout = recipe.state()
  state = noise(abstract) if state is None else state
  batches = recipe.feed(0)
  batch = dict(next(batches).whole)
  began = time.perf_counter()
  step = recipe.step(layout).lower(state, batch).compile()
  compiled = time.perf_counter() - began

  def run() -> Any:
    nonlocal state
    state, metrics = step(state, batch)
    return metrics

  times = _times(run, steps, rounds)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(3):
        jax.block_until_ready(run())
    kernels, busy = profile(pathlib.Path(folder), 3)
  with gzip.open(out.with_suffix(".hlo.gz"), "wt") as file:
    file.write(step.as_text() or "")
  predicted = estimate.memory_of(step)["peak"]
  flops = task.flops() or float("nan")
  digest = hashlib.sha256()
  for x in jax.tree.leaves(state.params):
    digest.update(np.asarray(x).tobytes())
  about = (
    recipe.batch_size,
    recipe.mesh.size,
    flops,
    predicted,
    compiled,
    kernels,
    busy,
    digest.hexdigest()[:16],
  )
  row = Row(setting, times, *about)
  out.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(row), indent=1))
  return row, state


def profile(folder: pathlib.Path, steps: int) -> tuple[list[Kernel], float]:
  """Returns the kernels of a step and the seconds in which one runs, of a trace of some steps."""
  totals: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
  spans: list[tuple[float, float]] = []
  for name, op, start, length in _events(folder):
    totals[name, op].append(length)
    spans.append((start, start + length))
  busy, until = 0.0, float("-inf")
  for start, end in sorted(spans):
    busy += max(0.0, end - max(start, until))
    until = max(until, end)
  kernels = [
    Kernel(*key, len(times) / steps, 1e-9 * sum(times) / steps) for key, times in totals.items()
  ]
  return sorted(kernels, key=lambda kernel: -kernel.seconds), 1e-9 * busy / steps


def _events(folder: pathlib.Path) -> Iterator[tuple[str, str, float, float]]:
  """Yields name, op, start and length in nanoseconds of each kernel of the first GPU."""
  for path in folder.rglob("*.xplane.pb"):
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      if not plane.name.startswith("/device:GPU:0"):
        continue
      for line in plane.lines:
        if not line.name.startswith("Stream"):
          continue
        for event in line.events:
          about = {key: value for key, value in event.stats}
          yield event.name, str(about.get("hlo_op", "")), event.start_ns, event.duration_ns


def show(row: Row, peak: float) -> str:
  """Returns the lines of one setting."""
  seconds = statistics.median(row.seconds)
  published = meter.peak_flops() or float("nan")
  lines = [
    f"{row.setting or 'as configured'}: {1e3 * seconds:.2f} ms "
    f"({1e3 * min(row.seconds):.2f} .. {1e3 * max(row.seconds):.2f}), "
    f"{row.clips / seconds:,.0f} clips/s, MFU {100 * row.mfu(published):.1f} % of the published "
    f"peak, {100 * row.mfu(peak):.1f} % of the measured one; {row.predicted / GIB:.2f} GiB by the "
    f"compiler; compiled in {row.compiled:.0f} s; parameters {row.digest} at the end"
  ]
  if row.kernels:
    share: dict[str, float] = collections.defaultdict(float)
    for kernel in row.kernels:
      share[kernel.kind] += kernel.seconds
    kinds = [f"{kind} {1e3 * s:.1f}" for kind, s in sorted(share.items(), key=lambda x: -x[1])]
    idle = 1e3 * (seconds - row.busy)
    lines.append(f"  kernels of a step, ms: {', '.join(kinds)}; none runs in {idle:.1f}")
  for kernel in row.kernels[:SHOWN]:
    name = f"{kernel.op} {kernel.name}"[:100]
    lines.append(f"  {1e3 * kernel.seconds:8.3f} in {kernel.calls:.0f} calls of {name}")
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a row per setting."""
  if {"-h", "--help"} & set(sys.argv if argv is None else argv):
    print(__doc__)
    return
  values = flags.FlagValues()
  flags.DEFINE_multi_string("setting", [""], "see above", flag_values=values)
  flags.DEFINE_integer("steps", 10, "of a round", flag_values=values)
  flags.DEFINE_integer("rounds", 5, "see above", flag_values=values)
  flags.DEFINE_string("out", "", "see above", flag_values=values)
  config = command.parse(list(sys.argv if argv is None else argv), values)
  if config is None:
    raise SystemExit("give --config configs/NAME.py")
  if config["deterministic"]:
    determinism.enforce()
  compile_cache.keep()
  peak, bandwidth = ceilings()
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {peak / 1e12:.0f} TFLOP/s in a product"
    f" of matrices in bfloat16, {bandwidth / 1e12:.2f} TB/s in a copy",
    flush=True,
  )
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(values["out"].value or folder)
    out.mkdir(parents=True, exist_ok=True)
    state = None
    given = int(values["steps"].value or 10), int(values["rounds"].value or 5)
    for index, setting in enumerate(values["setting"].value or [""]):
      try:
        row, state = measure(config, setting, state, *given, out / f"{index}")
      except jax.errors.JaxRuntimeError as error:  # Such as one for memory; the others may do.
        print(f"{setting}: {str(error).strip().splitlines()[0]}", flush=True)
        state = None
        continue
      print(show(row, peak), flush=True)
  stats = jax.devices()[0].memory_stats() or {}
  print(f"at most {stats.get('peak_bytes_in_use', float('nan')) / GIB:.2f} GiB in use")


if __name__ == "__main__":
  main()
