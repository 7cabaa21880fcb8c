"""Encoders behind one interface: stages that turn views of a video into features.

`mmaudio` is CLIP ViT-H/14 and Synchformer, sampled and resized as MMAudio does it; `random` is the
encoder without weights (`features`). Where something sounds is told by the picture's motion, by
the user's track, or by `acl`: CLIPSeg under ACL's calibration, prompted with the text, with the
picture as a whole where there is no text, or with a sound (`acl:FILE`), which BEATs hears.

Each stage needs one network, so that no other one need be in memory. A clip's features are the
same to the bit, alone or among others, on one device or on several (`groups`).

Axes: v frame at 8 fps, n frame at 25 fps, g segment, z frame of a segment, y row, x column,
c colour, s synchronisation token, w text token, o sound, k descriptor, f feature.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spatialv2a_jax import features, groups, io, localizers, schema, sound_prompt, tokenizer
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.feature_cache import Cache
from spatialv2a_jax.models import clip, localizer, spatial, synchformer
from spatialv2a_jax.sound_prompt import SoundPrompt
from spatialv2a_jax.weights import Weights

Frames = Mapping[str, np.ndarray]
Encoded = dict[str, np.ndarray]


class Stage(NamedTuple):
  """One step of encoding.

  Attributes:
    network: whose weights it needs; "" for none, and then nothing is kept in the cache.
    views: the frames that it needs, by name.
    identity: JSON values that determine its result beside frames and weights.
    encode: (frames by view, seconds, time of the first frame) -> features by name.
    together: the same for the frames of several clips, where that saves something.
  """

  network: str
  views: Mapping[str, io.View]
  identity: Mapping[str, Any]
  encode: Callable[[Frames, float, float], Encoded]
  together: Callable[[Sequence[Frames]], list[Encoded]] | None = None


class Encoders:
  """The encoders of one model: stages for its videos, features of its texts."""

  def __init__(
    self,
    config: features.Config,
    weights: Weights,
    *,
    cache: Cache | None = None,
    devices: Sequence[Any] | None = None,
    report: Callable[[str], None] = lambda line: None,
  ):
    """Builds the networks; their weights stay where they are until a stage runs.

    Args:
      config: which encoder and localizer.
      weights: where their networks are.
      cache: where features are kept; None keeps none.
      devices: that share the work; by default all accelerators of this process, or one CPU.
      report: takes lines about long work.

    Raises:
      MissingAssetError: a network that `config` names is nowhere.
      UserError: an unknown encoder or localizer, a bad track, or weights of other sizes.
    """
    self.config, self.weights, self.cache, self.report = config, weights, cache, report
    if config.encoder not in ("random", "mmaudio"):
      raise UserError(f"unknown encoder {config.encoder!r}, have: mmaudio, random")
    self.networks: list[str] = []
    if config.encoder == "mmaudio":
      self.networks += ["clip", "synchformer"]
      self._clip = weights.sizes("clip", clip.Config)
      self._sync = weights.sizes("synchformer", synchformer.Config)
      weights.check("clip", clip.build(self._clip).init)
      weights.check("synchformer", synchformer.build(self._sync).init)
      have = self._clip.dim, self._sync.width, self._clip.text_width, self._clip.text_len
      want = config.clip_dim, config.sync_dim, config.text_dim, config.text_len
      if have != want:
        raise UserError(
          f"CLIP and Synchformer of {weights.model('clip').folder} give features of {have}, the "
          f"flow network takes {want} (frames, synchronisation, text, tokens of a text)"
        )
    self._kind, _, sound = config.localizer.partition(":")
    self._sound: SoundPrompt | None = None
    if self._kind == "acl":
      self.networks += ["clipseg"] + ["acl"] * ("acl" in weights)
      self._acl = weights.sizes("clipseg", localizer.Config)
      weights.check("clipseg", localizer.build(self._acl).init)
      if sound:
        self._sound = SoundPrompt(sound, weights, self._acl)
        self.networks += [name for name in sound_prompt.NETWORKS if name not in self.networks]
    else:
      localizers.track_of(config.localizer)
    self._mesh = groups.mesh_of(devices)
    self._whole = groups.whole(self._mesh)
    self._texts: dict[str, np.ndarray] = {}
    self._compiled: set[str] = set()

  def stages(self, prompt: str = "") -> list[Stage]:
    """Returns the stages of a video; each can run by itself, later results replace earlier ones."""
    stages = []
    if self.config.encoder == "mmaudio":
      square = self._sync.size
      look = {"clip": io.View(schema.CLIP_FPS, clip.frame_size(self._clip))}
      sync = {"sync": io.View(schema.SYNC_FPS, short_side=square, crop=square)}
      for network, views, sizes, together in (
        ("clip", look, self._clip, self._look),
        ("synchformer", sync, self._sync, self._follow),
      ):
        one = functools.partial(_alone, together)
        stages.append(Stage(network, views, dataclasses.asdict(sizes), one, together))
    if self.config.encoder == "random" or self._kind != "acl":
      stages.append(Stage("", features.views(), {}, self._plain))
    if self._kind == "acl":
      side = self._acl.grid * self._acl.patch
      texts = [localizer.PROMPT.format("")] if self._sound else localizer.prompts(prompt)
      ids_bw = self._ids(texts, "clipseg")
      about = dataclasses.asdict(self._acl) | {"shift": self._shift, "ids": ids_bw.tolist()}
      about["mirror_tta"] = self.config.mirror_tta
      about["sound"] = self._sound.identity() if self._sound else None
      views = {"place": io.View(schema.CLIP_FPS, (side, side))}
      place = functools.partial(self._place, ids_bw)
      stages.append(Stage("clipseg", views, about, place))
    return stages

  def read(
    self,
    source: str | pathlib.Path | io.Frames,
    stages: Sequence[Stage],
    seconds: float,
    *,
    start: float = 0.0,
    available: float | None = None,
    sha256: str | None = None,
  ) -> Encoded:
    """Decodes a stretch of a video once and runs stages on it, but for those the cache has.

    Args:
      source: the video.
      stages: from `stages`.
      seconds: length of the stretch; the last frame fills up what the video lacks.
      start: where it begins.
      available: seconds of it that may be looked at; None is `seconds`.
      sha256: of the video; without it the cache is passed over.

    Raises:
      UserError: the video cannot be read, or weights are damaged.
    """
    left = seconds if available is None else min(seconds, available)
    stretch = {"input": sha256, "start": start, "seconds": seconds, "available": left}
    kept = [None if sha256 is None else self._recall(stage, stretch) for stage in stages]
    todo = [stage for stage, found in zip(stages, kept, strict=True) if found is None]
    views = {name: view for stage in todo for name, view in stage.views.items()}
    frames: dict[str, np.ndarray] = {}
    if isinstance(source, io.Frames):
      frames = source.views(views, start, left)
    elif views:
      frames = io.read_views(source, views, start=start, duration=left)
    for name, view in views.items():
      count = max(1, schema.whole_frames(seconds, int(view.fps)))
      held = frames[name][:count]
      frames[name] = np.concatenate([held, np.repeat(held[-1:], count - len(held), axis=0)])
    encoded: Encoded = {}
    for stage, found in zip(stages, kept, strict=True):
      if found is None:
        found = stage.encode(frames, seconds, start)
        if self.cache is not None and sha256 is not None and stage.network:
          self.cache.put(self._key(stage, stretch), found)
      encoded |= found
    return encoded

  def encode(
    self, clips: Sequence[tuple[Sequence[Stage], Frames]], seconds: float
  ) -> list[Encoded]:
    """Runs stages on clips whose frames are there; devices work on several clips at once.

    Args:
      clips: of each the stages, in the same order, and the frames that they need.
      seconds: length of each.
    """
    encoded: list[Encoded] = [{} for _ in clips]
    for steps in zip(*(stages for stages, _ in clips), strict=True):
      frames_b = [frames for _, frames in clips]
      if steps[0].together is not None:
        found = steps[0].together(frames_b)
      else:
        pairs = zip(steps, frames_b, strict=True)
        found = [step.encode(frames, seconds, 0.0) for step, frames in pairs]
      for one, features_of in zip(encoded, found, strict=True):
        one |= features_of
    return encoded

  def check_text(self, words: str) -> None:
    """MissingAssetError, or UserError, where a text cannot be encoded; encodes nothing."""
    if self.config.encoder != "random" and words:
      self._ids([words], "clip")

  def text(self, words: str) -> np.ndarray:
    """Returns the features of a text, float32 [w, f]."""
    if self.config.encoder == "random":
      return features.encode_text(words, self.config)
    if words not in self._texts:
      ids_bw = self._ids([words], "clip")
      stage = Stage("clip", {}, {"ids": ids_bw.tolist(), **dataclasses.asdict(self._clip)}, _none)
      found = self._recall(stage, {})
      if found is None:
        params = self.weights.take("clip", "text", self._whole)
        self._announce("CLIP's text tower")
        found = {"text_wf": np.asarray(read_text(self._clip)(params, ids_bw)[0])}
        if self.cache is not None:
          self.cache.put(self._key(stage, {}), found)
      self._texts[words] = found["text_wf"]
    return self._texts[words]

  def _recall(self, stage: Stage, stretch: Mapping[str, Any]) -> Encoded | None:
    if self.cache is None or not stage.network:
      return None
    return self.cache.get(self._key(stage, stretch))

  def _key(self, stage: Stage, stretch: Mapping[str, Any]) -> dict[str, Any]:
    views = {name: dataclasses.asdict(view) for name, view in stage.views.items()}
    return {
      **stretch, "network": stage.network, "weights": self.weights.sha256(stage.network),
      "views": views, "identity": stage.identity,
    }  # fmt: skip

  def _announce(self, what: str) -> None:
    if what not in self._compiled:
      self._compiled.add(what)
      self.report(f"compiling {what}")

  def _run(
    self, what: str, read: Callable[..., Any], params: Any, x_b: Sequence[np.ndarray], *rest: Any
  ) -> list[Any]:
    """Returns read(params, rows, *rest) for the rows of each clip."""
    self._announce(what)
    tell = lambda line: self.report(f"{what}: {line}")  # noqa: E731
    return groups.run(read, params, x_b, rest, mesh=self._mesh, report=tell)

  # --- stages -----------------------------------------------------------------------------------

  def _plain(self, frames: Frames, seconds: float, start: float) -> Encoded:
    """What needs no weights: the random encoder, and where motion or a track says it sounds."""
    config, frames_nyxc = self.config, frames["frames"]
    # Of the random encoder, `acl` replaces the places.
    kind = "motion" if self._kind == "acl" else config.localizer
    if config.encoder == "random":
      config = dataclasses.replace(config, localizer=kind)
      encoded = features.encode(frames_nyxc, seconds, config, start=start)
    else:
      encoded = features.place(frames_nyxc, seconds, kind, start=start)
    encoded["heat_vyx"] = localizers.thumbnail(encoded["heat_vyx"])
    return encoded

  def _look(self, frames_b: Sequence[Frames]) -> list[Encoded]:
    params = self.weights.take("clip", "image", self._whole)
    x_bvyxc = [frames["clip"] for frames in frames_b]
    y_bvf = self._run("CLIP's image tower", read_image(self._clip), params, x_bvyxc)
    return [{"clip_vf": y_vf} for y_vf in y_bvf]

  def _follow(self, frames_b: Sequence[Frames]) -> list[Encoded]:
    params = self.weights.take("synchformer", placement=self._whole)
    x_bgzyxc = [frames["sync"][synchformer.segments(len(frames["sync"]))] for frames in frames_b]
    y_bgsf = self._run("Synchformer", read_motion(self._sync), params, x_bgzyxc)
    return [{"sync_sf": y_gsf.reshape(-1, y_gsf.shape[-1])} for y_gsf in y_bgsf]

  def _place(self, ids_bw: np.ndarray, frames: Frames, seconds: float, start: float) -> Encoded:
    del seconds, start
    what, x_vyxc = "CLIPSeg", frames["place"]
    # Before CLIPSeg is there, for there may be room for one network alone.
    word_bd = self._sound.word(self._whole) if self._sound else None
    params = self.weights.take("clipseg", placement=self._whole)
    image, text, sound, place = read_place(self._acl, self.config.mirror_tta)
    if word_bd is not None:
      e_bf = np.asarray(sound(params, word_bd, ids_bw[0, : ids_bw[0].argmax() + 1]))
    elif len(ids_bw):
      e_bf = np.asarray(text(params, ids_bw))
    else:
      (e_bf,) = self._run(f"{what}'s picture embedding", image, params, [x_vyxc])
    e_of = e_bf.mean(axis=0, keepdims=True)
    ((d_vk, heat_vyx),) = self._run(what, place, params, [x_vyxc], e_of, self._shift)
    return {"spatial_vk": d_vk, "heat_vyx": heat_vyx}

  @functools.cached_property
  def _shift(self) -> float:
    """ACL's learned shift if its weights are there, else that at the start of its training."""
    if "acl" not in self.weights:
      return localizer.SHIFT
    model = self.weights.model("acl")
    model.verify("acl")
    mask = model.params["acl"]["mask"]
    return float(mask["bias"]) / float(mask["slope"])

  def _ids(self, texts: Sequence[str], network: str) -> np.ndarray:
    """Returns the ids of texts, with the merges that lie beside the network if any do."""
    if not texts:
      return np.zeros((0, tokenizer.LENGTH), np.int32)
    beside = self.weights.model(network).folder / tokenizer.FILE
    return _tokenizer(beside if beside.is_file() else None)(texts)


