"""Measured head-related responses: SOFA files (AES69) and interpolation over scattered directions.

Axes: d measured direction, q queried direction, e ear (0 left, 1 right), t tap, f frequency bin,
x Cartesian coordinate (front, left, up), h triangle of the hull, k corner of a triangle.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import h5py
import numpy as np
import scipy

from spatialv2a_jax.errors import UserError

CONVENTION = "SimpleFreeFieldHRIR"
GAP_DEG = 45.0
SAME_DISTANCE = 1.05  # Largest over smallest; measured ones scatter by less.
ONSET_FLOOR = 1e-3  # of the largest magnitude: keeps spectral zeros out of the logarithm
ONSET_OVERSAMPLING = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """Responses ready for interpolation.

  Attributes:
    direction_d3: float64 [d, 3] unit vectors.
    aligned_det: float32 [d, 2, t], onset on tap t // 4.
    onset_de: float64 [d, 2] onset in samples, 0 for the set's mean over directions and ears.
  """

  direction_d3: np.ndarray
  aligned_det: np.ndarray
  onset_de: np.ndarray


def read(path: str, sample_rate: int, taps: int) -> Measured:
  """Reads a SimpleFreeFieldHRIR file, resamples it and takes the onsets out.

  Args:
    path: an existing file.
    sample_rate: Hz of the result.
    taps: length of the result; longer tails are faded out.

  Raises:
    UserError: not such a file, its left and right ears are exchanged, or it has directions at
      several distances.
  """
  response_det, rate, direction_d3 = _read_file(path)
  _check_ears(path, response_det, direction_d3)  # At its own rate: at low ones ears differ less.
  ratio = Fraction(sample_rate, rate)
  # a response is a density over samples: fewer samples per second need proportionally larger ones
  response_det = scipy.signal.resample_poly(
    response_det, ratio.numerator, ratio.denominator, axis=-1
  )
  response_det = response_det / float(ratio)
  onset_de = np.stack([_onsets(response_et) for response_et in response_det])
  aligned_det = _align(response_det, onset_de, taps)
  return Measured(direction_d3, aligned_det.astype(np.float32), onset_de - onset_de.mean())


def vectors(azimuth_q: np.ndarray, elevation_q: np.ndarray) -> np.ndarray:
  """Unit vectors [q, 3] (front, left, up) of directions in degrees."""
  azimuth_q, elevation_q = np.radians(azimuth_q), np.radians(elevation_q)
  flat_q = np.cos(elevation_q)
  front_q, left_q = flat_q * np.cos(azimuth_q), flat_q * np.sin(azimuth_q)
  return np.stack([front_q, left_q, np.sin(elevation_q)], axis=-1)


class Triangles:
  """Barycentric interpolation over the convex hull of the measured directions.

  Where a set leaves a gap around a coordinate axis (the floor, or all but a ring), the gap is
  spanned from a corner of zero weight, so that its directions use the measurements at the rim.
  """

  def __init__(self, direction_d3: np.ndarray):
    """Triangulates [d, 3] unit vectors."""
    axis_63 = np.concatenate([np.eye(3), -np.eye(3)])
    lonely_6 = np.max(axis_63 @ direction_d3.T, axis=1) < math.cos(math.radians(GAP_DEG))
    corner_d3 = np.concatenate([direction_d3, axis_63[lonely_6]])
    self.measured = len(direction_d3)
    self.direction_d3 = direction_d3
    self.corner_hk = scipy.spatial.ConvexHull(corner_d3).simplices
    inverse_hk3 = np.linalg.pinv(corner_d3[self.corner_hk].transpose(0, 2, 1))
    self.inverse_kh3 = np.ascontiguousarray(inverse_hk3.transpose(1, 0, 2))

  def __call__(
    self, azimuth_q: np.ndarray, elevation_q: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners and weights of queried directions; see `hrtf.Hrtf.locate`."""
    vector_q3 = vectors(azimuth_q, elevation_q)
    weight_khq = self.inverse_kh3 @ vector_q3.T
    # the triangle around a direction is the one that gives it no negative weight
    inside_q = np.argmax(np.min(weight_khq, axis=0), axis=0)
    weight_qk = np.clip(weight_khq[:, inside_q, np.arange(len(inside_q))].T, 0, None)
    index_qk = self.corner_hk[inside_q]
    weight_qk = np.where(index_qk < self.measured, weight_qk, 0)
    total_q1 = weight_qk.sum(axis=1, keepdims=True)
    # at the middle of a gap no measurement has a share: take the nearest
    nearest_q1 = np.argmax(vector_q3 @ self.direction_d3.T, axis=1)[:, None]
    empty_q1 = total_q1 < 1e-6
    weight_qk = np.where(empty_q1, 1 / 3, weight_qk / np.where(empty_q1, 1, total_q1))
    index_qk = np.where(empty_q1 | (index_qk >= self.measured), nearest_q1, index_qk)
    return index_qk, weight_qk, np.zeros(len(index_qk), bool)


