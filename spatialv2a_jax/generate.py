"""Video files -> binaural sound: decode, encode, sample, decode, write.

Files that are done already are left alone, several files share a batch, and one faulty file does
not stop the others.
"""

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import spatialv2a_jax
from spatialv2a_jax import features, io, localizers, logbook, report, schema, worklist
from spatialv2a_jax.errors import DamagedAssetError, MissingAssetError, UserError
from spatialv2a_jax.feature_cache import open_cache
from spatialv2a_jax.generator import Clip, Generator, Settings
from spatialv2a_jax.metrics.summary import spatial_cues
from spatialv2a_jax.windows import Window

BATCH = 8  # Windows sampled at once.
GROUP = 32  # Windows that go through the networks together where only one network is held.
ONE_EAR = (
  "this network has one ear: both channels will be equal; "
  "`spatialv2a spatialize` places the sound where the picture moves, or along a track"
)
COUNT_SECONDS = 8.0  # Stretch of video that is held while frames are counted.


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
  localizer = settings.localizer or model.features.localizer
  kind, _, file = localizer.partition(":")
  return {
    "version": spatialv2a_jax.__version__,
    "checkpoint": model.folder.name,
    "weights_sha256": model.sha256(settings.localizer),
    "dtype": model.dtype,
    "ears": model.ears,
    "input": job.path.name,
    "input_sha256": job.sha256,
    "seed": settings.seed,
    "settings": dataclasses.asdict(settings) | {"low_memory": None},
    "prompt": settings.prompt,
    "localizer": localizer,
    "track_sha256": io.file_hash(file) if kind == "track" else None,
    "sound_sha256": io.file_hash(file) if kind == "acl" and file else None,
    "duration_s": job.seconds,
    "sample_rate": model.audio.sample_rate,
  }


def write(model: Generator, job: Job, clip: Clip, out: pathlib.Path, settings: Settings) -> None:
  """Writes sound, video and, last of all, the sidecar of one file.

  Raises:
    UserError: the sound is not finite, or a file cannot be written.
  """
  if not np.isfinite(clip.audio_ep).all():
    raise UserError(f"{job.path}: the sound is not finite; lower --guidance and --spatial-guidance")
  rate = model.audio.sample_rate
  target = {suffix: out / f"{job.path.stem}.{suffix}" for suffix in ("json", "wav", "flac", "mp4")}
  if read_sidecar(target["json"]) is not None:  # What it describes is replaced, so it goes first.
    for path in target.values():
      path.unlink(missing_ok=True)
  io.write_audio(target[settings.format], clip.audio_ep, rate)
  if settings.video:
    io.remux(
      job.path,
      clip.audio_ep,
      rate,
      target["mp4"],
      codec=settings.video_sound,
      duration=settings.duration,
    )
  wall = time.monotonic() - job.began
  about = sidecar(model, job, settings) | {
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "descriptors": np.round(clip.descriptors_vk.astype(float), 4).tolist(),
    "heat": report.heat_strip(clip.heat_vyx / 255),
    "spatial": spatial_cues(clip.audio_ep, rate),
    "wall_s": round(wall, 3),
    "rtf": round(wall / job.seconds, 3),
    "peak_memory_mb": peak_memory_mb(),
  }
  with io.atomic_path(target["json"]) as temporary:
    temporary.write_text(json.dumps(about, indent=1) + "\n")


def peak_memory_mb() -> int | None:
  """Returns the most memory this process has held, in MiB; None where the system does not say."""
  try:
    import resource
  except ImportError:  # Windows has no such module.
    return None
  unit = 1 if sys.platform == "darwin" else 1024  # Bytes there, KiB elsewhere.
  return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def finished(model: Generator, job: Job, out: pathlib.Path, settings: Settings) -> bool:
  """Whether `out` holds this file's sound already, made by the same model and settings."""
  names = [f"{job.path.stem}.{settings.format}"] + [f"{job.path.stem}.mp4"] * settings.video
  about = read_sidecar(out / f"{job.path.stem}.json")
  if about is None or not all((out / name).is_file() for name in names):
    return False
  return all(about.get(key) == value for key, value in sidecar(model, job, settings).items())


