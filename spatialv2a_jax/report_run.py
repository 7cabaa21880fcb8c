"""What the report shows of a training run: curves, where the time went, what happened, its sound.

Everything is read from the working directory: `metrics.jsonl`, `config.json`, `checkpoints/`,
`averages/`, `faults/` and the sound of the newest evaluation in the TensorBoard events. What a run
has not (yet) left behind is left out.
"""

import json
import math
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spatialv2a_jax import goodput, logbook, webpage
from spatialv2a_jax.errors import UserError

POINTS = 1500  # Per curve; more are averaged.
Rows = Sequence[Mapping[str, Any]]

# Title, unit, metrics, whether the axis begins at 0.
_FIGURES = (
  ("Loss, both ears and each ear", "", ("loss", "loss/left", "loss/right"), False),
  (
    "Held-out loss of the averaged weights",
    "",
    ("eval/loss", "eval/loss/left", "eval/loss/right"),
    False,
  ),
  ("Gradient norm", "", ("grad_norm",), False),
  ("Learning rate", "", ("lr",), True),
  ("Clips per second", "", ("clips_per_s",), True),
  ("Tokens per second", "", ("tokens_per_s",), True),
  ("Share of time waiting for data", "", ("data_wait",), True),
  ("Share of the devices' peak FLOP/s", "", ("mfu",), True),
  ("Memory in use at most", "GiB", ("memory/device_peak_gib", "memory/host_peak_gib"), True),
  ("Share of all time spent in steps", "", ("goodput",), True),
)
_BEGIN = "begin"  # In place of a media type.
_SHOWN = {name for _, _, names, _ in _FIGURES for name in names}
# Said elsewhere on the page, or nothing to draw.
_APART = re.compile(r"step|time|goodput/.*|memory/device_gib|checkpoint_age_s")


