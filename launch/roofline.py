"""How fast a compiled program could run: each kernel at the matrix peak or at the speed of memory.

For targets whose compiler gives no cycles (see `launch.hlo_cost`).
"""

import math
from collections.abc import Iterator

from launch import hlo, hlo_cost
from launch.hlo import Computation, Instruction, Module, Op

# Instructions that move nothing themselves; what a loop or a call moves is counted inside it.
_FREE = {
  "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "opt-barrier",
  "parameter", "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
_PARTS = ("slice", "dynamic-slice", "gather")  # Read no more of their first operand than they give.


def seconds(module: Module, peak_flops: float, bytes_per_second: float) -> float:
  """Returns a lower bound of the time of a program, without its collectives."""
  total = 0.0
  for op in kernels(module):
    busy = flops(module, op) / peak_flops
    total += op.times * max(busy, traffic(module, op) / bytes_per_second)
  return total


def kernels(module: Module) -> Iterator[Op]:
  """Yields what runs as a kernel of its own."""
  for op in hlo.walk(module):
    opcode = op.instruction.opcode
    if not op.inside and opcode not in _FREE and not opcode.endswith("-done"):
      yield op


def flops(module: Module, op: Op) -> int:
  """Returns the matrix FLOPs of one run of a kernel, those inside a fusion included."""
  callee = op.instruction.attribute(r"calls=%([\w.\-]+)")
  if op.instruction.opcode not in ("fusion", "async-start") or callee is None:
    return hlo_cost.instruction_flops(op)
  return sum(inner.times * hlo_cost.instruction_flops(inner) for inner in hlo.walk(module, callee))


def traffic(module: Module, op: Op) -> float:
  """Returns the bytes that one run of a kernel reads and writes; slices count, not their source."""
  i = op.instruction
  if i.opcode.removesuffix("-start") in hlo_cost.COLLECTIVES:
    return 0
  callee = i.attribute(r"calls=%([\w.\-]+)") if i.opcode == "fusion" else None
  if callee:
    return _fusion(module.computations[callee])
  if i.opcode in _PARTS:
    return 2 * i.bytes
  if i.opcode == "dynamic-update-slice":
    return 2 * op.computation[i.operands[1]].bytes
  written = i.bytes
  if i.opcode == "custom-call":  # A library's scratch memory comes with its results.
    written -= sum(hlo.size(leaf) for leaf in i.leaves if leaf[0] in ("s8", "u8"))
  return written + sum(op.computation[name].bytes for name in i.operands)


def _fusion(body: Computation) -> float:
  root = next(i for i in body.values() if i.root)
  results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
  moved, in_place = 0.0, set()
  for result in results:
    result = _source(body, result)
    if result.opcode == "dynamic-update-slice":
      moved += body[result.operands[1]].bytes
      in_place.add(_source(body, body[result.operands[0]]).name)
    else:
      moved += result.bytes
  shares: dict[str, float] = {}
  for i in body.values():
    if i.opcode == "parameter" and i.name not in in_place:
      moved += i.bytes * _share(body, i, shares)
  return moved


def _source(body: Computation, i: Instruction) -> Instruction:
  """Returns the instruction of which this one is only another view."""
  while i.opcode == "bitcast":
    i = body[i.operands[0]]
  return i


def _share(body: Computation, i: Instruction, known: dict[str, float]) -> float:
  """Returns the share of an array that a fusion reads, which computes only what it needs."""
  if i.name not in known:
    share = float(i.root)
    for user in body.values():
      if i.name not in user.operands:
        continue
      if user.opcode in _PARTS and user.operands[0] == i.name:
        share += _count(user) / _count(i) * _share(body, user, known)
      elif user.opcode != "tuple" and _count(user) == _count(i):  # Element by element.
        share += _share(body, user, known)
      else:
        share = 1.0
    known[i.name] = min(share, 1.0)
  return known[i.name]


def _count(i: Instruction) -> int:
  return max(sum(math.prod(dims) for _, dims in i.leaves), 1)
