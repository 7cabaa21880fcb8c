"""A build as a Beam pipeline: slices go out, shards are written where the work is done.

    Create(slices) | ParDo(make the shard of a slice)

A slice is the description of up to two hundred clips; nothing else travels between workers, and
nothing is grouped: each slice is one shard already. `Create` spreads the slices. The shards have
the bytes that any other way of running gives them. `--out` and `--videos` are folders that all
workers see (a mounted bucket on Dataflow); they import `data` and `spatialv2a_jax` from the image
or the `setup_file` that the runner's options name.

    --beam DirectRunner --beam-option direct_num_workers=4 \
        --beam-option direct_running_mode=multi_processing
    --beam FlinkRunner --beam-option flink_master=HOST:8081 --beam-option environment_type=LOOPBACK
    --beam SparkRunner --beam-option spark_master_url=spark://HOST:7077
    --beam DataflowRunner --beam-option project=P --beam-option region=R \
        --beam-option temp_location=gs://B/tmp --beam-option sdk_container_image=IMAGE
"""

from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
  PipelineOptions,
)

from data import shards


class MakeShard(beam.DoFn):
  """Writes the shard of a slice and returns how many records it has."""

  def __init__(self, make: shards.Maker):
    self.make = make

  def setup(self) -> None:
    """Loads heads and networks once per worker, not once per slice."""
    prepare = getattr(self.make, "setup", None)
    if prepare:
      prepare()

  def process(self, element: shards.Job) -> Iterable[int]:
    """Makes one shard, unless it is there."""
    yield shards.make_shard(element, self.make)["records"]


def runner(name: str, options: Sequence[str] = ()) -> shards.Runner:
  """Returns what `shards.build` takes as its runner.

  Args:
    name: of a Beam runner, such as "DirectRunner".
    options: pipeline options, "KEY=VALUE" or "FLAG".
  """
  flags = [f"--runner={name}", *(f"--{option}" for option in options)]

  def run(work: Sequence[shards.Job], make: shards.Maker) -> Iterable[dict[str, Any]]:
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
      slices = pipeline | "slices" >> beam.Create(list(work))
      _ = slices | "shards" >> beam.ParDo(MakeShard(make))
    return ()  # The sidecars of the shards say what was made.

  return run
