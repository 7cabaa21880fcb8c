"""Real spherical harmonics and loudspeaker decoders for ambisonics.

Axes: q direction, s loudspeaker, c ambisonic channel (ACN order), n order, m degree.

Channel c = n(n+1)+m; SN3D or N3D normalisation; no Condon-Shortley phase. Angles are in radians,
azimuth a positive to the left and elevation e upwards: first order is
[1, sin a cos e, sin e, cos a cos e].
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special


def harmonics(
  azimuth_q: np.ndarray, elevation_q: np.ndarray, order: int = 1, norm: str = "sn3d"
) -> np.ndarray:
  """Spherical harmonics of directions.

  Args:
    azimuth_q: [q] radians, + left.
    elevation_q: [q] radians, + up.
    order: highest order N.
    norm: "sn3d" or "n3d" (sqrt(2n+1) times the former).

  Returns:
    float64 [q, (order + 1)^2].

  Raises:
    ValueError: unknown normalisation.
  """
  if norm not in ("sn3d", "n3d"):
    raise ValueError(f'unknown normalisation "{norm}"; use "sn3d" or "n3d"')
  azimuth_q, elevation_q = np.broadcast_arrays(np.atleast_1d(azimuth_q), np.atleast_1d(elevation_q))
  height_q = np.sin(elevation_q)
  columns = []
  for n in range(order + 1):
    for m in range(-n, n + 1):
      degree = abs(m)
      scale = math.sqrt((2 - (m == 0)) * math.factorial(n - degree) / math.factorial(n + degree))
      if norm == "n3d":
        scale *= math.sqrt(2 * n + 1)
      sign = (-1) ** degree  # SciPy's Legendre functions carry the Condon-Shortley phase
      turn_q = np.cos(m * azimuth_q) if m >= 0 else np.sin(degree * azimuth_q)
      columns.append(scale * sign * special.lpmv(degree, n, height_q) * turn_q)
  return np.stack(columns, axis=1)


def ring(speakers: int = 8) -> np.ndarray:
  """Azimuths (radians) of a horizontal ring that starts behind the head: (2 s / S - 1) pi."""
  return (2 * np.arange(speakers) / speakers - 1) * np.pi


def decoder(azimuth_s: np.ndarray, order: int = 1, kind: str = "pinv") -> np.ndarray:
  """Matrix from SN3D channels to the loudspeakers of a horizontal ring.

  Args:
    azimuth_s: [s] radians, equally spaced.
    order: ambisonic order.
    kind: "pinv" is the paper's s' = (D^T D)^-1 D^T Psi (arXiv 2601.15017), with the Moore-Penrose
      inverse because a ring cannot see the vertical channels; gains sum to 1 (beyond first order,
      for horizontal directions alone). "projection" uses the encoding matrix itself, as
      PseudoBinaural does; gains of first order sum to S. "max-re" weights degree m
      of pinv by cos(m pi / (2N+2)), which concentrates the energy towards the source.

  Returns:
    float64 [s, (order + 1)^2].

  Raises:
    ValueError: unknown kind.
  """
  encoding_sc = harmonics(azimuth_s, np.zeros_like(azimuth_s), order)
  if kind == "projection":
    return encoding_sc
  if kind not in ("pinv", "max-re"):
    raise ValueError(f'unknown decoder "{kind}"; use "pinv", "projection" or "max-re"')
  decoder_sc = np.linalg.pinv(encoding_sc.T, rcond=1e-9)
  if kind == "max-re":
    degree_c = np.concatenate([np.abs(np.arange(-n, n + 1)) for n in range(order + 1)])
    decoder_sc = decoder_sc * np.cos(degree_c * np.pi / (2 * order + 2))[None, :]
  return decoder_sc
