"""Waveforms from log-mels of two ears, without losing the phase between the ears.

A magnitude spectrogram per ear says how loud each ear hears each band, not when. `binaural`
therefore reconstructs one waveform, of the ears' common (mid) magnitude, and derives both ears from
it: each gets its own magnitude ratio and half of the interaural delay that a rigid sphere has for
the source's azimuth (Duda & Martens, JASA 1998). The paper's way, each ear by itself, is
`independent`.

Without a vocoder the mid waveform comes from fast Griffin-Lim (Perraudin et al., WASPAA 2013),
which starts from the phase of a fixed noise. Start, momentum and iteration count are chosen for
repeatability: phase retrieval amplifies rounding, and these keep a relative change of 1e-6 in the
mels near 1e-4 of full scale in the waveform (twice the iterations: up to 5e-4).

Axes: e ear (0 left, 1 right), m mel bin, n mel frame, f linear frequency bin, p audio sample,
a azimuth of a table. Azimuth is in degrees, + left; delays are in seconds, + where the left leads.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatialv2a_jax import mel
from spatialv2a_jax.schema import AudioSpec
from spatialv2a_jax.spatial import hrtf

Phase = Literal["shared", "independent"]
# (log_mel_mn, past_p) -> audio_p of n * hop samples. `past_p` holds the samples of the first frames
# that an earlier call has made already (empty at the start of a clip).
Synthesizer = Callable[[np.ndarray, np.ndarray], np.ndarray]

ITERATIONS = 16
_MOMENTUM = 0.375
_PIECE_S = 10.24  # Longer than the 8 s that the networks are made for.
_OVERLAP, _BUCKET = 32, 64  # Mel frames: about 0.5 s and 1 s at 16 kHz.
_MAX_GAIN_DB = 40.0
_SMOOTH_S = 0.25  # Width of the window that steadies the azimuth found from level differences.
_WIDEST_DEG = 70  # Level differences fall again beyond, towards the bright spot behind the sphere.
_SPREAD_DB2 = 0.5  # Mean squared dB by which a worse azimuth loses a factor e of its weight.


@functools.cache
def _noise(samples: int) -> np.ndarray:
  return np.random.Generator(np.random.PCG64(0)).standard_normal(samples).astype(np.float32)


def _unit(spectrum: Array) -> Array:
  return spectrum / jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + 1e-20)


@functools.partial(jax.jit, static_argnames=("spec", "iterations"))
def _retrieve(log_mel_mn: Array, start_p: Array, spec: AudioSpec, iterations: int) -> Array:
  magnitude = mel.to_linear(mel.from_log(log_mel_mn, spec), spec)

  def step(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
    phase, before = state
    now = mel.stft(mel.istft(magnitude * phase, spec), spec)
    return _unit(now - _MOMENTUM * before), now

  phase = _unit(mel.stft(start_p, spec))
  phase, _ = jax.lax.fori_loop(0, iterations, step, (phase, jnp.zeros_like(phase)))
  pad = mel.margin(spec)
  return mel.istft(magnitude * phase, spec)[pad:-pad]


def griffin_lim(spec: AudioSpec, iterations: int = ITERATIONS) -> Synthesizer:
  """Returns a weightless, deterministic synthesizer (see `Synthesizer`)."""

  def synthesize(log_mel_mn: np.ndarray, past_p: np.ndarray) -> np.ndarray:
    pad = mel.margin(spec)
    start_p = _noise(log_mel_mn.shape[-1] * spec.hop + 2 * pad).copy()
    # Scaled far above the noise, samples made before decide the phase of the frames they fill.
    start_p[pad : pad + len(past_p)] = 1e4 * past_p
    return np.asarray(_retrieve(jnp.asarray(log_mel_mn), jnp.asarray(start_p), spec, iterations))

  return synthesize


# --- what a sphere does to two ears ---------------------------------------------------------------


@functools.cache
def _sphere_table(spec: AudioSpec) -> tuple[np.ndarray, np.ndarray]:
  """Returns delays [a, f] in seconds and levels [a, m] in dB, left over right, at 0..90 degrees."""
  hz_f = np.arange(spec.n_fft // 2 + 1) * (spec.sample_rate / spec.n_fft)
  angle_a = np.arange(91.0)
  near, far = (hrtf.sphere_response(hz_f, a) for a in (90 - angle_a, 90 + angle_a))
  turn = np.unwrap(np.angle(near * np.conj(far)), axis=1)
  delay = turn[:, 1:] / (2 * np.pi * hz_f[1:])
  delay = np.concatenate([delay[:, :1], delay], 1)
  basis = mel.mel_basis(spec).astype(np.float64)
  level = 20 * np.log10((np.abs(near) @ basis.T) / (np.abs(far) @ basis.T))
  return delay.astype(np.float32), level.astype(np.float32)


def interaural_delay(azimuth_n: np.ndarray, spec: AudioSpec) -> np.ndarray:
  """Returns the sphere's delay [n, f] in seconds (+ left leads) at each linear bin.

  About 3 (a / c) sin(azimuth) at low and (a / c) (azimuth + sin(azimuth)) at high frequencies.
  Sources behind the head sound like those before it.
  """
  table, _ = _sphere_table(spec)
  lateral = np.degrees(
    np.arcsin(np.clip(np.sin(np.radians(np.asarray(azimuth_n, np.float64))), -1, 1))
  )
  low = np.minimum(np.abs(lateral).astype(int), 89)
  part = (np.abs(lateral) - low).astype(np.float32)[:, None]
  return np.sign(lateral).astype(np.float32)[:, None] * (
    (1 - part) * table[low] + part * table[low + 1]
  )


def azimuth_from_levels(log_mel_emn: np.ndarray, spec: AudioSpec) -> np.ndarray:
  """Returns the azimuth [n] in degrees, + left, whose level differences on a sphere fit the mels'.

  Each frame compares its level difference per band with those of a sphere at -70 to 70 degrees,
  bands weighted by their magnitude; the answer is the mean azimuth under the weights
  exp(-misfit / 0.5 dB^2), steadied over a quarter of a second by loudness. Beyond 70 degrees levels
  are ambiguous, and the answer stays inside. What is below the mels' floor, as a VAE's decoder may
  make it, is silence. Equal ears give exactly 0, exchanged ears the exact
  negative.
  """
  _, level_am = _sphere_table(spec)
  level_am = level_am[: _WIDEST_DEG + 1].astype(np.float64)
  level_am = np.concatenate([-level_am[:0:-1], level_am])
  azimuth_a = np.arange(-_WIDEST_DEG, _WIDEST_DEG + 1.0)
  mels = 10 ** (np.asarray(log_mel_emn, np.float64) * (mel.db_per_unit(spec) / 20))
  mels = np.maximum(mels, mel.FLOOR)
  weight_mn = mels[0] + mels[1] - 2 * mel.FLOOR
  loud_n = weight_mn.sum(0)
  weight_mn = weight_mn / np.maximum(loud_n, 1e-12)[None]
  ild_mn = 20 * np.log10(mels[0] / mels[1])
  fit_n = np.square(level_am) @ weight_mn
  cross_n = 2 * (level_am @ (weight_mn * ild_mn))

  def mean_azimuth(misfit_an: np.ndarray) -> np.ndarray:
    belief = np.exp(-(misfit_an - misfit_an.min(0, keepdims=True)) / _SPREAD_DB2)
    return (azimuth_a[:, None] * belief).sum(0) / belief.sum(0)

  azimuth_n = 0.5 * (mean_azimuth(fit_n - cross_n) - mean_azimuth(fit_n + cross_n))
  half = max(1, round(_SMOOTH_S * spec.sample_rate / spec.hop / 2))
  kernel = np.hanning(2 * half + 3)[1:-1]
  smooth = lambda x_n: np.convolve(x_n, kernel)[half:-half]  # noqa: E731
  loud_n = loud_n + 1e-6
  return smooth(loud_n * azimuth_n) / smooth(loud_n)


# --- two ears from one waveform -------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="spec")
def mid_log_mel(log_mel_emn: Array, spec: AudioSpec) -> Array:
  """Returns the log-mel [m, n] of the root mean square of both ears' magnitudes."""
  power = jnp.square(mel.from_log(log_mel_emn, spec))
  return mel.to_log(jnp.sqrt(0.5 * (power[0] + power[1])), spec)


