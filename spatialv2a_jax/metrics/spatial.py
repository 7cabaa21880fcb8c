"""Interaural cues of one clip: coherence, level, time, phase and spectral differences.

No published definition of the paper's IACC, ILD, ITD, ISD and IPD exists (arXiv 2601.15017), so
each usual variant is computed under a name that carries its window and unit. A source on the left
has ILD > 0 and ITD > 0. Undefined is NaN, never 0: everything when no frame is active; delays
and phases when one ear is silent (then IACC is 0 and ILD is clipped to +-60 dB, and flags say so).

Definitions, with the rules of `analysis`:
  iacc_clip, iacc_frame  max over |lag| <= 1 ms (whole samples) of |IACF|, whole clip or mean over
                         active frames; independent ears read about 2.4 / sqrt(samples), not 0
  iacc_lag0, iacc_octave IACF at lag 0; mean of `iacc_clip` in the octaves of 500, 1000, 2000 Hz
  iacf_sign              sign of IACF at that peak: -1 is a polarity flip
  ild_clip_db            10 log10(E_left / E_right), signed; `_abs` without the sign
  ild_frame_db           mean |.| over active frames (headline); `_signed` keeps the sign
  ild_tf_db              mean |20 log10(|L| / |R|)| over active time-frequency bins; `_signed`
  itd_xc, _phat, _low    strongest peak (`analysis.peaks`) of IACF, of GCC-PHAT (100 to 7900 Hz), of
                         IACF in 100 to 1500 Hz; `_clip_us` signed, `_frame_us` mean |.| over active
                         frames (headline: itd_phat_frame_us), `_frame_signed_us` keeps the sign
  itd_phat_rejected      share of frames left out of itd_phat_frame: peak < 1.2 x second peak
  itd_clip_flagged       1 where the clip has no delay to speak of: |IACF| is larger beyond 1 ms
                         or below 0.1 everywhere; the clip delays are then NaN
  ipd_100_1500_w_rad     mean |angle(L R*)| in 100 to 1500 Hz weighted by |L||R| (headline)
  ipd_tf_rad             unweighted mean over active bins of the full band; pi / 2 for any whole
                         delay of white noise, hence no measure of delay
  ipd_coh                |sum L R*| / sum |L||R|
  isd_l1                 sum |M_L - M_R| / sum (M_L + M_R) over magnitudes (headline)
  isd_l2, isd_cos        sum (M_L - M_R)^2 / sum (M_L^2 + M_R^2); 1 - cosine of magnitudes
  isd_db                 standard deviation over third octaves of the level difference
  side_energy_ratio      energy of (L - R) / 2 over that of both (L + R) / 2 and (L - R) / 2
  spl_left_dbfs, _right_ 20 log10 RMS of each ear

Axes: e ear, p sample, i rectangular frame, j STFT frame, f frequency bin, l lag, r band.
"""

import numpy as np
import scipy.fft
import scipy.signal

from spatialv2a_jax.metrics import analysis as an
from spatialv2a_jax.metrics.analysis import Analysis, Peaks
from spatialv2a_jax.metrics.stats import Metric

ILD_LIMIT_DB = 60.0
PHAT_RATIO = 1.2
MIN_COHERENCE = 0.1
EDGE = an.MAX_LAG * an.FINE  # Where +-1 ms begins in correlations read to +-2 ms.
THIRDS_HZ = 1000.0 * 2.0 ** (np.arange(-9, 9) / 3)  # 125 Hz to 6.3 kHz.
OCTAVES_HZ = (500.0, 1000.0, 2000.0)

METRICS: dict[str, Metric] = {
  "iacc_clip": Metric("1"),
  "iacc_frame": Metric("1"),
  "iacc_lag0": Metric("1"),
  "iacc_octave": Metric("1"),
  "iacf_sign": Metric("1"),
  "ild_clip_db": Metric("dB"),
  "ild_clip_abs_db": Metric("dB"),
  "ild_frame_db": Metric("dB"),
  "ild_frame_signed_db": Metric("dB"),
  "ild_tf_db": Metric("dB"),
  "ild_tf_signed_db": Metric("dB"),
  "itd_xc_clip_us": Metric("us"),
  "itd_xc_frame_us": Metric("us"),
  "itd_xc_frame_signed_us": Metric("us"),
  "itd_xc_frame_samples": Metric("samples at 16 kHz"),
  "itd_phat_clip_us": Metric("us"),
  "itd_phat_frame_us": Metric("us"),
  "itd_phat_frame_signed_us": Metric("us"),
  "itd_phat_rejected": Metric("share"),
  "itd_low_clip_us": Metric("us"),
  "itd_low_frame_us": Metric("us"),
  "itd_low_frame_signed_us": Metric("us"),
  "itd_clip_flagged": Metric("share"),
  "ipd_100_1500_w_rad": Metric("rad"),
  "ipd_tf_rad": Metric("rad"),
  "ipd_coh": Metric("1"),
  "isd_l1": Metric("1"),
  "isd_l2": Metric("1"),
  "isd_cos": Metric("1"),
  "isd_db": Metric("dB"),
  "side_energy_ratio": Metric("share"),
  "spl_left_dbfs": Metric("dBFS"),
  "spl_right_dbfs": Metric("dBFS"),
  "ear_silent": Metric("share", "lower"),
  "ild_clipped": Metric("share", "lower"),
}


