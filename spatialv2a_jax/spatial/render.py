"""Binaural rendering of still and moving sources with head-related filters. NumPy and SciPy only.

Axes: p sample, q block, e ear (0 left, 1 right), f frequency bin, t tap, c ambisonic channel,
s loudspeaker.

A moving source is cut into 20 ms triangular blocks, 10 ms apart; each block is filtered with the
exact filter of its own instant and the blocks are added. Level and delay therefore cross-fade
linearly, and for a still source the sum is the plain convolution. Time zero of the output is the
wave's passage at the centre of the head: the time of flight is not rendered, so that sound stays
with its picture, and there is no Doppler shift and no absorption by air.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy

from spatialv2a_jax.spatial import sh
from spatialv2a_jax.spatial.hrtf import Hrtf

HOP_S = 0.01
MIN_DISTANCE_M = 0.25
FULL_SCALE = 32767 / 32768  # What 16 bits hold.
_CHUNK = 256  # blocks per pass: what a core keeps in its cache where the others are busy too

Track = float | np.ndarray | tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Room:
  """Diffuse late tail of a room: decaying noise, independent in the two ears.

  Attributes:
    rt60_s: time in which the tail falls by 60 dB.
    drr_db: direct-to-reverberant energy ratio of a source at 1 m. The tail does not depend on
      distance, so the ratio falls by 6 dB per doubling.
    seed: of the noise.
    predelay_s: silence between the direct sound and the tail.

  Raises:
    ValueError: no time to fall in, or a tail that comes before the direct sound.
  """

  rt60_s: float = 0.4
  drr_db: float = 9.0
  seed: int = 0
  predelay_s: float = 0.008

  def __post_init__(self):
    if not (self.rt60_s > 0 and self.predelay_s >= 0):
      raise ValueError(
        f"rt60_s={self.rt60_s}, predelay_s={self.predelay_s}: want more than 0, 0 or more"
      )

  def tail(self, sample_rate: int) -> np.ndarray:
    """Tail responses float32 [2, t]; each ear's energy is 10^(-drr_db / 10)."""
    rng = np.random.default_rng(self.seed)
    time_t = np.arange(max(1, round(self.rt60_s * sample_rate))) / sample_rate
    noise_et = rng.standard_normal((2, time_t.size)) * 10 ** (-3 * time_t / self.rt60_s)[None, :]
    energy_e1 = np.sum(noise_et**2, axis=1, keepdims=True)
    noise_et *= np.sqrt(10 ** (-self.drr_db / 10) / energy_e1)
    return np.pad(noise_et, ((0, 0), (round(self.predelay_s * sample_rate), 0))).astype(np.float32)


def binaural(
  mono_p: np.ndarray,
  sample_rate: int,
  azimuth_deg: Track,
  hrtf: Hrtf,
  distance_m: Track | None = None,
  *,
  elevation_deg: Track = 0.0,
  room: Room | None = None,
) -> np.ndarray:
  """Places one source around the listener.

  A track is a number (still), an array with one value per sample, or (times_s, values): linear
  between the times and held beyond them; there azimuth takes the short way round.

  Args:
    mono_p: [p] samples, the source as heard at 1 m.
    sample_rate: Hz, that of `hrtf`.
    azimuth_deg: track of degrees, + left. The sphere folds the rear onto the front.
    hrtf: the head.
    distance_m: track of metres; level follows 1/r, held below 0.25 m. None is 1 m.
    elevation_deg: track of degrees, + up.
    room: adds a late tail whose level ignores distance.

  Returns:
    float32 [2, p], left ear first, never normalised.

  Raises:
    ValueError: rates differ, `mono_p` is not one finite channel, or a track does not fit.
  """
  mono_p = _checked(mono_p, sample_rate, hrtf)
  direct_p = mono_p
  if distance_m is not None:
    index, length = np.arange(mono_p.size), mono_p.size
    distance_p = _values(distance_m, index, length, sample_rate, "distance_m")
    direct_p = mono_p * (1 / np.maximum(distance_p, MIN_DISTANCE_M)).astype(np.float32)
  azimuth, elevation = _still(azimuth_deg), _still(elevation_deg)
  if azimuth is None or elevation is None:
    binaural_ep = _moving(direct_p, azimuth_deg, elevation_deg, hrtf)
  else:
    binaural_ep = _convolve(direct_p, hrtf.ir(azimuth, elevation), hrtf.lead)
  if room is not None:
    binaural_ep += _convolve(mono_p, room.tail(sample_rate))
  return binaural_ep


