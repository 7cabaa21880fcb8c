"""Video with sound out: encoding frames, and putting new sound under an untouched picture.

Sound goes into MP4 as 24-bit FLAC, lossless and played by browsers; as ALAC, lossless and played by
QuickTime and Apple's devices, which FLAC in MP4 is not; or as AAC of 320 kb/s at 44.1 or 48 kHz,
which plays everywhere and keeps time differences between the ears to 1 us and level differences to
0.2 dB (at common bit rates it bends both). Stereo is tagged as such, channel 0 left.

Axes: e channel (0 left, 1 right), p sample, y row, x column.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Literal

import av
import av.error
import numpy as np
import soxr
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.io.audio import fixed_point
from spatialv2a_jax.io.files import atomic_path, first_shown, open_media, video_stream
from spatialv2a_jax.io.video import Picture, rational, timed_frames

SoundCodec = Literal["flac", "alac", "aac"]

_AAC_RATES = (44_100, 48_000)  # Lower ones leave no room for 320 kb/s.
_SAMPLE_FORMAT = {"flac": "s32", "alac": "s32p", "aac": "fltp"}
_CONTAINER = {"movflags": "+faststart", "fflags": "+bitexact"}
# Equal input must give equal bytes: one thread, and no macroblock tree, whose AVX-512 code in x264
# reads memory it never set and turns out differently from run to run on small pictures.
_X264 = {"crf": "18", "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}


class _Sound:
  """Feeds sound to a container in step with the picture, so that players need little buffer."""

  def __init__(
    self,
    output: OutputContainer,
    audio_ep: np.ndarray,
    sample_rate: int,
    codec: SoundCodec,
    path: str | os.PathLike,
  ):
    audio_ep = np.atleast_2d(np.asarray(audio_ep, np.float32))
    if audio_ep.shape[0] not in (1, 2) or not np.isfinite(audio_ep).all():
      raise ValueError(f"{path}: sound must be finite and of one or two channels")
    if codec == "aac" and sample_rate not in _AAC_RATES:
      audio_ep = soxr.resample(audio_ep.T, sample_rate, _AAC_RATES[-1], quality="VHQ").T
      sample_rate = _AAC_RATES[-1]
    self.layout = "stereo" if audio_ep.shape[0] == 2 else "mono"
    self.rate, self.output, self.format = sample_rate, output, _SAMPLE_FORMAT[codec]
    stream = output.add_stream(codec, rate=sample_rate, layout=self.layout, format=self.format)
    assert isinstance(stream, AudioStream)
    stream.codec_context.flags |= 1 << 23  # AV_CODEC_FLAG_BITEXACT: no version string.
    if codec == "aac":
      stream.bit_rate = 160_000 * audio_ep.shape[0]
    self.stream = stream
    self.samples_ep = audio_ep if codec == "aac" else fixed_point(audio_ep, path)
    self.done = 0

  def feed(self, until_s: Fraction) -> None:
    """Encodes whole tenths of a second up to `until_s`."""
    block = max(1, self.rate // 10)
    stop = min(self.samples_ep.shape[1], int(until_s * self.rate))
    while self.done < stop:
      part = self.samples_ep[:, self.done : min(self.done + block, self.samples_ep.shape[1])]
      if self.format == "s32":
        part = part.T.reshape(1, -1)
      frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), self.format, self.layout)
      frame.sample_rate, frame.pts, frame.time_base = self.rate, self.done, Fraction(1, self.rate)
      self.output.mux(self.stream.encode(frame))
      self.done = min(self.done + block, self.samples_ep.shape[1])

  def finish(self, duration_s: Fraction) -> None:
    """Encodes the rest, cut where the picture ends."""
    self.samples_ep = self.samples_ep[:, : max(self.done, round(duration_s * self.rate))]
    self.feed(Fraction(self.samples_ep.shape[1] + 1, self.rate))
    self.output.mux(self.stream.encode(None))


def _open_output(path: os.PathLike) -> OutputContainer:
  return av.open(str(path), "w", format="mp4", options=_CONTAINER)


def _encode(
  output: OutputContainer,
  frames: Iterable[tuple[Fraction, np.ndarray]],
  fps: Fraction,
  time_base: Fraction,
  make_sound,
) -> None:
  """Encodes (time, uint8 [y, x, 3]) with libx264 and the sound alongside."""
  stream, sound, end = None, None, Fraction(0)
  for time, pixels in frames:
    if stream is None:
      height, width = pixels.shape[:2]
      stream = output.add_stream("libx264", rate=fps, options=dict(_X264))
      stream.width, stream.height = width - width % 2, height - height % 2
      stream.pix_fmt = "yuv420p"
      stream.codec_context.time_base = time_base
      stream.codec_context.thread_count = 1
      sound = make_sound()
    cropped = np.ascontiguousarray(pixels[: stream.height, : stream.width])
    frame = av.VideoFrame.from_ndarray(cropped, format="rgb24")
    frame.pts, frame.time_base = round(time / time_base), time_base
    output.mux(stream.encode(frame))
    end = time + 1 / fps
    if sound:
      sound.feed(time)
  if stream is None:
    raise ValueError("a video needs at least one frame")
  output.mux(stream.encode(None))
  if sound:
    sound.finish(end)


def write_video(
  path: str | os.PathLike,
  frames: Iterable[np.ndarray],
  fps: float | Fraction,
  audio_ep: np.ndarray | None = None,
  sample_rate: int | None = None,
  codec: SoundCodec = "flac",
) -> None:
  """Writes an MP4 (H.264, yuv420p, constant quality); equal input gives equal bytes.

  Args:
    path: output, written atomically.
    frames: uint8 RGB [y, x, 3] each; an iterator is consumed as it is encoded. Odd sides lose
      their last row or column, which 4:2:0 colour cannot hold.
    fps: frames per second.
    audio_ep: optional sound [e, p] with one or two channels, cut where the picture ends.
    sample_rate: samples per second of the sound.
    codec: how the sound is stored; see the module's docstring.

  Raises:
    UserError: an output that cannot be written.
  """
  rate = rational(fps)
  if audio_ep is not None and not sample_rate:
    raise ValueError("sound needs its sample_rate")
  with atomic_path(path) as temporary, _open_output(temporary) as output:

    def sound():
      return None if audio_ep is None else _Sound(output, audio_ep, sample_rate or 0, codec, path)

    timed = ((index / rate, pixels) for index, pixels in enumerate(frames))
    _encode(output, timed, rate, 1 / rate, sound)


def _video_packets(
  container: InputContainer, stream: av.VideoStream, path: str | os.PathLike, stop: Fraction | None
) -> Iterator[av.Packet]:
  """Compressed packets from the first whole picture on, times counted from the first one shown."""
  base = stream.time_base or Fraction(1, av.time_base)
  origin, begun = round(first_shown(path) / base), False
  try:
    for packet in container.demux(stream):
      begun = begun or packet.is_keyframe
      if not begun or (packet.dts is None and packet.pts is None):
        continue
      if packet.dts is not None:
        packet.dts -= origin
        if stop is not None and packet.dts * base >= stop:
          return
      if packet.pts is not None:
        packet.pts -= origin
      yield packet
  except av.error.FFmpegError as error:
    raise UserError(f"{path} is damaged ({error.strerror or error})") from None


def _can_copy(path: str | os.PathLike) -> bool:
  """Whether MP4 can hold the compressed picture as it is, with a time on every packet."""
  with open_media(path) as container:
    stream = video_stream(container, path)
    first = next(_video_packets(container, stream, path, None), None)
    tagged = stream.codec_context.name in {"h264", "hevc", "av1", "libdav1d", "vp9", "mpeg4"}
    return first is not None and first.pts is not None and tagged


def remux(
  video_path: str | os.PathLike,
  audio_ep: np.ndarray,
  sample_rate: int,
  out_path: str | os.PathLike,
  codec: SoundCodec = "flac",
  duration: float | Fraction | None = None,
) -> None:
  """Puts new sound under a video without touching its picture.

  The compressed video packets are copied byte for byte, with their rotation; every other stream is
  dropped. Picture and sound start together at zero; the sound is cut where the picture ends. A
  picture that MP4 cannot hold (old AVI, MPEG-1, Theora, joined recordings whose times go back...)
  is encoded anew with H.264, upright.

  Args:
    video_path: a file with a video stream.
    audio_ep: sound [e, p], channel 0 left.
    sample_rate: samples per second.
    out_path: output MP4, written atomically.
    codec: how the sound is stored; see the module's docstring.
    duration: seconds of picture to keep; a few more frames stay where the codec needs them.

  Raises:
    UserError: unreadable video, no video stream, or an output that cannot be written.
  """
  stop = None if duration is None else rational(duration)
  if _can_copy(video_path):
    try:
      with _remuxing(video_path, audio_ep, sample_rate, out_path, codec) as parts:
        _copy(*parts, video_path, stop)
      return
    except (av.error.FFmpegError, ValueError):
      pass  # Times that repeat or go back, as of joined recordings, are more than MP4 can hold.
  with _remuxing(video_path, audio_ep, sample_rate, out_path, codec) as parts:
    container, source, output, sound = parts
    fps = rational(source.average_rate or source.guessed_rate or 25)
    frames = _onward(timed_frames(container, source, video_path, Fraction(0)), stop)
    try:
      _encode(output, frames, fps, Fraction(1, 90_000), sound)
    except av.error.FFmpegError as error:
      raise UserError(
        f"{video_path}: its picture cannot be put into {out_path} ({error.strerror or error})"
      ) from None


_Remux = tuple[InputContainer, av.VideoStream, OutputContainer, Callable[[], _Sound]]


@contextlib.contextmanager
def _remuxing(
  video_path: str | os.PathLike,
  audio_ep: np.ndarray,
  sample_rate: int,
  out_path: str | os.PathLike,
  codec: SoundCodec,
) -> Iterator[_Remux]:
  """Yields the open video, its picture, the output, and what begins the sound."""
  with (
    open_media(video_path) as container,
    atomic_path(out_path) as temporary,
    _open_output(temporary) as output,
  ):
    source = video_stream(container, video_path)
    yield container, source, output, lambda: _Sound(output, audio_ep, sample_rate, codec, out_path)


def _copy(
  container: InputContainer,
  source: av.VideoStream,
  output: OutputContainer,
  sound: Callable[[], _Sound],
  path: str | os.PathLike,
  stop: Fraction | None,
) -> None:
  """Copies the packets of a picture, the sound alongside; FFmpegError where MP4 refuses one."""
  # Opaque, for AV1's decoder has the name of no encoder.
  target = output.add_stream_from_template(source, opaque=True)
  if source.codec_context.name == "hevc" and source.codec_context.codec_tag != "hev1":
    target.codec_context.codec_tag = "hvc1"  # Under MP4's other name for it, Apple refuses HEVC.
  track, end = sound(), Fraction(0)
  base = source.time_base or Fraction(1, av.time_base)
  step = 1 / (source.average_rate or source.guessed_rate or Fraction(25))
  for packet in _video_packets(container, source, path, stop):
    time = packet.pts if packet.pts is not None else packet.dts or 0
    end = max(end, time * base + (packet.duration * base if packet.duration else step))
    packet.stream = target
    output.mux(packet)
    track.feed(time * base)
  track.finish(end)


def _onward(
  frames: Iterable[tuple[Fraction, Fraction, av.VideoFrame]], stop: Fraction | None
) -> Iterator[tuple[Fraction, np.ndarray]]:
  """Frames up to `stop` that are later than those before them, as pixels."""
  picture, shown = Picture(), Fraction(-1)
  for time, _, frame in frames:
    if time > shown and (stop is None or time < stop):
      shown = time
      yield time, picture(frame)