def metrics(clip: Analysis) -> dict[str, float]:
  """Returns every metric of `METRICS` for one clip; NaN where undefined."""
  values = dict.fromkeys(METRICS, np.nan)
  if clip.undefined:
    return values
  values |= _level(clip) | _spectrum(clip)
  if clip.ear_silent:
    values |= dict.fromkeys(("iacc_clip", "iacc_frame", "iacc_lag0", "iacc_octave"), 0.0)
  else:
    spectra_exf, size = _clip_spectra(clip)
    wide_l = an.coefficient(spectra_exf, size, max_lag=2 * an.MAX_LAG)[0]
    values |= _coherence(clip, spectra_exf, size, wide_l)
    values |= _delay(clip, spectra_exf, size, wide_l) | _phase(clip)
  values["ear_silent"] = float(clip.ear_silent)
  return values


def frame_ild(clip: Analysis) -> np.ndarray:
  """Returns the level difference of each rectangular frame in dB, clipped to +-60."""
  return level_difference(clip.energy_ei, clip.ear_energy_e.sum())


def frame_itd(clip: Analysis) -> np.ndarray:
  """Returns the GCC-PHAT delay of each rectangular frame in us; NaN where it is rejected."""
  found = an.peaks(clip.phat_il)
  return np.where(clip.audible_i & (found.ratio >= PHAT_RATIO), found.lag_us, np.nan)


def level_difference(energy_ex: np.ndarray, total: float) -> np.ndarray:
  """Returns 10 log10 of left over right energy in dB, clipped to +-60.

  Args:
    energy_ex: energies of both ears.
    total: energy of which 1e-12 is added to both, so that silence stays finite.
  """
  eps = 1e-12 * total + np.finfo(np.float64).tiny
  ratio_x = 10 * np.log10((energy_ex[0] + eps) / (energy_ex[1] + eps))
  return np.clip(ratio_x, -ILD_LIMIT_DB, ILD_LIMIT_DB)


def _coherence(
  clip: Analysis, spectra_exf: np.ndarray, size: int, wide_l: np.ndarray
) -> dict[str, float]:
  whole_l = wide_l[EDGE : -EDGE : an.FINE]
  frames_il = np.abs(clip.xc_il[:, :: an.FINE])
  octaves = [
    np.abs(an.coefficient(spectra_exf, size, (hz / 2**0.5, hz * 2**0.5))[0, :: an.FINE]).max()
    for hz in OCTAVES_HZ
  ]
  return {
    "iacc_clip": np.abs(whole_l).max(),
    "iacc_frame": _mean(frames_il.max(-1), clip.active_i),
    "iacc_lag0": whole_l[an.MAX_LAG],
    "iacc_octave": float(np.mean(octaves)),
    "iacf_sign": float(np.sign(whole_l[np.abs(whole_l).argmax()])),
  }


def _level(clip: Analysis) -> dict[str, float]:
  energy_e = clip.ear_energy_e
  whole = float(level_difference(energy_e, energy_e.sum()))
  frames_i = frame_ild(clip)
  power_ejf = np.square(np.abs(clip.stft_ejf))
  bins_jf = level_difference(power_ejf, power_ejf.sum(0).max())
  active_jf = _active_bins(power_ejf)
  left, right = clip.audio_ep
  middle, side = np.square(left + right).sum(), np.square(left - right).sum()
  with np.errstate(divide="ignore"):
    spl_e = 10 * np.log10(energy_e / clip.audio_ep.shape[1])
  return {
    "ild_clip_db": whole,
    "ild_clip_abs_db": abs(whole),
    "ild_frame_db": _mean(np.abs(frames_i), clip.active_i),
    "ild_frame_signed_db": _mean(frames_i, clip.active_i),
    "ild_tf_db": _mean(np.abs(bins_jf), active_jf),
    "ild_tf_signed_db": _mean(bins_jf, active_jf),
    "ild_clipped": float(abs(whole) >= ILD_LIMIT_DB),
    "side_energy_ratio": side / (middle + side),
    "spl_left_dbfs": spl_e[0] if np.isfinite(spl_e[0]) else np.nan,
    "spl_right_dbfs": spl_e[1] if np.isfinite(spl_e[1]) else np.nan,
  }


