"""Pictures of the procedural scenes: backgrounds, camera and compositing.

Objects are signed distance functions (data/scene_objects.py) painted with soft edges into small
patches, several frames at once, then laid over a background that a turning camera crops from a
wider canvas.

Axes: f 25 fps video frame, y image row (down), x image column (right), a red, green, blue and
coverage, o red, green, blue.
"""

import numpy as np

from data.scene_objects import PAINTERS, Motion, Patch
from data.scene_plan import FPS, HFOV_DEG, Plan, Source, pixel_x

# Radius of an object one metre away, as a share of the picture's width.
RADIUS = 0.15
# Patches hold everything within this many radii.
REACH = 1.5
HORIZON = 0.4
_BLOCK = 1 << 14  # pixels painted at once: small enough to stay in the cache


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
  """Value noise in -1..1 with blobs `cell` pixels wide."""
  grid = rng.uniform(-1, 1, (int(height / cell) + 2, int(width / cell) + 2))
  y, x = np.arange(height) / cell, np.arange(width) / cell
  row, column = y.astype(int), x.astype(int)
  wy, wx = (y - row)[:, None], (x - column)[None, :]
  top = grid[row][:, column] * (1 - wx) + grid[row][:, column + 1] * wx
  low = grid[row + 1][:, column] * (1 - wx) + grid[row + 1][:, column + 1] * wx
  return top * (1 - wy) + low * wy


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """A textured wall above a textured floor, muted so that objects stand out: [o, y, x]."""
  base = rng.uniform(70, 150)
  wall = base + rng.uniform(-22, 22, 3)
  floor = 0.7 * base + rng.uniform(-18, 18, 3)
  edge = int(HORIZON * height)
  picture = np.empty((3, height, width))
  picture[:, :edge], picture[:, edge:] = wall[:, None, None], floor[:, None, None]
  scale = height / 96
  coarse = _smooth_noise(rng, height, width, 18 * scale)
  fine = _smooth_noise(rng, height, width, 4 * scale)
  stripes = np.sign(np.sin(2 * np.pi * np.arange(width) / (rng.uniform(14, 40) * scale)))
  picture += (13 * coarse + 6 * fine)[None]
  picture[:, :edge] += rng.uniform(0, 5) * stripes[None, None, :]
  return np.clip(picture, 0, 255).astype(np.float32)


def motion(source: Source, frames: int) -> Motion:
  """What a source's events mean for its picture, frame by frame."""
  onsets = np.array([event.frame for event in source.events] or [frames + 99])
  length = np.array([event.length for event in source.events] or [1])
  strength = np.array([event.strength for event in source.events] or [0.0])
  tone = np.array([event.tone for event in source.events] or [0])
  frame_f = np.arange(frames)
  latest = np.searchsorted(onsets, frame_f, side="right") - 1
  begun, known = latest >= 0, np.maximum(latest, 0)
  after = np.append(onsets, frames + 99)[latest + 1]
  age_f = np.where(begun, frame_f - onsets[known], 99)
  on_f = (begun & (age_f < length[known])).astype(float)
  gap_f = np.where(begun, after - onsets[known], 99)
  fields = {
    "age": age_f / FPS,
    "until": (after - frame_f) / FPS,
    "gap": gap_f / FPS,
    "share": np.clip(age_f / length[known], 0.0, 1.0),
    "on": on_f,
    "hit": on_f * strength[known] * np.exp(-2.5 * age_f / length[known]),
    "strength": strength[known],
    "tone": tone[known],
    "shake": np.where(age_f % 2 == 0, 1.0, -1.0),
    "run": np.cumsum(on_f) / FPS,
    "time": frame_f / FPS,
  }
  return Motion(**{name: v.astype(np.float32)[:, None, None] for name, v in fields.items()})


def _paint(canvas_ofyx: np.ndarray, source: Source) -> None:
  """Paints one source over all frames, in place."""
  _, frames, height, width = canvas_ofyx.shape
  radius_f = RADIUS * width / source.distance_f
  x_f = pixel_x(source.azimuth_f) * width - 0.5
  y_f = HORIZON * height + source.height * radius_f
  half = int(np.ceil(REACH * radius_f.max())) + 1
  size = 2 * half + 1
  left_f, top_f = np.rint(x_f).astype(int) - half, np.rint(y_f).astype(int) - half
  moves, offsets = motion(source, frames), np.arange(size)
  seen_f = np.flatnonzero((left_f < width) & (left_f + size > 0))
  block = max(1, _BLOCK // size**2)
  for begin in range(0, seen_f.size, block):
    f = seen_f[begin : begin + block]
    x_fx = (left_f[f, None] + offsets - x_f[f, None]) / radius_f[f, None]
    y_fy = (top_f[f, None] + offsets - y_f[f, None]) / radius_f[f, None]
    patch = Patch(x_fx, y_fy, radius_f[f])
    # Every block restarts the source's own generator: its tint must not change between blocks.
    PAINTERS[source.kind.name](patch, moves.at(f), np.random.default_rng(source.seed))
    for number, frame in enumerate(f):
      left, top = left_f[frame], top_f[frame]
      x0, x1 = max(left, 0), min(left + size, width)
      y0, y1 = max(top, 0), min(top + size, height)
      part = patch.colour_afyx[:, number, y0 - top : y1 - top, x0 - left : x1 - left]
      under = canvas_ofyx[:, frame, y0:y1, x0:x1]
      under *= 1 - part[3]
      under += part[:3]


def draw(plan: Plan, rng: np.random.Generator, frames: int, size: tuple[int, int]) -> np.ndarray:
  """Draws a clip.

  Args:
    plan: what happens.
    rng: draws the background.
    frames: number of frames.
    size: height and width in pixels.

  Returns:
    uint8 [f, y, x, 3], RGB.
  """
  height, width = size
  # A turn to the left shows what lies further left on the canvas.
  shift_f = -plan.yaw_f * width / HFOV_DEG
  shift_f = shift_f - shift_f.min()
  wide_oyx = background(rng, height, width + int(np.ceil(shift_f.max())) + 1)
  canvas_ofyx = np.empty((3, frames, height, width), np.float32)
  for frame, shift in enumerate(shift_f):
    whole = int(shift)
    part = np.float32(shift - whole)
    canvas_ofyx[:, frame] = wide_oyx[:, :, whole : whole + width]
    if part:
      canvas_ofyx[:, frame] *= 1 - part
      canvas_ofyx[:, frame] += part * wide_oyx[:, :, whole + 1 : whole + 1 + width]
  for source in sorted(plan.sources, key=lambda s: -float(s.distance_f.mean())):
    _paint(canvas_ofyx, source)
  return np.ascontiguousarray((canvas_ofyx + 0.5).astype(np.uint8).transpose(1, 2, 3, 0))
