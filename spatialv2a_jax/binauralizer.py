"""Training and use of the mono-to-binaural network: spectrograms and back, loss, sliding windows.

As in PseudoBinaural (CVPR 2021), sound is at 16 kHz and cut into windows of 0.63 s; the network
sees the mix left + right, normalised to an RMS of 0.1, and the picture at the middle of the window.
Two things differ from its program. Its inverse transform lacks a bin and thereby changes the length
of the transform; here the missing bin is zero. And windows are cross-faded, not cut. What is added
to one ear is taken from the other, so that the mean of both ears is the mono sound exactly.

Axes: b window, e ear (0 left, 1 right), p sample, f frequency bin, t frame, w sample of a frame,
z real and imaginary part, v video frame at 8 fps, y row, x column, c colour.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soxr
from jax import Array

from spatialv2a_jax import model_folder, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import mono2binaural

NETWORK = "mono2binaural"
RATE, WINDOW = schema.PAIR_RATE, schema.PAIR_SAMPLES
N_FFT, HOP, TAPS = 512, 160, 400  # The window of 400 samples stands in the middle of 512.
STEP = 1_600  # From one sliding window to the next.
BATCH = 16  # Windows at a time.


@functools.cache
def _hann() -> np.ndarray:
  hann_w = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(TAPS) / TAPS)
  return np.pad(hann_w, (N_FFT - TAPS) // 2)


def _frames(samples: int) -> np.ndarray:
  """Returns the sample of the padded sound at each place of each frame, int [t, w]."""
  return np.arange(samples // HOP + 1)[:, None] * HOP + np.arange(N_FFT)[None, :]


def stft(audio_p: Array) -> Array:
  """Returns spectrograms [..., 257, t, 2] of sounds [..., p] with reflected ends; t = p / 160 + 1.

  Raises:
    ValueError: the length is no multiple of 160.
  """
  samples = audio_p.shape[-1]
  if samples % HOP:
    raise ValueError(f"{samples} samples are no multiple of {HOP}")
  lead = [(0, 0)] * (audio_p.ndim - 1)
  padded = jnp.pad(audio_p, [*lead, (N_FFT // 2, N_FFT // 2)], mode="reflect")
  framed = padded[..., _frames(samples)] * jnp.asarray(_hann(), audio_p.dtype).reshape(
    (1,) * audio_p.ndim + (-1,)
  )
  spectrum = jnp.fft.rfft(framed, axis=-1).swapaxes(-1, -2)
  return jnp.stack([spectrum.real, spectrum.imag], -1)


def istft(spectrum_bftz: Array) -> Array:
  """Inverts `stft` by least squares: [b, f, t, 2] -> [b, (t - 1) * 160]; missing bins are zero."""
  b, bins, frames, _ = spectrum_bftz.shape
  samples = (frames - 1) * HOP
  spectrum = jax.lax.complex(spectrum_bftz[..., 0], spectrum_bftz[..., 1]).swapaxes(1, 2)
  spectrum = jnp.pad(spectrum, [(0, 0), (0, 0), (0, N_FFT // 2 + 1 - bins)])
  framed = jnp.fft.irfft(spectrum, N_FFT, axis=-1) * jnp.asarray(_hann(), jnp.float32)[None, None]
  index_tw, total_p = _frames(samples), np.zeros(samples + N_FFT)
  np.add.at(total_p, index_tw, np.square(_hann())[None])
  padded = jnp.zeros((b, samples + N_FFT)).at[:, index_tw].add(framed)
  inner = slice(N_FFT // 2, N_FFT // 2 + samples)
  return padded[:, inner] / jnp.asarray(total_p[inner], jnp.float32)[None]


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """How the network is trained.

  Attributes:
    power: of the error of a value of the spectrogram: 1 as PseudoBinaural, 2 as 2.5D Visual Sound.
  """

  power: int = 1

  def __post_init__(self):
    """Refuses what is not known."""
    if self.power not in (1, 2):
      raise ValueError(f"power {self.power} is neither 1 nor 2")


def loss(
  params: Any,
  stats: Any,
  batch: Mapping[str, Array],
  key: Array,
  *,
  net: mono2binaural.Mono2Binaural,
  heads: tuple[str, ...],
  config: LossConfig,
  train: bool = True,
) -> tuple[Array, tuple[dict[str, Array], Any]]:
  """Returns the loss of the difference between the ears, predicted by the U-Net and by each head.

  A head predicts each ear; 2 left - mix and mix - 2 right are its two differences.

  Args:
    params: of the network.
    stats: its running statistics.
    batch: "audio_bep" [b, 2, 10080], whose mix has an RMS of 0.1, "image_byxc" uint8, "weight_b".
    key: not used: there is nothing random in it.
    net: functions of the network.
    heads: their names.
    config: of the loss.
    train: whether norms use the statistics of the batch.

  Returns:
    The loss, and the metrics "unet" and one for each head, their parts, and "explained_NAME", the
    share of the difference's energy that is not in the error (0 for dual mono), and new statistics.
  """
  del key
  ears = batch["audio_bep"]
  mix, difference = (stft(x) for x in (ears[:, 0] + ears[:, 1], ears[:, 0] - ears[:, 1]))
  out, stats = net.apply(params, stats, mix, batch["image_byxc"], train=train)
  mix, difference = mix[:, :-1], difference[:, :-1]
  weight_b = batch["weight_b"] / jnp.maximum(batch["weight_b"].sum(), 1)

  def mean(x):
    return (x.mean((1, 2, 3)) * weight_b).sum()

  def criterion(error):
    return mean(jnp.abs(error) if config.power == 1 else jnp.square(error))

  errors: dict[str, tuple[Array, ...]] = {"unet": (out["difference"] - difference,)}
  for head in heads:
    left, right = out[f"{head}_left"], out[f"{head}_right"]
    errors[head] = (2 * left - mix - difference, mix - 2 * right - difference)
  value, metrics, energy = jnp.zeros(()), {}, mean(jnp.square(difference))
  for name, parts in errors.items():
    metrics[name] = sum(map(criterion, parts), jnp.zeros(())) / len(parts)
    residual = mean(jnp.square(sum(parts, jnp.zeros(())) / len(parts)))
    metrics[f"explained_{name}"] = 1 - residual / jnp.maximum(energy, 1e-9)
    value += metrics[name]
  return value, (metrics, stats)


class Binauralizer:
  """A trained network, ready for use."""

  def __init__(self, folder: str | os.PathLike[str]):
    """Loads a model folder.

    Raises:
      MissingAssetError: no such folder.
      UserError: it has no mono-to-binaural network, or one of another version.
    """
    model = model_folder.load_model(os.fspath(folder))
    if NETWORK not in model.params:
      raise UserError(f"{folder} has no network {NETWORK!r}, only {sorted(model.params)}")
    try:
      self.config = mono2binaural.Config(**model.config[NETWORK])
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f"{folder}/config.json describes no {NETWORK}: {error}") from None
    net = mono2binaural.build(self.config)
    heads, params, stats = self.config.heads, model.params[NETWORK], model.stats[NETWORK]

    @jax.jit
    def difference(mix_bp: Array, image_byxc: Array) -> Array:
      out, _ = net.apply(params, stats, stft(mix_bp), image_byxc)
      if not heads:
        return istft(out["difference"])
      return istft(out[f"{heads[0]}_left"] - out[f"{heads[0]}_right"])

    self._difference: Callable[[Array, Array], Array] = difference

  def windows(self, mix_bp: np.ndarray, image_byxc: np.ndarray) -> np.ndarray:
    """Returns left - right [b, 10080] of mixes left + right [b, 10080] and their pictures."""
    level_b1 = np.sqrt(np.square(mix_bp).mean(1, keepdims=True))
    scale_b1 = (np.maximum(level_b1, schema.PAIR_FAINTEST) / schema.PAIR_LEVEL).astype(np.float32)
    parts = []
    for first in range(0, len(mix_bp), BATCH):
      rows = slice(first, first + BATCH)
      mix, image = mix_bp[rows] / scale_b1[rows], image_byxc[rows]
      fill = [(0, BATCH - len(mix))]  # One shape, so that it compiles once.
      mix = np.pad(mix, [*fill, (0, 0)])
      image = np.pad(image, [*fill, (0, 0), (0, 0), (0, 0)])
      done = np.asarray(self._difference(jnp.asarray(mix), jnp.asarray(image)))
      parts.append(done[: len(mix_bp) - first])
    return np.concatenate(parts) * scale_b1


class Difference:
  """Left - right of one mono sound at 16 kHz, filled in as pictures come."""

  def __init__(self, net: Binauralizer, mono_p: np.ndarray):
    """Begins with silence.

    Args:
      net: the network.
      mono_p: [p] the mean of both ears, 16 kHz.
    """
    half = WINDOW // 2
    self._net, self._samples = net, len(mono_p)
    self._count = -(-len(mono_p) // STEP) + 1  # Window i is centred on sample i * STEP.
    self._mono_p = np.pad(np.asarray(mono_p, np.float32), (half, half + STEP))
    self._sum_p = np.zeros_like(self._mono_p)
    self._weight_p = np.zeros_like(self._mono_p)
    self._fade_p = np.hanning(WINDOW + 2)[1:-1].astype(np.float32)
    self._next = 0

  def see(self, frames_vyxc: np.ndarray, start: int, last: bool) -> None:
    """Does the windows whose middle lies within these pictures.

    Args:
      frames_vyxc: uint8 RGB at 8 fps, of the network's size.
      start: number of the first one.
      last: no pictures follow: the last one stays to the end of the sound.
    """
    places = range(self._next, self._count)
    if not last:
      end = (start + len(frames_vyxc)) * RATE // schema.CLIP_FPS
      places = range(self._next, min(self._count, -(-end // STEP)))
    for first in range(places.start, places.stop, BATCH):
      some = range(first, min(first + BATCH, places.stop))
      at_v = [min(max(i * STEP * schema.CLIP_FPS // RATE - start, 0), len(frames_vyxc) - 1)
              for i in some]  # fmt: skip
      mix_bp = np.stack([2 * self._mono_p[i * STEP : i * STEP + WINDOW] for i in some])
      found_bp = self._net.windows(mix_bp, frames_vyxc[at_v])
      for i, found_p in zip(some, found_bp, strict=True):
        span = slice(i * STEP, i * STEP + WINDOW)
        self._sum_p[span] += self._fade_p * found_p
        self._weight_p[span] += self._fade_p
    self._next = places.stop

  def result(self) -> np.ndarray:
    """Returns left - right, float32 [p]."""
    inner = slice(WINDOW // 2, WINDOW // 2 + self._samples)
    return self._sum_p[inner] / np.maximum(self._weight_p[inner], 1e-6)


def binauralize(
  net: Binauralizer,
  mono_p: np.ndarray,
  rate: int,
  pieces: Iterable[tuple[np.ndarray, int, bool]],
) -> np.ndarray:
  """Returns both ears of a video, float32 [2, p].

  What the network adds to one ear it takes from the other, below 8 kHz; the mean of both ears is
  the mono sound, with all its frequencies.

  Args:
    net: the network.
    mono_p: [p] the sound.
    rate: of the sound, Hz.
    pieces: of the video, the arguments of `Difference.see`.
  """
  difference = Difference(net, soxr.resample(mono_p, rate, RATE))
  for frames_vyxc, start, last in pieces:
    difference.see(frames_vyxc, start, last)
  side_p = soxr.resample(difference.result(), RATE, rate) / 2
  side_p = np.pad(side_p, (0, max(0, len(mono_p) - len(side_p))))[: len(mono_p)]
  return np.stack([mono_p + side_p, mono_p - side_p]).astype(np.float32)
