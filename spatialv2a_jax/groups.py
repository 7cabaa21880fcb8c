"""Rows of clips through a frozen network: groups of one size, one group per device at a time.

A group holds rows of one clip, and each device runs the same program on its own group. So what a
clip gives is the same to the bit, alone or among others, on one device or on several; batches cut
in other places, or by XLA's partitioner, would round differently.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SIZE = 8  # Rows, which are frames, or segments of 16 frames.
AXIS = "group"
REPORT_SECONDS = 10.0


def mesh_of(devices: Sequence[Any] | None) -> Mesh:
  """Returns the mesh of some devices; None: all accelerators of this process, or one CPU."""
  if devices is None:
    devices = jax.local_devices()[: 1 if jax.default_backend() == "cpu" else None]
  return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def whole(mesh: Mesh) -> NamedSharding:
  """Returns the placement of parameters: all of them on every device."""
  return NamedSharding(mesh, PartitionSpec())


def run(
  read: Callable[..., Any],
  params: Any,
  x_b: Sequence[np.ndarray],
  rest: tuple[Any, ...] = (),
  *,
  mesh: Mesh,
  report: Callable[[str], None] = lambda line: None,
) -> list[Any]:
  """Returns read(params, rows, *rest), NumPy arrays of as many rows, for the rows of each clip.

  Args:
    read: the network; hashable by what it computes, for its program is kept.
    params: its parameters, placed as `whole` says.
    x_b: rows of each clip, at least one.
    rest: arguments that all rows share.
    mesh: the devices.
    report: takes a line now and then, about how far it is.
  """
  function, each = _spread(read, mesh), NamedSharding(mesh, PartitionSpec(AXIS))
  groups = [_first(x[at:]) for x in x_b for at in range(0, len(x), SIZE)]
  parts, told = [], time.monotonic()
  for at in range(0, len(groups), mesh.size):
    some = groups[at : at + mesh.size]
    # A device that has nothing to do repeats the last group.
    filled = np.stack([*some, *some[-1:] * (mesh.size - len(some))])
    result = jax.tree.map(np.asarray, function(params, jax.device_put(filled, each), rest))
    parts += [jax.tree.map(lambda y, i=i: y[i], result) for i in range(len(some))]
    if time.monotonic() - told > REPORT_SECONDS:
      told = time.monotonic()
      report(f"{100 * len(parts) // len(groups)} %")
  found, at = [], 0
  for rows in map(len, x_b):
    mine = parts[at : at + -(-rows // SIZE)]
    found.append(jax.tree.map(lambda *ys, n=rows: np.concatenate(ys)[:n], *mine))
    at += len(mine)
  return found


@functools.cache
def _spread(read: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Returns (params, a group of each device, rest) -> what each device makes of its group."""
  each = PartitionSpec(AXIS)

  def one(params, rows, rest):
    return jax.tree.map(lambda y: y[None], read(params, rows[0], *rest))

  specs = PartitionSpec(), each, PartitionSpec()
  mapped = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)
  return jax.jit(mapped)


def _first(x: np.ndarray) -> np.ndarray:
  """Returns the first rows, a full group with copies of the last one."""
  x = x[:SIZE]
  return x if len(x) == SIZE else np.concatenate([x, np.repeat(x[-1:], SIZE - len(x), axis=0)])
