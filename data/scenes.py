"""Procedural scenes: clips of one to three visible, moving, sounding objects with exact truth.

A clip is determined by (seed, index), its length, size, rates and head, bit for bit, whether made
alone, in a range or by several processes. `<id>.mp4` is the video with its stereo sound,
`<id>.wav` the sound (float32), `<id>.json` the truth; the truth is written last and marks a
complete clip.

Sound level: a source one metre away peaks at 0.13 to 0.35 of full scale, by class, and falls as
1/distance; the diffuse tail of the room does not depend on distance. Nothing is normalised. Behind
everything is white noise at -114 dBFS, independent in the two ears. A source's `level_db` is that
of its direct sound, as the mean power of both ears.

Axes: f 25 fps video frame, y image row, x image column, o red, green, blue, e ear (0 left,
1 right), p sample, i source.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from scipy import signal

from data import scene_plan, scene_sounds, scene_visuals, workers
from data.scene_plan import CLASSES, FPS, HFOV_DEG
from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.spatial import hrtf as heads
from spatialv2a_jax.spatial import render

SILENT_DB = -120.0
_FLOOR_DB = -114.0  # of the ambient noise: inaudible, but not digital zero
_AUDIBLE_DB = -60.0  # a quieter source counts as silent
_SUFFIXES = (".mp4", ".wav", ".json")

Truth = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that a clip depends on besides its seed and index.

  Attributes:
    seconds: length, 1 to 60, a multiple of 0.04.
    sample_rate: samples per second, a multiple of 25.
    size: height and width of the picture in pixels, even, 32 or more.
    hrtf: "sphere" or "sofa:FILE".
    classes: sound classes to draw from.
    mirror: exchange left and right in picture, sound and truth.
  """

  seconds: float = 4.0
  sample_rate: int = 16_000
  size: tuple[int, int] = (96, 160)
  hrtf: str = "sphere"
  classes: tuple[str, ...] = CLASSES
  mirror: bool = False

  def __post_init__(self):
    """Refuses what cannot be drawn."""
    frames = self.seconds * FPS
    if not 1 <= self.seconds <= 60 or abs(frames - round(frames)) > 1e-6:
      raise UserError(f"--seconds {self.seconds:g}: give 1 to 60 seconds, a multiple of 0.04")
    if not 8_000 <= self.sample_rate <= 96_000 or self.sample_rate % FPS:
      raise UserError(f"--sample-rate {self.sample_rate}: give 8000 to 96000, a multiple of {FPS}")
    if any(side < 32 or side > 1080 or side % 2 for side in self.size):
      raise UserError(f"--size {self.size[0]}x{self.size[1]}: give even sides of 32 to 1080 pixels")
    unknown = sorted(set(self.classes) - set(CLASSES))
    if unknown or not self.classes:
      raise UserError(f"unknown sound classes {unknown}; choose from {', '.join(CLASSES)}")

  @property
  def frames(self) -> int:
    """Number of video frames."""
    return round(self.seconds * FPS)


@dataclasses.dataclass(frozen=True)
class Scene:
  """A clip: `frames` uint8 [f, y, x, 3], `audio` float32 [2, p] (left first), `truth` for JSON."""

  frames: np.ndarray
  audio: np.ndarray
  truth: Truth


def clip_id(seed: int, index: int, mirror: bool = False) -> str:
  """Name of a clip, without suffix."""
  return f"scene_{seed}_{index:06d}" + ("_m" if mirror else "")


def make(seed: int, index: int, seconds: float = 4.0, **settings: Any) -> Scene:
  """Makes one clip in memory.

  Args:
    seed: of the collection, 0 to 2^32 - 1.
    index: of the clip in the collection, 0 to 2^32 - 1.
    seconds: length.
    **settings: other fields of `Settings`.

  Raises:
    UserError: a setting out of its range, or a head that cannot be loaded.
  """
  return _make(seed, index, Settings(seconds=seconds, **settings))


