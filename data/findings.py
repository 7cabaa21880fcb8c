"""What a stage finds of the clips of a slice, kept in a file, and what looking cost."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data import catalogue, encode, filters, layout
from spatialv2a_jax import errors, io
from spatialv2a_jax.errors import UserError

STAGES = ("probe", "filter", "localise", "spatialise", "encode", "shard")

Findings = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Job:
  """What a slice has to know of one clip besides its file."""

  clip: catalogue.Clip
  slice_name: str
  scores: Mapping[str, float]
  tags: Mapping[str, float]


class Clock:
  """Processor seconds and clips of each stage."""

  def __init__(self, threads: bool = False):
    """Starts at zero.

    Args:
      threads: count all threads of this process, as those of networks; else the caller's alone.
    """
    self.now = time.process_time if threads else time.thread_time
    self.seconds: dict[str, float] = {stage: 0.0 for stage in STAGES}
    self.clips: dict[str, int] = {stage: 0 for stage in STAGES}

  def __call__(self, stage: str) -> "_Lap":
    """Times a `with` block as one clip's way through a stage."""
    return _Lap(self, stage)


@dataclasses.dataclass
class _Lap:
  clock: Clock
  stage: str
  began: float = 0.0

  def __enter__(self) -> None:
    self.began = self.clock.now()

  def __exit__(self, *_: object) -> None:
    self.clock.seconds[self.stage] += self.clock.now() - self.began
    self.clock.clips[self.stage] += 1


@dataclasses.dataclass(frozen=True)
class Run:
  """The stages of one slice that leave a file."""

  folder: pathlib.Path
  clock: Clock

  def stage(
    self,
    name: str,
    jobs: Sequence[Job],
    config: Mapping[str, Any],
    work: Callable[[Job], dict[str, Any]],
  ) -> Findings:
    """Returns what `work` finds of each clip by id, {"drop": [reason, detail]} where it fails.

    Reads the stage's file instead if that has the same clips and settings.
    """
    return self.two_steps(name, jobs, config, lambda job: job, lambda job, _: work(job))

  def two_steps(
    self,
    name: str,
    jobs: Sequence[Job],
    config: Mapping[str, Any],
    read: Callable[[Job], Any],
    work: Callable[[Job, Any], dict[str, Any]],
    *,
    prepare: Callable[[], None] = lambda: None,
    ahead: int = 0,
  ) -> Findings:
    """Does the same with `work(clip, read(clip))`.

    Args:
      name: of the stage.
      jobs: the clips.
      config: plain values on which the findings depend besides the files.
      read: what takes no network.
      work: what may take one.
      prepare: called before the first clip, if one is looked at; its errors are no clip's fault.
      ahead: clips that threads read while `work` is at others; 0 reads in this thread.
    """
    path = self.folder / f"{name}.json"
    stamps = [(job.clip.id, job.clip.stamp) for job in jobs]
    key = hashlib.sha256(json.dumps([stamps, config], sort_keys=True).encode()).hexdigest()
    known = _known(path, key)
    if known is not None:
      self.clock.seconds[name] += known["seconds"]
      self.clock.clips[name] += len(jobs)
      return known["found"]
    io.remove_leftovers(path)
    if jobs:
      prepare()
    if ahead:
      given = (future.result for future in encode.ahead(read, jobs, ahead))
    else:
      given = (functools.partial(read, job) for job in jobs)
    found: Findings = {}
    for job in jobs:
      with self.clock(name):
        try:
          found[job.clip.id] = work(job, next(given)())
        except Exception as error:
          errors.raise_of_machine(error)
          drop = drop_of(error, job)
          found[job.clip.id] = {"drop": [drop.reason, drop.detail]}
    content = {"key": key, "seconds": self.clock.seconds[name], "found": found}
    layout.write_json(path, content)
    return found


def drop_of(error: Exception, job: Job) -> filters.DropError:
  """Returns why a clip goes; its path below the folder of videos stands for the whole path."""
  if isinstance(error, filters.DropError):
    return error
  text = " ".join(str(error).replace(job.clip.path, job.clip.name).split())[:200]
  if isinstance(error, UserError):
    return filters.DropError("unreadable", text)
  return filters.DropError("failed", f"{type(error).__name__}: {text}")


def _known(path: pathlib.Path, key: str) -> dict[str, Any] | None:
  content = layout.read_json(path)
  return content if content.get("key") == key else None
