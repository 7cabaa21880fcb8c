"""What `python -m launch.data encode` does: media files to shards that a config can train on.

Axes: e ear (0 left, 1 right), n frame at 25 fps, y image row, x image column, c channel,
p audio sample, t latent frame.
"""

import argparse
import dataclasses
import math
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data import encode as stage
from data import media, shards
from spatialv2a_jax import checkpoint, codec, features, io, schema
from spatialv2a_jax.errors import UserError


def run(args: argparse.Namespace) -> int:
  """Encodes features and sound to `OUT/clips` and, given a VAE, latents to `OUT/latents`.

  Raises:
    UserError: a bad config or folder, or too many bad clips.
    MissingAssetError: no such VAE.
  """
  config = read_config(args.config)
  audio, seconds = schema.AUDIO[config["audio"]], float(config["seconds"])
  encoders = features.Config(**config["features"])
  samples = schema.lengths(seconds, audio).samples
  if args.raw:
    items = media.records(args.raw, args.videos, audio.sample_rate)
    counts = {split: len(names) for split, names in shards.splits(args.raw).items()}
  else:
    items, counts = media.files(args.media), args.shards
  net = Latents.load(args.vae, audio) if args.vae else None  # Refused before hours of encoding.
  options = {"jobs": args.jobs, "max_bad": args.max_bad, "progress": report}
  stats = stage.encode_features(
    items,
    args.out / "clips",
    Features(seconds, encoders, args.mirror),
    samples=samples,
    sample_rate=audio.sample_rate,
    shard_count=counts,
    least_samples=math.floor(seconds * audio.sample_rate),
    config={
      "seconds": seconds,
      "features": dataclasses.asdict(encoders),
      "mirror": args.mirror,
    },
    storage=args.storage,
    **options,
  )
  print(f"{args.out / 'clips'}: {stats['clips_out']} of {stats['clips_in']} clips")
  if net is not None:
    # One process: XLA uses all cores by itself.
    stats = stage.encode_latents(
      args.out / "clips",
      args.out / "latents",
      net,
      config={"audio": audio.name, "vae": net.sha256},
      max_bad=args.max_bad,
      progress=report,
    )
    print(f"{args.out / 'latents'}: {stats['clips_out']} of {stats['clips_in']} clips")
  return 0


def read_config(path: str) -> dict[str, Any]:
  """Returns the config of `FILE.py` or `FILE.py:VARIANT`; UserError if it is none for features."""
  file, _, variant = path.partition(":")
  if not pathlib.Path(file).is_file():
    raise UserError(f"--config {file}: no such file")
  try:
    config = runpy.run_path(file)["get_config"](*([variant] if variant else [])).to_dict()
  except (KeyError, ValueError) as error:
    raise UserError(f"--config {path}: {error}") from error
  if "features" not in config:
    raise UserError(f"--config {path}: it has no features; give the config of a flow model")
  return config


def report(done: int, total: int, bad: int) -> None:
  """Prints one line per shard."""
  print(f"shard {done}/{total}, {bad} bad clips", flush=True)


@dataclasses.dataclass(frozen=True)
class Features:
  """The frozen encoders of a config; pickled to worker processes.

  Attributes:
    seconds: length of a clip.
    config: which encoders.
    mirror: also encode the mirrored picture.
  """

  seconds: float
  config: features.Config
  mirror: bool

  def read(self, video: pathlib.Path) -> np.ndarray:
    """Returns `frames_nyxc`; BadClipError if the video is shorter than `seconds`."""
    count = schema.whole_frames(self.seconds, schema.SYNC_FPS)
    frames_nyxc = io.read_views(video, features.views(), duration=self.seconds)["frames"][:count]
    if len(frames_nyxc) < count:
      raise shards.BadClipError(f"video has {len(frames_nyxc)} frames at 25 fps, not {count}")
    return frames_nyxc

  def encode(self, clips: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Encodes clips and, for `mirror`, their mirrored pictures."""
    encoded = [self._encode(frames_nyxc) for frames_nyxc in clips]
    if self.mirror:
      for one, frames_nyxc in zip(encoded, clips, strict=True):
        mirrored = self._encode(frames_nyxc[:, :, ::-1])
        one["clip_mirror_vf"] = mirrored["clip_vf"]
        one["sync_mirror_sf"] = mirrored["sync_sf"]
        one["spatial_mirror_vk"] = mirrored["spatial_vk"]
    return encoded

  def text(self, caption: str) -> np.ndarray:
    """Returns `text_wf`."""
    return features.encode_text(caption, self.config)

  def _encode(self, frames_nyxc: np.ndarray) -> dict[str, np.ndarray]:
    return features.encode(frames_nyxc, self.seconds, self.config)


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
    model = checkpoint.load_model(folder)
    if "vae" not in model.params or model.config.get("audio") != audio.name:
      raise UserError(f"--vae {folder}: it holds no VAE for {audio.name} sound")
    return cls(codec.build(model.config["vae"], audio), model.params["vae"], model.sha256["vae"])

  def __call__(self, audio_bep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encodes both ears of some clips; a batch that divides unevenly ends in copies."""
    rows = len(audio_bep)
    audio_bep = np.concatenate([audio_bep, audio_bep[-1:].repeat(-rows % self.devices, axis=0)])
    mean_betc, std_betc = self._encode(self._params, jax.device_put(audio_bep, self._rows))
    return np.asarray(mean_betc)[:rows], np.asarray(std_betc)[:rows]
