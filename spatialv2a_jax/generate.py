"""Video files -> binaural sound: decode, encode, sample, decode, write.

Files that are done already are left alone, several files share a batch, and one faulty file does
not stop the others.
"""

import dataclasses
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import soxr

import spatialv2a_jax
from spatialv2a_jax import features, io, logbook, report, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.generator import Clip, Generator, Settings, Window
from spatialv2a_jax.metrics import analysis
from spatialv2a_jax.metrics import spatial as spatial_metrics

BATCH = 8  # Windows sampled at once.
CUES = ("ild_clip_db", "itd_xc_clip_us", "iacc_clip")


@dataclasses.dataclass
class Job:
  """One file on its way through the stages."""

  path: pathlib.Path
  seconds: float
  sha256: str
  windows: list[Window]
  latents: list[np.ndarray]
  began: float


def sidecar(model: Generator, job: Job, settings: Settings) -> dict[str, Any]:
  """Returns what determines the sound of a file; the rest of the sidecar is measured."""
  return {
    "version": spatialv2a_jax.__version__,
    "checkpoint": model.folder.name,
    "weights_sha256": model.model.sha256,
    "input": job.path.name,
    "input_sha256": job.sha256,
    "seed": settings.seed,
    "settings": dataclasses.asdict(settings) | {"low_memory": None},
    "prompt": settings.prompt,
    "localizer": settings.localizer or model.features.localizer,
    "duration_s": job.seconds,
    "sample_rate": model.audio.sample_rate,
  }


def write(model: Generator, job: Job, clip: Clip, out: pathlib.Path, settings: Settings) -> None:
  """Writes sound, video and, last of all, the sidecar of one file."""
  rate, stem = model.audio.sample_rate, out / job.path.stem
  io.write_audio(stem.with_name(f"{stem.name}.{settings.format}"), clip.audio_ep, rate)
  if settings.video:
    io.remux(job.path, clip.audio_ep, rate, stem.with_name(f"{stem.name}.mp4"))
  wall = time.monotonic() - job.began
  about = sidecar(model, job, settings) | {
    "descriptors": np.round(clip.descriptors_vk.astype(float), 4).tolist(),
    "heat": report.heat_strip(clip.heat_vyx / 255),
    "spatial": spatial_cues(clip.audio_ep, rate),
    "wall_s": round(wall, 3),
    "rtf": round(wall / job.seconds, 3),
    "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
  }
  with io.atomic_path(stem.with_name(f"{stem.name}.json")) as temporary:
    pathlib.Path(temporary).write_text(json.dumps(about, indent=1) + "\n")


def spatial_cues(audio_ep: np.ndarray, rate: int) -> dict[str, float | None]:
  """Returns level and time difference and coherence of a clip; None where undefined."""
  at_rate = soxr.resample(audio_ep.T, rate, analysis.RATE, quality="VHQ").T
  values = spatial_metrics.metrics(analysis.analyse(at_rate))
  return {name: None if math.isnan(values[name]) else round(values[name], 3) for name in CUES}


def collect(inputs: Sequence[str | pathlib.Path]) -> list[pathlib.Path]:
  """Returns the video files of files and folders, in order.

  Raises:
    UserError: for a missing path, a folder without video, or two files of one stem.
  """
  paths: list[pathlib.Path] = []
  for item in map(pathlib.Path, inputs):
    paths += io.list_media(item) if item.is_dir() else [item]
  seen: dict[str, pathlib.Path] = {}
  for path in paths:
    if path.stem in seen:
      raise UserError(f"{path} and {seen[path.stem]} would both write {path.stem}.wav; rename one")
    seen[path.stem] = path
  return paths


def finished(model: Generator, job: Job, out: pathlib.Path, settings: Settings) -> bool:
  """Whether `out` holds this file's sound already, made by the same model and settings."""
  stem = out / job.path.stem
  names = [f"{stem}.json", f"{stem}.{settings.format}"] + [f"{stem}.mp4"] * settings.video
  if not all(pathlib.Path(name).is_file() for name in names):
    return False
  try:
    about = json.loads(pathlib.Path(names[0]).read_text())
  except ValueError:
    return False
  return all(about.get(key) == value for key, value in sidecar(model, job, settings).items())


def run(
  inputs: Sequence[str | pathlib.Path],
  checkpoint_dir: str | pathlib.Path,
  out: str | pathlib.Path,
  settings: Settings,
) -> int:
  """Generates every file that `out` does not hold yet; returns the exit code.

  Raises:
    UserError: if there is nothing to do, `out` cannot be written, or the only file is faulty.
  """
  out = pathlib.Path(out)
  io.check_writable(out)
  paths = collect(inputs)
  model = Generator(checkpoint_dir)
  if settings.localizer is not None and settings.localizer.startswith("track:"):
    features.read_track(settings.localizer.removeprefix("track:"))
  failed: list[tuple[pathlib.Path, UserError]] = []
  rows = 1
  if not settings.low_memory:
    rows = min(BATCH, 1 << (len(paths) - 1).bit_length()) if len(paths) > 1 else 1

  waiting: list[Job] = []
  with logbook.Progress(len(paths), "generating", "file") as progress:
    for index, path in enumerate(paths):
      try:
        job = start(model, path, settings)
        if finished(model, job, out, settings):
          progress.advance()
          continue
        job.windows = list(model.windows(path, job.seconds, settings))
        waiting.append(job)
      except UserError as error:
        if len(paths) == 1:
          raise
        failed.append((path, error))
        progress.advance()
      ready = sum(len(job.windows) for job in waiting) >= rows or index == len(paths) - 1
      if waiting and ready:
        sample_all(model, waiting, settings, rows)
        for job in waiting:
          clip = model.clip(job.windows, job.latents, job.seconds, settings.phase)
          write(model, job, clip, out, settings)
          progress.advance()
        waiting = []
  for path, error in failed:
    print(f"failed: {path}: {error}", file=sys.stderr)
  print(f"{len(paths) - len(failed)} of {len(paths)} files are in {out}")
  return 4 if failed else 0


def start(model: Generator, path: pathlib.Path, settings: Settings) -> Job:
  """Looks at one file: how long it is and what it holds."""
  info = io.probe(path)
  seconds = min(info.duration_s, settings.duration or math.inf)
  return Job(path, seconds, io.file_hash(path), [], [], time.monotonic())


def sample_all(model: Generator, jobs: Sequence[Job], settings: Settings, rows: int) -> None:
  """Samples the windows of several files in batches of `rows`."""
  work = [(job, window) for job in jobs for window in job.windows]
  key = jax.random.fold_in(jax.random.key(settings.seed), schema.clip_id("noise"))
  for at in range(0, len(work), rows):
    part = work[at : at + rows]
    keys = [jax.random.fold_in(key, int(job.sha256[:8], 16)) for job, _ in part]
    latents = model.sample([window for _, window in part], keys, settings, rows)
    for (job, _), x_etc in zip(part, latents, strict=True):
      job.latents.append(x_etc)
