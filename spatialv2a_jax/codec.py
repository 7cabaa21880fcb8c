"""Binaural sound <-> latents: log-mels, one VAE for each ear, and waveforms with shared phase.

Everything is a pure function of parameters and arrays. `build` ties the functions of one codec
together; `loss` has the signature (params, batch, key) -> (value, metrics) of a generic trainer.

Axes: b clip, e ear (0 left, 1 right), p audio sample, m mel bin, n mel frame, t latent frame,
c latent channel.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatialv2a_jax import flow, mel
from spatialv2a_jax import phase as phases
from spatialv2a_jax.models import vae
from spatialv2a_jax.schema import AudioSpec

Params = Any


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the VAE's objective beside the mean absolute error of the normalised log-mel.

  The defaults suit a small VAE that trains for minutes with Adam at a learning rate of 0.01 (its
  weights are normalised, so steps may be large). Differences between the ears are small beside the
  level itself, hence a term of their own; there is no discriminator.

  Attributes:
    square: of the mean squared error, without which narrow peaks are missed for long: absolute
      errors ask for the median, and most frames of a band are quiet.
    beta: of the KL divergence from the standard normal, per latent value.
    slope: of the error of differences between neighbouring frames and between neighbouring bins.
    interaural: of the error of the difference between the ears, per band.
    level: of the error of the level difference between the ears per frame, in tens of dB: what is
      heard as direction, and hangs on the few loudest bands.
    excerpt: mel frames of the random excerpt that a step sees, even; 0 is the whole clip. Short
      excerpts give more steps per minute, and the VAE's context is short.
  """

  square: float = 1.0
  beta: float = 1e-4
  slope: float = 0.5
  interaural: float = 0.5
  level: float = 0.5
  excerpt: int = 0

  def checked(self) -> "LossConfig":
    """Returns itself; ValueError for a number out of its range."""
    for name in ("square", "beta", "slope", "interaural", "level"):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(f"{name}={getattr(self, name)} is not 0 or more")
    if self.excerpt and (self.excerpt < 4 or self.excerpt % 2):
      raise ValueError(f"excerpt={self.excerpt} is neither 0 nor an even number of 4 or more")
    return self


