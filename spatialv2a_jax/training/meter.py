"""What a step costs and yields: means of its metrics, rates, utilisation, memory."""

import dataclasses
import math
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax

# Dense bfloat16 FLOP/s of one device, as the vendors publish them, by JAX's name of its kind. Names
# of NVIDIA GPUs say more, such as "NVIDIA H100 80GB HBM3": a word of them does where the whole name
# is not in the table.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "A100": 312e12,
  "H100": 989e12,
  "H200": 989e12,
  "B200": 2250e12,
  "GB200": 2500e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200 NVL": 835e12,
}


@dataclasses.dataclass
class Meter:
  """Sums of the metrics since the last line of the log, over the updates that were not skipped.

  They are part of a checkpoint: a run that is stopped between two lines and goes on writes the
  same next line as one that was not stopped.
  """

  sums: dict[str, float] = dataclasses.field(default_factory=dict)
  steps: int = 0

  def add(self, values: Mapping[str, float]) -> None:
    """Adds the metrics of one step."""
    self.steps += 1
    for name, value in values.items():
      self.sums[name] = self.sums.get(name, 0.0) + value

  def means(self) -> dict[str, float]:
    """Returns the mean of each metric."""
    return {name: value / max(self.steps, 1) for name, value in self.sums.items()}

  def state(self) -> dict[str, Any]:
    """Returns what a checkpoint keeps."""
    return {"sums": dict(self.sums), "steps": self.steps}


def peak_flops(kind: str | None = None) -> float | None:
  """Returns the bfloat16 FLOP/s of one device of a kind; None if it is not in the tables.

  Args:
    kind: as JAX calls it; that of this machine by default.
  """
  kind = jax.devices()[0].device_kind if kind is None else kind
  if " MIG " in kind:  # A part of a device.
    return None
  words = [kind, *(word.partition("-")[0] for word in kind.split() if kind.startswith("NVIDIA"))]
  return next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)


def mfu(flops_per_clip: float | None, clips_per_s: float) -> float:
  """Returns the share of the devices' peak that the model needs; NaN where it is unknown."""
  peak = peak_flops()
  if peak is None or flops_per_clip is None:
    return math.nan
  return flops_per_clip * clips_per_s / (peak * jax.device_count())


def memory() -> dict[str, float]:
  """Returns GiB in use and at most used so far, on this process's fullest device, and its host's.

  Devices that do not count (CPU) give NaN.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  used = max(one.get("bytes_in_use", math.nan) for one in stats)
  peak = max(one.get("peak_bytes_in_use", math.nan) for one in stats)
  unit = 1 if sys.platform == "darwin" else 2**10  # Of ru_maxrss.
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  names = ("memory/device_gib", "memory/device_peak_gib", "memory/host_peak_gib")
  return {name: value / 2**30 for name, value in zip(names, (used, peak, host), strict=True)}


def duration(seconds: float) -> str:
  """Returns a length of time for people."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
