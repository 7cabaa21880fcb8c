"""Log-mel spectrograms of MMAudio's two front ends, short-time Fourier transforms, and a way back.

Both front ends are those of the public MMAudio project: reflection padding of (n_fft - hop) / 2
samples, periodic Hann window, magnitudes (not powers), Slaney mel scale with Slaney area
normalisation, floor 1e-5, then log10 at 16 kHz and the natural logarithm at 44.1 kHz.

Axes: p audio sample, n mel frame, f linear frequency bin, m mel bin, w sample of a window.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatialv2a_jax.schema import AudioSpec

FLOOR = 1e-5  # Smallest mel magnitude: silence reads -5.0 (16 kHz) or -11.51 (44.1 kHz).
_BREAK_HZ, _BREAK_MEL, _HZ_PER_MEL = 1000.0, 15.0, 200.0 / 3
_LOG_STEP = np.log(6.4) / 27


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
  """Returns Slaney mels: linear below 1 kHz, logarithmic above."""
  hz = np.asarray(hz, np.float64)
  log = _BREAK_MEL + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
  return np.where(hz < _BREAK_HZ, hz / _HZ_PER_MEL, log)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
  """Inverts `hz_to_mel`."""
  mel = np.asarray(mel, np.float64)
  log = _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
  return np.where(mel < _BREAK_MEL, mel * _HZ_PER_MEL, log)


@functools.cache
def mel_edges(spec: AudioSpec) -> np.ndarray:
  """Returns the n_mels + 2 corner frequencies of the triangular bands in Hz, float64."""
  ends = hz_to_mel(np.array([spec.fmin, spec.fmax]))
  return mel_to_hz(np.linspace(ends[0], ends[1], spec.n_mels + 2))


@functools.cache
def mel_triangles(spec: AudioSpec) -> np.ndarray:
  """Returns triangles [m, f] of unit height, float64; neighbours add up to one between centres."""
  hz_f = np.linspace(0, spec.sample_rate / 2, spec.n_fft // 2 + 1)
  edge = mel_edges(spec)[:, None]
  rise = (hz_f[None] - edge[:-2]) / (edge[1:-1] - edge[:-2])
  fall = (edge[2:] - hz_f[None]) / (edge[2:] - edge[1:-1])
  return np.maximum(0, np.minimum(rise, fall))


@functools.cache
def mel_basis(spec: AudioSpec) -> np.ndarray:
  """Returns the Slaney basis [m, f] in float32: triangles of unit area."""
  edge = mel_edges(spec)
  return (mel_triangles(spec) * (2 / (edge[2:] - edge[:-2]))[:, None]).astype(np.float32)


@functools.cache
def window(size: int) -> np.ndarray:
  """Returns the periodic Hann window [w] in float32."""
  return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


def _window_row(size: int, ndim: int) -> Array:
  return jnp.asarray(window(size)).reshape((1,) * (ndim - 1) + (size,))


def stft(audio_p: Array, spec: AudioSpec) -> Array:
  """Returns the transform [..., n, f] of [..., p] without padding; n = 1 + (p - n_fft) // hop."""
  count = 1 + (audio_p.shape[-1] - spec.n_fft) // spec.hop
  blocks = spec.n_fft // spec.hop
  used = audio_p[..., : (count + blocks - 1) * spec.hop]
  hops = used.reshape(*used.shape[:-1], count + blocks - 1, spec.hop)
  frames = jnp.concatenate([hops[..., i : i + count, :] for i in range(blocks)], -1)
  return jnp.fft.rfft(frames * _window_row(spec.n_fft, frames.ndim), axis=-1)


def overlap_add(frames_nw: Array, spec: AudioSpec) -> Array:
  """Adds frames [..., n, w] at steps of one hop: [..., (n - 1) * hop + n_fft]."""
  count, blocks = frames_nw.shape[-2], spec.n_fft // spec.hop
  lead = [(0, 0)] * (frames_nw.ndim - 2)
  hops = sum(
    jnp.pad(frames_nw[..., i * spec.hop : (i + 1) * spec.hop], [*lead, (i, blocks - 1 - i), (0, 0)])
    for i in range(blocks)
  )
  return jnp.asarray(hops).reshape(*frames_nw.shape[:-2], (count + blocks - 1) * spec.hop)


@functools.lru_cache(maxsize=32)
def _window_gain(count: int, spec: AudioSpec) -> np.ndarray:
  """Returns 1 / (sum of squared windows) of `count` frames; bounded where only tails overlap."""
  blocks = spec.n_fft // spec.hop
  total = np.zeros((count + blocks - 1) * spec.hop)
  for n in range(count):
    total[n * spec.hop : n * spec.hop + spec.n_fft] += window(spec.n_fft).astype(np.float64) ** 2
  return (1 / np.maximum(total, 1e-2)).astype(np.float32)


def istft(spectrum_nf: Array, spec: AudioSpec) -> Array:
  """Inverts `stft` by least squares: [..., n, f] -> [..., (n - 1) * hop + n_fft]."""
  frames = jnp.fft.irfft(spectrum_nf, spec.n_fft, axis=-1)
  audio = overlap_add(frames * _window_row(spec.n_fft, frames.ndim), spec)
  gain = jnp.asarray(_window_gain(spectrum_nf.shape[-2], spec))
  return audio * gain.reshape((1,) * (audio.ndim - 1) + (-1,))


