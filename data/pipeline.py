"""From shards to batches: one global order of clips, of which a step number is the whole state.

Grain makes the order, shuffled anew each epoch, of record *numbers*; a host looks up and reads only
its rows of each global batch. So the batch of a step is a function of (seed, step) alone and
neither the number of hosts nor of worker processes changes it. Fields keep the 16 or 8 bits of the
records (`schema.widen` is for the devices). Imports no jax.

Axes: b clip, e ear (0 left, 1 right); the others as in `spatialv2a_jax.schema`.
"""

import contextlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import grain
import numpy as np
from absl import flags

from data import captions, layout, shards, tf_example, tfrecord, workers
from data.kept import Kept
from data.rows import MIRRORED, Rows
from spatialv2a_jax import schema
from spatialv2a_jax.errors import UserError

KINDS: Mapping[str, Mapping[str, str]] = {
  "features": schema.AXES,
  "audio": {"audio": "audio_bep"},
  "pairs": {name: name for name in ("mono", "jpeg", "ends", "column")},  # Read by `data.pairs`.
}
AHEAD = 4  # Batches that are ready before they are asked for, if reading is fast enough.


class Loader(Iterator[dict[str, np.ndarray]]):
  """Batches from a step on.

  Attributes:
    bad: damaged records that were skipped so far, by number, and where they are.
    max_bad: how many of them are put up with.
  """

  def __init__(
    self, batches: grain.DatasetIterator, source: tfrecord.TFRecordSource, step: int, max_bad: int
  ):
    self._batches, self._source, self._step, self.max_bad = batches, source, step, max_bad
    self.bad: dict[int, str] = {}

  def state(self) -> dict[str, int]:
    """Returns the data position for a checkpoint: pass it on as `start_step` to resume."""
    return {"step": self._step}

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._batches)
    for record in batch.pop("bad_records").tolist():
      if record not in self.bad:
        path, place = self._source.locate(record)
        self.bad[record] = f"{path}: record {place}{_whose(path, place)}"
        logging.warning("skipped a damaged record, %d so far: %s", len(self.bad), self.bad[record])
    if len(self.bad) > self.max_bad:
      named = ", ".join(list(self.bad.values())[:5])
      raise UserError(
        f"{len(self.bad)} damaged records, more than {self.max_bad}: {named}; restore the shards"
      )
    self._step += 1
    return batch

  def close(self) -> None:
    """Stops worker processes and threads."""
    self._batches.close()


