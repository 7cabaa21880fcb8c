"""Sound in and out of files. Axes: e channel (0 left, 1 right), p sample."""

import io
import os
import pathlib
import warnings
from collections.abc import Iterator
from fractions import Fraction

import av
import av.error
import numpy as np
import scipy.io.wavfile
import soundfile
import soxr
from av.audio.stream import AudioStream
from av.container import InputContainer

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.io.files import (
  atomic_path,
  check_readable,
  check_whole,
  first_shown,
  open_media,
)

_SOUND_FILES = {".wav", ".flac", ".ogg", ".aiff"}
_ROUNDED_S, _JUMP_S = 0.05, 60.0  # Between them, a time differs from the samples before it.


def _decode_file(path: pathlib.Path) -> tuple[np.ndarray, int]:
  try:
    with open(path, "rb") as file:  # libsndfile takes no name that is not UTF-8.
      samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
  except soundfile.LibsndfileError as error:
    check_whole(path)
    raise UserError(f"{path} is not a sound file or is damaged ({error.error_string})") from None
  return samples.T, rate


def _blocks(
  container: InputContainer, stream: AudioStream
) -> Iterator[tuple[float | None, np.ndarray]]:
  """Decodes (time, float32 [e, p]), all with the channels and the rate of the stream's head.

  Recordings of broadcasts, and files that were joined, change both on the way.
  """
  head = stream.codec_context
  layout, rate = head.layout, head.sample_rate
  kind, planar = None, None
  for frame in container.decode(stream):
    if kind != (kind := (frame.format.name, frame.layout.name, frame.sample_rate)):
      if planar:
        yield from ((block.time, block.to_ndarray()) for block in planar.resample(None))
      planar = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    assert planar
    time = frame.time
    yield from ((time, block.to_ndarray()) for block in planar.resample(frame))
  if planar:
    yield from ((block.time, block.to_ndarray()) for block in planar.resample(None))


def _in_time(block_ep: np.ndarray, late: int, rate: int) -> np.ndarray:
  """Returns a block that comes `late` samples after the ones before it, or too early, in its place.

  Recordings that lost packets have holes. What is off by less than a block was rounded; what is off
  by very much is a clock that was set anew.
  """
  if not _ROUNDED_S * rate < abs(late) < _JUMP_S * rate:
    return block_ep
  return np.pad(block_ep, ((0, 0), (late, 0))) if late > 0 else block_ep[:, -late:]


def _decode_container(path: pathlib.Path) -> tuple[np.ndarray, int]:
  with open_media(path) as container:
    if not container.streams.audio:
      raise UserError(f"{path} has no audio stream")
    stream = container.streams.audio[0]
    rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    blocks, first, count = [], None, 0
    try:
      for time, block_ep in _blocks(container, stream):
        first = time if first is None else first
        # Alone, bare sound has times of no meaning, if its rate changes on the way.
        if container.streams.video and time is not None and first is not None:
          block_ep = _in_time(block_ep, round((time - first) * rate) - count, rate)
        blocks.append(block_ep)
        count += block_ep.shape[1]
    except av.error.FFmpegError as error:
      raise UserError(
        f"{path} is damaged: its sound stops after {count / rate:.2f} s ({error.strerror or error})"
      ) from None
    audio_ep = np.concatenate(blocks, 1) if blocks else np.zeros((channels, 0), np.float32)
    if stream.duration and stream.time_base:
      # Codecs fill up their last block: cut that off. Where more is left, the length was a guess.
      stated = round(stream.duration * stream.time_base * rate)
      longest = max((block_ep.shape[1] for block_ep in blocks), default=0)
      if audio_ep.shape[1] - stated <= 2 * longest:
        audio_ep = audio_ep[:, :stated]
    shift = 0
    if container.streams.video and first is not None:
      shift = round((first - float(first_shown(path))) * rate)
    audio_ep = np.pad(audio_ep, ((0, 0), (max(shift, 0), 0)))[:, max(-shift, 0) :]
    return audio_ep, rate


