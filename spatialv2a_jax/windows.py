"""Windows of a long clip: how their pieces are joined, and where what they show sounds.

Axes: e ear (0 left, 1 right), n frame of any kind, x channel, v frame at 8 fps, k descriptor.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from spatialv2a_jax import schema


@dataclasses.dataclass(frozen=True)
class Window:
  """A stretch of one file: index of its first latent frame and the features of its frames."""

  first: int
  features: dict[str, np.ndarray]


def cross_fade(firsts: Sequence[int], pieces: Sequence[np.ndarray]) -> np.ndarray:
  """Joins overlapping pieces [e, n, ...] of one length; each begins at its index of axis n."""
  length = pieces[0].shape[1]
  total = max(firsts) + length
  ramp_n = np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)).astype(np.float32)
  sum_n = np.zeros(total, np.float32)
  for first in firsts:
    sum_n[first : first + length] += ramp_n
  out = np.zeros((pieces[0].shape[0], total, pieces[0].shape[2]), np.float32)
  for first, piece_enx in zip(firsts, pieces, strict=True):
    share_n = ramp_n / sum_n[first : first + length]
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
