"""What happens in a procedural scene: who sounds when, where everything is, how the camera turns.

Every audible attack lies on a video frame, so picture and sound share one clock. Sources move only
around the times at which they sound: motion in the picture therefore points at what is heard.

Axes: f 25 fps video frame.
"""

import dataclasses

import numpy as np

FPS = 25
HFOV_DEG = 120.0
NEAR_M, FAR_M = 0.7, 4.0
# Nearer than this, several sources could add up to more than full scale at one ear.
NEAR_BY_COUNT_M = {1: 0.7, 2: 1.2, 3: 1.7}
MAX_SPEED_DEG_S = 40.0


@dataclasses.dataclass(frozen=True)
class Kind:
  """A sound class.

  Attributes:
    name: of the class.
    caption: what a viewer would say.
    gap: least and most frames between two onsets of a run.
    length: least and most frames for which one event sounds.
    peak: of the waveform one metre away, at full strength; short sounds have the higher ones.
    tones: number of variants of an event (pitches, vowels).
  """

  name: str
  caption: str
  gap: tuple[int, int]
  length: tuple[int, int]
  peak: float
  tones: int = 1

  @property
  def held(self) -> bool:
    """True for sounds that are kept up and let go, false for those that die away."""
    return self.length[0] != self.length[1]


KINDS = (
  Kind("drum", "a drum being struck with a mallet", (9, 18), (9, 9), 0.35),
  Kind("ball", "a ball bouncing on the floor", (11, 18), (7, 7), 0.35),
  Kind("woodblock", "a hammer knocking on a wooden block", (6, 13), (5, 5), 0.3),
  Kind("bell", "a bell ringing", (18, 32), (26, 26), 0.25),
  Kind("fan", "an electric fan humming", (30, 65), (22, 50), 0.28),
  Kind("siren", "an alarm beeping in two tones", (8, 9), (7, 7), 0.13, tones=2),
  Kind("voice", "a person speaking syllables", (6, 10), (4, 6), 0.28, tones=5),
  Kind("steam", "steam hissing out of a pipe", (14, 30), (8, 18), 0.25),
  Kind("guitar", "a guitar string being plucked", (10, 20), (16, 16), 0.3, tones=5),
  Kind("bird", "a bird chirping", (5, 11), (3, 5), 0.15, tones=3),
)
CLASSES = tuple(kind.name for kind in KINDS)


@dataclasses.dataclass(frozen=True)
class Event:
  """One attack: first frame, frames until it has died away, strength 0..1, tone number."""

  frame: int
  length: int
  strength: float
  tone: int


