"""Scores a folder of binaural sound against references and visible truth, and writes one JSON file.

Clips pair by file stem: prediction `<stem>.wav|flac|mp4`, reference likewise (its sound), truth
`<stem>.json`. All sound is read at 16 kHz. Beside the predictions stand the numbers without which
they mean nothing: `dual_mono` (their mid signal in both ears), `swapped_ears`, `shuffled` (each
with the reference and truth of another clip: chance), `reference` (the real sound in place of
the prediction) and any folder the caller names. Nothing leaves the count silently: files that
cannot be scored are listed in `dropped` with a reason, undefined values are null and counted.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spatialv2a_jax import io, logbook
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import alignment, distances, embeddings, spatial, stats
from spatialv2a_jax.metrics import analysis as an
from spatialv2a_jax.metrics.stats import Metric, Parts

PREDICTION = "prediction"
BUILT_IN = ("dual_mono", "swapped_ears", "shuffled", "reference")
SUFFIXES = (".wav", ".flac", ".mp4")  # In this order where a stem has several.
MIN_SAMPLES = 4096  # One alignment window, 256 ms.
UNEQUAL_S = 0.05
HEADLINES = (
  "sign_agreement",
  "azimuth_pearson_r",
  "azimuth_mae_deg",
  "sign_agreement_itd",
  "window_coverage",
  "onset_error_ms",
  "onset_f1",
  "onset_false_alarms",
  "iacc_clip",
  "ild_frame_db",
  "itd_phat_frame_us",
  "ipd_100_1500_w_rad",
  "isd_l1",
  "side_energy_ratio",
  "ild_error_frame_db",
  "stft_distance",
)


@dataclasses.dataclass(frozen=True)
class Job:
  """Files of one clip: prediction, reference, truth, and the prediction's rivals by name."""

  stem: str
  pred: pathlib.Path
  ref: pathlib.Path
  truth: pathlib.Path | None
  rivals: Mapping[str, pathlib.Path | None]


@dataclasses.dataclass(frozen=True)
class Scored:
  """One clip that could be scored: parts of every metric, and what other pairings need."""

  job: Job
  seconds: float
  parts: Mapping[str, Parts]
  heard: alignment.Heard
  cues: distances.Cues
  ref_cues: distances.Cues | None
  truth: alignment.Truth | None
  notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dropped:
  """One clip that could not be scored."""

  stem: str
  file: str | None
  reason: str


def run(
  pred: str | os.PathLike,
  ref: str | os.PathLike,
  truth: str | os.PathLike | None,
  out: str | os.PathLike,
  baselines: Mapping[str, str | os.PathLike] | None = None,
  jobs: int = 1,
  echo: Callable[[str], Any] = print,
  embedded: Mapping[str, str | os.PathLike] | None = None,
) -> dict[str, Any]:
  """Scores all clips, writes `out`, and prints counts and a table.

  Args:
    pred: folder of predictions, two channels each.
    ref: folder of references, sound or video. Where one has no stereo sound, only comparisons with
      it are undefined.
    truth: folder of scene truth; None leaves the alignment metrics out.
    out: JSON file, written atomically.
    baselines: further folders to score in the same way, by name.
    jobs: processes. The result does not depend on it.
    echo: what prints a line.
    embedded: files of features, for `embeddings.score`, by the name of what made them.

  Returns:
    What was written: `metrics`, `baselines`, `clips`, `dropped`, `counts`, `settings`.

  Raises:
    UserError: no such folder, no media in it, no common stem, no clip that can be scored, or `out`
      cannot be written.
  """
  baselines = dict(baselines or {})
  if clash := set(baselines) & {PREDICTION, *BUILT_IN}:
    raise UserError(f"baseline name {sorted(clash)[0]!r} is built in; choose another")
  features = {name: embeddings.score(path) for name, path in (embedded or {}).items()}
  paired, dropped, counts = _pair(pred, ref, truth, baselines)
  with io.atomic_path(out) as temporary:
    done = _map(score, paired, jobs, "scoring")
    scored = [one for one in done if isinstance(one, Scored)]
    faults = [one for one in done if isinstance(one, Dropped)]
    dropped += faults
    dropped.sort(key=lambda one: one.stem)
    counts |= {"used": len(scored), "dropped": len(dropped)}
    for line in _count_lines(counts, dropped):
      echo(line)
    if not scored:
      worst = faults[0]
      raise UserError(f"none of {len(paired)} clips can be scored; {worst.stem}: {worst.reason}")
    shuffled = _shuffled(scored, jobs)
    metrics = spatial.METRICS | distances.METRICS | (alignment.METRICS if truth else {})
    result = _collect(scored, shuffled, metrics, list(baselines))
    result["dropped"] = [
      {"id": one.stem, "file": one.file, "reason": one.reason} for one in dropped
    ]
    result["counts"] = counts
    result["embeddings"] = features
    result["settings"] = {
      "pred": os.fspath(pred),
      "ref": os.fspath(ref),
      "truth": os.fspath(truth) if truth else None,
      "baselines": {name: os.fspath(folder) for name, folder in baselines.items()},
      "set_sha256": set_digest(ref, truth),
      "sample_rate": an.RATE,
      "bootstrap": {"draws": stats.DRAWS, "seed": stats.SEED, "unit": "clip"},
    }
    with open(temporary, "w", encoding="utf-8") as file:
      json.dump(result, file, indent=1, allow_nan=False)
  echo(markdown(result))
  for name, found in features.items():
    echo(embeddings.line(name, found))
  return result


