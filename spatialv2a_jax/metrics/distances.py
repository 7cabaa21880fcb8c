"""Distances of a prediction to the reference sound of the same clip.

`stft_distance`, `env_distance`, `phase_distance_rad` and `snr_db` follow 2.5D Visual Sound and
PseudoBinaural: each clip divided by its own peak over both ears, errors summed over ears, STFT of
512 points with a 400-point Hann window, hop 160, reflected edges. (Their "magnitude" distance is
twice the STFT distance and is left out.) The remaining ones compare interaural cues frame by frame;
`gcc_mse` is 1000 (difference of the clips' mean ITD in ms)^2 as in BEWO.

Axes: e ear (0 left, 1 right), p sample, i rectangular frame, j STFT frame, f frequency bin.
"""

import dataclasses

import numpy as np
import scipy.signal

from spatialv2a_jax.metrics import analysis as an
from spatialv2a_jax.metrics import spatial
from spatialv2a_jax.metrics.stats import Metric

METRICS: dict[str, Metric] = {
  "stft_distance": Metric("1", "lower"),
  "env_distance": Metric("1", "lower"),
  "phase_distance_rad": Metric("rad", "lower"),
  "snr_db": Metric("dB", "higher"),
  "spl_error_left_db": Metric("dB", "lower"),
  "spl_error_right_db": Metric("dB", "lower"),
  "spl_error_side_db": Metric("dB", "lower"),
  "ild_error_frame_db": Metric("dB", "lower"),
  "itd_error_frame_us": Metric("us", "lower"),
  "gcc_mse": Metric("1000 ms^2", "lower"),
}


@dataclasses.dataclass(frozen=True)
class Cues:
  """Frame by frame cues of one clip, small enough to pass between processes.

  Attributes:
    ild_db_i: level difference of rectangular frames; NaN where not active.
    itd_us_i: GCC-PHAT delay of frames; NaN where rejected.
    spl_dbfs: levels of left, right and left minus right; NaN for silence.
  """

  ild_db_i: np.ndarray
  itd_us_i: np.ndarray
  spl_dbfs: np.ndarray


def cues(clip: an.Analysis) -> Cues:
  """Reads the cues that `cue_errors` compares."""
  signals_xp = np.concatenate([clip.audio_ep, clip.audio_ep[:1] - clip.audio_ep[1:]])
  power_x = np.square(signals_xp).mean(-1)
  power_x = np.where(power_x > 1e-12, power_x, np.nan)
  ild_db_i = np.where(clip.active_i, spatial.frame_ild(clip), np.nan)
  return Cues(ild_db_i, spatial.frame_itd(clip), 10 * np.log10(power_x))


def cue_errors(pred: Cues, ref: Cues) -> dict[str, float]:
  """Compares cues over the frames where both clips have them; NaN where there are none."""
  frames = min(len(pred.ild_db_i), len(ref.ild_db_i))
  ild_i = np.abs(pred.ild_db_i[:frames] - ref.ild_db_i[:frames])
  itd_i = np.abs(pred.itd_us_i[:frames] - ref.itd_us_i[:frames])
  offset_ms = (_mean(pred.itd_us_i) - _mean(ref.itd_us_i)) / 1000
  spl_x = np.abs(pred.spl_dbfs - ref.spl_dbfs)
  return {
    "spl_error_left_db": float(spl_x[0]),
    "spl_error_right_db": float(spl_x[1]),
    "spl_error_side_db": float(spl_x[2]),
    "ild_error_frame_db": _mean(ild_i),
    "itd_error_frame_us": _mean(itd_i),
    "gcc_mse": 1000 * offset_ms**2,
  }


def nothing() -> dict[str, float]:
  """Returns every distance as NaN: there is no reference."""
  return dict.fromkeys(METRICS, np.nan)


def wave_distances(
  pred_ep: np.ndarray, ref_ep: np.ndarray, *, peak_normalise: bool = True
) -> dict[str, float]:
  """Compares two waveforms over their common length.

  Args:
    pred_ep: prediction [2, samples], 16 kHz.
    ref_ep: reference [2, samples], 16 kHz.
    peak_normalise: divide each clip by its largest absolute sample.

  Returns:
    The four distances; the phase of left minus right is NaN where a clip has no such difference.
  """
  samples = min(pred_ep.shape[1], ref_ep.shape[1])
  pred_ep, ref_ep = (np.asarray(x[:, :samples], np.float64) for x in (pred_ep, ref_ep))
  if peak_normalise:
    pred_ep, ref_ep = (x / max(np.abs(x).max(), 1e-12) for x in (pred_ep, ref_ep))
  pred_ejf, ref_ejf = _stft(pred_ep), _stft(ref_ep)
  error_ejf = pred_ejf - ref_ejf
  envelope_ep = _envelope(pred_ep) - _envelope(ref_ep)
  noise, power = np.square(pred_ep - ref_ep).mean(), np.square(ref_ep).mean()
  return {
    "stft_distance": float(0.5 * np.square(np.abs(error_ejf)).mean((1, 2)).sum()),
    "env_distance": float(np.sqrt(np.square(envelope_ep).mean(-1)).sum()),
    "phase_distance_rad": _phase_distance(pred_ejf, ref_ejf),
    "snr_db": float(10 * np.log10((power + 1e-4) / (noise + 1e-4))),
  }


def _phase_distance(pred_ejf: np.ndarray, ref_ejf: np.ndarray) -> float:
  angles = []
  for x_ejf in (pred_ejf, ref_ejf):
    side_jf = x_ejf[0] - x_ejf[1]
    energy, total = np.square(np.abs(side_jf)).sum(), np.square(np.abs(x_ejf)).sum()
    if energy <= 1e-12 * total:
      return np.nan
    angles.append(np.angle(side_jf))
  return float(np.abs(np.angle(np.exp(1j * (angles[0] - angles[1])))).mean())


def _envelope(x_ep: np.ndarray) -> np.ndarray:
  return np.abs(np.asarray(scipy.signal.hilbert(x_ep)))


def _stft(x_ep: np.ndarray) -> np.ndarray:
  window_p = np.pad(scipy.signal.get_window("hann", 400), 56)
  padded_ep = np.pad(x_ep, ((0, 0), (256, 256)), mode="reflect")
  return np.fft.rfft(an.framed(padded_ep, 512, 160) * window_p)


def _mean(value: np.ndarray) -> float:
  known = value[np.isfinite(value)]
  return float(known.mean()) if len(known) else np.nan
