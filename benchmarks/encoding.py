"""What the frozen encoders of `--features` cost: work per clip, seconds on this machine, hours.

Run: python -m benchmarks.encoding [--times] [--topology v5e:2x2] [--videos DIR] [--seconds 8]
The networks have the sizes of the released ones (CLIP ViT-H/14, Synchformer, CLIPSeg, MMAudio's
VAE) and random weights. Their work is counted in the matrix products of the programs that
`launch.data encode` runs; hours for all of VGGSound follow from a chip's peak and the share of it
that is reached. That share is an assumption (`--share`), or, with `--topology`, what the compiler
of a chip that is not there estimates, some rows at a time on each chip. With `--times` a row of
each network runs here, after one that is not timed, in processor seconds (`taskset -c 0` gives it
one core). `--videos` times decoding and resizing for them.
"""

import argparse
import dataclasses
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data import catalogue
from data.funnel import ALL_OF_VGGSOUND
from launch import flops, hlo, hlo_cost, roofline, targets
from launch.targets import CHIPS
from spatialv2a_jax import codec, encoders, io, schema, sharding
from spatialv2a_jax.models import clip, localizer, synchformer

SHOWN = ("v5e", "v5p", "h200")
LABELS = 309  # Captions of VGGSound, each of which is encoded once.
VAE_WIDTH = 384  # Of MMAudio's VAE for 16 kHz.


@dataclasses.dataclass(frozen=True)
class Network:
  """One program and what a clip gives it.

  Attributes:
    name: of the network.
    run: (parameters, rows, ...) -> anything.
    params: shapes of its parameters.
    row: of its input, one of those that a clip has.
    dtype: of the input.
    rows: in a clip.
    rest: what else it takes.
    high: above all values of an integer input.
  """

  name: str
  run: Callable[..., Any]
  params: Any
  row: tuple[int, ...]
  dtype: str
  rows: int
  rest: tuple[Any, ...] = ()
  high: int = 256

  def inputs(self, rows: int) -> np.ndarray:
    """Returns random rows."""
    rng = np.random.default_rng(0)
    if self.dtype == "float32":
      return rng.standard_normal((rows, *self.row), np.float32) / 8
    return rng.integers(0, self.high, (rows, *self.row)).astype(self.dtype)

  def work(self) -> int:
    """Returns the FLOPs of all rows of a clip."""
    x = jax.ShapeDtypeStruct((self.rows, *self.row), self.dtype)
    return flops.count(self.run, self.params, x, *self.rest)

  def seconds(self, rows: int) -> float:
    """Returns processor seconds of a clip here, from those of a few rows."""
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02
    params = jax.tree.map(lambda leaf: np.resize(block, leaf.shape), self.params)
    x = self.inputs(rows)
    jax.block_until_ready(self.run(params, x, *self.rest))
    began = time.process_time()  # Of all threads: other work on the machine hardly counts.
    jax.block_until_ready(self.run(params, x, *self.rest))
    return (time.process_time() - began) * self.rows / rows


def networks(seconds: float) -> list[Network]:
  """Returns the networks of an encoding, at full size."""
  sizes, motion, place = clip.Config(), synchformer.Config(), localizer.Config()
  frames = schema.whole_frames(seconds, schema.CLIP_FPS)
  segments = synchformer.segments(schema.whole_frames(seconds, schema.SYNC_FPS))
  net = codec.build({"width": VAE_WIDTH}, schema.AUDIO["16k"])
  side = place.grid * place.patch
  samples = schema.lengths(seconds, schema.AUDIO["16k"]).samples
  one_sound = (np.zeros((1, place.dim), np.float32), np.float32(localizer.SHIFT))
  return [
    Network(
      "CLIP ViT-H/14, pictures", encoders.read_image(sizes), _shapes(clip.build(sizes))["image"],
      (*clip.frame_size(sizes), 3), "uint8", frames,
    ),
    Network(
      "Synchformer", encoders.read_motion(motion), _shapes(synchformer.build(motion)),
      (segments.shape[1], motion.size, motion.size, 3), "uint8", len(segments),
    ),
    Network(
      "CLIPSeg (ACL)", encoders.read_place(place)[-1], _shapes(localizer.build(place)),
      (side, side, 3), "uint8", frames, one_sound,
    ),
    Network(
      "VAE, both ears", jax.jit(net.encode), _shapes(net), (2, samples), "float32", 1
    ),
    Network(
      f"CLIP, a caption ({LABELS} in all)", encoders.read_text(sizes),
      _shapes(clip.build(sizes))["text"], (sizes.text_len,), "int32", 1, high=sizes.vocab,
    ),
  ]  # fmt: skip


