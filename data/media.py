"""What there is to encode: videos in a folder, or the sound of a finished build with its videos.

Axes: e ear (0 left, 1 right), p audio sample.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from data import layout, shards, tf_example, tfrecord
from spatialv2a_jax import io, schema
from spatialv2a_jax.errors import UserError

# What a build says of a clip besides its sound; in numbers NaN is unknown.
COMMON = (
  "label", "video", "layout", "spatializer", "hrtf", "source_channels", "correlation", "agreement",
  "silence", "gain_db", "aes", "cues", "schema_version",
)  # fmt: skip


class Clip(NamedTuple):
  """What is read of a clip: its sound, where the video is, and what else is known of it."""

  audio_ep: np.ndarray
  video: pathlib.Path
  about: Mapping[str, np.ndarray | str]


@dataclasses.dataclass(frozen=True)
class File:
  """A video; `<id>.wav` beside it replaces its sound, `<id>.json` may hold a "caption"."""

  video: pathlib.Path

  @property
  def caption(self) -> str:
    """From the JSON beside the video, empty without one; ValueError if that is damaged."""
    truth = self.video.with_suffix(".json")
    caption = (json.loads(truth.read_text()).get("caption") or "") if truth.exists() else ""
    if not isinstance(caption, str):
      raise ValueError(f"{truth.name}: the caption is no text")
    return caption

  def read(self, sample_rate: int) -> Clip:
    """Reads the clip, of which nothing more is known."""
    sound = self.video.with_suffix(".wav")
    audio_ep = io.read_audio(sound if sound.exists() else self.video, sample_rate)
    return Clip(audio_ep, self.video, {})


@dataclasses.dataclass(frozen=True)
class Record:
  """A record of the raw shards of a build, which name the video below a folder."""

  shard: str
  place: int
  caption: str
  videos: pathlib.Path

  def read(self, sample_rate: int) -> Clip:
    """Reads the clip, whose sound is stored at that rate."""
    fields = _fields(str(pathlib.Path(self.shard).parent))
    raw = tf_example.decode(tfrecord.TFRecordSource([self.shard])[self.place])
    audio_ep = np.asarray(tf_example.value_of(raw["audio"], fields["audio"]))
    about = {name: tf_example.value_of(raw[name], fields[name]) for name in COMMON if name in raw}
    return Clip(schema.as_float32(audio_ep), self.videos / str(about["video"]), about)


_fields = functools.lru_cache(maxsize=8)(layout.read_features)


def files(folder: str | pathlib.Path) -> list[shards.Item]:
  """Returns the videos of a folder; stamps are sizes and times of a clip's files.

  Raises:
    UserError: no videos in the folder, or the name of one is no text.
  """
  items = []
  for path in map(io.named_in_text, io.list_media(folder)):
    beside = [path, path.with_suffix(".wav"), path.with_suffix(".json")]
    stats = [file.stat() for file in beside if file.exists()]
    stamp = str([(s.st_size, s.st_mtime_ns) for s in stats])
    items.append(shards.Item(path.stem, File(path), stamp))
  return items


def records(
  raw: str | pathlib.Path, videos: str | pathlib.Path, sample_rate: int
) -> list[shards.Item]:
  """Returns the records of all splits of a build's raw shards.

  Args:
    raw: folder of the shards, `BUILD/raw`.
    videos: folder from which the build was made.
    sample_rate: that the sound is to have, Hz.

  Raises:
    UserError: the build is not finished or has another rate, or no such folder of videos.
  """
  folder = pathlib.Path(raw)
  if not pathlib.Path(videos).is_dir():
    raise UserError(f"--videos {videos}: no such folder")
  items = []
  for split, names in shards.splits(folder).items():
    for name in names:
      info = json.loads(shards.sidecar(folder / name).read_text())
      for place, (clip_id, caption) in enumerate(zip(info["ids"], info["captions"], strict=True)):
        record = Record(str(folder / name), place, caption, pathlib.Path(videos))
        items.append(shards.Item(clip_id, record, info["sha256"], split))
  stored = json.loads((folder / "manifest.json").read_text())["config"].get("audio")
  if stored not in schema.AUDIO or schema.AUDIO[stored].sample_rate != sample_rate:
    raise UserError(f"{folder} holds sound for {stored} models, the config wants {sample_rate} Hz")
  return items


def captions(items: Iterable[shards.Item]) -> Iterator[str]:
  """Yields the captions that can be read; the others belong to bad clips."""
  for item in items:
    try:
      yield item.payload.caption
    except (OSError, ValueError, AttributeError):
      continue
