"""Is a build fit for release? Statistics beside the paper's, and checks that fail with a reason.

The first pass reads every record of `raw/` and takes the cues that it stores; what must be heard
again, or compared with the videos, is done on a sample of clips drawn by seed. A band that holds
for a corpus is widened by two standard errors, so that a small build fails for what it is, not for
being small. What cannot be judged (no scores, nothing located, no videos) is named as skipped.

Axes: n clip, e ear (0 left, 1 right), p audio sample, v frame at 8 fps, w window, k cue.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import soxr

from data import filters, layout, shards, stages, tf_example, tfrecord
from spatialv2a_jax import io, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import alignment, analysis, stats

KEPT, KEPT_BAND = 0.94, 0.02
MOST_SHIFT = 0.1  # Of mean scores by filtering: more would be another data set.
LEAST_SIDE, FRONTAL_DEG = 0.01, 5.0
ILD_BAND_DB, BALANCE = 0.2, (0.45, 0.55)
LEAST_R, MOST_ITD_US, LEAST_MID = 0.5, 800.0, 0.9
MID_LAG_S = 0.005
DIRECT = ("sphere", "sofa")  # Spatializers that keep what a head does to a source.

# Name, unit, what it is computed from, and the published value for BinauralVGGSound
# (arXiv 2601.15017), which comes without units or windows: the likeliest variants stand beside it.
STATISTICS = (
  ("CE", "score", "aes", 3.74),
  ("CU", "score", "aes", 5.44),
  ("PC", "score", "aes", None),
  ("PQ", "score", "aes", 6.09),
  ("iacc_clip", "correlation", "cues", 0.93),
  ("ild_tf_db", "dB", "cues", 3.08),
  ("ild_frame_db", "dB", "cues", None),
  ("itd_xc_frame_samples", "samples at 16 kHz", "cues", 1.70),
  ("itd_phat_frame_us", "us", "cues", None),
  ("isd_l1", "share", "cues", 0.07),
  ("ipd_tf_rad", "rad", "cues", 0.32),
  ("ipd_100_1500_w_rad", "rad", "cues", None),
)


@dataclasses.dataclass(frozen=True)
class Check:
  """One condition of a release; `passed` is None where it could not be judged."""

  name: str
  passed: bool | None
  found: str


@dataclasses.dataclass(frozen=True)
class Clips:
  """What the records of a build say, one row or entry per clip.

  Attributes:
    ids: of the clips.
    places: split and number of each record in it.
    cues_nk, aes_nk: as stored.
    peak_n: largest absolute 16-bit sample.
    frontal_n: straight ahead all the time, or never located.
    direct_n: rendered straight from a head's responses to where something was located.
  """

  ids: list[str]
  places: list[tuple[str, int]]
  cues_nk: np.ndarray
  aes_nk: np.ndarray
  peak_n: np.ndarray
  frontal_n: np.ndarray
  direct_n: np.ndarray

  def cue(self, name: str) -> np.ndarray:
    """Returns one cue of all clips."""
    return self.cues_nk[:, stages.CUES.index(name)].astype(np.float64)


class Build:
  """The finished `raw/` of a build, with random access to its records."""

  def __init__(self, folder: str | pathlib.Path):
    """Opens it.

    Raises:
      UserError: not a build, or not a finished one.
    """
    self.folder = pathlib.Path(folder)
    self.raw = self.folder / "raw"
    self.splits = list(shards.splits(self.raw))
    self._sources = {
      split: tfrecord.TFRecordSource(shards.paths(self.raw, split)) for split in self.splits
    }
    self._fields = layout.read_features(self.raw)
    missing = {"audio", "cues", "azimuth", "video"} - self._fields.keys()
    if missing:
      raise UserError(f"{self.raw}: its records have no {sorted(missing)}; build with vggsound")
    self.manifest = json.loads((self.raw / "manifest.json").read_text())
    self.rate = schema.AUDIO[self.manifest["config"]["audio"]].sample_rate
    self.funnel = layout.read_json(self.folder / "funnel.json")

  def __len__(self) -> int:
    return sum(len(source) for source in self._sources.values())

  def record(self, place: tuple[str, int]) -> dict[str, Any]:
    """Returns the fields of a record; UserError if it is damaged."""
    raw = tf_example.decode(self._sources[place[0]][place[1]])
    return {name: tf_example.value_of(raw[name], self._fields[name]) for name in raw}

  def clips(self, advance: Callable[[], None] = lambda: None) -> Clips:
    """Reads every record once; `advance` is called after each."""
    places = [(split, i) for split, source in self._sources.items() for i in range(len(source))]
    rows = []
    for place in places:
      record = self.record(place)
      located_v = record["located"] > 0
      frontal = not located_v.any() or float(np.abs(record["azimuth"]).max()) <= FRONTAL_DEG
      direct = located_v.any() and record["spatializer"].partition(":")[0] in DIRECT
      peak = int(np.abs(record["audio"].astype(np.int32)).max(initial=0))
      rows.append((record["id"], record["cues"], record["aes"], peak, frontal, direct))
      advance()
    ids, cues, aes, peak, frontal, direct = zip(*rows, strict=True)
    return Clips(
      list(ids), places, np.array(cues), np.array(aes), np.array(peak), np.array(frontal),
      np.array(direct, bool),
    )  # fmt: skip

  def sound(self, record: Mapping[str, Any]) -> np.ndarray:
    """Returns both ears [2, p] at 16 kHz."""
    audio_ep = schema.as_float32(record["audio"])
    if self.rate == analysis.RATE:
      return audio_ep
    return soxr.resample(audio_ep.T, self.rate, analysis.RATE).T


def statistics(clips: Clips) -> list[dict[str, Any]]:
  """Returns mean, median and 5 and 95 % points of scores and cues, beside the paper's values."""
  rows = []
  for name, unit, source, published in STATISTICS:
    names, table_nk = (filters.AXES, clips.aes_nk) if source == "aes" else (
      stages.CUES, clips.cues_nk
    )  # fmt: skip
    value_n = table_nk[:, names.index(name)].astype(np.float64)
    known_n = value_n[np.isfinite(value_n)]
    points = np.percentile(known_n, (5, 50, 95)) if len(known_n) else np.full(3, np.nan)
    mean = float(known_n.mean()) if len(known_n) else math.nan
    low, middle, high = (float(point) for point in points)
    rows.append(
      {"name": name, "unit": unit, "mean": mean, "median": middle, "low": low, "high": high,
       "undefined": len(value_n) - len(known_n), "published": published}
    )  # fmt: skip
  return rows