def set_digest(ref: str | os.PathLike, truth: str | os.PathLike | None) -> str:
  """SHA-256 of the set of clips that predictions are scored against: stems, references, truths.

  Scores of two models may be compared where it is the same.
  """
  digest = hashlib.sha256()
  for stem, path in sorted(_by_stem(ref).items()):
    seen = None if truth is None else pathlib.Path(truth) / f"{stem}.json"
    known = io.file_hash(seen) if seen and seen.is_file() else "-"
    digest.update(f"{stem}\0{io.file_hash(path)}\0{known}\n".encode(errors="surrogateescape"))
  return digest.hexdigest()


def score(job: Job) -> Scored | Dropped:
  """Scores one clip; a prediction or reference that cannot be used gives the reason instead."""
  try:
    pred_ep = _stereo(job.pred)
  except UserError as error:
    return Dropped(job.stem, job.pred.name, str(error))
  notes: list[str] = []
  ref_ep, ref_clip, ref_cues, truth = None, None, None, None
  try:
    if _has_two_channels(job.ref):
      ref_ep = _stereo(job.ref)
  except UserError as error:
    return Dropped(job.stem, job.ref.name, f"reference: {error}")
  if ref_ep is None:
    notes.append("reference without stereo sound: not compared")
  else:
    ref_clip = an.analyse(ref_ep)
    ref_cues = distances.cues(ref_clip)
    gap = (pred_ep.shape[1] - ref_ep.shape[1]) / an.RATE
    if abs(gap) > UNEQUAL_S:
      notes.append(f"prediction is {gap:+.2f} s longer than reference")
  if job.truth is not None:
    try:
      truth = alignment.read_truth(job.truth)
    except UserError as error:
      notes.append(str(error) if job.truth.exists() else "no truth: alignment not scored")

  def against(audio_ep, clip):
    heard, cues = alignment.listen(clip), distances.cues(clip)
    values = spatial.metrics(clip) | distances.nothing()
    if ref_ep is not None and ref_cues is not None:
      values |= distances.wave_distances(audio_ep, ref_ep) | distances.cue_errors(cues, ref_cues)
    aligned = alignment.agreement(heard, truth) if truth else alignment.unknown()
    return _means(values) | aligned, heard, cues

  parts = {}
  parts[PREDICTION], heard, cues = against(pred_ep, an.analyse(pred_ep))
  middle_ep = np.repeat(pred_ep.mean(0, keepdims=True), 2, axis=0)
  parts["dual_mono"] = against(middle_ep, an.analyse(middle_ep))[0]
  parts["swapped_ears"] = against(pred_ep[::-1], an.analyse(pred_ep[::-1]))[0]
  parts["reference"] = _undefined()
  if ref_ep is not None and ref_clip is not None:
    parts["reference"] = against(ref_ep, ref_clip)[0]
  for name, path in job.rivals.items():
    try:
      if path is None:
        raise UserError("no file for this clip")
      rival_ep = _stereo(path)
      parts[name] = against(rival_ep, an.analyse(rival_ep))[0]
    except UserError as error:
      notes.append(f"baseline {name}: {error}")
      parts[name] = _undefined()
  seconds = pred_ep.shape[1] / an.RATE
  return Scored(job, seconds, parts, heard, cues, ref_cues, truth, tuple(notes))


