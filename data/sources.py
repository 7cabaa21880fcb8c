"""Records from which binaural pairs are mixed: mono sound, pictures, and the place of what sounds.

Of a clip are kept its mono sound at 16 kHz, its pictures at 8 frames per second as JPEG, and where
in each picture the one thing is that moves; pictures in which several things move, or none, or
while nothing sounds, are not used as the middle of a pair. A clip without a usable one is left out.

Axes: e channel, p audio sample, n picture, r frame at 25 fps, y row, x column, c colour, i byte.
"""

import dataclasses
import io as bytes_io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from data import filters, media, shards
from spatialv2a_jax import io, localizers, schema

RATE = schema.PAIR_RATE
FPS = schema.CLIP_FPS
WIDEST = 0.4  # Share of the picture: what moves at two places farther apart is not one thing.
SILENT = 10 ** (-50 / 20)  # RMS of the half second around a picture.
QUALITIES = (90, 75, 60, 45, 30, 15)
COMPRESSION = 10  # Raw bytes of a picture to one byte of its room in the record.


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a record depends on.

  Attributes:
    seconds: length; longer clips are cut, shorter ones left out.
    rows: of the pictures.
    columns: of the pictures.
    localizer: as for `localizers.heat`; "motion".
  """

  seconds: float
  rows: int
  columns: int
  localizer: str = "motion"


@dataclasses.dataclass(frozen=True)
class Record:
  """Item of `media.files` -> what is kept of it; pickled to worker processes.

  Fields are "mono" int16 [p], "jpeg" uint8 [i] padded with zeros, "ends" int32 [n] of each picture
  in it, and "column" float32 [n], 0 left to 1 right, -1 for a picture of no use.
  """

  settings: Settings

  def __call__(self, item: shards.Item) -> Mapping[str, np.ndarray | str]:
    """Makes the record; BadClipError says why a clip is of no use."""
    s, (audio_ep, video, _) = self.settings, item.payload.read(RATE)
    samples = round(s.seconds * RATE)
    if audio_ep.shape[1] < samples:
      raise shards.BadClipError(f"sound has {audio_ep.shape[1]} samples, fewer than {samples}")
    found = filters.measure(audio_ep[:, :samples], RATE)
    if not found["finite"]:
      raise shards.BadClipError("its sound holds NaN or infinite samples")
    mono_p = filters.mono(audio_ep[:, :samples], found["layout"])
    views = {
      "small": io.View(schema.SYNC_FPS, size=localizers.FRAME_SIZE),
      "frames": io.View(FPS, size=(s.rows, s.columns)),
    }
    seen = io.read_views(video, views, duration=s.seconds)
    count, wanted = len(seen["frames"]), schema.whole_frames(s.seconds, FPS)
    if count < wanted:
      raise shards.BadClipError(f"video has {count} frames at {FPS} fps, not {wanted}")
    motion_ryx = localizers.residual_motion(seen["small"].astype(np.float32) / 255)
    column_n = places(localizers.heat(s.localizer, motion_ryx, wanted))
    column_n = np.where(levels(mono_p, wanted) > SILENT, column_n, -1.0)
    if column_n.max() < 0:
      raise shards.BadClipError("there is no picture in which one thing moves while it sounds")
    jpeg_i, end_n = pack(seen["frames"][:wanted])
    return {
      "mono": np.clip(np.rint(mono_p * 32768), -32768, 32767).astype(np.int16),
      "jpeg": jpeg_i,
      "ends": end_n,
      "column": column_n.astype(np.float32),
    }


def places(heat_nyx: np.ndarray) -> np.ndarray:
  """Returns the column of the middle of what is hot, -1 where nothing or too much is."""
  first_n, end_n, seen_n = localizers.box(heat_nyx)
  width = heat_nyx.shape[2]
  good_n = seen_n & (end_n - first_n <= WIDEST * width)
  return np.where(good_n, (first_n + end_n) / (2 * width), -1.0)


def levels(mono_p: np.ndarray, count: int) -> np.ndarray:
  """Returns the RMS of the half second around each picture."""
  total = np.concatenate([[0.0], np.cumsum(np.square(mono_p, dtype=np.float64))])
  middle_n = (np.arange(count) + 0.5) / FPS * RATE
  first_n, end_n = (
    np.clip(middle_n + side * RATE / 4, 0, len(mono_p)).astype(int) for side in (-1, 1)
  )
  return np.sqrt((total[end_n] - total[first_n]) / np.maximum(end_n - first_n, 1))


def pack(frames_nyxc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the pictures as JPEG, one after the other in uint8 [i], and where each ends.

  All clips of one size get equally many bytes: the quality is the best at which they fit.

  Raises:
    BadClipError: they do not fit.
  """
  room = frames_nyxc.size // COMPRESSION + 2048 * len(frames_nyxc)
  for quality in QUALITIES:
    parts = []
    for frame_yxc in frames_nyxc:
      file = bytes_io.BytesIO()
      Image.fromarray(frame_yxc).save(file, "JPEG", quality=quality)
      parts.append(file.getvalue())
    joined = b"".join(parts)
    if len(joined) <= room:
      jpeg_i = np.frombuffer(joined.ljust(room, b"\0"), np.uint8)
      return jpeg_i, np.cumsum([len(part) for part in parts]).astype(np.int32)
  raise shards.BadClipError("the pictures do not fit into their room")


def unpack(jpeg_i: np.ndarray, end_n: np.ndarray, place: int) -> np.ndarray:
  """Returns one picture, uint8 [y, x, 3]."""
  start = int(end_n[place - 1]) if place else 0
  with Image.open(bytes_io.BytesIO(jpeg_i[start : int(end_n[place])].tobytes())) as image:
    return np.asarray(image.convert("RGB"))


def build(
  folder: str | pathlib.Path, out: str | pathlib.Path, settings: Settings, **options: Any
) -> dict[str, Any]:
  """Makes the shards of a folder of videos; any share of them may be left out.

  Args:
    folder: of the videos, as for `media.files`.
    out: folder of the shards.
    settings: on which records depend.
    **options: `shards`, `jobs`, `part`, `progress` of `shards.build`.

  Returns:
    The statistics of `shards.build`.

  Raises:
    UserError: no videos in the folder, no clip of any use, and as `shards.build`.
  """
  config = {"stage": "sources", **dataclasses.asdict(settings)}
  return shards.build(
    media.files(folder), Record(settings), out, config=config, max_bad=1.0, **options
  )
