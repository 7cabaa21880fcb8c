"""The sounding objects of the procedural scenes, as painters of signed distance functions.

Coordinates are in radii of the object around its centre: x to the right, y down. An object moves
or flashes while it sounds and rests when it is silent, but for the short swing before a strike:
contact and sound begin on the same frame.

Axes: f 25 fps video frame, y image row, x image column, a red, green, blue and coverage.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Colour = tuple[float, float, float]
WHITE, BLACK, DARK = (250.0, 250.0, 245.0), (15.0, 15.0, 20.0), (50.0, 45.0, 50.0)


@dataclasses.dataclass(frozen=True)
class Motion:
  """State of a source per frame, each float32 [f, 1, 1]; times in seconds.

  `age` since and `until` the nearest onsets, `gap` between them, `share` of the event gone (0..1),
  `on` 1 while sounding, `hit` loudness of a decaying event (0..1), `strength` and `tone` of the
  latest event, `shake` alternates +1 and -1 from the onset on, `run` time spent sounding, `time`.
  """

  age: np.ndarray
  until: np.ndarray
  gap: np.ndarray
  share: np.ndarray
  on: np.ndarray
  hit: np.ndarray
  strength: np.ndarray
  tone: np.ndarray
  shake: np.ndarray
  run: np.ndarray
  time: np.ndarray

  def at(self, f: np.ndarray) -> "Motion":
    """The same for some frames only."""
    return Motion(*(getattr(self, field.name)[f] for field in dataclasses.fields(self)))


class Patch:
  """A stack of small transparent pictures that shapes are painted on, one over another."""

  def __init__(self, x_fx: np.ndarray, y_fy: np.ndarray, radius_f: np.ndarray):
    """Takes coordinates in radii and the radius in pixels."""
    self.x: np.ndarray = x_fx.astype(np.float32)[:, None, :]
    self.y: np.ndarray = y_fy.astype(np.float32)[:, :, None]
    self._radius = radius_f.astype(np.float32)[:, None, None]
    self.colour_afyx = np.zeros((4, len(x_fx), y_fy.shape[1], x_fx.shape[1]), np.float32)

  def paint(self, distance: np.ndarray, colour: Any, opacity: Any = 1.0) -> None:
    """Paints where the signed distance (in radii) is negative, with edges one pixel wide."""
    cover = np.clip(0.5 - distance * self._radius, 0.0, 1.0) * np.float32(opacity)
    for channel, level in zip(self.colour_afyx, (*colour, 1.0), strict=True):
      channel += cover * (level - channel)

  def turned(self, cx: Any, cy: Any, angle: np.ndarray) -> "Patch":
    """The same paper, turned under the brush: what is painted on it is turned about (cx, cy)."""
    view = copy.copy(self)
    x, y = self.x - cx, self.y - cy
    view.x = cx + x * np.cos(angle) - y * np.sin(angle)
    view.y = cy + x * np.sin(angle) + y * np.cos(angle)
    return view

  def ellipse(self, cx: Any, cy: Any, rx: Any, ry: Any) -> np.ndarray:
    """Distance to an ellipse, exact for circles."""
    x, y = (self.x - cx) / rx, (self.y - cy) / ry
    return (np.sqrt(x * x + y * y) - 1) * np.minimum(rx, ry)

  def bar(self, ax: Any, ay: Any, bx: Any, by: Any, width: Any) -> np.ndarray:
    """Distance to a straight stroke of half-width `width` with round ends."""
    dx, dy = bx - ax, by - ay
    x, y = self.x - ax, self.y - ay
    along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy + 1e-6), 0.0, 1.0)
    x, y = x - along * dx, y - along * dy
    return np.sqrt(x * x + y * y) - width

  def box(self, cx: Any, cy: Any, hx: Any, hy: Any) -> np.ndarray:
    """Distance to a rectangle of half-sizes `hx`, `hy`."""
    return np.maximum(np.abs(self.x - cx) - hx, np.abs(self.y - cy) - hy)


def _tint(rng: np.random.Generator, colour: Colour) -> Colour:
  """A shade of a colour: classes keep their colours, sources differ a little."""
  red, green, blue = np.clip(np.array(colour) * rng.uniform(0.85, 1.1, 3), 0, 255)
  return float(red), float(green), float(blue)


def _glow(colour: Colour, amount: np.ndarray) -> list[np.ndarray]:
  """Blends towards white."""
  return [level + (250.0 - level) * np.clip(amount, 0.0, 1.0) for level in colour]


def _swing(m: Motion) -> np.ndarray:
  """Lift of a mallet, 0 in contact and 1 at rest; it falls within 0.12 s before an onset."""
  return np.minimum(1.0, np.minimum(m.until / 0.12, m.age / 0.16))


def drum(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """A red drum and a mallet; the skin shakes."""
  colour = _tint(rng, (190, 40, 40))
  skin = 0.1 * m.hit * m.shake
  p.paint(np.minimum(p.box(0.0, 0.35, 0.95, 0.5), p.ellipse(0.0, 0.85, 0.95, 0.35)), colour)
  p.paint(p.box(0.0, 0.45, 0.95, 0.06), (230, 190, 60))
  hide = _glow((205, 185, 155), 1.2 * m.hit)
  p.paint(p.ellipse(0.0, -0.15 + skin, 1.0 + skin, 0.38 + skin), hide)
  lift = _swing(m)
  tip = -0.2 - 0.75 * lift
  p.paint(p.bar(0.0, tip, 1.05, -0.85 - 0.45 * lift, 0.06), (120, 80, 40))
  p.paint(p.ellipse(0.0, tip, 0.17, 0.17), WHITE)


def ball(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """An orange ball that hits the floor at every onset and is squashed there."""
  colour = _tint(rng, (240, 125, 20))
  flies = m.gap < 0.9
  way = np.clip(m.age / np.maximum(m.gap, 0.04), 0.0, 1.0)
  rise = np.where(flies, 4 * way * (1 - way) * np.minimum(1.5, 5.5 * m.gap**2), 0.0)
  squash = 0.35 * np.exp(-m.age / 0.05) * m.on
  ry, rx = 0.5 * (1 - squash), 0.5 * (1 + squash)
  cy = 1.1 - ry - rise
  p.paint(p.ellipse(0.0, 1.1, 0.55, 0.14), BLACK, 0.35 + 0.4 * (squash > 0.1))
  p.paint(p.ellipse(0.0, cy, rx, ry), _glow(colour, 1.4 * squash))
  p.paint(np.abs(p.ellipse(0.25, cy, rx, ry)) - 0.035, DARK, p.ellipse(0.0, cy, rx, ry) < -0.03)


def woodblock(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """A yellow block that jumps sideways under a steel hammer."""
  colour = _tint(rng, (215, 175, 75))
  shove = 0.16 * m.hit * m.shake
  p.paint(p.box(shove, 0.65, 0.85, 0.42), _glow(colour, 0.9 * m.hit))
  p.paint(p.box(shove, 0.65, 0.6, 0.07), DARK)
  angle = 0.95 * _swing(m)
  px, py = 1.35, 0.1
  hx, hy = px - 1.35 * np.cos(angle), py - 1.35 * np.sin(angle) - 0.02
  p.paint(p.bar(px, py, hx, hy, 0.07), (110, 70, 40))
  nx, ny = 0.24 * np.sin(angle), 0.24 * np.cos(angle)
  p.paint(p.bar(hx - nx, hy - ny, hx + nx, hy + ny - 0.05, 0.14), (150, 160, 175))


def bell(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """A golden bell that swings while it rings."""
  colour = _tint(rng, (225, 180, 30))
  angle = 0.55 * m.hit * np.cos(2 * np.pi * 2.1 * m.age)
  gold = _glow(colour, 0.9 * m.hit)
  straight, p = p, p.turned(0.0, -1.0, angle)
  p.paint(p.ellipse(-1.1 * angle, 0.95, 0.2, 0.2), DARK)
  dome = np.maximum(p.ellipse(0.0, 0.1, 0.68, 0.95), p.y - 0.6)
  flare = np.abs(p.x) - 0.62 - 0.45 * np.clip(p.y - 0.3, 0, 1)
  skirt = np.maximum(flare, np.abs(p.y - 0.55) - 0.27)
  p.paint(np.minimum(dome, skirt), gold)
  p.paint(p.box(0.0, 0.62, 0.76, 0.05), (150, 105, 10))
  p.paint(p.box(0.0, -0.9, 0.09, 0.2), DARK)
  straight.paint(straight.bar(-0.5, -1.1, 0.5, -1.1, 0.08), (90, 60, 40))


def fan(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """A cyan fan; its blades turn while it runs."""
  colour = _tint(rng, (40, 190, 200))
  p.paint(p.bar(0.0, 0.9, 0.0, 1.3, 0.14), DARK)
  p.paint(p.ellipse(0.0, 1.35, 0.6, 0.12), DARK)
  p.paint(p.ellipse(0.0, 0.0, 1.0, 1.0), DARK)
  p.paint(p.ellipse(0.0, 0.0, 0.9, 0.9), (205, 215, 220))
  for blade in range(3):
    angle = 2 * np.pi * (2.6 * m.run + blade / 3)
    p.paint(p.bar(0.0, 0.0, 0.68 * np.cos(angle), 0.68 * np.sin(angle), 0.17), colour)
  p.paint(p.ellipse(0.0, 0.0, 0.2, 0.2), _glow(DARK, 0.8 * m.on))


def siren(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """A lamp that sends out rings: red for the low tone, blue for the high one."""
  box = _tint(rng, (70, 70, 80))
  dim, red, blue = (90.0, 40.0, 60.0), (255.0, 30.0, 50.0), (60.0, 90.0, 255.0)
  lamp = [d + m.on * (r + m.tone * (b - r) - d) for d, r, b in zip(dim, red, blue, strict=True)]
  reach = 0.65 + 2.2 * m.age
  p.paint(np.abs(p.ellipse(0.0, -0.1, reach, reach)) - 0.09, lamp, m.on * (reach < 1.4))
  p.paint(p.box(0.0, 0.8, 0.7, 0.28), box)
  p.paint(np.minimum(p.ellipse(0.0, -0.05, 0.52, 0.52), p.box(0.0, 0.25, 0.52, 0.3)), lamp)
  p.paint(p.ellipse(-0.15, -0.2, 0.15, 0.15), WHITE, 0.3 + 0.6 * m.on)


def voice(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """A face; the mouth opens with every syllable and takes the shape of its vowel."""
  skin = _tint(rng, (235, 180, 150))
  hair = _tint(rng, (90, 60, 40))
  opening = m.on * m.strength * np.sqrt(np.sin(3.0 * (0.2 + 0.8 * m.share)))
  tone = m.tone.astype(int)
  wide = np.array([0.42, 0.5, 0.55, 0.32, 0.24], np.float32)[tone]
  tall = np.array([0.42, 0.28, 0.18, 0.36, 0.28], np.float32)[tone]
  nod = 0.06 * opening
  p.paint(p.ellipse(0.0, -0.25 + nod, 1.0, 1.05), hair)
  p.paint(p.ellipse(0.0, 0.05 + nod, 0.88, 1.1), skin)
  for side in (-0.36, 0.36):
    p.paint(p.ellipse(side, -0.25 + nod, 0.14, 0.1), WHITE)
    p.paint(p.ellipse(side, -0.25 + nod, 0.07, 0.07), BLACK)
  mouth = p.ellipse(0.0, 0.55 + nod, 0.3 + opening * (wide - 0.3), 0.05 + tall * opening)
  p.paint(mouth - 0.06, (200, 80, 85))
  p.paint(mouth, (90, 10, 25))


def steam(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """A pipe that blows flickering puffs."""
  metal = _tint(rng, (80, 110, 150))
  puffs, speed = 9, 2.8
  phase, side = rng.uniform(0, 1, puffs), rng.uniform(-1, 1, puffs)
  for number in range(puffs):
    way = (phase[number] + speed * m.run) % 1.0
    flicker = 0.5 + 0.5 * np.sin(40.0 * m.time + 9.0 * phase[number])
    cx, cy = side[number] * 0.75 * way, 0.35 - 1.5 * way
    radius = 0.12 + 0.26 * way
    opacity = m.on * (0.9 - 0.5 * way) * (0.5 + 0.5 * flicker)
    p.paint(p.ellipse(cx, cy, radius, radius), WHITE, opacity)
  p.paint(p.box(0.0, 0.9, 0.3, 0.5), metal)
  p.paint(p.box(0.0, 0.45, 0.42, 0.14), _glow(metal, 0.5 * m.on))


def guitar(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """A brown guitar body; its thick string swings out sideways when plucked."""
  wood = _tint(rng, (125, 75, 35))
  p.paint(p.box(0.0, -0.8, 0.16, 0.7), _tint(rng, (70, 45, 30)))
  p.paint(p.ellipse(0.0, 0.15, 0.62, 0.55), wood)
  p.paint(p.ellipse(0.0, 0.75, 0.85, 0.65), wood)
  p.paint(p.ellipse(0.0, 0.4, 0.3, 0.3), BLACK)
  along = np.clip((p.y + 1.4) / 2.5, 0.0, 1.0)
  bow = np.sin(np.pi * along)
  ends = np.abs(p.y + 0.15) - 1.25
  colour = _glow((190, 190, 120), m.hit)
  for sign in (-1.0, 1.0):  # two ghosts of the moving string, the shutter being open for long
    away = np.abs(p.x - bow * 0.42 * m.hit * sign * (0.6 + 0.4 * sign * m.shake))
    p.paint(np.maximum(away - 0.045 - 0.04 * m.hit, ends), colour)


def bird(p: Patch, m: Motion, rng: np.random.Generator) -> None:
  """A green bird; beak opens and wing flaps with every chirp."""
  colour = _tint(rng, (70, 185, 60))
  flap = m.on * (0.45 + 0.55 * m.shake)
  hop = -0.12 * m.on
  beak = 0.22 * m.on
  p.paint(p.bar(-0.75, 0.25 + hop, -1.25, 0.55 + hop, 0.13), _tint(rng, (40, 120, 40)))
  p.paint(p.ellipse(-0.1, 0.25 + hop, 0.78, 0.58), colour)
  p.paint(p.ellipse(0.5, -0.35 + hop, 0.42, 0.42), colour)
  p.paint(p.ellipse(0.6, -0.42 + hop, 0.11, 0.11), BLACK)
  for sign in (-1.0, 1.0):
    p.paint(p.bar(0.88, -0.3 + hop, 1.2, -0.27 + hop + sign * beak, 0.07), (250, 190, 30))
  tip = 0.45 - 1.35 * flap + hop
  p.paint(p.bar(-0.05, 0.15 + hop, -0.5, tip, 0.2), (200, 230, 70))
  for leg in (-0.2, 0.1):
    p.paint(p.bar(leg, 0.8, leg, 1.15, 0.05), (160, 100, 30))


Painter = Callable[[Patch, Motion, np.random.Generator], None]
PAINTERS: dict[str, Painter] = {
  "drum": drum,
  "ball": ball,
  "woodblock": woodblock,
  "bell": bell,
  "fan": fan,
  "siren": siren,
  "voice": voice,
  "steam": steam,
  "guitar": guitar,
  "bird": bird,
}