def sample(clips: Clips, seed: int, most: int) -> list[int]:
  """Returns which clips are heard again: at most `most`, drawn by seed."""
  count = min(most, len(clips.ids))
  return sorted(np.random.default_rng(seed).choice(len(clips.ids), count, replace=False).tolist())


def checks(
  build: Build,
  clips: Clips,
  chosen: Sequence[int],
  videos: pathlib.Path | None,
  twin: pathlib.Path | None,
  advance: Callable[[], None] = lambda: None,
) -> list[Check]:
  """Returns the conditions of a release.

  Args:
    build: the build.
    clips: what its records say.
    chosen: clips that are heard again, from `sample`.
    videos: folder of the videos, to compare with their sound; or None.
    twin: a second build of the same videos and settings, to compare shards with; or None.
    advance: called after each clip of `chosen`.
  """
  right, swapped, mids = [], [], []
  for n in chosen:
    record = build.record(clips.places[n])
    if clips.direct_n[n]:
      audio_ep = build.sound(record)
      right.append(_followed(audio_ep, record["azimuth"]))
      swapped.append(_followed(audio_ep[::-1], record["azimuth"]))
    if videos is not None and record["spatializer"] != "recorded":
      there = (videos / record["video"]).is_file()
      mids.append(_kept_of_source(build, record, videos) if there else math.nan)
    advance()
  return [
    _kept(build.funnel),
    _shift(build, clips),
    _sides(clips),
    *_balance(clips),
    *_follows(right, swapped),
    _delays(clips),
    _levels(clips),
    _middle(mids, videos),
    _intact(build),
    _same(build, twin),
  ]