def _delay(
  clip: Analysis, spectra_exf: np.ndarray, size: int, wide_l: np.ndarray
) -> dict[str, float]:
  inside = np.abs(wide_l[EDGE:-EDGE]).max()
  flagged = inside < MIN_COHERENCE or np.abs(wide_l).max() > inside
  whole = {
    "xc": wide_l[None, EDGE:-EDGE],
    "phat": an.phat(_clip_spectra(clip, an.FRAME)[0], size),
    "low": an.coefficient(spectra_exf, size, an.LOW_BAND),
  }
  found = {"xc": an.peaks(clip.xc_il), "low": an.peaks(clip.low_il)}
  values = {"itd_clip_flagged": float(flagged)}
  for name, corr_xl in whole.items():
    values[f"itd_{name}_clip_us"] = np.nan if flagged else an.peaks(corr_xl).lag_us[0]
  for name, peaks in found.items():
    values |= _frame_delay(f"itd_{name}", peaks, clip.audible_i)
  values["itd_xc_frame_samples"] = values["itd_xc_frame_us"] * an.RATE / 1e6
  phat = an.peaks(clip.phat_il)
  accepted_i = clip.audible_i & (phat.ratio >= PHAT_RATIO)
  values |= _frame_delay("itd_phat", phat, accepted_i)
  values["itd_phat_rejected"] = 1 - _mean(accepted_i.astype(np.float64), clip.audible_i)
  return values


def _phase(clip: Analysis) -> dict[str, float]:
  cross_jf = clip.stft_ejf[0] * clip.stft_ejf[1].conj()
  angle_jf, weight_jf = np.abs(np.angle(cross_jf)), np.abs(cross_jf)
  low = slice(*an.bins(an.N_FFT, an.LOW_BAND))
  active_jf = _active_bins(np.square(np.abs(clip.stft_ejf)))
  return {
    "ipd_100_1500_w_rad": _ratio((weight_jf * angle_jf)[:, low].sum(), weight_jf[:, low].sum()),
    "ipd_tf_rad": _mean(angle_jf, active_jf),
    "ipd_coh": _ratio(np.abs(cross_jf.sum()), weight_jf.sum()),
  }


def _spectrum(clip: Analysis) -> dict[str, float]:
  left_jf, right_jf = np.abs(clip.stft_ejf)
  power_ef = np.square(np.abs(clip.stft_ejf)).sum(1)
  cosine = (left_jf * right_jf).sum() / max(
    float(np.sqrt(power_ef.sum(-1).prod())), np.finfo(np.float64).tiny
  )
  edges_r = [(hz / 2 ** (1 / 6), hz * 2 ** (1 / 6)) for hz in THIRDS_HZ]
  bands_er = np.stack([power_ef[:, slice(*an.bins(an.N_FFT, r))].sum(-1) for r in edges_r], -1)
  loud_r = bands_er.sum(0) > 1e-6 * bands_er.sum(0).max()
  bands_db = level_difference(bands_er, bands_er.sum())[loud_r]
  return {
    "isd_l1": np.abs(left_jf - right_jf).sum() / (left_jf + right_jf).sum(),
    "isd_l2": np.square(left_jf - right_jf).sum() / power_ef.sum(),
    "isd_cos": np.nan if clip.ear_silent else max(0.0, 1 - cosine),
    "isd_db": np.nan if clip.ear_silent or loud_r.sum() < 2 else float(bands_db.std()),
  }


def _clip_spectra(clip: Analysis, fade: int = 0) -> tuple[np.ndarray, int]:
  """Returns the transform of the whole clip, [e, 1, f], and its length; `fade` samples each end."""
  samples = clip.audio_ep.shape[1]
  size = 2 * int(scipy.fft.next_fast_len(samples) or samples)
  window_p = np.asarray(scipy.signal.get_window(("tukey", min(1.0, 2 * fade / samples)), samples))
  return np.fft.rfft(clip.audio_ep * window_p, size)[:, None], size


def _active_bins(power_ejf: np.ndarray) -> np.ndarray:
  power_jf = power_ejf.sum(0)
  return power_jf > 1e-6 * power_jf.max()


def _frame_delay(name: str, peaks: Peaks, keep_i: np.ndarray) -> dict[str, float]:
  return {
    f"{name}_frame_us": _mean(np.abs(peaks.lag_us), keep_i),
    f"{name}_frame_signed_us": _mean(peaks.lag_us, keep_i),
  }


def _mean(value: np.ndarray, keep: np.ndarray) -> float:
  return float(value[keep].mean()) if keep.any() else np.nan


def _ratio(top: float, bottom: float) -> float:
  return float(top / bottom) if bottom > 0 else np.nan
