"""A loaded model: videos or frames and text in, binaural sound out; `generate` writes files.

A video longer than the window the model was trained on is generated in overlapping windows that are
sampled as one clip (`sampler`), so memory does not grow with the picture.

Axes: b window, e ear (0 left, 1 right), t latent frame, c latent channel, v frame at 8 fps,
s synchronisation token, w text token, f feature, k descriptor, m mel bin, n mel frame, p sample.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax import codec, features, flow, io, model_folder, schema
from spatialv2a_jax import phase as phases
from spatialv2a_jax.encoders import Encoders, Stage
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.feature_cache import Cache
from spatialv2a_jax.models import flow_net, vocoder
from spatialv2a_jax.sampler import Choice, Condition, Sampler, clip_key
from spatialv2a_jax.settings import Settings as Settings
from spatialv2a_jax.weights import Weights, missing
from spatialv2a_jax.windows import Source, Window, azimuths, cross_fade, length, shares

GUIDANCE = 2.0  # Where neither the user nor the checkpoint says another.
DEFAULTS = Settings()
BATCH = 8  # Windows sampled at once.
OVERLAP_SECONDS = 1.0  # Of neighbouring windows, at least; over it one takes over from the other.
SLACK_SECONDS = 0.064  # Film of 240 frames at 29.97 fps is 8.008 s: no second window for 8 ms.


@dataclasses.dataclass(frozen=True)
class Clip:
  """Generated sound of one video.

  Attributes:
    audio_ep: float32 [2, samples], left ear first, never normalised.
    descriptors_vk: where it sounds at 8 fps, see `schema.DESCRIPTORS`.
    heat_vyx: uint8 heat maps of which these are.
  """

  audio_ep: np.ndarray
  descriptors_vk: np.ndarray
  heat_vyx: np.ndarray


class Generator:
  """A loaded model: `generate` takes a file or frames in memory and returns sound.

  Attributes:
    folder: where it came from.
    weights: its networks; they are put on the device when they are first used.
    audio: rates of the sound it makes.
    seconds: length of a window.
    ears: 2; with 1 (MMAudio's own networks) both channels get the same sound.
    report: takes lines about long work.
  """

  def __init__(
    self,
    path: str | pathlib.Path,
    *,
    parts: str | pathlib.Path | None = None,
    dtype: str | None = None,
    low_memory: bool = False,
    cache: Cache | None = None,
  ):
    """Opens a model folder.

    Args:
      path: model folder, or that of a finished run.
      parts: model folder with the networks that `path` lacks.
      dtype: "float32" or "bfloat16", of the matmuls; None is what `path` says.
      low_memory: holds one network at a time.
      cache: of features.

    Raises:
      MissingAssetError: no model folder, or one that lacks a network.
      UserError: its files do not go together.
    """
    self.folder = pathlib.Path(path)
    opened = model_folder.open_model(path)
    more = [] if parts is None else [model_folder.open_model(parts)]
    self.weights = Weights([opened, *more], dtype=dtype, single=low_memory)
    self.cache, self.report = cache, _silent
    config = opened.config
    self.weights.model("flow", config.get("audio", "16k"))  # Whose config describes the rest.
    try:
      self.audio = schema.AUDIO[config["audio"]]
      name = self.audio.name
      flow_config = flow_net.Config(**self.weights.config("flow", name))
      self.seconds = float(config["seconds"])
      self.features = features.Config(**config["features"])
      self.correlation = float(config["ear_correlation"])
      self.guidance = float(config.get("guidance", GUIDANCE))
      self.ears, self.dtype = flow_config.ears, flow_config.dtype
      # Two ears made of a mono network shall compute what it does, to the bit.
      self.net = flow_net.build(flow_config, sealed=jax.default_backend() == "cpu")
      self.codec = codec.build(self.weights.config("vae", name), self.audio)
      self.vocoder = None
      if "vocoder" in self.weights or self.features.encoder != "random":
        self.vocoder = vocoder.Config(**self.weights.config("vocoder", name))
      self.frames = schema.lengths(self.seconds, self.audio).latent
      self.sampler = Sampler(self.net, self.frames)
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f"{path}/config.json describes no model of this version: {error!r}") from None
    if flow_config.latent_channels != self.audio.latent_channels:
      raise UserError(f"{path}/config.json says {name} sound, its flow network makes other latents")
    want = self.audio.n_mels, self.audio.hop
    mels = {"vae": (self.weights.config("vae", name).get("n_mels", want[0]), want[1])}
    if self.vocoder is not None:
      mels["vocoder"] = self.vocoder.n_mels, math.prod(self.vocoder.rates)
    for network, have in mels.items():
      if have != want:
        where = self.weights.model(network).folder
        raise MissingAssetError(
          f"{where} holds a {network} for other sound ({have[0]} mel bins every {have[1]} samples, "
          f"{name} sound has {want[0]} every {want[1]}); {missing(network, path, name)}"
        )
    self.weights.check("flow", self.net.init, self.net.init_stats())
    self.weights.check("vae", self.codec.init)
    if self.vocoder is not None:
      self.weights.check("vocoder", vocoder.build(self.vocoder).init)
    self._encoders: dict[str, Encoders] = {}
    self._compiled: set[tuple[Any, ...]] = set()

  def encoders(self, localizer: str | None = None) -> Encoders:
    """Returns the encoders of the checkpoint, with its localizer or another.

    Raises:
      MissingAssetError: a network that they need is nowhere.
      UserError: an unknown localizer, or a bad track.
    """
    chosen = localizer or self.features.localizer
    if chosen not in self._encoders:
      config = dataclasses.replace(self.features, localizer=chosen)
      self._encoders[chosen] = Encoders(
        config, self.weights, cache=self.cache, report=lambda line: self.report(line)
      )
    return self._encoders[chosen]

  def sha256(self, localizer: str | None = None) -> dict[str, str]:
    """Returns the digest of every network that makes the sound."""
    names = ["flow", "vae", *self.encoders(localizer).networks]
    names += ["vocoder"] if self.vocoder is not None else []
    return {name: self.weights.sha256(name) for name in names}

  def licences(self, localizer: str | None = None) -> dict[str, str]:
    """Returns the licence of every network that makes the sound and has one."""
    found = {name: self.weights.licence(name) for name in self.sha256(localizer)}
    return {name: licence for name, licence in found.items() if licence}

  def generate(
    self,
    source: Source,
    settings: Settings = DEFAULTS,
    advance: Callable[[float], None] = lambda share: None,
  ) -> Clip:
    """Makes the sound of one video and writes nothing.

    Args:
      source: a file, or frames in memory.
      settings: what to make; those of the output files are without effect.
      advance: takes the share of the sampling that has been done, after each part of it.

    Raises:
      MissingAssetError: a network that the settings need is nowhere.
      UserError: the video cannot be read.
    """
    seconds = length(source, settings.duration)
    sha256 = source.sha256 if isinstance(source, io.Frames) else io.file_hash(source)
    windows = self.windows(source, seconds, settings, sha256)
    z_etc = self.latents(windows, clip_key(settings.seed, sha256), settings, advance)
    return self.clip(windows, z_etc, seconds, settings.phase)

  def firsts(self, seconds: float) -> list[int]:
    """Returns the first latent frame of each window of a clip.

    A clip longer by `SLACK_SECONDS` at most is one window, whose last frame is held.
    """
    total = math.ceil(seconds * self.audio.latent_rate)
    if total <= self.frames + round(SLACK_SECONDS * self.audio.latent_rate):
      return [0]
    hop = self.frames - self._overlap
    count = math.ceil((total - self.frames) / hop) + 1
    return [round(i * (total - self.frames) / (count - 1)) for i in range(count)]

  @property
  def _overlap(self) -> int:
    return min(round(OVERLAP_SECONDS * self.audio.latent_rate), self.frames // 2)

  def windows(
    self, source: Source, seconds: float, settings: Settings, sha256: str | None = None
  ) -> list[Window]:
    """Decodes and encodes the windows of one video; a short end holds its last frame.

    Args:
      source: the video.
      seconds: its length.
      settings: the prompt, which `acl` looks for, and the localizer.
      sha256: of the video, by which the cache knows it.
    """
    windows = [Window(first, {}) for first in self.firsts(seconds)]
    encoders = self.encoders(settings.localizer)
    self.look(source, seconds, windows, encoders.stages(settings.prompt), settings, sha256)
    return windows

  def look(
    self,
    source: Source,
    seconds: float,
    windows: Sequence[Window],
    stages: Sequence[Stage],
    settings: Settings,
    sha256: str | None = None,
  ) -> None:
    """Adds the features of some stages to the windows of one video."""
    encoders = self.encoders(settings.localizer)
    for window in windows:
      start = window.first / self.audio.latent_rate
      left = min(self.seconds, seconds - start)
      found = encoders.read(
        source, stages, self.seconds, start=start, available=left, sha256=sha256
      )
      window.features.update(found)

  def encode(self, audio_ep: np.ndarray, first: int) -> np.ndarray:
    """Returns the latents [e, t, c] of true sound in the window that begins at frame `first`."""
    at = first * 2 * self.audio.hop
    piece_ep = audio_ep[:, at : at + self.frames * 2 * self.audio.hop]
    short = self.frames * 2 * self.audio.hop - piece_ep.shape[1]
    piece_ep = np.pad(piece_ep, ((0, 0), (0, short)))
    return np.asarray(self._encode(self.weights.take("vae"), piece_ep[None])[0])

  @functools.cached_property
  def _encode(self) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, audio_bep: self.codec.encode(params, audio_bep)[0])

  def noise(self, key: jax.Array, first: int, frames: int | None = None) -> jax.Array:
    """Returns the noise of a window, which is that of the whole clip there."""
    return flow.ear_noise(
      key,
      frames or self.frames,
      self.audio.latent_channels,
      ears=self.ears,
      correlation=self.correlation,
      start=first,
    )

  def sample(
    self, windows: Sequence[Window], keys: Sequence[jax.Array], settings: Settings, rows: int
  ) -> np.ndarray:
    """Returns latents [b, e, t, c] of clips of one window, in a batch padded to `rows`."""
    fill = [*range(len(windows)), *[0] * (rows - len(windows))]
    given, choice = self._given(windows, settings), self._choice(settings)
    noise_betc = jnp.stack([self.noise(keys[i], windows[i].first) for i in fill])
    self._announce("the sampler", rows, given.negative_bwf is None, choice)
    weights = self.weights.take("flow"), self.weights.stats("flow")
    x_betc = self.sampler.windows(*weights, given.rows(fill), noise_betc, choice)
    return np.asarray(x_betc)[: len(windows)]

  def latents(
    self,
    windows: Sequence[Window],
    key: jax.Array,
    settings: Settings,
    advance: Callable[[float], None] = lambda share: None,
  ) -> np.ndarray:
    """Returns the latents [e, t, c] of a clip of one window or more.

    Args:
      windows: of the clip.
      key: of its noise.
      settings: what to make.
      advance: takes the share of the work that has been done, after each part of it.
    """
    if len(windows) == 1:
      (x_etc,) = self.sample(windows, [key], settings, 1)
      advance(1.0)
      return x_etc
    turns = math.ceil(len(windows) / (1 if settings.low_memory else BATCH))
    rows = math.ceil(len(windows) / turns)
    firsts = [window.first for window in windows]
    given, choice = self._given(windows, settings), self._choice(settings)
    self._announce("the sampler of long clips", rows, given.negative_bwf is None, *choice[:2])
    return self.sampler.together(
      self.weights.take("flow"),
      self.weights.stats("flow"),
      given,
      self.noise(key, 0, firsts[-1] + self.frames),
      choice,
      firsts=firsts,
      share_bn=shares(firsts, self.frames, self._overlap),
      rows=rows,
      advance=advance,
    )

  def _given(self, windows: Sequence[Window], settings: Settings) -> Condition:
    names = {"clip_bvf": "clip_vf", "sync_bsf": "sync_sf", "spatial_bvk": "spatial_vk"}
    cond = {b: np.stack([w.features[name] for w in windows]) for b, name in names.items()}
    count, spoken = len(windows), bool(settings.prompt.strip())

    def text(words):
      return np.stack([self.encoders(settings.localizer).text(words)] * count)

    none = np.zeros((count, self.features.text_len, self.features.text_dim), np.float32)
    cond["text_bwf"] = text(settings.prompt) if spoken else none
    negative_bwf = text(settings.negative) if settings.negative else None
    return Condition(cond, negative_bwf, np.full(count, not spoken))

  def _choice(self, settings: Settings) -> Choice:
    guidance = self.guidance if settings.guidance is None else settings.guidance
    return Choice(guidance, settings.spatial_guidance, settings.steps, settings.method)

  def _announce(self, *what: Any) -> None:
    """Tells that a program is about to be compiled, which takes a while the first time."""
    if what not in self._compiled:
      self._compiled.add(what)
      self.report(f"compiling {what[0]} (the next run finds it in the cache)")

  @functools.cached_property
  def _decode(self) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, z_etc: self.codec.decode(params, z_etc[None])[0])

  def mels(self, firsts: Sequence[int], z_etc: np.ndarray) -> np.ndarray:
    """Returns the log-mels [e, m, n] of a clip from its latents.

    They are decoded window by window: the decoder sees the length it knows, and its memory does
    not grow with the clip.
    """
    params = self.weights.take("vae")
    self._announce("the VAE's decoder")
    pieces_enm = [
      np.swapaxes(self._decode(params, z_etc[:, first : first + self.frames]), 1, 2)
      for first in firsts
    ]
    return np.swapaxes(cross_fade([2 * first for first in firsts], pieces_enm), 1, 2)

  @functools.cached_property
  def _vocode(self) -> Callable[..., jax.Array]:
    assert self.vocoder is not None
    return jax.jit(codec.exactly(vocoder.build(self.vocoder).waveform))

  def synthesize(self, log_mel_mn: np.ndarray, past_p: np.ndarray) -> np.ndarray:
    """Returns the vocoder's waveform [p] of a log-mel, as `phase.binaural` asks for it."""
    del past_p  # A network's phase depends on its mel alone.
    params = self.weights.take("vocoder")
    self._announce("the vocoder", log_mel_mn.shape)
    return np.asarray(self._vocode(params, jnp.asarray(log_mel_mn)[None])[0])

  def clip(
    self, windows: Sequence[Window], z_etc: np.ndarray, seconds: float, phase: phases.Phase
  ) -> Clip:
    """Turns the windows and the latents of one file into sound of `seconds`."""
    return self.sound(windows, self.mels([w.first for w in windows], z_etc), seconds, phase)

  def sound(
    self, windows: Sequence[Window], mel_emn: np.ndarray, seconds: float, phase: phases.Phase
  ) -> Clip:
    """Turns the log-mels of one file into sound of `seconds`."""
    firsts = [w.first for w in windows]
    rate = self.audio.latent_rate
    count = 2 * math.ceil(seconds * rate)
    short = max(0, count - mel_emn.shape[-1])  # At most the slack of `firsts`.
    mel_emn = np.pad(mel_emn[..., :count], ((0, 0), (0, 0), (0, short)), mode="edge")

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
    synthesize = None if self.vocoder is None else self.synthesize
    if self.ears == 1:
      audio_ep = np.stack([phases.mono(mel_emn[0], self.audio, synthesize)] * 2)
    else:
      audio_ep = phases.binaural(mel_emn, self.audio, azimuth_n, phase, synthesize)
    samples = round(seconds * self.audio.sample_rate)
    audio_ep = np.pad(audio_ep, ((0, 0), (0, max(0, samples - audio_ep.shape[1]))))[:, :samples]
    return Clip(audio_ep.astype(np.float32), shown["spatial_vk"], shown["heat_vyx"])


def _silent(line: str) -> None:
  del line
