"""Does the sound come from where and when the picture shows it? Agreement with visible truth.

Windows last 256 ms, 128 ms apart; one counts where both the truth has a source that sounds and the
prediction is active (rule of `analysis`, on windows). The true azimuth is folded to the lateral
angle -90..90 degrees, because two ears cannot tell front from back. The level
difference of a window is that above 1.5 kHz, where the head casts a shadow (duplex theory); with
all frequencies it depends on the sound as much as on its place, and is given as `_broadband`. The
audio azimuth of a window comes from the rigid-sphere head in two ways:
  ILD: level differences in ten bands from 250 Hz to 7.5 kHz against the sphere's, over lateral
       angles in steps of 1 degree; the angle of least squares, bands weighted by their level above
       -40 dB of the strongest (headline: levels survive a vocoder, phases may not)
  ITD: peak of GCC-PHAT averaged over the window, through the inverse of (a / c)(th + sin th)
Windows are pooled over clips, so that long clips weigh more; intervals still resample clips.

A score means little without its baselines: dual mono has sign agreement 0.5 (a tie counts half)
and no correlation; a clip paired with the truth of another one gives the chance level.

Axes: e ear, w window, v video frame, i rectangular frame, j STFT frame, f bin, r band, g angle.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import analysis as an
from spatialv2a_jax.metrics import onsets, spatial, stats
from spatialv2a_jax.metrics.stats import Metric
from spatialv2a_jax.spatial import hrtf

WINDOW, WINDOW_HOP = 4096, 2048
STRETCH = 480  # Windows that are transformed at once, a minute.
SHADOW_HZ = 1500.0  # Above it the head casts a shadow.
SIDE_DEG = 10.0  # Nearer to the middle, left and right are not asked for.
BAND_EDGES_HZ = np.geomspace(250, 7500, 11)

METRICS: dict[str, Metric] = {
  "sign_agreement": Metric("share", "higher", "ratio"),
  "sign_agreement_broadband": Metric("share", "higher", "ratio"),
  "sign_agreement_itd": Metric("share", "higher", "ratio"),
  "azimuth_pearson_r": Metric("1", "higher", "pearson"),
  "azimuth_pearson_r_broadband": Metric("1", "higher", "pearson"),
  "azimuth_pearson_r_itd": Metric("1", "higher", "pearson"),
  "azimuth_mae_deg": Metric("deg", "lower", "ratio"),
  "azimuth_mae_itd_deg": Metric("deg", "lower", "ratio"),
  "window_coverage": Metric("share", "higher", "ratio"),
  "onset_error_ms": Metric("ms", "lower", "median"),
  "onset_precision": Metric("share", "higher", "ratio"),
  "onset_recall": Metric("share", "higher", "ratio"),
  "onset_f1": Metric("share", "higher", "ratio"),
  "onset_false_alarms": Metric("per clip", "lower"),
}


_ODD = RecursionError, OverflowError  # Of JSON that is nested too deep, or of its numbers.


@dataclasses.dataclass(frozen=True)
class Truth:
  """What is visible in one clip.

  Attributes:
    seconds: length of the clip.
    fps: video frames per second.
    azimuth_v: direction of what sounds at each video frame, degrees, + left; NaN when silent.
    onsets_s: times at which sounds begin.
  """

  seconds: float
  fps: float
  azimuth_v: np.ndarray
  onsets_s: np.ndarray


@dataclasses.dataclass(frozen=True)
class Heard:
  """What the ears say about one clip, small enough to pass between processes.

  Attributes:
    active_w: windows loud enough to count.
    ild_db_w: level difference above 1.5 kHz.
    ild_broadband_db_w: level difference of all frequencies.
    itd_us_w: delay of the right ear; NaN where an ear is silent.
    azimuth_ild_w, azimuth_itd_w: lateral angles in degrees, + left.
    onsets_s: times at which sounds begin.
  """

  active_w: np.ndarray
  ild_db_w: np.ndarray
  ild_broadband_db_w: np.ndarray
  itd_us_w: np.ndarray
  azimuth_ild_w: np.ndarray
  azimuth_itd_w: np.ndarray
  onsets_s: np.ndarray


def read_truth(path: str | os.PathLike) -> Truth:
  """Reads the truth of a scene: `seconds`, `fps`, `azimuth_deg` and the sources' `onsets_s`.

  Raises:
    UserError: not JSON, or a key is missing or malformed.
  """
  try:
    with open(path, encoding="utf-8") as file:
      data = json.load(file)
    azimuth_v = np.array([np.nan if a is None else a for a in data["azimuth_deg"]], np.float64)
    times = [time for source in data["sources"] for time in source["onsets_s"]]
    truth = Truth(float(data["seconds"]), float(data["fps"]), azimuth_v, np.array(times, float))
  except (OSError, ValueError, LookupError, TypeError, AttributeError, *_ODD) as error:
    reason = f"no key {error}" if isinstance(error, KeyError) else error
    raise UserError(f"{path} is not the truth of a scene: {reason}") from None
  if azimuth_v.ndim != 1 or not len(azimuth_v) or np.isinf(azimuth_v).any():
    raise UserError(f"{path} is not the truth of a scene: azimuth_deg is no list of angles")
  if not (0 < truth.fps < math.inf and 0 < truth.seconds < math.inf):
    raise UserError(f"{path} is not the truth of a scene: fps and seconds must be above 0")
  if truth.onsets_s.ndim != 1 or not np.isfinite(truth.onsets_s).all():
    raise UserError(f"{path} is not the truth of a scene: onsets_s are no times")
  return truth


def listen(clip: an.Analysis) -> Heard:
  """Reads direction per window and onsets from an analysed clip.

  A clip shorter than one window (256 ms) has no windows.
  """
  return _heard([_sums_of(clip)], onsets.detect(clip.audio_ep.mean(0)))


def listen_along(audio_ep: np.ndarray) -> Heard:
  """Reads direction per window from sound [2, p] at 16 kHz of any length, but no onsets.

  Its stretches are transformed one after the other: memory grows by some kilobytes a second.
  """
  audio_ep = audio_ep - audio_ep.mean(-1, keepdims=True)
  count = max(1, (audio_ep.shape[1] - WINDOW) // WINDOW_HOP + 1)
  parts = []
  for first in range(0, count, STRETCH):
    last = min(first + STRETCH, count) - 1
    part_ep = audio_ep[:, first * WINDOW_HOP : last * WINDOW_HOP + WINDOW]
    parts.append(_sums_of(an.analyse(part_ep)))
  return _heard(parts, np.zeros(0))


class _Sums(NamedTuple):
  """Of each window of a stretch: energies of the ears, in all, in bands and in the head's shadow.

  `phat_lw` is GCC-PHAT weighted by energy; `total` and `shadow` are energies of the stretch.
  """

  energy_ew: np.ndarray
  bands_erw: np.ndarray
  shadow_ew: np.ndarray
  phat_lw: np.ndarray
  total: np.ndarray
  shadow: np.ndarray


_FRAMES = WINDOW_HOP // an.FRAME_HOP, (WINDOW - an.FRAME) // an.FRAME_HOP + 1
_SPECTRA = WINDOW_HOP // an.HOP, (WINDOW - an.N_FFT) // an.HOP + 1


def _sums_of(clip: an.Analysis) -> _Sums:
  count = max(0, (clip.audio_ep.shape[1] - WINDOW) // WINDOW_HOP + 1)
  weighted_il = clip.phat_il * clip.energy_ei.sum(0)[:, None]
  power_ejf = np.square(np.abs(clip.stft_ejf))
  shadow_ej = power_ejf[..., math.ceil(SHADOW_HZ * an.N_FFT / an.RATE) :].sum(-1)
  return _Sums(
    energy_ew=_sums(clip.energy_ei, count, *_FRAMES),
    bands_erw=_sums(np.moveaxis(_bands(power_ejf), 2, 1), count, *_SPECTRA),
    shadow_ew=_sums(shadow_ej, count, *_SPECTRA),
    phat_lw=_sums(weighted_il.T, count, *_FRAMES),
    total=clip.energy_ei.sum(),
    shadow=shadow_ej.sum(),
  )


def _heard(parts: Sequence[_Sums], onsets_s: np.ndarray) -> Heard:
  energy_ew, bands_erw, shadow_ew, phat_lw = (
    np.concatenate([part[i] for part in parts], axis=-1) for i in range(4)
  )
  total, shadow = sum(part.total for part in parts), sum(part.shadow for part in parts)
  power_w = energy_ew.sum(0) / (2 * an.FRAME * _FRAMES[1])
  found = an.peaks(phat_lw.T)
  itd_us_w = np.where(an.one_silent(energy_ew), np.nan, found.lag_us)
  return Heard(
    active_w=power_w > max(an.FLOOR, an.RANGE * power_w.max(initial=0.0)),
    ild_db_w=spatial.level_difference(shadow_ew, float(shadow)),
    ild_broadband_db_w=spatial.level_difference(energy_ew, float(total)),
    itd_us_w=itd_us_w,
    azimuth_ild_w=_azimuth_from_bands(bands_erw),
    azimuth_itd_w=hrtf.woodworth_azimuth_deg(itd_us_w),
    onsets_s=onsets_s,
  )


def agreement(heard: Heard, truth: Truth) -> dict[str, np.ndarray]:
  """Returns the parts (see `stats`) of every metric of `METRICS` for one clip."""
  true_w, sounds_w = window_truth(truth, len(heard.active_w))
  inside = _truth_windows(truth)  # One that ends after the truth is not covered by it.
  used_w = sounds_w & heard.active_w & (np.arange(len(sounds_w)) < inside)
  itd_w = used_w & np.isfinite(heard.itd_us_w)
  aside_w = np.abs(true_w) > SIDE_DEG

  def share(value_w, keep_w):
    return np.array([value_w[keep_w].sum(), keep_w.sum()], np.float64)

  def error(value_w, keep_w):
    return share(np.abs(value_w - true_w), keep_w)

  times = onsets.merge(truth.onsets_s)
  heard_o = heard.onsets_s[heard.onsets_s < truth.seconds]  # Nothing is known of what is later.
  error_o, hits = onsets.match(times, heard_o)
  found = len(heard_o)
  return {
    "sign_agreement": share(_same_side(heard.ild_db_w, true_w, 1e-3), used_w & aside_w),
    "sign_agreement_broadband": share(
      _same_side(heard.ild_broadband_db_w, true_w, 1e-3), used_w & aside_w
    ),
    "sign_agreement_itd": share(_same_side(heard.itd_us_w, true_w, 0.1), itd_w & aside_w),
    "azimuth_pearson_r": stats.moments(heard.ild_db_w[used_w], true_w[used_w]),
    "azimuth_pearson_r_broadband": stats.moments(heard.ild_broadband_db_w[used_w], true_w[used_w]),
    "azimuth_pearson_r_itd": stats.moments(heard.itd_us_w[itd_w], true_w[itd_w]),
    "azimuth_mae_deg": error(heard.azimuth_ild_w, used_w),
    "azimuth_mae_itd_deg": error(heard.azimuth_itd_w, itd_w),
    "window_coverage": np.array([used_w.sum(), window_truth(truth, inside)[1].sum()], np.float64),
    "onset_error_ms": 1000 * error_o,
    "onset_precision": np.array([hits, found], np.float64),
    "onset_recall": np.array([hits, len(times)], np.float64),
    "onset_f1": np.array([2 * hits, found + len(times)], np.float64),
    "onset_false_alarms": np.array([found - hits], np.float64),
  }


def unknown() -> dict[str, np.ndarray]:
  """Returns the parts of a clip without truth: every metric undefined."""
  lengths = {"mean": 1, "ratio": 2, "pearson": 6, "median": 0}
  return {name: np.full(lengths[metric.pool], np.nan) for name, metric in METRICS.items()}


def window_truth(truth: Truth, windows: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the true lateral angle of each window, and whether half of it or more sounds.

  The angle is the mean over eight instants of the window at which a source sounds, linear between
  video frames.
  """
  frame_v = np.arange(len(truth.azimuth_v)) / truth.fps
  lateral_v = np.degrees(np.arcsin(np.sin(np.radians(truth.azimuth_v))))
  known_v = np.isfinite(lateral_v)
  start_w = np.arange(windows) * WINDOW_HOP / an.RATE
  time_wx = start_w[:, None] + ((np.arange(8) + 0.5) / 8 * WINDOW / an.RATE)[None, :]
  nearest_wx = np.rint(time_wx * truth.fps).astype(np.int64)
  last = len(lateral_v) - 1
  sounds_wx = known_v[np.clip(nearest_wx, 0, last)] & (time_wx < truth.seconds)
  if not known_v.any():
    return np.full(windows, np.nan), np.zeros(windows, bool)
  angle_wx = np.interp(time_wx, frame_v[known_v], lateral_v[known_v])
  count_w = sounds_wx.sum(-1)
  mean_w = np.where(sounds_wx, angle_wx, 0.0).sum(-1) / np.maximum(count_w, 1)
  sounds_w = count_w >= 4
  return np.where(sounds_w, mean_w, np.nan), sounds_w


