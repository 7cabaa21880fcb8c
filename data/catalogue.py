"""Which clips there are: a list of ids with label and split, held against a folder of videos.

A list is CSV or TSV: with a header, the columns `id`, `label` and `split` (the last two may be
missing); without one, those three in this order, or VGGSound's own four: YouTube id, start in
seconds, label, split.
"""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError

SPLIT = "train"
CLIPS_PER_SHARD = 200
LEAST_SHARDS = 16  # As far as there are clips for them: a shard is the work of one process.


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of a list.

  Attributes:
    id: of the clip.
    label: what is heard; the caption of the clip.
    split: such as "train".
    names: file names without suffix under which the clip may be found, the best first.
  """

  id: str
  label: str
  split: str
  names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Clip:
  """A file to make a record of.

  Attributes:
    id, label, split: as in the list.
    path: of the file.
    name: the path below the folder of videos.
    stamp: changes when the file does.
    listed: whether the id is in the list.
  """

  id: str
  label: str
  split: str
  path: str
  name: str
  stamp: str
  listed: bool = True


@dataclasses.dataclass(frozen=True)
class Catalogue:
  """A list and a folder brought together.

  Attributes:
    clips: the files, by id; those that no line names come with `listed` false.
    missing: ids of the list without a file.
    duplicates: files left out because another has the same id.
    broken: links that lead nowhere.
    sizes: how many ids the list has in each split.
  """

  clips: tuple[Clip, ...]
  missing: tuple[str, ...]
  duplicates: tuple[str, ...]
  sizes: Mapping[str, int]
  broken: tuple[str, ...] = ()

  def shards(self, clips_per_shard: int | None = None) -> dict[str, int]:
    """Returns the number of shards of each split: a power of two that depends on the list alone.

    For all of VGGSound these are 1024 for training and 128 for testing.

    Args:
      clips_per_shard: None for 200, or in a small split for what makes 16 shards of it.
    """
    wanted = {}
    for split, size in self.sizes.items():
      most = clips_per_shard or min(CLIPS_PER_SHARD, -(-size // LEAST_SHARDS))
      wanted[split] = -(-size // most)
    return {split: 1 << (count - 1).bit_length() for split, count in wanted.items()}

  def coverage(self) -> dict[str, Any]:
    """Returns how much of the list is in the folder, for JSON."""
    listed = sum(self.sizes.values())
    unlisted = [clip.name for clip in self.clips if not clip.listed]
    found = len(self.clips) - len(unlisted)
    return {
      "listed": listed,
      "found": found,
      "share": found / listed if listed else None,
      "missing": list(self.missing),
      "unlisted": unlisted,
      "duplicates": list(self.duplicates),
      "broken_links": list(self.broken),
    }


def read(videos: str | pathlib.Path, labels: str | pathlib.Path | None) -> Catalogue:
  """Brings a folder of videos and a list together.

  Args:
    videos: folder of videos at any depth, links followed; hidden files and folders are passed
      over.
    labels: the list; None takes every video for training, labelled by the "caption" in
      `<id>.json` beside it, if there is one.

  Raises:
    UserError: no such folder, no videos in it, or a bad list.
  """
  files, duplicates, broken = _files(pathlib.Path(videos))
  if labels is None:
    entries = [Entry(name, _caption(path), SPLIT, (name,)) for name, path in files.items()]
  else:
    entries = read_list(labels)
  clips, missing = [], []
  for entry in entries:
    name = next((name for name in entry.names if name in files), None)
    if name is None:
      missing.append(entry.id)
    else:
      clips.append(_clip(entry, files.pop(name), videos))
  splits = {entry.split for entry in entries}
  spare = SPLIT if SPLIT in splits else min(splits, default=SPLIT)
  for name, path in files.items():
    clips.append(_clip(Entry(name, "", spare, ()), path, videos, listed=False))
  taken: dict[str, Clip] = {}
  for clip in clips:
    if taken.setdefault(clip.id, clip) is not clip:
      duplicates.append(clip.name)
  sizes = {split: sum(entry.split == split for entry in entries) for split in sorted(splits)}
  return Catalogue(
    tuple(sorted(taken.values(), key=lambda clip: clip.id)),
    tuple(sorted(missing)),
    tuple(sorted(duplicates)),
    sizes,
    tuple(broken),
  )


def read_list(path: str | pathlib.Path) -> list[Entry]:
  """Reads a list of ids.

  Raises:
    UserError: no such file, another number of columns, an id that occurs twice, or no ids.
  """
  path = pathlib.Path(path)
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--labels {path}: cannot read it ({error})") from None
  delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
  try:
    rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter, strict=True) if row]
  except csv.Error as error:
    raise UserError(f"--labels {path}: quotes in it do not match ({error})") from None
  head = [name.strip().lower() for name in rows[0]] if rows else []
  if "id" in head or not rows:
    for row in rows[1:]:
      if len(row) > len(head):  # A comma that is not in quotes; what follows it would be lost.
        raise UserError(
          f"--labels {path}: {','.join(row)!r} has {len(row)} columns, the first line {len(head)}"
        )
    entries = [_titled(dict(zip(head, row, strict=False)), path) for row in rows[1:]]
  else:
    entries = _untitled(rows, path)
  if not entries:
    raise UserError(f"--labels {path}: it lists no clips")
  seen: set[str] = set()
  for entry in entries:
    if entry.id in seen:
      raise UserError(f"--labels {path}: id {entry.id!r} occurs twice")
    if not re.fullmatch(r"\w+", entry.split):
      raise UserError(f"--labels {path}: split {entry.split!r} of {entry.id!r} is no word")
    seen.add(entry.id)
  return entries


def slice_of(clip_id: str, shards: int) -> int:
  """Returns the number of the slice, and shard, that a clip belongs to."""
  return int(hashlib.md5(clip_id.encode()).hexdigest(), 16) % shards


def read_table(
  path: str | pathlib.Path | None, flag: str, ids: Set[str], wanted: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
  """Reads numbers per clip: CSV or TSV with a column `id`; empty cells are left out.

  Args:
    path: the file; None is an empty table.
    flag: the option that named it, for errors.
    ids: of the clips, of which it must have one: otherwise it would do nothing.
    wanted: columns that it must have.

  Raises:
    UserError: no such file, no column `id` or one of the `wanted`, a cell that is no number, an id
      that occurs twice, or none of a clip.
  """
  if path is None:
    return {}
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{flag} {path}: cannot read it ({error})") from None
  delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
  reader = csv.DictReader(text.splitlines(), delimiter=delimiter, strict=True)
  try:
    reader.fieldnames = head = [name.strip() for name in reader.fieldnames or ()]
    if "id" not in head:
      raise UserError(f"{flag} {path}: its first line names no column id")
    if absent := [name for name in wanted if name not in head]:
      raise UserError(f"{flag} {path}: it has no column {absent[0]}, have {', '.join(head)}")
    table: dict[str, dict[str, float]] = {}
    for row in reader:
      if (clip := row["id"].strip()) in table:
        raise UserError(f"{flag} {path}: id {clip!r} occurs twice")
      table[clip] = {
        name: float(cell) for name, cell in row.items() if name != "id" and cell and cell.strip()
      }
  except (AttributeError, TypeError, ValueError, csv.Error) as error:
    raise UserError(f"{flag} {path}: every cell beside id is a number ({error})") from None
  if not table.keys() & ids:
    some = min(ids, default="-")
    raise UserError(f"{flag} {path}: none of its ids is that of a clip, such as {some}")
  return table


def _titled(row: Mapping[str, str], path: pathlib.Path) -> Entry:
  name = row.get("id", "").strip()
  if not name:
    raise UserError(f"--labels {path}: a line has no id")
  return Entry(name, (row.get("label") or "").strip(), (row.get("split") or SPLIT).strip(), (name,))


def _untitled(rows: Sequence[Sequence[str]], path: pathlib.Path) -> list[Entry]:
  widths = {len(row) for row in rows}
  if widths == {3}:
    return [_titled({"id": row[0], "label": row[1], "split": row[2]}, path) for row in rows]
  if widths != {4} or not all(row[1].strip().isdigit() for row in rows):
    raise UserError(
      f"--labels {path}: want a header with id, label, split, or VGGSound's four columns:"
      " YouTube id, start in seconds, label, split"
    )
  once = _once(row[0].strip() for row in rows)
  return [
    _vggsound(row[0].strip(), int(row[1]), row[2].strip(), row[3].strip(), once) for row in rows
  ]


def _vggsound(video: str, start: int, label: str, split: str, once: set[str]) -> Entry:
  """Files go by `<YouTube id>_<start, six digits>`, or by what common downloaders write."""
  name = f"{video}_{start:06d}"
  end = start + 10
  others = [f"{video}_{start}", f"{video}_{start}_{end}", f"{video}_{start}000_{end}000"]
  return Entry(name, label, split, (name, *others, *([video] if video in once else [])))


def _once(names: Iterable[str]) -> set[str]:
  counts: dict[str, int] = {}
  for name in names:
    counts[name] = counts.get(name, 0) + 1
  return {name for name, count in counts.items() if count == 1}


def _files(folder: pathlib.Path) -> tuple[dict[str, pathlib.Path], list[str], list[str]]:
  """Returns the videos by stem, those whose stem another one has, and links that lead nowhere."""
  if not folder.is_dir():
    raise UserError(f"--videos {folder}: no such folder")
  found: dict[str, pathlib.Path] = {}
  duplicates, broken = [], []
  for entry in _walk(folder):
    path = pathlib.Path(entry.path)
    if path.suffix.lower() not in io.VIDEO_EXTENSIONS:
      continue
    io.named_in_text(path)
    if entry.is_symlink() and not path.exists():
      broken.append(str(path.relative_to(folder)))
    elif found.setdefault(path.stem, path) is not path:
      duplicates.append(str(path.relative_to(folder)))
  if not found:
    raise UserError(f"--videos {folder}: no videos in it ({' '.join(sorted(io.VIDEO_EXTENSIONS))})")
  return found, duplicates, sorted(broken)


def _walk(folder: pathlib.Path) -> Iterator[os.DirEntry[str]]:
  """Yields the files below a folder, each folder once: those that links lead to come last."""
  seen: set[str] = set()
  links: list[str] = [str(folder)]

  def below(top: str) -> Iterator[os.DirEntry[str]]:
    place = os.path.realpath(top)
    if place in seen:
      return
    seen.add(place)
    with os.scandir(top) as entries:
      shown = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [entry for entry in shown if entry.is_dir()]
    yield from (entry for entry in shown if not entry.is_dir())
    links.extend(entry.path for entry in folders if entry.is_symlink())
    for entry in folders:
      if not entry.is_symlink():
        yield from below(entry.path)

  for link in links:
    yield from below(link)


def _caption(path: pathlib.Path) -> str:
  try:
    return str(json.loads(path.with_suffix(".json").read_text()).get("caption") or "")
  except (OSError, ValueError, AttributeError):
    return ""


def _clip(
  entry: Entry, path: pathlib.Path, videos: str | pathlib.Path, listed: bool = True
) -> Clip:
  stat = path.stat()
  name = path.relative_to(videos).as_posix()
  stamp = f"{stat.st_size} {stat.st_mtime_ns}"
  return Clip(entry.id, entry.label, entry.split, str(path), name, stamp, listed)
