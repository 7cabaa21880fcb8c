"""What storing features in fewer bits costs a model: trains one on each, side by side.

Run: python -m benchmarks.storage --demo demo_out [--steps 1000] [--seeds 2]
`make demo` leaves the scenes and the VAE in that folder. Their features are encoded anew with each
storage, and the network of `configs/tiny.py` is trained on each with each seed: what another seed
changes is what a difference of the storages is to be seen against. The loss is that of clips which
no training saw.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from data import layout

STORAGES = ("bfloat16", "mxint8")
CONFIG = "configs/tiny.py"


def run(module: str, *words: object) -> None:
  """Runs a command of this project, whose output is shown if it fails."""
  command = [sys.executable, "-m", module, *map(str, words)]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def encode(demo: pathlib.Path, out: pathlib.Path, storage: str) -> float:
  """Makes the shards of the demo's scenes; returns the kilobytes of a clip in those to train on."""
  for name, extra in (("train", ("--mirror",)), ("heldout", ())):
    run(
      "launch.data", "encode", "--config", CONFIG, "--media", demo / "scenes" / name, "--storage",
      storage, "--vae", demo / "runs" / "vae" / "model", "--out", out / name, *extra,
    )  # fmt: skip
  shards = layout.read_manifest(out / "train" / "latents")["train"]
  return sum(x["bytes"] for x in shards) / sum(x["records"] for x in shards) / 1e3


def train(shards: pathlib.Path, workdir: pathlib.Path, steps: int, seed: int) -> float:
  """Trains the network; returns its loss on the clips held out."""
  given = {
    "data.path": shards / "train" / "latents", "data.eval": shards / "heldout" / "latents",
    "steps": steps, "seed": seed, "listen.clips": 0,
  }  # fmt: skip
  flags = [f"--config.{name}={value}" for name, value in given.items()]
  run("launch.train", "--config", CONFIG, "--workdir", workdir, *flags)
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return next(row["eval/loss"] for row in reversed(list(rows)) if "eval/loss" in row)


def main() -> None:
  """Prints a row per storage."""
  parser = argparse.ArgumentParser(description="What features in fewer bits cost a model.")
  parser.add_argument("--demo", type=pathlib.Path, default=pathlib.Path("demo_out"), metavar="DIR")
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument("--seeds", type=int, default=2)
  args = parser.parse_args()
  losses: dict[str, list[float]] = {storage: [] for storage in STORAGES}
  with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    size = {storage: encode(args.demo, work / storage, storage) for storage in STORAGES}
    for seed, storage in itertools.product(range(args.seeds), STORAGES):
      losses[storage].append(train(work / storage, work / f"{storage}{seed}", args.steps, seed))
      print(f"seed {seed}, {storage}: held-out loss {losses[storage][-1]:.4f}", flush=True)
  for storage in STORAGES:
    print(
      f"{storage}: {size[storage]:.1f} kB a clip, loss {statistics.fmean(losses[storage]):.4f}"
      f" on average of {args.seeds} seeds"
    )
  changes = [b / a - 1 for a, b in zip(*losses.values(), strict=True)]
  print(f"relative change with the same seed: {', '.join(f'{100 * x:+.2f} %' for x in changes)}")
  if args.seeds > 1:
    spread = [max(values) / min(values) - 1 for values in losses.values()]
    print(f"between seeds: {', '.join(f'{100 * x:.2f} %' for x in spread)}")


if __name__ == "__main__":
  main()
