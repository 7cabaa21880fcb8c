"""Paths, atomic outputs, and what a media file says about itself."""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import pathlib
import re
import secrets
from collections.abc import Collection, Iterator
from fractions import Fraction

import av
import av.error
import av.logging
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

from spatialv2a_jax.errors import DISK_TROUBLE as DISK_TROUBLE
from spatialv2a_jax.errors import UnreachableError, UserError

av.logging.set_level(None)  # libav would print its own lines between ours.

VIDEO_EXTENSIONS = frozenset(
  {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp"}
)
AUDIO_EXTENSIONS = frozenset({".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac", ".opus", ".aiff"})

REORDER = 4  # Frames held back to put a badly ordered stream in order of presentation.
_KEPT = 60  # Letters of a name in that of its temporary file; of 4 bytes each, 240 of 255.


@dataclasses.dataclass(frozen=True)
class MediaInfo:
  """What a media file holds.

  Attributes:
    duration_s: seconds of the video stream, or of the sound where there is no video.
    fps: average frames per second, None without video.
    frames: stated number of frames, None where the container does not say. Files with an edit
      list may state more than can be shown.
    width, height: pixels as shown, that is with the rotation applied; None without video.
    rotation: degrees counter-clockwise by which a player turns the stored picture.
    has_audio: whether there is a sound stream.
    audio_channels, audio_rate: channels and samples per second, None without sound.
  """

  duration_s: float
  fps: float | None
  frames: int | None
  width: int | None
  height: int | None
  rotation: int
  has_audio: bool
  audio_channels: int | None
  audio_rate: int | None

  @property
  def has_video(self) -> bool:
    """Whether there is a video stream."""
    return self.fps is not None


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary file beside `path`; it takes the name `path` only if the block succeeds.

  The temporary name is hidden and keeps the suffix, so that encoders that choose by suffix work.
  Missing folders are made. After an error nothing is left behind and an older `path` is untouched.

  Args:
    path: where the file shall appear.

  Yields:
    The (existing, empty) temporary file to write.

  Raises:
    UserError: the folder cannot be written, or the disk is full.
  """
  target = pathlib.Path(path)
  temporary = target.with_name(f".{target.stem[:_KEPT]}.{secrets.token_hex(4)}{target.suffix}")
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
  except OSError as error:
    raise UserError(f"cannot write {target}: {error.strerror}; choose another output") from error
  try:
    yield temporary
    os.replace(temporary, target)
  except OSError as error:
    if error.errno in DISK_TROUBLE:
      raise UserError(f"cannot write {target}: {error.strerror}") from error
    if isinstance(error, FileNotFoundError) and error.filename == str(temporary):
      raise UserError(f"cannot write {target}: another process is at work on it, too") from error
    raise
  finally:
    temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike) -> None:
  """Removes what `atomic_path(path)` leaves where its process is killed; nobody may be writing."""
  path = pathlib.Path(path)
  name = re.compile(re.escape(f".{path.stem[:_KEPT]}.") + "[0-9a-f]{8}" + re.escape(path.suffix))
  if path.parent.is_dir():
    for entry in os.scandir(path.parent):
      if name.fullmatch(entry.name):
        pathlib.Path(entry.path).unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike) -> None:
  """Makes a folder if need be; UserError when files cannot be written there."""
  folder = pathlib.Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe_file = folder / f".write.{secrets.token_hex(4)}"
    probe_file.touch()
    probe_file.unlink()
  except OSError as error:
    raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None


def file_hash(path: str | os.PathLike) -> str:
  """SHA-256 of a file's bytes in hexadecimal; UserError when it cannot be read."""
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from None


def list_media(
  path: str | os.PathLike, extensions: Collection[str] = VIDEO_EXTENSIONS
) -> list[pathlib.Path]:
  """The media files that `path` stands for: itself if a file, else its direct entries by name.

  Args:
    path: a file (taken whatever its suffix) or a folder (hidden files are passed over).
    extensions: lower-case suffixes with their dot that count inside a folder.

  Raises:
    UserError: no such path, or a folder without such files.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise UserError(f"no such file or folder: {path}")
  if not path.is_dir():
    return [path]
  try:
    entries = [entry for entry in path.iterdir() if entry.suffix.lower() in extensions]
    found = sorted(e for e in entries if e.is_file() and not e.name.startswith("."))
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from None
  if not found:
    wanted = " ".join(sorted(extensions))
    raise UserError(f"folder {path} holds no media files (looked for {wanted})")
  return found


def named_in_text(path: pathlib.Path) -> pathlib.Path:
  """Returns `path`; UserError if its name is not UTF-8, which no record or list can hold."""
  try:
    str(path).encode()
  except UnicodeEncodeError:
    raise UserError(f"the name of {ascii(str(path))} is not UTF-8; rename the file") from None
  return path


def check_readable(path: str | os.PathLike) -> pathlib.Path:
  """`path` if it is a file with bytes in it, else a UserError; UnreachableError if it is gone."""
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
  except (FileNotFoundError, NotADirectoryError):
    raise UnreachableError(f"no such file: {path}") from None
  except OSError as error:
    raise _unreadable(path, error) from None
  if path.is_dir():
    raise UserError(f"{path} is a folder, a media file is needed")
  if not size:
    raise UserError(f"{path} is empty (0 bytes)")
  return path


def check_whole(path: str | os.PathLike) -> None:
  """Raises UnreachableError unless a file can be read to its end, which tells damage from faults.

  libav calls both an input/output error.
  """
  try:
    with open(path, "rb") as file:
      while file.read(1 << 20):
        pass
  except OSError as error:
    raise _unreadable(path, error) from None


def _unreadable(path: str | os.PathLike, error: OSError) -> UserError:
  """Returns what is wrong; permissions are the file's own, the rest is the system's."""
  kind = UserError if error.errno in (errno.EACCES, errno.EPERM) else UnreachableError
  return kind(f"cannot read {path}: {error.strerror}")


@contextlib.contextmanager
def open_media(path: str | os.PathLike) -> Iterator[InputContainer]:
  """Opens a container for reading; UserError for what libav cannot understand, and for pictures.

  If libav fails within the block, and it is the disk that cannot read the file, that is raised.
  """
  path = check_readable(path)
  try:
    try:
      container = av.open(str(path))
    except (av.error.FFmpegError, OSError, ValueError) as error:
      reason = getattr(error, "strerror", None) or error
      raise UserError(f"{path} is not a media file or is damaged ({reason})") from None
    with container:
      if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        raise UserError(f"{path} is a single picture; give a video")
      yield container
  except UserError as error:
    if isinstance(error.__context__, av.error.FFmpegError | OSError):
      check_whole(path)
    raise


def video_stream(container: InputContainer, path: str | os.PathLike) -> av.VideoStream:
  """The first real video stream (cover pictures do not count); UserError without one."""
  for stream in _films(container):
    return stream
  raise UserError(f"{path} has no video stream")


def _films(container: InputContainer) -> list[av.VideoStream]:
  return [x for x in container.streams.video if not x.disposition & Disposition.attached_pic]


def first_shown(path: str | os.PathLike) -> Fraction:
  """Returns the time of the first frame shown, by the file's own clock; 0 without any.

  A copy that was cut between two whole pictures begins with some that nobody can decode.
  """
  with open_media(path) as container:
    if not _films(container):
      return Fraction(0)
    stream = video_stream(container, path)
    base = stream.time_base or Fraction(1, av.time_base)
    head = next(container.demux(stream), None)
    if head is not None and head.is_keyframe and head.pts == stream.start_time:
      return (head.pts or 0) * base
  with open_media(path) as container, contextlib.suppress(av.error.FFmpegError):
    frames = itertools.islice(container.decode(video_stream(container, path)), REORDER + 1)
    return min((frame.pts * base for frame in frames if frame.pts is not None), default=Fraction(0))
  return Fraction(0)


def display_turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
  """How a player shows the stored picture: (transpose, then mirror x, then mirror y).

  Read from the display matrix, so mirrored recordings count too: they swap left and right.
  """
  data = frame.side_data.get("DISPLAYMATRIX")
  if data is None:
    return False, False, False
  a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(int)
  if abs(a) + abs(d) >= abs(b) + abs(c):
    return False, bool(a < 0), bool(d < 0)
  return True, bool(c < 0), bool(b < 0)


def stated_seconds(container: InputContainer, stream: av.VideoStream) -> Fraction | None:
  """Duration that the file states for `stream`, None if it says nothing that can be trusted."""
  if stream.duration and stream.time_base:
    return stream.duration * stream.time_base
  if container.duration and len(container.streams) == 1:
    return Fraction(container.duration, av.time_base)
  return None


def _shown_seconds(path: str | os.PathLike) -> Fraction:
  """Length of a video stream that states none: the file may hold longer sound.

  Matroska has it as a tag of the stream. Without, as in recordings that were streamed, the packets
  tell it.
  """
  start, end, untimed = None, Fraction(0), Fraction(0)
  with open_media(path) as container, contextlib.suppress(av.error.FFmpegError, IndexError):
    stream = video_stream(container, path)
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
      begin = (stream.start_time or 0) * (stream.time_base or Fraction(0))
      return int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3]) - begin
    step = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
    for packet in container.demux(stream):
      if packet.pts is None or packet.time_base is None:
        untimed += step if packet.size else 0
        continue
      time = packet.pts * packet.time_base
      start = time if start is None else min(start, time)
      end = max(end, time + (packet.duration * packet.time_base if packet.duration else step))
  # What comes after damage is not counted: reading it will say so.
  return untimed if start is None else end - start


def probe(path: str | os.PathLike) -> MediaInfo:
  """Reads what a media file holds, decoding one frame to see that it can be decoded.

  Of a video that does not say how long it lasts, all packets are read.

  Raises:
    UserError: missing, empty, damaged, or neither video nor sound inside.
  """
  with open_media(path) as container:
    sound = container.streams.audio[0] if container.streams.audio else None
    has_video = bool(_films(container))
    if not has_video and sound is None:
      raise UserError(f"{path} holds neither video nor sound")
    duration = Fraction(container.duration or 0, av.time_base)
    fps = frames = width = height = None
    rotation = 0
    if has_video:
      stream = video_stream(container, path)
      try:
        frame = next(container.decode(stream))
      except (av.error.FFmpegError, StopIteration):
        raise UserError(f"{path} is damaged: no video frame can be decoded") from None
      transpose, _, _ = display_turn(frame)
      width, height = (frame.height, frame.width) if transpose else (frame.width, frame.height)
      rotation = int(frame.rotation)
      fps = float(stream.average_rate or stream.guessed_rate or 0)
      frames = stream.frames or None
      duration = stated_seconds(container, stream) or _shown_seconds(path)
      late = (frame.pts or 0) - (stream.start_time or 0)  # Some of the first cannot be shown.
      duration -= max(late, 0) * (stream.time_base or Fraction(0))
    elif sound is not None and sound.duration and sound.time_base:
      duration = sound.duration * sound.time_base
    return MediaInfo(
      duration_s=float(duration),
      fps=fps,
      frames=frames,
      width=width,
      height=height,
      rotation=rotation,
      has_audio=sound is not None,
      audio_channels=sound.codec_context.channels if sound else None,
      audio_rate=sound.codec_context.sample_rate if sound else None,
    )