def margin(spec: AudioSpec) -> int:
  """Returns the samples by which the transform's frames reach beyond either end of the audio."""
  return (spec.n_fft - spec.hop) // 2


def log_mel(audio_p: Array, spec: AudioSpec) -> Array:
  """Returns the log-mel spectrogram, as MMAudio's converter does.

  Args:
    audio_p: [..., p] in -1..1 (values beyond are clipped), more than (n_fft - hop) / 2 samples.
    spec: front end.

  Returns:
    [..., m, n], n = p // hop, in log10 (16 kHz) or natural (44.1 kHz) units of magnitude.

  Raises:
    ValueError: if the audio is too short to be padded by reflection.
  """
  pad = margin(spec)
  if audio_p.shape[-1] <= pad:
    raise ValueError(f"{audio_p.shape[-1]} samples are too few, a mel needs more than {pad}")
  audio_p = jnp.clip(audio_p, -1, 1)
  audio_p = jnp.pad(audio_p, [(0, 0)] * (audio_p.ndim - 1) + [(pad, pad)], mode="reflect")
  spectrum = stft(audio_p, spec)
  magnitude = jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + 1e-9)
  return to_log(project(magnitude, spec), spec)


def project(magnitude_nf: Array, spec: AudioSpec) -> Array:
  """Returns mel magnitudes [..., m, n] of linear magnitudes [..., n, f]."""
  basis = jnp.asarray(mel_basis(spec))
  return jnp.einsum("mf,...nf->...mn", basis, magnitude_nf, precision=jax.lax.Precision.HIGHEST)


def to_log(mel_mn: Array, spec: AudioSpec) -> Array:
  """Returns the logarithm of mel magnitudes in the front end's base, floored."""
  floored = jnp.maximum(mel_mn, FLOOR)
  return jnp.log10(floored) if spec.log == "log10" else jnp.log(floored)


def from_log(log_mel_mn: Array, spec: AudioSpec) -> Array:
  """Returns mel magnitudes of log-mels; inverts `to_log` above the floor."""
  return jnp.exp(log_mel_mn * db_per_unit(spec) * (np.log(10) / 20))


def db_per_unit(spec: AudioSpec) -> float:
  """Returns the decibels of one unit of log-mel: 20 (log10) or 8.69 (natural)."""
  return 20.0 if spec.log == "log10" else float(20 / np.log(10))


def to_linear(mel_mn: Array, spec: AudioSpec, iterations: int = 16) -> Array:
  """Returns non-negative linear magnitudes whose projection is close to the given mels.

  Starts from each band's mean level, interpolated between band centres, and refines it by
  multiplicative (Richardson-Lucy) updates x <- x * B'(y / Bx) / B'1. They keep magnitudes positive,
  reduce relative rather than absolute errors, which is what a log-mel measures, and keep the
  smoothness of the start; a clipped pseudo-inverse does none of the three.

  Args:
    mel_mn: mel magnitudes [..., m, n], not logarithms.
    spec: front end.
    iterations: number of updates.

  Returns:
    [..., n, f]. Scaling the mels scales the result.
  """
  exact = jax.lax.Precision.HIGHEST
  basis = jnp.asarray(mel_basis(spec))
  triangles = mel_triangles(spec)
  cover_f = triangles.sum(0)
  spread = (
    triangles / np.maximum(cover_f, 1e-9)[None] / mel_basis(spec).sum(1, dtype=np.float64)[:, None]
  )
  start = jnp.einsum("mf,...mn->...nf", jnp.asarray(spread, jnp.float32), mel_mn, precision=exact)
  weight_f = np.maximum(mel_basis(spec).sum(0, dtype=np.float64), 1e-9)
  back = jnp.asarray(mel_basis(spec) / weight_f[None], jnp.float32)

  def update(_: Array, x_nf: Array) -> Array:
    now = jnp.einsum("mf,...nf->...mn", basis, x_nf, precision=exact)
    ratio = mel_mn / jnp.maximum(now, 1e-12)
    return x_nf * jnp.einsum("mf,...mn->...nf", back, ratio, precision=exact)

  return jax.lax.fori_loop(0, iterations, update, start)


def band_to_linear(gain_mn: Array, spec: AudioSpec) -> Array:
  """Interpolates per-band values [..., m, n] between band centres to linear bins [..., n, f].

  Below the first and above the last centre the outermost band's value holds.
  """
  return jnp.einsum(
    "mf,...mn->...nf",
    jnp.asarray(_interpolation(spec)),
    gain_mn,
    precision=jax.lax.Precision.HIGHEST,
  )


@functools.cache
def _interpolation(spec: AudioSpec) -> np.ndarray:
  hz_f = np.linspace(0, spec.sample_rate / 2, spec.n_fft // 2 + 1)
  centres = mel_edges(spec)[1:-1]
  rows = [np.interp(hz_f, centres, row) for row in np.eye(spec.n_mels)]
  return np.asarray(rows, np.float32)
