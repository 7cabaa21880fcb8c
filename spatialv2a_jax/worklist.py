"""Which files a command works on, and what it says when some of them fail."""

import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError


def collect(
  inputs: Sequence[str | pathlib.Path],
  out: pathlib.Path,
  extensions: Collection[str] = io.VIDEO_EXTENSIONS,
) -> list[pathlib.Path]:
  """Returns the media files of files and folders, in order; a missing file fails in its turn.

  Args:
    inputs: files, taken whatever their suffix, and folders.
    out: the folder that gets `<stem>.<suffix>` for each.
    extensions: suffixes that count inside a folder.

  Raises:
    UserError: a folder without media, two files of one stem, or a file that lies in `out`, where
      the outputs would replace it.
  """
  paths: list[pathlib.Path] = []
  for item in map(pathlib.Path, inputs):
    paths += io.list_media(item, extensions) if item.is_dir() else [item]
  seen: dict[str, pathlib.Path] = {}
  for path in paths:
    if path.stem in seen:
      raise UserError(f"{path} and {seen[path.stem]} would share outputs named {path.stem}; rename")
    seen[path.stem] = path
    if path.parent.resolve() == out.resolve():
      raise UserError(f"{path} lies in {out}, where outputs may replace it; choose another --out")
  return paths


def conclude(total: int, failed: Mapping[pathlib.Path, UserError], out: pathlib.Path) -> int:
  """Prints how many files are done and which failed and why; returns the exit code."""
  for path, error in failed.items():
    print(f"failed: {path}: {error}", file=sys.stderr)
  print(f"{total - len(failed)} of {total} files are in {out}")
  return 4 if failed else 0
