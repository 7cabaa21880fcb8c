"""A folder of shards: built in parallel, restartable, described for whoever reads it.

A clip belongs to the shard that the MD5 of its id names, and stands in it in MD5 order, so any
number of processes or machines writes the same bytes. A shard is written under a temporary name,
then gets a JSON with its configuration, checksum and bad clips; a rerun keeps the shards whose JSON
still holds. When all are there, `features.json` and `dataset_info.json` (in tensorflow-datasets'
format, `data.layout`), `stats.json` and `manifest.json` describe them.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, cast

import numpy as np

from data import layout, tf_example, tfrecord, workers
from spatialv2a_jax import errors, io
from spatialv2a_jax.errors import UserError

NAME, SPLIT = "spatialv2a", "train"
MIN_BAD = 5  # Bad clips that never stop a build, however small it is.
DESCRIPTIONS = ("features.json", "dataset_info.json", "stats.json", "manifest.json")

Record = Mapping[str, np.ndarray | str]


class Item(NamedTuple):
  """One clip to make: `payload` says from what, `stamp` changes when that does."""

  id: str
  payload: Any
  stamp: str = ""
  split: str = SPLIT


Maker = Callable[[Sequence[Item]], Iterable[Record | Exception]]


class BadClipError(Exception):
  """A clip that cannot be used; the message is the reason in the statistics."""


@dataclasses.dataclass(frozen=True)
class _OneByOne:
  """Makes records with a function of one item; what it raises stands in the record's place."""

  make_record: Callable[[Item], Record]

  def __call__(self, items: Sequence[Item]) -> Iterator[Record | Exception]:
    """Yields a record for each item, or what is wrong with it, if that is its own fault."""
    for item in items:
      try:
        yield self.make_record(item)
      except Exception as error:  # One bad clip must not end a build of many hours.
        errors.raise_of_machine(error)
        yield error


@dataclasses.dataclass(frozen=True)
class Job:
  """One shard to make: where, of which clips in which order, and under which configuration."""

  path: pathlib.Path
  split: str
  items: Sequence[Item]
  config_hash: str
  max_bad: int = MIN_BAD
  unknown: Collection[str] = ()


Runner = Callable[[Sequence[Job], Maker], Iterable[Mapping[str, Any]]]


def plan(
  items: Iterable[Item],
  out: pathlib.Path,
  *,
  shards: int | Mapping[str, int],
  config: Mapping[str, Any],
  name: str = NAME,
) -> list[Job]:
  """Returns the shards of a build, which takes the same arguments; UserError for duplicate ids."""
  config_hash = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
  splits: dict[str, list[list[Item]]] = {}
  ids: set[str] = set()
  for item in items:
    if item.id in ids:
      raise UserError(f"clip id {item.id!r} occurs twice; give each clip its own file name")
    ids.add(item.id)
    count = shards if isinstance(shards, int) else shards[item.split]
    slices = splits.setdefault(item.split, [[] for _ in range(count)])
    slices[int(_md5(item), 16) % count].append(item)
  return [
    Job(
      out / layout.shard_name(name, split, number, len(slices)),
      split,
      sorted(items_of, key=_md5),
      config_hash,
    )
    for split, slices in sorted(splits.items())
    for number, items_of in enumerate(slices)
  ]


