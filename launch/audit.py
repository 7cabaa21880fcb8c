"""What `python -m launch.data audit` does: says whether a build is fit for release, and why not."""

import argparse
import pathlib
import sys

from data import audit, audit_page, layout
from spatialv2a_jax import logbook
from spatialv2a_jax.errors import UserError


def add_arguments(commands) -> None:
  """Adds the arguments of `audit`."""
  p = commands.add_parser(
    "audit",
    help="Check a build before its release; writes audit.json and audit.html.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  p.add_argument("build", type=pathlib.Path, metavar="DIR", help="--out of vggsound")
  p.add_argument(
    "--videos", type=pathlib.Path, metavar="DIR", help="--videos of vggsound: pictures and sources"
  )
  p.add_argument("--twin", type=pathlib.Path, metavar="DIR", help="a second, equal build")
  p.add_argument("--out", type=pathlib.Path, metavar="FILE", help="the page; default audit.html")
  p.add_argument("--seed", type=int, default=0, help="of the choice of clips")
  p.add_argument("--clips", type=int, default=20, metavar="N", help="kept and dropped, on the page")
  p.add_argument("--sample", type=int, default=500, metavar="N", help="clips to listen to again")
  p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
  """Audits a build; 1 if a check fails.

  Raises:
    UserError: not a finished build, or a bad argument.
  """
  for flag, value in (("clips", args.clips), ("sample", args.sample)):
    if value < 0:
      raise UserError(f"--{flag} {value}: give 0 or more")
  build = audit.Build(args.build)
  if args.videos and not args.videos.is_dir():
    raise UserError(f"--videos {args.videos}: no such folder")
  with logbook.Progress(len(build), "records", unit="clip") as progress:
    clips = build.clips(progress.advance)
  statistics = audit.statistics(clips)
  chosen = audit.sample(clips, args.seed, args.sample)
  with logbook.Progress(len(chosen), "listening", unit="clip") as progress:
    checks = audit.checks(build, clips, chosen, args.videos, args.twin, progress.advance)
  page = args.out or args.build / "audit.html"
  audit_page.write(
    page, build, clips, statistics, checks, args.videos, seed=args.seed, count=args.clips
  )
  failed = [check for check in checks if check.passed is False]
  content = {
    "fit": not failed,
    "checks": [vars(check) for check in checks],
    "statistics": [
      {name: value if value == value else None for name, value in row.items()} for row in statistics
    ],
  }
  layout.write_json(page.with_suffix(".json"), content)
  for check in checks:
    mark = {True: "passed", False: "FAILED", None: "skipped"}[check.passed]
    print(f"{mark:8} {check.name}: {check.found}")
  print(f"{page}: {len(clips.ids)} clips")
  for check in failed:
    print(f"launch.data audit: not fit for release: {check.name}: {check.found}", file=sys.stderr)
  return 1 if failed else 0
