"""A video in memory, seen as one in a file is. Axes: v frame, y row, x column."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.io.video import View, fit, rational


@dataclasses.dataclass(frozen=True)
class Frames:
  """A video in memory, at a constant rate.

  Attributes:
    pixels: uint8 RGB [v, y, x, 3], upright.
    fps: frames per second.
  """

  pixels: np.ndarray
  fps: float | Fraction

  def __post_init__(self):
    shape, kind = np.shape(self.pixels), getattr(self.pixels, "dtype", None)
    if len(shape) != 4 or shape[3] != 3 or not all(shape) or kind != np.uint8 or self.fps <= 0:
      raise UserError(
        f"frames must be uint8 RGB [frame, row, column, 3] at a rate above 0, not {kind} "
        f"{list(shape)} at {self.fps}"
      )

  @property
  def seconds(self) -> float:
    """How long they are shown."""
    return float(len(self.pixels) / rational(self.fps))

  @functools.cached_property
  def sha256(self) -> str:
    """Digest of what they show, in hexadecimal."""
    about = f"{self.pixels.shape} {rational(self.fps)} ".encode()
    return hashlib.sha256(about + self.pixels.tobytes()).hexdigest()

  def views(
    self,
    views: Mapping[str, View],
    start: float | Fraction = 0,
    duration: float | Fraction | None = None,
  ) -> dict[str, np.ndarray]:
    """Returns what `read_views` would of a file that holds these frames.

    Raises:
      UserError: nothing after `start`.
    """
    fps, begin = rational(self.fps), rational(start)
    left = len(self.pixels) / fps - begin
    left = left if duration is None else min(left, rational(duration))
    if left <= 0:
      raise UserError(f"frames of {self.seconds:.2f} s have nothing from {float(start):.2f} s on")
    found = {}
    for name, view in views.items():
      rate = rational(view.fps)
      times = (begin + k / rate for k in range(math.ceil(left * rate)))
      index = [min(math.ceil(time * fps), len(self.pixels) - 1) for time in times]
      fitted = {i: fit(self.pixels[i], view) for i in set(index)}
      found[name] = np.stack([fitted[i] for i in index])
    return found
