"""Times the building of a data set: each stage of a build, and how two processes compare with one.

Run: python -m benchmarks.build [--videos DIR --seconds 10] [--clips 400] [--processes 1 2]
Without `--videos` it makes procedural scenes of 2 s first. The build is a real one, in a folder
that is thrown away; its stages are timed in processor seconds, so other work on the machine hardly
counts. The processes are compared by the clock: all start at once, each with the same clips,
decoding first (frames and sound) and then rendering a moving source; one process and several in
turn, round after round, so that a drift of the machine meets all alike. What the frozen encoders
of `--features` cost on top is counted by `benchmarks.encoding`.
"""

import argparse
import json
import multiprocessing
import multiprocessing.synchronize
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import threadpoolctl

from data import catalogue, funnel, spatialise
from launch import data as command
from spatialv2a_jax import io, localizers, schema

RATE = 16_000
PARTS = ("decoding", "rendering")
DECODED, RENDERED = 100, 300  # Clips that a process takes in a turn, which takes seconds.
CORES = 32  # For which hours are estimated.


def decode(paths: list[str], seconds: float) -> None:
  """Reads of each clip what a build reads."""
  view = {"view": io.View(schema.SYNC_FPS, localizers.FRAME_SIZE, quick=True)}
  for path in paths:
    io.read_views(path, view, duration=seconds, threads=1)
    io.read_audio(path, RATE, duration=seconds)


def render(count: int, seconds: float) -> None:
  """Places noise along a moving track, as often as there are clips."""
  place = spatialise.Placer("sphere", RATE)
  noise_ep = np.random.default_rng(0).standard_normal((1, round(seconds * RATE)), np.float32)
  track = 50 * np.sin(np.arange(round(seconds * schema.CLIP_FPS)) / 5)
  for _ in range(count):
    place(noise_ep, "mono", track)


def work(
  number: int,
  paths: list[str],
  seconds: float,
  schedule: Sequence[int],
  gate: multiprocessing.synchronize.Barrier,
) -> None:
  """One process: takes part in each turn of the schedule that has more processes than `number`."""
  with threadpoolctl.threadpool_limits(1):
    decode(paths[:1], seconds)
    render(1, seconds)
    for count in schedule:
      for part in PARTS:
        gate.wait()
        if number < count and part == "decoding":
          decode(paths, seconds)
        elif number < count:
          render(RENDERED, seconds)
        gate.wait()


def clock(paths: list[str], seconds: float, schedule: Sequence[int]) -> list[dict[str, float]]:
  """Returns clips per second of each part, for each turn with so many processes."""
  context = multiprocessing.get_context("spawn")
  gate = context.Barrier(max(schedule) + 1)
  workers = [
    context.Process(target=work, args=(i, paths, seconds, schedule, gate), daemon=True)
    for i in range(max(schedule))
  ]
  for worker in workers:
    worker.start()
  turns = []
  for count in schedule:
    rates = {}
    for part in PARTS:
      gate.wait()
      began = time.perf_counter()
      gate.wait()
      done = count * (len(paths) if part == "decoding" else RENDERED)
      rates[part] = done / (time.perf_counter() - began)
    turns.append(rates)
  for worker in workers:
    worker.join()
  return turns


def stages(videos: pathlib.Path, seconds: float, folder: pathlib.Path, jobs: int) -> None:
  """Builds, and prints what each stage takes."""
  arguments = ["--videos", videos, "--out", folder, "--seconds", seconds, "--jobs", jobs]
  began = time.perf_counter()
  code = command.main(["vggsound", "--stereo", "render", "--silence", "1", *map(str, arguments)])
  wall = time.perf_counter() - began
  found = json.loads((folder / "throughput.json").read_text())
  clips = max(row["clips"] for row in found["stages"].values())
  print(f"\nbuild: {clips} clips in {wall:.0f} s with {jobs} processes, exit code {code}\n")
  print("| stage | clips | ms per clip | clips per second and core |\n|---|--:|--:|--:|")
  for stage, row in found["stages"].items():
    rate = row["clips_per_core_second"]
    if rate:
      print(f"| {stage} | {row['clips']} | {1e3 / rate:.1f} | {rate:.3g} |")
  rate = found["clips_per_core_second"]
  hours = found["core_hours_for_199000_clips"]
  print(
    f"| all | {clips} | {1e3 / rate:.1f} | {rate:.3g} |\n\nbottleneck: {found['bottleneck']};"
    f" {funnel.ALL_OF_VGGSOUND:,} such clips: {hours:.1f} core hours, {hours / CORES:.2f} h on"
    f" {CORES} cores"
  )


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description="Times the building of a data set.")
  parser.add_argument("--videos", type=pathlib.Path, help="folder of clips")
  parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip")
  parser.add_argument("--clips", type=int, default=400, help="scenes to make")
  parser.add_argument("--rounds", type=int, default=5, help="of comparing processes")
  parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
  args = parser.parse_args()
  jobs = max(args.processes)
  print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    videos = args.videos or folder / "scenes"
    if args.videos is None:
      given = ["--out", videos, "--clips", args.clips, "--seconds", args.seconds, "--jobs", jobs]
      command.main(["scenes", *map(str, given)])
    stages(videos, args.seconds, folder / "build", jobs)
    known = catalogue.read(videos, None).clips
    dropped = json.loads((folder / "build" / "funnel.json").read_text())["clips"]
    paths = [clip.path for clip in known if clip.id not in dropped][:DECODED]
    turns = iter(clock(paths, args.seconds, args.processes * args.rounds))
    rounds = [{count: next(turns) for count in args.processes} for _ in range(args.rounds)]
  head, rule = "".join(f" {part} |" for part in PARTS), "--:|" * len(PARTS)
  print(f"\nclips per second, median of {args.rounds} rounds (ratio to the first: median, best)\n")
  print(f"| processes |{head}\n|---|{rule}")
  for count in args.processes:
    cells = ""
    for part in PARTS:
      ratios = [one[count][part] / one[args.processes[0]][part] for one in rounds]
      rate = statistics.median(one[count][part] for one in rounds)
      cells += f" {rate:.3g} ({statistics.median(ratios):.2f}x, {max(ratios):.2f}x) |"
    print(f"| {count} |{cells}")


if __name__ == "__main__":
  main()