def markdown(result: Mapping[str, Any], names: Sequence[str] = HEADLINES) -> str:
  """Returns a table: one metric a row, the prediction with its interval, then each baseline."""
  rivals = list(result["baselines"])
  rows = [["metric", "unit", "better", "prediction", "95 % interval", "n", "undefined", *rivals]]
  for name in names:
    if name not in result["metrics"]:
      continue
    one = result["metrics"][name]
    low, high = (_short(x) for x in one["ci95"])
    rows.append([name, one["unit"], one["better"], _short(one["value"]), f"{low} .. {high}"])
    rows[-1] += [str(one["n"]), str(one["undefined"])]
    rows[-1] += [_short(result["baselines"][rival][name]["value"]) for rival in rivals]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
  lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
  return "\n".join(lines)


def _pair(
  pred: str | os.PathLike,
  ref: str | os.PathLike,
  truth: str | os.PathLike | None,
  baselines: Mapping[str, str | os.PathLike],
) -> tuple[list[Job], list[Dropped], dict[str, int]]:
  preds, refs = _by_stem(pred), _by_stem(ref)
  rivals = {name: _by_stem(folder) for name, folder in baselines.items()}
  common = sorted(preds.keys() & refs.keys())
  if not common:
    raise UserError(f"{pred} and {ref} have no file stem in common; pair clips by name")
  truths: dict[str, pathlib.Path | None] = dict.fromkeys(common)
  if truth is not None:
    truths = {stem: pathlib.Path(truth) / f"{stem}.json" for stem in common}
    if not any(path and path.is_file() for path in truths.values()):
      raise UserError(f"{truth} holds no truth <stem>.json of any clip, e.g. {common[0]}.json")
  jobs = [
    Job(stem, preds[stem], refs[stem], truths[stem], {n: f.get(stem) for n, f in rivals.items()})
    for stem in common
  ]
  dropped = [Dropped(s, refs[s].name, "no prediction") for s in refs.keys() - preds.keys()]
  dropped += [Dropped(s, preds[s].name, "no reference") for s in preds.keys() - refs.keys()]
  return jobs, dropped, {"expected": len(refs), "found": len(preds)}


