"""The audit as one HTML file that needs nothing else: checks, statistics, and clips to listen to.

Axes: e ear, p audio sample, v frame at 8 fps, w window, n frame at 25 fps, y row, x column.
"""

import html
import io as memory
import math
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import soundfile

from data import audit, filters, funnel, stages
from spatialv2a_jax import io, localizers, report, schema, webpage
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import alignment, analysis

FPS, SIDE = 12.5, 200  # Of the embedded pictures.
# What to lay over a picture: its motion, a track, or nothing.
Seen = localizers.Track | Literal["motion", "unknown"]
_MARKS = {True: ("passed", "✓ passed"), False: ("failed", "✗ failed"), None: ("skipped", "skipped")}


def write(
  path: str | pathlib.Path,
  build: audit.Build,
  clips: audit.Clips,
  statistics: Sequence[Mapping[str, Any]],
  checks: Sequence[audit.Check],
  videos: pathlib.Path | None,
  *,
  seed: int,
  count: int,
) -> None:
  """Writes the page.

  Args:
    path: of the page.
    build: what was audited.
    clips: its records.
    statistics: from `audit.statistics`.
    checks: from `audit.checks`.
    videos: folder of the videos, for pictures and dropped clips; or None.
    seed: of the choice of clips.
    count: kept clips to show, and dropped ones.
  """
  rng = np.random.default_rng(seed)
  kept = _drawn(rng, range(len(clips.ids)), count)
  drops = build.funnel.get("clips", {})
  dropped = _drawn(rng, sorted(drops), count)
  localizer = build.manifest["config"]["localizer"]
  parts = {
    "title": html.escape(f"{build.folder.resolve().name}: audit"),
    "about": html.escape(
      f"{len(clips.ids)} clips in {len(build.manifest['shards'])} shards, splits"
      f" {', '.join(build.splits)}; clips below drawn with seed {seed}."
    ),
    "checks": _table(
      ("", "check", "found"),
      [(_MARKS[c.passed][0], (_MARKS[c.passed][1], c.name, c.found)) for c in checks],
    ),
    "statistics": _table(
      ("", "unit", "mean", "median", "5 %", "95 %", "undefined", "published"),
      [
        ("", (row["name"], row["unit"], *_cells(row), str(row["undefined"]), _of(row["published"])))
        for row in statistics
      ],
    ),
    "funnel": html.escape(funnel.table(build.funnel)) if build.funnel else "no funnel.json",
    "kept_title": f"{len(kept)} of {len(clips.ids)} kept clips",
    "dropped_title": f"{len(dropped)} of {len(drops)} dropped clips",
    "kept": "\n".join(
      _kept(record, build, _file(videos, record["video"]), localizer)
      for record in (build.record(clips.places[n]) for n in kept)
    ),
    "dropped": "\n".join(
      _dropped(name, drops[name], build, _file(videos, drops[name].get("video")), localizer)
      for name in dropped
    ),
  }
  template = pathlib.Path(__file__).with_name("audit.html").read_text(encoding="utf-8")
  with io.atomic_path(path) as temporary:
    pathlib.Path(temporary).write_text(webpage.fill(template, parts), encoding="utf-8")


def _kept(
  record: Mapping[str, Any], build: audit.Build, video: pathlib.Path | None, localizer: str
) -> str:
  audio_ep = schema.as_float32(record["audio"])
  facts = {name: record[name] for name in ("spatializer", "layout")} | {
    name: _of(value) for name, value in zip(stages.CUES, record["cues"], strict=True)
  }
  scores = zip(filters.AXES, record["aes"], strict=True)
  facts |= {axis: _of(score) for axis, score in scores if math.isfinite(score)}
  seen: Seen = "motion"  # What other localizers found is in the record.
  if not record["located"].any():
    seen = "unknown"
  elif localizer != "motion":
    times = (np.arange(len(record["azimuth"])) + 0.5) / schema.CLIP_FPS
    seen = localizers.Track(times, record["azimuth"])
  stage = _stage(video, audio_ep, build.rate, seen, audio_ep.shape[1] / build.rate)
  plot = _plot(build.sound(record), record["azimuth"])
  return _card(record["id"], record["caption"], stage + plot, facts)


def _dropped(
  name: str,
  drop: Mapping[str, str],
  build: audit.Build,
  video: pathlib.Path | None,
  localizer: str,
) -> str:
  facts = {"reason": drop["reason"], "stage": drop["stage"], "detail": drop["detail"]}
  stage = ""
  if video is not None:
    seconds = build.manifest["config"]["limits"]["seconds"]
    try:
      info = io.probe(video)
      audio_ep = io.read_audio(video, build.rate, duration=seconds)[:2] if info.has_audio else None
      if audio_ep is not None and len(audio_ep) == 2 and audio_ep.shape[1] >= analysis.N_FFT:
        values = zip(stages.CUES, stages.cues(audio_ep, build.rate), strict=True)
        facts |= {cue: _of(value) for cue, value in values}
      seen: Seen = "motion" if localizer == "motion" else "unknown"
      stage = _stage(video, audio_ep, build.rate, seen, seconds)
    except (UserError, ValueError) as error:  # What cannot be read was dropped for it.
      facts["player"] = f"none: {' '.join(str(error).split())[:120]}"
  return _card(name, "", stage, facts)