def looking(videos: pathlib.Path, seconds: float) -> float:
  """Returns processor seconds per clip of what the encoders look at."""
  sync = synchformer.Config().size
  side = localizer.Config().grid * localizer.Config().patch
  views = {
    "clip": io.View(schema.CLIP_FPS, clip.frame_size(clip.Config())),
    "sync": io.View(schema.SYNC_FPS, short_side=sync, crop=sync),
    "place": io.View(schema.CLIP_FPS, (side, side)),
  }
  paths = [one.path for one in catalogue.read(videos, None).clips]
  began = time.process_time()
  for path in paths:
    io.read_views(path, views, duration=seconds, threads=1)
  return (time.process_time() - began) / len(paths)


def reached(net: Network, target: targets.Target, rows: int) -> tuple[float, int]:
  """Returns the share of a chip's peak that a program is estimated to reach, and its FLOPs.

  Args:
    net: the program.
    target: chips to compile for.
    rows: on each of them.
  """
  mesh = sharding.make_mesh(devices=targets.devices(target))
  whole, split = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
  x = jax.ShapeDtypeStruct((rows * target.count, *net.row), net.dtype)
  program = jax.jit(
    lambda params, x, *rest: net.run(params, x, *rest),
    in_shardings=(whole, split, *(whole for _ in net.rest)),
  )
  module = hlo.parse(program.lower(net.params, x, *net.rest).compile().as_text() or "")
  chip = target.chip
  if chip.clock:
    seconds = sum(hlo_cost.cycles(module).values()) / chip.clock
  else:
    seconds = roofline.seconds(module, chip.peak_flops, chip.bandwidth)
  work = flops.count(net.run, net.params, x, *net.rest) / target.count
  return work / (seconds * chip.peak_flops), round(hlo_cost.flops(module) * net.rows / rows)


def _shapes(net: Any) -> Any:
  return sharding.unboxed(jax.eval_shape(net.init, jax.random.key(0)))


def main() -> None:
  """Counts, measures and prints."""
  parser = argparse.ArgumentParser(description="What the frozen encoders cost.")
  parser.add_argument("--videos", type=pathlib.Path, help="folder of clips, to time looking at it")
  parser.add_argument("--seconds", type=float, default=8.0, help="of a clip that is encoded")
  parser.add_argument("--share", type=float, default=0.4, help="of a chip's peak that is reached")
  parser.add_argument("--topology", help="chips to estimate that share for, such as v5e:2x2")
  parser.add_argument("--rows", type=int, default=16, help="on each chip, with --topology")
  parser.add_argument("--times", action="store_true", help="run the networks on this machine")
  args = parser.parse_args()
  target = targets.parse(args.topology) if args.topology else None
  if target:
    targets.prepare(target)
  cores = len(os.sched_getaffinity(0))
  print(f"{platform.processor() or platform.machine()}, {cores} cores\n")
  names = ["TFLOP per clip", *(["core s per clip here", "GFLOP/s"] if args.times else [])]
  names += [f"share of {target.chip.name}'s peak", "compiled TFLOP"] if target else []
  print("| network |" + "".join(f" {n} |" for n in names) + "\n|---|" + "--:|" * len(names))
  total = took = spent = 0.0
  for net in networks(args.seconds):
    work, cells, once = net.work(), "", net.name.startswith("CLIP, a caption")
    if args.times:
      seconds = net.seconds(1)
      took += 0 if once else seconds
      cells = f" {seconds:.3g} | {work / seconds / 1e9:.0f} |"
    if target and not once:
      share, compiled = reached(net, target, args.rows)
      spent += work / (share * target.chip.peak_flops)
      cells += f" {share:.1%} | {compiled / 1e12:.3f} |"
    total += 0 if once else work
    print(f"| {net.name} | {work / 1e12:.3f} |{cells}", flush=True)
  clips = ALL_OF_VGGSOUND
  print(
    f"\nA clip: {total / 1e12:.1f} TFLOP, all {clips:,} {clips * total:.3g} FLOP; with mirrored"
  )
  print(f"pictures (--mirror) all but twice that. At {args.share:.0%} of the peak (--share):\n")
  print("| chip | peak, TFLOP/s | clips/s and chip | chip hours |\n|---|--:|--:|--:|")
  rates = {name: CHIPS[name].peak_flops * args.share / total for name in SHOWN}
  for name, rate in rates.items():
    peak = CHIPS[name].peak_flops / 1e12
    print(f"| {name} | {peak:.0f} | {rate:.2f} | {clips / rate / 3600:.1f} |")
  if target:
    rates[f"{target.chip.name} as compiled"] = 1 / spent
    print(f"| {target.chip.name}, as compiled | | {1 / spent:.2f} | {clips * spent / 3600:.1f} |")
  if args.times:
    print(f"\nAll of it on such cores: {clips * took / 3600:,.0f} core hours")
  if args.videos:
    seconds = looking(args.videos, args.seconds)
    busy = ", ".join(f"{name} {rate * seconds:.1f}" for name, rate in rates.items())
    print(
      f"\ndecoding and resizing for the encoders: {seconds:.2f} s of a core per clip,"
      f" {clips * seconds / 3600:.0f} core hours; cores that keep one chip busy: {busy}"
    )


if __name__ == "__main__":
  main()
