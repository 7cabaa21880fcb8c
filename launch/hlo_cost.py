"""What a compiled program costs one device: matrix FLOPs, collectives, cycles.

All numbers count loops as often as they run (see `launch.hlo`).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from launch import hlo
from launch.hlo import Instruction, Module, Op
from spatialv2a_jax.errors import UserError

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind and payload, as one device sees them in one step.

  Attributes:
    kind: such as "all-reduce".
    sharers: number of devices that share what goes to other slices, or other hosts of GPUs, by
      the network; 0 where nothing does.
    count: how often one runs.
    bytes: sum of their payloads: what goes in, or for an all-gather what comes out.
  """

  kind: str
  sharers: int
  count: int
  bytes: int


def collectives(module: Module, near: int | None = None) -> dict[str, Collective]:
  """Returns the collectives of a step by kind, asynchronous and fused ones included.

  A `-start` counts, its `-done` does not; so does one inside a fusion, once per run of the fusion.
  An all-reduce that a fusion turns into a reduce-scatter counts as one.

  Args:
    module: the program, whose devices are numbered slice by slice or host by host.
    near: devices of a slice or a host; None: all are near each other.
  """
  found: dict[str, Collective] = {}
  for op in hlo.walk(module):
    kind, sharers = op.instruction.opcode.removesuffix("-start"), 0
    if kind == "send" and (between := op.instruction.attribute(r'megascale_transfer_type="(\w+)"')):
      # What TPU slices exchange has become this: a chip sends its part of what its slice made.
      kind, sharers = between.lower().replace("_", "-"), 1
      payload = op.computation[op.instruction.operands[0]].bytes
    elif kind in COLLECTIVES:
      payload = _payload(op, kind)
      sharers = near if near and _is_far(op.instruction, near) else 0
    else:
      continue
    if kind == "all-reduce" and any("all-reduce-scatter" in name for name in op.inside):
      kind = "reduce-scatter"
    name = f"{kind} by network" if sharers else kind
    old = found.get(name, Collective(kind, sharers, 0, 0))
    found[name] = Collective(kind, sharers, old.count + op.times, old.bytes + op.times * payload)
  return dict(sorted(found.items()))


