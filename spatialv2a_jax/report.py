"""One HTML page of generated clips, their scores and the training run; needs no network to read.

The page holds everything it shows: players, spectrograms, and curves of direction over time against
the truth where it is known. Only videos too large and sound too long to embed are linked by
relative path.
Conventions: left is up in every plot, ear 0 is left, azimuth, ILD and ITD are positive on the left.

Axes: e ear, p sample, v 8 fps video frame, y heat-map row, x heat-map column, w analysis window.
"""

import base64
import dataclasses
import html
import importlib.resources
import io as memory
import json
import math
import os
import pathlib
import tempfile
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import soundfile
import soxr
from PIL import Image

from spatialv2a_jax import __version__, io, logbook, report_run, webpage
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import alignment, analysis, evaluate
from spatialv2a_jax.metrics.summary import CUES

EMBED_BYTES = 3_000_000  # A larger video is shrunk, or linked if that is not enough.
EMBED_SECONDS = 60.0  # Longer sound is linked.
HALF_VIEW_DEG = 60.0  # Azimuth at the edges of the picture: linear law, 120 degrees wide.
_HEAT_SIDE = 24
_SOUNDS = (".wav", ".flac")


@dataclasses.dataclass(frozen=True)
class _Folders:
  """Where things that belong to a clip may lie."""

  clips: pathlib.Path
  ref: pathlib.Path | None
  truth: pathlib.Path | None
  page: pathlib.Path


def write_report(
  folder: str | os.PathLike,
  out_html: str | os.PathLike,
  ref: str | os.PathLike | None = None,
  truth: str | os.PathLike | None = None,
  scores: str | os.PathLike | None = None,
) -> dict[pathlib.Path, UserError]:
  """Writes one page about a folder of clips, a training workdir, or a folder that holds both.

  Args:
    folder: `<stem>.wav|flac` beside `<stem>.json` (and `<stem>.mp4`), in it or in its `generated/`;
      or a workdir with `metrics.jsonl`, in it or in its `runs/flow/`, as of `launch.demo`.
    out_html: page to write, atomically.
    ref: folder with reference sound `<stem>.wav|flac|mp4`, for the A/B switch.
    truth: folder with scene truth `<stem>.json`; scenes are their own truth.
    scores: file written by `evaluate`; else `scores.json` in `folder` or beside it.

  Returns:
    The sidecars of clips that cannot be shown, and why.

  Raises:
    UserError: a folder or file is missing or not what it should be, or there is nothing to show.
  """
  folder, page = pathlib.Path(folder), pathlib.Path(out_html)
  for name, path in (("folder", folder), ("--ref", ref), ("--truth", truth)):
    if path is not None and not pathlib.Path(path).is_dir():
      raise UserError(f"report: {name} {path} is not a folder")
  if scores is None:
    near = [folder / "scores.json", folder.parent / "scores.json"]
    scores = next((path for path in near if path.is_file()), None)
  places = [folder, folder / "generated"]
  clips_at = next((place for place in places if _sidecars(place)), folder)
  folders = _Folders(
    clips_at, pathlib.Path(ref) if ref else None, pathlib.Path(truth) if truth else None, page
  )
  clips, failed = [], {}
  for sidecar in _sidecars(clips_at):
    try:
      clips.append(_clip(sidecar, folders))
    except UserError as error:
      failed[sidecar] = error
  if failed and not clips:
    raise next(iter(failed.values()))
  runs = (report_run.read(place) for place in (folder, folder / "runs" / "flow"))
  run = next((found for found in runs if found), None)
  if not clips and not run:
    raise UserError(
      f"report: {folder} holds neither clips (<stem>.wav beside <stem>.json) nor a training run "
      f"({logbook.METRICS})"
    )
  name = folder.resolve().name
  payload = {
    "name": name,
    "version": __version__,
    "halfView": HALF_VIEW_DEG,
    "clips": clips,
    "scores": _scores(pathlib.Path(scores)) if scores and clips else None,
    "run": run,
  }
  with io.atomic_path(page) as temporary:
    temporary.write_text(_page(f"{name}: binaural report", payload), encoding="utf-8")
  return failed


def heat_strip(heat_vyx: np.ndarray, fps: float = 8.0) -> dict[str, Any]:
  """Packs heat maps for a sidecar's `heat`: one small grey PNG, frames side by side.

  Args:
    heat_vyx: heat in [0, 1], frame 0 at time 0.
    fps: frames per second.

  Returns:
    {"fps", "frames", "size": [rows, columns], "png": base64}, at most 24 pixels a side.
  """
  heat_vyx = np.nan_to_num(np.asarray(heat_vyx, np.float32))
  rows, columns = (min(_HEAT_SIDE, side) for side in heat_vyx.shape[1:])
  tiles = [
    np.asarray(Image.fromarray(heat).resize((columns, rows), Image.Resampling.BOX))
    for heat in heat_vyx
  ]
  strip = np.rint(np.clip(np.concatenate(tiles, 1), 0, 1) * 255).astype(np.uint8)
  png = base64.b64encode(_png(strip)).decode()
  return {"fps": fps, "frames": len(tiles), "size": [rows, columns], "png": png}


