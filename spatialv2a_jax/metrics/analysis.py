"""Everything the interaural metrics share, computed once per clip in float64.

Sound is at 16 kHz and each ear's mean is removed. Two framings: `stft_ejf` (1024-point periodic
Hann, hop 256, not centred) for spectra, and rectangular frames of 1024 samples (64 ms), hop 512,
for levels and delays. The phase transform of such a frame is tapered: whitened, what leaks from a
tone cut off at the same sample in both ears is as loud as the tone, and reads as no delay.
A source on the left has ITD > 0: the left ear leads.

Axes: e ear (0 left, 1 right), p sample, i rectangular frame, j STFT frame, f frequency bin, l lag.
"""

import dataclasses
import functools
import math

import numpy as np
import scipy.signal

RATE = 16000
FRAME, FRAME_HOP = 1024, 512
N_FFT, HOP = 1024, 256
MAX_LAG = 16  # 1 ms, the lag range of ISO 3382-1.
FINE = 16  # Lags are read at 1 / (16 * 16 kHz), then refined by a parabola.
SILENT_EAR = 1e-6  # An ear 60 dB below the other counts as silent.
FLOOR, RANGE = 1e-6, 1e-4  # Active frames: above -60 dBFS and within 40 dB of the loudest.
LOW_BAND = (100.0, 1500.0)
PHAT_BAND = (100.0, 7900.0)
NEGATIVE = 0.8  # A positive peak of that share of a negative one is the delay.


@dataclasses.dataclass(frozen=True)
class Peaks:
  """Strongest peak of correlations within +-1 ms, see `peaks`.

  Attributes:
    lag_us: delay of the right ear after the left, microseconds.
    height: signed correlation at the peak.
    ratio: peak over the highest other one, inf without; below 1 where that is a negative one.
  """

  lag_us: np.ndarray
  height: np.ndarray
  ratio: np.ndarray


@dataclasses.dataclass(frozen=True)
class Analysis:
  """One clip, transformed.

  Attributes:
    audio_ep: sound, mean removed.
    energy_ei: energy of each rectangular frame.
    active_i: frames loud enough to count.
    audible_i: active frames in which neither ear is silent.
    stft_ejf: complex spectrogram.
    xc_il: interaural correlation coefficient per frame, lags of `lags()`.
    phat_il: phase transform (GCC-PHAT, 100 to 7900 Hz) per frame, Hann-tapered.
    low_il: correlation coefficient of 100 to 1500 Hz per frame.
  """

  audio_ep: np.ndarray
  energy_ei: np.ndarray
  active_i: np.ndarray
  audible_i: np.ndarray
  stft_ejf: np.ndarray
  xc_il: np.ndarray
  phat_il: np.ndarray
  low_il: np.ndarray

  @property
  def ear_energy_e(self) -> np.ndarray:
    """Energy of each ear over the whole clip."""
    return np.square(self.audio_ep).sum(-1)

  @property
  def undefined(self) -> bool:
    """True where no frame is active: every metric of the clip is NaN."""
    return not self.active_i.any()

  @property
  def ear_silent(self) -> bool:
    """True where one ear lies 60 dB or more below the other."""
    return not self.undefined and bool(one_silent(self.ear_energy_e))


def analyse(audio_ep: np.ndarray) -> Analysis:
  """Transforms a clip.

  Args:
    audio_ep: [2, samples] at 16 kHz, at least 1024 samples, full scale 1.

  Raises:
    ValueError: for another shape, a shorter clip or samples that are not finite.
  """
  audio_ep = np.asarray(audio_ep, np.float64)
  if audio_ep.ndim != 2 or audio_ep.shape[0] != 2 or audio_ep.shape[1] < N_FFT:
    raise ValueError(f"want [2, at least {N_FFT}] samples, got {audio_ep.shape}")
  if not np.isfinite(audio_ep).all():
    raise ValueError("samples that are not finite")
  audio_ep = audio_ep - audio_ep.mean(-1, keepdims=True)

  frames_eip = framed(audio_ep, FRAME, FRAME_HOP)
  energy_ei = np.square(frames_eip).sum(-1)
  power_i = energy_ei.sum(0) / (2 * FRAME)
  active_i = power_i > max(FLOOR, RANGE * power_i.max())
  size = 2 * FRAME  # Zero padding makes the correlation linear, not circular.
  spectra_eif = np.fft.rfft(frames_eip, size)
  xc_il = coefficient(spectra_eif, size)
  return Analysis(
    audio_ep=audio_ep,
    energy_ei=energy_ei,
    active_i=active_i,
    audible_i=active_i & ~one_silent(energy_ei),
    stft_ejf=stft(audio_ep),
    xc_il=xc_il,
    phat_il=phat(np.fft.rfft(frames_eip * _hann(FRAME), size), size),
    low_il=coefficient(spectra_eif, size, LOW_BAND),
  )


def framed(x_ep: np.ndarray, length: int, hop: int) -> np.ndarray:
  """Returns overlapping frames [e, frame, length] that lie inside the signal."""
  return np.lib.stride_tricks.sliding_window_view(x_ep, length, -1)[:, ::hop]


def stft(audio_ep: np.ndarray) -> np.ndarray:
  """Returns the complex spectrogram [e, j, 513]."""
  return np.fft.rfft(framed(audio_ep, N_FFT, HOP) * _hann(N_FFT))


def _hann(samples: int) -> np.ndarray:
  return np.asarray(scipy.signal.get_window("hann", samples))