class Codec(NamedTuple):
  """Functions of one codec.

  Attributes:
    init: key -> boxed VAE parameters.
    encode: (params, audio_bep) -> mean_betc, std_betc of the posterior.
    decode: (params, z_betc) -> log_mel_bemn with n = 2 t.
    loss: (params, {"audio_bep", "id_b", "weight_b"}, key) -> (value, metrics); see `vae_loss`.
    waveform: (params, z_etc) of one clip -> audio_ep (NumPy), with shared phase.
  """

  init: Callable[[Array], Params]
  encode: Callable[[Params, Array], tuple[Array, Array]]
  decode: Callable[[Params, Array], Array]
  loss: Callable[[Params, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]
  waveform: Callable[..., np.ndarray]


def _merge(x_be: Array) -> Array:
  return x_be.reshape(-1, *x_be.shape[2:])


def _split(x_b: Array) -> Array:
  return x_b.reshape(-1, 2, *x_b.shape[1:])


def even_mel(audio_bep: Array, spec: AudioSpec) -> Array:
  """Returns log-mels [..., m, n] of whole latent frames: an odd last mel frame is dropped."""
  mels = mel.log_mel(audio_bep, spec)
  return mels[..., : mels.shape[-1] // 2 * 2]


def encode(net: vae.Vae, params: Params, audio_bep: Array, spec: AudioSpec) -> tuple[Array, Array]:
  """Returns the posterior's mean and standard deviation, [b, 2, t, c] each, ear by ear."""
  mean, std = net.encode(params, _merge(even_mel(audio_bep, spec)))
  return _split(mean), _split(std)


def decode(net: vae.Vae, params: Params, z_betc: Array) -> Array:
  """Returns log-mels [b, e, m, 2 t] of latents [b, e, t, c], of one ear or two."""
  mels = net.decode(params, _merge(z_betc))
  return mels.reshape(*z_betc.shape[:2], *mels.shape[1:])


def vae_loss(
  net: vae.Vae,
  spec: AudioSpec,
  config: LossConfig,
  params: Params,
  batch: Mapping[str, Array],
  key: Array,
) -> tuple[Array, dict[str, Array]]:
  """Returns the VAE's loss on the binaural audio of a batch.

  Args:
    net: functions of the VAE.
    spec: front end.
    config: weights of the terms.
    params: of the VAE; `frozen/` gets no gradient.
    batch: "audio_bep" [b, 2, p] in -1..1, `id_b` and `weight_b` (0 marks padding).
    key: of the excerpt and of the posterior sample; each clip draws by its id.

  Returns:
    The loss and metrics, means over real clips: "l1" (normalised units), "mel_db" (mean absolute
    error), "ild_db" (of the level difference per frame), "kl" (nats per latent value), "std" and
    "mean_rms" (posterior).
  """
  audio_bep, weight_b, length = batch["audio_bep"], batch["weight_b"], config.excerpt * spec.hop
  keys_bd = jax.vmap(jax.random.split)(flow.clip_keys(key, batch["id_b"]))
  if 0 < length < audio_bep.shape[-1]:

    def excerpt(key, audio_ep):
      start = jax.random.randint(key, (), 0, audio_ep.shape[-1] - length + 1)
      return jax.lax.dynamic_slice_in_dim(audio_ep, start, length, axis=-1)

    audio_bep = jax.vmap(excerpt)(keys_bd[:, 0], audio_bep)
  target = jax.lax.stop_gradient(even_mel(audio_bep, spec))
  mean, std = (_split(x) for x in net.encode(params, _merge(target)))
  noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys_bd[:, 1])
  error = _split(net.decode(params, _merge(mean + std * noise))) - target

  def clip_mean(x):
    """Returns the mean over all values of real clips."""
    return (weight_b * x.mean(tuple(range(1, x.ndim)))).sum() / jnp.maximum(weight_b.sum(), 1)

  scale = jax.lax.stop_gradient(params["frozen"]["data_std"]).reshape(1, 1, -1, 1)
  scaled = error / scale
  l1 = clip_mean(jnp.abs(scaled))
  slope = sum(clip_mean(jnp.abs(jnp.diff(scaled, axis=axis))) for axis in (-1, -2))
  interaural = clip_mean(jnp.abs(scaled[:, 0] - scaled[:, 1]))
  kl = 0.5 * clip_mean(jnp.square(mean) + jnp.square(std) - 1 - 2 * jnp.log(std))
  square = clip_mean(jnp.square(scaled))
  ild_db = clip_mean(jnp.abs(frame_ild_db(target + error, spec) - frame_ild_db(target, spec)))
  value = (
    l1
    + config.square * square
    + config.slope * slope
    + config.interaural * interaural
    + config.level * ild_db / 10
    + config.beta * kl
  )
  metrics = {
    "l1": l1,
    "mel_db": clip_mean(jnp.abs(error)) * mel.db_per_unit(spec),
    "ild_db": ild_db,
    "kl": kl,
    "std": clip_mean(std),
    "mean_rms": jnp.sqrt(clip_mean(jnp.square(mean))),
  }
  return value, metrics


def frame_ild_db(log_mel_bemn: Array, spec: AudioSpec) -> Array:
  """Returns the level difference [b, n] in dB, left over right, of each mel frame's power."""
  per_neper = mel.db_per_unit(spec) * np.log(10) / 10
  level_ben = jax.nn.logsumexp(per_neper * log_mel_bemn, axis=-2)  # No overflow, however wrong.
  return (level_ben[:, 0] - level_ben[:, 1]) * (10 / np.log(10))


def statistics(audio: Iterable[np.ndarray], spec: AudioSpec) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and standard deviation [m] of the log-mels of clips [..., p], in float64 sums."""
  count, total, square = 0, np.zeros(spec.n_mels), np.zeros(spec.n_mels)
  for clip in audio:
    values = np.asarray(mel.log_mel(jnp.asarray(clip), spec), np.float64)
    values = np.moveaxis(values, -2, 0).reshape(spec.n_mels, -1)
    count += values.shape[1]
    total += values.sum(1)
    square += np.square(values).sum(1)
  mean = total / count
  deviation = np.sqrt(np.maximum(square / count - np.square(mean), 1e-4))
  return mean.astype(np.float32), deviation.astype(np.float32)


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the function with products in float32, where matrix units round them if not told.

  Networks of sound are small, and rounding is heard as noise.
  """

  def exact(*arguments: Any) -> Any:
    with jax.default_matmul_precision("highest"):
      return function(*arguments)

  return exact


def build(
  config: Mapping[str, Any], spec: AudioSpec, loss_config: LossConfig | None = None
) -> Codec:
  """Returns the functions of one codec.

  Args:
    config: fields of `models.vae.Config`; mel bins and latent channels default to the spec's.
    spec: front end.
    loss_config: weights of the training objective.
  """
  sizes = {"n_mels": spec.n_mels, "latent_channels": spec.latent_channels, **config}
  net = vae.build(vae.Config(**sizes))
  weights = loss_config or LossConfig()
  decode_exactly = exactly(lambda params, z_betc: decode(net, params, z_betc))
  decode_clip = jax.jit(decode_exactly)

  def waveform(params: Params, z_etc: np.ndarray) -> np.ndarray:
    mel_emn = np.asarray(decode_clip(params, jnp.asarray(z_etc)[None])[0])
    return phases.binaural(mel_emn, spec)

  return Codec(
    init=net.init,
    encode=exactly(lambda params, audio_bep: encode(net, params, audio_bep, spec)),
    decode=decode_exactly,
    loss=lambda params, batch, key: vae_loss(net, spec, weights, params, batch, key),
    waveform=waveform,
  )
