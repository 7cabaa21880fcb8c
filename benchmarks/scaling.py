"""What a run would reach on more chips, from the estimates of `launch.estimate --out`.

Run: python -m benchmarks.scaling FILE.json ... [--chips 8 64 ...] [--batch 512 4096 ...]

Arithmetic alone: the step of one chip is that of the file, whatever the number of chips, with as
many clips a chip. What chips exchange has the bytes of the file; between slices (256 chips of v5e
and v6e, 8,960 of v5p) and hosts of GPUs, the gradient is reduced once more by the network, to which
each chip brings its part. Two rates: everything exchanged while the chip computes, and nothing.
Clips are what a step has to have, and so the batch grows with the chips; beside each global batch
stands the number of chips that have the file's clips with it. More chips than that are idle or have
fewer clips, of which this says nothing.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch import hlo_cost, targets

REDUCED = ("all-reduce", "reduce-scatter")  # Under ZeRO-1, GPUs have the second of them.


def rates(report: Mapping[str, Any], chips: int) -> tuple[float, float, float]:
  """Returns clips/s with all collectives hidden and with none, and the milliseconds of these.

  Args:
    report: from `launch.estimate --out`, of one slice or host.
    chips: how many.
  """
  chip = targets.CHIPS[report["chip"]]
  near = min(chips, chip.near)
  found = [
    hlo_cost.Collective(kind, 0, c["count"], c["bytes"])
    for kind, c in report["collectives"].items()
  ]
  if chips > near:  # The sum of a slice goes out once, part by part.
    whole = [report["collectives"][kind] for kind in REDUCED if kind in report["collectives"]]
    count, size = (sum(one[name] for one in whole) for name in ("count", "bytes"))
    found.append(hlo_cost.Collective("all-reduce", 1, count, size // near))
  alone = hlo_cost.collective_seconds(found, chip.interconnect, chip.network) if chips > 1 else 0.0
  clips = report["batch_size"] / report["chips"] * chips
  return clips / report["seconds"], clips / (report["seconds"] + alone), 1e3 * alone


def table(report: Mapping[str, Any], chips: Sequence[int], batches: Sequence[int]) -> str:
  """Returns the rows of one estimate, in Markdown."""
  clips = report["batch_size"] // report["chips"]
  fits = ", ".join(f"{batch:,} on {max(batch // clips, 1):,}" for batch in batches)
  lines = [
    f"{report['chip']}, {clips} clips a chip, {1e3 * report['seconds']:.1f} ms a step "
    f"({report['seconds_from']}); global batch on chips: {fits}",
    "",
    "| chips | global batch | clips/s, all hidden | none hidden | collectives |",
    "|--:|--:|--:|--:|--:|",
  ]
  for count in chips:
    hidden, shown, alone = rates(report, count)
    lines.append(
      f"| {count:,} | {count * clips:,} | {hidden:,.0f} | {shown:,.0f} | {alone:.1f} ms |"
    )
  return "\n".join(lines)


def main() -> None:
  """Prints a table for each file."""
  parser = argparse.ArgumentParser(description="Rates on more chips, from estimates.")
  parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE.json")
  parser.add_argument("--chips", nargs="+", type=int, default=[8, 64, 256, 1024, 4096])
  parser.add_argument("--batch", nargs="+", type=int, default=[512, 4096, 16384])
  args = parser.parse_args()
  for path in args.files:
    report = json.loads(path.read_text())
    if "seconds" not in report or targets.parse(report["topology"]).parts > 1:
      parser.error(f"{path}: not a whole estimate of one slice or host")
    print(table(report, args.chips, args.batch), end="\n\n", flush=True)


if __name__ == "__main__":
  main()
