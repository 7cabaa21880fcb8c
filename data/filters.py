"""Which clips are worth keeping: what is measured of a file's sound, and what drops it.

Measuring is slow and happens once; deciding is arithmetic on the numbers, so that other limits
need no second look at the files. Every dropped clip has exactly one reason, the first that applies
in the order of `REASONS`.

Axes: e channel of the file (0 left, 1 right), p audio sample, i window of 50 ms.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from data import shards
from spatialv2a_jax import io

REASONS = {
  "unlisted": ("probe", "the list of labels does not name it"),
  "unreadable": ("any", "the file is empty, damaged or no media file"),
  "no_video": ("probe", "no video stream"),
  "no_sound": ("probe", "no audio stream"),
  "short": ("probe or filter", "picture or sound ends too early"),
  "not_finite": ("filter", "sound with NaN or infinite samples"),
  "silent": ("filter", "too much of the sound is silent"),
  "quality": ("filter", "an Audiobox Aesthetics score is too low"),
  "tag": ("filter", "a tag such as speech or music is too strong"),
  "failed": ("any", "an error that no other reason covers"),
}
FAILURES = ("unreadable", "failed")  # What a full disk or a broken network would look like.

AXES = ("CE", "CU", "PC", "PQ")  # Content enjoyment, usefulness, production complexity, quality.
FLOOR_DB = -120.0
WINDOW_S = 0.05
ACTIVE_DB = -40.3  # auditok's default: an energy of 50 on the scale of 16-bit samples.
ONE_SIDED_DB = 40.0  # A channel this far below the other counts as empty.
DUAL_MONO_DB = -26.0  # Side over middle; joint-stereo codecs leave some 30 dB and less.
ANTIPHASE = -0.9


class DropError(shards.BadClipError):
  """Ends the way of one clip; the message is `reason: detail`."""

  def __init__(self, reason: str, detail: str):
    super().__init__(f"{reason}: {detail}")
    self.reason, self.detail = reason, detail

  def __reduce__(self):
    return type(self), (self.reason, self.detail)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What drops a clip.

  Attributes:
    seconds: length of a clip.
    tolerance_s: how much shorter a file may be: trimmed files decode to 9.9 to 10.02 s.
    silence: share of silent 50 ms windows from which on a clip is dropped.
    quality: lowest score of each axis of Audiobox Aesthetics; unknown scores drop nothing.
    tags: highest value of each tag.
  """

  seconds: float = 10.0
  tolerance_s: float = 0.05
  silence: float = 0.8
  quality: tuple[tuple[str, float], ...] = (("CE", 2.2), ("CU", 3.5), ("PQ", 4.0))
  tags: tuple[tuple[str, float], ...] = ()

  @property
  def least_s(self) -> float:
    """Seconds that a clip must have."""
    return self.seconds - self.tolerance_s


def probe(path: str, limits: Limits) -> dict[str, Any]:
  """Returns what a file says of itself; DropError if it cannot be a clip.

  A file that is about to be dropped for another reason is decoded to its end first: damage
  explains the rest.
  """
  info = io.probe(path)
  found = dataclasses.asdict(info)
  drop = None
  if not info.has_video:
    raise DropError("no_video", "it has no video stream")
  if info.duration_s < limits.least_s:
    drop = DropError("short", f"{info.duration_s:.2f} s of {limits.seconds:g} s")
  elif not info.has_audio:
    drop = DropError("no_sound", "it has no audio stream")
  if drop:
    io.read_video(path, fps=1, size=(8, 8))
    raise drop
  return found


