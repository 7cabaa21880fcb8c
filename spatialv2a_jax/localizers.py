"""Where something sounds: one heat map per 8 fps video frame, from motion or from the user.

Both localizers give the same kind of map, of which the five descriptors of the paper's
spatialization module are computed (`models.spatial`). A third, `acl`, takes a trained network and
is in `encoders`.

Axes: n frame at 25 fps, v frame at 8 fps, y row, x column, o red, green, blue.
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from spatialv2a_jax import schema
from spatialv2a_jax.errors import UserError

FRAME_SIZE = (48, 80)  # Rows, columns of the pictures and of the heat maps.
THUMBNAIL = (12, 20)  # Of the heat maps that are kept to be shown.
SEEN = 0.5  # Heat from which on a pixel belongs to the source.
MOTION_FLOOR = 0.02  # Grey levels (0..1) of residual motion below which nothing moves.
HISTORY = 0.75  # What is left of a motion after 1/8 s: a struck object rings while it rests.
SMOOTH_S = 0.375  # Standard deviation: a source does not jump, a localizer does.
TRACK_WIDTH_DEG = 8.0  # Standard deviation of the blob that a `track` draws.

_CHUNK = 16  # Frames whose arrays stay in the cache of the processor.
_GREY_O = np.full(3, 1 / 3, np.float32)


def track_of(localizer: str) -> "Track | None":
  """Returns the track of "track:FILE" and None for "motion".

  Raises:
    UserError: another localizer, or a bad file.
  """
  kind, _, path = localizer.partition(":")
  if kind == "track" and path:
    return read_track(path)
  if localizer != "motion":
    raise UserError(f"unknown localizer {localizer!r}, have: acl, acl:FILE, motion, track:FILE")
  return None


def box(heat_vyx: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the first column and the end of what is hot in each frame, and whether anything is.

  As the descriptors' box (`models.spatial`); S_h is (first + end) / columns - 1.
  """
  seen_vx = np.any(heat_vyx >= SEEN, axis=1)
  end_v = seen_vx.shape[1] - np.argmax(seen_vx[:, ::-1], axis=1)
  return np.argmax(seen_vx, axis=1), end_v, seen_vx.any(axis=1)


def heat(localizer: str, motion_nyx: np.ndarray, count: int, start: float = 0.0) -> np.ndarray:
  """Returns the heat maps float32 [v, y, x] in 0..1 of a clip.

  Args:
    localizer: "motion" or "track:FILE".
    motion_nyx: of `residual_motion`.
    count: frames at 8 fps.
    start: time of the clip within its video, which places a track.

  Raises:
    UserError: as `track_of`.
  """
  track = track_of(localizer)
  return motion_heat(motion_nyx, count) if track is None else track.heat(count, start)


def thumbnail(heat_vyx: Any) -> Any:
  """Returns NumPy's or JAX's heat maps [v, y, x] in 0..1 as uint8 [v, 12, 20]."""
  rows, columns = (
    ((np.arange(n) + 0.5) * side / n).astype(int)
    for n, side in zip(THUMBNAIL, heat_vyx.shape[1:], strict=True)
  )
  return (255 * heat_vyx[:, rows[:, None], columns[None]]).astype(np.uint8)


def residual_motion(frames_nyxo: np.ndarray) -> np.ndarray:
  """Returns what moves against the camera: |difference| of neighbours, panning removed.

  One translation per frame pair is fitted by least squares on the image gradient (the optical
  flow equation for a single motion) and its effect subtracted.

  Args:
    frames_nyxo: float32 RGB frames in 0..1.

  Returns:
    float32 [n, y, x], mean over colours; the first frame repeats the second.
  """
  if len(frames_nyxo) < 2:
    return np.zeros(frames_nyxo.shape[:3], np.float32)
  starts = range(0, len(frames_nyxo) - 1, _CHUNK)
  motion_nyx = np.concatenate([_pair_motion(frames_nyxo[i : i + _CHUNK + 1]) for i in starts])
  return np.concatenate([motion_nyx[:1], motion_nyx])


def _pair_motion(frames_nyxo: np.ndarray) -> np.ndarray:
  change = frames_nyxo[1:] - frames_nyxo[:-1]
  gy, gx = np.gradient(0.5 * (frames_nyxo[1:] + frames_nyxo[:-1]), axis=(1, 2))

  def dot(a, b):
    return np.vecdot(a.reshape(len(a), -1), b.reshape(len(b), -1)).astype(np.float64)

  xx, yy, xy, tx, ty = dot(gx, gx), dot(gy, gy), dot(gx, gy), dot(gx, change), dot(gy, change)
  det = np.maximum(xx * yy - xy * xy, 1e-9)
  u, v = ((yy * tx - xy * ty) / det), ((xx * ty - xy * tx) / det)
  gx *= u.astype(np.float32)[:, None, None, None]
  gy *= v.astype(np.float32)[:, None, None, None]
  still_nyx = np.abs(change) @ _GREY_O  # Far faster than a mean over three colours.
  panned_nyx = np.abs(change - gx - gy) @ _GREY_O
  # A pan must explain most of the picture before it is believed; else the object is the motion.
  pan_n = panned_nyx.mean(axis=(1, 2)) < 0.5 * still_nyx.mean(axis=(1, 2))
  return np.where(pan_n[:, None, None], panned_nyx, still_nyx)


