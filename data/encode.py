"""Media files to shards that a model trains on; each step restarts where it stopped.

`encode_features` reads media and runs the frozen encoders, `encode_latents` replaces the sound by
the latents of both ears.

Axes: e ear (0 left, 1 right), p audio sample, v 8 fps frame, s sync token, w text token, f feature,
k descriptor, t latent frame, c latent channel.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data import shards, tfrecord
from spatialv2a_jax import io

ENCODED = {
  "clip_vf": "clip",
  "sync_sf": "sync",
  "text_wf": "text",
  "spatial_vk": "spatial",
  "clip_mirror_vf": "clip_mirror",
  "sync_mirror_sf": "sync_mirror",
}
WIDE = ("clip", "sync", "text", "clip_mirror", "sync_mirror")  # Worth storing in 16 bits.


def encode_features(
  media: str | pathlib.Path,
  out: str | pathlib.Path,
  encode: Callable[[pathlib.Path, str], Mapping[str, np.ndarray]],
  *,
  samples: int,
  sample_rate: int,
  shard_count: int,
  config: Mapping[str, Any],
  least_samples: int | None = None,
  storage: str = "float16",
  audio: str = "int16",
  **options: Any,
) -> dict[str, Any]:
  """Stage one: media files to records with both ears' sound and the frozen encoders' features.

  Args:
    media: folder of videos; `<id>.wav` beside a video replaces its sound, `<id>.json` may hold a
      "caption".
    out: folder of the shards.
    encode: (video, caption) -> `clip_vf`, `sync_sf`, `text_wf`, `spatial_vk` and, for mirroring,
      `clip_mirror_vf` and `sync_mirror_sf` of the mirrored video. Other names are left out.
    samples: length of the sound; longer sound is cut.
    sample_rate: of the stored sound, Hz.
    shard_count: their number.
    config: what `encode` depends on: encoder settings, hashes of weights, seconds.
    least_samples: shorter sound makes a bad clip, sound between the two ends in zeros: whole latent
      frames may take more samples than the clip has seconds. None: `samples`.
    storage: dtype of clip, sync and text features: "float32", "float16" or "bfloat16".
    audio: dtype of the sound: "float32", or "int16", which clips at -1 and 1.
    **options: `jobs`, `part`, `max_bad`, `progress` of `build`.

  Returns:
    The statistics of `build`.

  Raises:
    UserError: no videos in the folder, and as `build`.
  """
  least = samples if least_samples is None else least_samples
  return shards.build(
    media_items(media),
    _FeatureRecord(encode, samples, least, sample_rate, storage, audio),
    out,
    shards=shard_count,
    config={
      **config,
      "stage": "features",
      "samples": samples,
      "least_samples": least,
      "sample_rate": sample_rate,
      "storage": storage,
      "audio": audio,
    },
    **options,
  )


def encode_latents(
  clips: str | pathlib.Path,
  out: str | pathlib.Path,
  codec: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
  *,
  config: Mapping[str, Any],
  **options: Any,
) -> dict[str, Any]:
  """Stage two: records with sound to records with the VAE posterior of both ears.

  Args:
    clips: folder that `encode_features` has finished.
    out: folder of the shards, as many as in `clips`.
    codec: `audio_ep` float32 [2, p] -> `mean_etc`, `std_etc`, stored as float32: a mean in 16 bits
      would be heard.
    config: what `codec` depends on: the hash of its weights.
    **options: `jobs`, `part`, `max_bad`, `progress` of `build`.

  Returns:
    The statistics of `build`.

  Raises:
    UserError: stage one is not finished, and as `build`.
  """
  paths = shards.paths(clips)
  items = [
    shards.Item(name, (str(path), place), info["sha256"])
    for path in paths
    for info in [json.loads(shards.sidecar(path).read_text())]
    for place, name in enumerate(info["ids"])
  ]
  return shards.build(
    items,
    _LatentRecord(codec, shards.read_features(clips)),
    out,
    shards=len(paths),
    config={**config, "stage": "latents"},
    **options,
  )


def media_items(folder: str | pathlib.Path) -> list[shards.Item]:
  """Returns the videos of a folder; stamps are sizes and times of a clip's files."""
  items = []
  for path in io.list_media(folder):
    files = [path, path.with_suffix(".wav"), path.with_suffix(".json")]
    stats = [file.stat() for file in files if file.exists()]
    items.append(shards.Item(path.stem, path, str([(s.st_size, s.st_mtime_ns) for s in stats])))
  return items


@dataclasses.dataclass(frozen=True)
class _FeatureRecord:
  encode: Callable[[pathlib.Path, str], Mapping[str, np.ndarray]]
  samples: int
  least: int
  sample_rate: int
  storage: str
  audio: str

  def __call__(self, item: shards.Item) -> shards.Record:
    video, truth = item.payload, item.payload.with_suffix(".json")
    sound = video.with_suffix(".wav")
    caption = (json.loads(truth.read_text()).get("caption") or "") if truth.exists() else ""
    audio_ep = io.read_audio(sound if sound.exists() else video, self.sample_rate)
    if len(audio_ep) != 2:
      raise shards.BadClipError(f"sound has {len(audio_ep)} channels, not 2")
    if audio_ep.shape[1] < self.least:
      raise shards.BadClipError(f"sound has {audio_ep.shape[1]} samples, fewer than {self.least}")
    audio_ep = np.pad(audio_ep, ((0, 0), (0, max(0, self.samples - audio_ep.shape[1]))))
    record: dict[str, np.ndarray | str] = {
      "caption": caption,
      "audio": _stored_audio(audio_ep[:, : self.samples], self.audio),
    }
    for name, value in self.encode(video, caption).items():
      if name in ENCODED:
        field = ENCODED[name]
        record[field] = value.astype(self.storage if field in WIDE else np.float32)
    return record


@dataclasses.dataclass(frozen=True)
class _LatentRecord:
  codec: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  layout: Mapping[str, tfrecord.Tensor]

  def __call__(self, item: shards.Item) -> shards.Record:
    path, place = item.payload
    raw = tfrecord.decode_example(tfrecord.TFRecordSource([path])[place])
    record = {name: tfrecord.value_of(raw[name], self.layout[name]) for name in raw}
    if record.pop("id") != item.id:
      raise shards.BadClipError(f"{path}: record {place} is another clip")
    audio_ep = record.pop("audio")
    mean_etc, std_etc = self.codec(tfrecord.as_float32(np.asarray(audio_ep)))
    return {
      **record,
      "mean": np.asarray(mean_etc, np.float32),
      "std": np.asarray(std_etc, np.float32),
    }


def _stored_audio(audio_ep: np.ndarray, dtype: str) -> np.ndarray:
  if dtype == "int16":
    return np.clip(np.round(audio_ep * 32768), -32768, 32767).astype(np.int16)
  return audio_ep.astype(dtype)
