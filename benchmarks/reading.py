"""Times reading of training records: random TFRecord, sequential TFRecord, ArrayRecord, by Grain.

Run: python -m benchmarks.reading [--folder DIR] [--records 256] [--rounds 5]
Writes the same records of about 0.6 MB (those of the full-size encoders at 8 s) in each format,
then times all readers in turn, round after round, so that a drift of the machine meets all alike;
the first round, which brings the files into the cache, does not count. Readers of Grain run on;
before each timing they are advanced until what they had read ahead meanwhile is gone.
"""

import argparse
import functools
import os
import pathlib
import platform
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from array_record.python import (
  array_record_data_source,
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
)

from data import pipeline, shards, tfrecord

SHARDS, BATCH, THREADS = 8, 16, 4
WORKERS = (0, 1, 2)
Pull = Callable[[int], None]  # Reads that many records.
Start = Callable[[int], Iterator[Any]]  # Of batches, by so many workers.


def record(item: shards.Item) -> shards.Record:
  """Returns noise with the fields of an 8 s clip: features in 16 bits, means in 32."""
  rng = np.random.default_rng(item.payload)

  def noise(dtype, *shape):
    return rng.standard_normal(shape, np.float32).astype(dtype)

  return {
    "clip": noise("bfloat16", 64, 1024),
    "sync": noise("bfloat16", 192, 768),
    "text": noise("bfloat16", 77, 1024),
    "spatial": noise("float32", 64, 5),
    "mean": noise("float32", 2, 250, 20),
    "std": noise("bfloat16", 2, 250, 20),
  }


def write(folder: pathlib.Path, records: int) -> dict[str, list[pathlib.Path]]:
  """Writes the shards of each format and returns their paths."""
  items = [shards.Item(f"clip{i:05d}", i) for i in range(records)]
  shards.build(items, record, folder, shards=SHARDS, config={})
  paths = {"tfrecord": shards.paths(folder)}
  for name, options in (("plain", "group_size:1,uncompressed"), ("default", "group_size:1")):
    paths[name] = [path.with_name(f"{name}-{path.name}") for path in paths["tfrecord"]]
    for source, target in zip(paths["tfrecord"], paths[name], strict=True):
      writer = array_record_module.ArrayRecordWriter(str(target), options)
      for payload in sequential([source]):
        writer.write(payload)
      writer.close()
  return paths


def sequential(paths: Sequence[pathlib.Path]) -> Iterator[bytes]:
  """Reads TFRecord shards from end to end, verifying both checksums."""
  for path in paths:
    with open(path, "rb") as file:
      while header := file.read(tfrecord.HEADER):
        (length,) = struct.unpack("<Q", header[:8])
        payload = file.read(length)
        footer = file.read(tfrecord.FOOTER)
        good = tfrecord.masked_crc(payload) == footer
        if not good or tfrecord.masked_crc(header[:8]) != header[8:]:
          raise ValueError(f"{path} is damaged")
        yield payload


def bare(paths: dict[str, list[pathlib.Path]]) -> dict[str, Pull]:
  """Readers without Grain, in one thread; they read all records."""
  source = tfrecord.TFRecordSource(paths["tfrecord"])
  array = array_record_data_source.ArrayRecordDataSource(list(map(str, paths["plain"])))
  rng = np.random.default_rng(0)

  def in_order(records: int) -> None:
    assert sum(1 for _ in sequential(paths["tfrecord"])) == records

  def at_random(data: Any, records: int) -> None:
    for place in rng.permutation(records).tolist():
      data[place]

  return {
    "TFRecord, sequential": in_order,
    "TFRecord, random": functools.partial(at_random, source),
    "ArrayRecord, random": functools.partial(at_random, array),
  }