def _kept(funnel: Mapping[str, Any]) -> Check:
  name = f"{KEPT - KEPT_BAND:.0%} to {KEPT + KEPT_BAND:.0%} of the listed files are kept"
  files = funnel.get("files", 0) - funnel.get("dropped", {}).get("unlisted", 0)
  if not files:
    return Check(name, None, "no funnel.json, or no files in it")
  share, error = funnel["kept"] / files, math.sqrt(KEPT * (1 - KEPT) / files)
  passed = abs(share - KEPT) <= KEPT_BAND + 2 * error
  return Check(name, passed, f"{funnel['kept']} of {files}, {share:.1%}")


def _shift(build: Build, clips: Clips) -> Check:
  """Scores of all judged clips are in the summaries of the slices, those kept in the records."""
  name = f"filtering raises the mean scores, by less than {MOST_SHIFT}"
  used = [axis for axis in filters.AXES if axis != "PC"]
  paths = sorted((build.folder / "slices").glob("*/summary.json"))
  sums = [layout.read_json(path).get("scores", {}) for path in paths]
  shifts = {}
  for axis in used:
    total, count = (sum(one.get(axis, (0, 0))[i] for one in sums) for i in (0, 1))
    kept_n = clips.aes_nk[:, filters.AXES.index(axis)].astype(np.float64)
    if not count or not np.isfinite(kept_n).any():
      return Check(name, None, "the scores of the clips are not known")
    shifts[axis] = float(np.nanmean(kept_n)) - total / count
  found = ", ".join(f"{axis} {shift:+.3f}" for axis, shift in shifts.items())
  least = -1e-6  # Records hold scores as float32.
  return Check(name, all(least <= shift < MOST_SHIFT for shift in shifts.values()), found)


def _sides(clips: Clips) -> Check:
  name = f"|L - R| is {LEAST_SIDE} of the sound or more, unless it comes from straight ahead"
  side_n = np.sqrt(clips.cue("side_energy_ratio"))
  wrong = [clips.ids[n] for n in np.flatnonzero((side_n < LEAST_SIDE) & ~clips.frontal_n)]
  return Check(name, not wrong, f"{len(wrong)} clips are mono{_named(wrong)}")


def _balance(clips: Clips) -> Iterator[Check]:
  ild_n = clips.cue("ild_clip_db")
  ild_n = ild_n[np.isfinite(ild_n)]
  name = f"mean level difference within {ILD_BAND_DB} dB of 0"
  if len(ild_n) < 2:
    yield Check(name, None, f"{len(ild_n)} clips")
    return
  mean, error = float(ild_n.mean()), float(ild_n.std(ddof=1)) / math.sqrt(len(ild_n))
  yield Check(name, abs(mean) <= ILD_BAND_DB + 2 * error, f"{mean:+.2f} dB (error {error:.2f})")
  name = f"{BALANCE[0]:.0%} to {BALANCE[1]:.0%} of the clips are louder on the left"
  aside_n = ild_n[np.abs(ild_n) > ILD_BAND_DB]
  if not len(aside_n):
    yield Check(name, None, "no clip is louder on one side")
    return
  share, error = float(np.mean(aside_n > 0)), 0.5 / math.sqrt(len(aside_n))
  passed = BALANCE[0] - 2 * error <= share <= BALANCE[1] + 2 * error
  yield Check(name, passed, f"{share:.1%} of {len(aside_n)}")


def _follows(right: Sequence[np.ndarray], swapped: Sequence[np.ndarray]) -> Iterator[Check]:
  names = (
    f"the side that is heard correlates with the picture's, r > {LEAST_R}",
    f"with the ears swapped r < -{LEAST_R}",
  )
  for name, parts, sign in zip(names, (right, swapped), (1, -1), strict=True):
    metric = stats.Metric("1", "higher", "pearson")
    r = float(stats.pooled(metric, parts, np.ones((1, len(parts))))[0]) if parts else math.nan
    judged = math.isfinite(r)
    found = f"r = {r:+.2f} in {len(parts)} clips" if judged else "no rendered clip moves"
    yield Check(name, sign * r > LEAST_R if judged else None, found)


def _delays(clips: Clips) -> Check:
  name = f"delays of 99 % of the clips are {MOST_ITD_US:g} us or less"
  itd_n = clips.cue("itd_phat_frame_us")
  itd_n = np.abs(itd_n[np.isfinite(itd_n)])
  if not len(itd_n):
    return Check(name, None, "no clip has a delay to speak of")
  share = float(np.mean(itd_n <= MOST_ITD_US))
  return Check(
    name, share >= 0.99, f"{share:.1%} of {len(itd_n)}, the largest {itd_n.max():.0f} us"
  )


