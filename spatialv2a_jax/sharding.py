"""Logical axis names -> mesh axes. The only file that knows both.

Parameters and activations name their axes; one frozen `Rules` says which mesh axis splits each
name. Nothing here sets a global mesh or a rule context: both would be invisible to jit's cache.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spatialv2a_jax.errors import UserError

Axes = str | tuple[str, ...] | None
MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
  """One field per logical axis; its value is the mesh axis that splits it.

  Several are a tuple or, as on a command line, "data+fsdp"; none is None or "".

  Attributes:
    act_batch: clips of a batch.
    act_time: frames or tokens of an activation.
    act_width: channels of an activation.
    ear: stacked weights of the two ear branches (size 2). Blocks take the ears in turn, so that
      splitting them is slower than not to (benchmarks/RESULTS.md).
    layers: stacked weights of repeated blocks.
    width: model width of a parameter.
    heads: attention heads.
    head_dim: width of one head.
    ffn: hidden width of the feed-forward part.
    mod: outputs of the modulation layers.
    latent: latent channels.
    vocab: rows of an embedding table.
    zero: no name of an axis, but the mesh axes that also split what belongs to the optimiser (its
      moments and the average of the parameters), which the devices of those axes would otherwise
      all hold and all compute (ZeRO-1, arXiv 1910.02054).
  """

  act_batch: Axes = ("data", "fsdp")
  act_time: Axes = None
  act_width: Axes = None
  ear: Axes = None
  layers: Axes = None
  width: Axes = "fsdp"
  heads: Axes = "tensor"
  head_dim: Axes = None
  ffn: Axes = "tensor"
  mod: Axes = None
  latent: Axes = None
  vocab: Axes = None
  zero: Axes = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      given = getattr(self, field.name)
      axes = mesh_axes(given)
      if unknown := [axis for axis in axes if axis not in MESH_AXES]:
        have = ", ".join(MESH_AXES)
        raise UserError(
          f"rule {field.name}={given!r} names no mesh axis {unknown[0]!r}, have: {have}"
        )
      if len(set(axes)) != len(axes):
        raise UserError(f"rule {field.name}={given!r} names a mesh axis twice")
      object.__setattr__(self, field.name, axes[0] if len(axes) == 1 else axes or None)
    self.spec("act_batch", "ear", "act_time", "act_width")  # Of the activations.

  def spec(self, *names: str | None) -> P:
    """Returns the spec of an array whose axes have these names (None: never split).

    Raises:
      ValueError: if a name is unknown.
      UserError: if two names would use one mesh axis.
    """
    known = [field.name for field in dataclasses.fields(self) if field.name != "zero"]
    if unknown := [name for name in names if name is not None and name not in known]:
      raise ValueError(f"unknown logical axes {unknown}, have: {known}")
    axes = tuple(None if name is None else getattr(self, name) for name in names)
    used = [one for axis in axes for one in mesh_axes(axis)]
    if twice := [one for one in used if used.count(one) > 1]:
      shown = ", ".join(
        f"{name}={'+'.join(mesh_axes(axis))}"
        for name, axis in zip(names, axes, strict=True)
        if axis
      )
      raise UserError(
        f"axes {names} would use mesh axis {twice[0]} twice by the rules {shown}; "
        "leave one of them empty"
      )
    return P(*axes)


def mesh_axes(axes: Axes) -> tuple[str, ...]:
  """Returns the mesh axes of a rule as a config or a spec has it."""
  if not axes:
    return ()
  return tuple(axes.split("+")) if isinstance(axes, str) else tuple(axes)


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
  """Returns a mesh over all devices. Its axes are `Auto`: the compiler places the rest.

  Args:
    data: copies of the model, each with its share of the batch.
    fsdp: devices that split both the batch and the width of the weights.
    tensor: devices that split heads and feed-forward channels.
    devices: all devices of the job by default. One of the sizes may be -1: it takes what is left.

  Raises:
    UserError: if the sizes do not use every device exactly once.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  shown = " ".join(f"{name}={size}" for name, size in sizes.items())
  free = [name for name, size in sizes.items() if size == -1]
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
    raise UserError(f"mesh {shown}: sizes are positive and at most one is -1 (takes what is left)")
  if free:
    sizes[free[0]] = max(len(devices) // fixed, 1)
  if int(np.prod(list(sizes.values()))) != len(devices):
    raise UserError(
      f"mesh {shown} does not fit {len(devices)} device(s): "
      "the product of the sizes must be their number; set one size to -1"
    )
  # Host by host, so that each loads rows that follow each other; `jax.make_mesh` follows the wires
  # of a TPU slice, on which a host holds a square. Linen layers fail on `Explicit` axes.
  devices.sort(key=lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id))
  grid = np.asarray(devices).reshape(tuple(sizes.values()))
  return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


