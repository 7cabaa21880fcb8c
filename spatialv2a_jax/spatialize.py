"""Places the sound of a file: one mono source, rendered along a track, or a network's guess.

The track is the user's, or, for a video, where its picture moves. A mono-to-binaural network hears
the sound and sees the picture, and may place several sources.

Axes: e ear (0 left, 1 right), p audio sample, v frame at 8 fps.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from spatialv2a_jax import binauralizer, features, io, localizers, logbook, schema, worklist
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.spatial import hrtf as hrtfs
from spatialv2a_jax.spatial import render

WINDOW_SECONDS = 8.0
LOWEST_RATE = 1_000  # Samples per second; slower recordings are brought to it, for the head's sake.


def run(
  inputs: Sequence[str | pathlib.Path],
  out: str | pathlib.Path,
  *,
  track: str | None,
  hrtf: str | None,
  format: str,
  video_sound: io.SoundCodec = "aac",
  checkpoint: str | None = None,
) -> int:
  """Spatialises files and folders; returns the exit code (4 if some files failed).

  Args:
    inputs: files and folders.
    out: folder.
    track: file of a track; None follows the picture.
    hrtf: head that hears along a track; None is the sphere.
    format: "wav" or "flac".
    video_sound: how videos store their sound, as `io.remux` has it.
    checkpoint: model folder of a mono-to-binaural network, which replaces track and head.

  Raises:
    MissingAssetError: no such model folder.
    UserError: for a bad track, HRTF or model, a model beside one of the others, an unwritable
      `out`, or a fault of the only file.
  """
  out = pathlib.Path(out)
  io.check_writable(out)
  paths = worklist.collect(inputs, out, io.AUDIO_EXTENSIONS | io.VIDEO_EXTENSIONS)
  for flag, value in (("--track", track), ("--hrtf", hrtf)):
    if value is not None and checkpoint is not None:
      raise UserError(f"{flag} and --checkpoint exclude each other: the network places the sound")
  hrtf = hrtf or "sphere"
  net = None if checkpoint is None else binauralizer.Binauralizer(checkpoint)
  chosen = None if track is None else localizers.read_track(track)
  hrtfs.load(hrtf, schema.AUDIO["44k"].sample_rate)  # A bad one is no fault of the files.
  failed: dict[pathlib.Path, UserError] = {}
  with logbook.Progress(len(paths), "spatialising", "file") as progress:
    for path in paths:
      try:
        audio_ep, rate = binauralize(path, net) if net else spatialize(path, chosen, hrtf)
        audio_ep, gain_db = render.within_full_scale(audio_ep)
        if gain_db:
          progress.say(f"{path}: both ears are turned down by {-gain_db:.1f} dB to full scale")
        io.write_audio(out / f"{path.stem}.{format}", audio_ep, rate)
        if io.probe(path).has_video:
          io.remux(path, audio_ep, rate, out / f"{path.stem}.mp4", codec=video_sound)
      except UserError as error:
        if len(paths) == 1:
          raise
        failed[path] = error
      progress.advance()
  return worklist.conclude(len(paths), failed, out)


def spatialize(
  path: pathlib.Path, track: localizers.Track | None, hrtf: str
) -> tuple[np.ndarray, int]:
  """Returns the binaural sound [2, p] of one file at its own rate, and the rate.

  The channels of the file are averaged first: what they say of direction is replaced.

  Raises:
    UserError: no sound or a broken one, or neither a track nor a picture in which something moves.
  """
  info, mono_p, rate = _sound(path)
  if track is None:
    if not info.has_video:
      raise UserError(f"{path} has no picture to follow; give --track FILE")
    track = visible_track(path)
  head = hrtfs.load(hrtf, rate)
  azimuth = (track.time_s, track.azimuth_deg)
  return render.binaural(mono_p, rate, azimuth, head), rate


def binauralize(path: pathlib.Path, net: binauralizer.Binauralizer) -> tuple[np.ndarray, int]:
  """Returns the binaural sound [2, p] of a video by a network at its own rate, and the rate.

  Raises:
    UserError: no sound or a broken one, or no picture.
  """
  info, mono_p, rate = _sound(path)
  if not info.has_video:
    raise UserError(f"{path} has no picture for the network to see; give --track FILE instead")
  view = {"frames": io.View(schema.CLIP_FPS, size=(net.config.rows, net.config.columns))}
  pieces = (
    (window.frames["frames"], round(window.start_s * schema.CLIP_FPS), window.last)
    for window in io.iter_views(path, view, WINDOW_SECONDS)
  )
  return binauralizer.binauralize(net, mono_p, rate, pieces), rate


def _sound(path: pathlib.Path) -> tuple[io.MediaInfo, np.ndarray, int]:
  """Returns what a file is, the mean of its channels, and the rate."""
  info = io.probe(path)
  if not info.has_audio:
    raise UserError(f"{path} has no sound to place; `generate` makes sound for a silent video")
  rate = max(LOWEST_RATE, info.audio_rate or schema.AUDIO["44k"].sample_rate)
  mono_p = io.read_audio(path, rate, mono=True)[0]
  if not np.isfinite(mono_p).all():
    raise UserError(f"{path} holds samples that are not finite; export it again")
  return info, mono_p, rate


def visible_track(path: pathlib.Path) -> localizers.Track:
  """Returns where the picture of a video moves, smoothed over time; UserError if nothing does."""
  parts = []
  for window in io.iter_views(path, features.views(), WINDOW_SECONDS):
    frames = window.frames["frames"]
    short = max(0, schema.SEGMENT_FRAMES - len(frames))
    frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    placed = features.place(frames, len(frames) / schema.SYNC_FPS, "motion")
    parts.append(placed["spatial_vk"].astype(np.float64))
  spatial_vk = np.concatenate(parts)
  seen_v = spatial_vk[:, schema.DESCRIPTORS.index("S_area")] > 0
  if not seen_v.any():
    raise UserError(f"nothing moves in the picture of {path}; give --track FILE")
  azimuth_v = -0.5 * schema.HFOV_DEG * spatial_vk[:, schema.DESCRIPTORS.index("S_h")]
  time_v = (np.arange(len(azimuth_v)) + 0.5) / schema.CLIP_FPS
  return localizers.Track(time_v, localizers.smooth(azimuth_v, seen_v))
