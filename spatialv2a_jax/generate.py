"""Video files -> binaural sound: decode, encode, sample, decode, write.

Files that are done already are left alone, several files share a batch, and one faulty file does
not stop the others.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import spatialv2a_jax
from spatialv2a_jax import io, localizers, logbook, report, worklist
from spatialv2a_jax.errors import DamagedAssetError, MissingAssetError, UserError
from spatialv2a_jax.feature_cache import open_cache
from spatialv2a_jax.generator import BATCH, Clip, Generator, Settings
from spatialv2a_jax.metrics.summary import spatial_cues
from spatialv2a_jax.sampler import clip_key
from spatialv2a_jax.windows import Window, length

GROUP = 32  # Windows that go through the networks together where only one network is held.
ONE_EAR = (
  "this network has one ear: both channels will be equal; "
  "`spatialv2a spatialize` places the sound where the picture moves, or along a track"
)


@dataclasses.dataclass
class Job:
  """One file on its way through the stages."""

  path: pathlib.Path
  seconds: float
  sha256: str
  windows: list[Window]
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


def targets(path: pathlib.Path, out: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the files that are made of a video, and may be there, by their suffix."""
  return {suffix: out / f"{path.stem}.{suffix}" for suffix in ("json", "wav", "flac", "mp4")}


def check_free(path: pathlib.Path, out: pathlib.Path) -> None:
  """Raises UserError if `out` holds files of that name that are not made of this video."""
  target = targets(path, out)
  about = read_sidecar(target["json"])
  other = next((found.name for found in target.values() if found.exists()), None)
  if other and (about is None or about.get("input") != path.name):
    raise UserError(
      f"{out} holds {other}, which was not made of {path.name}: choose another --out, or remove it"
    )


def write(model: Generator, job: Job, clip: Clip, out: pathlib.Path, settings: Settings) -> None:
  """Writes sound, video and, last of all, the whole sidecar of one file.

  Raises:
    UserError: the sound is not finite, or a file cannot be written.
  """
  if not np.isfinite(clip.audio_ep).all():
    raise UserError(f"{job.path}: the sound is not finite; lower --guidance and --spatial-guidance")
  rate = model.audio.sample_rate
  target = targets(job.path, out)
  about = sidecar(model, job, settings)
  _note(target["json"], about | {"outputs": {}})  # Whose the files are, if this ends half way.
  made = [path for suffix, path in target.items() if suffix != "json"]
  for path in made:
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
  about |= {
    "licences": model.licences(settings.localizer),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "descriptors": np.round(clip.descriptors_vk.astype(float), 4).tolist(),
    "heat": report.heat_strip(clip.heat_vyx / 255),
    "spatial": spatial_cues(clip.audio_ep, rate),
    "outputs": {path.name: io.file_hash(path) for path in made if path.is_file()},
    "wall_s": round(wall, 3),
    "rtf": round(wall / job.seconds, 3),
    "peak_memory_mb": peak_memory_mb(),
  }
  _note(target["json"], about)


def _note(path: pathlib.Path, about: Mapping[str, Any]) -> None:
  with io.atomic_path(path) as temporary:
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
  target = targets(job.path, out)
  wanted = (settings.format, "mp4") if settings.video else (settings.format,)
  names = {target[suffix].name for suffix in wanted}
  about = read_sidecar(target["json"])
  made = {} if about is None else about.get("outputs", {})
  if not about or not made.keys() >= names or not all((out / name).is_file() for name in made):
    return False
  if any(about.get(key) != value for key, value in sidecar(model, job, settings).items()):
    return False
  return all(io.file_hash(out / name) == digest for name, digest in made.items())


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
  failed: dict[pathlib.Path, UserError] = {}
  waiting: list[Job] = []

  def fail(path: pathlib.Path, error: UserError) -> None:
    if len(paths) == 1 or isinstance(error, (MissingAssetError, DamagedAssetError)):
      raise error
    failed[path] = error

  todo: list[tuple[pathlib.Path, float, list[int]]] = []
  for path in paths:
    try:
      seconds = length(path, settings.duration)
      todo.append((path, seconds, model.firsts(seconds)))
    except UserError as error:
      fail(path, error)
  alone = sum(len(firsts) == 1 for _, _, firsts in todo)
  rows = 1 if settings.low_memory else min(BATCH, 1 << max(0, alone - 1).bit_length())
  held = GROUP if settings.low_memory else rows

  def flush() -> None:
    """Takes the files that wait through the networks, one network after the other."""
    for some in [[stage] for stage in stages] if settings.low_memory else [stages]:
      for job in [*waiting]:
        try:
          model.look(job.path, job.seconds, job.windows, some, settings, job.sha256)
        except UserError as error:
          waiting.remove(job)
          fail(job.path, error)
          progress.advance(len(job.windows))
    sampled = sample_all(model, waiting, settings, rows, progress)
    pairs = zip(waiting, sampled, strict=True)
    mels = [model.mels([w.first for w in job.windows], z_etc) for job, z_etc in pairs]
    for job, mel_emn in zip(waiting, mels, strict=True):
      try:
        clip = model.sound(job.windows, mel_emn, job.seconds, settings.phase)
        write(model, job, clip, out, settings)
      except UserError as error:
        fail(job.path, error)
    waiting.clear()

  for licence, names in by_value(model.licences(settings.localizer)).items():
    print(f"licence of the weights ({', '.join(names)}): {licence}", file=sys.stderr)
  total = sum(len(firsts) for _, _, firsts in todo)
  with logbook.Progress(total, "generating", "window") as progress:
    model.report = progress.say
    for path, seconds, firsts in todo:
      try:
        windows = [Window(first, {}) for first in firsts]
        job = Job(path, seconds, io.file_hash(path), windows, time.monotonic())
        if finished(model, job, out, settings):
          progress.advance(len(windows))
        else:
          check_free(path, out)
          waiting.append(job)
      except UserError as error:
        fail(path, error)
        progress.advance(len(firsts))
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


def sample_all(
  model: Generator,
  jobs: Sequence[Job],
  settings: Settings,
  rows: int,
  progress: logbook.Progress,
) -> list[np.ndarray]:
  """Returns the latents [e, t, c] of several files, those of one window in batches of `rows`."""
  keys = [clip_key(settings.seed, job.sha256) for job in jobs]
  latents: dict[int, np.ndarray] = {}
  alone = [i for i, job in enumerate(jobs) if len(job.windows) == 1]
  for at in range(0, len(alone), rows):
    part = alone[at : at + rows]
    windows = [jobs[i].windows[0] for i in part]
    latents |= zip(
      part, model.sample(windows, [keys[i] for i in part], settings, rows), strict=True
    )
    progress.advance(len(part))
  for i, job in enumerate(jobs):
    if i not in latents:
      advance = whole(progress, len(job.windows))
      latents[i] = model.latents(job.windows, keys[i], settings, advance)
  return [latents[i] for i in range(len(jobs))]


def by_value(of: Mapping[str, str]) -> dict[str, list[str]]:
  """Returns the keys of each value."""
  return {value: [name for name in of if of[name] == value] for value in dict.fromkeys(of.values())}


def whole(progress: logbook.Progress, count: int) -> Callable[[float], None]:
  """Returns what takes shares of `count` units of work and counts those that are whole."""
  done, told = 0.0, 0

  def advance(share: float) -> None:
    nonlocal done, told
    done += share * count
    now = min(count, int(done + 1e-6))
    progress.advance(now - told)
    told = now

  return advance
