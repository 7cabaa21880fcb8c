"""Does the mono-to-binaural network beat dual mono on scenes it never saw?

Run: python -m benchmarks.mono2binaural --out DIR [--scenes DIR --heldout DIR] [--steps N]
Makes 464 scenes (unless given), mixes pairs of the training scenes, trains the variant `tiny`,
places the mono sound of the held-out scenes, scores it and prints the table of `spatialv2a
evaluate` and whether it beats dual mono. What is there already is not made again.
"""

import argparse
import json
import os
import pathlib
import sys

from launch.demo import HELDOUT_SEED, SECONDS, TRAIN_SEED, Stages

TRAIN, HELDOUT = 400, 64
LEAST_AGREEMENT = 0.85


def main() -> int:
  """Runs all stages; returns 0 if the network beats dual mono and finds the side, else 1."""
  parser = argparse.ArgumentParser(allow_abbrev=False)
  parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
  parser.add_argument("--scenes", type=pathlib.Path, metavar="DIR", help="to train on")
  parser.add_argument("--heldout", type=pathlib.Path, metavar="DIR", help="with truth, to score")
  parser.add_argument("--steps", type=int, help="of training; unset: the config's")
  args = parser.parse_args()
  out, jobs, stages = args.out, os.cpu_count() or 1, Stages()
  scenes, heldout = args.scenes or out / "train", args.heldout or out / "heldout"
  for folder, clips, seed, given in (
    (scenes, TRAIN, TRAIN_SEED, args.scenes),
    (heldout, HELDOUT, HELDOUT_SEED, args.heldout),
  ):
    if given is None:
      what = [f"--out={folder}", f"--clips={clips}", f"--seconds={SECONDS}", f"--seed={seed}"]
      stages.run(f"scenes {seed}", "launch.data", "scenes", *what)
  stages.run(
    "sources", "launch.data", "sources", f"--media={scenes}", f"--out={out / 'sources'}",
    f"--seconds={SECONDS}", f"--jobs={jobs}",
  )  # fmt: skip
  extra = [f"--config.steps={args.steps}"] if args.steps else []
  stages.run(
    "training", "launch.train", "--config=configs/mono2binaural.py:tiny",
    f"--workdir={out / 'run'}", f"--config.data.path={out / 'sources'}", *extra,
  )  # fmt: skip
  stages.run(
    "placing", "spatialv2a_jax.cli", "spatialize", *sorted(heldout.glob("*.mp4")),
    f"--checkpoint={out / 'run'}", f"--out={out / 'placed'}",
  )  # fmt: skip
  stages.run(
    "scores", "spatialv2a_jax.cli", "evaluate", f"--pred={out / 'placed'}", f"--ref={heldout}",
    f"--truth={heldout}", f"--out={out / 'scores.json'}", f"--jobs={jobs}",
  )  # fmt: skip
  scores = json.loads((out / "scores.json").read_text())
  mono = scores["baselines"]["dual_mono"]
  print(f"\n{stages}")
  held = True
  for name, bar in (("stft_distance", mono["stft_distance"]["value"]), ("sign_agreement", None)):
    value, low_high = (scores["metrics"][name][key] for key in ("value", "ci95"))
    good = value >= LEAST_AGREEMENT if bar is None else value < bar
    limit = f"at least {LEAST_AGREEMENT}" if bar is None else f"below {bar:.4f} of dual mono"
    low, high = ("-" if x is None else f"{x:.4f}" for x in low_high)  # Too few clips have none.
    print(f"{name} {value:.4f} ({low} .. {high}), wanted: {limit}: {good}")
    held &= good
  return 0 if held else 1


if __name__ == "__main__":
  sys.exit(main())
