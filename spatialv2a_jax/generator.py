"""A loaded model: frames and text in, binaural sound out. Arrays only; `generate` does the files.

A video longer than the window the model was trained on is generated in overlapping windows
whose noise is that of the whole clip and whose latents are cross-faded, so memory does not grow
with the picture.

Axes: b window, e ear (0 left, 1 right), t latent frame, c latent channel, v frame at 8 fps,
s synchronisation token, w text token, f feature, k descriptor, m mel bin, n mel frame, p sample.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax import checkpoint, codec, features, flow, io, schema, sharding
from spatialv2a_jax import phase as phases
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.models import flow_net

OVERLAP_SECONDS = 1.0  # Of neighbouring windows; their latents are cross-faded.


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a user can choose; every field goes into the sidecar.

  Attributes:
    prompt: what sounds; empty leaves it to the picture.
    negative: what should not sound.
    seed: of the noise, together with the file's content.
    steps: steps of the solver.
    method: solver, one of `flow.SOLVERS`.
    guidance: classifier-free guidance of all conditions.
    spatial_guidance: that of the spatial condition; None follows `guidance`.
    localizer: replaces the checkpoint's: "motion" or "track:FILE".
    phase: "shared" keeps the interaural phase, "independent" reconstructs each ear by itself.
    duration: seconds to generate at most; None is all of the video.
    format: "wav" (float32) or "flac" (24 bit).
    video: whether to write the video with its new sound.
    low_memory: one window at a time instead of several in a batch.
  """

  prompt: str = ""
  negative: str = ""
  seed: int = 0
  steps: int = 25
  method: str = "euler"
  guidance: float = 2.0
  spatial_guidance: float | None = None
  localizer: str | None = None
  phase: phases.Phase = "shared"
  duration: float | None = None
  format: str = "wav"
  video: bool = True
  low_memory: bool = False


@dataclasses.dataclass(frozen=True)
class Window:
  """A stretch of one file: index of its first latent frame and the features of its frames."""

  first: int
  features: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Clip:
  """Generated sound of one file."""

  audio_ep: np.ndarray
  descriptors_vk: np.ndarray
  heat_vyx: np.ndarray


