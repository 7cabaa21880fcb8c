"""From the sound of a file and where its picture moves to the sound at two ears.

Axes: e channel or ear (0 left, 1 right), p audio sample, v frame at 8 fps.
"""

import dataclasses
import math
import pathlib

import numpy as np

from data import filters
from spatialv2a_jax import io, schema
from spatialv2a_jax.spatial import render, spatializer

# Correlation of level difference and picture that says left is right. Both drift slowly, ten
# seconds hold some ten independent moments: by chance, -0.6 is common in true stereo.
REVERSED = -0.85
_LEAST_SWING_DEG, _LEAST_SWING_DB, _LEAST_FRAMES = 10.0, 1.0, 16


def agreement(audio_ep: np.ndarray, sample_rate: int, azimuth_v: np.ndarray) -> float:
  """Returns how well recorded stereo follows the picture: correlation of level and azimuth.

  Args:
    audio_ep: [2, p].
    sample_rate: Hz.
    azimuth_v: smoothed track, left positive.

  Returns:
    Pearson's r of level difference (left over right, dB) and azimuth over the frames that sound;
    NaN where either stays in its place: then nothing can be said.
  """
  size = sample_rate // schema.CLIP_FPS
  count = min(len(azimuth_v), audio_ep.shape[1] // size)
  frame_evp = audio_ep[:, : count * size].reshape(2, count, size).astype(np.float64)
  power_ev = np.mean(frame_evp**2, axis=2) + 1e-12
  total_v = power_ev.sum(axis=0)
  loud_v = total_v > max(1e-6, 1e-4 * total_v.max(initial=0))
  level_v = 10 * np.log10(power_ev[0] / power_ev[1])[loud_v]
  azimuth_v = azimuth_v[:count][loud_v]
  if loud_v.sum() < _LEAST_FRAMES or np.std(azimuth_v) < _LEAST_SWING_DEG:
    return math.nan
  if np.std(level_v) < _LEAST_SWING_DB:
    return math.nan
  return float(np.corrcoef(level_v, azimuth_v)[0, 1])


@dataclasses.dataclass(frozen=True)
class Placed:
  """Sound at two ears and how it came about.

  Attributes:
    audio_ep: float32 [2, p], within full scale.
    spatializer: "recorded" where the file's own two channels were kept, else the renderer.
    hrtf: identity of the head or network that placed it, "" if none did.
    gain_db: by how much both ears were turned down to stay within full scale, 0 or negative.
    agreement: of the file's own two channels with the picture, NaN if unknown.
  """

  audio_ep: np.ndarray
  spatializer: str
  hrtf: str
  gain_db: float
  agreement: float


class Network:
  """Places sound by a trained mono-to-binaural network, which looks at the picture itself."""

  def __init__(self, folder: str, sample_rate: int):
    """Loads a model folder.

    Raises:
      MissingAssetError: no such folder.
      UserError: it holds no such network.
    """
    from spatialv2a_jax import binauralizer  # Imports JAX, which other ways do without.

    self.sample_rate, self._place = sample_rate, binauralizer.binauralize
    self._net = binauralizer.Binauralizer(folder)
    # It names the digests of the weights.
    self.hash = io.file_hash(pathlib.Path(folder) / "config.json")[:16]

  def __call__(self, mono_p: np.ndarray, video: str) -> np.ndarray:
    """Returns both ears [2, p]; their mean is the mono sound."""
    size = (self._net.config.rows, self._net.config.columns)
    seconds = len(mono_p) / self.sample_rate
    frames = io.read_video(video, schema.CLIP_FPS, size, duration=seconds, threads=1)
    return self._place(self._net, mono_p, self.sample_rate, [(frames, 0, True)])


class Placer:
  """Puts the sound of a file where its picture moves, unless it was recorded in true stereo."""

  def __init__(self, name: str, sample_rate: int, keep_stereo: bool = True):
    """Loads the head or network.

    Args:
      name: as for `spatializer.load`, or "network:DIR".
      sample_rate: Hz.
      keep_stereo: leave recordings alone that have two true channels.

    Raises:
      MissingAssetError: no such network.
      UserError: another name, or a bad file.
    """
    self.sample_rate, self.keep_stereo = sample_rate, keep_stereo
    kind, _, path = name.partition(":")
    self.network = Network(path, sample_rate) if kind == "network" else None
    self.render = None if self.network else spatializer.load(name, sample_rate)
    # Where a file lay is none of the record's business; the hash says what it was.
    self.label = kind
    if self.render and path:
      head = self.render.head.name
      self.label = head if kind == "sofa" else f"{kind}:{head}"

  @property
  def hash(self) -> str:
    """Identity of the head or network."""
    return self.network.hash if self.network else self.render.head.hash if self.render else ""

  def __call__(
    self, audio_ep: np.ndarray, layout: str, azimuth_v: np.ndarray, video: str = ""
  ) -> Placed:
    """Places one clip.

    Args:
      audio_ep: [e, p] the file's sound.
      layout: of `filters.layout_of`.
      azimuth_v: smoothed track at 8 fps, degrees, left positive.
      video: the file, which a network wants to see.
    """
    agrees = math.nan
    if layout == "stereo":
      agrees = agreement(audio_ep, self.sample_rate, azimuth_v)
      if self.keep_stereo and not agrees <= REVERSED:
        return _placed(audio_ep, "recorded", "", agrees)
    mono_p = filters.mono(audio_ep, layout).astype(np.float32)
    if self.render:
      track = ((np.arange(len(azimuth_v)) + 0.5) / schema.CLIP_FPS, azimuth_v)
      placed_ep = self.render(mono_p, track)
    else:
      assert self.network
      placed_ep = self.network(mono_p, video)
    return _placed(placed_ep, self.label, self.hash, agrees)


def _placed(audio_ep: np.ndarray, label: str, head: str, agrees: float) -> Placed:
  kept_ep, gain_db = render.within_full_scale(audio_ep)
  return Placed(kept_ep, label, head, gain_db, agrees)