def _make(seed: int, index: int, settings: Settings) -> Scene:
  for name, value in (("seed", seed), ("index", index)):
    if not 0 <= value < 2**32:
      raise UserError(f"{name} {value}: give 0 to 2^32 - 1")
  plan_seed, picture_seed, sound_seed = np.random.SeedSequence([seed, index]).spawn(3)
  plan = scene_plan.draw(plan_seed, settings.frames, settings.classes)
  picture_rng, sound_rng = (np.random.default_rng(s) for s in (picture_seed, sound_seed))
  frames = scene_visuals.draw(plan, picture_rng, settings.frames, settings.size)
  audio_ep, level_if, head = _sound(plan, sound_rng, settings)
  truth = {"id": clip_id(seed, index), "seed": seed, "index": index, "mirrored": False}
  truth |= _truth(plan, level_if, settings, head)
  scene = Scene(frames, audio_ep, truth)
  return mirror(scene) if settings.mirror else scene


def _sound(
  plan: scene_plan.Plan, rng: np.random.Generator, settings: Settings
) -> tuple[np.ndarray, np.ndarray, heads.Hrtf]:
  """Sound at the ears, level of each source's direct sound per frame in dBFS, and the head."""
  rate, samples = settings.sample_rate, settings.frames * settings.sample_rate // FPS
  head = heads.load(settings.hrtf, rate)
  room = render.Room(
    rt60_s=rng.uniform(0.15, 0.45), drr_db=rng.uniform(14.0, 24.0), seed=int(rng.integers(2**32))
  )
  times_f = np.arange(settings.frames) / FPS
  audio_ep = rng.standard_normal((2, samples), np.float32) * np.float32(10 ** (_FLOOR_DB / 20))
  dry_p = np.zeros(samples)
  level_if = []
  for source in plan.sources:
    mono_p = scene_sounds.synthesise(
      source.kind, source.events, np.random.default_rng(source.seed), rate, samples
    )
    still = np.ptp(source.azimuth_f) == 0
    heard_ep = render.binaural(
      mono_p,
      rate,
      float(source.azimuth_f[0]) if still else (times_f, source.azimuth_f),
      head,
      (times_f, source.distance_f),
    )
    energy_f = np.square(heard_ep).reshape(2, settings.frames, -1).mean((0, 2), dtype=np.float64)
    sounding_f = np.abs(mono_p).reshape(settings.frames, -1).max(1) > 0
    level_f = 10 * np.log10(np.maximum(energy_f, 1e-12))
    level_if.append(np.where(sounding_f & (level_f > _AUDIBLE_DB), level_f, SILENT_DB))
    audio_ep += heard_ep
    dry_p += mono_p
  # One tail for all: a diffuse field does not tell where its sources are.
  audio_ep += signal.oaconvolve(dry_p[None, :], room.tail(rate), axes=1)[:, :samples]
  return audio_ep.astype(np.float32), np.stack(level_if), head


def _truth(
  plan: scene_plan.Plan, level_if: np.ndarray, settings: Settings, head: heads.Hrtf
) -> Truth:
  """Everything known about the clip besides its name."""
  power_if = np.where(level_if > SILENT_DB, 10 ** (level_if / 10), 0.0)
  azimuth_if = np.stack([source.azimuth_f for source in plan.sources])
  total_f = power_if.sum(0)
  mean_f = (power_if * azimuth_if).sum(0) / np.maximum(total_f, 1e-30)
  sources = []
  for source, level_f in zip(plan.sources, level_if, strict=True):
    column_f = scene_plan.pixel_x(source.azimuth_f)
    sources.append(
      {
        "class": source.kind.name,
        "caption": source.kind.caption,
        "azimuth_deg": np.round(source.azimuth_f, 4).tolist(),
        "distance_m": np.round(source.distance_f, 4).tolist(),
        "level_db": np.round(level_f, 2).tolist(),
        "onsets_s": [event.frame / FPS for event in source.events],
        "visible": ((column_f >= 0) & (column_f <= 1)).tolist(),
        "pixel_x": np.round(column_f, 6).tolist(),
      }
    )
  return {
    "seconds": settings.frames / FPS,
    "fps": FPS,
    "size": list(settings.size),
    "sample_rate": settings.sample_rate,
    "hrtf": head.name,
    "hrtf_hash": head.hash,
    "caption": " and ".join(source["caption"] for source in sources),
    "labels": [source["class"] for source in sources],
    "camera": {
      "hfov_deg": HFOV_DEG,
      "law": "linear",
      "yaw_deg": np.round(plan.yaw_f, 4).tolist(),
    },
    "sources": sources,
    "azimuth_deg": [
      round(float(mean), 4) if total else None for mean, total in zip(mean_f, total_f, strict=True)
    ],
  }