def ambisonic(
  mono_p: np.ndarray,
  sample_rate: int,
  azimuth_deg: Track,
  hrtf: Hrtf,
  *,
  elevation_deg: Track = 0.0,
  order: int = 1,
  speakers: int = 8,
  decoder: str = "pinv",
) -> np.ndarray:
  """Renders through spherical harmonics and virtual loudspeakers (arXiv 2601.15017).

  This is the paper's way. First order blurs the image and little interaural time survives: use
  `binaural` unless the publication is to be matched.

  Args:
    mono_p: [p] samples.
    sample_rate: Hz, that of `hrtf`.
    azimuth_deg: track as for `binaural`.
    hrtf: the head that hears the loudspeakers.
    elevation_deg: track of degrees, + up.
    order: ambisonic order.
    speakers: number of loudspeakers of the horizontal ring.
    decoder: "pinv", "projection" or "max-re" (`sh.decoder`).

  Returns:
    float32 [2, p].

  Raises:
    ValueError: as for `binaural`, or unknown decoder.
  """
  mono_p = _checked(mono_p, sample_rate, hrtf)
  length, index = mono_p.size, np.arange(mono_p.size)
  azimuth_p = _values(azimuth_deg, index, length, sample_rate, "azimuth_deg", 360)
  elevation_p = _values(elevation_deg, index, length, sample_rate, "elevation_deg")
  ring_s = sh.ring(speakers)
  heard_set = np.stack([hrtf.ir(math.degrees(angle)) for angle in ring_s])
  filter_cet = np.tensordot(sh.decoder(ring_s, order, decoder), heard_set, (0, 0))
  channel_pc = sh.harmonics(np.radians(azimuth_p), np.radians(elevation_p), order)
  binaural_ep = np.zeros((2, mono_p.size), np.float32)
  for channel_p, filter_et in zip(channel_pc.T, filter_cet, strict=True):
    encoded_p = mono_p * channel_p.astype(np.float32)
    binaural_ep += _convolve(encoded_p, filter_et.astype(np.float32), hrtf.lead)
  return binaural_ep


def within_full_scale(audio_ep: np.ndarray) -> tuple[np.ndarray, float]:
  """Turns both ears down together where one exceeds full scale, as the near ear of loud music does.

  Returns:
    float32 [2, p], and the gain in dB, 0 or negative.
  """
  peak = float(np.abs(audio_ep).max(initial=0.0))
  gain = min(1.0, FULL_SCALE / peak) if peak else 1.0
  return (audio_ep * np.float32(gain)).astype(np.float32), 20 * math.log10(gain) + 0.0


def _checked(mono_p: np.ndarray, sample_rate: int, hrtf: Hrtf) -> np.ndarray:
  mono_p = np.asarray(mono_p, np.float32)
  if sample_rate != hrtf.sample_rate:
    raise ValueError(
      f"audio at {sample_rate} Hz, HRTF at {hrtf.sample_rate} Hz; load it at that rate"
    )
  if mono_p.ndim != 1 or not mono_p.size or not np.all(np.isfinite(mono_p)):
    raise ValueError(f"need one non-empty channel of finite samples, got {mono_p.shape}")
  return mono_p


def _still(track: Track) -> float | None:
  """The one value of a still track, None for a moving one."""
  if isinstance(track, tuple) or np.ndim(track):
    return None
  if not math.isfinite(track):
    raise ValueError(f"track: not finite ({track})")
  return float(track)


def _values(
  track: Track, index: np.ndarray, length: int, rate: int, name: str, period: float | None = None
) -> np.ndarray:
  """A track at sample indices; `period` marks a circular quantity."""
  if isinstance(track, tuple):
    times, values = (np.asarray(part, np.float64) for part in track)
    fits = times.ndim == 1 and times.shape == values.shape and times.size > 0
    if not fits or np.any(np.diff(times) <= 0):
      raise ValueError(f"{name}: need (times, values) of equal length with rising times")
    if period:
      values = np.unwrap(values, period=period)
    values = np.interp(index / rate, times, values)
  else:
    values = np.asarray(track, np.float64)
    if values.ndim and values.shape != (length,):
      raise ValueError(f"{name}: {values.shape} values for {length} samples")
    values = values[np.minimum(index, length - 1)] if values.ndim else np.full(index.shape, values)
  if not np.all(np.isfinite(values)):
    raise ValueError(f"{name}: not finite")
  return values


def _convolve(mono_p: np.ndarray, filter_et: np.ndarray, lead: int = 0) -> np.ndarray:
  """Full convolution cropped to the input's span, `lead` samples into it."""
  full = [
    scipy.signal.oaconvolve(mono_p, filter_t)[lead : lead + mono_p.size] for filter_t in filter_et
  ]
  return np.stack(full).astype(np.float32)


def _moving(mono_p: np.ndarray, azimuth_deg: Track, elevation_deg: Track, hrtf: Hrtf) -> np.ndarray:
  rate, length = hrtf.sample_rate, mono_p.size
  hop = round(HOP_S * rate)
  spread = math.ceil((2 * hop + hrtf.taps) / hop)  # hops touched by one filtered block
  size = spread * hop
  blocks = math.ceil(length / hop) + 1
  row_qp = np.pad(mono_p, (hop, blocks * hop - length)).reshape(blocks + 1, hop)
  rise_p = (np.arange(hop) / hop).astype(np.float32)
  window_p = np.concatenate([rise_p, 1 - rise_p])
  centre_q = np.arange(blocks) * hop
  azimuth_q = _values(azimuth_deg, centre_q, length, rate, "azimuth_deg", 360)
  elevation_q = _values(elevation_deg, centre_q, length, rate, "elevation_deg")
  sum_eqp = np.zeros((2, blocks + spread, hop), np.float32)
  for first in range(0, blocks, _CHUNK):
    last = min(first + _CHUNK, blocks)
    block_qp = np.concatenate([row_qp[first:last], row_qp[first + 1 : last + 1]], axis=1)
    block_qf = np.fft.rfft(block_qp * window_p[None, :], size)
    spectra_eqf = hrtf.spectra(azimuth_q[first:last], elevation_q[first:last], size)
    for ear in range(2):
      heard_qp = np.fft.irfft(block_qf * spectra_eqf[ear], size).reshape(last - first, spread, hop)
      for step in range(spread):
        sum_eqp[ear, first + step : last + step] += heard_qp[:, step]
  start = hop + hrtf.lead
  return np.ascontiguousarray(sum_eqp.reshape(2, -1)[:, start : start + length])
