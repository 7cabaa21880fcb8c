"""Reads the text of a compiled XLA program: what runs, and how often.

The compiler's own cost analysis counts the body of a loop once. Here each instruction comes with
the number of times it runs, the product of the trip counts of the loops around it.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

Computation = Mapping[str, "Instruction"]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_LEAF = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
# Computations that run where the instruction does; those of reductions and sorts cost nothing.
_CALLS = {
  "fusion": r"calls=%([\w.\-]+)",
  "async-start": r"calls=%([\w.\-]+)",
  "call": r"to_apply=%([\w.\-]+)",
}
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of the program.

  Attributes:
    name: unique within its computation.
    opcode: such as "fusion" or "all-reduce-start".
    shape: type of the result as printed.
    operands: names of the operands.
    attributes: the rest of the line.
    root: whether it is the result of its computation.
  """

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  attributes: str
  root: bool

  @functools.cached_property
  def leaves(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(dtype, dimensions) of each array of the result."""
    return leaves(self.shape)

  @property
  def bytes(self) -> int:
    """Bytes of the result, without the padding of layouts."""
    return sum(size(leaf) for leaf in self.leaves)

  def attribute(self, pattern: str) -> str | None:
    """Returns the first group of a regex in the attributes, or None."""
    found = re.search(pattern, self.attributes)
    return found.group(1) if found else None

  @property
  def scope(self) -> str:
    """Path of the source operation, such as "jit(step)/jvp()/while/body/dot_general"."""
    return self.attribute(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed program: its computations by name, and the name of the one that starts."""

  header: str
  entry: str
  computations: Mapping[str, Computation]


@dataclasses.dataclass(frozen=True)
class Op:
  """An instruction in its place.

  Attributes:
    instruction: the line.
    computation: the lines around it, by name.
    times: how often it runs.
    inside: names of the fusions and asynchronous computations around it, outermost first.
  """

  instruction: Instruction
  computation: Computation
  times: int
  inside: tuple[str, ...]


def leaves(shape: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """Returns (dtype, dimensions) of each array in a printed type."""
  return tuple(
    (dtype, tuple(int(n.removeprefix("<=")) for n in sizes.split(",") if n))
    for dtype, sizes in _LEAF.findall(shape)
  )


def size(leaf: tuple[str, tuple[int, ...]]) -> int:
  """Returns the bytes of an array."""
  dtype, dims = leaf
  bits = 8 if dtype == "pred" else int(found.group(1)) if (found := _BITS.match(dtype)) else 0
  count = 1
  for dim in dims:
    count *= dim
  return -(-count * bits // 8)


_BITS = re.compile(r"[a-z]+(\d+)")


def parse(text: str) -> Module:
  """Returns the program printed as `compiled.as_text()` prints it.

  Raises:
    ValueError: if the text has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  current, entry = None, ""
  for line in text.splitlines():
    if current is None:
      if found := _HEADER.match(line):
        current = computations.setdefault(found.group(2), {})
        entry = found.group(2) if found.group(1) else entry
    elif line.startswith("}"):
      current = None
    elif " = " in line:
      instruction = _instruction(line.strip())
      current[instruction.name] = instruction
  if not entry:
    raise ValueError("this text has no ENTRY computation: it is not a compiled program")
  return Module(text.split("\n", 1)[0], entry, computations)


def _instruction(line: str) -> Instruction:
  left, right = line.split(" = ", 1)
  end = _closing(right, 0) if right.startswith("(") else right.index(" ")
  shape, rest = right[:end], right[end:].lstrip()
  opcode, _, arguments = rest.partition("(")
  close = _closing(arguments, -1)
  return Instruction(
    name=left.removeprefix("ROOT ").removeprefix("%"),
    opcode=opcode,
    shape=shape,
    operands=tuple(_NAME.findall(arguments[: close - 1])) or _literal(opcode, arguments, close),
    attributes=arguments[close:],
    root=left.startswith("ROOT "),
  )


def _literal(opcode: str, arguments: str, close: int) -> tuple[str, ...]:
  """The value of a constant stands where operands do; the number of a parameter too."""
  return (arguments[: close - 1],) if opcode in ("constant", "parameter") else ()


def _closing(text: str, start: int) -> int:
  """Returns the index after the parenthesis that closes the one at `start` (-1: before text)."""
  depth = 1 if start < 0 else 0
  for i in range(max(start, 0), len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if not depth:
      return i + 1
  return len(text)


def walk(module: Module, name: str = "") -> Iterator[Op]:
  """Yields every instruction that runs, with how often it does, from the computation `name`.

  Loops whose trip count nothing tells count once; `unknown_loops` names them. Of a conditional's
  branches, the one that takes longest runs.
  """
  yield from _walk(module, name or module.entry, 1, ())


def _walk(module: Module, name: str, times: int, inside: tuple[str, ...]) -> Iterator[Op]:
  computation = module.computations[name]
  for instruction in computation.values():
    yield Op(instruction, computation, times, inside)
    if instruction.opcode == "while":
      body = instruction.attribute(r"body=%([\w.\-]+)")
      assert body is not None
      count = trip_count(module, computation, instruction)
      yield from _walk(module, body, times * (1 if count is None else count), inside)
    elif instruction.opcode == "conditional":
      yield from _walk(module, branches(module, instruction)[0], times, inside)
    elif callee := instruction.attribute(_CALLS.get(instruction.opcode, "(?!)")):
      deeper = instruction.opcode != "call"
      yield from _walk(module, callee, times, (*inside, instruction.name) if deeper else inside)


def branches(module: Module, conditional: Instruction) -> list[str]:
  """Returns the names of a conditional's branches, the one that takes longest first.

  By the compiler's cycles, or where it gives none by the bytes that come into being.
  """

  def cost(name: str) -> tuple[int, int]:
    ops = list(walk(module, name))
    made = sum(op.times * op.instruction.bytes for op in ops)
    return sum(op.times * cycles(op.instruction) for op in ops if not op.inside), made

  found = [name for groups in _BRANCHES.findall(conditional.attributes) for name in groups]
  return sorted(_NAME.findall(" ".join(found)), key=cost, reverse=True)


def cycles(instruction: Instruction) -> int:
  """Returns the compiler's estimate for one run of an instruction, 0 where it gives none."""
  return int(instruction.attribute(r'estimated_cycles":"(\d+)"') or 0)


def unknown_loops(module: Module) -> list[str]:
  """Returns the names of the loops whose trip count is unknown."""
  return [
    instruction.name
    for computation in module.computations.values()
    for instruction in computation.values()
    if instruction.opcode == "while" and trip_count(module, computation, instruction) is None
  ]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """Returns how often a `while` runs its body: the compiler's word, or that of its counter.

  The counter is read where it starts at a constant, is compared with a constant, and grows by
  one; None otherwise.
  """
  if told := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
    return int(told)
  condition = loop.attribute(r"condition=%([\w.\-]+)")
  body = loop.attribute(r"body=%([\w.\-]+)")
  if condition is None or body is None:
    return None
  test = module.computations[condition]
  index, limit = _compared(module, test, next(i for i in test.values() if i.root))
  start = _element(computation, loop.operands[0], index)
  inner = module.computations[body]
  root = next(i for i in inner.values() if i.root)
  following = _element(inner, root.name, index)
  if limit is None or start is None or following is None:
    return None
  first = _constant(computation, start.name)
  if first is None or following.opcode != "add":
    return None
  steps = [_constant(inner, name) for name in following.operands]
  return max(limit - first, 0) if 1 in steps else None


def _compared(module, computation, root) -> tuple[int, int | None]:
  """Returns the index of the counter in the loop's tuple and what it is compared with."""
  if root.opcode == "fusion":  # Fused comparison: its parameters are what the fusion is given.
    callee = module.computations[root.attribute(r"calls=%([\w.\-]+)")]
    inner = next(i for i in callee.values() if i.root)
    given = []
    for name in inner.operands:
      source = callee[name]
      given.append(
        computation[root.operands[int(source.operands[0])]]
        if source.opcode == "parameter"
        else source
      )
  else:
    inner, given = root, [computation[name] for name in root.operands]
  if inner.opcode != "compare" or "direction=LT" not in inner.attributes or len(given) != 2:
    return 0, None
  counter, bound = given
  index = counter.attribute(r"index=(\d+)")
  if index is None or bound.opcode != "constant":
    return 0, None
  return int(index), int(bound.operands[0])


def _element(computation: Computation, name: str, index: int) -> Instruction | None:
  """Returns what a tuple holds at an index."""
  source = _origin(computation, name)
  if source.opcode != "tuple":
    return None
  return _origin(computation, source.operands[index])


def _origin(computation: Computation, name: str) -> Instruction:
  while computation[name].opcode in ("copy", "bitcast", "convert"):
    name = computation[name].operands[0]
  return computation[name]


def _constant(computation: Computation, name: str) -> int | None:
  source = _origin(computation, name)
  text = source.operands[0] if source.opcode == "constant" else ""
  return int(text) if re.fullmatch(r"-?\d+", text) else None
