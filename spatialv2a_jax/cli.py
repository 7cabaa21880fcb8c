"""The `spatialv2a` command: parsing and nothing else.

Exit codes: 0 ok, 1 a check failed, 2 bad input, 3 missing asset, 4 some files failed.
"""

import argparse
import dataclasses
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import spatialv2a_jax
from spatialv2a_jax import errors
from spatialv2a_jax.errors import UserError

SOLVERS = ("euler", "ab2", "midpoint", "rk4")  # Those of `flow`, which is slow to import.

MEMORY = {"generate": "; try --low-memory, --dtype bfloat16 or a shorter --duration"}


class Parser(argparse.ArgumentParser):
  """A parser whose complaints are one line and an exception."""

  def error(self, message: str) -> NoReturn:
    """Raises UserError."""
    raise UserError(f"{message}; see {self.prog} --help")


def number(
  kind: Callable[[str], float], least: float, most: float = math.inf, *, above: bool = False
) -> Callable[[str], float]:
  """Returns an argparse type that accepts finite numbers from `least` (or `above` it) to `most`."""

  def parse(text):
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not (least <= value <= most and value < math.inf and not (above and value == least)):
      what = "a whole number" if kind is int else "a number"
      top = "" if most == math.inf else f" and at most {most}"
      bound = f"above {least}" if above else f"of at least {least}"
      raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound}{top}")
    return value

  return parse


def localizer(text: str) -> str:
  """Argparse type of --localizer."""
  if text not in ("acl", "motion") and not text.startswith(("acl:", "track:")):
    raise argparse.ArgumentTypeError(f"{text!r} is none of: acl, acl:FILE, motion, track:FILE")
  return text


def hrtf(text: str) -> str:
  """Argparse type of --hrtf."""
  if text != "sphere" and not text.startswith("sofa:"):
    raise argparse.ArgumentTypeError(f"{text!r} is none of: sphere, sofa:FILE")
  return text


def add_video_sound(p: argparse.ArgumentParser) -> None:
  """Adds --video-sound."""
  p.add_argument(
    "--video-sound",
    choices=("aac", "flac", "alac"),
    default="aac",
    help="how the mp4 stores its sound: aac (320 kb/s) plays everywhere; flac (browsers, VLC) and "
    "alac (Apple's players) are lossless, as the file beside it is anyway",
  )