def loader(
  paths: Sequence[str | pathlib.Path],
  *,
  batch_size: int,
  seed: int | None,
  kind: Literal["features", "audio", "pairs"] = "features",
  shapes: Mapping[str, tuple[int, ...]] | None = None,
  start_step: int = 0,
  offset: int = 0,
  rows: tuple[int, int] | None = None,
  workers: int = 0,
  threads: int = 1,
  epochs: int | None = None,
  mirror: bool = False,
  max_bad: int | None = None,
  cache_gb: float = 0.0,
  reader: Callable[..., Rows] = Rows,
) -> Loader:
  """Returns an iterator over the batches of one host.

  Epochs follow each other in one stream, so a batch may span two. With `epochs` the stream ends;
  its last batch is filled up with further clips of weight 0.

  Args:
    paths: shards; each folder holds a `features.json`.
    batch_size: clips per step over all hosts.
    seed: of the order, a new one each epoch, and of mirroring; None keeps the order of the shards.
    kind: "features" for the fields of `schema.AXES`, "audio" for `audio_bep` in -1..1.
    shapes: what the run needs of each field, as from `schema.feature_shapes`; None: as stored.
      Fields of `schema.MIRROR_AXES` are read if they are among them.
    start_step: first step to deliver.
    offset: clips of the order that come before step 0, such as those of smaller batches.
    rows: first and last + 1 of this host's rows of each batch, as from `sharding.local_rows`; None:
      all. Hosts with different numbers of devices have different numbers of rows.
    workers: reading processes; 0 reads in threads of this one, which is faster unless parsing
      dominates. Their number changes no batch.
    threads: batches read at a time, in each process. More than one pay where making a batch leaves
      the interpreter; where it does not, they take it from each other at twice the processor time.
    epochs: passes over the data; None: endless.
    mirror: mirrors left and right of half of the clips, drawn from (seed, epoch, clip).
    max_bad: distinct damaged records to replace by their successors before giving up; None: the
      larger of 5 and 1 %.
    cache_gb: GiB of memory for clips that were read, verified and parsed: those that fit are not
      read again, with `mirror` once they were read both ways. Needs workers=0, and a `kind` whose
      clips are the same each epoch.
    reader: makes the rows of a batch; "pairs" need one of their own.

  Raises:
    UserError: shards that are missing, cut short, empty or of another layout; a bad argument; and,
      while iterating, records that contradict their layout or too many damaged ones.
  """
  first, last = (0, batch_size) if rows is None else rows
  if not 0 <= first < last <= batch_size:
    raise UserError(f"rows {first} to {last} are none of a batch of batch_size {batch_size}")
  if mirror and seed is None:
    raise UserError("mirror needs a seed")
  if not cache_gb >= 0:
    raise UserError(f"cache_gb={cache_gb} is less than 0")
  if cache_gb and workers:
    raise UserError(f"cache_gb={cache_gb} needs workers=0: each of {workers} would keep all clips")
  if cache_gb and kind == "pairs":
    raise UserError(f"cache_gb={cache_gb} has no use: pairs are mixed anew each epoch")
  source = tfrecord.TFRecordSource(paths)
  if not len(source):
    raise UserError(f"no records in {', '.join(source.paths[:3]) or 'the list of shards'}")
  folders: dict[str, str] = {}  # Each with its first shard.
  for path in source.paths:
    folders.setdefault(os.path.dirname(path), path)
  layouts = {folder: layout.read_features(folder) for folder in folders}
  tables = {
    folder: captions.Table(folder)
    for folder, fields in layouts.items()
    if captions.FIELD in KINDS[kind] and captions.FIELD not in fields and "caption" in fields
  }
  shapes = shapes or {}
  more = {field: name for field, name in schema.MIRROR_AXES.items() if field in shapes}
  fields = {**KINDS[kind], **more}
  _check_layouts(folders, layouts, tables, {field: shapes.get(field) for field in fields}, mirror)
  total = None if epochs is None else epochs * len(source)
  max_bad = max(5, len(source) // 100) if max_bad is None else max_bad
  order = grain.MapDataset.range(len(source))
  if seed is not None:
    order = order.seed(seed).shuffle()
  dtypes = _dtypes(fields, layouts, tables, mirror)
  read = reader(
    source=source,
    order=order,  # Beyond its length, Grain goes on with the next epochs.
    fields=fields,
    layouts=layouts,
    tables=tables,
    dtypes=dtypes,
    straight={} if mirror else _straight(fields, layouts, dtypes),
    seed=seed or 0,
    batch_size=batch_size,
    first=first,
    last=last,
    total=total,
    mirror=mirror,
    max_bad=max_bad,
    offset=offset,
    kept=Kept(int(cache_gb * 2**30), len(source) * (1 + mirror)) if cache_gb else None,
  )
  steps = sys.maxsize if total is None else -(-(total - offset) // batch_size)
  # A batch is one element, whatever the number of workers among which `to_iter_dataset` deals them.
  batches = grain.MapDataset.range(start_step, max(start_step, steps)).map(read)
  reading = grain.ReadOptions(threads, prefetch_buffer_size=max(AHEAD, threads))
  stream = batches.to_iter_dataset(reading)
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain's worker options are absl flags.
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers)
    stream = stream.mp_prefetch(options, worker_init_fn=_start_worker)
  return Loader(iter(stream), source, start_step, max_bad)


def _start_worker(index: int, count: int) -> None:
  """Begins a reading process; it would outlive a trainer that is killed."""
  del index, count
  workers.end_with_parent()


def _whose(path: str, place: int) -> str:
  """Returns " (clip ID)" as the JSON beside a shard has it, nothing without one."""
  try:
    ids = json.loads(shards.sidecar(pathlib.Path(path)).read_text())["ids"]
    return f" (clip {ids[place]})"
  except (OSError, ValueError, KeyError, IndexError):
    return ""


def names(paths: Sequence[pathlib.Path]) -> dict[int, str]:
  """Returns the names of clips by `schema.clip_id`, from the sidecars that can be read."""
  found: dict[int, str] = {}
  for path in paths:
    with contextlib.suppress(OSError, ValueError, KeyError):
      ids = json.loads(shards.sidecar(path).read_text())["ids"]
      found |= {schema.clip_id(name): name for name in ids}
  return found


def _dtypes(
  fields: Mapping[str, str],
  layouts: Mapping[str, Mapping[str, tf_example.Tensor]],
  tables: Mapping[str, captions.Table],
  mirror: bool,
) -> dict[str, str]:
  """Returns the dtype of each field of a batch: float32, unless all folders store one narrower."""
  dtypes = {}
  for wanted, name in fields.items():
    field = wanted.removesuffix("_mirror")
    twins = {wanted, *((field, MIRRORED.get(field, field)) if mirror else ())}
    found = {
      have[twin].dtype if twin in have else tables[folder].tensor.dtype
      for folder, have in layouts.items()
      for twin in twins
    }
    narrow = len(found) == 1 and found <= {*schema.SHORT}
    dtypes[name] = found.pop() if narrow else "float32"
  return dtypes


def _straight(
  fields: Mapping[str, str],
  layouts: Mapping[str, Mapping[str, tf_example.Tensor]],
  dtypes: Mapping[str, str],
) -> dict[str, dict[str, str]]:
  """Returns the fields of each folder that are stored as a batch has them: their names there."""
  return {
    folder: {
      field: name
      for field, name in fields.items()
      if field in have and have[field].dtype == dtypes[name]
    }
    for folder, have in layouts.items()
  }


def _check_layouts(
  folders: Mapping[str, str],
  layouts: Mapping[str, Mapping[str, tf_example.Tensor]],
  tables: Mapping[str, captions.Table],
  wanted: dict[str, tuple[int, ...] | None],
  mirror: bool,
) -> None:
  """Compares the layout of each folder with the run's, or with the first folder's."""
  for folder, path in folders.items():
    have = dict(layouts[folder])
    if folder in tables:
      have[captions.FIELD] = tables[folder].tensor
    for field in ["id", *wanted]:
      if field not in have:
        raise UserError(f"{path}: field {field} is missing, the records have {sorted(have)}")
    for field, shape in wanted.items():
      wanted[field] = shape = schema.shape_of(have[field]) if shape is None else tuple(shape)
      for stored in [field, *([MIRRORED[field]] if mirror and field in MIRRORED else [])]:
        if stored not in have:
          raise UserError(f"{path}: field {stored} is missing, which mirror needs; encode with it")
        if (found := schema.shape_of(have[stored])) != shape:
          raise UserError(
            f"{path}: field {stored} is {list(found)}, this run needs {list(shape)};"
            " encode with the same duration, audio rate and encoders"
          )
