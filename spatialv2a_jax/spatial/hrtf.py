"""Head-related filters: the analytic rigid sphere, measured SOFA sets, laws of interaural time.

Axes: d tabulated direction, q queried direction, k neighbour of a query, e ear (0 left, 1 right),
t tap, f frequency bin, m order of the series.

Azimuth is in degrees, 0 in front and +90 on the left; elevation is positive upwards. A source on
the left reaches the left ear first and louder. Filters are stored with their onset moved to one
common tap and the onset time beside them, so that neighbours can be averaged without combing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.spatial import sofa as sofa_file

HEAD_RADIUS_M = 0.0875
SOUND_SPEED_M_S = 343.0
FILTER_S = 0.016  # 256 taps at 16 kHz
# the top of the band fades to zero: a jump at the Nyquist frequency rings through the whole filter
FADE_FROM = 0.95
REFERENCE_HZ = (100.0, 500.0)  # Where heads differ little in what comes from the front.
LEAST_REFERENCE = 0.03  # Share of the largest gain; heads are far above it.

Located = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Hrtf:
  """A set of head-related impulse responses and the rule that interpolates between its directions.

  Attributes:
    sample_rate: Hz.
    name: "sphere" or "sofa:<file name>".
    hash: identity of the set (16 hex digits): equal hashes mean equal filters.
    aligned_det: float32 [d, 2, t], responses whose onset sits on tap `lead`.
    onset_de: float64 [d, 2], onset in samples after the wave would pass the centre of the head.
    locate: (azimuth_q, elevation_q) in degrees -> index_qk, weight_qk (rows sum to 1), mirrored_q
      (bool: exchange the ears of the tabulated direction).
  """

  sample_rate: int
  name: str
  hash: str
  aligned_det: np.ndarray
  onset_de: np.ndarray
  locate: Callable[[np.ndarray, np.ndarray], Located]

  @property
  def taps(self) -> int:
    """Length of a response in samples."""
    return self.aligned_det.shape[-1]

  @property
  def lead(self) -> int:
    """Delay common to all responses: the tap of a wave passing the centre of the head."""
    return self.taps // 4

  def spectra(self, azimuth_q: np.ndarray, elevation_q: np.ndarray, size: int) -> np.ndarray:
    """Interpolated transfer functions of both ears, `lead` samples late.

    Args:
      azimuth_q: [q] degrees, + left.
      elevation_q: [q] degrees, + up.
      size: length of the real FFT, at least `taps`.

    Returns:
      complex64 [2, q, size // 2 + 1].
    """
    index_qk, weight_qk, mirrored_q = self.locate(azimuth_q, elevation_q)
    table_def = _table_spectra(self, size)
    omega_f = (2 * np.pi / size) * np.arange(size // 2 + 1)
    spectra_eqf = np.empty((2, len(index_qk), omega_f.size), np.complex64)
    # ear by ear in equal shapes, so that a mirrored source swaps the ears bit for bit
    for ear in range(2):
      column_q = np.where(mirrored_q, 1 - ear, ear)
      onset_q = np.sum(weight_qk * self.onset_de[index_qk, column_q[:, None]], axis=1)
      angle_qf = (onset_q[:, None] * omega_f[None, :]).astype(np.float32)
      delay_qf = np.empty(angle_qf.shape, np.complex64)
      delay_qf.real, delay_qf.imag = np.cos(angle_qf), -np.sin(angle_qf)
      total_qf = np.zeros_like(delay_qf)
      for k in range(index_qk.shape[1]):
        weight_q1 = weight_qk[:, k, None].astype(np.float32)
        total_qf += weight_q1 * table_def[index_qk[:, k], column_q]
      spectra_eqf[ear] = total_qf * delay_qf
    return spectra_eqf

  def ir(self, azimuth_deg: float, elevation_deg: float = 0.0) -> np.ndarray:
    """Responses of one direction, float32 [2, taps]; the head's centre is at tap `lead`."""
    size = 2 * self.taps
    spectra_eqf = self.spectra(np.array([azimuth_deg]), np.array([elevation_deg]), size)
    return np.fft.irfft(spectra_eqf[:, 0], size)[:, : self.taps].astype(np.float32)


@functools.lru_cache(maxsize=16)
def _table_spectra(hrtf: Hrtf, size: int) -> np.ndarray:
  return np.fft.rfft(hrtf.aligned_det, size).astype(np.complex64)


def sphere_response(
  frequency_f: np.ndarray,
  angle_deg_d: np.ndarray,
  distance_m: float | None = None,
  radius_m: float = HEAD_RADIUS_M,
) -> np.ndarray:
  """Pressure on a rigid sphere over the free-field pressure at its centre.

  Args:
    frequency_f: [f] Hz, 0 allowed.
    angle_deg_d: [d] angle between the source and the ear, 0 to 180 degrees.
    distance_m: distance of the source from the centre; None is infinitely far.
    radius_m: radius of the sphere.

  Returns:
    complex128 [d, f] for time factor exp(+iwt); an early arrival has a rising phase. The series
    is that of Duda and Martens, J. Acoust. Soc. Am. 104 (1998).

  Raises:
    ValueError: the source is not outside the sphere.
  """
  if distance_m is not None and distance_m <= radius_m:
    raise ValueError(f"distance_m={distance_m} is not outside a head of radius {radius_m} m")
  mu_f = np.maximum(2 * np.pi * np.asarray(frequency_f) * radius_m / SOUND_SPEED_M_S, 1e-9)
  extra = 30 if distance_m is None else 60
  last = int(np.ceil(mu_f.max() + 4 * np.cbrt(mu_f.max()))) + extra
  order_m = np.arange(last + 1)
  legendre_dm = special.eval_legendre(order_m[None, :], np.cos(np.radians(angle_deg_d))[:, None])

  def hankel(mu: np.ndarray, derivative: bool) -> np.ndarray:
    grid = order_m[:, None], mu[None, :]
    real = special.spherical_jn(*grid, derivative)
    imaginary = special.spherical_yn(*grid, derivative)
    return real - 1j * np.where(np.isfinite(imaginary), imaginary, np.inf)

  with np.errstate(all="ignore"):
    slope_mf = hankel(mu_f, True)
    if distance_m is None:
      term_mf = 1j ** ((order_m - 1) % 4)[:, None] / (mu_f[None, :] ** 2 * slope_mf)
    else:
      rho = distance_m / radius_m
      outer_mf = hankel(mu_f * rho, False)
      scale_f = -(rho / mu_f) * np.exp(1j * mu_f * rho)
      term_mf = scale_f[None, :] * outer_mf / slope_mf
    # high orders of a low frequency overflow in the denominator: their true share is zero
    term_mf = np.where(np.isfinite(term_mf), term_mf, 0)
  response_df = legendre_dm @ ((2 * order_m + 1)[:, None] * term_mf)
  return np.where(np.asarray(frequency_f)[None, :] == 0, 1, response_df)


def _sphere_onset_s(
  angle_deg_d: np.ndarray, distance_m: float | None, radius_m: float
) -> np.ndarray:
  """First arrival at the ear, seconds after the centre: straight, then along the shaded arc."""
  angle_d = np.radians(angle_deg_d)
  if distance_m is None:
    path_d = np.where(angle_d < np.pi / 2, -np.cos(angle_d), angle_d - np.pi / 2) * radius_m
  else:
    horizon = np.arccos(radius_m / distance_m)
    chord_d = np.sqrt(distance_m**2 + radius_m**2 - 2 * distance_m * radius_m * np.cos(angle_d))
    tangent = np.sqrt(distance_m**2 - radius_m**2)
    arc_d = tangent + radius_m * (angle_d - horizon)
    path_d = np.where(angle_d < horizon, chord_d, arc_d) - distance_m
  return path_d / SOUND_SPEED_M_S


def _locate_lateral(azimuth_q: np.ndarray, elevation_q: np.ndarray) -> Located:
  """Neighbours on the 0 to 90 degree grid of lateral angle: a sphere knows no other coordinate."""
  sine_q = np.sin(np.radians(azimuth_q)) * np.cos(np.radians(elevation_q))
  lateral_q = np.degrees(np.arcsin(np.clip(np.abs(sine_q), 0, 1)))
  low_q = np.minimum(lateral_q.astype(np.int64), 89)
  weight_q = lateral_q - low_q
  return np.stack([low_q, low_q + 1], 1), np.stack([1 - weight_q, weight_q], 1), sine_q < 0


@functools.lru_cache(maxsize=16)
def sphere(
  sample_rate: int, distance_m: float | None = None, radius_m: float = HEAD_RADIUS_M
) -> Hrtf:
  """Rigid-sphere head with ears at +-90 degrees, on a 1 degree grid of the lateral angle.

  Exactly left/right symmetric and needs no data. It has no pinna: front and back sound alike, and
  elevation only narrows the image. Cached per argument set.

  Args:
    sample_rate: Hz; 256 taps at 16 kHz, the same duration elsewhere.
    distance_m: range of the source for near-field cues, without the 1/r law; None is far field.
    radius_m: radius of the head.
  """
  taps = 4 * round(FILTER_S * sample_rate / 4)
  lateral_deg_d = np.arange(91.0)
  angle_deg_d = np.concatenate([90 - lateral_deg_d, 90 + lateral_deg_d])
  frequency_f = np.arange(taps // 2 + 1) * (sample_rate / taps)
  onset_s_d = _sphere_onset_s(angle_deg_d, distance_m, radius_m)
  advance_df = onset_s_d[:, None] - taps // 4 / sample_rate
  response_df = sphere_response(frequency_f, angle_deg_d, distance_m, radius_m)
  ratio_f = frequency_f / (sample_rate / 2)
  fade_f = np.cos(np.pi / 2 * np.clip((ratio_f - FADE_FROM) / (1 - FADE_FROM), 0, 1)) ** 2
  phase_df = 2 * np.pi * frequency_f[None, :] * advance_df
  aligned_df = response_df * fade_f[None, :] * np.exp(1j * phase_df)
  aligned_dt = np.fft.irfft(aligned_df, taps).astype(np.float32)
  identity = f"sphere 1 rate={sample_rate} distance={distance_m} radius={radius_m}"
  return Hrtf(
    sample_rate=sample_rate,
    name="sphere",
    hash=hashlib.sha256(identity.encode()).hexdigest()[:16],
    aligned_det=np.ascontiguousarray(aligned_dt.reshape(2, 91, taps).transpose(1, 0, 2)),
    onset_de=(onset_s_d * sample_rate).reshape(2, 91).T,
    locate=_locate_lateral,
  )


def sofa(path: str | os.PathLike[str], sample_rate: int) -> Hrtf:
  """Measured head from a SimpleFreeFieldHRIR file (AES69), resampled to `sample_rate`.

  Directions between measurements are interpolated over the triangle that surrounds them. Files have
  any level: this has that of the sphere, for what comes from the front at `REFERENCE_HZ`.

  Raises:
    UserError: missing file, not a SOFA file of that convention, of several distances, or left and
      right exchanged.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise UserError(f"no such SOFA file: {path}; give an existing file as sofa:FILE")
  return _sofa(path, os.stat(path).st_mtime_ns, sample_rate)


@functools.lru_cache(maxsize=4)
def _sofa(path: str, modified_ns: int, sample_rate: int) -> Hrtf:
  del modified_ns  # part of the cache key only: an edited file is read again
  measured = sofa_file.read(path, sample_rate, 4 * round(FILTER_S * sample_rate / 4))
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256")
  digest.update(f"rate={sample_rate} level=sphere".encode())
  head = Hrtf(
    sample_rate=sample_rate,
    name=f"sofa:{os.path.basename(path)}",
    hash=digest.hexdigest()[:16],
    aligned_det=measured.aligned_det,
    onset_de=measured.onset_de,
    locate=sofa_file.Triangles(measured.direction_d3),
  )
  (want, _), (have, loudest) = _frontal(sphere(sample_rate)), _frontal(head)
  if have < LEAST_REFERENCE * loudest:
    raise UserError(f"{path} has next to nothing at 100 to 500 Hz; use an unfiltered SOFA file")
  gain = np.float32(want / have)
  return dataclasses.replace(head, aligned_det=gain * measured.aligned_det)


def _frontal(head: Hrtf) -> tuple[float, float]:
  """Returns the gain of what comes from the front: rms at `REFERENCE_HZ`, and the largest."""
  size = 2 * head.taps
  low, high = (math.ceil(hz * size / head.sample_rate) for hz in REFERENCE_HZ)
  gain_ef = np.abs(np.fft.rfft(head.ir(0), size))
  return float(np.sqrt(np.square(gain_ef[:, low:high]).mean())), float(gain_ef.max())


def load(name: str, sample_rate: int) -> Hrtf:
  """Head by name: "sphere" or "sofa:FILE".

  Raises:
    UserError: unknown name, or a SOFA file that cannot be used.
  """
  if name == "sphere":
    return sphere(sample_rate)
  if name.startswith("sofa:"):
    return sofa(name.removeprefix("sofa:"), sample_rate)
  raise UserError(f'unknown HRTF "{name}"; use "sphere" or "sofa:FILE"')


_HEAD_US = 1e6 * HEAD_RADIUS_M / SOUND_SPEED_M_S


def woodworth_azimuth_deg(itd_us: ArrayLike) -> np.ndarray:
  """Lateral angle th, degrees, whose time (a/c)(th + sin th) is `itd_us`; +-90 beyond the largest.

  Woodworth's law for high frequencies; the left ear leads where it is above 0.
  """
  limit = np.pi / 2 + 1
  target = np.clip(np.asarray(itd_us, np.float64) / _HEAD_US, -limit, limit)
  lateral = target / 2
  for _ in range(6):  # Newton: the slope lies in [1, 2]
    lateral = lateral - (lateral + np.sin(lateral) - target) / (1 + np.cos(lateral))
  return np.degrees(lateral)


def pixel_to_azimuth(u: ArrayLike, hfov_deg: float = 120.0, law: str = "linear") -> np.ndarray:
  """Azimuth in degrees (+ left) of an image column.

  Args:
    u: column, 0 at the left edge to 1 at the right edge.
    hfov_deg: horizontal field of view, below 180 for the pinhole law.
    law: "linear" (PseudoBinaural) or "pinhole" (a perspective camera).

  Raises:
    ValueError: unknown law.
  """
  if law == "linear":
    return (0.5 - np.asarray(u, np.float64)) * hfov_deg
  if law == "pinhole":
    return np.degrees(
      np.arctan((1 - 2 * np.asarray(u, np.float64)) * np.tan(np.radians(hfov_deg) / 2))
    )
  raise ValueError(f'unknown law "{law}"; use "linear" or "pinhole"')
