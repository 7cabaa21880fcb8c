"""From videos to binaural shards: probe, filter, localise, spatialise, encode, shard, audit.

A build is cut into slices: a clip belongs to slice `md5(id) mod n` of its split, and each slice
becomes one shard. Nothing crosses slices, so one worker, many processes, an array of batch jobs and
Beam write the same bytes. `Slice` takes the clips of one slice through the stages; every clip comes
out as a record or with exactly one reason for which it was dropped (`filters.REASONS`). The slow
stages leave a file each; a stage whose clips and settings are unchanged is read, not repeated.

The folder of a build:

  raw/       shards with both ears' sound: a tensorflow-datasets folder (`data.layout`)
    binaural_vggsound-SPLIT.tfrecord-00000-of-00016, with .index and .json (records, sha256, bad)
    features.json, dataset_info.json, stats.json ("bad": {id: "reason: detail"}), manifest.json
  clips/, latents/   the same clips encoded (`data.encode`), with --features
  slices/SPLIT-00000-of-00016/
    probe.json, filter.json, localise.json   {"key", "seconds", "found": {id: what the stage found,
      or "drop": [reason, detail]}}
    summary.json   processor seconds and clips of each stage; how many clips each way of placing
      sound and each layout of channels had
  coverage.json     the list of ids against the folder of videos: missing, unlisted, duplicates
  funnel.json       how many clips each reason dropped, and of the kept ones how many each way of
                    placing sound had; funnel.txt is the same as a table
  throughput.json   clips per second and core of each stage, and the slowest

A record of `raw` (v frames at 8 fps; NaN is unknown):

  id, caption, label, video (path below the folder of videos): text
  audio int16 [2, p]        left ear first
  azimuth float32 [v]       smoothed track in degrees, left positive; located uint8 [v]: 1 where
                            the localizer found something
  layout text               of the file's channels: mono, dual_mono, stereo, one_sided, antiphase,
                            surround; source_channels int32: their number
  spatializer text          what placed the sound; "recorded" where true stereo was kept
  hrtf text                 identity of the head or network, "" for recorded sound
  correlation, agreement float32   of the file's two channels; of their level with the picture
  silence, gain_db float32  share of silence; how far both ears were turned down
  aes float32 [4]           CE, CU, PC, PQ;  cues float32 [10]: `CUES` of the two ears
  schema_version int32
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import soxr
import threadpoolctl

from data import catalogue, filters, layout, quality, shards, spatialise
from spatialv2a_jax import io, schema
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.metrics import analysis
from spatialv2a_jax.metrics import spatial as metrics

NAME = "binaural_vggsound"
SCHEMA_VERSION = 1
CUES = (
  "iacc_clip", "ild_clip_db", "ild_frame_db", "ild_tf_db", "itd_phat_frame_us",
  "itd_xc_frame_samples", "ipd_100_1500_w_rad", "ipd_tf_rad", "isd_l1", "side_energy_ratio",
)  # fmt: skip
UNKNOWN = ("aes", "cues", "correlation", "agreement")  # Fields in which NaN stands for unknown.
STAGES = ("probe", "filter", "localise", "spatialise", "encode", "shard")

Findings = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that a record depends on besides its file.

  Attributes:
    limits: what drops a clip, and its length.
    audio: "16k" or "44k", the rate of the stored sound.
    localizer: where a picture sounds.
    spatializer: how sound is placed.
    keep_stereo: leave true two-channel recordings alone.
  """

  limits: filters.Limits = filters.Limits()
  audio: str = "16k"
  localizer: str = "motion"
  spatializer: str = "sphere"
  keep_stereo: bool = True

  @property
  def sample_rate(self) -> int:
    """Of the stored sound, Hz."""
    return schema.AUDIO[self.audio].sample_rate

  @property
  def samples(self) -> int:
    """Of a clip."""
    return round(self.limits.seconds * self.sample_rate)

  def config(self) -> dict[str, Any]:
    """Returns the settings as plain values, with the identity of the head or network."""
    place = spatialise.Placer(self.spatializer, self.sample_rate)
    return {
      **json.loads(json.dumps(dataclasses.asdict(self))),
      "spatializer": place.label,
      "hrtf": place.hash,
      "schema_version": SCHEMA_VERSION,
    }


@dataclasses.dataclass(frozen=True)
class Job:
  """What a slice has to know of one clip besides its file."""

  clip: catalogue.Clip
  slice_name: str
  scores: Mapping[str, float]
  tags: Mapping[str, float]


