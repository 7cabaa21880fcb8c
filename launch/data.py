"""`python -m launch.data COMMAND`: makes data sets.

`scenes` draws procedural clips (video, stereo sound, truth) from a seed; no download, no JAX.
`encode` makes training shards out of such a folder, or of one's own videos. `vggsound` filters
videos and places their sound at two ears. `sources` makes shards of mono sound and pictures, from
which the mono-to-binaural network's training mixes binaural pairs.
"""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Sequence

from data import scenes
from launch import audit, sources, vggsound
from spatialv2a_jax import errors, logbook, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.spatial import hrtf


def _size(text: str) -> tuple[int, int]:
  """Argparse type of --size."""
  match = re.fullmatch(r"(\d+)x(\d+)", text)
  if not match:
    raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 96x160")
  return int(match[1]), int(match[2])


def add_scenes(commands) -> None:
  """Adds the arguments of `scenes`."""
  p = commands.add_parser(
    "scenes",
    help="Make procedural clips: video, stereo sound, truth.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  p.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
  p.add_argument("--clips", required=True, type=int, metavar="N", help="number of clips")
  p.add_argument("--seconds", type=float, default=4.0, help="length of a clip")
  p.add_argument("--seed", type=int, default=0, help="of the collection")
  p.add_argument("--start", type=int, default=0, metavar="I", help="index of the first clip")
  p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
  p.add_argument("--hrtf", default="sphere", help="sphere or sofa:FILE")
  p.add_argument("--sample-rate", type=int, default=16_000, help="samples per second")
  p.add_argument("--size", type=_size, default="96x160", metavar="HxW", help="picture in pixels")
  p.add_argument("--mirror", action="store_true", help="make the mirrored clips, ids ending in _m")
  p.set_defaults(run=run_scenes)


def run_scenes(args: argparse.Namespace) -> int:
  """Makes the clips that are not there yet.

  Raises:
    UserError: an argument out of its range, or an output that cannot be written.
  """
  for flag, value, least in (("clips", args.clips, 1), ("jobs", args.jobs, 1)):
    if value < least:
      raise UserError(f"--{flag} {value}: give {least} or more")
  if not 0 <= args.seed < 2**32:
    raise UserError(f"--seed {args.seed}: give 0 to 2^32 - 1")
  if args.start < 0 or args.start + args.clips > 2**32:
    raise UserError(f"--start {args.start} --clips {args.clips}: indices go from 0 to 2^32 - 1")
  settings = scenes.Settings(
    seconds=args.seconds,
    sample_rate=args.sample_rate,
    size=args.size,
    hrtf=args.hrtf,
    mirror=args.mirror,
  )
  hrtf.load(args.hrtf, args.sample_rate)  # A bad file is refused before the workers start.
  wanted = range(args.start, args.start + args.clips)
  missing = [i for i in wanted if not scenes.is_complete(args.out, args.seed, i, settings)]
  with logbook.Progress(len(missing), "scenes", unit="clip") as progress:
    for _ in scenes.generate(args.out, args.seed, missing, settings, args.jobs):
      progress.advance()
  print(f"{args.out}: {len(missing)} clips made, {args.clips - len(missing)} were there")
  return 0


def add_encode(commands) -> None:
  """Adds the arguments of `encode`."""
  p = commands.add_parser(
    "encode",
    help="Make training shards of videos with stereo sound.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  source = p.add_mutually_exclusive_group(required=True)
  source.add_argument("--media", type=pathlib.Path, metavar="DIR", help="videos with their sound")
  source.add_argument("--raw", type=pathlib.Path, metavar="BUILD/raw", help="sound of a build")
  p.add_argument("--videos", type=pathlib.Path, metavar="DIR", help="of that build")
  p.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
  p.add_argument("--config", required=True, metavar="FILE", help="flow config to train on them")
  p.add_argument(
    "--parts", type=pathlib.Path, metavar="DIR", help="model folder of trained encoders, if any"
  )
  p.add_argument("--vae", type=pathlib.Path, metavar="DIR", help="model folder; adds latents")
  p.add_argument("--shards", type=int, default=8, metavar="N", help="with --media")
  p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
  p.add_argument(
    "--batch", type=int, default=8, metavar="N", help="clips that networks see at once"
  )
  p.add_argument(
    "--slice",
    type=vggsound.part,
    default="0/1",
    metavar="I/N",
    help="make only shards I, I + N, ..., of N machines that share the folder",
  )
  p.add_argument(
    "--storage", choices=schema.STORAGES, default="bfloat16", help="of what picture and words give"
  )
  p.add_argument("--mirror", action="store_true", help="add the features of mirrored videos")
  p.add_argument("--max-bad", type=float, default=0.01, help="share of bad clips to give up at")
  p.set_defaults(run=run_encode)


def run_encode(args: argparse.Namespace) -> int:
  """Makes the shards that are not there yet; errors as `encode.run`."""
  from launch import encode  # Imports JAX, which making scenes does without.

  for flag, value in (("shards", args.shards), ("jobs", args.jobs), ("batch", args.batch)):
    if value < 1:
      raise UserError(f"--{flag} {value}: give 1 or more")
  if not 0 <= args.max_bad <= 1:
    raise UserError(f"--max-bad {args.max_bad:g}: give a share from 0 to 1")
  if bool(args.raw) != bool(args.videos):
    raise UserError("--raw BUILD/raw and --videos DIR go together")
  return encode.run(args)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code."""
  parser = argparse.ArgumentParser(prog="python -m launch.data", allow_abbrev=False)
  commands = parser.add_subparsers(dest="command", required=True)
  add_scenes(commands)
  add_encode(commands)
  sources.add(commands)
  vggsound.add_arguments(commands)
  audit.add_arguments(commands)
  args = parser.parse_args(argv)
  try:
    return args.run(args)
  except UserError as error:
    print(f"launch.data {args.command}: {error}", file=sys.stderr)
    return error.exit_code
  except KeyboardInterrupt:
    print(f"launch.data {args.command}: interrupted", file=sys.stderr)
    return 130
  except (OSError, RuntimeError, MemoryError) as error:
    line = errors.one_line(error, "; try a smaller --batch or --jobs")
    if line is None:
      raise
    print(f"launch.data {args.command}: {line}", file=sys.stderr)
    return UserError.exit_code


if __name__ == "__main__":
  sys.exit(main())
