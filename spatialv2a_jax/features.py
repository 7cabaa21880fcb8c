"""Frozen encoders: frames and text -> the condition of the flow network.

`RandomFeatures` stands beside CLIP and Synchformer behind the same interface: it has no trained
weights, only seeded random projections of patches and of their motion, so a model trained on it
needs no download. Localizers give one heat map per 8 fps frame; the five descriptors of the
paper's spatialization module are computed from it.

Axes: n frame at 25 fps, v frame at 8 fps, s synchronisation token, w text token, y row, x column,
q patch, r raw feature, f feature, k descriptor.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from spatialv2a_jax import io, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import spatial

PATCH = 8
FRAME_SIZE = (48, 80)  # Rows, columns of the frames that `RandomFeatures` and `motion` see.
MOTION_FLOOR = 0.02  # Grey levels (0..1) of residual motion below which nothing moves.
HISTORY = 0.75  # What is left of a motion after 1/8 s: a struck object rings while it rests.
TRACK_WIDTH_DEG = 8.0  # Standard deviation of the blob that a `track` draws.


@dataclasses.dataclass(frozen=True)
class Config:
  """What a checkpoint must remember to compute features again.

  Attributes:
    encoder: "random", the seeded random-feature encoder.
    seed: of its projections.
    clip_dim: width of the 8 fps features.
    sync_dim: width of the synchronisation features.
    text_dim: width of a text token.
    text_len: text tokens.
    localizer: "motion", or "track:FILE" to steer the position.
  """

  encoder: str = "random"
  seed: int = 0
  clip_dim: int = 64
  sync_dim: int = 64
  text_dim: int = 32
  text_len: int = 8
  localizer: str = "motion"


def views() -> dict[str, io.View]:
  """Returns the frames that `encode` needs, for `io.read_views`."""
  return {"frames": io.View(fps=schema.SYNC_FPS, size=FRAME_SIZE)}


def encode(
  frames_nyxc: np.ndarray, seconds: float, config: Config, *, start: float = 0.0
) -> dict[str, np.ndarray]:
  """Encodes the frames of one clip.

  Args:
    frames_nyxc: uint8 RGB frames at 25 fps, at least `seconds` long.
    seconds: duration of the clip.
    config: which encoder and localizer.
    start: time of the first frame within the video, which places a `track`.

  Returns:
    `clip_vf` float32 [v, clip_dim], `sync_sf` [s, sync_dim], `spatial_vk` [v, 5] and the heat
    maps `heat_vyx` [v, 48, 80] in 0..1.
  """
  if config.encoder != "random":
    raise UserError(f"unknown encoder {config.encoder!r}, have: random")
  n = schema.lengths(seconds, schema.AUDIO["16k"])
  frames = frames_nyxc.astype(np.float32) / 255
  motion_nyx = residual_motion(frames)
  clip_vf, sync_sf = RandomFeatures.of(config)(frames, motion_nyx, n.clip, n.sync)
  if config.localizer == "motion":
    heat_vyx = motion_heat(motion_nyx, n.clip)
  elif config.localizer.startswith("track:"):
    heat_vyx = read_track(config.localizer.removeprefix("track:")).heat(n.clip, start)
  else:
    raise UserError(f"unknown localizer {config.localizer!r}, have: motion, track:FILE")
  spatial_bvk, _ = spatial.descriptors(heat_vyx[None])
  return {
    "clip_vf": clip_vf,
    "sync_sf": sync_sf,
    "spatial_vk": np.asarray(spatial_bvk[0], np.float32),
    "heat_vyx": heat_vyx,
  }


def encode_text(text: str, config: Config) -> np.ndarray:
  """Returns float32 [w, text_dim]: one seeded random vector per word; no words are zeros."""
  tokens_wf = np.zeros((config.text_len, config.text_dim), np.float32)
  words = re.findall(r"[a-z0-9']+", text.lower())[: config.text_len]
  for row, word in enumerate(words):
    digest = hashlib.sha256(f"{config.seed}/{word}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    tokens_wf[row] = rng.standard_normal(config.text_dim)
  return tokens_wf


def residual_motion(frames_nyxc: np.ndarray) -> np.ndarray:
  """Returns what moves against the camera: |difference| of neighbours, panning removed.

  One translation per frame pair is fitted by least squares on the image gradient (the optical
  flow equation for a single motion) and its effect subtracted.

  Args:
    frames_nyxc: RGB frames in 0..1.

  Returns:
    float32 [n, y, x], mean over colours; the first frame repeats the second.
  """
  mean_nyxc = 0.5 * (frames_nyxc[1:] + frames_nyxc[:-1])
  change_nyxc = frames_nyxc[1:] - frames_nyxc[:-1]
  gy, gx = np.gradient(mean_nyxc, axis=(1, 2))
  sums = functools.partial(np.sum, axis=(1, 2, 3), dtype=np.float64)
  xx, yy, xy = sums(gx * gx), sums(gy * gy), sums(gx * gy)
  tx, ty = sums(gx * change_nyxc), sums(gy * change_nyxc)
  det = np.maximum(xx * yy - xy * xy, 1e-9)
  u = ((yy * tx - xy * ty) / det).astype(np.float32)[:, None, None, None]
  v = ((xx * ty - xy * tx) / det).astype(np.float32)[:, None, None, None]
  still = np.abs(change_nyxc)
  panned = np.abs(change_nyxc - u * gx - v * gy)
  # A pan must explain most of the picture before it is believed; else the object is the motion.
  pan = panned.mean(axis=(1, 2, 3), keepdims=True) < 0.5 * still.mean(axis=(1, 2, 3), keepdims=True)
  motion_nyx = np.where(pan, panned, still).mean(axis=-1)
  if not len(motion_nyx):
    return np.zeros(frames_nyxc.shape[:3], np.float32)
  return np.concatenate([motion_nyx[:1], motion_nyx])


def motion_heat(motion_nyx: np.ndarray, count: int) -> np.ndarray:
  """Returns heat maps [v, y, x] in 0..1 at 8 fps from residual motion at 25 fps.

  Motion is smoothed over 5 pixels, fades by `HISTORY` per 1/8 s, and each map is divided by its
  maximum, so the strongest motion is 1; a frame in which nothing moves is all zero.
  """
  smooth = motion_nyx
  for axis in (1, 2):
    pad = [(0, 0)] * 3
    pad[axis] = (2, 2)
    padded = np.pad(smooth, pad, mode="edge")
    length = smooth.shape[axis]
    smooth = sum(np.take(padded, range(i, i + length), axis) for i in range(5)) / 5
  decay = HISTORY ** (schema.CLIP_FPS / schema.SYNC_FPS)
  held = np.zeros_like(smooth[0])
  history = np.empty_like(smooth)
  for i, now in enumerate(smooth):
    held = np.maximum(now, decay * held)
    history[i] = held
  index = np.minimum(
    np.ceil((np.arange(count) + 0.5) * schema.SYNC_FPS / schema.CLIP_FPS).astype(int),
    len(history) - 1,
  )
  heat_vyx = history[index]
  peak_v11 = heat_vyx.max(axis=(1, 2), keepdims=True)
  # Half the floor is added so that the faintest motion does not flicker between 0 and 1.
  return np.where(peak_v11 > MOTION_FLOOR, heat_vyx / (peak_v11 + 1e-6), 0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RandomFeatures:
  """Seeded random projections of patches, pooled evenly and by motion.

  Attributes:
    look_rf: projects an 8 x 8 RGB patch.
    change_rf: projects the change of a patch.
    clip_rf: projects pooled features to the width of the 8 fps features.
    sync_rf: the same for the synchronisation features.
  """

  look_rf: np.ndarray
  change_rf: np.ndarray
  clip_rf: np.ndarray
  sync_rf: np.ndarray

  @classmethod
  def of(cls, config: Config, raw: int = 32) -> "RandomFeatures":
    """Draws the projections from the seed of the config."""
    rng = np.random.default_rng([config.seed, 0x5EED])
    inputs = PATCH * PATCH * 3

    def draw(rows, columns):
      return (rng.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)

    return cls(
      draw(inputs, raw), draw(inputs, raw), draw(2 * raw + 2, config.clip_dim),
      draw(2 * raw + 2, config.sync_dim),
    )  # fmt: skip

  def __call__(
    self, frames_nyxc: np.ndarray, motion_nyx: np.ndarray, clips: int, tokens: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns `clip_vf` and `sync_sf`; tokens of the latter are evenly spaced in time."""
    look_nqr = _relu(_patches(frames_nyxc - 0.5) @ self.look_rf) * 4
    change = np.diff(frames_nyxc, axis=0, prepend=frames_nyxc[:1])
    change_nqr = _relu(_patches(change) @ self.change_rf)
    moved_nq = _patches(motion_nyx[..., None]).mean(axis=-1)
    share_nq1 = (moved_nq / (moved_nq.sum(axis=1, keepdims=True) + 1e-3))[..., None]
    level_n2 = np.stack(
      [np.log1p(moved_nq.mean(axis=1) * 500), np.log1p(moved_nq.max(axis=1) * 50)], axis=-1
    )
    moving_nr = (share_nq1 * look_nqr).sum(axis=1)
    change_nr = np.log1p(20 * (share_nq1 * change_nqr).sum(axis=1))

    count = len(frames_nyxc)
    at_v = np.minimum((np.arange(clips) * schema.SYNC_FPS / schema.CLIP_FPS).astype(int), count - 1)
    clip_nr = np.concatenate([look_nqr.mean(axis=1), moving_nr, level_n2], axis=-1)
    sync_nr = np.concatenate([change_nr, moving_nr, level_n2], axis=-1)
    at_s = (np.arange(tokens) + 0.5) * (count / tokens) - 0.5
    return clip_nr[at_v] @ self.clip_rf, _interpolate(sync_nr, at_s) @ self.sync_rf