def read_audio(
  path: str | os.PathLike,
  sample_rate: int | None = None,
  mono: bool = False,
  start: float | Fraction = 0,
  duration: float | Fraction | None = None,
) -> np.ndarray:
  """Reads the sound of an audio file or of a video.

  In a video, sample 0 is at the time of the first frame shown, and holes in the sound are zeros, so
  frames and samples line up. The level is kept as it is; decoded lossy sound may exceed 1.

  Args:
    path: a sound file or a container with a sound stream.
    sample_rate: samples per second to convert to (band-limited, linear phase); None keeps the
      file's own.
    mono: average the channels.
    start: seconds to leave out at the beginning.
    duration: seconds to read at most.

  Returns:
    float32 [e, p].

  Raises:
    UserError: unreadable or damaged file, no sound stream, or no samples.
  """
  path = check_readable(path)
  decode = _decode_file if path.suffix.lower() in _SOUND_FILES else _decode_container
  audio_ep, rate = decode(path)
  if audio_ep.shape[1]:
    stop = None if duration is None else round((start + duration) * rate)
    audio_ep = audio_ep[:, round(start * rate) : stop]
  if not audio_ep.shape[1]:
    after = f" after {float(start):.2f} s" if start else ""
    raise UserError(f"{path} has no sound{after}: zero samples")
  if mono:
    audio_ep = audio_ep.mean(0, keepdims=True)
  if sample_rate is not None and sample_rate != rate:
    audio_ep = soxr.resample(audio_ep.T, rate, sample_rate, quality="VHQ").T
  return np.ascontiguousarray(audio_ep, np.float32)


def fixed_point(audio_ep: np.ndarray, path: str | os.PathLike) -> np.ndarray:
  """24-bit integers in the upper bits of int32, same shape; warns where full scale is exceeded."""
  scaled = np.rint(np.asarray(audio_ep, np.float64) * 2**23)
  over = int(np.count_nonzero((scaled < -(2**23)) | (scaled > 2**23 - 1)))
  if over > np.count_nonzero(scaled == 2**23):  # Exactly +1.0 is one step off, not worth a word.
    warnings.warn(
      f"{path}: {over} samples beyond full scale are clipped; wav keeps them", stacklevel=3
    )
  return np.clip(scaled, -(2**23), 2**23 - 1).astype(np.int32) << 8


def write_audio(path: str | os.PathLike, audio_ep: np.ndarray, sample_rate: int) -> None:
  """Writes `.wav` (32-bit float, nothing clipped) or `.flac` (24 bit); equal input, equal bytes.

  The level is never changed: loudness is content.

  Args:
    path: output; its suffix chooses the format. Written atomically.
    audio_ep: float [e, p] or [p], finite.
    sample_rate: samples per second.

  Raises:
    UserError: another suffix, or an output that cannot be written.
  """
  path = pathlib.Path(path)
  audio_ep = np.atleast_2d(np.asarray(audio_ep, np.float32))
  suffix = path.suffix.lower()
  if suffix == ".wav" and audio_ep.nbytes >= 2**32 - 2**10:
    raise UserError(f"cannot write {path}: wav holds at most 4 GiB; use --format flac")
  if not np.isfinite(audio_ep).all():
    raise ValueError(f"{path}: the sound holds NaN or infinite samples")
  if suffix not in (".wav", ".flac"):
    raise UserError(f"cannot write sound to {path}: the suffix must be .wav or .flac")
  with atomic_path(path) as temporary:
    if suffix == ".wav":  # libsndfile would put the time of writing into the file.
      scipy.io.wavfile.write(temporary, sample_rate, audio_ep.T)
    else:  # libsndfile does not tell what the system said of a full disk.
      held, encoded = fixed_point(audio_ep, path).T, io.BytesIO()
      soundfile.write(encoded, held, sample_rate, format="FLAC", subtype="PCM_24")
      temporary.write_bytes(encoded.getbuffer())