def _negated(track: Sequence[float | None]) -> list[float | None]:
  return [None if value is None else 0.0 - value for value in track]  # 0.0 - 0.0 is no -0.0


def mirror_truth(truth: Truth) -> Truth:
  """Truth of the mirrored clip: angles negated, columns reflected, `mirrored` and id switched."""
  mirrored = not truth["mirrored"]
  return truth | {
    "id": clip_id(truth["seed"], truth["index"], mirrored),
    "mirrored": mirrored,
    "camera": truth["camera"] | {"yaw_deg": _negated(truth["camera"]["yaw_deg"])},
    "sources": [
      source
      | {
        "azimuth_deg": _negated(source["azimuth_deg"]),
        "pixel_x": [round(1.0 - column, 6) for column in source["pixel_x"]],
      }
      for source in truth["sources"]
    ],
    "azimuth_deg": _negated(truth["azimuth_deg"]),
  }


def mirror(scene: Scene) -> Scene:
  """The clip seen in a mirror: picture flipped, ears exchanged, truth to match."""
  frames = np.ascontiguousarray(scene.frames[:, :, ::-1])
  return Scene(frames, np.ascontiguousarray(scene.audio[::-1]), mirror_truth(scene.truth))


def write(scene: Scene, folder: pathlib.Path) -> None:
  """Writes the three files of a clip, each atomically, the truth last.

  Raises:
    UserError: the folder cannot be written.
  """
  stem = scene.truth["id"]
  rate = scene.truth["sample_rate"]
  for suffix in _SUFFIXES:
    io.remove_leftovers(folder / f"{stem}{suffix}")
  io.write_video(folder / f"{stem}.mp4", scene.frames, scene.truth["fps"], scene.audio, rate)
  io.write_audio(folder / f"{stem}.wav", scene.audio, rate)
  with io.atomic_path(folder / f"{stem}.json") as temporary:
    temporary.write_text(json.dumps(scene.truth, separators=(",", ":")) + "\n")


def is_complete(folder: pathlib.Path, seed: int, index: int, settings: Settings) -> bool:
  """Whether the files of a clip are there.

  Raises:
    UserError: they are there, but made with other settings.
  """
  stem = clip_id(seed, index, settings.mirror)
  if not all((folder / f"{stem}{suffix}").is_file() for suffix in _SUFFIXES):
    return False
  path = folder / f"{stem}.json"
  try:
    truth = json.loads(path.read_text())
    found = truth["seconds"], truth["sample_rate"], truth["size"], truth["hrtf_hash"]
  except (ValueError, KeyError, TypeError):
    raise UserError(f"{path} is no truth of a scene; remove it or choose another --out") from None
  head = heads.load(settings.hrtf, settings.sample_rate)
  if found != (settings.frames / FPS, settings.sample_rate, list(settings.size), head.hash):
    raise UserError(f"{path} was made with other settings; remove it or choose another --out")
  return True


def _make_and_write(folder: pathlib.Path, seed: int, settings: Settings, index: int) -> str:
  scene = _make(seed, index, settings)
  write(scene, folder)
  return scene.truth["id"]


def generate(
  folder: pathlib.Path, seed: int, indices: Sequence[int], settings: Settings, jobs: int = 1
) -> Iterator[str]:
  """Makes and writes clips, yielding the id of each as it is done (in any order).

  Args:
    folder: where the files go.
    seed: of the collection.
    indices: of the clips.
    settings: of all clips.
    jobs: worker processes; with 1 the work is done here.

  Raises:
    UserError: a bad setting, or the folder cannot be written.
  """
  work = functools.partial(_make_and_write, folder, seed, settings)
  if jobs == 1 or len(indices) < 2:
    yield from map(work, indices)
    return
  with concurrent.futures.ProcessPoolExecutor(
    min(jobs, len(indices)),
    mp_context=multiprocessing.get_context("spawn"),
    initializer=workers.end_with_parent,
  ) as pool:
    try:
      for done in concurrent.futures.as_completed([pool.submit(work, index) for index in indices]):
        yield done.result()
    except BrokenProcessPool as error:
      raise UserError("a worker process died, perhaps for lack of memory; lower --jobs") from error
    finally:  # After an error or an interrupt the clips not yet begun are dropped.
      pool.shutdown(wait=True, cancel_futures=True)