def one_silent(energy_ex: np.ndarray) -> np.ndarray:
  """True where the weaker ear has at most 1e-6 of the other's energy."""
  return energy_ex.min(0) <= SILENT_EAR * energy_ex.max(0)


def lags(max_lag: int = MAX_LAG) -> np.ndarray:
  """Returns the lags in samples at which correlations are read."""
  return np.arange(-max_lag * FINE, max_lag * FINE + 1) / FINE


def bins(size: int, low_high: tuple[float, float]) -> tuple[int, int]:
  """Returns the first bin of a band in Hz and the first one past it, both edges included."""
  low, high = (hz * size / RATE for hz in low_high)
  return math.ceil(low), math.floor(high) + 1


def coefficient(
  spectra_exf: np.ndarray,
  size: int,
  low_high: tuple[float, float] | None = None,
  max_lag: int = MAX_LAG,
) -> np.ndarray:
  """Returns the interaural correlation coefficient at fine lags; 0 where an ear has no energy.

  IACF(lag) = sum_n l[n] r[n + lag] / sqrt(sum l^2 sum r^2), interpolated as by zero padding of
  the spectrum. Whole signals normalise it, so a rectangular frame of 1024 samples reads
  1 - k / 1024 for a pure delay of k samples.

  Args:
    spectra_exf: rfft of both ears, zero padded to `size`.
    size: length of that transform (even).
    low_high: band in Hz; None keeps all.
    max_lag: largest lag in samples.
  """
  low, high = (0, spectra_exf.shape[-1]) if low_high is None else bins(size, low_high)
  part_exf = spectra_exf[..., low:high]
  weight_f = np.full(spectra_exf.shape[-1], 2.0)
  weight_f[[0, -1]] = 1.0
  # Plain sums: threads of a BLAS cost more than they save here.
  energy_ex = np.einsum("exf,f->ex", np.square(np.abs(part_exf)), weight_f[low:high]) / size
  cross_xf = part_exf[0].conj() * part_exf[1] * weight_f[low:high]
  scale_x = np.maximum(np.sqrt(energy_ex.prod(0)), np.finfo(np.float64).tiny)
  return _at_lags(cross_xf, low, size, max_lag) / scale_x[..., None]


def phat(spectra_exf: np.ndarray, size: int) -> np.ndarray:
  """Returns GCC-PHAT at fine lags: the correlation of the cross-spectrum over its magnitude.

  Scaled so that a pure delay peaks at 1. Bins 80 dB below the strongest are left out: their phase
  is that of rounding, and of what leaks from tones.
  """
  low, high = bins(size, PHAT_BAND)
  cross_xf = spectra_exf[0, :, low:high].conj() * spectra_exf[1, :, low:high]
  size_xf = np.abs(cross_xf)
  keep_xf = size_xf > 1e-8 * size_xf.max(-1, keepdims=True)
  white_xf = np.where(keep_xf, cross_xf / np.where(keep_xf, size_xf, 1.0), 0.0)
  total_x = np.abs(white_xf).sum(-1) / size
  return _at_lags(white_xf, low, size, MAX_LAG) / np.where(total_x > 0, total_x, 1.0)[..., None]


def peaks(corr_xl: np.ndarray) -> Peaks:
  """Finds the strongest peak per row, refined by a parabola through three lags.

  A negative peak, as of an ear with the other polarity, counts if no positive one has `NEGATIVE` of
  its height: those half a period of a tone beside its delay are often the higher ones.
  """
  size_xl = np.abs(corr_xl)
  positive_x = corr_xl.max(-1) >= NEGATIVE * size_xl.max(-1)
  best_x = np.where(positive_x, corr_xl.argmax(-1), size_xl.argmax(-1))
  row_x = np.arange(len(best_x))
  inner_x = np.clip(best_x, 1, size_xl.shape[-1] - 2)
  left_x, mid_x, right_x = (size_xl[row_x, inner_x + step] for step in (-1, 0, 1))
  bend_x = left_x - 2 * mid_x + right_x
  shift_x = np.where(bend_x < 0, 0.5 * (left_x - right_x) / np.where(bend_x < 0, bend_x, 1), 0.0)
  shift_x = np.where(inner_x == best_x, shift_x, 0.0)  # No refinement at the edge of the range.

  padded_xl = np.pad(size_xl, ((0, 0), (1, 1)))
  hill_xl = (size_xl >= padded_xl[:, :-2]) & (size_xl > padded_xl[:, 2:])
  hill_xl[row_x, best_x] = False
  second_x = np.where(hill_xl, size_xl, 0.0).max(-1)
  top_x = size_xl[row_x, best_x]
  ratio_x = np.where(second_x > 0, top_x / np.where(second_x > 0, second_x, 1.0), np.inf)
  center = (size_xl.shape[-1] - 1) / 2
  lag_x = (best_x - center + shift_x) / FINE
  return Peaks(lag_x * 1e6 / RATE, corr_xl[row_x, best_x], ratio_x)


def _at_lags(cross_xf: np.ndarray, low: int, size: int, max_lag: int) -> np.ndarray:
  """Inverse transform at fine lags only, of bins from `low` on, by the chirp z-transform."""
  turn_l = np.exp(2j * np.pi / size * low * lags(max_lag))
  return (_zoom(cross_xf.shape[-1], size, max_lag)(cross_xf) * turn_l).real / size


@functools.lru_cache(maxsize=16)
def _zoom(count: int, size: int, max_lag: int) -> scipy.signal.CZT:
  turn = 2j * np.pi / size
  points = 2 * max_lag * FINE + 1
  return scipy.signal.CZT(count, points, w=np.exp(turn / FINE), a=np.exp(turn * max_lag))
