"""Reads a TPU program before its machine code is made, which takes longest.

What is known by then: the optimised program (its products, loops and collectives) and where each
array lies in memory. What is not: the compiler's estimate of the cycles.
"""

import contextlib
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax

from spatialv2a_jax.training import waiting

_PROGRAM = "*after_optimizations_after_buffer_assignment.txt"  # Of the files, the last one before.
_PLACES = "*after_optimizations-buffer-assignment.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)


def read(lowered: Any) -> tuple[str, dict[str, int]]:
  """Returns the text of the optimised program, and its bytes of a chip's memory by kind.

  The compiler goes on in a thread: `waiting.abandoned` says whether, and then the process must
  end without waiting for it (`cluster.leave`).

  Args:
    lowered: from `jitted.lower`, for a TPU.

  Raises:
    jax.errors.JaxRuntimeError: if the program does not fit the memory.
  """
  folder = pathlib.Path(tempfile.mkdtemp())

  def written() -> bool:
    return any(path.read_text().endswith("}\n") for path in folder.glob(_PROGRAM))

  options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
  kept = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)  # What is kept is not written again.
  try:
    with contextlib.suppress(waiting.GivenUpError):
      waiting.run(lambda: lowered.compile(compiler_options=options), written)
    return _one(folder, _PROGRAM), memory(_one(folder, _PLACES))
  finally:
    jax.config.update("jax_enable_compilation_cache", kept)
    shutil.rmtree(folder, ignore_errors=True)


def _one(folder: pathlib.Path, pattern: str) -> str:
  return max(folder.glob(pattern), key=lambda path: path.stat().st_size).read_text()


def memory(places: str) -> dict[str, int]:
  """Returns the bytes of arguments, temporaries and new outputs, as XLA writes its assignment."""
  found = {"arguments": 0, "temporaries": 0, "outputs": 0}
  for size, about in _ALLOCATION.findall(places):
    if re.search(r"\bcolor [1-9]", about):  # Of the chip's other memories.
      continue
    kind = "arguments" if "parameter " in about else "outputs"
    found["temporaries" if "preallocated-temp" in about else kind] += int(size)
  return found