def _text(attributes: h5py.AttributeManager, name: str) -> str:
  """A text attribute, however the writer wrapped it; "none" if absent."""
  values = np.asarray(attributes.get(name, "none")).reshape(-1)
  value = values[0] if values.size else ""
  return value.decode() if isinstance(value, bytes) else str(value)


def _variables(path: str, file: h5py.File) -> tuple[np.ndarray, float, np.ndarray, str, np.ndarray]:
  """Responses, their rate, positions and what kind those are, and stored delays."""
  convention = _text(file.attrs, "SOFAConventions")
  if convention != CONVENTION:
    raise UserError(f"{path} has SOFA convention {convention}; give a {CONVENTION} file")
  try:
    position = file["SourcePosition"]
    return (
      np.asarray(file["Data.IR"], np.float64),
      float(np.asarray(file["Data.SamplingRate"]).reshape(-1)[0]),
      np.asarray(position, np.float64),
      _text(position.attrs, "Type"),
      np.asarray(file["Data.Delay"] if "Data.Delay" in file else 0, np.float64),
    )
  except KeyError as error:
    raise UserError(f"{path} lacks a variable of {CONVENTION}: {error}") from error
  except (TypeError, ValueError, IndexError) as error:
    raise UserError(f"{path} has a variable that holds no numbers: {error}") from error


def _read_file(path: str) -> tuple[np.ndarray, int, np.ndarray]:
  """Responses with their stored delays applied, the rate, unit vectors."""
  if not h5py.is_hdf5(path):
    raise UserError(f"{path} is not a SOFA file; give a {CONVENTION} file as sofa:FILE")
  try:
    with h5py.File(path) as file:
      response_det, rate, position_d3, kind, delay_de = _variables(path, file)
  except (OSError, RuntimeError) as error:  # A file that is cut short fails wherever it is read.
    raise UserError(f"{path} is damaged ({error}); copy it again") from None
  shape = response_det.shape
  if len(shape) != 3 or shape[1] != 2 or 0 in shape or position_d3.shape != (shape[0], 3):
    raise UserError(f"{path}: Data.IR {shape} must be (directions, 2, taps); export it again")
  finite = all(np.isfinite(x).all() for x in (response_det, position_d3, delay_de, rate))
  if not finite or rate <= 0 or rate != round(rate):
    raise UserError(
      f"{path}: needs finite responses, positions and delays, and a whole sampling rate; export it"
      " again"
    )
  if kind.startswith("cartesian"):
    distance_d = np.linalg.norm(position_d3, axis=1)
    direction_d3 = position_d3 / np.maximum(distance_d, np.finfo(np.float64).tiny)[:, None]
  else:
    distance_d = position_d3[:, 2]
    direction_d3 = vectors(position_d3[:, 0], position_d3[:, 1])
  if distance_d.max() > SAME_DISTANCE * distance_d.min():
    raise UserError(
      f"{path} was measured at several distances, {distance_d.min():g} to {distance_d.max():g} m;"
      " use a file of one of them"
    )
  try:
    shift_de = np.broadcast_to(delay_de, shape[:2])
  except ValueError:
    raise UserError(
      f"{path}: Data.Delay {delay_de.shape} must be (1 or directions, 2); export it again"
    ) from None
  shift_de = shift_de - min(shift_de.min(), 0.0)
  if np.any(shift_de):
    padded = np.pad(response_det, ((0, 0), (0, 0), (0, math.ceil(shift_de.max()))))
    response_det = _shift(padded, shift_de)
  return response_det, round(rate), direction_d3