def read(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns what the page needs of a working directory; None if it is none.

  Raises:
    UserError: if a file of it cannot be read.
  """
  rows = logbook.read_metrics(folder)
  if not rows:
    return None
  config = _json(folder / "config.json")
  names = {name for row in rows for name in row} - _SHOWN
  rest = sorted(name for name in names if not _APART.fullmatch(name))
  return {
    "figures": [f for figure in _FIGURES if (f := _figure(rows, *figure))],
    "more": [
      f for name in rest if (f := _figure(rows, name.replace("_", " "), "", (name,), False))
    ],
    "summary": _summary(folder, rows, config or {}),
    "goodput": _goodput(rows),
    "checkpoints": _steps(folder / "checkpoints"),
    "skipped": _skipped(folder / "faults"),
    "sounds": _sounds(folder),
    "config": config,
  }


def _figure(
  rows: Rows, title: str, unit: str, names: Sequence[str], zero: bool
) -> dict[str, Any] | None:
  if not any(sum(_number(row.get(name)) for row in rows) > 1 for name in names):
    return None  # A point is no curve.
  series = {name: _series(rows, name) for name in names if any(name in row for row in rows)}
  return {"title": title, "unit": unit, "series": series, "zero": zero}


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _series(rows: Rows, name: str) -> dict[str, list]:
  """Steps and values, averaged in groups where there are too many to draw."""
  pairs = [(row["step"], row[name]) for row in rows if _number(row.get(name))]
  group = max(1, math.ceil(len(pairs) / POINTS))
  parts = [pairs[i : i + group] for i in range(0, len(pairs), group)]
  return {
    "x": [part[-1][0] for part in parts],
    "y": [float(f"{np.mean([y for _, y in part]):.6g}") for part in parts],
  }


def _summary(folder: pathlib.Path, rows: Rows, config: Mapping[str, Any]) -> dict[str, str]:
  """Facts of the run as text, in the order in which they are shown."""
  step, steps = max(row["step"] for row in rows), config.get("steps")
  done = (folder / "model" / "config.json").is_file() and step >= (steps or 0)
  state = "finished" if done else "not finished"
  facts = {"Step": f"{step:,} of {steps:,}, {state}" if isinstance(steps, int) else f"{step:,}"}

  def last(name):
    return next((row[name] for row in reversed(rows) if _number(row.get(name))), None)

  if (loss := last("loss")) is not None:
    facts["Loss"] = f"{loss:.4g}"
  held_out = [(row["eval/loss"], row["step"]) for row in rows if _number(row.get("eval/loss"))]
  if held_out:
    best, at = min(held_out)
    facts["Held-out loss"] = f"{held_out[-1][0]:.4g}; best {best:.4g} at step {at:,}"
  speed = [row["clips_per_s"] for row in rows if _number(row.get("clips_per_s"))]
  if speed:
    tokens = [row["tokens_per_s"] for row in rows if _number(row.get("tokens_per_s"))]
    text = f", {np.median(tokens):,.0f} tokens/s" if tokens else ""
    facts["Speed"] = f"{np.median(speed):.4g} clips/s in the median{text}"
  if (share := last("goodput")) is not None:
    facts["Goodput"] = f"{100 * share:.1f} % of {_duration(last('goodput/wall_s') or 0)}"
  if (count := last("skipped")) is not None:
    facts["Updates left out"] = f"{count:,.0f}"
  if (count := last("bad_records")) is not None:
    facts["Damaged records"] = f"{count:,.0f}"
  if saved := _steps(folder / "checkpoints"):
    facts["Checkpoints"] = f"{len(saved)}, the newest of step {saved[-1]:,}"
  if saved := _steps(folder / "averages"):
    facts["Snapshots of averages"] = f"{len(saved)}, up to step {saved[-1]:,}"
  return facts


def _goodput(rows: Rows) -> list[dict[str, Any]]:
  """Seconds of each phase by the newest ledger, as `goodput.Ledger.row` writes it."""
  for row in reversed(rows):
    phases = [(phase, row.get(f"goodput/{phase}_s")) for phase in goodput.PHASES]
    if any(_number(value) for _, value in phases):
      parts = [(phase, float(value)) for phase, value in phases if value and _number(value)]
      return [{"phase": phase, "seconds": seconds} for phase, seconds in parts]
  return []


def _steps(folder: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints: what is being written has a longer name."""
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _skipped(folder: pathlib.Path) -> list[dict[str, Any]]:
  found = [_json(path) or {} for path in sorted(folder.glob("step-*.json"))]
  return [{"step": one.get("step"), "reason": one.get("reason", "")} for one in found]


def _sounds(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Sound and spectrograms of the newest evaluation that TensorBoard was given."""
  newest: dict[str, tuple[int, str]] = {}
  end = math.inf  # What an attempt wrote from the step on at which a later one began is void.
  for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
    began, here = end, {}
    for step, tag, kind, data in _events(path):
      if kind == _BEGIN:
        began = min(began, step)
      elif step < end:
        tag = re.sub(r"[^-/\w.]", "_", tag)  # As tensorboardX does to those of pictures alone.
        if tag not in here or here[tag][0] <= step:
          here[tag] = step, webpage.data_uri(kind, data)
    for tag, found in here.items():  # Of what two attempts made at one step, that of the later.
      if tag not in newest or newest[tag][0] < found[0]:
        newest[tag] = found
    end = began
  heard = {tag: value for tag, value in newest.items() if value[1].startswith("data:audio")}
  last = max((step for step, _ in heard.values()), default=0)
  # What is written once, such as the truth to compare with, stays beside what is new.
  clips = {tag.rpartition("/")[0] for tag, (step, _) in heard.items() if step == last}
  return [
    {
      "name": tag.replace("/", ", ").replace("_", " "),
      "step": step,
      "audio": audio,
      "spectrogram": newest.get(f"{tag}/spectrogram", (0, None))[1],
    }
    for tag, (step, audio) in sorted(heard.items())
    if tag.rpartition("/")[0] in clips
  ]


def _events(path: pathlib.Path) -> Iterator[tuple[int, str, str, bytes]]:
  """Yields step, tag, media type and bytes of the sound and pictures in an event file.

  Of type `_BEGIN` is the step from which on the file replaces what files before it hold.
  """
  # Slow to import, and only runs with sound need them.
  from google.protobuf.message import DecodeError
  from tensorboardX.proto import event_pb2

  with path.open("rb") as file:
    while len(head := file.read(12)) == 12:
      (size,) = struct.unpack("<Q", head[:8])
      if size + 4 > path.stat().st_size - file.tell():
        return  # Cut short by a crash, or damaged.
      try:
        event = event_pb2.Event.FromString(file.read(size + 4)[:size])  # pyright: ignore[reportAttributeAccessIssue]
      except DecodeError:
        return
      if event.HasField("session_log") and event.session_log.status == event.session_log.START:
        yield event.step, "", _BEGIN, b""
      for value in event.summary.value:
        if value.HasField("audio"):
          yield event.step, value.tag, "audio/wav", value.audio.encoded_audio_string
        elif value.HasField("image"):
          yield event.step, value.tag, "image/png", value.image.encoded_image_string


def _json(path: pathlib.Path) -> Any:
  if not path.is_file():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
  except (OSError, ValueError) as error:
    raise UserError(f"report: cannot read {path}: {error}") from None


def _duration(seconds: float) -> str:
  for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
    if seconds >= 2 * unit:
      return f"{seconds / unit:.1f} {name}"
  return f"{seconds:.0f} s"