def motion_heat(motion_nyx: np.ndarray, count: int) -> np.ndarray:
  """Returns heat maps [v, y, x] in 0..1 at 8 fps from residual motion at 25 fps.

  Motion is smoothed over 5 pixels, fades by `HISTORY` per 1/8 s, and each map is divided by its
  maximum, so the strongest motion is 1; a frame in which nothing moves is all zero.
  """
  smooth_nyx = ndimage.uniform_filter(motion_nyx, 5, mode="nearest", axes=(1, 2))
  decay = HISTORY ** (schema.CLIP_FPS / schema.SYNC_FPS)
  held_yx = np.zeros_like(smooth_nyx[0])
  history_nyx = np.empty_like(smooth_nyx)
  for i, now_yx in enumerate(smooth_nyx):
    held_yx = np.maximum(now_yx, decay * held_yx)
    history_nyx[i] = held_yx
  at_v = np.ceil((np.arange(count) + 0.5) * schema.SYNC_FPS / schema.CLIP_FPS).astype(int)
  heat_vyx = history_nyx[np.minimum(at_v, len(history_nyx) - 1)]
  peak_v11 = heat_vyx.max(axis=(1, 2), keepdims=True)
  return np.where(peak_v11 > MOTION_FLOOR, heat_vyx / (peak_v11 + 1e-6), 0).astype(np.float32)


def smooth(azimuth_v: ArrayLike, located_v: ArrayLike) -> np.ndarray:
  """Returns a track float64 [v] without jumps: frames in which nothing was found take no part.

  Gaps are bridged and the ends held; all zero where nothing was ever found.
  """
  weight_v = np.asarray(located_v, np.float64)
  if not weight_v.any():
    return np.zeros(len(weight_v))
  seen_v = np.flatnonzero(weight_v)
  bridged_v = np.interp(np.arange(len(weight_v)), seen_v, np.asarray(azimuth_v)[seen_v])
  sigma = SMOOTH_S * schema.CLIP_FPS
  return ndimage.gaussian_filter1d(bridged_v, sigma, mode="nearest")


@dataclasses.dataclass(frozen=True)
class Track:
  """A source's direction over time, given by the user.

  Attributes:
    time_s: increasing times.
    azimuth_deg: azimuth at these times, left positive; between them it takes the short way round.
  """

  time_s: np.ndarray
  azimuth_deg: np.ndarray

  def at(self, time_s: np.ndarray) -> np.ndarray:
    """Returns the azimuth in degrees at any times; the ends are held."""
    return np.interp(time_s, self.time_s, np.unwrap(self.azimuth_deg, period=360))

  def heat(self, count: int, start: float = 0.0) -> np.ndarray:
    """Returns heat maps [v, y, x]: a blob at the track's azimuth.

    Sources beyond the picture are drawn at its edge, those behind the head like those before it.
    """
    y, x = FRAME_SIZE
    azimuth_v = np.radians(self.at(start + (np.arange(count) + 0.5) / schema.CLIP_FPS))
    lateral_v = np.degrees(np.arcsin(np.sin(azimuth_v)))
    column_v = np.clip(0.5 - lateral_v / schema.HFOV_DEG, 0, 1)
    u_x = (np.arange(x) + 0.5) / x
    v_y = (np.arange(y) + 0.5) / y - 0.5
    sigma = TRACK_WIDTH_DEG / schema.HFOV_DEG
    across_vx = np.exp(-0.5 * ((u_x[None] - column_v[:, None]) / sigma) ** 2)
    down_y = np.exp(-0.5 * (v_y / sigma * y / x) ** 2)
    heat_vyx = across_vx[:, None, :] * down_y[None, :, None]
    return (heat_vyx / heat_vyx.max(axis=(1, 2), keepdims=True)).astype(np.float32)


def read_track(path: str | pathlib.Path) -> Track:
  """Reads a track: JSON {"time_s": [...], "azimuth_deg": [...]} or CSV with those two columns.

  Raises:
    UserError: if the file is missing, has other columns or times that do not increase.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path}: no such track file; give --track or --localizer track:FILE one")
  try:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
      table: Mapping[str, Any] = json.loads(text)
      rows = zip(table["time_s"], table["azimuth_deg"], strict=True)
    else:
      reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
      rows = [(row["time_s"], row["azimuth_deg"]) for row in reader]
    pairs = np.array([(float(t), float(a)) for t, a in rows], np.float64).reshape(-1, 2)
  except (KeyError, TypeError, ValueError, csv.Error) as error:
    raise UserError(f"{path}: a track needs numbers in time_s and azimuth_deg ({error})") from None
  if not len(pairs):
    raise UserError(f"{path}: the track has no rows; give at least one time_s and azimuth_deg")
  if not np.isfinite(pairs).all():
    raise UserError(f"{path}: time_s and azimuth_deg must be finite numbers")
  if (np.diff(pairs[:, 0]) <= 0).any():
    raise UserError(f"{path}: time_s must increase from row to row")
  return Track(pairs[:, 0], pairs[:, 1])