def _file(videos: pathlib.Path | None, name: str | None) -> pathlib.Path | None:
  """The file that a record or the funnel names; ids may differ from names, and names recur."""
  path = videos / name if videos and name else None
  return path if path and path.is_file() else None


def _card(name: str, caption: str, stage: str, facts: Mapping[str, Any]) -> str:
  rows = "".join(
    f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>"
    for key, value in facts.items()
  )
  title = f"{name} · {caption}" if caption else name
  return f'<article class="clip"><h3>{html.escape(title)}</h3>{stage}<dl>{rows}</dl></article>'


def _stage(
  video: pathlib.Path | None, audio_ep: np.ndarray | None, rate: int, seen: Seen, seconds: float
) -> str:
  """A player: the picture, small, with this sound and the heat maps over it; or the sound."""
  if video is None or not io.probe(video).has_video:
    if audio_ep is None:
      return ""
    sound = memory.BytesIO()
    soundfile.write(sound, np.clip(audio_ep, -1, 1).T, rate, format="FLAC", subtype="PCM_16")
    source = webpage.data_uri("audio/flac", sound.getvalue())
    return f'<audio controls preload="metadata" src="{source}"></audio>'
  with tempfile.TemporaryDirectory() as folder:
    small = pathlib.Path(folder) / "small.mp4"
    io.write_video(small, _frames(video, seconds), FPS, audio_ep, rate)
    picture = webpage.data_uri("video/mp4", small.read_bytes())
  heat = _heat(video, seconds, seen)
  canvas = ""
  if heat is not None:
    rows, columns = heat["size"]
    canvas = (
      f'<canvas width="{columns}" height="{rows}" data-frames="{heat["frames"]}"'
      f' data-strip="data:image/png;base64,{heat["png"]}"></canvas>'
    )
  return (
    f'<div class="stage"><video controls preload="metadata" src="{picture}"></video>{canvas}</div>'
  )


def _frames(video: pathlib.Path, seconds: float) -> Iterator[np.ndarray]:
  view = io.View(FPS, short_side=SIDE)
  windows = io.iter_views(video, {"view": view}, duration=seconds, window_s=2)
  return (frame for window in windows for frame in window.frames["view"])


def _heat(video: pathlib.Path, seconds: float, seen: Seen) -> dict[str, Any] | None:
  """Where the build saw the sound; None if unknown, or for a picture too short to tell."""
  frames = io.read_video(video, schema.SYNC_FPS, localizers.FRAME_SIZE, duration=seconds)
  count = len(frames) * schema.CLIP_FPS // schema.SYNC_FPS
  if len(frames) < 2 or not count or seen == "unknown":
    return None
  if isinstance(seen, localizers.Track):
    return report.heat_strip(seen.heat(count))
  motion_nyx = localizers.residual_motion(frames.astype(np.float32) / 255)
  return report.heat_strip(localizers.motion_heat(motion_nyx, count))


def _plot(audio_ep: np.ndarray, azimuth_v: np.ndarray) -> str:
  """Direction over time, 90 degrees left at the top: the rendered track, and what is heard."""
  seconds = audio_ep.shape[1] / analysis.RATE
  track = " ".join(
    f"{100 * (v + 0.5) / schema.CLIP_FPS / seconds:.2f},{_height(azimuth)}"
    for v, azimuth in enumerate(azimuth_v)
  )
  dots = ""
  if audio_ep.shape[1] >= alignment.WINDOW:
    heard = alignment.listen(analysis.analyse(audio_ep))
    middle_w = np.arange(len(heard.active_w)) * alignment.WINDOW_HOP + alignment.WINDOW / 2
    at_w = 100 * middle_w / analysis.RATE / seconds
    dots = "".join(
      f'<circle class="heard" cx="{at:.2f}" cy="{_height(azimuth)}" r=".7"/>'
      for at, azimuth, active in zip(at_w, heard.azimuth_ild_w, heard.active_w, strict=True)
      if active and math.isfinite(azimuth)
    )
  return (
    '<svg viewBox="0 0 100 36" role="img" aria-label="direction over time">'
    f'<polyline class="seen" fill="none" stroke-width=".6" points="{track}"/>{dots}'
    '<line class="head" x1="0" x2="0" y1="0" y2="36" stroke-width=".3"/></svg>'
  )


def _height(azimuth_deg: float) -> str:
  return f"{18 - float(azimuth_deg) / 5:.2f}"


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
  def cells(tag: str, values: Sequence[str]) -> str:
    return "".join(
      f"<{tag}{' class=number' if _is_number(value) else ''}>{html.escape(value)}</{tag}>"
      for value in values
    )

  body = "".join(f'<tr class="{kind}">{cells("td", values)}</tr>' for kind, values in rows)
  return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True


def _cells(row: Mapping[str, Any]) -> list[str]:
  return [_of(row[name]) for name in ("mean", "median", "low", "high")]


def _of(value: float | None) -> str:
  return "-" if value is None else f"{float(value):.3g}"


def _drawn(rng: np.random.Generator, names: Sequence[Any], count: int) -> list[Any]:
  places = rng.choice(len(names), min(count, len(names)), replace=False)
  return [names[place] for place in sorted(places.tolist())]