def _is_far(instruction: Instruction, near: int) -> bool:
  """Returns whether devices of different slices or hosts take part in one collective."""
  text = instruction.attribute(r"(?:replica_groups|source_target_pairs)=(\{\{.*?\}\})")
  if text:
    groups = [
      [int(n) for n in re.findall(r"\d+", one)] for one in re.findall(r"\{([\d,]+)\}", text)
    ]
  elif text := instruction.attribute(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"):
    shape, source, turned = ([int(n) for n in one.split(",") if n] for one in _iota(text))
    number = np.arange(math.prod(source)).reshape(source)
    groups = number.transpose(turned or range(len(source))).reshape(shape)
  elif text := instruction.attribute(r"replica_groups=(mesh\[.*?\][^{]*\{[^}]*\})"):
    groups = _mesh_groups(text)
  elif instruction.attribute(r"replica_groups=(\{\})") or "_groups=" not in instruction.attributes:
    return True  # No groups: all devices.
  else:
    raise UserError(f"{instruction.name}: which devices take part? {instruction.attributes[:200]}")
  return any(len({int(device) // near for device in group}) > 1 for group in groups)


def _mesh_groups(text: str) -> np.ndarray:
  """Returns the groups of "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", one in a row.

  Devices differ along the axes named last; of `device_ids` a part or all may be left out.
  """
  axes, ids, named = (re.search(x, text) for x in (r"mesh\[(.*?)\]", r"\(\[(.*)\)", r"\{(.*)\}"))
  assert axes is not None and named is not None
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
  chosen = re.findall(r"'([^']+)'", named[1])
  if ":(" in named[1] or not sizes.keys() >= set(chosen):
    raise UserError(f"devices of parts of axes are not known: {text}")
  number = np.arange(math.prod(sizes.values()))
  if ids is not None:
    source, _, turned = ids[1].partition("]")
    number = number.reshape([int(n) for n in source.split(",")])
    number = number.transpose([int(n) for n in re.findall(r"\d+", turned)] or None)
  order = sorted(range(len(sizes)), key=lambda i: list(sizes)[i] in chosen)
  turned = number.reshape(tuple(sizes.values())).transpose(order)
  return turned.reshape(-1, math.prod(sizes[name] for name in chosen))


def _iota(text: str) -> tuple[str, str, str]:
  """Returns the numbers of "[2,8]<=[8,2]T(1,0)"."""
  found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  assert found is not None
  return found.group(1), found.group(2), found.group(3) or ""


def collective_seconds(found: Iterable[Collective], interconnect: float, network: float) -> float:
  """Returns the time of collectives that nothing hides.

  A ring moves what is reduced twice, what is gathered once.

  Args:
    found: what a device takes part in.
    interconnect: bytes/s of a device to those of its slice or host.
    network: bytes/s of a device to those beyond.
  """
  seconds = 0.0
  for one in found:
    moved = (2.0 if one.kind == "all-reduce" else 1.0) * one.bytes
    seconds += moved / (one.sharers * network) if one.sharers else 0.0
    seconds += moved / interconnect if one.sharers != 1 else 0.0
  return seconds


def _payload(op: Op, kind: str) -> int:
  if kind != "all-gather":
    return sum(op.computation[name].bytes for name in op.instruction.operands)
  arrays = op.instruction.leaves
  if op.instruction.opcode == "all-gather-start":  # Holds the operands, then the results.
    n = len(op.instruction.operands)
    arrays = arrays[n : 2 * n]
  return sum(map(hlo.size, arrays))


def host_transfers(module: Module) -> list[str]:
  """Returns the instructions that talk to the host while a step runs, callbacks included."""
  found = []
  everything = (i for computation in module.computations.values() for i in computation.values())
  for i in everything:
    target = i.attribute(r'custom_call_target="([^"]*)"') or ""
    talks = (
      i.opcode in ("infeed", "outfeed")
      or ("is_host_transfer=true" in i.attributes and "megascale" not in i.attributes)
      or "callback" in target
      or target in ("MoveToHost", "MoveToDevice")
    )
    if talks:
      found.append(i.name)
  return found


def aliased_bytes(module: Module) -> int:
  """Returns the bytes of donated arguments whose buffers results reuse."""
  entry = module.computations[module.entry]
  parameters = {i.operands[0]: i for i in entry.values() if i.opcode == "parameter"}
  reused = re.findall(r": \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)", module.header)
  return sum(parameters[number].bytes for number in reused)


def flops(module: Module) -> int:
  """Returns the FLOPs of matrix products and convolutions; padding does not count."""
  return sum(op.times * instruction_flops(op) for op in hlo.walk(module))


def instruction_flops(op: Op) -> int:
  """Returns the matrix FLOPs of one run of one instruction, 0 for all others."""
  i = op.instruction
  if i.opcode == "dot":
    return _dot(op, _dimensions(i, "lhs_contracting_dims"))
  if i.opcode == "convolution":
    return _convolution(op)
  if i.opcode == "custom-call":
    target = i.attribute(r'custom_call_target="([^"]*)"') or ""
    if "$matmul" in target or "$gemm" in target or "matmul" in target:
      return _dot(op, _dimensions(i, "lhs_contracting_dimensions"))
    if target.startswith("__cudnn$conv"):
      return _cudnn(op, target)
    if target.startswith("__cudnn$fmha"):
      return _attention(op, target)
  return 0


def _dimensions(instruction: Instruction, name: str) -> tuple[int, ...]:
  found = instruction.attribute(name + r'"?[=:][\[{]([\d,"]*)[\]}]') or ""
  return tuple(int(n) for n in re.findall(r"\d+", found))


def _shape(op: Op, operand: int) -> tuple[int, ...]:
  return op.computation[op.instruction.operands[operand]].leaves[0][1]


def _dot(op: Op, contracted: tuple[int, ...]) -> int:
  lhs = _shape(op, 0)
  return 2 * math.prod(op.instruction.leaves[0][1]) * math.prod(lhs[n] for n in contracted)


def _window(instruction: Instruction, dims: int) -> dict[str, tuple]:
  text = instruction.attribute(r"window=\{([^}]*)\}") or ""
  fields = dict(field.split("=") for field in text.split())

  def numbers(name, default):
    if name not in fields:
      return (default,) * dims
    return tuple(int(n) for n in fields[name].split("x"))

  pads = fields["pad"].split("x") if "pad" in fields else ["0_0"] * dims
  return {
    "size": numbers("size", 1),
    "stride": numbers("stride", 1),
    "pad": tuple(int(pad.split("_")[0]) for pad in pads),
    "lhs": numbers("lhs_dilate", 1),
    "rhs": numbers("rhs_dilate", 1),
  }


def _labels(instruction: Instruction) -> tuple[str, str, str]:
  text = instruction.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
  assert text is not None
  inputs, output = text.split("->")
  lhs, rhs = inputs.split("_")
  return lhs, rhs, output


def _convolution(op: Op) -> int:
  """Counts multiplications with elements that exist: neither padding nor holes of dilation."""
  lhs_labels, rhs_labels, out_labels = _labels(op.instruction)
  lhs, rhs, out = _shape(op, 0), _shape(op, 1), op.instruction.leaves[0][1]
  spatial = sorted(label for label in out_labels if label.isdigit())
  window = _window(op.instruction, len(spatial))
  total = 2 * rhs[rhs_labels.index("i")]
  total *= out[out_labels.index("b")] * out[out_labels.index("f")]
  for n, label in enumerate(spatial):
    at = np.arange(out[out_labels.index(label)])[:, None] * window["stride"][n]
    at = at + np.arange(window["size"][n])[None] * window["rhs"][n] - window["pad"][n]
    inside = (at >= 0) & (at % window["lhs"][n] == 0)
    total *= int((inside & (at // window["lhs"][n] < lhs[lhs_labels.index(label)])).sum())
  return total


def _cudnn(op: Op, target: str) -> int:
  """FLOPs of cuDNN's convolutions, whose operands and results trade places with the direction."""
  _, rhs_labels, out_labels = _labels(op.instruction)
  result = op.instruction.leaves[0][1]
  if "BackwardInput" in target:
    kernel, output = _shape(op, 1), _shape(op, 0)
  elif "BackwardFilter" in target:
    kernel, output = result, _shape(op, 1)
  else:
    kernel, output = _shape(op, 1), result
  return 2 * math.prod(kernel) * math.prod(output) // output[out_labels.index("f")]


def _attention(op: Op, target: str) -> int:
  """FLOPs of cuDNN's fused attention: two products forward, five backward (one recomputed)."""
  (b, t, h, k), (_, s, _, _) = _shape(op, 0), _shape(op, 1)
  return (10 if "Backward" in target else 4) * b * h * t * s * k


def cycles(module: Module) -> dict[str, int]:
  """Returns the TPU compiler's estimated cycles, by whether a matrix unit is at work.

  Collectives and asynchronous copies carry no estimate: their time is not in it.
  """
  total = {"matrix": 0, "other": 0}
  for op, estimate in _estimated(module):
    total["matrix" if _multiplies(module, op.instruction) else "other"] += op.times * estimate
  return total


def optional_cycles(module: Module) -> int:
  """Returns how many of them are spared where no conditional takes its longest branch."""
  spared = 0
  for op in hlo.walk(module):
    if op.instruction.opcode == "conditional":
      costs = [
        sum(inner.times * estimate for inner, estimate in _estimated(module, name))
        for name in hlo.branches(module, op.instruction)
      ]
      spared += op.times * (max(costs) - min(costs))
  return spared


def cycles_by_scope(module: Module, depth: int = 12) -> list[tuple[str, int]]:
  """Returns the estimated cycles of the parts of the source, dearest first."""
  total: dict[str, int] = {}
  for op, estimate in _estimated(module):
    scope = scope_name(op.instruction.scope)
    total[scope] = total.get(scope, 0) + op.times * estimate
  return sorted(total.items(), key=lambda item: -item[1])[:depth]


def scope_name(scope: str) -> str:
  """Shortens a source path to the names of layers and the direction of the pass."""
  back = "backward" if "transpose(jvp" in scope else "forward" if "jvp" in scope else "update"
  again = " again" if "rematted_computation" in scope or "remat" in scope else ""
  names = re.findall(r"(?<=/)[A-Za-z_]\w*(?=/)", re.sub(r"\w+\((.*?)\)", r"\1", scope))
  skip = {"while", "body", "closed_call", "checkpoint", "cond", "rematted_computation", "jvp"}
  return f"{back}{again} " + "/".join(n for n in names if n not in skip)


def _estimated(module: Module, name: str = "") -> Iterator[tuple[Op, int]]:
  for op in hlo.walk(module, name):
    if not op.inside and (estimate := hlo.cycles(op.instruction)):
      yield op, estimate


def _multiplies(module: Module, instruction: Instruction) -> bool:
  if instruction.opcode in ("dot", "convolution"):
    return True
  callee = instruction.attribute(r"calls=%([\w.\-]+)")
  if instruction.opcode != "fusion" or callee is None:
    return False
  return any(_multiplies(module, inner) for inner in module.computations[callee].values())
