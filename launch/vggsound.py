"""What `python -m launch.data vggsound` does: a folder of videos to shards of binaural sound.

On many machines that share a folder, as an array of batch jobs:

    srun python -m launch.data vggsound ... --slice $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

and once more without `--slice` when all have ended: it finds all slices done, counts and describes.
With `--features` the array is started again for the features, and for latents a third time; each
time it does what can be done, until it says that nothing is left.
Whatever was interrupted is made good by the same command; what is done is not done again.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from data import catalogue, filters, funnel, quality, shards, stages
from launch import audit
from spatialv2a_jax import io, logbook, schema
from spatialv2a_jax.errors import MissingAssetError, UserError

_NAMED = 20  # Dropped clips that are printed; all are in funnel.json.


def add_arguments(commands) -> None:
  """Adds the arguments of `vggsound`."""
  p = commands.add_parser(
    "vggsound",
    help="Make shards of binaural sound of a folder of videos.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  p.add_argument("--videos", required=True, type=pathlib.Path, metavar="DIR", help="at any depth")
  p.add_argument(
    "--labels", type=pathlib.Path, metavar="FILE",
    help="CSV or TSV with id, label, split, or VGGSound's own; without it, all videos",
  )  # fmt: skip
  p.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
  variant = p.add_mutually_exclusive_group()
  variant.add_argument("--raw", action="store_true", help="sound only: the default")
  variant.add_argument(
    "--features", action="store_true", help="then encode it, as the command encode does"
  )
  p.add_argument("--config", metavar="FILE", help="with --features: flow config to train on them")
  p.add_argument("--vae", type=pathlib.Path, metavar="DIR", help="with --features: adds latents")
  p.add_argument(
    "--parts",
    type=pathlib.Path,
    metavar="DIR",
    help="model folder of trained networks: the encoders of --features, and what acl takes",
  )
  p.add_argument("--mirror", action="store_true", help="with --features: also mirrored videos")
  p.add_argument(
    "--storage", choices=schema.STORAGES, help="with --features: of theirs; bfloat16 if not given"
  )
  p.add_argument(
    "--localizer",
    default="motion",
    metavar="NAME",
    help="where pictures sound: motion, track:FILE, or acl, prompted with the labels",
  )
  p.add_argument(
    "--spatializer",
    default="sphere",
    metavar="NAME",
    help="sphere, sofa:FILE, paper or network:DIR",
  )  # fmt: skip
  p.add_argument(
    "--stereo", choices=("keep", "render"), default="keep", help="what to do with true stereo"
  )
  p.add_argument("--audio", choices=sorted(schema.AUDIO), default="16k", help="rate of the sound")
  p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
  p.add_argument(
    "--slice", type=part, default="0/1", metavar="I/N", help="make only slices I, I + N, ..."
  )
  p.add_argument("--beam", metavar="RUNNER", help="run as a Beam pipeline, such as DirectRunner")
  p.add_argument("--beam-option", action="append", default=[], metavar="KEY=VALUE")
  p.add_argument(
    "--clips-per-shard",
    type=int,
    metavar="N",
    help=f"{catalogue.CLIPS_PER_SHARD}, or fewer if that makes less than"
    f" {catalogue.LEAST_SHARDS} shards for the worker processes to share",
  )
  p.add_argument(
    "--audit", action="store_true", help="audit the build at the end, as the command audit does"
  )
  p.add_argument("--max-failures", type=float, default=0.01, help="share of unreadable clips")
  limits = filters.Limits()
  p.add_argument("--seconds", type=float, default=limits.seconds, help="length of a clip")
  p.add_argument("--tolerance", type=float, default=limits.tolerance_s, help="seconds short of it")
  p.add_argument("--silence", type=float, default=limits.silence, help="share that drops a clip")
  p.add_argument(
    "--quality-scores", type=pathlib.Path, metavar="FILE",
    help="CSV with id, CE, CU, PC, PQ of Audiobox Aesthetics",
  )  # fmt: skip
  p.add_argument(
    "--quality-weights", type=pathlib.Path, metavar="FILE",
    help="its checkpoint.pt, to score the clips here",
  )  # fmt: skip
  p.add_argument(
    "--least-quality", type=_pairs, metavar="CE=X,CU=Y,PQ=Z",
    help="scores below drop a clip, "
    + ",".join(f"{axis}={least:g}" for axis, least in limits.quality) + " if not given",
  )  # fmt: skip
  p.add_argument(
    "--tags", type=pathlib.Path, metavar="FILE", help="CSV with id and a column per tag"
  )
  p.add_argument(
    "--most-tag", type=_pairs, default=(), metavar="speech=X,music=Y",
    help="tags above drop a clip",
  )  # fmt: skip
  p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
  """Builds what is not there yet.

  Returns 0 if all is well, 1 if too many clips could not be read or the audit fails.

  Raises:
    UserError: bad arguments, list or folder, or no clip that could be used.
    MissingAssetError: weights or a package are not there.
  """
  settings, judge = _settings(args), None
  if args.features:
    _check_encoding(args)
  if args.quality_weights:
    judge = quality.Aesthetics(args.quality_weights)
  runner = _beam(args)
  config = {**settings.config(), "judge": judge.identity if judge else None}
  known = catalogue.read(args.videos, args.labels)
  if known.broken:
    print(f"{len(known.broken)} links lead nowhere, the first is {known.broken[0]}: passed over")
  ids = {clip.id for clip in known.clips}
  asked = [axis for axis, _ in args.least_quality or () if judge is None]
  scores = catalogue.read_table(args.quality_scores, "--quality-scores", ids, asked)
  if args.quality_scores and not set(filters.AXES) & set().union(*scores.values()):
    raise UserError(
      f"--quality-scores {args.quality_scores}: no column of {', '.join(filters.AXES)}"
    )
  asked = [name for name, _ in args.most_tag]
  tags = catalogue.read_table(args.tags, "--tags", ids, asked)
  io.check_writable(args.out)
  if not scores and judge is None:
    print("quality filter: off, scores are NaN (give --quality-scores or --quality-weights)")
  counts = known.shards(args.clips_per_shard)
  work = stages.items(known, counts, scores, tags)
  whole = args.slice == (0, 1)
  cut = {"shards": counts, "config": config, "name": stages.NAME}
  jobs = shards.plan(work, args.out / "raw", **cut)
  mine = jobs[args.slice[0] :: args.slice[1]]
  kept = sum(shards.finished(job) is not None for job in mine)
  if old := sum(shards.sidecar(job.path).is_file() for job in mine) - kept:
    print(f"{old} shards are of other settings or files, and are made anew")
  with logbook.Progress(len(mine), "slices", unit="slice", start=kept) as progress:
    try:
      stats = shards.build(
        work,
        stages.Slice(args.out / "slices", settings, judge),
        args.out / "raw",
        **cut,
        batched=True,
        description="Videos with sound at two ears, by their pictures (arXiv 2601.15017).",
        jobs=args.jobs,
        part=args.slice,
        max_bad=1.0,  # Dropping is the work of this command; failures are capped below.
        unknown=stages.UNKNOWN,
        progress=lambda done, *_: progress.advance() if done > kept else None,
        runner=runner,
      )
    finally:
      found = funnel.write(args.out, known, jobs, whole)
      _print(found, args.out)
  if whole and stats["complete"]:
    funnel.tidy(args.out, work)
  print(funnel.speed(args.out))
  state = "complete" if stats["complete"] else "not complete: run the other slices"
  if stats["complete"] and args.audit and not whole:
    state += "; run once more without --slice to audit"
  print(f"{args.out / 'raw'}: {found['kept']} clips in {sum(counts.values())} shards, {state}")
  limit = max(shards.MIN_BAD, int(args.max_failures * len(known.clips)))
  if found["failures"] > limit:
    print(
      f"launch.data vggsound: {found['failures']} clips could not be read, more than {limit}"
      " (--max-failures); see funnel.json",
      file=sys.stderr,
    )
    return 1
  if not stats["complete"]:
    return 0
  code = _encode(args) if args.features else 0
  return code or (_audit(args) if args.audit and whole else 0)


def _print(found: Mapping[str, Any], out: pathlib.Path) -> None:
  print(funnel.table(found))
  named = [f"{name}: {drop['reason']}, {drop['detail']}" for name, drop in found["clips"].items()]
  print("\n".join(named[:_NAMED]))
  if len(named) > _NAMED:
    print(f"... and {len(named) - _NAMED} more in {out / 'funnel.json'}")


def _encode(args: argparse.Namespace) -> int:
  from launch import encode  # Imports JAX, which all before does without.

  given = {
    "raw": args.out / "raw",
    "videos": args.videos,
    "out": args.out,
    "storage": args.storage or "bfloat16",
    "batch": 8,
  }
  return encode.run(argparse.Namespace(**{**vars(args), **given}, max_bad=args.max_failures))


def _check_encoding(args: argparse.Namespace) -> None:
  """Raises what `_encode` would raise after hours of building."""
  from launch import encode

  config, encoders = encode.read_config(args.config)
  if config["audio"] != args.audio:
    raise UserError(f"--audio {args.audio}: give {config['audio']}, as --config {args.config} does")
  if config["seconds"] > args.seconds:
    raise UserError(
      f"--seconds {args.seconds:g}: give {config['seconds']:g} or more, as --config {args.config}"
    )
  if args.parts or args.vae or encoders.encoder != "random":
    # Elsewhere, since here JAX would keep the accelerators from the workers.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
      process.submit(encode.check, args.config, args.parts, args.vae).result()


def _audit(args: argparse.Namespace) -> int:
  command = argparse.ArgumentParser()
  audit.add_arguments(command.add_subparsers())
  return audit.run(command.parse_args(["audit", str(args.out), "--videos", str(args.videos)]))


def _settings(args: argparse.Namespace) -> stages.Settings:
  for flag in ("jobs", "clips_per_shard"):
    if getattr(args, flag) is not None and getattr(args, flag) < 1:
      raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give 1 or more")
  if not 1 <= args.seconds <= 600 or not 0 <= args.tolerance < args.seconds:
    raise UserError(f"--seconds {args.seconds:g} --tolerance {args.tolerance:g}: give 1 to 600 s")
  if not 0 < args.silence <= 1:
    raise UserError(f"--silence {args.silence:g}: give a share above 0, up to 1")
  if not 0 <= args.max_failures <= 1:  # It is first needed when all is built.
    raise UserError(f"--max-failures {args.max_failures:g}: give a share from 0 to 1")
  least = args.least_quality or filters.Limits.quality
  unknown = [axis for axis, _ in least if axis not in filters.AXES]
  if args.least_quality and not (args.quality_scores or args.quality_weights):
    raise UserError("--least-quality needs --quality-scores or --quality-weights")
  if unknown:
    raise UserError(f"--least-quality: no axis {unknown[0]!r}, have {', '.join(filters.AXES)}")
  if args.features != bool(args.config):
    raise UserError("--features and --config FILE go together")
  if (args.vae or args.mirror or args.storage) and not args.features:
    raise UserError("--vae, --mirror and --storage need --features")
  if args.parts and not args.features and args.localizer != "acl":
    raise UserError("--parts needs --features or --localizer acl")
  if args.most_tag and not args.tags:
    raise UserError("--most-tag needs --tags FILE")
  return stages.Settings(
    filters.Limits(args.seconds, args.tolerance, args.silence, tuple(least), tuple(args.most_tag)),
    args.audio,
    args.localizer,
    str(args.parts or "") if args.localizer == "acl" else "",
    args.spatializer,
    args.stereo == "keep",
  )


def _beam(args: argparse.Namespace) -> shards.Runner | None:
  if args.beam is None:
    if args.beam_option:
      raise UserError("--beam-option needs --beam RUNNER")
    return None
  try:
    from data import beam
  except ImportError as error:
    raise MissingAssetError(
      f"--beam needs Apache Beam ({error}); pip install -e '.[beam]'"
    ) from None
  return beam.runner(args.beam, args.beam_option)


def part(text: str) -> tuple[int, int]:
  """Argparse type of --slice: I/N as (I, N)."""
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if not match or not int(match[1]) < int(match[2]):
    raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
  return int(match[1]), int(match[2])


def _pairs(text: str) -> tuple[tuple[str, float], ...]:
  try:
    pairs = [part.split("=") for part in text.split(",")]
    return tuple((name.strip(), float(value)) for name, value in pairs)
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER,NAME=NUMBER") from None
