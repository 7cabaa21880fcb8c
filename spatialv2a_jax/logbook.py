"""What a run leaves behind while it works: progress lines, `metrics.jsonl`, TensorBoard events.

Axes: e ear (0 left, 1 right), p sample, f frequency bin, n analysis frame, y image row, x column.
"""

import contextlib
import json
import numbers
import os
import pathlib
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress
import scipy

from spatialv2a_jax.io import atomic_path

METRICS = "metrics.jsonl"
_PLAIN_SECONDS = 5.0
_EVENTS = "events-of-a-run"  # Names `_EventFile` to tensorboardX, before the path.


class Progress:
  """A bar with rate and time left on a terminal, a plain line every few seconds elsewhere.

  Use as a context manager; lines go to standard error, so that standard output stays clean.
  """

  def __init__(self, total: int, what: str, unit: str = "step", start: int = 0, file=None):
    """Starts at `start` of `total` units of work named `what`."""
    self.total, self.what, self.unit, self.done, self.first = total, what, unit, start, start
    self.began = self.printed = time.monotonic()
    self.file = file or sys.stderr
    self.bar = self.task = None
    console = rich.console.Console(file=self.file)
    if console.is_terminal:
      self.bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        rich.progress.TimeRemainingColumn(),
        console=console,
      )
      self.task = self.bar.add_task(what, total=total, completed=start, note="")

  def __enter__(self) -> "Progress":
    if self.bar:
      self.bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self.bar:
      self.bar.stop()
    elif self.done > self.first:
      self._print("")

  @property
  def rate(self) -> float:
    """Units per second since the start."""
    return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

  def advance(self, count: int = 1, **values: float) -> None:
    """Counts finished units; `values` such as a loss are shown beside the rate."""
    self.done += count
    note = f"{self.rate:.3g} {self.unit}/s " + " ".join(f"{k} {v:.4g}" for k, v in values.items())
    if self.bar and self.task is not None:
      self.bar.update(self.task, completed=self.done, note=note)
    elif time.monotonic() - self.printed >= _PLAIN_SECONDS:
      self._print(note)

  def say(self, line: str) -> None:
    """Prints a line above the bar."""
    if self.bar:
      self.bar.console.print(line, highlight=False, markup=False)
    else:
      print(line, file=self.file, flush=True)

  def _print(self, note: str) -> None:
    self.printed = time.monotonic()
    left = (self.total - self.done) / max(self.rate, 1e-9)
    end = f"done in {self.printed - self.began:.0f} s" if left <= 0 else f"{left:.0f} s left"
    line = (
      f"{self.what}: {self.done}/{self.total} {note or f'{self.rate:.3g} {self.unit}/s'}, {end}"
    )
    print(" ".join(line.split()).replace(" ,", ","), file=self.file, flush=True)


class Logbook:
  """The written record of a run in its workdir.

  `metrics.jsonl` gets one object per logged step and is the record; TensorBoard events repeat it
  for people. Opening a logbook at a resumed step drops what an earlier attempt wrote from that
  step on, so a run that was killed and resumed reads like one that was not. Several processes may
  construct it; only the one with `writer=True` touches the disk.
  """

  def __init__(self, workdir: str | os.PathLike, step: int = 0, writer: bool = True):
    """Opens `workdir`, keeping rows with a step smaller than `step`, the next step to be logged."""
    self.path = pathlib.Path(workdir) / METRICS
    self.file = self.events = None
    if not writer:
      return
    rows = [row for row in read_metrics(workdir) if row["step"] < step]
    with atomic_path(self.path) as temporary:
      temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    self.file = open(self.path, "a", encoding="utf-8")
    from tensorboardX import SummaryWriter  # Slow to import, and only the writer needs it.
    from tensorboardX.record_writer import register_writer_factory

    files = types.SimpleNamespace(open=_EventFile, directory_check=lambda folder: None)
    register_writer_factory(_EVENTS, files)
    self.events = SummaryWriter(f"{_EVENTS}:{workdir}", purge_step=step if step else None)

  def __enter__(self) -> "Logbook":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one row; values become floats, not-a-number becomes null."""
    if self.file is None or self.events is None:
      return
    row = {name: float(value) for name, value in values.items()}
    clean = {name: value if np.isfinite(value) else None for name, value in row.items()}
    self.file.write(json.dumps({"step": int(step), **clean}) + "\n")
    self.file.flush()
    for name, value in clean.items():
      if value is not None:
        self.events.add_scalar(name, value, int(step))

  def audio(self, step: int, name: str, audio_ep: np.ndarray, sample_rate: int) -> None:
    """Adds a stereo player and the paired spectrograms of float [2, p] sound."""
    if self.events is None:
      return
    sound_pe = np.clip(np.asarray(audio_ep, np.float32), -1, 1).T
    self.events.add_audio(name, sound_pe, int(step), sample_rate=sample_rate)
    self.image(step, f"{name}/spectrogram", spectrogram_image(audio_ep, sample_rate))

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    """Adds a uint8 [y, x, 3] picture."""
    if self.events is not None:
      self.events.add_image(name, pixels, int(step), dataformats="HWC")

  def sync(self) -> None:
    """Waits until `metrics.jsonl` is on disk: a checkpoint must not outlive what led to it."""
    if self.file is not None:
      os.fsync(self.file.fileno())

  def close(self) -> None:
    """Flushes and closes both records."""
    file, events = self.file, self.events
    self.file = self.events = None
    if events is not None:
      events.close()
    if file is not None:
      file.close()


class _EventFile:
  """A file of TensorBoard events; where it cannot be written it ends, with a line.

  An error would end the thread that writes, and the run would then wait for it.
  """

  def __init__(self, path: str):
    """Opens the path, before which stands `_EVENTS`."""
    self.path, self.file = path.removeprefix(f"{_EVENTS}:"), None
    try:
      self.file = open(self.path, "wb", buffering=0)  # A kill must not take what was logged.
    except OSError as error:
      self._end(error)

  def write(self, data: bytes) -> None:
    self._do("write", data)

  def flush(self) -> None:
    self._do("flush")

  def close(self) -> None:
    self._do("close")

  def _do(self, what: str, *values: bytes) -> None:
    try:
      if self.file is not None:
        getattr(self.file, what)(*values)
    except OSError as error:
      self._end(error)

  def _end(self, error: OSError) -> None:
    file, self.file = self.file, None
    print(
      f"{self.path} ends here ({error.strerror}); {METRICS} is the record and goes on",
      file=sys.stderr,
      flush=True,
    )
    if file is not None:
      with contextlib.suppress(OSError):  # It would write what it still holds.
        file.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a workdir's `metrics.jsonl` in order, without lines that a crash cut or garbled."""
  path = pathlib.Path(workdir) / METRICS
  rows = []
  if path.is_file():
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue
      if isinstance(row, dict) and isinstance(row.get("step"), numbers.Integral):
        rows.append(row)
  return rows


