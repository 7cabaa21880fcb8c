"""What one training step of `small_16k` costs the host, and what its loader can deliver.

Run: python -m benchmarks.host [--estimate FILE.json ...] [--storage bfloat16] [--cache-gb 0]
     [--cores 0] [--clips 32] [--steps 40] [--rounds 3]

The real loop of `launch.train` reads, checks and parses real shards with the shapes of `small_16k`,
hands over the batches, dispatches steps, fetches their metrics and writes the log. Its step takes
and returns all arrays of `small_16k` (with next to no width) and computes nothing: what is left is
the host's work. What it returns is there when a chip would have it, which does one step after the
other, each in the time that a file of `launch.estimate --out` says, with as many clips; without a
file, at once. JAX's CPU takes a batch as it lies; a copy is made for other devices, which need one.
With `--cache-gb` there are as many clips as fit into it, and what is measured begins once all of
them were read. The round of some that took the least processor time, so that other programs count
little.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import small_16k
from data import captions, pipeline, shards
from launch import tasks
from spatialv2a_jax import schema, sharding
from spatialv2a_jax.training import recipe, train

CLIPS, LISTED = 256, 800  # So many clips, each so many times: as many records as VGGSound has.


class Cost(NamedTuple):
  """Milliseconds of one step.

  Attributes:
    added: by which steps are longer than the device takes.
    loop: of a processor, for the thread that dispatches.
    whole: of a processor, for all threads, those that read and copy included.
  """

  added: float
  loop: float
  whole: float


class _Due:
  """A metric that is not there before its time, as that of a step at work."""

  def __init__(self, value: Any, at: float):
    self._value, self._at = value, at

  def is_ready(self) -> bool:
    return time.perf_counter() >= self._at

  def copy_to_host_async(self) -> None:
    self._value.copy_to_host_async()

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    time.sleep(max(0.0, self._at - time.perf_counter()))
    return np.asarray(self._value, dtype, copy=copy)


class _Paced:
  """A step of a device that does one after the other, while its caller goes on."""

  def __init__(self, stage: Any, seconds: float, hasty: int):
    self._stage, self._seconds, self._hasty = stage, seconds, hasty
    self._free = 0.0  # When it has done all that it was asked for.

  def lower(self, *arguments: Any) -> "_Paced":
    return _Paced(self._stage.lower(*arguments), self._seconds, self._hasty)

  def compile(self) -> "_Paced":
    return _Paced(self._stage.compile(), self._seconds, self._hasty)

  def __call__(self, *arguments: Any) -> Any:
    state, metrics = self._stage(*arguments)
    self._hasty -= 1
    takes = self._seconds if self._hasty < 0 else 0.0
    self._free = max(self._free, time.perf_counter()) + takes
    return state, {name: _Due(x, self._free) for name, x in metrics.items()}


@dataclasses.dataclass(frozen=True)
class Idle(recipe.Recipe):
  """A recipe whose step has the arguments and results of the real one and only waits.

  Attributes:
    seconds: that a step takes.
    hasty: steps before the first one that does.
  """

  seconds: float = 0.0
  hasty: int = 0

  def feed(self, examples: int) -> Iterator[Any]:
    """Yields batches, each copied to memory that is in use already."""
    room: dict[str, np.ndarray] = {}
    for batch in super().feed(examples):
      room = room or {name: np.zeros_like(x) for name, x in batch.local.items()}
      for name, x in batch.local.items():
        np.copyto(room[name], x)
      yield batch

  def step(self, layout: Any) -> Any:
    """Returns the jitted `step(state, batch)`, which donates `state`."""
    batch = next(self.batches(0))
    metrics = jax.eval_shape(super().step(layout), self.state()[1], batch)[1]

    def idle(state, batch):
      del batch
      state = jax.lax.optimization_barrier(state)  # Else JAX itself would hand it on.
      done = {"good": jnp.ones((), bool)}
      return state.replace(step=state.step + 1), {
        name: done.get(name, jnp.zeros(x.shape, x.dtype)) for name, x in metrics.items()
      }

    jitted = jax.jit(
      idle,
      in_shardings=(layout, NamedSharding(self.mesh, self.rules.spec("act_batch"))),
      out_shardings=(layout, NamedSharding(self.mesh, P())),
      donate_argnums=0,
      keep_unused=True,
    )
    return _Paced(jitted, self.seconds, self.hasty)


def noise(config: Mapping[str, Any], storage: str, folder: pathlib.Path) -> int:
  """Writes shards of noise that fit a config, with a caption for each clip.

  Their manifest lists each shard many times: Grain shuffles few records at many times the cost.

  Args:
    config: of a flow network.
    storage: of the features that a video and a caption have.
    folder: of the shards.

  Returns:
    how many clips there are: all those of VGGSound, or no more than the config lets keep.
  """
  sizes = {name: config["features"][name] for name in ("clip_dim", "sync_dim", "text_len")}
  shapes = schema.feature_shapes(
    config["seconds"],
    schema.AUDIO[config["audio"]],
    text_dim=config["features"]["text_dim"],
    **sizes,
  )

  def record(item: shards.Item) -> shards.Record:
    rng = np.random.default_rng(item.payload)
    kinds = {"mean": "float32", "std": "bfloat16", "spatial": "float32"}
    return {"caption": f"caption {item.payload}"} | {
      name: schema.stored(rng.standard_normal(shape, np.float32), kinds.get(name, storage))
      for name, shape in shapes.items()
    }

  text = shapes.pop(captions.FIELD)
  captions.build(
    [f"caption {i}" for i in range(CLIPS)],
    lambda caption: np.full(text, len(caption), np.float32),
    folder,
    config={},
    storage=storage,
  )
  items = [shards.Item(f"clip{i:05d}", i) for i in range(CLIPS)]
  shards.build(items, record, folder, shards=4, config={})
  manifest = folder / "manifest.json"
  listed = json.loads(manifest.read_text())
  times = LISTED
  if config["data"]["cache_gb"]:
    one = next(pipeline.loader(shards.paths(folder), batch_size=1, seed=0))
    size = sum(x.nbytes for x in one.values())
    times = max(1, int(config["data"]["cache_gb"] * 2**30 / size / CLIPS))
  manifest.write_text(json.dumps(listed | {"shards": times * listed["shards"]}))
  return times * CLIPS


def config_of(folder: str, clips: int, cache_gb: float) -> dict[str, Any]:
  """Returns `small_16k` with all its arrays, and hardly any width."""
  config: dict[str, Any] = small_16k.get_config().to_dict()
  config["model"] |= {"width": 16, "heads": 1, "dtype": "float32", "activations": "float32"}
  config["data"] |= {"path": folder, "batch_size": clips, "cache_gb": cache_gb}
  config["rules"] |= {"zero": ""}
  config["guard"] |= {"sigma": 0.0}  # What `Idle` returns is no loss that falls.
  return config


def loop(config: Mapping[str, Any], seconds: float, steps: int, hasty: int) -> Cost:
  """Returns what a step costs the host, reading included, that takes the device so long.

  Args:
    config: from `config_of`.
    seconds: of a step.
    steps: that are measured; as many come before them.
    hasty: steps before those, at least, which nobody waits for.
  """
  hasty = -(-hasty // steps) * steps  # A line of the log ends with them.
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  task, real = tasks.recipe(config, mesh)
  parts: dict[str, Any] = {x.name: getattr(real, x.name) for x in dataclasses.fields(real)}
  marks: list[tuple[int, float, float, float]] = []

  def say(line: str) -> None:
    if line.startswith("step "):
      step = int(line.split()[1].partition("/")[0])
      marks.append((step, time.perf_counter(), time.thread_time(), time.process_time()))

  with tempfile.TemporaryDirectory() as workdir:
    train.fit(
      workdir,
      Idle(**{**parts, "values": None}, seconds=seconds, hasty=hasty),
      kind="flow",
      config=config,
      steps=hasty + 2 * steps,
      every=train.Every(log=steps, checkpoint=hasty + 10 * steps),
      tokens_per_clip=task.tokens,
      say=say,
    )
  (first, *before), (last, *after) = marks[-2:]  # The first part holds compilation.
  spent = (1e3 * (b - a) / (last - first) for a, b in zip(before, after, strict=True))
  wall, loop, whole = spent
  return Cost(wall - 1e3 * seconds, loop, whole)


def read(config: Mapping[str, Any], steps: int, before: int) -> tuple[float, float]:
  """Returns clips per second of the loader alone, and processor milliseconds per clip.

  Args:
    config: from `config_of`.
    steps: that are measured.
    before: as many are not.
  """
  data = config["data"]
  clips, options = data["batch_size"], {"seed": 0, "cache_gb": data["cache_gb"]}
  source = pipeline.loader(shards.paths(data["path"]), batch_size=clips, **options)
  for _ in itertools.islice(source, before):
    pass
  wall, used = time.perf_counter(), time.process_time()
  for _ in itertools.islice(source, steps):
    pass
  wall, used = time.perf_counter() - wall, time.process_time() - used
  return steps * clips / wall, 1e3 * used / (steps * clips)


def _epoch(config: Mapping[str, Any], clips: int) -> int:
  """Returns how many batches it takes to read each clip, or each file, once."""
  data = config["data"]
  return -(-(clips if data["cache_gb"] else CLIPS) // data["batch_size"])


def main() -> None:
  """Prints the costs."""
  parser = argparse.ArgumentParser(description="What a training step costs the host.")
  parser.add_argument("--storage", choices=schema.STORAGES, default="bfloat16")
  parser.add_argument("--cache-gb", type=float, default=0.0, help="as config.data.cache_gb")
  parser.add_argument("--cores", type=int, default=0, help="that the process gets; 0: all")
  parser.add_argument("--clips", type=int, default=32, help="a step, without --estimate")
  parser.add_argument("--steps", type=int, default=40, help="of each measurement")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--estimate", nargs="*", default=[], metavar="FILE.json")
  args = parser.parse_args()
  if args.cores:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
  flags.FLAGS.mark_as_parsed()  # Grain's worker options are absl flags.
  reports = [json.loads(pathlib.Path(path).read_text()) for path in args.estimate]
  cores = f"{args.cores or os.cpu_count()} of {os.cpu_count()} cores of a {platform.machine()} CPU"
  print(f"{cores}, features of 8 s clips in {args.storage}", end="")
  with tempfile.TemporaryDirectory() as folder:
    config = config_of(folder, args.clips, args.cache_gb)
    there = noise(config, args.storage, pathlib.Path(folder))
    batch = next(pipeline.loader(shards.paths(folder), batch_size=args.clips, seed=0))
    print(f": {sum(x.nbytes for x in batch.values()) / args.clips / 1e6:.2f} MB each", end="")
    print(f"; {there:,} clips, all in memory" if args.cache_gb else "")
    # Once the files are in the system's cache, or all clips in that of the loader.
    rates = [read(config, args.steps, _epoch(config, there)) for _ in range(args.rounds)]
    rate, per_clip = max(rate for rate, _ in rates), min(spent for _, spent in rates)
    print(f"loader alone: {rate:,.0f} clips/s, {per_clip:.3f} ms of processor per clip")
    for report in reports or [None]:
      clips = report["batch_size"] // report["chips"] if report else args.clips
      seconds = report["seconds"] if report else 0.0
      config = config_of(folder, clips, args.cache_gb)
      hasty = _epoch(config, there) if args.cache_gb else 0
      costs = [loop(config, seconds, args.steps, hasty) for _ in range(args.rounds)]
      cost = min(costs, key=lambda cost: cost.whole)
      added = f"longer by {cost.added:.2f} ms, " if report else ""
      line = (
        f"{clips} clips a step: {added}{cost.loop:.2f} ms of the loop's thread, "
        f"{cost.whole:.2f} of all"
      )
      if report:
        needed = ", ".join(
          f"{n} chips {n * clips / seconds:,.0f} clips/s = "
          f"{n * clips / seconds * per_clip / 1e3:.2f} cores"
          for n in (8, 64)
        )
        line = (
          f"{report['topology']}, {1e3 * seconds:.1f} ms ({report['seconds_from']}) with {line} "
          f"({', '.join(f'{0.1 * x / seconds:.2f}' for x in cost)} % of a step); "
          f"{needed}"
        )
      print(line, flush=True)


if __name__ == "__main__":
  main()