def _levels(clips: Clips) -> Check:
  name = "both ears within full scale, and levels defined"
  loud = [clips.ids[n] for n in np.flatnonzero(clips.peak_n > 32767)]
  lost = [clips.ids[n] for n in np.flatnonzero(~np.isfinite(clips.cue("ild_clip_db")))]
  found = f"{len(loud)} clips clip{_named(loud)}, {len(lost)} have no level{_named(lost)}"
  return Check(name, not loud and not lost, found)


def _middle(mids: Sequence[float], videos: pathlib.Path | None) -> Check:
  name = f"the middle of both ears correlates with the source, median r > {LEAST_MID}"
  if videos is None or not mids:
    why = "give --videos" if videos is None else "no rendered clip"
    return Check(name, None, why)
  known = [mid for mid in mids if not math.isnan(mid)]
  gone = f"; {len(mids) - len(known)} videos are gone" if len(known) < len(mids) else ""
  if not known:
    return Check(name, None, f"{videos} has none of the videos")
  middle = float(np.median(known))
  return Check(name, middle > LEAST_MID, f"r = {middle:.3f}, the least {min(known):.3f}{gone}")


def _intact(build: Build) -> Check:
  wrong = [
    shard["file"]
    for shard in build.manifest["shards"]
    if io.file_hash(build.raw / shard["file"]) != shard["sha256"]
  ]
  found = f"{len(wrong)} of {len(build.manifest['shards'])} shards differ{_named(wrong)}"
  return Check("shards have the checksums of the manifest", not wrong, found)


def _same(build: Build, twin: pathlib.Path | None) -> Check:
  name = "a second build of the same settings has the same checksums"
  if twin is None:
    return Check(name, None, "give --twin")
  other = Build(twin).manifest
  if other["config"] != build.manifest["config"]:
    return Check(name, False, f"{twin} was built with other settings")
  hashes = [{s["file"]: s["sha256"] for s in m["shards"]} for m in (build.manifest, other)]
  wrong = sorted(f for f in {*hashes[0], *hashes[1]} if hashes[0].get(f) != hashes[1].get(f))
  return Check(name, not wrong, f"{len(wrong)} shards differ{_named(wrong)}")


def _followed(audio_ep: np.ndarray, azimuth_v: np.ndarray) -> np.ndarray:
  """Returns the parts of a correlation of level difference and picture over windows."""
  heard = alignment.listen(analysis.analyse(audio_ep))
  seconds = audio_ep.shape[1] / analysis.RATE
  # A frame tells of its middle, a truth of its beginning: at twice the rate there is one at each.
  half_v = np.arange(2 * len(azimuth_v)) / 2 - 0.5
  track_v = np.interp(half_v, np.arange(len(azimuth_v)), azimuth_v.astype(np.float64))
  truth = alignment.Truth(seconds, 2 * schema.CLIP_FPS, track_v, np.zeros(0))
  true_w, sounds_w = alignment.window_truth(truth, len(heard.active_w))
  used_w = sounds_w & heard.active_w
  return stats.moments(heard.ild_db_w[used_w], true_w[used_w])


def _kept_of_source(build: Build, record: Mapping[str, Any], videos: pathlib.Path) -> float:
  """Returns the largest normalised correlation of the ears' mean with the file's own sound."""
  seconds = record["audio"].shape[1] / build.rate
  source_ep = io.read_audio(videos / record["video"], build.rate, duration=seconds)
  source_p = filters.mono(source_ep, record["layout"]).astype(np.float64)
  mid_p = schema.as_float32(record["audio"]).mean(0).astype(np.float64)[: len(source_p)]
  size = 2 * len(mid_p)
  product_f = np.fft.rfft(mid_p, size) * np.conj(np.fft.rfft(source_p[: len(mid_p)], size))
  lags_p = np.fft.irfft(product_f, size)
  most = round(MID_LAG_S * build.rate)
  energy = math.sqrt(float((mid_p**2).sum() * (source_p**2).sum()))
  return float(max(lags_p[: most + 1].max(), lags_p[-most:].max()) / energy) if energy else 0.0


def _named(names: Sequence[str]) -> str:
  return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
