"""When sounds begin: a detector on the sum of both ears, and one-to-one matching to the truth.

The detector compresses a short-time spectrum, takes its rise over time (spectral flux against a
neighbourhood maximum in frequency, as in SuperFlux, so that vibrato does not count), picks peaks
that stand out from their surroundings, and moves each to the steepest rise of the envelope.

Axes: p sample, j spectrogram frame (4 ms apart), f frequency bin, o onset.
"""

import numpy as np
import scipy.ndimage
import scipy.optimize
import scipy.signal

RATE = 16000
N_FFT, HOP = 512, 64
SPACING_S = 0.06  # Closer rises are one onset.
LIMIT_S = 0.5  # Distance of a true onset without a partner.
TOLERANCE_S = 0.1
MERGE_S = 0.03  # True onsets this close cannot be heard apart.
COMPRESSION = 100.0
MASKING, FORGET_S = 0.7, 0.2
SILENCE = 1e-6  # Mean power below which nothing can begin: -60 dBFS.


def detect(mono_p: np.ndarray) -> np.ndarray:
  """Returns the times in seconds at which sounds begin, ascending.

  The result does not depend on the level, as long as some frame lies above -60 dBFS.

  Args:
    mono_p: sound at 16 kHz, at least 512 samples.
  """
  mono_p = np.asarray(mono_p, np.float64)
  # Silence in front, so that a sound that starts at sample 0 rises; none behind, where its edge
  # would splatter over the spectrum.
  padded_p = np.pad(mono_p, (N_FFT // 2, 0))
  frames_jp = np.lib.stride_tricks.sliding_window_view(padded_p, N_FFT)[::HOP]
  window_p = scipy.signal.get_window("hann", N_FFT)
  size_jf = np.abs(np.fft.rfft(frames_jp * window_p))
  power_j = np.square(size_jf).sum(-1) / (N_FFT / 2 * np.square(window_p).sum())
  if power_j.max() <= SILENCE:
    return np.zeros(0)

  loud_jf = np.log1p(COMPRESSION * size_jf / size_jf.max())
  before_jf = scipy.ndimage.maximum_filter1d(loud_jf, 3, axis=1)
  lag = 4  # 16 ms, half the window: the frames before and after an attack barely overlap.
  before_jf = np.pad(before_jf, ((lag, 0), (0, 0)))[:-lag]
  flux_j = np.maximum(loud_jf - before_jf, 0).mean(-1)
  return _refine(mono_p, _pick(flux_j) * HOP / RATE)


def match(true_o: np.ndarray, found_o: np.ndarray) -> tuple[np.ndarray, int]:
  """Pairs onsets one to one.

  Args:
    true_o: true times in seconds.
    found_o: detected times in seconds.

  Returns:
    Distance of every true onset to its own partner in seconds, at most 0.5, which also stands for
    no partner (pairs minimise the total); and how many pairs at most lie within 0.1 s.
  """
  error_o = np.full(len(true_o), LIMIT_S)
  if len(true_o) and len(found_o):
    cost = np.minimum(np.abs(true_o[:, None] - found_o[None, :]), LIMIT_S)
    row, column = scipy.optimize.linear_sum_assignment(cost)
    error_o[row] = cost[row, column]
  hits, start = 0, 0
  found_o = np.sort(found_o)
  for time in np.sort(true_o):  # On a line, taking the earliest partner in reach is optimal.
    while start < len(found_o) and found_o[start] < time - TOLERANCE_S:
      start += 1
    if start < len(found_o) and found_o[start] <= time + TOLERANCE_S:
      hits, start = hits + 1, start + 1
  return error_o, hits


def merge(times: np.ndarray) -> np.ndarray:
  """Returns sorted times without those that follow a kept one within 30 ms."""
  kept: list[float] = []
  for time in np.sort(times):
    if not kept or time - kept[-1] > MERGE_S:
      kept.append(float(time))
  return np.array(kept)


def _pick(flux_j: np.ndarray) -> np.ndarray:
  """Returns frames whose flux is the largest around and stands out from its surroundings."""
  reach = round(SPACING_S * RATE / HOP / 2)
  around = 2 * round(0.4 * RATE / HOP) + 1
  base_j = scipy.ndimage.median_filter(flux_j, around, mode="constant")
  spread_j = scipy.ndimage.median_filter(np.abs(flux_j - base_j), around, mode="constant")
  top_j = scipy.ndimage.maximum_filter1d(flux_j, 2 * reach + 1)
  stands_out_j = flux_j > np.maximum(base_j + 6 * spread_j, 1.5 * base_j)
  picked = np.flatnonzero((flux_j == top_j) & stands_out_j & (flux_j > 0.12 * flux_j.max()))
  kept: list[int] = []
  hidden = 0.0  # An attack hides weaker rises for a while: grains of a hiss are not onsets.
  for before, frame in zip(np.append(-len(flux_j), picked[:-1]), picked, strict=True):
    hidden *= np.exp((before - frame) * HOP / RATE / FORGET_S)
    if flux_j[frame] > hidden:
      kept.append(int(frame))
      hidden = MASKING * flux_j[frame]
  return np.array(kept, np.int64)


def _refine(mono_p: np.ndarray, time_o: np.ndarray) -> np.ndarray:
  """Moves each time to the largest ratio of energy in 4 ms after and before, within 30 ms."""
  half, reach = RATE * 4 // 1000, RATE * 30 // 1000
  total_p = np.concatenate([[0.0], np.cumsum(np.square(np.pad(mono_p, half + reach)))])
  floor = 1e-4 * (total_p[2 * half :] - total_p[: -2 * half]).max()
  refined = []
  for time in time_o:
    at = int(round(time * RATE)) + half + reach + np.arange(-reach, reach + 1)
    at = at[(at >= half) & (at < len(total_p) - half)]
    after, before = total_p[at + half] - total_p[at], total_p[at] - total_p[at - half]
    refined.append((at[((after + floor) / (before + floor)).argmax()] - half - reach) / RATE)
  return merge(np.maximum(np.array(refined), 0.0))