class Generator:
  """A loaded model: arrays in, arrays out.

  Attributes:
    folder: where it came from.
    model: networks, configs and weights hash, from `checkpoint.load_model`.
    audio: rates of the sound it makes.
    seconds: length of a window.
  """

  def __init__(self, path: str | pathlib.Path):
    """Loads a model folder; raises MissingAssetError if it is not one."""
    self.folder = pathlib.Path(path)
    self.model = checkpoint.load_model(path)
    lacking = {"flow", "vae"} - set(self.model.params)
    if lacking:
      raise MissingAssetError(f"{path} holds no weights of: {', '.join(sorted(lacking))}")
    config = self.model.config
    try:
      self.audio = schema.AUDIO[config["audio"]]
      self.seconds = float(config["seconds"])
      self.features = features.Config(**config["features"])
      self.correlation = float(config["ear_correlation"])
      self.net = flow_net.build(flow_net.Config(**config["flow"]))
      self.codec = codec.build(config["vae"], self.audio)
      self.frames = schema.lengths(self.seconds, self.audio).latent
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f"{path}/config.json describes no model of this version: {error!r}") from None
    inits = {"flow": (self.net.init, self.net.init_stats()), "vae": (self.codec.init, {})}
    for name, (init, stats) in inits.items():
      params = sharding.unboxed(jax.eval_shape(init, jax.random.key(0)))
      found = self.model.params[name], self.model.stats[name]
      if _shapes((params, stats)) != _shapes(found):
        raise UserError(f"{path}/{name}.safetensors has other shapes than config.json says")

  def firsts(self, seconds: float) -> list[int]:
    """Returns the first latent frame of each window of a clip."""
    total = math.ceil(seconds * self.audio.latent_rate)
    if total <= self.frames:
      return [0]
    hop = self.frames - min(round(OVERLAP_SECONDS * self.audio.latent_rate), self.frames // 2)
    count = math.ceil((total - self.frames) / hop) + 1
    return [round(i * (total - self.frames) / (count - 1)) for i in range(count)]

  def windows(self, path: pathlib.Path, seconds: float, settings: Settings) -> Iterator[Window]:
    """Decodes and encodes the windows of one file; a short end holds its last frame."""
    config = self.features
    if settings.localizer is not None:
      config = dataclasses.replace(config, localizer=settings.localizer)
    count = schema.whole_frames(self.seconds, schema.SYNC_FPS)
    for first in self.firsts(seconds):
      start = first / self.audio.latent_rate
      left = min(self.seconds, seconds - start)
      view = io.read_views(path, features.views(), start=start, duration=left)["frames"][:count]
      frames = np.concatenate([view, np.repeat(view[-1:], count - len(view), axis=0)])
      encoded = features.encode(frames, self.seconds, config, start=start)
      encoded["heat_vyx"] = (255 * encoded["heat_vyx"][:, 2::4, 2::4]).astype(np.uint8)
      yield Window(first, encoded)

  def encode(self, audio_ep: np.ndarray, first: int) -> np.ndarray:
    """Returns the latents [e, t, c] of true sound in the window that begins at frame `first`."""
    at = first * 2 * self.audio.hop
    piece_ep = audio_ep[:, at : at + self.frames * 2 * self.audio.hop]
    short = self.frames * 2 * self.audio.hop - piece_ep.shape[1]
    piece_ep = np.pad(piece_ep, ((0, 0), (0, short)))
    return np.asarray(self._encode(self.model.params["vae"], piece_ep[None])[0])

  @functools.cached_property
  def _encode(self) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, audio_bep: self.codec.encode(params, audio_bep)[0])

  def noise(self, key: jax.Array, first: int) -> jax.Array:
    """Returns the noise of a window, which is that of the whole clip there."""
    return flow.ear_noise(
      key,
      self.frames,
      self.audio.latent_channels,
      ears=2,
      correlation=self.correlation,
      start=first,
    )

  @functools.cached_property
  def _sample(self) -> Callable[..., jax.Array]:
    def run(params, stats, cond, negative_bwf, missing_text_b, noise_betc, scales, settings):
      none_b = jnp.zeros_like(missing_text_b)
      velocity = flow.guided(
        self.net,
        params,
        stats,
        cond,
        latent_len=self.frames,
        guidance=scales[0],
        spatial_guidance=scales[1],
        negative_text_bwf=negative_bwf,
        missing={"video": none_b, "text": missing_text_b, "spatial": none_b},
      )
      x_betc = flow.sample(velocity, noise_betc, steps=settings[0], method=settings[1])
      return self.net.unnormalize(params, x_betc)

    return jax.jit(run, static_argnums=(6, 7))

  def sample(
    self, windows: Sequence[Window], keys: Sequence[jax.Array], settings: Settings, rows: int
  ) -> np.ndarray:
    """Returns latents [b, e, t, c] of windows, in a batch padded to `rows`."""
    fill = [*range(len(windows)), *[0] * (rows - len(windows))]
    names = {"clip_bvf": "clip_vf", "sync_bsf": "sync_sf", "spatial_bvk": "spatial_vk"}
    cond = {b: np.stack([windows[i].features[n] for i in fill]) for b, n in names.items()}

    def text(words):
      return np.stack([features.encode_text(words, self.features)] * rows)

    cond["text_bwf"] = text(settings.prompt)
    noise_betc = jnp.stack([self.noise(keys[i], windows[i].first) for i in fill])
    x_betc = self._sample(
      self.model.params["flow"],
      self.model.stats["flow"],
      cond,
      text(settings.negative) if settings.negative else None,
      np.full(rows, not settings.prompt.strip()),
      noise_betc,
      (settings.guidance, settings.spatial_guidance),
      (settings.steps, settings.method),
    )
    return np.asarray(x_betc)[: len(windows)]

  @functools.cached_property
  def _decode(self) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, z_etc: self.codec.decode(params, z_etc[None])[0])

  def mels(self, firsts: Sequence[int], latents: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the log-mels [e, m, n] of a clip from the latents [e, t, c] of its windows.

    Latents are joined first, then decoded window by window: the decoder sees the length it knows,
    and its memory does not grow with the clip.
    """
    z_etc = cross_fade(firsts, latents)
    params = self.model.params["vae"]
    pieces_enm = [
      np.swapaxes(self._decode(params, z_etc[:, first : first + self.frames]), 1, 2)
      for first in firsts
    ]
    return np.swapaxes(cross_fade([2 * first for first in firsts], pieces_enm), 1, 2)

  def clip(
    self,
    windows: Sequence[Window],
    latents: Sequence[np.ndarray],
    seconds: float,
    phase: phases.Phase,
  ) -> Clip:
    """Turns the windows of one file into sound of `seconds`."""
    firsts = [w.first for w in windows]
    rate = self.audio.latent_rate
    mel_emn = self.mels(firsts, latents)[..., : 2 * math.ceil(seconds * rate)]

    # Frame v of the clip comes from the last window that has begun by then.
    starts = np.array(firsts) / rate
    time_v = (np.arange(max(1, int(seconds * schema.CLIP_FPS))) + 0.5) / schema.CLIP_FPS
    of_v = np.searchsorted(starts, time_v, side="right") - 1
    row_v = ((time_v - starts[of_v]) * schema.CLIP_FPS).astype(int)
    row_v = np.minimum(row_v, len(windows[0].features["spatial_vk"]) - 1)
    shown = {
      name: np.stack([windows[i].features[name][r] for i, r in zip(of_v, row_v, strict=True)])
      for name in ("spatial_vk", "heat_vyx")
    }
    azimuth_n = azimuths(shown["spatial_vk"], time_v, mel_emn.shape[-1], self.audio)
    audio_ep = phases.binaural(mel_emn, self.audio, azimuth_n, phase)
    samples = round(seconds * self.audio.sample_rate)
    audio_ep = np.pad(audio_ep, ((0, 0), (0, max(0, samples - audio_ep.shape[1]))))[:, :samples]
    return Clip(audio_ep.astype(np.float32), shown["spatial_vk"], shown["heat_vyx"])


def cross_fade(firsts: Sequence[int], pieces: Sequence[np.ndarray]) -> np.ndarray:
  """Joins overlapping pieces [e, n, ...] of one length; each begins at its index of axis n."""
  length = pieces[0].shape[1]
  total = max(firsts) + length
  ramp_n = np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)).astype(np.float32)
  sum_n = np.zeros(total, np.float32)
  for first in firsts:
    sum_n[first : first + length] += ramp_n
  out = np.zeros((pieces[0].shape[0], total, pieces[0].shape[2]), np.float32)
  for first, piece_enx in zip(firsts, pieces, strict=True):
    share_n = ramp_n / sum_n[first : first + length]
    out[:, first : first + length] += share_n[None, :, None] * piece_enx
  return out


def azimuths(
  descriptors_vk: np.ndarray, time_v: np.ndarray, count: int, audio: schema.AudioSpec
) -> np.ndarray | None:
  """Returns the azimuth [n] in degrees, left positive, of what is seen to sound at each mel frame.

  None if nothing is: the delay between the ears then follows their levels.
  """
  valid_v = descriptors_vk[:, 1] > 0  # S_area
  if not valid_v.any():
    return None
  azimuth_v = -0.5 * schema.HFOV_DEG * descriptors_vk[valid_v, 0]
  time_n = (np.arange(count) + 0.5) * (audio.hop / audio.sample_rate)
  return np.interp(time_n, time_v[valid_v], azimuth_v)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