def items(
  known: catalogue.Catalogue,
  counts: Mapping[str, int],
  scores: Mapping[str, Mapping[str, float]],
  tags: Mapping[str, Mapping[str, float]],
) -> list[shards.Item]:
  """Returns the clips of a catalogue as items of `shards.build`."""
  made = []
  for clip in known.clips:
    count = counts[clip.split]
    name = f"{clip.split}-{catalogue.slice_of(clip.id, count):05d}-of-{count:05d}"
    job = Job(clip, name, scores.get(clip.id, {}), tags.get(clip.id, {}))
    about = [clip.stamp, clip.label, clip.listed, sorted(job.scores.items())]
    made.append(shards.Item(clip.id, job, str([*about, sorted(job.tags.items())]), clip.split))
  return made


@dataclasses.dataclass(frozen=True)
class Slice:
  """Makes the records of one slice, stage by stage; picklable.

  Attributes:
    folder: where the findings of the stages go.
    settings: of the build.
    judge: scores sound, or None.
  """

  folder: pathlib.Path
  settings: Settings
  judge: quality.Aesthetics | None = None

  def setup(self) -> None:
    """Loads what all slices share, once per process."""
    self._placer()
    if self.judge:
      self.judge.load()

  def __call__(self, chosen: Sequence[shards.Item]) -> Iterator[shards.Record | Exception]:
    """Yields for each item its record, or the DropError that ends its way."""
    if not chosen:
      return
    # One thread per process: the processes share the cores, and sums keep their order.
    with threadpoolctl.threadpool_limits(1):
      yield from self._records(chosen)

  def _records(self, chosen: Sequence[shards.Item]) -> Iterator[shards.Record | Exception]:
    settings, clock = self.settings, Clock()
    folder = self.folder / chosen[0].payload.slice_name
    limits, seconds = settings.limits, settings.limits.seconds
    jobs = [item.payload for item in chosen]
    run = Run(folder, clock)
    length = {"seconds": seconds, "tolerance_s": limits.tolerance_s}
    probed = run.stage("probe", jobs, length, lambda job: filters.probe(job.clip.path, limits))
    probed = {job.clip.id: _listed(job, probed[job.clip.id]) for job in jobs}
    jobs = [job for job in jobs if "drop" not in probed[job.clip.id]]
    sound = {"sample_rate": settings.sample_rate, "seconds": seconds}
    sound["judge"] = self.judge.identity if self.judge else None
    heard = run.stage("filter", jobs, sound, self._measure)
    heard = {job.clip.id: _judged(job, heard[job.clip.id], limits) for job in jobs}
    jobs = [job for job in jobs if "drop" not in heard[job.clip.id]]
    seen = run.stage(
      "localise",
      jobs,
      {"localizer": settings.localizer, "seconds": seconds},
      lambda job: spatialise.locate(job.clip.path, seconds, settings.localizer),
    )
    place = self._placer()
    counts = {field: collections.Counter() for field in ("spatializer", "layout")}
    for item in chosen:
      findings = [found.get(item.id, {}) for found in (probed, heard, seen)]
      drop = next((found["drop"] for found in findings if "drop" in found), None)
      if drop:
        yield filters.DropError(*drop)
        continue
      try:
        record = self._record(item.payload, findings[1], findings[2], place, clock)
      except MissingAssetError:
        raise
      except Exception as error:
        yield _drop_of(error, item.payload)
        continue
      for field, count in counts.items():
        count[str(record[field])] += 1
      with clock("shard"):  # What the caller does with it.
        yield record
    io.remove_leftovers(folder / "summary.json")
    summary = {"clips": clock.clips, "seconds": clock.seconds, **counts}
    layout.write_json(folder / "summary.json", summary)

  def _placer(self) -> spatialise.Placer:
    settings = self.settings
    return _placer(settings.spatializer, settings.sample_rate, settings.keep_stereo)

  def _measure(self, job: Job) -> dict[str, Any]:
    audio_ep = self._sound(job)
    found = filters.measure(audio_ep, self.settings.sample_rate)
    if self.judge and found["finite"]:
      mono_p = filters.mono(audio_ep, found["layout"])
      found["scores"] = self.judge(mono_p, self.settings.sample_rate)
    return found

  def _sound(self, job: Job) -> np.ndarray:
    return io.read_audio(
      job.clip.path, self.settings.sample_rate, duration=self.settings.limits.seconds
    )

  def _record(
    self,
    job: Job,
    heard: Mapping[str, Any],
    seen: Mapping[str, Any],
    place: spatialise.Placer,
    clock: "Clock",
  ) -> shards.Record:
    settings = self.settings
    with clock("spatialise"):
      audio_ep = self._sound(job)[:, : settings.samples]
      audio_ep = np.pad(audio_ep, ((0, 0), (0, settings.samples - audio_ep.shape[1])))
      azimuth_v = spatialise.smooth(seen["azimuth_deg"], seen["located"])
      placed = place(audio_ep, heard["layout"], azimuth_v, job.clip.path)
    with clock("encode"):
      scores = {**heard.get("scores", {}), **job.scores}
      values = cues(placed.audio_ep, settings.sample_rate)
      stored_ep = np.round(placed.audio_ep * 32768)
      correlation = heard["correlation"]
      return {
        "audio": np.clip(stored_ep, -32768, 32767).astype(np.int16),
        "caption": job.clip.label,
        "label": job.clip.label,
        "video": job.clip.name,
        "azimuth": azimuth_v.astype(np.float32),
        "located": np.array(seen["located"], np.uint8),
        "layout": heard["layout"],
        "source_channels": np.array(heard["channels"], np.int32),
        "correlation": np.array(math.nan if correlation is None else correlation, np.float32),
        "silence": np.array(heard["silence"], np.float32),
        "agreement": np.array(placed.agreement, np.float32),
        "aes": np.array([scores.get(axis, math.nan) for axis in filters.AXES], np.float32),
        "spatializer": placed.spatializer,
        "hrtf": placed.hrtf,
        "gain_db": np.array(placed.gain_db, np.float32),
        "cues": np.array(values, np.float32),
        "schema_version": np.array(SCHEMA_VERSION, np.int32),
      }


