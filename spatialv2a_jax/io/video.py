"""Video frames by presentation time, at several rates and sizes in one decoding pass.

Time zero is the first frame shown. Frame k of a view at f frames per second is the first frame
whose time is at or after start + k/f, in exact rational arithmetic; a target after the last frame
but before the end of its display takes the last frame. A view of [start, end) therefore has
ceil((end - start) f) frames whatever the rate of the file: 8 s at 25 frames per second are 200
frames from a file at 23.976, 24, 29.97 or 30.

Axes: v frame, y row, x column; pixels are RGB uint8 [v, y, x, 3].
"""

import contextlib
import dataclasses
import heapq
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.io.files import (
  REORDER,
  display_turn,
  open_media,
  stated_seconds,
  video_stream,
)

_SEEK_MARGIN_S = 2


@dataclasses.dataclass(frozen=True)
class View:
  """One way to look at a video.

  Attributes:
    fps: frames per second to sample.
    size: (height, width) to squash to, aspect ratio not kept.
    short_side: pixels of the shorter side after resizing with the aspect ratio kept; the longer
      side is truncated to whole pixels. Not together with `size`.
    crop: side of the square cut from the centre after `short_side`.
    quick: with `size`, let libav shrink while it converts the colours: some ten times faster than
      the resampling that networks are trained on, and a few grey levels away from it.
  """

  fps: float | Fraction
  size: tuple[int, int] | None = None
  short_side: int | None = None
  crop: int | None = None
  quick: bool = False

  def __post_init__(self):
    if self.quick and not self.size:
      raise ValueError("a quick view needs a size")
    if self.size and (self.short_side or self.crop):
      raise ValueError("a view has either size or short_side and crop")
    if self.crop and (not self.short_side or self.crop > self.short_side):
      raise ValueError("crop needs a short_side of at least its own size")


@dataclasses.dataclass(frozen=True)
class Window:
  """A stretch of a video.

  Attributes:
    start_s: start in seconds from the start that was asked for.
    frames: view name -> uint8 [v, y, x, 3].
    last: whether the video ends here.
  """

  start_s: float
  frames: dict[str, np.ndarray]
  last: bool


def rational(value: float | Fraction) -> Fraction:
  """The simple fraction meant by a number such as 7.68 or 29.97002997."""
  return value if isinstance(value, Fraction) else Fraction(value).limit_denominator(1_000_000)


class Picture:
  """Makes pictures of decoded frames as they are shown: uint8 [y, x, 3], turned and mirrored.

  One for all frames of a stream: the tables of a conversion take longer than a small frame.
  """

  def __init__(self, size: tuple[int, int] | None = None, threads: int = 0):
    """Makes a converter.

    Args:
      size: (height, width) to shrink to on the way; None keeps the frame's.
      threads: that convert; 0 takes as many as there are cores. The pixels are the same.
    """
    self._size, self._threads = size, threads
    self._convert = VideoReformatter().reformat

  def __call__(self, frame: av.VideoFrame) -> np.ndarray:
    """Returns one picture."""
    turn, size = display_turn(frame), (None, None)
    if self._size:
      size = self._size if turn[0] else self._size[::-1]
    how = Interpolation.BICUBIC if self._size else Interpolation.BILINEAR
    stored = self._convert(
      frame, *size, format="rgb24", interpolation=how, threads=self._threads
    )  # fmt: skip
    return _turned(stored.to_ndarray(), turn)