def build(
  items: Iterable[Item],
  make_record: Callable[[Item], Record] | Maker,
  out: str | pathlib.Path,
  *,
  shards: int | Mapping[str, int],
  config: Mapping[str, Any],
  batched: bool = False,
  name: str = NAME,
  description: str = "",
  jobs: int = 1,
  part: tuple[int, int] = (0, 1),
  max_bad: float = 0.01,
  unknown: Collection[str] = (),
  progress: Callable[[int, int, int], None] | None = None,
  runner: Runner | None = None,
) -> dict[str, Any]:
  """Makes a record of every item and writes them to shards, with manifest and statistics.

  Args:
    items: the clips; ids are unique.
    make_record: returns a clip's fields without `id`: numpy arrays, or text. Whatever it raises
      makes the clip a bad one, except as `errors.raise_of_machine`. Pickled if `jobs` > 1.
    out: folder of the shards.
    shards: their number in each split, or one number for all.
    config: plain values on which records depend; a change rebuilds all shards.
    batched: `make_record` gets all items of a shard and yields for each, in order, its fields or
      the exception that says why there are none, so that it may work on several at a time.
    name: of the data set; file names begin with it.
    description: of the data set, for `dataset_info.json`.
    jobs: processes; 1 works in this one.
    part: (i, n): make only shards i, i + n, i + 2n, ... The call that finds all shards complete
      writes the manifest.
    max_bad: share of bad clips at which to give up; five are always tolerated.
    unknown: fields in which NaN stands for an unknown value; elsewhere it makes a clip a bad one.
    progress: called with (shards done, shards, bad clips).
    runner: calls `make_shard` on each job elsewhere, instead of on `jobs` processes here.

  Returns:
    The statistics, as in `stats.json`: "clips_in", "clips_out", "bad" {id: reason}, and "complete"
    (whether all parts are there).

  Raises:
    UserError: a folder that cannot be written, duplicate ids, too many bad clips, none left, or
      clips of different shapes.
    Exception: as `errors.raise_of_machine`; run again, finished shards are kept.
  """
  out = pathlib.Path(out)
  io.check_writable(out)
  items = list(items)
  limit = max(MIN_BAD, int(max_bad * len(items)))
  work = [
    dataclasses.replace(job, max_bad=limit, unknown=unknown)
    for job in plan(items, out, shards=shards, config=config, name=name)
  ]
  mine = sorted(work[part[0] :: part[1]], key=lambda job: finished(job) is None)  # Kept ones first.
  done, bad = 0, {}
  make = cast(Maker, make_record if batched else _OneByOne(cast(Any, make_record)))
  if part == (0, 1):  # Else another part may be writing them at this moment.
    for file in DESCRIPTIONS:
      io.remove_leftovers(out / file)
  for info in (runner or functools.partial(_run, jobs=jobs))(mine, make):
    done, bad = done + 1, {**bad, **info["bad"]}
    if progress:
      progress(done, len(mine), len(bad))
    _check_bad(bad, limit)
  infos = [finished(job) for job in work]
  complete = [info for info in infos if info is not None]
  stats = {
    "clips_in": sum(len(job.items) for job, info in zip(work, infos, strict=True) if info),
    "clips_out": sum(info["records"] for info in complete),
    "bad": {name: why for info in complete for name, why in info["bad"].items()},
    "complete": len(complete) == len(work),
  }
  _check_bad(stats["bad"], limit)
  if stats["complete"]:
    about = {"name": name, "description": description, "config": config}
    _finish(out, list(zip(work, complete, strict=True)), about, stats)
    if part == (0, 1):  # Else other parts may not know yet that all is done.
      layout.remove_unlisted(out, name)
  return stats


def paths(folder: str | pathlib.Path, split: str = SPLIT) -> list[pathlib.Path]:
  """Returns the shards of one split of a finished folder, in order.

  Raises:
    UserError: the folder has no `manifest.json` or no such split, or a shard of it is missing or
      has another size.
  """
  listed = layout.read_manifest(folder)
  if split not in listed:
    raise UserError(f"{folder}: it has no split {split!r}, only {', '.join(listed)}; see DIR:SPLIT")
  sizes = {pathlib.Path(folder) / shard["file"]: shard["bytes"] for shard in listed[split]}
  missing = [path.name for path in sizes if not path.exists()]
  if missing:
    raise UserError(f"{folder}: {len(missing)} shards are missing, the first is {missing[0]}")
  for path, size in sizes.items():
    if (found := path.stat().st_size) != size:
      what = "cut short" if found < size else "of another build"
      raise UserError(f"{path}: the shard is {what}, {found} of {size} bytes; restore it")
  return [pathlib.Path(folder) / shard["file"] for shard in listed[split]]  # One may stand twice.


def splits(folder: str | pathlib.Path) -> dict[str, list[str]]:
  """Returns the file names of the shards of each split; UserError as `paths`."""
  return {
    split: [shard["file"] for shard in found]
    for split, found in layout.read_manifest(folder).items()
  }


_make: Maker  # Of a worker process: sent once, not with every shard.


def _start_worker(make: Maker) -> None:
  global _make
  _make = make
  workers.end_with_parent()


def _work(job: Job) -> dict[str, Any]:
  return make_shard(job, _make)


def _run(work: Sequence[Job], make: Maker, jobs: int) -> Iterator[dict[str, Any]]:
  """Yields the sidecars of shards as they are finished."""
  if jobs == 1:
    yield from (make_shard(job, make) for job in work)
    return
  # Spawned, not forked: a fork of a process with JAX threads can hang.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    jobs, mp_context=context, initializer=_start_worker, initargs=(make,)
  ) as pool:
    futures = [pool.submit(_work, job) for job in work]
    try:
      for future in concurrent.futures.as_completed(futures):
        yield future.result()
    except BrokenProcessPool as error:
      raise UserError(
        "a worker process died, perhaps for lack of memory; lower --jobs and run again, finished"
        " shards are kept"
      ) from error
    finally:
      pool.shutdown(cancel_futures=True)


