"""Frozen encoders: frames and text -> the condition of the flow network.

`RandomFeatures` stands beside CLIP and Synchformer behind the same interface: it has no trained
weights, only seeded random projections of patches and of their motion, so a model trained on it
needs no download. `localizers` gives one heat map per 8 fps frame; the five descriptors of
the paper's spatialization module are computed from it.

Axes: n frame at 25 fps, v frame at 8 fps, s synchronisation token, w text token, y row, x column,
q patch, r raw feature, f feature, k descriptor.
"""

import dataclasses
import hashlib
import re
from typing import Any

import jax
import numpy as np

from spatialv2a_jax import io, localizers, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import spatial

PATCH = 8

_descriptors = jax.jit(spatial.descriptors)


@dataclasses.dataclass(frozen=True)
class Config:
  """What a checkpoint must remember to compute features again.

  Attributes:
    encoder: "random", the seeded random-feature encoder, or "mmaudio", CLIP and Synchformer.
    seed: of its projections.
    clip_dim: width of the 8 fps features.
    sync_dim: width of the synchronisation features.
    text_dim: width of a text token.
    text_len: text tokens.
    localizer: "motion", "track:FILE" to steer the position, "acl", CLIPSeg with a text, or
      "acl:FILE", with the sound of a file.
    mirror_tta: of "acl", averages with the mirrored map of the mirrored picture, so that mirrored
      video has exactly mirrored descriptors, at twice the cost.
  """

  encoder: str = "random"
  seed: int = 0
  clip_dim: int = 64
  sync_dim: int = 64
  text_dim: int = 32
  text_len: int = 8
  localizer: str = "motion"
  mirror_tta: bool = False

  def identity(self) -> dict[str, Any]:
    """Returns the settings as plain values: of a file what it says, not where it lies."""
    kind, _, path = self.localizer.partition(":")
    about = {**dataclasses.asdict(self), "localizer": kind}
    return {**about, "localizer_file": io.file_hash(path)} if path else about


def views() -> dict[str, io.View]:
  """Returns the frames that `encode` needs, for `io.read_views`."""
  return {"frames": io.View(fps=schema.SYNC_FPS, size=localizers.FRAME_SIZE)}


def encode(
  frames_nyxc: np.ndarray, seconds: float, config: Config, *, start: float = 0.0
) -> dict[str, np.ndarray]:
  """Encodes the frames of one clip without trained networks; `encoders` does it with them.

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
    raise UserError(f"encoder {config.encoder!r} needs trained networks; without them: random")
  n = schema.lengths(seconds, schema.AUDIO["16k"])
  frames = frames_nyxc.astype(np.float32)
  frames /= 255
  motion_nyx = localizers.residual_motion(frames)
  clip_vf, sync_sf = RandomFeatures.of(config)(frames, motion_nyx, n.clip, n.sync)
  placed = _placed(localizers.heat(config.localizer, motion_nyx, n.clip, start))
  return {"clip_vf": clip_vf, "sync_sf": sync_sf, **placed}


def place(
  frames_nyxc: np.ndarray, seconds: float, localizer: str, *, start: float = 0.0
) -> dict[str, np.ndarray]:
  """Returns `spatial_vk` and `heat_vyx` alone, as `encode` does, by "motion" or "track:FILE"."""
  motion_nyx = localizers.residual_motion(frames_nyxc.astype(np.float32) / 255)
  count = schema.lengths(seconds, schema.AUDIO["16k"]).clip
  return _placed(localizers.heat(localizer, motion_nyx, count, start))


def _placed(heat_vyx: np.ndarray) -> dict[str, np.ndarray]:
  spatial_bvk, _ = _descriptors(heat_vyx[None])
  return {"spatial_vk": np.asarray(spatial_bvk[0], np.float32), "heat_vyx": heat_vyx}


def encode_text(text: str, config: Config) -> np.ndarray:
  """Returns float32 [w, text_dim]: one seeded random vector per word; no words are zeros."""
  tokens_wf = np.zeros((config.text_len, config.text_dim), np.float32)
  words = re.findall(r"(?:[^\W_]|')+", text.lower())[: config.text_len]
  for row, word in enumerate(words):
    digest = hashlib.sha256(f"{config.seed}/{word}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    tokens_wf[row] = rng.standard_normal(config.text_dim)
  return tokens_wf


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
    raw = self.look_rf.shape[1]
    both_rf = np.concatenate([self.look_rf, self.change_rf], axis=1)
    # One product per row of patches: larger ones wake threads that hinder other workers' more than
    # they help.
    seen_nqr = (_patches(frames_nyxc) @ both_rf).reshape(len(frames_nyxc), -1, 2 * raw)
    grey_r = 0.5 * self.look_rf.sum(axis=0)  # What mid-grey gives: look is relative to it.
    look_nqr = _relu(seen_nqr[..., :raw] - grey_r[None, None]) * 4
    change_nqr = seen_nqr[..., raw:]
    change_nqr = _relu(np.diff(change_nqr, axis=0, prepend=change_nqr[:1]))
    moved_nq = _patches(motion_nyx[..., None]).mean(axis=-1).reshape(len(motion_nyx), -1)
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
  """Returns [n, rows of patches, patches of a row, values of a patch]."""
  n, y, x, c = image_nyxc.shape
  cut = image_nyxc.reshape(n, y // PATCH, PATCH, x // PATCH, PATCH, c)
  return cut.transpose(0, 1, 3, 2, 4, 5).reshape(n, y // PATCH, x // PATCH, -1)


def _relu(x: np.ndarray) -> np.ndarray:
  return np.maximum(x, 0)


def _interpolate(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
  low = np.clip(np.floor(at).astype(int), 0, len(rows) - 1)
  high = np.minimum(low + 1, len(rows) - 1)
  part = np.clip(at - low, 0, 1)[:, None].astype(rows.dtype)
  return (1 - part) * rows[low] + part * rows[high]
