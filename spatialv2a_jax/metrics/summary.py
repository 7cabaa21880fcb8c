"""Three numbers that sum up what two ears hear of a clip, as sidecars keep and reports show them.

Axes: e ear (0 left, 1 right), p sample.
"""

import numpy as np
import soxr

from spatialv2a_jax.metrics import analysis, spatial

CUES = ("ild_clip_db", "itd_xc_clip_us", "iacc_clip")
STRETCH_SECONDS = 30.0


def spatial_cues(audio_ep: np.ndarray, rate: int) -> dict[str, float | None]:
  """Returns level and time difference and coherence of a clip; None where undefined.

  Clips longer than `STRETCH_SECONDS` are cut into stretches of about that length, whose cues are
  averaged by energy: a long one would need gigabytes.
  """
  at_rate = soxr.resample(audio_ep.T, rate, analysis.RATE, quality="VHQ").T
  short = max(0, analysis.N_FFT - at_rate.shape[1])
  at_rate = np.pad(at_rate, ((0, 0), (0, short)))
  count = max(1, round(at_rate.shape[1] / (STRETCH_SECONDS * analysis.RATE)))
  total, weight = np.zeros(len(CUES)), np.zeros(len(CUES))
  for part_ep in np.array_split(at_rate, count, axis=1):
    values = spatial.metrics(analysis.analyse(part_ep))
    cues = np.array([values[name] for name in CUES])
    energy = np.where(np.isfinite(cues), np.square(part_ep, dtype=np.float64).sum(), 0.0)
    total += energy * np.nan_to_num(cues)
    weight += energy
  means = [round(float(t / w), 3) if w else None for t, w in zip(total, weight, strict=True)]
  return dict(zip(CUES, means, strict=True))