def make_shard(job: Job, make: Maker) -> dict[str, Any]:
  """Writes one shard and its sidecar, unless they are there already."""
  known = finished(job)
  if known is not None:
    return known
  for path in (job.path, tfrecord.index_path(job.path), sidecar(job.path)):
    io.remove_leftovers(path)
  # Without these two a shard counts as unfinished, so they go first and come last.
  layout.forget(job.path)
  sidecar(job.path).unlink(missing_ok=True)
  ids: list[str] = []
  captions: list[str] = []
  bad: dict[str, str] = {}
  fields: dict[str, tf_example.Tensor] = {}

  def payloads() -> Iterator[bytes]:
    for item, made in zip(job.items, make(job.items), strict=True):
      try:
        if isinstance(made, Exception):
          raise made
        record = {"id": item.id, **made}
        _check_record(record, fields, job.unknown)
      except Exception as error:
        errors.raise_of_machine(error)
        bad[item.id] = _reason(error)
        _check_bad(bad, job.max_bad)
        continue
      fields.update({name: tf_example.tensor_of(value) for name, value in record.items()})
      ids.append(item.id)
      captions.append(str(record.get("caption", "")))
      yield tf_example.encode(record)

  digest = tfrecord.write(job.path, payloads())
  info = {
    "records": len(ids),
    "bytes": job.path.stat().st_size,
    "sha256": digest,
    "config": job.config_hash,
    "slice": _slice_hash(job.items),
    "ids": ids,
    "captions": captions,
    "bad": bad,
    "fields": {name: [tensor.dtype, list(tensor.shape)] for name, tensor in fields.items()},
  }
  layout.write_json(sidecar(job.path), info)
  return info


def finished(job: Job) -> dict[str, Any] | None:
  """Returns the sidecar of a finished shard of the same clips and configuration."""
  try:
    info = json.loads(sidecar(job.path).read_text())
    same = (info["config"], info["slice"], info["bytes"]) == (
      job.config_hash,
      _slice_hash(job.items),
      job.path.stat().st_size,
    )
  except (OSError, ValueError, KeyError):
    return None
  return info if same else None


def _finish(
  out: pathlib.Path,
  made: Sequence[tuple[Job, dict[str, Any]]],
  about: Mapping[str, Any],
  stats: Mapping[str, Any],
) -> None:
  """Writes what belongs to all shards; `manifest.json` last."""
  filled = [(job.path, info["fields"]) for job, info in made if info["fields"]]
  if not filled:
    named = "; ".join(f"{name}: {why}" for name, why in list(stats["bad"].items())[:3])
    raise UserError(f"{out}: not one clip could be used ({named or 'there were none'})")
  first, fields = filled[0]
  for path, others in filled:
    if others != fields:
      wrong = sorted(name for name in {*fields, *others} if fields.get(name) != others.get(name))
      raise UserError(f"{path} and {first.name} differ in {', '.join(wrong)}; delete the wrong one")
  layout.write_features(
    out, {name: tf_example.Tensor(dtype, tuple(shape)) for name, (dtype, shape) in fields.items()}
  )
  splits: dict[str, list[dict[str, Any]]] = {}
  for job, info in made:
    splits.setdefault(job.split, []).append(info)
  layout.write_info(out, about["name"], about["description"], splits)
  layout.write_json(out / "stats.json", stats)
  layout.write_json(
    out / "manifest.json",
    {
      "config": about["config"],
      "records": stats["clips_out"],
      "shards": [
        {
          "file": job.path.name,
          "split": job.split,
          **{key: info[key] for key in ("records", "bytes", "sha256")},
        }
        for job, info in made
      ],
    },
  )


def _check_record(
  record: Record, fields: Mapping[str, tf_example.Tensor], unknown: Collection[str]
) -> None:
  """Raises BadClipError for a value that is not finite or not shaped as in earlier records."""
  for name, value in record.items():
    if not isinstance(value, str) and name not in unknown and not np.isfinite(value).all():
      raise BadClipError(f"field {name} holds NaN or infinity")
    if fields and fields.get(name) != tf_example.tensor_of(value):
      raise BadClipError(
        f"field {name} is {tf_example.tensor_of(value)}, others {fields.get(name)}"
      )
  if fields and fields.keys() - record.keys():
    raise BadClipError(f"without {sorted(fields.keys() - record.keys())}")


def _check_bad(bad: Mapping[str, str], limit: int) -> None:
  if len(bad) > limit:
    named = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:3])
    raise UserError(f"more than {limit} bad clips (see --max-bad or --max-failures): {named}")


def _reason(error: Exception) -> str:
  text = " ".join(str(error).split())[:200]
  return text if isinstance(error, BadClipError | UserError) else f"{type(error).__name__}: {text}"


def _slice_hash(items: Sequence[Item]) -> str:
  return hashlib.sha256(json.dumps([(i.id, i.stamp) for i in items]).encode()).hexdigest()


def _md5(item: Item) -> str:
  return hashlib.md5(item.id.encode()).hexdigest()


def sidecar(path: pathlib.Path) -> pathlib.Path:
  """Returns the JSON of a shard: which clips are in it, in order, and which were bad."""
  return pathlib.Path(f"{path}.json")