def measure(audio_ep: np.ndarray, sample_rate: int) -> dict[str, Any]:
  """Measures the sound of a file.

  Args:
    audio_ep: [e, p] as decoded, of any number of channels.
    sample_rate: Hz.

  Returns:
    seconds; channels; finite; peak_db and level_db (RMS) of each channel in dBFS; correlation of
    the first two channels (None if undefined); side_db, the level of (L - R) over (L + R); layout
    (as `layout_of`); silence, the share of silent windows of `mono`.
  """
  found: dict[str, Any] = {
    "seconds": audio_ep.shape[1] / sample_rate,
    "channels": len(audio_ep),
    "finite": bool(np.isfinite(audio_ep).all()),
  }
  if not found["finite"]:
    return found
  power_e = np.mean(np.square(audio_ep, dtype=np.float64), axis=1)
  found["peak_db"] = [_db(peak * peak) for peak in np.abs(audio_ep).max(axis=1)]
  found["level_db"] = [_db(power) for power in power_e]
  found["correlation"] = found["side_db"] = None
  if len(audio_ep) == 2:
    left_p, right_p = audio_ep.astype(np.float64)
    scale = math.sqrt(power_e[0] * power_e[1])
    if scale > 0:
      found["correlation"] = float(np.mean(left_p * right_p) / scale)
    side, middle = np.mean((left_p - right_p) ** 2), np.mean((left_p + right_p) ** 2)
    found["side_db"] = _db(side / max(middle, 1e-12))
  found["layout"] = layout_of(found)
  found["silence"] = silent_share(mono(audio_ep, found["layout"]), sample_rate)
  return found


def layout_of(found: Mapping[str, Any]) -> str:
  """Returns what the channels of a file hold, from the numbers of `measure`.

  "mono" and "surround" by their number; of two channels "one_sided" if one is next to silent,
  "antiphase" if they cancel each other, "dual_mono" if they are the same, else "stereo".
  """
  if found["channels"] != 2:
    return "mono" if found["channels"] == 1 else "surround"
  left_db, right_db = found["level_db"]
  if abs(left_db - right_db) > ONE_SIDED_DB:
    return "one_sided"
  if (found["correlation"] or 0) < ANTIPHASE:
    return "antiphase"
  return "dual_mono" if found["side_db"] < DUAL_MONO_DB else "stereo"


def mono(audio_ep: np.ndarray, layout: str) -> np.ndarray:
  """Returns one channel [p]: the mean, or the louder one where a mean would lose half of it."""
  if layout in ("one_sided", "antiphase"):
    power_e = np.sum(np.square(audio_ep, dtype=np.float64), axis=1)
    return audio_ep[int(np.argmax(power_e))]
  return audio_ep.mean(axis=0)


def silent_share(mono_p: np.ndarray, sample_rate: int) -> float:
  """Returns the share of whole 50 ms windows whose RMS lies below `ACTIVE_DB` dBFS."""
  size = round(WINDOW_S * sample_rate)
  window_ip = mono_p[: len(mono_p) // size * size].reshape(-1, size).astype(np.float64)
  if not len(window_ip):
    return 1.0
  silent_i = np.mean(window_ip**2, axis=1) < 10 ** (ACTIVE_DB / 10)
  return float(np.mean(silent_i))


def check(
  found: Mapping[str, Any],
  scores: Mapping[str, float],
  tags: Mapping[str, float],
  limits: Limits,
) -> None:
  """Raises DropError if the sound that `measure` saw is not worth keeping.

  Args:
    found: of `measure`.
    scores: of Audiobox Aesthetics, by axis; absent or NaN ones drop nothing.
    tags: by name, as whatever tagger gave them.
    limits: what drops a clip.
  """
  if found["seconds"] < limits.least_s - 1e-9:
    raise DropError("short", f"{found['seconds']:.2f} s of sound, {limits.seconds:g} s wanted")
  if not found["finite"]:
    raise DropError("not_finite", "its sound holds NaN or infinite samples")
  if found["silence"] >= limits.silence - 1e-9:
    raise DropError("silent", f"{found['silence']:.0%} of its sound is silent")
  for axis, least in limits.quality:
    if scores.get(axis, math.nan) < least:
      raise DropError("quality", f"{axis} {scores[axis]:.2f} is below {least:g}")
  for name, most in limits.tags:
    if tags.get(name, math.nan) > most:
      raise DropError("tag", f"{name} {tags[name]:.2f} is above {most:g}")


def _db(power: float) -> float:
  return max(FLOOR_DB, 10 * math.log10(power)) if power > 0 else FLOOR_DB
