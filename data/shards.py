"""A folder of shards: built in parallel, restartable, described for whoever reads it.

A clip belongs to the shard that the MD5 of its id names, and stands in it in MD5 order, so any
number of processes or machines writes the same bytes. A shard is written under a temporary name,
then gets a JSON with its configuration, checksum and bad clips; a rerun keeps the shards whose JSON
still holds. When all are there, `features.json` and `dataset_info.json` (in tensorflow-datasets'
format), `stats.json` and `manifest.json` describe them.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from data import tfrecord
from spatialv2a_jax import io
from spatialv2a_jax.errors import MissingAssetError, UserError

NAME, SPLIT = "spatialv2a", "train"
MIN_BAD = 5  # Bad clips that never stop a build, however small it is.
_CLASS = "tensorflow_datasets.core.features."

Record = Mapping[str, np.ndarray | str]


class Item(NamedTuple):
  """One clip to make: `payload` says from what, `stamp` changes when that does."""

  id: str
  payload: Any
  stamp: str = ""


class BadClipError(Exception):
  """A clip that cannot be used; the message is the reason in the statistics."""


@dataclasses.dataclass(frozen=True)
class _Job:
  path: pathlib.Path
  items: Sequence[Item]
  config_hash: str
  max_bad: int


def build(
  items: Iterable[Item],
  make_record: Callable[[Item], Record],
  out: str | pathlib.Path,
  *,
  shards: int,
  config: Mapping[str, Any],
  jobs: int = 1,
  part: tuple[int, int] = (0, 1),
  max_bad: float = 0.01,
  progress: Callable[[int, int, int], None] | None = None,
) -> dict[str, Any]:
  """Makes a record of every item and writes them to shards, with manifest and statistics.

  Args:
    items: the clips; ids are unique.
    make_record: returns a clip's fields without `id`: numpy arrays, or text. Whatever it raises
      makes the clip a bad one, except MissingAssetError. Pickled to the processes if `jobs` > 1.
    out: folder of the shards.
    shards: their number.
    config: plain values on which records depend; a change rebuilds all shards.
    jobs: processes; 1 works in this one.
    part: (i, n): make only shards i, i + n, i + 2n, ... The call that finds all shards complete
      writes the manifest.
    max_bad: share of bad clips at which to give up; five are always tolerated.
    progress: called with (shards done, shards, bad clips).

  Returns:
    The statistics, as in `stats.json`: "clips_in", "clips_out", "bad" {id: reason}, and "complete"
    (whether all parts are there).

  Raises:
    UserError: duplicate ids, too many bad clips, none left, or clips of different shapes.
    MissingAssetError: from `make_record`.
  """
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  config_hash = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
  slices: list[list[Item]] = [[] for _ in range(shards)]
  total = 0
  for item in items:
    slices[int(_md5(item), 16) % shards].append(item)
    total += 1
  limit = max(MIN_BAD, int(max_bad * total))
  work = []
  for number, items_of in enumerate(slices):
    items_of.sort(key=_md5)
    for one, next_one in zip(items_of, items_of[1:], strict=False):
      if one.id == next_one.id:
        raise UserError(f"clip id {one.id!r} occurs twice; give each clip its own file name")
    name = f"{NAME}-{SPLIT}.tfrecord-{number:05d}-of-{shards:05d}"
    work.append(_Job(out / name, items_of, config_hash, limit))
  mine = work[part[0] :: part[1]]
  done, bad = 0, {}
  for info in _run(mine, make_record, jobs):
    done, bad = done + 1, {**bad, **info["bad"]}
    if progress:
      progress(done, len(mine), len(bad))
    _check_bad(bad, limit)
  infos = [_valid(job) for job in work]
  complete = [info for info in infos if info is not None]
  stats = {
    "clips_in": sum(len(job.items) for job, info in zip(work, infos, strict=True) if info),
    "clips_out": sum(info["records"] for info in complete),
    "bad": {name: why for info in complete for name, why in info["bad"].items()},
    "complete": len(complete) == len(work),
  }
  _check_bad(stats["bad"], limit)
  if stats["complete"]:
    _finish(out, [job.path for job in work], complete, config, stats)
  return stats


def paths(folder: str | pathlib.Path) -> list[pathlib.Path]:
  """Returns the shards of a finished folder, in order.

  Raises:
    UserError: the folder has no `manifest.json`, or a shard of it is missing.
  """
  manifest = pathlib.Path(folder) / "manifest.json"
  try:
    names = [shard["file"] for shard in json.loads(manifest.read_text())["shards"]]
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{manifest}: cannot read it ({error}); finish building the shards") from error
  found = [manifest.parent / name for name in names]
  missing = [path.name for path in found if not path.exists()]
  if missing:
    raise UserError(f"{folder}: {len(missing)} shards are missing, the first is {missing[0]}")
  return found


def write_features(folder: str | pathlib.Path, fields: Mapping[str, tfrecord.Tensor]) -> None:
  """Writes `features.json`, from which readers know the shapes and dtypes of all records."""
  features: dict[str, Any] = {}
  for name, (dtype, shape) in sorted(fields.items()):
    if dtype == "text":
      features[name] = {"pythonClassName": f"{_CLASS}text_feature.Text", "text": {}}
    else:
      tensor = {
        "dtype": dtype,
        "encoding": "bytes",
        "shape": {"dimensions": [str(size) for size in shape]},
      }
      features[name] = {"pythonClassName": f"{_CLASS}tensor_feature.Tensor", "tensor": tensor}
  write_json(
    pathlib.Path(folder) / "features.json",
    {
      "featuresDict": {"features": features},
      "pythonClassName": f"{_CLASS}features_dict.FeaturesDict",
    },
  )


def read_features(folder: str | pathlib.Path) -> dict[str, tfrecord.Tensor]:
  """Reads `features.json`.

  Raises:
    UserError: it is missing or says something else.
  """
  path = pathlib.Path(folder) / "features.json"
  try:
    features = json.loads(path.read_text())["featuresDict"]["features"]
    return {
      name: tfrecord.Tensor("text")
      if "text" in feature
      else tfrecord.Tensor(
        feature["tensor"]["dtype"],
        tuple(int(size) for size in feature["tensor"]["shape"].get("dimensions", ())),
      )
      for name, feature in features.items()
    }
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path}: cannot read it ({error}); it is written with the shards") from error


def write_json(path: str | pathlib.Path, content: Any) -> None:
  """Writes JSON atomically, with sorted keys: equal contents are equal bytes."""
  with io.atomic_path(path) as temporary:
    pathlib.Path(temporary).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


_make_record: Callable[[Item], Record]  # Of a worker process: sent once, not with every shard.


def _start_worker(make_record: Callable[[Item], Record]) -> None:
  global _make_record
  _make_record = make_record


def _work(job: _Job) -> dict[str, Any]:
  return _make_shard(job, _make_record)


def _run(
  work: Sequence[_Job], make_record: Callable[[Item], Record], jobs: int
) -> Iterator[dict[str, Any]]:
  """Yields the sidecars of shards as they are finished."""
  if jobs == 1:
    yield from (_make_shard(job, make_record) for job in work)
    return
  # Spawned, not forked: a fork of a process with JAX threads can hang.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    jobs, mp_context=context, initializer=_start_worker, initargs=(make_record,)
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


def _make_shard(job: _Job, make_record: Callable[[Item], Record]) -> dict[str, Any]:
  """Writes one shard and its sidecar, unless they are there already."""
  known = _valid(job)
  if known is not None:
    return known
  # Without its sidecar a shard counts as unfinished, so this one goes first and comes last.
  sidecar(job.path).unlink(missing_ok=True)
  ids: list[str] = []
  bad: dict[str, str] = {}
  layout: dict[str, tfrecord.Tensor] = {}

  def payloads() -> Iterator[bytes]:
    for item in job.items:
      try:
        record = {"id": item.id, **make_record(item)}
        _check_record(record, layout)
      except MissingAssetError:
        raise
      except Exception as error:  # One bad clip must not end a build of many hours.
        bad[item.id] = _reason(error)
        _check_bad(bad, job.max_bad)
        continue
      layout.update({name: tfrecord.tensor_of(value) for name, value in record.items()})
      ids.append(item.id)
      yield tfrecord.encode_example(record)

  digest = tfrecord.write(job.path, payloads())
  info = {
    "records": len(ids),
    "bytes": job.path.stat().st_size,
    "sha256": digest,
    "config": job.config_hash,
    "slice": _slice_hash(job.items),
    "ids": ids,
    "bad": bad,
    "fields": {name: [tensor.dtype, list(tensor.shape)] for name, tensor in layout.items()},
  }
  write_json(sidecar(job.path), info)
  return info


def _valid(job: _Job) -> dict[str, Any] | None:
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
  paths: Sequence[pathlib.Path],
  infos: Sequence[dict[str, Any]],
  config: Mapping[str, Any],
  stats: Mapping[str, Any],
) -> None:
  """Writes what belongs to all shards; `manifest.json` last."""
  layouts = [(path, info["fields"]) for path, info in zip(paths, infos, strict=True)]
  layouts = [(path, fields) for path, fields in layouts if fields]
  if not layouts:
    named = "; ".join(f"{name}: {why}" for name, why in list(stats["bad"].items())[:3])
    raise UserError(f"{out}: not one clip could be used ({named or 'there were none'})")
  first, fields = layouts[0]
  for path, others in layouts:
    if others != fields:
      wrong = sorted(name for name in {*fields, *others} if fields.get(name) != others.get(name))
      raise UserError(f"{path} and {first.name} differ in {', '.join(wrong)}; delete the wrong one")
  write_features(
    out, {name: tfrecord.Tensor(dtype, tuple(shape)) for name, (dtype, shape) in fields.items()}
  )
  write_json(
    out / "dataset_info.json",
    {
      "name": NAME,
      "version": "1.0.0",
      "fileFormat": "tfrecord",
      "splits": [
        {
          "name": SPLIT,
          "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
          "numBytes": str(sum(info["bytes"] for info in infos)),
          "shardLengths": [str(info["records"]) for info in infos],
        }
      ],
    },
  )
  write_json(out / "stats.json", stats)
  write_json(
    out / "manifest.json",
    {
      "config": config,
      "records": stats["clips_out"],
      "shards": [
        {"file": path.name, **{key: info[key] for key in ("records", "bytes", "sha256")}}
        for path, info in zip(paths, infos, strict=True)
      ],
    },
  )


def _check_record(record: Record, layout: Mapping[str, tfrecord.Tensor]) -> None:
  """Raises BadClipError for a value that is not finite or not shaped as in earlier records."""
  for name, value in record.items():
    if not isinstance(value, str) and not np.isfinite(value).all():
      raise BadClipError(f"field {name} holds NaN or infinity")
    if layout and layout.get(name) != tfrecord.tensor_of(value):
      raise BadClipError(f"field {name} is {tfrecord.tensor_of(value)}, others {layout.get(name)}")
  if layout and layout.keys() - record.keys():
    raise BadClipError(f"without {sorted(layout.keys() - record.keys())}")


def _check_bad(bad: Mapping[str, str], limit: int) -> None:
  if len(bad) > limit:
    named = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:3])
    raise UserError(f"more than {limit} bad clips, raise --max-bad if that is expected: {named}")


def _reason(error: Exception) -> str:
  text = " ".join(str(error).split())[:200]
  return text if isinstance(error, BadClipError | UserError) else f"{type(error).__name__}: {text}"


def _slice_hash(items: Sequence[Item]) -> str:
  return hashlib.sha256(json.dumps([(i.id, i.stamp) for i in items]).encode()).hexdigest()


def _md5(item: Item) -> str:
  return hashlib.md5(item.id.encode()).hexdigest()


def sidecar(path: pathlib.Path) -> pathlib.Path:
  """Returns the JSON of a shard: what is in it, in which order, and which clips were bad."""
  return pathlib.Path(f"{path}.json")