class Clock:
  """Processor seconds and clips of each stage."""

  def __init__(self):
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
    self.began = time.thread_time()

  def __exit__(self, *_: object) -> None:
    self.clock.seconds[self.stage] += time.thread_time() - self.began
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
    path = self.folder / f"{name}.json"
    stamps = [(job.clip.id, job.clip.stamp) for job in jobs]
    key = hashlib.sha256(json.dumps([stamps, config], sort_keys=True).encode()).hexdigest()
    known = _known(path, key)
    if known is not None:
      self.clock.seconds[name] += known["seconds"]
      self.clock.clips[name] += len(jobs)
      return known["found"]
    io.remove_leftovers(path)
    found: Findings = {}
    for job in jobs:
      with self.clock(name):
        try:
          found[job.clip.id] = work(job)
        except MissingAssetError:
          raise
        except Exception as error:
          drop = _drop_of(error, job)
          found[job.clip.id] = {"drop": [drop.reason, drop.detail]}
    content = {"key": key, "seconds": self.clock.seconds[name], "found": found}
    layout.write_json(path, content)
    return found


def cues(audio_ep: np.ndarray, sample_rate: int) -> list[float]:
  """Returns the interaural cues `CUES` of a clip; NaN where undefined."""
  if sample_rate != analysis.RATE:
    audio_ep = soxr.resample(audio_ep.T, sample_rate, analysis.RATE).T
  values = metrics.metrics(analysis.analyse(audio_ep))
  return [float(values[name]) for name in CUES]


_placer = functools.lru_cache(maxsize=4)(spatialise.Placer)


def _listed(job: Job, found: dict[str, Any]) -> dict[str, Any]:
  """Returns the findings, with a drop if the list has no such clip."""
  if "drop" in found or job.clip.listed:
    return found
  return {**found, "drop": ["unlisted", "the list of labels does not name it"]}


def _judged(job: Job, found: dict[str, Any], limits: filters.Limits) -> dict[str, Any]:
  """Returns the findings, with the drop that the limits ask for."""
  if "drop" in found:
    return found
  try:
    filters.check(found, {**found.get("scores", {}), **job.scores}, job.tags, limits)
  except filters.DropError as drop:
    return {**found, "drop": [drop.reason, drop.detail]}
  return found


def _drop_of(error: Exception, job: Job) -> filters.DropError:
  """Returns why a clip goes; its path below the folder of videos stands for the whole path."""
  if isinstance(error, filters.DropError):
    return error
  text = " ".join(str(error).replace(job.clip.path, job.clip.name).split())[:200]
  if isinstance(error, UserError):
    return filters.DropError("unreadable", text)
  return filters.DropError("failed", f"{type(error).__name__}: {text}")


def _known(path: pathlib.Path, key: str) -> dict[str, Any] | None:
  try:
    content = json.loads(path.read_text())
    return content if content["key"] == key else None
  except (OSError, ValueError, KeyError):
    return None
