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
    summary.json   processor seconds and clips of each stage; sums of the scores of all clips that
      were judged; how many clips each way of placing sound and each layout of channels had
  coverage.json     the list of ids against the folder of videos: missing, unlisted, duplicates,
                    links that lead nowhere
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
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import soxr
import threadpoolctl

from data import catalogue, filters, findings, layout, localise, quality, shards, spatialise
from data.findings import Clock, Job, Run
from spatialv2a_jax import errors, io, localizers, schema
from spatialv2a_jax.metrics import analysis
from spatialv2a_jax.metrics import spatial as metrics

NAME = "binaural_vggsound"
SCHEMA_VERSION = 2
CUES = (
  "iacc_clip", "ild_clip_db", "ild_frame_db", "ild_tf_db", "itd_phat_frame_us",
  "itd_xc_frame_samples", "ipd_100_1500_w_rad", "ipd_tf_rad", "isd_l1", "side_energy_ratio",
)  # fmt: skip
READ_AHEAD = 4  # Clips that are decoded while a network looks at others.
UNKNOWN = ("aes", "cues", "correlation", "agreement")  # Fields in which NaN stands for unknown.


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that a record depends on besides its file.

  Attributes:
    limits: what drops a clip, and its length.
    audio: "16k" or "44k", the rate of the stored sound.
    localizer: where a picture sounds, as for `localise.load`.
    parts: model folder of the networks of that localizer.
    spatializer: how sound is placed.
    keep_stereo: leave true two-channel recordings alone.
  """

  limits: filters.Limits = filters.Limits()
  audio: str = "16k"
  localizer: str = "motion"
  parts: str = ""
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
    """Returns the settings as plain values, with the identity of the head and the networks."""
    place = spatialise.Placer(self.spatializer, self.sample_rate)
    values = json.loads(json.dumps(dataclasses.asdict(self)))
    del values["parts"]
    return {
      **values,
      **localise.load(self.localizer, self.parts).identity,
      "spatializer": place.label,
      "hrtf": place.hash,
      "schema_version": SCHEMA_VERSION,
    }


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
    self._locator().load()
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
    settings, locate, place = self.settings, self._locator(), self._placer()
    clock = Clock(threads=locate.prompted or place.network is not None)
    folder = self.folder / chosen[0].payload.slice_name
    limits, seconds = settings.limits, settings.limits.seconds
    jobs = [item.payload for item in chosen]
    run = Run(folder, clock)
    length = {"seconds": seconds, "tolerance_s": limits.tolerance_s}
    probed = run.stage("probe", jobs, length, lambda job: filters.probe(job.clip.path, limits))
    probed |= {job.clip.id: {"drop": _UNLISTED} for job in jobs if not job.clip.listed}
    jobs = [job for job in jobs if "drop" not in probed[job.clip.id]]
    sound = {"sample_rate": settings.sample_rate, "seconds": seconds}
    sound["judge"] = self.judge.identity if self.judge else None
    heard = run.stage("filter", jobs, sound, self._measure)
    scores = [_scores(job, heard[job.clip.id]) for job in jobs]
    heard = {job.clip.id: _judged(job, heard[job.clip.id], limits) for job in jobs}
    jobs = [job for job in jobs if "drop" not in heard[job.clip.id]]
    prompts = {"prompts": [job.clip.label for job in jobs]} if locate.prompted else {}
    seen = run.two_steps(
      "localise",
      jobs,
      {**locate.identity, **prompts, "seconds": seconds},
      lambda job: locate.read(job.clip.path, seconds),
      lambda job, frames: locate.look(frames, seconds, job.clip.label),
      prepare=locate.load,
      ahead=READ_AHEAD if locate.prompted else 0,
    )
    counts = {field: collections.Counter() for field in ("spatializer", "layout")}
    for item in chosen:
      found = [stage.get(item.id, {}) for stage in (probed, heard, seen)]
      drop = next((one["drop"] for one in found if "drop" in one), None)
      if drop:
        yield filters.DropError(*drop)
        continue
      try:
        record = self._record(item.payload, found[1], found[2], place, clock)
      except Exception as error:
        errors.raise_of_machine(error)
        yield findings.drop_of(error, item.payload)
        continue
      for field, count in counts.items():
        count[str(record[field])] += 1
      with clock("shard"):  # What the caller does with it.
        yield record
    io.remove_leftovers(folder / "summary.json")
    summary = {"clips": clock.clips, "seconds": clock.seconds, "scores": _sums(scores), **counts}
    layout.write_json(folder / "summary.json", summary)

  def _placer(self) -> spatialise.Placer:
    settings = self.settings
    return _placer(settings.spatializer, settings.sample_rate, settings.keep_stereo)

  def _locator(self) -> localise.Locator:
    return _locator(self.settings.localizer, self.settings.parts)

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
    clock: Clock,
  ) -> shards.Record:
    settings = self.settings
    with clock("spatialise"):
      audio_ep = self._sound(job)[:, : settings.samples]
      audio_ep = np.pad(audio_ep, ((0, 0), (0, settings.samples - audio_ep.shape[1])))
      azimuth_v = localizers.smooth(seen["azimuth_deg"], seen["located"])
      placed = place(audio_ep, heard["layout"], azimuth_v, job.clip.path)
    with clock("encode"):
      scores = _scores(job, heard)
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


def cues(audio_ep: np.ndarray, sample_rate: int) -> list[float]:
  """Returns the interaural cues `CUES` of a clip; NaN where undefined."""
  if sample_rate != analysis.RATE:
    audio_ep = soxr.resample(audio_ep.T, sample_rate, analysis.RATE).T
  values = metrics.metrics(analysis.analyse(audio_ep))
  return [float(values[name]) for name in CUES]


_UNLISTED = ["unlisted", filters.REASONS["unlisted"][1]]
_placer = functools.lru_cache(maxsize=4)(spatialise.Placer)
_locator = functools.lru_cache(maxsize=4)(localise.load)


def _scores(job: Job, found: Mapping[str, Any]) -> dict[str, float]:
  """Returns the scores of a clip, as far as they are known; a list has the last word."""
  return {} if "drop" in found else {**found.get("scores", {}), **job.scores}


def _sums(scores: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
  """Returns of each axis the sum over the clips that have a score, and their number."""
  known = {axis: [one[axis] for one in scores if axis in one] for axis in filters.AXES}
  return {axis: [math.fsum(values), len(values)] for axis, values in known.items()}


def _judged(job: Job, found: dict[str, Any], limits: filters.Limits) -> dict[str, Any]:
  """Returns the findings, with the drop that the limits ask for."""
  if "drop" in found:
    return found
  try:
    filters.check(found, _scores(job, found), job.tags, limits)
  except filters.DropError as drop:
    return {**found, "drop": [drop.reason, drop.detail]}
  return found
