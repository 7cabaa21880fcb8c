"""Windows of a clip: how long it is, how pieces are joined, and where what they show sounds.

Axes: w window, e ear (0 left, 1 right), n frame of any kind, x channel, v frame at 8 fps,
k descriptor.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from spatialv2a_jax import io, schema

Source = str | pathlib.Path | io.Frames


@dataclasses.dataclass(frozen=True)
class Window:
  """A stretch of one file: index of its first latent frame and the features of its frames."""

  first: int
  features: dict[str, np.ndarray]


def length(source: Source, most: float | None = None) -> float:
  """Returns how many seconds of a video get sound."""
  if isinstance(source, io.Frames):
    seconds = source.seconds
  else:
    seconds = io.probe(source).duration_s
  return min(seconds, most or math.inf)


def shares(firsts: Sequence[int], length: int, fade: int | None = None) -> np.ndarray:
  """Returns the share [w, n] of each window in its frames; shares in one frame of a clip sum to 1.

  Args:
    firsts: index of the first frame of each window, increasing.
    length: frames of a window.
    fade: frames over which one window takes over from the one before, in the middle of what they
      share: the ends of windows, which know only one side of what is around them, have no share.
      None fades over all that they share.
  """
  at_n = np.arange(length) + 0.5
  if fade is None:
    weight_wn = np.tile(np.minimum(at_n, length - at_n), (len(firsts), 1))
  else:
    rise_w = [(length - (b - a)) / 2 for a, b in zip(firsts[:-1], firsts[1:], strict=True)]

    def rising(middle):
      return np.clip((at_n - middle) / fade + 0.5, 0, 1)

    weight_wn = np.ones((len(firsts), length))
    for w, middle in enumerate(rise_w):
      weight_wn[w] *= 1 - rising(firsts[w + 1] - firsts[w] + middle)
      weight_wn[w + 1] *= rising(middle)
  total_n = np.zeros(firsts[-1] + length)
  for first, weight_n in zip(firsts, weight_wn, strict=True):
    total_n[first : first + length] += weight_n
  total_wn = np.stack([total_n[first : first + length] for first in firsts])
  return (weight_wn / total_wn).astype(np.float32)


def cross_fade(
  firsts: Sequence[int], pieces: Sequence[np.ndarray], fade: int | None = None
) -> np.ndarray:
  """Joins overlapping pieces [e, n, x] of one length; each begins at its index of axis n."""
  ears, length, channels = pieces[0].shape
  out = np.zeros((ears, firsts[-1] + length, channels), np.float32)
  share_wn = shares(firsts, length, fade)
  for first, piece_enx, share_n in zip(firsts, pieces, share_wn, strict=True):
    out[:, first : first + length] += share_n[None, :, None] * piece_enx
  return out


def azimuths(
  descriptors_vk: np.ndarray, time_v: np.ndarray, count: int, audio: schema.AudioSpec
) -> np.ndarray | None:
  """Returns the azimuth [n] in degrees, left positive, of what is seen to sound at each mel frame.

  None if nothing is: the delay between the ears then follows their levels.
  """
  valid_v = descriptors_vk[:, 1] > 0  # S_area
  if not valid_v.any():
    return None
  azimuth_v = -0.5 * schema.HFOV_DEG * descriptors_vk[valid_v, 0]
  time_n = (np.arange(count) + 0.5) * (audio.hop / audio.sample_rate)
  return np.interp(time_n, time_v[valid_v], azimuth_v)