def _turned(pixels: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
  transpose, mirror_x, mirror_y = turn
  if transpose:
    pixels = pixels.swapaxes(0, 1)
  if mirror_x:
    pixels = pixels[:, ::-1]
  if mirror_y:
    pixels = pixels[::-1]
  return np.ascontiguousarray(pixels)


def fit(pixels: np.ndarray, view: View) -> np.ndarray:
  """Resizes and crops one frame [y, x, 3] as a view has it."""
  height, width = pixels.shape[:2]
  if view.size:
    target = view.size
  elif view.short_side:
    side = view.short_side
    target = (
      (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    )
  else:
    return pixels
  if target != (height, width):
    image = Image.fromarray(pixels)
    pixels = np.asarray(image.resize((target[1], target[0]), Image.Resampling.BICUBIC))
  if view.crop:
    top, left = (round((side - view.crop) / 2) for side in target)
    pixels = pixels[top : top + view.crop, left : left + view.crop]
  return pixels


def _from(
  container: InputContainer, stream: av.VideoStream, path: str | os.PathLike, start: Fraction
) -> Iterator[av.VideoFrame]:
  """Decodes frames from some time at or before `start` (of the file's own clock) on.

  Streams without an index (MPEG-TS) put a seek into the middle of pictures that build on each
  other: decoding then begins at the next whole one, which may be after `start`.
  """
  base = stream.time_base or Fraction(1, av.time_base)
  for margin in (_SEEK_MARGIN_S, 8 * _SEEK_MARGIN_S):
    frames, head = iter(()), []
    with contextlib.suppress(av.error.FFmpegError):
      container.seek(int((start - margin) / base), stream=stream)
      frames = container.decode(stream)
      head = list(itertools.islice(frames, REORDER + 1))
    if any(frame.pts is not None and frame.pts * base <= start for frame in head):
      yield from head
      yield from frames
      return
  with open_media(path) as again:  # From the beginning, to which not every format seeks.
    whole = video_stream(again, path)
    whole.thread_type, whole.codec_context.thread_count = stream.thread_type, stream.thread_count
    yield from again.decode(whole)


def timed_frames(
  container: InputContainer, stream: av.VideoStream, path: str | os.PathLike, start: Fraction
) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
  """Decodes (time, duration, frame) in order of presentation, times relative to the first frame.

  Args:
    container: the open file.
    stream: its video stream.
    path: the file; named in errors.
    start: frames well before this time may be left out.

  Raises:
    UserError: damaged data, or an end far before the stated one.
  """
  base = stream.time_base or Fraction(1, av.time_base)
  step = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
  stated = stated_seconds(container, stream)
  origin: Fraction | None = None
  end, count = Fraction(0), 0
  waiting: list[tuple[Fraction, int, Fraction, av.VideoFrame]] = []
  seeking = start > 2 * _SEEK_MARGIN_S

  def trouble(what: str) -> UserError:
    total = f" of {float(stated):.2f} s" if stated else ""
    return UserError(
      f"{path} is damaged: {what}; only {float(end):.2f} s{total} could be decoded; "
      "repair or replace it"
    )

  try:
    if seeking:
      first = next(container.decode(stream))
      origin = (first.pts or 0) * base
      decoded = _from(container, stream, path, origin + start)
    else:
      decoded = container.decode(stream)
    for frame in decoded:
      time = frame.pts * base if frame.pts is not None else (origin or 0) + end
      length = frame.duration * base if frame.duration else step
      heapq.heappush(waiting, (time, count, length, frame))
      count += 1
      end = max(end, time + length - (waiting[0][0] if origin is None else origin))
      if len(waiting) > REORDER:
        time, _, length, frame = heapq.heappop(waiting)
        origin = time if origin is None else origin
        yield time - origin, length, frame
  except StopIteration:
    raise trouble("no video frame can be decoded") from None
  except av.error.FFmpegError as error:
    raise trouble(f"{error.strerror or error}") from None
  while waiting:
    time, _, length, frame = heapq.heappop(waiting)
    origin = time if origin is None else origin
    end = time + length - origin
    yield time - origin, length, frame
  if stated and end < stated * Fraction(9, 10) - Fraction(1, 2):
    raise trouble("the video stops early")
  if not count and not seeking:
    raise trouble("it has no video frames")


class _Sampler:
  """Collects one view; `lo` is the index of the first frame still held."""

  def __init__(self, view: View, start: Fraction, whole: Picture, threads: int):
    self.view, self.start, self.fps = view, start, rational(view.fps)
    self.lo, self.held = 0, []
    self.whole = whole
    self.small = Picture(view.size, threads) if view.quick else None

  @property
  def next_index(self) -> int:
    return self.lo + len(self.held)

  def offer(self, time: Fraction, frame: av.VideoFrame, limit: int | None, pixels: dict) -> None:
    """Takes `frame` for every target that it is the first to reach."""
    fitted = None
    while (limit is None or self.next_index < limit) and (
      time >= self.start + self.next_index / self.fps
    ):
      if fitted is None and self.small is not None:
        fitted = self.small(frame)
      elif fitted is None:
        if "rgb" not in pixels:
          pixels["rgb"] = self.whole(frame)
        fitted = fit(pixels["rgb"], self.view)
      self.held.append(fitted)

  def index(self, seconds: Fraction) -> int:
    """Number of targets before `seconds`."""
    return math.ceil(seconds * self.fps)

  def take(self, lo: int, hi: int) -> np.ndarray:
    return np.stack(self.held[lo - self.lo : hi - self.lo])

  def forget(self, before: int) -> None:
    del self.held[: max(0, before - self.lo)]
    self.lo = max(self.lo, before)


def iter_views(
  path: str | os.PathLike,
  views: Mapping[str, View],
  window_s: float | Fraction | None = None,
  overlap_s: float | Fraction = 0,
  start: float | Fraction = 0,
  duration: float | Fraction | None = None,
  threads: int = 0,
) -> Iterator[Window]:
  """Decodes a video once and yields it window by window, holding no more than one window.

  Window i covers [i h, i h + window_s) with h = window_s - overlap_s, counted from `start`; all
  but the last have the same number of frames if h and window_s are whole numbers of frames. The
  last one is cut where the video (or `duration`) ends and always holds more than the overlap.

  Args:
    path: a file with a video stream.
    views: name -> View.
    window_s: seconds per window; None for one window with everything.
    overlap_s: seconds that neighbouring windows share.
    start: seconds into the video.
    duration: seconds to read at most; None to read to the end.
    threads: that decode and convert; 0 takes as many as there are cores, 1 leaves those to other
      processes.

  Raises:
    UserError: unreadable or damaged file, no video stream, or nothing after `start`.
  """
  start, overlap = rational(start), rational(overlap_s)
  window = None if window_s is None else rational(window_s)
  limit_s = None if duration is None else rational(duration)
  if window is not None and not 0 <= overlap < window:
    raise ValueError(f"overlap {overlap_s} must be in [0, {window_s})")
  whole = Picture(threads=threads)
  samplers = {name: _Sampler(view, start, whole, threads) for name, view in views.items()}
  limits = {
    name: None if limit_s is None else sampler.index(limit_s) for name, sampler in samplers.items()
  }
  opening, done, shown = Fraction(0), False, Fraction(0)

  def ready(closing: Fraction) -> bool:
    # One more frame than the window needs must exist, else it may be the last one.
    return all(sampler.next_index > sampler.index(closing) for sampler in samplers.values())

  def cut(closing: Fraction | None, last: bool) -> Window:
    frames = {}
    for name, sampler in samplers.items():
      hi = sampler.next_index if closing is None else sampler.index(closing)
      frames[name] = sampler.take(sampler.index(opening), hi)
    return Window(float(opening), frames, last)

  with open_media(path) as container:
    stream = video_stream(container, path)
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = threads
    last_frame = None
    for time, length, frame in timed_frames(container, stream, path, start):
      pixels: dict[str, np.ndarray] = {}
      for name, sampler in samplers.items():
        sampler.offer(time, frame, limits[name], pixels)
      last_frame, shown = frame, time + length
      while window is not None and ready(opening + window):
        yield cut(opening + window, False)
        opening += window - overlap
        for sampler in samplers.values():
          sampler.forget(sampler.index(opening))
      done = limit_s is not None and all(
        sampler.next_index >= (limits[name] or 0) for name, sampler in samplers.items()
      )
      if done:
        break
    if not done and last_frame is not None:
      end = shown - start if limit_s is None else min(shown - start, limit_s)
      for sampler in samplers.values():
        sampler.offer(shown + 1 / sampler.fps, last_frame, max(0, sampler.index(end)), {})
  if not all(sampler.held for sampler in samplers.values()):
    raise UserError(
      f"{path} has nothing to read from {float(start):.2f} s on: it lasts {float(shown):.2f} s"
    )
  while window is not None and any(
    sampler.next_index > sampler.index(opening + window) for sampler in samplers.values()
  ):
    yield cut(opening + window, False)
    opening += window - overlap
  yield cut(None, True)


def read_views(
  path: str | os.PathLike,
  views: Mapping[str, View],
  start: float | Fraction = 0,
  duration: float | Fraction | None = None,
  threads: int = 0,
) -> dict[str, np.ndarray]:
  """Several views of one stretch of a video from a single decoding pass.

  Args and errors as in `iter_views`.

  Returns:
    View name -> uint8 [v, y, x, 3]; fewer frames than `duration` asks for if the video is shorter.
  """
  (window,) = iter_views(path, views, start=start, duration=duration, threads=threads)
  return window.frames


def read_video(
  path: str | os.PathLike,
  fps: float | Fraction,
  size: tuple[int, int] | None = None,
  short_side: int | None = None,
  crop: int | None = None,
  start: float | Fraction = 0,
  duration: float | Fraction | None = None,
  threads: int = 0,
) -> np.ndarray:
  """One view of a video as uint8 RGB [v, y, x, 3]; see `View` and `iter_views`."""
  view = View(fps, size, short_side, crop)
  return read_views(path, {"view": view}, start, duration, threads)["view"]