# Loops run over these axes: split over devices, every turn would fetch its part from one of them.
_LOOPED = ("layers", "ear")
# Fields of `Rules` that are no axes of parameters.
_NO_PARAMETER = ("act_batch", "act_time", "act_width", "zero")
# Leaves below this size are cheaper to hold whole than to gather.
_SMALL = 2**16


def shardings(boxed: Any, mesh: Mesh, rules: Rules, *, zero: bool = False) -> Any:
  """Returns a `NamedSharding` for each leaf of a tree of boxed parameters.

  A leaf without axis names (biases, norms, counters) is replicated, and so is a dimension of
  size 1. Every other dimension divides by the devices that split it.

  Args:
    boxed: tree of arrays or shapes, some in `nn.Partitioned` boxes that name their axes.
    mesh: where the leaves will live.
    rules: meaning of the axis names.
    zero: splits leaves of 64 KiB and more further, over the mesh axes of `rules.zero`: each takes
      the largest dimension that it divides. Leaves that have none stay as they are.

  Raises:
    UserError: naming the parameter, if a dimension does not divide by its mesh axes, or if two of
      its axes would use one mesh axis.
  """

  def is_box(x):
    return isinstance(x, nn.Partitioned)

  def one(path, leaf):
    if not is_box(leaf):
      return NamedSharding(mesh, P())
    if not jax.tree.leaves(leaf.value):
      return leaf.value  # The optimiser keeps an empty node where a parameter is frozen.
    name, shape = parameter_name(path), leaf.value.shape
    if len(leaf.names) != len(shape):
      raise ValueError(f"{name}: shape {shape} has other axes than its names {leaf.names}")
    names = [None if size == 1 else axis for axis, size in zip(leaf.names, shape, strict=True)]
    try:
      spec = rules.spec(*names)
    except UserError as error:
      raise UserError(f"{name}: {error}") from error
    for size, axis, entry in zip(shape, names, spec, strict=True):
      parts = _parts(mesh, entry)
      if size % parts:
        raise UserError(
          f"{name}: axis {axis} of size {size} does not divide by the {parts} devices of mesh "
          f"axis {entry}; change the mesh, or leave rule {axis} empty"
        )
    if zero and leaf.value.size * leaf.value.dtype.itemsize >= _SMALL:
      spec = _split_further(spec, names, shape, mesh, rules)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


def _parts(mesh: Mesh, entry: Axes) -> int:
  return int(np.prod([mesh.shape[axis] for axis in mesh_axes(entry)]))


def _split_further(spec: P, names: Sequence[str | None], shape, mesh: Mesh, rules: Rules) -> P:
  entries = [mesh_axes(entry) for entry in spec]
  for axis in mesh_axes(rules.zero):
    if any(axis in entry for entry in entries):
      continue
    parts = [mesh.shape[axis] * _parts(mesh, entry) for entry in entries]
    fits = [i for i, size in enumerate(shape) if size % parts[i] == 0 and names[i] not in _LOOPED]
    if fits and mesh.shape[axis] > 1:
      best = max(fits, key=lambda i: shape[i] // parts[i])
      entries[best] = (*entries[best], axis)
  return P(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def check_split(params: Any, layout: Any, mesh: Mesh, rules: Rules) -> None:
  """Refuses a layout that leaves more than 2 % of a large model whole on an `fsdp` mesh.

  Models below 64 MiB are not looked at.

  Args:
    params: shapes of the parameters, plain.
    layout: their shardings.
    mesh: where they live.
    rules: with `fsdp` in `zero`, that axis splits the optimiser and not the parameters.

  Raises:
    UserError: naming the largest parameters that `fsdp` does not split.
  """
  if mesh.shape["fsdp"] == 1 or "fsdp" in mesh_axes(rules.zero):
    return
  sizes = {}
  for (path, x), sharding in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(layout), strict=True
  ):
    split = any("fsdp" in mesh_axes(entry) for entry in sharding.spec)
    sizes[parameter_name(path)] = (x.size * x.dtype.itemsize, split)
  total = sum(size for size, _ in sizes.values())
  whole = sorted(((size, name) for name, (size, split) in sizes.items() if not split), reverse=True)
  part = sum(size for size, _ in whole) / max(total, 1)
  if total >= 2**26 and part > 0.02:
    shown = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for size, name in whole[:3])
    given = [field.name for field in dataclasses.fields(rules) if field.name not in _NO_PARAMETER]
    by = [f"rules.{name}=fsdp" for name in given if "fsdp" in mesh_axes(getattr(rules, name))]
    advice = (
      f"{', '.join(by)} splits no axis of theirs: set mesh.fsdp=1, or rules.zero=fsdp to split the "
      "optimiser alone"
      if by
      else "give a rule fsdp (rules.width=fsdp), or set mesh.fsdp=1"
    )
    raise UserError(
      f"mesh axis fsdp={mesh.shape['fsdp']} leaves {100 * part:.1f} % of the parameters whole on "
      f"every device, such as {shown}; {advice}"
    )