# Programs are kept by the sizes of their networks: another localizer compiles nothing anew.


@functools.cache
def read_image(config: clip.Config) -> Callable[..., jax.Array]:
  """Returns (CLIP's image parameters, frames_vyxc) -> clip_vf."""
  net = clip.build(config)
  return jax.jit(lambda params, x_vyxc: clip.normalize(net.image({"image": params}, x_vyxc)))


@functools.cache
def read_text(config: clip.Config) -> Callable[..., jax.Array]:
  """Returns (CLIP's text parameters, ids_bw) -> states of all tokens [b, w, f]."""
  net = clip.build(config)
  return jax.jit(lambda params, ids_bw: clip.normalize(net.text({"text": params}, ids_bw)[0]))


@functools.cache
def read_motion(config: synchformer.Config) -> Callable[..., jax.Array]:
  """Returns (parameters, segments_gzyxc) -> tokens of each segment [g, s, f]."""
  return jax.jit(synchformer.build(config).encode)


@functools.cache
def read_place(
  config: localizer.Config, mirror_tta: bool = False
) -> tuple[Callable[..., Any], ...]:
  """Returns CLIPSeg's embeddings of images, texts, sounds; what finds an embedding in frames."""
  net = localizer.build(config)
  heat_of = localizer.mirror_tta(net.heat) if mirror_tta else net.heat

  def place(params, x_vyxc, e_of, shift):
    heat_vyx = heat_of(params, x_vyxc, e_of, shift)
    return spatial.descriptors(heat_vyx[None])[0][0], localizers.thumbnail(heat_vyx)

  return jax.jit(net.image), jax.jit(net.text), jax.jit(net.sound), jax.jit(place)


@functools.cache
def _tokenizer(merges: pathlib.Path | None) -> tokenizer.Tokenizer:
  return tokenizer.Tokenizer(merges)


def _alone(
  together: Callable[[Sequence[Frames]], list[Encoded]], frames: Frames, *_: float
) -> Encoded:
  return together([frames])[0]


def _none(frames: Frames, seconds: float, start: float) -> Encoded:
  raise AssertionError("a text has no frames")
