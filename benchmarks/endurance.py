"""What a run loses by being killed: no bit, and how much of its time.

Run: python -m benchmarks.endurance kills [--count 100] [--processes 1]
     python -m benchmarks.endurance goodput [--minutes 30] [--count 3] [--processes 1]

  kills    a small run (the toy problem of the tests) is killed by SIGKILL `count` times, each time
           after a random while since it was started: while it loads, restores, compiles, trains or
           saves. Of several processes one is killed, the others have to leave by themselves. Exits
           with 1 unless it ends with the bits of a run that nobody killed.
  goodput  `launch.local` trains `configs/tiny.py:smoke` for so long, is killed so often, and the
           ledger in `metrics.jsonl` says where the time went.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from launch import tasks
from spatialv2a_jax import logbook
from spatialv2a_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
STEPS, EVERY = 100, 5  # Of the small run, and between its saves.
LEAVE = 120.0  # Seconds that the others have to leave after one is gone.


def _start(workdir: pathlib.Path, processes: int) -> list[subprocess.Popen[bytes]]:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    coordinator = f"localhost:{probe.getsockname()[1]}"
  # Bits depend on the size of the thread pool.
  fixed = {"JAX_PLATFORMS": "cpu", "NPROC": "16", "JAX_NUM_CPU_DEVICES": str(2 // processes)}
  started = []
  for index in range(processes):
    options: dict[str, Any] = {"workdir": str(workdir), "steps": STEPS, "checkpoint": EVERY}
    options["shape"] = (2, 1, 1)
    if processes > 1:
      join = {"coordinator": coordinator, "count": processes, "index": index, "timeout": 20}
      options["join"] = join
    started.append(
      subprocess.Popen(
        [sys.executable, "-m", "tests.runner", json.dumps(options)],
        cwd=ROOT,
        env={**os.environ, **fixed},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
      )
    )
  return started


def _digest(workdir: pathlib.Path) -> str:
  """Returns a hash of parameters, averages, statistics and the logged curve."""
  digest = hashlib.sha256()
  for which in (None, 0):
    params, stats, _ = checkpoint.load_params(workdir, which)
    for x in jax.tree.leaves((params, stats)):
      digest.update(np.asarray(x).tobytes())
  curve = {x["step"]: x["loss"] for x in logbook.read_metrics(workdir) if "loss" in x}
  digest.update(json.dumps(sorted(curve.items())).encode())
  return digest.hexdigest()


def kills(count: int, processes: int) -> int:
  """Prints what a killed run ended with; returns the exit code."""
  with tempfile.TemporaryDirectory() as folder:
    whole, killed = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "killed"
    began = time.monotonic()
    for process in _start(whole, processes):
      if code := process.wait():
        raise SystemExit(f"a run that nobody killed left with {code}")
    lasts = time.monotonic() - began
    rng, done, codes = random.Random(0), 0, set()
    while done < count:
      group = _start(killed, processes)
      time.sleep(lasts * rng.random())
      victim = rng.choice(group)
      if any(process.poll() is not None for process in group):
        _leave(group)  # Done, which takes no kill: begin anew.
        if _digest(killed) != _digest(whole):
          break
        killed = pathlib.Path(folder) / f"killed{done}"
        continue
      victim.send_signal(signal.SIGKILL)
      codes |= {code for code in _leave(group) if code != -signal.SIGKILL}
      done += 1
      if done % 10 == 0:
        print(f"{done} kills, {time.monotonic() - began:.0f} s", flush=True)
    for process in _start(killed, processes):
      process.wait()
    same = _digest(killed) == _digest(whole)
    print(
      f"{done} kills of {processes} process(es) within {lasts:.0f} s of their start: "
      f"{'the bits of' if same else 'OTHER bits than'} a run that nobody killed, {STEPS} steps; "
      f"the others left with {sorted(codes) or 'nothing'}"
    )
    return 0 if same else 1


def _leave(group: list[subprocess.Popen[bytes]]) -> list[int]:
  """Waits for all to end; returns their codes."""
  codes = []
  for process in group:
    try:
      codes.append(process.wait(LEAVE))
    except subprocess.TimeoutExpired:
      process.kill()
      raise SystemExit(f"a process was still there {LEAVE:.0f} s after another was gone") from None
  return codes


def goodput(minutes: float, count: int, processes: int) -> int:
  """Prints the ledger of a run that is killed while it trains; returns the exit code."""
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / "run"
    values = {"data.path": tasks.SYNTHETIC, "data.eval": "", "steps": 10**9, "every.log": 20}
    values |= {"every.checkpoint": 400}
    command = ["launch.local", f"--processes={processes}", f"--restarts={count}", "--"]
    command += ["--config=configs/tiny.py:smoke", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in values.items()]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(folder) / "kept")}
    began = time.monotonic()
    with subprocess.Popen(
      [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    ) as launcher:
      rng = random.Random(0)
      for turn in range(count):  # One kill in each stretch.
        share = (turn + rng.uniform(0.3, 1.0)) / (count + 1)
        time.sleep(max(0.0, began + 60 * minutes * share - time.monotonic()))
        children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        os.kill(int(rng.choice(children.split())), signal.SIGKILL)
      time.sleep(max(0.0, began + 60 * minutes - time.monotonic()))
      launcher.send_signal(signal.SIGTERM)
      launcher.wait()
    lines = [x for x in logbook.read_metrics(workdir) if "goodput" in x]
    last = lines[-1]
    wall = last["goodput/wall_s"]
    phases = {
      name.removeprefix("goodput/").removesuffix("_s"): x
      for name, x in last.items()
      if name.startswith("goodput/") and name.endswith("_s") and name != "goodput/wall_s"
    }
    rest = abs(wall - sum(phases.values())) / wall
    print(
      f"{wall:.0f} s of {processes} process(es) in {last['goodput/attempts']:.0f} attempts, "
      f"{last['step']:,} steps: {100 * last['goodput']:.2f} % in steps; "
      + ", ".join(f"{name} {x:.1f} s" for name, x in phases.items())
      + f"; {100 * rest:.2f} % not accounted for"
    )
    return 0 if last["goodput/attempts"] == count + 1 else 1


def main() -> int:
  """Runs the one that is asked for."""
  parser = argparse.ArgumentParser(description="What a run loses by being killed.")
  parser.add_argument("row", choices=("kills", "goodput"))
  parser.add_argument("--count", type=int, help="of kills; 100 or 3")
  parser.add_argument("--minutes", type=float, default=30.0)
  parser.add_argument("--processes", type=int, default=1)
  args = parser.parse_args()
  if args.row == "kills":
    return kills(args.count or 100, args.processes)
  return goodput(args.minutes, args.count or 3, args.processes)


if __name__ == "__main__":
  sys.exit(main())