def _patches(image_nyxc: np.ndarray) -> np.ndarray:
  n, y, x, c = image_nyxc.shape
  cut = image_nyxc.reshape(n, y // PATCH, PATCH, x // PATCH, PATCH, c)
  return cut.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, PATCH * PATCH * c)


def _relu(x: np.ndarray) -> np.ndarray:
  return np.maximum(x, 0)


def _interpolate(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
  low = np.clip(np.floor(at).astype(int), 0, len(rows) - 1)
  high = np.minimum(low + 1, len(rows) - 1)
  part = np.clip(at - low, 0, 1)[:, None].astype(rows.dtype)
  return (1 - part) * rows[low] + part * rows[high]


@dataclasses.dataclass(frozen=True)
class Track:
  """A source's direction over time, given by the user.

  Attributes:
    time_s: increasing times.
    azimuth_deg: azimuth at these times, left positive, interpolated between them.
  """

  time_s: np.ndarray
  azimuth_deg: np.ndarray

  def at(self, time_s: np.ndarray) -> np.ndarray:
    """Returns the azimuth in degrees at any times; the ends are held."""
    return np.interp(time_s, self.time_s, self.azimuth_deg)

  def heat(self, count: int, start: float = 0.0) -> np.ndarray:
    """Returns heat maps [v, y, x]: a blob at the track's azimuth, clipped to the picture."""
    y, x = FRAME_SIZE
    azimuth_v = self.at(start + (np.arange(count) + 0.5) / schema.CLIP_FPS)
    column_v = np.clip(0.5 - azimuth_v / schema.HFOV_DEG, 0, 1)
    u_x = (np.arange(x) + 0.5) / x
    v_y = (np.arange(y) + 0.5) / y - 0.5
    sigma = TRACK_WIDTH_DEG / schema.HFOV_DEG
    across_vx = np.exp(-0.5 * ((u_x[None] - column_v[:, None]) / sigma) ** 2)
    down_y = np.exp(-0.5 * (v_y / sigma * y / x) ** 2)
    heat = across_vx[:, None, :] * down_y[None, :, None]
    return (heat / heat.max(axis=(1, 2), keepdims=True)).astype(np.float32)


def read_track(path: str | pathlib.Path) -> Track:
  """Reads a track: JSON {"time_s": [...], "azimuth_deg": [...]} or CSV with those two columns.

  Raises:
    UserError: if the file is missing, has other columns or times that do not increase.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path}: no such track file; give --track or --localizer track:FILE one")
  try:
    if path.suffix == ".json":
      table: Mapping[str, Any] = json.loads(path.read_text())
      rows = zip(table["time_s"], table["azimuth_deg"], strict=True)
    else:
      rows = [(row["time_s"], row["azimuth_deg"]) for row in csv.DictReader(path.open())]
    pairs = np.array([(float(t), float(a)) for t, a in rows], np.float64).reshape(-1, 2)
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{path}: a track needs numbers in time_s and azimuth_deg ({error})") from None
  if not len(pairs) or not np.isfinite(pairs).all() or (np.diff(pairs[:, 0]) <= 0).any():
    raise UserError(f"{path}: time_s must be finite and increase from row to row")
  return Track(pairs[:, 0], pairs[:, 1])