def _truth_windows(truth: Truth) -> int:
  samples = round(truth.seconds * an.RATE)
  return max(0, (samples - WINDOW) // WINDOW_HOP + 1)


def _same_side(cue_w: np.ndarray, true_w: np.ndarray, tie: float) -> np.ndarray:
  """1 where the cue has the sign of the truth, 0 where the other, 0.5 where it has none."""
  same_w = (np.sign(cue_w) == np.sign(true_w)).astype(np.float64)
  return np.where(np.abs(cue_w) <= tie, 0.5, same_w)


def _sums(x: np.ndarray, count: int, step: int, length: int) -> np.ndarray:
  """Sums `length` neighbours of the last axis, every `step`."""
  total = np.cumsum(x, -1)
  total = np.concatenate([np.zeros((*total.shape[:-1], 1)), total], -1)
  start_w = np.arange(count) * step
  return total[..., start_w + length] - total[..., start_w]


def _bands(power_xf: np.ndarray) -> np.ndarray:
  """Sums power [..., f] over the ten bands."""
  edges = np.rint(BAND_EDGES_HZ * an.N_FFT / an.RATE).astype(np.int64)
  return np.add.reduceat(power_xf, edges, axis=-1)[..., :-1]


@functools.cache
def _sphere_ild() -> tuple[np.ndarray, np.ndarray]:
  """Returns lateral angles [g] and the sphere's level difference per band [g, r] in dB."""
  head = hrtf.sphere(an.RATE)
  angle_g = np.arange(-90.0, 91.0)
  spectra_egf = head.spectra(angle_g, np.zeros_like(angle_g), an.N_FFT)
  power_egr = _bands(np.square(np.abs(spectra_egf).astype(np.float64)))
  return angle_g, spatial.level_difference(power_egr, power_egr.sum())


def _azimuth_from_bands(bands_erw: np.ndarray) -> np.ndarray:
  """Lateral angle whose sphere level differences fit those of the bands best."""
  angle_g, sphere_gr = _sphere_ild()
  power_rw = bands_erw.sum(0)
  tiny = np.finfo(np.float64).tiny
  relative_rw = 10 * np.log10((power_rw + tiny) / (power_rw.max(0) + tiny))
  weight_rw = np.maximum(relative_rw / 40 + 1, 0)
  ild_rw = spatial.level_difference(bands_erw, bands_erw.sum())
  # Expanded square: the term without angles does not move the minimum.
  cost_gw = np.square(sphere_gr) @ weight_rw - 2 * sphere_gr @ (weight_rw * ild_rw)
  return angle_g[cost_gw.argmin(0)] if cost_gw.shape[1] else np.zeros(0)
