"""Media files to shards that a model trains on; each step restarts where it stopped.

`encode_features` reads media and runs the frozen encoders, `encode_latents` replaces the sound by
the latents of both ears. Clips are encoded in batches, while threads read those that follow. Text
is encoded once per distinct caption (`data.captions`).

Axes: b clip, e ear (0 left, 1 right), p audio sample, v 8 fps frame, s sync token, w text token,
f feature, k descriptor, t latent frame, c latent channel.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data import captions, layout, media, shards, tf_example, tfrecord
from spatialv2a_jax import errors, schema

ENCODED = {
  "clip_vf": "clip",
  "sync_sf": "sync",
  "spatial_vk": "spatial",
  "clip_mirror_vf": "clip_mirror",
  "sync_mirror_sf": "sync_mirror",
  "spatial_mirror_vk": "spatial_mirror",
}
WIDE = ("clip", "sync", "clip_mirror", "sync_mirror")  # Worth storing in 16 or 8 bits.


class Encoder(Protocol):
  """The frozen encoders. Picklable, if several processes are to encode."""

  def read(self, video: pathlib.Path, caption: str) -> Any:
    """Decodes what the encoders look at, and for what; called in threads."""
    ...

  def encode(self, clips: Sequence[Any]) -> Sequence[Mapping[str, np.ndarray]]:
    """Returns of each clip `clip_vf`, `sync_sf`, `spatial_vk` and, for mirroring, those of the
    mirrored video: `clip_mirror_vf`, `sync_mirror_sf`, `spatial_mirror_vk`. Other names are left
    out.
    """
    ...

  def text(self, caption: str) -> np.ndarray:
    """Returns `text_wf`."""
    ...


def encode_features(
  items: Sequence[shards.Item],
  out: str | pathlib.Path,
  encoder: Encoder,
  *,
  samples: int,
  sample_rate: int,
  shard_count: int | Mapping[str, int],
  config: Mapping[str, Any],
  least_samples: int | None = None,
  storage: str = "bfloat16",
  audio: str = "int16",
  batch: int = 1,
  part: tuple[int, int] = (0, 1),
  **options: Any,
) -> dict[str, Any]:
  """Step one: media files to records with both ears' sound and the frozen encoders' features.

  Args:
    items: of `media.files` or `media.records`.
    out: folder of the shards; the text features go to `text/` in it.
    encoder: what to encode with.
    samples: length of the sound; longer sound is cut.
    sample_rate: of the stored sound, Hz.
    shard_count: their number, in each split if there are several.
    config: what `encoder` depends on: settings, hashes of weights, seconds.
    least_samples: shorter sound makes a bad clip, sound between the two ends in zeros: whole latent
      frames may take more samples than the clip has seconds. None: `samples`.
    storage: of clip, sync and text features: one of `schema.STORAGES`.
    audio: dtype of the sound: "float32", or "int16", which clips at -1 and 1.
    batch: clips that are encoded together.
    part: as of `shards.build`.
    **options: `jobs`, `max_bad`, `progress` of `shards.build`.

  Returns:
    The statistics of `shards.build`.

  Raises:
    UserError: as `shards.build`.
  """
  least = samples if least_samples is None else least_samples
  texts = [captions.NONE, *media.captions(items)]
  captions.build(texts, encoder.text, out, config=config, storage=storage, part=part)
  return shards.build(
    items,
    _Features(encoder, samples, least, sample_rate, storage, audio, batch),
    out,
    batched=True,
    shards=shard_count,
    part=part,
    unknown=media.COMMON,
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
  batch: int = 1,
  **options: Any,
) -> dict[str, Any]:
  """Step two: records with sound to records with the VAE posterior of both ears.

  Args:
    clips: folder that `encode_features` has finished.
    out: folder of the shards, as many as in `clips`.
    codec: `audio_bep` float32 [b, 2, p] -> `mean_betc`, `std_betc`. The mean is stored as float32,
      since it would be heard in 16 bits, the deviation as bfloat16.
    config: what `codec` depends on: the hash of its weights.
    batch: clips that are encoded together.
    **options: `jobs`, `part`, `max_bad`, `progress` of `shards.build`.

  Returns:
    The statistics of `shards.build`.

  Raises:
    UserError: step one is not finished, and as `shards.build`.
  """
  splits = shards.splits(clips)
  items = [
    shards.Item(name, (str(path), place), info["sha256"], split)
    for split in splits
    for path in shards.paths(clips, split)
    for info in [json.loads(shards.sidecar(path).read_text())]
    for place, name in enumerate(info["ids"])
  ]
  captions.copy(clips, out)
  return shards.build(
    items,
    _Latents(codec, layout.read_features(clips), batch),
    out,
    batched=True,
    shards={split: len(names) for split, names in splits.items()},
    unknown=media.COMMON,
    config={**config, "stage": "latents"},
    **options,
  )


def in_batches(
  items: Sequence[shards.Item],
  read: Callable[[shards.Item], Any],
  encode: Callable[[Sequence[Any]], Sequence[Any]],
  batch: int,
) -> Iterator[Any | Exception]:
  """Reads items in threads and encodes them together; yields a result or exception for each.

  Args:
    items: what to read, in order.
    read: what is read of an item.
    encode: from up to `batch` things read to as many results. If it fails for their sake, they are
      encoded one by one, so that a bad clip costs no good one.
    batch: how many.
  """

  def attempt(function, argument):
    try:
      return function(argument)
    except Exception as error:  # Stands in the place of the clip.
      errors.raise_of_machine(error)
      return error

  done = (future.result() for future in ahead(lambda item: attempt(read, item), items, batch))
  while group := list(itertools.islice(done, batch)):
    good = [value for value in group if not isinstance(value, Exception)]
    results = attempt(encode, good) if good else []
    if isinstance(results, Exception):
      alone = [attempt(encode, [value]) for value in good]
      results = [one if isinstance(one, Exception) else one[0] for one in alone]
    encoded = iter(results)
    for value in group:
      yield value if isinstance(value, Exception) else next(encoded)


@dataclasses.dataclass(frozen=True)
class _Features:
  encoder: Encoder
  samples: int
  least: int
  sample_rate: int
  storage: str
  audio: str
  batch: int

  def __call__(self, items: Sequence[shards.Item]) -> Iterable[shards.Record | Exception]:
    return in_batches(items, self._read, self._encode, self.batch)

  def _read(self, item: shards.Item) -> tuple[dict[str, np.ndarray | str], Any]:
    audio_ep, video, about = item.payload.read(self.sample_rate)
    if len(audio_ep) != 2:
      raise shards.BadClipError(f"sound has {len(audio_ep)} channels, not 2")
    if audio_ep.shape[1] < self.least:
      raise shards.BadClipError(f"sound has {audio_ep.shape[1]} samples, fewer than {self.least}")
    if not np.isfinite(audio_ep).all():
      raise shards.BadClipError("its sound holds NaN or infinite samples")
    audio_ep = np.pad(audio_ep, ((0, 0), (0, max(0, self.samples - audio_ep.shape[1]))))
    fields: dict[str, np.ndarray | str] = {
      **about,
      "caption": item.payload.caption,
      "audio": _stored_audio(audio_ep[:, : self.samples], self.audio),
    }
    return fields, self.encoder.read(video, item.payload.caption)

  def _encode(self, clips: Sequence[tuple[dict[str, np.ndarray | str], Any]]) -> list[Any]:
    encoded = self.encoder.encode([seen for _, seen in clips])
    return [
      {**fields, **self._stored(features)}
      for (fields, _), features in zip(clips, encoded, strict=True)
    ]

  def _stored(self, features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    fields = {ENCODED[name]: value for name, value in features.items() if name in ENCODED}
    return {
      field: schema.stored(value, self.storage if field in WIDE else "float32")
      for field, value in fields.items()
    }


@dataclasses.dataclass(frozen=True)
class _Latents:
  codec: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  fields: Mapping[str, tf_example.Tensor]
  batch: int

  def __call__(self, items: Sequence[shards.Item]) -> Iterable[shards.Record | Exception]:
    return in_batches(items, self._read, self._encode, self.batch)

  def _read(self, item: shards.Item) -> dict[str, np.ndarray | str]:
    path, place = item.payload
    raw = tf_example.decode(tfrecord.TFRecordSource([path])[place])
    record = {name: tf_example.value_of(raw[name], self.fields[name]) for name in raw}
    if record.pop("id") != item.id:
      raise shards.BadClipError(f"{path}: record {place} is another clip")
    return record

  def _encode(self, records: Sequence[dict[str, Any]]) -> list[Any]:
    audio_bep = np.stack([schema.as_float32(record["audio"]) for record in records])
    mean_betc, std_betc = self.codec(audio_bep)
    return [
      {
        **{name: value for name, value in record.items() if name != "audio"},
        "mean": np.asarray(mean_etc, np.float32),
        "std": np.asarray(std_etc).astype("bfloat16"),
      }
      for record, mean_etc, std_etc in zip(records, mean_betc, std_betc, strict=True)
    ]


def ahead(
  function: Callable[[Any], Any], items: Iterable[Any], count: int
) -> Iterator[concurrent.futures.Future]:
  """Yields the future of a function of each item, up to `count` items in advance."""
  with concurrent.futures.ThreadPoolExecutor(min(count, 8)) as pool:
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > count:
        yield waiting.popleft()
    while waiting:
      yield waiting.popleft()


def _stored_audio(audio_ep: np.ndarray, dtype: str) -> np.ndarray:
  if dtype == "int16":
    return np.clip(np.round(audio_ep * 32768), -32768, 32767).astype(np.int16)
  return audio_ep.astype(dtype)