# Black, violet, red, orange, pale yellow; blue, white, red. Colours at even steps of [0, 1].
_HEAT = np.array(
  [[4, 4, 16], [64, 20, 96], [150, 40, 100], [226, 92, 50], [250, 176, 60], [252, 250, 200]]
)
_SIDES = np.array([[198, 62, 40], [240, 160, 130], [245, 245, 245], [130, 175, 235], [30, 90, 190]])


def colours(values: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Looks values in [0, 1] up in a table of RGB colours, interpolating: uint8 [..., 3]."""
  place = np.clip(np.nan_to_num(values), 0, 1) * (len(table) - 1)
  channels = [np.interp(place, np.arange(len(table)), table[:, c]) for c in range(3)]
  return np.rint(np.stack(channels, -1)).astype(np.uint8)


def spectrogram_image(
  audio_ep: np.ndarray,
  sample_rate: int,
  height: int = 96,
  width: int = 480,
  floor_db: float = -80.0,
) -> np.ndarray:
  """Paired spectrograms of both ears and their difference, one above the other.

  Top: left ear; middle: right ear, both from `floor_db` to the loudest point of the pair; bottom:
  level difference left minus right within 20 dB, blue where the left ear is louder and red where
  the right one is, fading to white where both are near the floor. Frequency runs up linearly from
  0 to half the sample rate, time to the right.

  Args:
    audio_ep: float [2, p].
    sample_rate: samples per second.
    height: rows of each of the three panels.
    width: columns.
    floor_db: lowest level shown, relative to the loudest point.

  Returns:
    uint8 [3 height + 8, width, 3].
  """
  audio_ep = np.asarray(audio_ep, np.float32)
  samples = audio_ep.shape[1]
  window = int(min(1024, max(16, samples)))
  if samples > width * window // 2:  # Only the columns that are shown: sound may last an hour.
    start_x = np.linspace(0, samples - window, width).astype(int)
    frame_exp = audio_ep[:, start_x[:, None] + np.arange(window)[None]]
    hann_p = np.asarray(scipy.signal.get_window("hann", window), np.float32)
    spectrum = np.fft.rfft(frame_exp * (hann_p / hann_p.sum())).swapaxes(1, 2)
  else:
    hop = max(1, samples // width)
    _, _, spectrum = scipy.signal.stft(audio_ep, sample_rate, nperseg=window, noverlap=window - hop)
  # A row shows the strongest of its bins, so that a pure tone never falls between two rows.
  edges = np.linspace(0, spectrum.shape[1], height, endpoint=False).astype(int)
  columns = np.linspace(0, spectrum.shape[2] - 1, width).round().astype(int)
  strongest_eyx = np.maximum.reduceat(np.abs(spectrum), edges, axis=1)[:, ::-1, columns]
  level_eyx = 20 * np.log10(strongest_eyx + 1e-9)
  top = max(float(level_eyx.max()), -120.0)
  shade_eyx = np.clip((level_eyx - top - floor_db) / -floor_db, 0, 1)
  loud_yx = np.clip(shade_eyx.max(0) * 2, 0, 1)
  side_yx = np.clip((level_eyx[0] - level_eyx[1]) / 40, -0.5, 0.5) * loud_yx + 0.5
  gap = np.full((4, width, 3), 128, np.uint8)
  panels = [colours(shade_eyx[0], _HEAT), gap, colours(shade_eyx[1], _HEAT), gap]
  return np.concatenate([*panels, colours(side_yx, _SIDES)])