@dataclasses.dataclass(frozen=True)
class Source:
  """A sounding object; azimuth in degrees, relative to the head, + left; distance in metres."""

  kind: Kind
  events: tuple[Event, ...]
  azimuth_f: np.ndarray
  distance_f: np.ndarray
  height: float
  seed: np.random.SeedSequence


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that happens in a clip; `yaw_f` is the camera's (= head's) turn in degrees, + left."""

  yaw_f: np.ndarray
  sources: tuple[Source, ...]


def _solo(rng: np.random.Generator, frames: int) -> list[tuple[int, int]]:
  """Stretches of activity of one source on its own."""
  spans, start = [], int(rng.integers(2, 14))
  while start < frames - 8:
    stop = min(start + int(rng.integers(25, 70)), frames)
    spans.append((start, stop))
    start = stop + int(rng.integers(8, 26))
  return spans


def _turns(rng: np.random.Generator, frames: int, count: int) -> list[list[tuple[int, int]]]:
  """Stretches of activity of sources that take turns."""
  spans: list[list[tuple[int, int]]] = [[] for _ in range(count)]
  start, turn = int(rng.integers(2, 8)), int(rng.integers(count))
  longest = max(20, min(45, frames // count))
  while start < frames - 8:
    stop = min(start + int(rng.integers(16, longest)), frames)
    spans[turn % count].append((start, stop))
    start, turn = stop + int(rng.integers(3, 9)), turn + 1
  return spans


def _events(rng: np.random.Generator, kind: Kind, spans: list[tuple[int, int]]) -> list[Event]:
  """Attacks of one source within its stretches of activity."""
  events: list[Event] = []
  tone = int(rng.integers(kind.tones))
  for start, stop in spans:
    frame = start
    gap = int(rng.integers(kind.gap[0], kind.gap[1] + 1))
    while frame <= stop - 4:
      length = int(rng.integers(kind.length[0], kind.length[1] + 1))
      events.append(Event(frame, length, float(rng.uniform(0.6, 1.0)), tone))
      step = gap + int(rng.integers(-1, 2))  # a steady beat, played by hand
      frame += max(step, kind.gap[0], length + 2 if kind.held else 0)
      tone = (tone + (1 if kind.tones == 2 else int(rng.integers(1, kind.tones + 1)))) % kind.tones
  ends = [event.frame for event in events[1:]] + [10**9] * bool(events)
  for number, (event, end) in enumerate(zip(events, ends, strict=True)):
    if kind.held:  # what is held also ends with its stretch
      end = min(end, max(event.frame + 3, next(b for a, b in spans if a <= event.frame < b)))
    length = min(event.length, end - event.frame)
    events[number] = dataclasses.replace(event, length=length)
  return events


def _progress(events: list[Event], frames: int) -> tuple[np.ndarray, float]:
  """Share of its way a source has gone at each frame, and the seconds it is under way."""
  active_f = np.zeros(frames)
  for event in events:
    active_f[event.frame : event.frame + event.length + 3] = 1.0
  ease = np.hanning(11)[1:-1]
  eased_f = np.convolve(np.pad(active_f, 4, mode="edge"), ease / ease.sum(), mode="valid")
  gone_f = np.concatenate([[0.0], np.cumsum(eased_f)])[:frames]
  total = max(float(gone_f[-1]), 1.0)
  return gone_f / total, total / FPS


def _azimuths(rng: np.random.Generator, count: int) -> np.ndarray:
  """First azimuths, uniform over the picture; several sources start apart from each other."""
  while True:
    azimuth = rng.uniform(-58.0, 58.0, count)
    if count == 1 or np.diff(np.sort(azimuth)).min() > 25.0:
      return azimuth


def _path(rng: np.random.Generator, first: float, travel_s: float) -> float:
  """Last azimuth of a source: where it began, elsewhere in the picture, or out of the picture."""
  way = rng.choice(["still", "sweep", "leave"], p=[0.4, 0.45, 0.15])
  target = first
  if way == "sweep":
    target = float(rng.uniform(-58.0, 58.0))
  elif way == "leave":
    target = float(np.sign(first) * rng.uniform(66.0, 80.0))
  reach = MAX_SPEED_DEG_S * travel_s
  return first + float(np.clip(target - first, -reach, reach))


def _distances(rng: np.random.Generator, count: int, moving: bool) -> tuple[float, float]:
  near = NEAR_BY_COUNT_M[count]
  first = near * (FAR_M / near) ** rng.uniform()
  last = near * (FAR_M / near) ** rng.uniform()
  return (first, last) if moving and rng.uniform() < 0.5 else (first, first)


def _yaw(rng: np.random.Generator, frames: int) -> np.ndarray:
  """Camera turn: still in most clips, else one slow eased pan of at most 12 deg/s."""
  pans, size = rng.uniform() < 0.15, rng.uniform(8.0, 24.0) * rng.choice([-1.0, 1.0])
  if not pans:
    return np.zeros(frames)
  size = np.clip(size, -7.0 * frames / FPS, 7.0 * frames / FPS)
  return size * (0.5 - 0.5 * np.cos(np.pi * np.arange(frames) / max(frames - 1, 1)))


def draw(seed: np.random.SeedSequence, frames: int, classes: tuple[str, ...] = CLASSES) -> Plan:
  """Draws the plan of a clip of `frames` video frames from a seed sequence."""
  rng = np.random.Generator(np.random.PCG64(seed))
  count = min(int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])), len(classes))
  names = rng.choice(classes, size=count, replace=False)
  kinds = [next(kind for kind in KINDS if kind.name == name) for name in names]
  take_turns = count > 1 and rng.uniform() < 0.5
  spans = _turns(rng, frames, count) if take_turns else [_solo(rng, frames) for _ in kinds]
  yaw_f = _yaw(rng, frames)
  sources = []
  for kind, own, first in zip(kinds, spans, _azimuths(rng, count), strict=True):
    events = _events(rng, kind, own)
    if not events:  # A short clip ended before its turn came.
      continue
    progress_f, travel_s = _progress(events, frames)
    last = _path(rng, float(first), travel_s)
    near, far = _distances(rng, count, moving=last != first)
    sources.append(
      Source(
        kind=kind,
        events=tuple(events),
        # Around the middle of the pan, so that a panning camera keeps its sources in view.
        azimuth_f=first + (last - first) * progress_f - (yaw_f - yaw_f[-1] / 2),
        distance_f=near * (far / near) ** progress_f,
        height=float(rng.uniform(0.25, 0.6)),
        seed=seed.spawn(1)[0],
      )
    )
  return Plan(yaw_f=yaw_f, sources=tuple(sources))


def pixel_x(azimuth_f: np.ndarray) -> np.ndarray:
  """Image column of an azimuth, 0 left edge .. 1 right edge: azimuth = (0.5 - u) * 120 deg."""
  return 0.5 - azimuth_f / HFOV_DEG
