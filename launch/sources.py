"""What `python -m launch.data sources` does: videos to shards that pairs are mixed from."""

import argparse
import collections
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from data import sources
from spatialv2a_jax.errors import UserError


def add(commands) -> None:
  """Adds the arguments of `sources`."""
  p = commands.add_parser(
    "sources",
    help="Make shards of mono sound and pictures for the mono-to-binaural network.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  p.add_argument("--media", required=True, type=pathlib.Path, metavar="DIR", help="the videos")
  p.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
  p.add_argument("--seconds", type=float, default=4.0, help="length of a clip")
  p.add_argument("--rows", type=int, default=96, help="of a picture, as in the config")
  p.add_argument("--columns", type=int, default=160, help="of a picture, as in the config")
  p.add_argument("--shards", type=int, default=8, metavar="N", help="number of shards")
  p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
  p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
  """Makes the shards that are not there yet; says how many clips were left out, and why.

  Raises:
    UserError: an argument out of its range, a bad folder, or no clip of any use.
  """
  for flag, value in (("shards", args.shards), ("jobs", args.jobs)):
    if value < 1:
      raise UserError(f"--{flag} {value}: give 1 or more")
  if min(args.rows, args.columns) < 32 or args.rows % 32 or args.columns % 32:
    raise UserError(f"--rows {args.rows} --columns {args.columns}: give multiples of 32")
  if not 0.64 <= args.seconds <= 3600:
    raise UserError(f"--seconds {args.seconds:g}: give 0.64 to 3600")
  settings = sources.Settings(args.seconds, args.rows, args.columns)
  stats = sources.build(
    args.media,
    args.out,
    settings,
    shards=args.shards,
    jobs=args.jobs,
    progress=lambda done, total, bad: print(f"shard {done}/{total}, {bad} left out", flush=True),
  )
  tell(args.out, stats)
  return 0


def tell(folder: pathlib.Path, stats: Mapping[str, Any]) -> None:
  """Prints what became of the clips of `shards.build`; its stats.json names all left out."""
  left = "" if stats["complete"] else "; not complete: run the other slices, then this one again"
  print(f"{folder}: {stats['clips_out']} of {stats['clips_in']} clips{left}")
  first = {why: name for name, why in reversed(stats["bad"].items())}
  for reason, count in collections.Counter(stats["bad"].values()).most_common(5):
    print(f"  left out {count}, such as {first[reason]}: {reason}")


def check_size(folder: pathlib.Path, rows: int, columns: int) -> None:
  """Refuses shards whose pictures are not of the size that a config says.

  Raises:
    UserError: they are not, or the folder holds other shards.
  """
  try:
    config = json.loads((folder / "manifest.json").read_text())["config"]
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{folder}: no finished shards ({error}); build them first") from error
  if config.get("stage") != "sources":
    raise UserError(f"{folder} holds no sources; make them with `python -m launch.data sources`")
  have = config["rows"], config["columns"]
  if have != (rows, columns):
    raise UserError(
      f"{folder} has pictures of {have[0]} x {have[1]}, the config of {rows} x {columns}"
    )