def _shift(signal_det: np.ndarray, delay_de: np.ndarray) -> np.ndarray:
  """Circular delay by fractions of a sample."""
  size = signal_det.shape[-1]
  omega_f = 2 * np.pi * np.arange(size // 2 + 1) / size
  return np.fft.irfft(np.fft.rfft(signal_det) * np.exp(-1j * delay_de[..., None] * omega_f), size)


def _onsets(response_et: np.ndarray) -> np.ndarray:
  """Delay of each response against its own minimum-phase version, in samples.

  The cross-correlation of the two weighs the whole response, so that neighbouring directions get
  neighbouring delays; a threshold would jump between lobes.
  """
  size = 2 * response_et.shape[-1]
  spectrum_ef = np.fft.rfft(response_et, size)
  magnitude_ef = np.abs(spectrum_ef)
  floor_e1 = np.maximum(ONSET_FLOOR * magnitude_ef.max(axis=-1, keepdims=True), 1e-30)
  cepstrum_et = np.fft.irfft(np.log(np.maximum(magnitude_ef, floor_e1)), size)
  fold_t = np.zeros(size)
  fold_t[0], fold_t[1 : size // 2] = 1, 2
  minimum_ef = np.exp(np.fft.rfft(cepstrum_et * fold_t[None, :]))
  cross_et = np.fft.irfft(spectrum_ef * np.conj(minimum_ef), ONSET_OVERSAMPLING * size)
  return np.argmax(cross_et[:, : cross_et.shape[-1] // 2], axis=-1) / ONSET_OVERSAMPLING


def _align(response_det: np.ndarray, onset_de: np.ndarray, taps: int) -> np.ndarray:
  """Responses with onset on tap taps // 4, cut to `taps`; a longer tail fades over an eighth."""
  lead, length = taps // 4, response_det.shape[-1]
  padded = np.pad(response_det, ((0, 0), (0, 0), (lead, 2 * taps)))
  aligned_det = _shift(padded, -onset_de)[..., :taps]
  fade = taps // 8
  if length > taps - lead:
    aligned_det[..., -fade:] *= np.cos(np.linspace(0, np.pi / 2, fade)) ** 2
  return aligned_det


def _check_ears(path: str, response_det: np.ndarray, direction_d3: np.ndarray) -> None:
  """Refuses a set whose left does not sound left: some published SOFA files exchange the ears."""
  azimuth_d = np.degrees(np.arctan2(direction_d3[:, 1], direction_d3[:, 0]))
  elevation_d = np.degrees(np.arcsin(np.clip(direction_d3[:, 2], -1, 1)))
  side_d = (azimuth_d >= 59.9) & (azimuth_d <= 90.1) & (np.abs(elevation_d) <= 20)
  if not np.any(side_d):
    raise UserError(
      f"{path} has no direction at azimuth +60 to +90 to tell left from right; use another"
    )
  onset_de = np.stack([_onsets(response_et) for response_et in response_det[side_d]])
  energy_de = np.sum(response_det[side_d] ** 2, axis=-1) + 1e-30
  ild_db = float(np.median(10 * np.log10(energy_de[:, 0] / energy_de[:, 1])))
  lead = float(np.median(onset_de[:, 1] - onset_de[:, 0]))
  if ild_db <= 5 or lead <= 0:
    raise UserError(
      f"{path}: left and right are exchanged or mislabelled (a source on the left has ILD"
      f" {ild_db:.1f} dB, left leads by {lead:.1f} samples; need over 5 and over 0);"
      " use a corrected SOFA file"
    )