@functools.partial(jax.jit, static_argnames="spec")
def _to_ears(mid_p: Array, log_mel_emn: Array, delay_nf: Array, spec: AudioSpec) -> Array:
  pad = mel.margin(spec)
  spectrum = mel.stft(jnp.pad(mid_p, (pad, pad)), spec)
  limit = _MAX_GAIN_DB / mel.db_per_unit(spec)
  ratio = jnp.clip(log_mel_emn - mid_log_mel(log_mel_emn, spec)[None], -limit, limit)
  gain = mel.from_log(mel.band_to_linear(ratio, spec), spec)
  omega = np.arange(spec.n_fft // 2 + 1) * (2 * np.pi * spec.sample_rate / spec.n_fft)
  half_turn = 0.5 * delay_nf * jnp.asarray(omega, jnp.float32)[None]
  turn = jnp.exp(1j * jnp.stack([half_turn, -half_turn]))
  return mel.istft(spectrum[None] * gain * turn, spec)[:, pad:-pad]


def piece_frames(frames: int, spec: AudioSpec) -> int:
  """Returns the mel frames of the pieces in which a clip of so many is made."""
  return min(round(_PIECE_S * spec.sample_rate / spec.hop), frames)


Piece = Callable[[np.ndarray, int, np.ndarray], np.ndarray]


def _in_pieces(
  log_mel_emn: np.ndarray, spec: AudioSpec, rows: int, make: Piece, bucket: int
) -> np.ndarray:
  """Makes [rows, n * hop] samples from overlapping pieces of at most `_PIECE_S`.

  Calls make(piece_emn, first, past) for samples. A piece begins at frame `first`; `past` [rows, p]
  is what has been made of its first frames already and is cross-faded with the new. The last piece
  ends with the clip. Its last frame is held up to a multiple of `bucket` frames, so that few
  programs are compiled; silence, alike in both ears, would draw the end to the middle.
  """
  frames, hop = log_mel_emn.shape[-1], spec.hop
  out = np.zeros((rows, frames * hop), np.float32)
  fade = np.sin(0.5 * np.pi * (np.arange(_OVERLAP * hop) + 0.5) / (_OVERLAP * hop)) ** 2
  fade = fade.astype(np.float32)[None]
  count = piece_frames(frames, spec)
  last = frames - count
  for first in [*range(0, last, max(1, count - _OVERLAP)), last]:
    piece_emn = log_mel_emn[..., first : first + count]
    fill = [(0, 0), (0, 0), (0, -count % bucket)]
    common = slice(first * hop, (first + _OVERLAP) * hop if first else 0)
    past = out[:, common]
    piece_emn = np.pad(piece_emn, fill, mode="edge")
    new = np.array(make(piece_emn, first, past)[:, : count * hop])
    if first:
      new[:, : past.shape[1]] = fade * new[:, : past.shape[1]] + (1 - fade) * past
    out[:, first * hop : (first + count) * hop] = new
  return out


def mono(
  log_mel_mn: np.ndarray, spec: AudioSpec, synthesize: Synthesizer | None = None
) -> np.ndarray:
  """Returns the waveform [p], p = n * hop, of one log-mel [m, n], in pieces of about 10 s."""
  log_mel_emn = np.asarray(log_mel_mn, np.float32)[None]
  chosen = synthesize or griffin_lim(spec)
  make = lambda x, _, past: chosen(x[0], past[0])[None]  # noqa: E731
  return _in_pieces(log_mel_emn, spec, 1, make, _bucket(synthesize))[0]


def _bucket(synthesize: Synthesizer | None) -> int:
  """Returns of how many frames pieces are multiples: a network hears what is behind the end."""
  return 1 if synthesize else _BUCKET


def binaural(
  log_mel_emn: np.ndarray,
  spec: AudioSpec,
  azimuth_n: np.ndarray | None = None,
  phase: Phase = "shared",
  synthesize: Synthesizer | None = None,
) -> np.ndarray:
  """Returns the waveforms of both ears from their log-mels; the level is that of the mels.

  Works clip by clip and in pieces of about 10 s, so that neither the other clips of a batch nor
  the length change a clip's result, and memory stays constant.

  Args:
    log_mel_emn: [2, m, n].
    spec: front end of the mels.
    azimuth_n: [n] degrees, + left, of the dominant source at each mel frame; it sets the delay
      between the ears. None derives it from the level differences (`azimuth_from_levels`).
    phase: "shared" or "independent".
    synthesize: log-mel to waveform of one channel, such as a vocoder; None is Griffin-Lim.

  Returns:
    float32 [2, p], p = n * hop. Equal mels at azimuth 0 give equal ears, bit for bit.

  Raises:
    ValueError: unknown `phase`, or an azimuth track of another length.
  """
  log_mel_emn = np.asarray(log_mel_emn, np.float32)
  if phase == "independent":
    return np.stack([mono(ear_mn, spec, synthesize) for ear_mn in log_mel_emn])
  if phase != "shared":
    raise ValueError(f'unknown phase "{phase}"; use "shared" or "independent"')
  if azimuth_n is not None and len(azimuth_n) != log_mel_emn.shape[-1]:
    raise ValueError(f"{len(azimuth_n)} azimuths for {log_mel_emn.shape[-1]} mel frames")
  chosen = synthesize or griffin_lim(spec)

  def make(piece_emn: np.ndarray, first: int, past: np.ndarray) -> np.ndarray:
    count = piece_emn.shape[-1]
    if azimuth_n is None:
      at_n = azimuth_from_levels(piece_emn, spec)
    else:
      at_n = np.asarray(azimuth_n)[first : first + count]
      at_n = np.pad(at_n, (0, count - len(at_n)), mode="edge")
    mid_p = chosen(np.asarray(mid_log_mel(jnp.asarray(piece_emn), spec)), past[2])
    delay_nf = jnp.asarray(interaural_delay(at_n, spec))
    ears = _to_ears(jnp.asarray(mid_p), jnp.asarray(piece_emn), delay_nf, spec)
    return np.concatenate([np.asarray(ears), mid_p[None]])

  return _in_pieces(log_mel_emn, spec, 3, make, _bucket(synthesize))[:2]