def zero_whole(opt: Any, mesh: Mesh, axes: Axes) -> float:
  """Returns the share of the optimiser's bytes that `rules.zero` does not split, 0 without it."""
  wanted = set(mesh_axes(axes))
  if not any(mesh.shape[axis] > 1 for axis in wanted):
    return 0.0
  whole = total = 0
  for x in jax.tree.leaves(opt):
    used = {axis for entry in x.sharding.spec for axis in mesh_axes(entry)}
    total += x.size * x.dtype.itemsize
    whole += 0 if used & wanted else x.size * x.dtype.itemsize
  return whole / max(total, 1)


def zero_remarks(whole: float) -> list[str]:
  """Returns what to set where `zero_whole` is more than a tenth, as one line or none."""
  if whole <= 0.1:
    return []
  return [
    f"rules.zero leaves {100 * whole:.0f} % of the optimiser whole, as few sizes divide by so many "
    "devices: give mesh.fsdp a size that divides the width, such as 64, and "
    "--config.rules.zero=fsdp --config.rules.width="
  ]


def table(tree: Any) -> list[str]:
  """Returns one line per leaf of a tree of arrays or shapes: name, shape, dtype, spec."""

  def entry(axes):
    return "+".join(mesh_axes(axes)) or "-"

  lines = []
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    spec = (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))
    shape, split = ",".join(map(str, x.shape)), ",".join(map(entry, spec))
    lines.append(f"{parameter_name(path)} {x.dtype}[{shape}] ({split})")
  return lines


def unboxed(tree: Any) -> Any:
  """Returns a tree of parameters without the boxes that name their axes."""
  return nn.unbox(tree)


def parameter_name(path: tuple[Any, ...]) -> str:
  """Returns a tree path as "block/qkv/kernel", the same for boxed and plain trees."""
  keys = [key for key in path if getattr(key, "name", None) != "value"]
  return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def constrainer(mesh: Mesh, rules: Rules) -> Callable[..., jax.Array]:
  """Returns `constrain(x, *names)` for a model to call on its activations."""

  def constrain(x, *names):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rules.spec(*names)))

  return constrain


def batch_parts(mesh: Mesh, rules: Rules) -> int:
  """Returns how many parts of a batch lie on devices of their own."""
  return _parts(mesh, rules.act_batch)


def local_rows(mesh: Mesh, rules: Rules, global_batch_size: int) -> tuple[int, int]:
  """Returns the rows [first, last) of every global batch that this process must load.

  Raises:
    UserError: if the batch does not divide by the devices that split it.
  """
  parts = batch_parts(mesh, rules)
  if global_batch_size % parts:
    raise UserError(
      f"batch_size {global_batch_size} does not divide by the {parts} devices of mesh axes "
      f"{rules.act_batch}; use a multiple of {parts}"
    )
  sharding = NamedSharding(mesh, rules.spec("act_batch"))
  slices = sharding.addressable_devices_indices_map((global_batch_size,)).values()
  bounds = {index[0].indices(global_batch_size)[:2] for index in slices if index is not None}
  first, last = min(lo for lo, _ in bounds), max(hi for _, hi in bounds)
  if sum(hi - lo for lo, hi in bounds) != last - first:
    raise UserError("the rows of one process are not contiguous; give the data axis whole hosts")
  return first, last


def global_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh, rules: Rules, global_batch_size: int
) -> dict[str, jax.Array]:
  """Returns the batch of all processes from the rows of this one.

  Args:
    batch: arrays that hold exactly the rows `local_rows` gives, in that order.
    mesh: where the batch will live.
    rules: which mesh axes split the batch.
    global_batch_size: rows over all processes.

  Raises:
    UserError: if an array has another number of rows.
  """
  first, last = local_rows(mesh, rules, global_batch_size)
  sharding = NamedSharding(mesh, rules.spec("act_batch"))

  arrays = {name: np.asarray(array) for name, array in batch.items()}
  for name, array in arrays.items():
    if len(array) != last - first:
      raise UserError(f"batch field {name} has {len(array)} rows, expected {last - first}")
  if sharding.is_fully_addressable:  # One process: all arrays at once, in half the time.
    return jax.device_put(arrays, sharding)
  # Without the global shape, a mesh whose tensor axis spans processes makes a smaller batch.
  return {
    name: jax.make_array_from_process_local_data(
      sharding, array, (global_batch_size, *array.shape[1:])
    )
    for name, array in arrays.items()
  }


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes that a tree of sharded arrays takes on the fullest device."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