def _page(title: str, payload: Mapping[str, Any]) -> str:
  files = importlib.resources.files("spatialv2a_jax")
  parts = {
    "title": html.escape(title),
    "style": files.joinpath("report_style.css").read_text(encoding="utf-8"),
    "script": "".join(
      files.joinpath(name).read_text(encoding="utf-8")
      for name in ("report_script.js", "report_run.js")
    ),
    "data": json.dumps(payload, allow_nan=False).replace("<", "\\u003c"),
  }
  return webpage.fill(files.joinpath("report_template.html").read_text(encoding="utf-8"), parts)


def _json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
  except (OSError, ValueError) as error:
    raise UserError(f"report: cannot read {path}: {error}") from None


def _sidecars(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(
    path for path in folder.glob("*.json") if any(path.with_suffix(s).is_file() for s in _SOUNDS)
  )


def _find(folder: pathlib.Path | None, stem: str, suffixes: Sequence[str]) -> pathlib.Path | None:
  paths = (folder / f"{stem}{suffix}" for suffix in suffixes) if folder else ()
  return next((path for path in paths if path.is_file()), None)


def _clip(sidecar: pathlib.Path, folders: _Folders) -> dict[str, Any]:
  info = _json(sidecar)
  if not isinstance(info, dict):
    raise UserError(f"report: {sidecar} is not a sidecar (a JSON object)")
  stem = sidecar.stem
  sound = _find(sidecar.parent, stem, _SOUNDS)
  assert sound is not None  # `_sidecars` has seen it.
  video = _find(sidecar.parent, stem, (".mp4",))
  heard = {"generated": sound}
  if ref := _find(folders.ref, stem, (*_SOUNDS, ".mp4")):
    heard["reference"] = ref
  tracks, curves, mono = [], {}, []
  for name, path in heard.items():
    audio_ep, rate = _stereo(path), io.probe(path).audio_rate or analysis.RATE
    short = audio_ep.shape[1] <= EMBED_SECONDS * rate
    image = webpage.data_uri("image/png", _png(logbook.spectrogram_image(audio_ep, rate)))
    audio = _flac(audio_ep, rate) if short else _link(path, folders.page)
    if name == "generated":
      if short:  # What is left without ears: the plainest baseline to listen to.
        mono = [{"name": "mono", "audio": _flac(audio_ep.mean(0, keepdims=True), rate)}]
      if video:
        audio = None  # The video carries the generated sound.
    tracks.append({"name": name, "spectrogram": image, "audio": audio})
    curves[name] = _curves(soxr.resample(audio_ep.T, rate, analysis.RATE, quality="VHQ").T)
  known = _truth(info, stem, sidecar, folders)
  spatial = info.get("spatial") or {}
  return {
    "id": stem,
    "caption": info.get("prompt") or info.get("caption") or "",
    "seconds": io.probe(sound).duration_s,
    "video": _video(video, folders.page) if video else None,
    "tracks": [*tracks, *mono],
    "curves": curves,
    "truth": known,
    "seen": _seen(info.get("descriptors") or []),
    "heat": _heat(info),
    "summary": {key: spatial.get(key) for key in CUES},
    "facts": {
      key: value
      for key, value in info.items()
      if isinstance(value, str | int | float | dict | bool)
      and key not in ("heat", "spatial", "camera")
    },
  }


def _stereo(path: pathlib.Path) -> np.ndarray:
  audio_ep = io.read_audio(path)
  if audio_ep.shape[0] > 2:
    raise UserError(f"report: {path} has {audio_ep.shape[0]} channels, two are needed")
  return np.broadcast_to(audio_ep, (2, audio_ep.shape[1]))


def _curves(audio_ep: np.ndarray) -> dict[str, Any] | None:
  """Level and time difference and the direction that the levels tell, per 256 ms window."""
  audio_ep = np.broadcast_to(audio_ep[:2], (2, audio_ep.shape[1]))
  if audio_ep.shape[1] < alignment.WINDOW:
    return None
  heard = alignment.listen_along(audio_ep)
  tracks = {
    "ild": (heard.ild_db_w, 2),
    "itd": (heard.itd_us_w, 0),
    "azimuth": (heard.azimuth_ild_w, 1),
  }
  return {
    "start": alignment.WINDOW / 2 / analysis.RATE,
    "step": alignment.WINDOW_HOP / analysis.RATE,
    **{key: _numbers(np.where(heard.active_w, x, np.nan), n) for key, (x, n) in tracks.items()},
  }


def _numbers(values: np.ndarray | Sequence[float], digits: int) -> list[float | None]:
  return [round(float(x), digits) if math.isfinite(x) else None for x in np.asarray(values, float)]


def _truth(
  info: Mapping[str, Any], stem: str, sidecar: pathlib.Path, folders: _Folders
) -> dict[str, Any] | None:
  """The true azimuth over time, from the truth folder or a scene's own JSON."""
  path = _find(folders.truth, stem, (".json",))
  if path is None and "sources" in info:
    path = sidecar
  if path is None:
    return None
  found = alignment.read_truth(path)
  return {"fps": found.fps, "azimuth": _numbers(found.azimuth_v, 1)}


def _seen(descriptors: Sequence[Sequence[float]]) -> dict[str, Any] | None:
  """Direction and half width that the descriptors tell, in picture units and degrees."""
  if not descriptors:
    return None
  place_v, area_v, spread_v, _, shape_v = np.asarray(descriptors, np.float64).T
  valid_v = area_v > 0
  # S_var and S_shape give back the horizontal variance; a uniform bar of half width h has h^2.
  half_v = np.sqrt(np.maximum(spread_v * (1 + shape_v), 0))
  return {
    "fps": 8.0,
    "place": _numbers(np.where(valid_v, place_v, np.nan), 3),
    "half": _numbers(half_v, 3),
    "azimuth": _numbers(np.where(valid_v, -HALF_VIEW_DEG * place_v, np.nan), 1),
  }


def _heat(info: Mapping[str, Any]) -> dict[str, Any] | None:
  strip = info.get("heat")
  if not isinstance(strip, Mapping) or "png" not in strip:
    return None
  return {**strip, "png": f"data:image/png;base64,{strip['png']}"}


def _video(path: pathlib.Path, page: pathlib.Path) -> str:
  """A data URI of the video, shrunk if it is large, or else a relative link."""
  if path.stat().st_size <= EMBED_BYTES:
    return webpage.data_uri("video/mp4", path.read_bytes())
  info = io.probe(path)
  if info.duration_s > EMBED_SECONDS:
    return _link(path, page)
  fps = min(info.fps or 15.0, 15.0)
  view = io.View(fps, short_side=min(240, info.height or 240, info.width or 240))
  with tempfile.TemporaryDirectory() as folder:
    small = pathlib.Path(folder) / "small.mp4"
    windows = io.iter_views(path, {"view": view}, window_s=2)
    frames = (frame for window in windows for frame in window.frames["view"])
    sound = io.read_audio(path) if info.has_audio else None
    io.write_video(small, frames, fps, sound, info.audio_rate)
    if small.stat().st_size <= EMBED_BYTES:
      return webpage.data_uri("video/mp4", small.read_bytes())
  return _link(path, page)


def _link(path: pathlib.Path, page: pathlib.Path) -> str:
  return urllib.parse.quote(os.path.relpath(path.resolve(), page.resolve().parent))


def _flac(audio_ep: np.ndarray, rate: int) -> str:
  buffer = memory.BytesIO()
  soundfile.write(buffer, np.clip(audio_ep, -1, 1).T, rate, format="FLAC", subtype="PCM_16")
  return webpage.data_uri("audio/flac", buffer.getvalue())


def _png(pixels: np.ndarray) -> bytes:
  buffer = memory.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
  return buffer.getvalue()


def _scores(path: pathlib.Path) -> dict[str, Any]:
  scores = _json(path)
  if not isinstance(scores, dict) or not isinstance(scores.get("metrics"), dict):
    raise UserError(f"report: {path} holds no scores (a JSON object with `metrics`)")
  names = list(scores.get("baselines", {}))
  rows = [
    {
      "name": name,
      "headline": name in evaluate.HEADLINES,
      **{key: one.get(key) for key in ("value", "ci95", "n", "undefined", "unit", "better")},
      "rivals": [scores["baselines"][rival].get(name, {}).get("value") for rival in names],
    }
    for name, one in scores["metrics"].items()
  ]
  place = {name: i for i, name in enumerate(evaluate.HEADLINES)}
  rows.sort(key=lambda row: place.get(row["name"], len(place)))
  dropped = [f"{one.get('id')}: {one.get('reason')}" for one in scores.get("dropped", [])]
  return {"rivals": names, "rows": rows, "dropped": dropped}