def read_sidecar(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns what `write` wrote, None if there is no such file."""
  try:
    about = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return about if isinstance(about, dict) and "weights_sha256" in about else None


def run(
  inputs: Sequence[str | pathlib.Path],
  checkpoint_dir: str | pathlib.Path,
  out: str | pathlib.Path,
  settings: Settings,
  *,
  parts: str | pathlib.Path | None = None,
  dtype: str | None = None,
  feature_cache: str | None = None,
) -> int:
  """Generates every file that `out` does not hold yet; returns the exit code.

  Args:
    inputs: files and folders.
    checkpoint_dir: model folder.
    out: folder of the outputs.
    settings: what to make.
    parts: model folder with the networks that the checkpoint lacks.
    dtype: of the matmuls; None is what the checkpoint says.
    feature_cache: folder of `feature_cache.open_cache`.

  Raises:
    UserError: for a fault of the inputs as a whole (see `worklist.collect`), of the model, of
      `out` or of the only file.
  """
  out = pathlib.Path(out)
  io.check_writable(out)
  paths = worklist.collect(inputs, out)
  if settings.localizer is not None and settings.localizer.partition(":")[0] != "acl":
    localizers.track_of(settings.localizer)
  cache = open_cache(feature_cache)
  model = Generator(
    checkpoint_dir, parts=parts, dtype=dtype, low_memory=settings.low_memory, cache=cache
  )
  if model.ears == 1:
    refuse_ears(settings)
    print(ONE_EAR, file=sys.stderr)
  if settings.guidance is None:
    settings = dataclasses.replace(settings, guidance=model.guidance)
  encoders = model.encoders(settings.localizer)
  for words in (settings.prompt, settings.negative):
    encoders.check_text(words)  # Before the first film goes through the encoders.
  stages = encoders.stages(settings.prompt)
  batched = len(paths) > 1 and not settings.low_memory
  rows = min(BATCH, 1 << (len(paths) - 1).bit_length()) if batched else 1
  held = GROUP if settings.low_memory else rows
  failed: dict[pathlib.Path, UserError] = {}
  waiting: list[Job] = []

  def fail(path: pathlib.Path, error: UserError) -> None:
    if len(paths) == 1 or isinstance(error, (MissingAssetError, DamagedAssetError)):
      raise error
    failed[path] = error
    progress.advance()

  def flush() -> None:
    """Takes the files that wait through the networks, one network after the other."""
    for some in [[stage] for stage in stages] if settings.low_memory else [stages]:
      for job in [*waiting]:
        try:
          model.look(job.path, job.seconds, job.windows, some, settings, job.sha256)
        except UserError as error:
          waiting.remove(job)
          fail(job.path, error)
    sample_all(model, waiting, settings, rows)
    mels = [model.mels([w.first for w in job.windows], job.latents) for job in waiting]
    for job, mel_emn in zip(waiting, mels, strict=True):
      try:
        clip = model.sound(job.windows, mel_emn, job.seconds, settings.phase)
        write(model, job, clip, out, settings)
      except UserError as error:
        fail(job.path, error)
      else:
        progress.advance()
    waiting.clear()

  with logbook.Progress(len(paths), "generating", "file") as progress:
    model.report = progress.say
    for path in paths:
      try:
        job = start(path, settings)
        if finished(model, job, out, settings):
          progress.advance()
          continue
        job.windows = [Window(first, {}) for first in model.firsts(job.seconds)]
        waiting.append(job)
      except UserError as error:
        fail(path, error)
      if sum(len(job.windows) for job in waiting) >= held:
        flush()
    flush()
  if settings.low_memory:
    model.weights.drop()
  in_order = {path: failed[path] for path in paths if path in failed}
  return worklist.conclude(len(paths), in_order, out)


def refuse_ears(settings: Settings) -> None:
  """UserError for settings that a network of one ear would pass over in silence."""
  flags = {
    "--spatial-guidance": settings.spatial_guidance is not None,
    "--phase independent": settings.phase != "shared",
    f"--localizer {settings.localizer}": settings.localizer not in (None, "motion"),
  }
  for flag, given in flags.items():
    if given:
      raise UserError(f"{flag} changes nothing: this network has one ear")


def start(path: pathlib.Path, settings: Settings) -> Job:
  """Looks at one file: how long it is and what it holds."""
  began = time.monotonic()
  seconds = io.probe(path).duration_s
  if not seconds:  # Recordings that were streamed may not say: count their frames.
    pieces = io.iter_views(path, features.views(), COUNT_SECONDS)
    seconds = sum(len(piece.frames["frames"]) for piece in pieces) / schema.SYNC_FPS
  seconds = min(seconds, settings.duration or math.inf)
  return Job(path, seconds, io.file_hash(path), [], [], began)


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
