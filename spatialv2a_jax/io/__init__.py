"""Media in and out: frames by timestamp, sound, lossless remuxing, atomic files. No JAX here."""

from spatialv2a_jax.io.audio import read_audio, write_audio
from spatialv2a_jax.io.files import (
  AUDIO_EXTENSIONS,
  DISK_TROUBLE,
  VIDEO_EXTENSIONS,
  MediaInfo,
  atomic_path,
  check_writable,
  file_hash,
  list_media,
  named_in_text,
  probe,
  remove_leftovers,
)
from spatialv2a_jax.io.frames import Frames
from spatialv2a_jax.io.mux import SoundCodec, remux, write_video
from spatialv2a_jax.io.video import View, Window, iter_views, read_video, read_views

__all__ = [
  "AUDIO_EXTENSIONS",
  "DISK_TROUBLE",
  "VIDEO_EXTENSIONS",
  "Frames",
  "MediaInfo",
  "SoundCodec",
  "View",
  "Window",
  "atomic_path",
  "check_writable",
  "file_hash",
  "iter_views",
  "list_media",
  "named_in_text",
  "probe",
  "read_audio",
  "read_video",
  "read_views",
  "remove_leftovers",
  "remux",
  "write_audio",
  "write_video",
]
