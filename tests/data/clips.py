"""Small videos with sound, for tests of building data sets."""

import pathlib

import numpy as np

from spatialv2a_jax import io

RATE, FPS = 16_000, 25


def noise(seconds: float, seed: int = 0, level: float = 0.1) -> np.ndarray:
  """One channel [p] of white noise; `level` is its RMS."""
  rng = np.random.default_rng(seed)
  return (level * rng.standard_normal(round(seconds * RATE))).astype(np.float32)


def write(
  path: pathlib.Path, seconds: float = 1.0, audio_ep: np.ndarray | None = None,
  *, seed: int = 0, column: float = 0.25, sound: bool = True,
) -> pathlib.Path:  # fmt: skip
  """Writes a video in which a bright square trembles about `column` (0 left, 1 right).

  Args:
    path: of the MP4.
    seconds: length of the picture.
    audio_ep: the sound; None is the same noise in both channels.
    seed: of picture and noise.
    column: where the square is.
    sound: whether there is a sound stream.
  """
  rng = np.random.default_rng(seed)
  picture = rng.integers(60, 120, (48, 80, 3), np.uint8)

  def frames():
    for i in range(round(seconds * FPS)):
      shown = picture.copy()
      at = round(column * 80) - 5 + (-1) ** i
      shown[16:26, max(0, at) : at + 10] = 255
      yield shown

  if audio_ep is None:
    audio_ep = np.repeat(noise(seconds, seed)[None], 2, 0)
  io.write_video(path, frames(), FPS, audio_ep if sound else None, RATE)
  return path
