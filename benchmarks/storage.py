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
import subprocess
import sys
import tempfile

from data import layout, shards

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
  listed = layout.read_manifest(out / "train" / "latents")[shards.SPLIT]
  return sum(x["bytes"] for x in listed) / sum(x["records"] for x in listed) / 1e3


def train(data: pathlib.Path, workdir: pathlib.Path, steps: int, seed: int) -> float:
  """Trains the network; returns its loss on the clips held out."""
  given = {
    "data.path": data / "train" / "latents", "data.eval": data / "heldout" / "latents",
    "steps": steps, "seed": seed, "listen.clips": 0,
  }  # fmt: skip
  flags = [f"--config.{name}={value}" for name, value in given.items()]
  run("launch.train", "--config", CONFIG, "--workdir", workdir, *flags)
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return next(row["eval/loss"] for row in reversed(list(rows)) if "eval/loss" in row)


def main() -> None:
  """Prints sizes and losses as they come."""
  parser = argparse.ArgumentParser(description="What features in fewer bits cost a model.")
  parser.add_argument("--demo", type=pathlib.Path, default=pathlib.Path("demo_out"), metavar="DIR")
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument("--seeds", type=int, default=2)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    for storage in STORAGES:
      print(f"{storage}: {encode(args.demo, work / storage, storage):.1f} kB a clip", flush=True)
    for seed, storage in itertools.product(range(args.seeds), STORAGES):
      loss = train(work / storage, work / f"{storage}{seed}", args.steps, seed)
      print(f"seed {seed}, {storage}: held-out loss {loss:.4f}", flush=True)


if __name__ == "__main__":
  main()