def parser() -> argparse.ArgumentParser:
  """Returns the parser of all commands."""
  main = Parser(
    prog="spatialv2a", description="Silent video in, binaural sound out.", allow_abbrev=False
  )
  main.add_argument("--version", action="version", version=spatialv2a_jax.__version__)
  commands = main.add_subparsers(dest="command", required=True)

  def command(name, help):
    return commands.add_parser(
      name,
      help=help,
      description=help,
      allow_abbrev=False,
      formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

  p = command("doctor", "Check this machine: versions, devices, codecs, cache, disk.")
  p.add_argument(
    "--memory",
    action="store_true",
    help="compile every full-size network for this machine and print what it takes of memory",
  )
  p.set_defaults(run=run_doctor)

  p = command("generate", "Generate binaural sound for video files or folders of them.")
  p.add_argument("inputs", nargs="+", metavar="VIDEO|DIR")
  p.add_argument(
    "--checkpoint",
    required=True,
    metavar="DIR",
    help="model folder: of a training run, or one into which `spatialv2a convert` has put "
    "mmaudio, vae, bigvgan (or bigvgan_v2), clip, synchformer and, for two ears, clipseg",
  )
  p.add_argument(
    "--parts",
    metavar="DIR",
    help="model folder with the networks that the checkpoint lacks, so that several share them",
  )
  p.add_argument("--out", required=True, metavar="DIR")
  p.add_argument("--prompt", default="", help="what sounds; empty leaves it to the picture")
  p.add_argument("--negative", default="", help="what should not sound")
  p.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
  p.add_argument("--steps", type=number(int, 1), default=25, help="steps of the solver")
  p.add_argument(
    "--solver",
    dest="method",
    choices=SOLVERS,
    default="euler",
    help="euler and ab2 evaluate the network once a step, midpoint twice, rk4 four times; "
    "12 steps of ab2 come as close to the exact solution as 25 of euler",
  )
  p.add_argument(
    "--guidance",
    type=number(float, 0),
    help="strength of all conditions; 1 adds none; unset: the checkpoint's, 4.5 for MMAudio's",
  )
  p.add_argument(
    "--spatial-guidance",
    type=number(float, 0),
    help="strength of the spatial condition; unset: as --guidance",
  )
  p.add_argument(
    "--localizer",
    type=localizer,
    help="what tells where it sounds: acl (CLIPSeg looks for the prompt, or without one for what "
    "the picture shows), acl:FILE (for what is heard in a file), motion or track:FILE; unset: the "
    "checkpoint's",
  )
  p.add_argument("--phase", choices=("shared", "independent"), default="shared")
  p.add_argument(
    "--duration", type=number(float, 0, above=True), help="seconds at most; unset: all"
  )
  p.add_argument("--format", choices=("wav", "flac"), default="wav")
  p.add_argument("--no-video", dest="video", action="store_false", help="write sound only")
  add_video_sound(p)
  p.add_argument(
    "--dtype", choices=("float32", "bfloat16"), help="of the matmuls; unset: the checkpoint's"
  )
  p.add_argument(
    "--low-memory",
    action="store_true",
    help="one network in memory and one window at a time",
  )
  p.add_argument(
    "--feature-cache",
    metavar="DIR",
    help="where features of trained encoders are kept, about 1 MB for 8 s and up to 20 GB, "
    "the oldest making room; none: nowhere; unset: "
    "SPATIALV2A_FEATURE_CACHE or ~/.cache/spatialv2a_jax/features",
  )
  p.set_defaults(run=run_generate)

  p = command("spatialize", "Place the sound of a file along a track, or along its own picture.")
  p.add_argument("inputs", nargs="+", metavar="AUDIO|VIDEO")
  p.add_argument("--out", required=True, metavar="DIR")
  p.add_argument("--track", metavar="FILE", help="CSV or JSON with time_s and azimuth_deg")
  p.add_argument("--hrtf", type=hrtf, help="sphere or sofa:FILE; unset: sphere")
  p.add_argument(
    "--checkpoint", metavar="DIR", help="mono-to-binaural network, instead of a track and a head"
  )
  p.add_argument("--format", choices=("wav", "flac"), default="wav")
  add_video_sound(p)
  p.set_defaults(run=run_spatialize)

  p = command("evaluate", "Score binaural sound against references and visible truth.")
  p.add_argument("--pred", required=True, metavar="DIR")
  p.add_argument("--ref", required=True, metavar="DIR")
  p.add_argument("--truth", metavar="DIR", help="folder of scene truth, <stem>.json")
  p.add_argument(
    "--baseline",
    action="append",
    default=[],
    metavar="NAME=DIR",
    help="score another folder beside it; may be repeated",
  )
  p.add_argument(
    "--embedding",
    action="append",
    default=[],
    metavar="NAME=FILE.npz",
    help="Frechet distance of features `pred` and `ref` that an embedder of yours made; with "
    "`pred_logits` and `ref_logits` also KL divergence and inception score; may be repeated",
  )
  p.add_argument("--out", required=True, metavar="FILE.json")
  p.add_argument("--jobs", type=number(int, 1), default=os.cpu_count() or 1)
  p.set_defaults(run=run_evaluate)

  p = command("convert", "Convert a checkpoint of another project into a model folder.")
  p.add_argument(
    "source",
    metavar="SOURCE",
    help="mmaudio, clip, synchformer, clipseg, acl, beats, bigvgan, bigvgan_v2, vae, mono2binaural "
    "or resnet18",
  )
  p.add_argument("file", nargs="?", metavar="FILE", help="safetensors, .pth, .pt or .bin")
  p.add_argument("--out", metavar="DIR", help="model folder, which may hold other networks")
  p.add_argument("--ears", type=number(int, 1, 2), help="2: both start as this mono one; unset: 1")
  p.add_argument(
    "--check", metavar="FILE", help="compare with the outputs in a golden file instead"
  )
  p.add_argument("--tolerance", type=number(float, 0), help="of --check; unset: 1e-4")
  p.set_defaults(run=run_convert)

  p = command("export", "Write a network of a model folder in the layout of its upstream project.")
  p.add_argument("source", metavar="SOURCE", help="as of convert")
  p.add_argument("dir", metavar="DIR", help="model folder")
  p.add_argument("--out", required=True, metavar="FILE.safetensors")
  p.set_defaults(run=run_export)

  p = command("average", "Write the model folder of a run with averages of another width.")
  p.add_argument(
    "workdir", metavar="RUN", help="working directory of a finished run with averages/"
  )
  p.add_argument("--out", required=True, metavar="DIR", help="model folder to write")
  p.add_argument(
    "--width", required=True, type=number(float, 0, 0.28, above=True),
    help="of the average, relative to its step (sigma_rel of EDM2)",
  )  # fmt: skip
  p.add_argument("--step", type=number(int, 1), help="of the snapshot it ends at; unset: the last")
  p.set_defaults(run=run_average)

  p = command("report", "Write one self-contained HTML page of generated clips or of a run.")
  p.add_argument("dir", metavar="DIR")
  p.add_argument("--out", required=True, metavar="FILE.html")
  p.add_argument("--ref", metavar="DIR", help="reference sound, for the A/B switch")
  p.add_argument("--truth", metavar="DIR", help="folder of scene truth, <stem>.json")
  p.add_argument("--scores", metavar="FILE.json", help="scores; unset: DIR/scores.json if there")
  p.set_defaults(run=run_report)
  return main


def run_doctor(args: argparse.Namespace) -> int:
  """`spatialv2a doctor`."""
  if args.memory:
    from spatialv2a_jax import memory

    for line in memory.table():
      print(line, flush=True)
    return 0
  from spatialv2a_jax import doctor

  return doctor.run()


def run_generate(args: argparse.Namespace) -> int:
  """`spatialv2a generate`."""
  from spatialv2a_jax import compile_cache, doctor, generate

  compile_cache.keep()
  there, found, mend = doctor.devices()
  if not there:
    raise UserError(f"{found}; {mend}")
  chosen = vars(args)
  fields = (field.name for field in dataclasses.fields(generate.Settings))
  settings = generate.Settings(**{name: chosen[name] for name in fields if name in chosen})
  return generate.run(
    args.inputs,
    args.checkpoint,
    args.out,
    settings,
    parts=args.parts,
    dtype=args.dtype,
    feature_cache=args.feature_cache,
  )


def run_spatialize(args: argparse.Namespace) -> int:
  """`spatialv2a spatialize`."""
  from spatialv2a_jax import spatialize

  return spatialize.run(
    args.inputs,
    args.out,
    track=args.track,
    hrtf=args.hrtf,
    format=args.format,
    video_sound=args.video_sound,
    checkpoint=args.checkpoint,
  )


def run_evaluate(args: argparse.Namespace) -> int:
  """`spatialv2a evaluate`."""
  from spatialv2a_jax.metrics import evaluate

  named = {}
  for flag, kind, items in (
    ("--baseline", "DIR", args.baseline),
    ("--embedding", "FILE.npz", args.embedding),
  ):
    pairs = [item.partition("=") for item in items]
    for name, equals, path in pairs:
      if not (name and equals and path):
        raise UserError(f"{flag} {name}: write it as NAME={kind}")
    named[flag] = {name: path for name, _, path in pairs}
  evaluate.run(
    args.pred,
    args.ref,
    args.truth,
    args.out,
    baselines=named["--baseline"],
    embedded=named["--embedding"],
    jobs=args.jobs,
  )
  return 0


def run_convert(args: argparse.Namespace) -> int:
  """`spatialv2a convert`."""
  from spatialv2a_jax import convert

  if args.check is not None:
    other = {"FILE": args.file, "--out": args.out, "--ears": args.ears}
    if given := [name for name, value in other.items() if value is not None]:
      raise UserError(f"--check converts the weights of its own file, without {given[0]}")
    tolerance = convert.TOLERANCE if args.tolerance is None else args.tolerance
    return convert.check(args.source, args.check, tolerance)
  if args.tolerance is not None:
    raise UserError("--tolerance is for --check FILE")
  if args.file is None or args.out is None:
    raise UserError("give FILE and --out DIR, or --check FILE")
  return convert.run(args.source, args.file, args.out, ears=args.ears or 1)


def run_export(args: argparse.Namespace) -> int:
  """`spatialv2a export`."""
  from spatialv2a_jax import convert

  return convert.export(args.source, args.dir, args.out)


def run_average(args: argparse.Namespace) -> int:
  """`spatialv2a average`."""
  from spatialv2a_jax.training import averages

  averages.write_model(args.workdir, args.out, args.width, args.step)
  return 0


def run_report(args: argparse.Namespace) -> int:
  """`spatialv2a report`."""
  from spatialv2a_jax import report

  failed = report.write_report(
    args.dir, args.out, ref=args.ref, truth=args.truth, scores=args.scores
  )
  for path, error in failed.items():
    print(f"left out: {path}: {error}", file=sys.stderr)
  return 4 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code."""
  if argv is None:  # So that files which are half written go, as they do after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    args = parser().parse_args(argv)
  except UserError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
  try:
    return args.run(args)
  except UserError as error:
    print(f"spatialv2a {args.command}: {error}", file=sys.stderr)
    return error.exit_code
  except KeyboardInterrupt:
    print(f"spatialv2a {args.command}: interrupted", file=sys.stderr)
    return 130
  except (OSError, RuntimeError, MemoryError) as error:
    line = errors.one_line(error, MEMORY.get(args.command, ""))
    if line is None:
      raise
    print(f"spatialv2a {args.command}: {line}", file=sys.stderr)
    return UserError.exit_code


if __name__ == "__main__":
  sys.exit(main())