def _by_stem(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
  if pathlib.Path(folder).is_file():
    raise UserError(f"{folder} is a file; give the folder that holds the clips")
  found: dict[str, pathlib.Path] = {}
  for path in io.list_media(folder, SUFFIXES):
    held = found.setdefault(path.stem, path)
    if SUFFIXES.index(path.suffix.lower()) < SUFFIXES.index(held.suffix.lower()):
      found[path.stem] = path
  return found


def _has_two_channels(path: pathlib.Path) -> bool:
  return io.probe(path).audio_channels == 2


def _stereo(path: pathlib.Path) -> np.ndarray:
  """Reads two channels at 16 kHz; UserError with the reason where that is not possible."""
  audio_ep = io.read_audio(path, an.RATE)
  channels, samples = audio_ep.shape
  if channels != 2:
    kind = "mono file" if channels == 1 else f"{channels} channels"
    raise UserError(f"{kind}: two ears are needed")
  if samples < MIN_SAMPLES:
    raise UserError(f"too short: {samples / an.RATE:.3f} s, at least 0.256 s are needed")
  if not np.isfinite(audio_ep).all():
    raise UserError("samples that are not finite")
  return audio_ep


def _means(values: Mapping[str, float]) -> dict[str, np.ndarray]:
  return {name: np.array([value], np.float64) for name, value in values.items()}


def _undefined() -> dict[str, np.ndarray]:
  nothing = dict.fromkeys(spatial.METRICS, np.nan) | distances.nothing()
  return _means(nothing) | alignment.unknown()


def _shuffled(scored: Sequence[Scored], jobs: int) -> list[Parts]:
  """Parts of each prediction against the reference and truth of another clip."""
  if len(scored) < 2:
    return [_undefined() for _ in scored]
  others = [scored[i] for i in stats.derangement(len(scored))]
  pairs = [
    (one.job.pred, other.job.ref if other.ref_cues else None)
    for one, other in zip(scored, others, strict=True)
  ]
  parts = []
  for one, other, waves in zip(
    scored, others, _map(_wave_pair, pairs, jobs, "scoring shuffled pairs"), strict=True
  ):
    values = dict(waves)
    if other.ref_cues:
      values |= distances.cue_errors(one.cues, other.ref_cues)
    known = other.truth is not None
    aligned = alignment.agreement(one.heard, other.truth) if known else alignment.unknown()
    own = {name: one.parts[PREDICTION][name] for name in spatial.METRICS}
    parts.append(own | _means(distances.nothing() | values) | aligned)
  return parts


def _wave_pair(pair: tuple[pathlib.Path, pathlib.Path | None]) -> dict[str, float]:
  pred, ref = pair
  return distances.wave_distances(_stereo(pred), _stereo(ref)) if ref else {}


def _collect(
  scored: Sequence[Scored],
  shuffled: Sequence[Parts],
  metrics: Mapping[str, Metric],
  rivals: Sequence[str],
) -> dict[str, Any]:
  counts_bn = stats.draws(len(scored))
  sets = {name: [one.parts[name] for one in scored] for name in scored[0].parts}
  sets["shuffled"] = list(shuffled)

  def summaries(rows: Sequence[Parts]) -> dict[str, dict]:
    return {
      name: stats.summary(metric, [row[name] for row in rows], counts_bn)
      for name, metric in metrics.items()
    }

  own = sets[PREDICTION]
  value_n = {name: stats.per_clip(m, [row[name] for row in own]) for name, m in metrics.items()}
  clips = [
    {
      "id": one.job.stem,
      "seconds": one.seconds,
      "pred": one.job.pred.name,
      "ref": one.job.ref.name if one.ref_cues else None,
      "truth": one.job.truth.name if one.truth and one.job.truth else None,
      "notes": list(one.notes),
      "metrics": {name: stats.number(values[i]) for name, values in value_n.items()},
    }
    for i, one in enumerate(scored)
  ]
  named = {name: summaries(sets[name]) for name in (*BUILT_IN, *rivals)}
  return {"metrics": summaries(own), "baselines": named, "clips": clips}


def _map(work: Callable, items: Sequence, jobs: int, what: str) -> list:
  """Maps in order, over processes that start afresh: a forked JAX would hang."""
  workers, done = min(jobs, len(items)), []
  with contextlib.ExitStack() as stack:
    results = map(work, items)
    if workers > 1:
      context = multiprocessing.get_context("spawn")
      pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
      results = stack.enter_context(pool).map(work, items)
    progress = stack.enter_context(logbook.Progress(len(items), what, "clip"))
    for one in results:
      done.append(one)
      progress.advance()
  return done


def _count_lines(counts: Mapping[str, int], dropped: Sequence[Dropped]) -> Iterator[str]:
  yield " ".join(f"{name} {count}" for name, count in counts.items())
  for one in dropped:
    yield f"dropped {one.stem}: {one.reason}"


def _short(value: float | None) -> str:
  return "-" if value is None else f"{value:.4g}"
