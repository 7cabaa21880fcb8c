"""What `python -m launch.data encode` does: media files to shards that a config can train on.

Axes: e ear (0 left, 1 right), n frame at 25 fps, y image row, x image column, c channel,
p audio sample, t latent frame.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data import encode as stage
from data import filters, media, shards
from launch import sources
from spatialv2a_jax import codec, features, io, model_folder, schema
from spatialv2a_jax.encoders import Encoders, Stage
from spatialv2a_jax.errors import MissingAssetError, UserError, first_line
from spatialv2a_jax.models.spatial import MIRROR_SIGNS
from spatialv2a_jax.weights import Weights

Looked = tuple[Sequence[Stage], Mapping[str, np.ndarray]]


def run(args: argparse.Namespace) -> int:
  """Encodes features and sound to `OUT/clips` and, given a VAE, latents to `OUT/latents`.

  Raises:
    UserError: a bad config or folder, or too many bad clips.
    MissingAssetError: no such VAE.
  """
  config, encoders = read_config(args.config)
  audio, seconds = schema.AUDIO[config["audio"]], float(config["seconds"])
  samples = schema.lengths(seconds, audio).samples
  if args.raw:
    items = media.records(args.raw, args.videos, audio.sample_rate)
    counts = {split: len(names) for split, names in shards.splits(args.raw).items()}
  else:
    items, counts = media.files(args.media), args.shards
  trained = open_encoders(encoders, args.parts)  # Refused before hours of encoding, like the VAE.
  weights = {name: trained.weights.sha256(name) for name in trained.networks}
  net = Latents.load(args.vae, audio) if args.vae else None
  jobs = 1 if weights else args.jobs  # XLA uses all cores and devices by itself.
  options = {"jobs": jobs, "max_bad": args.max_bad, "progress": report, "part": args.slice}
  stats = stage.encode_features(
    items,
    args.out / "clips",
    Features(seconds, encoders, args.mirror, args.parts),
    samples=samples,
    sample_rate=audio.sample_rate,
    shard_count=counts,
    least_samples=math.floor(seconds * audio.sample_rate),
    config={
      "seconds": seconds,
      "features": encoders.identity(),
      "mirror": args.mirror,
      **({"weights": weights} if weights else {}),
    },
    storage=args.storage,
    batch=args.batch if weights else 1,  # Nothing is gained together without networks.
    **options,
  )
  sources.tell(args.out / "clips", stats)
  if net is not None and stats["complete"]:
    # One process: XLA uses all cores by itself.
    stats = stage.encode_latents(
      args.out / "clips",
      args.out / "latents",
      net,
      config={"audio": audio.name, "vae": net.sha256, "features": encoders.identity()},
      batch=args.batch,
      **{**options, "jobs": 1},
    )
    sources.tell(args.out / "latents", stats)
  return 0


def read_config(path: str) -> tuple[dict[str, Any], features.Config]:
  """Returns the config of `FILE.py[:VARIANT]` and its encoders; UserError if it has none."""
  file, _, variant = path.partition(":")
  if not pathlib.Path(file).is_file():
    raise UserError(f"--config {file}: no such file")
  try:
    config = runpy.run_path(file)["get_config"](*([variant] if variant else [])).to_dict()
    if "features" not in config:
      raise UserError("it has no features; give the config of a flow model")
    return config, features.Config(**config["features"])
  except UserError as error:
    raise UserError(f"--config {path}: {error}") from error
  except Exception as error:  # Whatever the file does.
    raise UserError(f"--config {path}: {type(error).__name__}: {first_line(error)}") from error


def check(path: str, parts: pathlib.Path | None, vae: pathlib.Path | None) -> None:
  """Opens the networks that `run` would, and raises what it would, before hours of other work."""
  config, encoders = read_config(path)
  open_encoders(encoders, parts)
  if vae:
    Latents.load(vae, schema.AUDIO[config["audio"]])


def report(done: int, total: int, bad: int) -> None:
  """Prints one line per shard."""
  print(f"shard {done}/{total}, {bad} bad clips", flush=True)


@functools.cache  # One per process: workers get the arguments, not the networks.
def open_encoders(config: features.Config, parts: pathlib.Path | None) -> Encoders:
  """Returns the encoders of a config, on all devices of this process.

  Raises:
    MissingAssetError: `parts` lacks one of their networks.
  """
  if config.encoder == "mmaudio" and parts is None:
    raise MissingAssetError(
      "this config takes trained encoders: give --parts DIR, a model folder that "
      "`spatialv2a convert clip` and its like have filled"
    )
  models = [] if parts is None else [model_folder.open_model(parts)]
  return Encoders(config, Weights(models), devices=jax.local_devices())


@dataclasses.dataclass(frozen=True)
class Features:
  """The frozen encoders of a config; pickled to worker processes.

  Attributes:
    seconds: length of a clip.
    config: which encoders.
    mirror: also encode the mirrored picture.
    parts: model folder of trained encoders.
  """

  seconds: float
  config: features.Config
  mirror: bool
  parts: pathlib.Path | None = None

  def read(self, video: pathlib.Path, caption: str) -> Looked:
    """Returns the stages and their frames; BadClipError if the video is too short.

    As in `filters.Limits`, trimmed videos may end a little early: their last frame is then held.
    """
    stages = open_encoders(self.config, self.parts).stages(caption)
    views = {name: view for stage in stages for name, view in stage.views.items()}
    frames = io.read_views(video, views, duration=self.seconds)
    for name, view in views.items():
      count = schema.whole_frames(self.seconds, int(view.fps))
      lacking = count - len(frames[name])
      if lacking > math.ceil(filters.Limits.tolerance_s * view.fps):
        raise shards.BadClipError(
          f"video has {len(frames[name])} frames at {view.fps} fps, not {count}"
        )
      held = np.repeat(frames[name][-1:], max(lacking, 0), axis=0)
      frames[name] = np.concatenate([frames[name][:count], held])
    return stages, frames

  def encode(self, clips: Sequence[Looked]) -> list[dict[str, np.ndarray]]:
    """Encodes clips together and, for `mirror`, their mirrored pictures with them."""
    flipped = [
      (stages, {name: x[:, :, ::-1] for name, x in frames.items()})
      for stages, frames in (clips if self.mirror else ())
    ]
    encoded = open_encoders(self.config, self.parts).encode([*clips, *flipped], self.seconds)
    plain, mirrored = encoded[: len(clips)], encoded[len(clips) :]
    for one, other in zip(plain, mirrored, strict=False):
      one["clip_mirror_vf"] = other["clip_vf"]
      one["sync_mirror_sf"] = other["sync_sf"]
      one["spatial_mirror_vk"] = other["spatial_vk"]
      if self.config.localizer.startswith("track:"):  # It does not look at the picture.
        one["spatial_mirror_vk"] = one["spatial_vk"] * MIRROR_SIGNS
    return plain

  def text(self, caption: str) -> np.ndarray:
    """Returns `text_wf`."""
    return open_encoders(self.config, self.parts).text(caption)


class Latents:
  """`audio_bep` -> mean and standard deviation of the VAE's posterior, `mean_betc`, `std_betc`.

  A batch is spread over the devices of this process.
  """

  def __init__(self, net: codec.Codec, params: Any, sha256: str):
    self.sha256 = sha256
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
    self._rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self._params = jax.device_put(params, whole)
    self._encode = jax.jit(net.encode)
    self.devices = mesh.size

  @classmethod
  def load(cls, folder: pathlib.Path, audio: schema.AudioSpec) -> "Latents":
    """Loads the VAE of a model folder, which must be one for `audio`."""
    model = model_folder.load_model(folder)
    if "vae" not in model.params or model.config.get("audio") != audio.name:
      raise UserError(f"--vae {folder}: it holds no VAE for {audio.name} sound")
    return cls(codec.build(model.config["vae"], audio), model.params["vae"], model.sha256["vae"])

  def __call__(self, audio_bep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encodes both ears of some clips; a batch that divides unevenly ends in copies."""
    rows = len(audio_bep)
    audio_bep = np.concatenate([audio_bep, audio_bep[-1:].repeat(-rows % self.devices, axis=0)])
    mean_betc, std_betc = self._encode(self._params, jax.device_put(audio_bep, self._rows))
    return np.asarray(mean_betc)[:rows], np.asarray(std_betc)[:rows]