def with_grain(paths: dict[str, list[pathlib.Path]]) -> dict[str, Start]:
  """Grain pipelines that batch raw records, and ours, as functions of the number of workers."""

  def randomly(source: Any, workers: int) -> Iterator[Any]:
    order = grain.MapDataset.source(source).seed(0).shuffle().repeat()
    stream = order.map(_bytes).batch(BATCH).to_iter_dataset(_threads())
    return _spread(stream, workers)

  def in_order(workers: int) -> Iterator[Any]:
    files = grain.MapDataset.source(list(map(str, paths["tfrecord"]))).repeat()
    each: Any = files.map(grain.experimental.TFRecordIterDataset)
    stream = grain.experimental.InterleaveIterDataset(each, cycle_length=1)
    return _spread(stream.map(_bytes).batch(BATCH), workers)

  def ours(workers: int) -> Iterator[Any]:
    options: dict[str, Any] = {"batch_size": BATCH, "seed": 0}
    return pipeline.loader(paths["tfrecord"], workers=workers, **options)

  def array(name: str) -> Start:
    source = array_record_data_source.ArrayRecordDataSource(list(map(str, paths[name])))
    return functools.partial(randomly, source)

  return {
    "TFRecord, sequential, no checksums": in_order,
    "TFRecord, random": functools.partial(randomly, tfrecord.TFRecordSource(paths["tfrecord"])),
    "ArrayRecord, random": array("plain"),
    "ArrayRecord as by default (zstd), random": array("default"),
    "training batches: random, parsed": ours,
  }


def _bytes(payload: bytes) -> np.ndarray:
  return np.frombuffer(payload, np.uint8)


def _threads() -> grain.ReadOptions:
  return grain.ReadOptions(THREADS, prefetch_buffer_size=THREADS)


def _spread(stream: grain.IterDataset, workers: int) -> Iterator[Any]:
  if workers:
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return iter(stream)


def _pull(batches: Iterator[Any], records: int) -> None:
  for _ in range(records // BATCH):
    next(batches)


def measure(readers: dict[Any, Pull], records: int, rounds: int) -> dict[Any, list[float]]:
  """Returns the seconds that each reader took for `records` records, in each round but the first.

  The first brings files into the cache and readers to their pace.
  """
  ahead = BATCH * (THREADS + 2 * max(WORKERS))  # What may have been read before the clock starts.
  times: dict[Any, list[float]] = {name: [] for name in readers}
  for _ in range(rounds + 1):
    for name, pull in readers.items():
      if name[1] is not None:
        pull(ahead)
      began = time.perf_counter()
      pull(records)
      times[name].append(time.perf_counter() - began)
  return {name: seconds[1:] for name, seconds in times.items()}


def main() -> None:
  """Prints the tables."""
  p = argparse.ArgumentParser(description="Times reading of training records.")
  p.add_argument("--folder", help="where to write the files; default: the temporary folder")
  p.add_argument("--records", type=int, default=256, help="a multiple of 16")
  p.add_argument("--rounds", type=int, default=5)
  args = p.parse_args()
  flags.FLAGS.mark_as_parsed()  # Grain's worker options are absl flags.
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    paths = write(pathlib.Path(folder), args.records)
    size = sum(path.stat().st_size for path in paths["tfrecord"]) / args.records
    readers: dict[Any, Pull] = {(name, None): pull for name, pull in bare(paths).items()}
    started = []
    try:
      for name, start in with_grain(paths).items():
        for workers in WORKERS:
          started.append(start(workers))
          readers[name, workers] = functools.partial(_pull, started[-1])
      times = measure(readers, args.records, args.rounds)
    finally:
      for batches in started:
        batches.close()  # Ends the workers.
  _print(times, args.records, size)


def _print(times: dict[Any, list[float]], records: int, size: float) -> None:
  def rate(seconds: float) -> str:
    return f"{records / seconds:6.0f} ({records * size / seconds / 1e9:.2f} GB/s)"

  print(
    f"{os.cpu_count()}-core {platform.machine()} CPU, {records} records of {size / 1e6:.2f} MB,"
    f" cached; records per second, median of {len(next(iter(times.values())))} rounds\n"
  )
  print("| one thread, no Grain | |\n|---|---|")
  middle = {name: statistics.median(seconds) for name, seconds in times.items()}
  for (name, workers), seconds in middle.items():
    if workers is None:
      print(f"| {name} | {rate(seconds)} |")
  print(f"\n| Grain, batches of {BATCH} | 0 workers | 1 worker | 2 workers |\n|---|---|---|---|")
  for name in dict.fromkeys(name for name, workers in times if workers is not None):
    print(f"| {name} | " + " | ".join(rate(middle[name, workers]) for workers in WORKERS) + " |")
  ratios = [
    one / other
    for one, other in zip(
      times["TFRecord, random", None], times["TFRecord, sequential", None], strict=True
    )
  ]
  print(
    f"\nrandom / sequential TFRecord, both with checksums: {statistics.median(ratios):.2f} times"
    f" the seconds ({min(ratios):.2f} to {max(ratios):.2f})",
    flush=True,
  )


if __name__ == "__main__":
  main()
