"""What a train step takes of this machine's memory, beside what `launch.estimate` says it takes.

Run: python -m benchmarks.memory [--config configs/tiny.py:smoke] [--devices 8] [--batch 4096]

Compiles the step for as many CPU devices, reads the prediction, then makes state and batch and runs
it twice. Measured is how far the resident memory of the process rises meanwhile (Linux).
"""

import argparse
import ctypes
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding

from launch import command, estimate, targets
from spatialv2a_jax import sharding

_MMAP_THRESHOLD = -3  # Of mallopt in glibc's malloc.h.


def measure(config: dict[str, Any], devices: int) -> tuple[float, float]:
  """Returns predicted and measured bytes of all devices together; the first use of JAX.

  Args:
    config: of `launch.train`.
    devices: CPU devices to force.
  """
  # Collectives of forced devices wait for each other, each on a thread.
  os.environ.setdefault("NPROC", str(2 * devices))
  target = targets.parse(f"cpu:{devices}")
  targets.prepare(target)
  program = estimate.program(config, targets.devices(target))
  compiled = program.step.lower(program.state, program.batch).compile()
  predicted = devices * estimate.memory_of(compiled)["peak"]

  mesh = jax.tree.leaves(program.state)[0].sharding.mesh
  rules = sharding.Rules(**config["rules"])
  rows = NamedSharding(mesh, rules.spec("act_batch"))
  layout = jax.tree.map(lambda x: x.sharding, program.state), dict.fromkeys(program.batch, rows)

  def zeros():
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (program.state, program.batch))

  make = jax.jit(zeros, out_shardings=layout).lower().compile()
  libc = ctypes.CDLL("libc.so.6")
  libc.mallopt(_MMAP_THRESHOLD, 2**20)  # Arrays get pages of their own, and give them back.
  libc.malloc_trim(0)
  before = _status("VmRSS")
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here on.
  state, batch = make()
  for _ in range(2):
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
  return predicted, _status("VmHWM") - before


def _status(name: str) -> float:
  """Returns a number of bytes from the kernel's account of this process."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  kib = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
  return 1024.0 * int(kib)


def main(argv: Sequence[str] | None = None) -> None:
  """Prints one line."""
  parser = argparse.ArgumentParser(description="Memory of a train step.")
  parser.add_argument("--config", default="configs/tiny.py:smoke")
  parser.add_argument("--devices", type=int, default=8)
  parser.add_argument("--batch", type=int, default=4096)
  given = parser.parse_args(argv)
  arguments = [f"--config={given.config}", f"--config.data.batch_size={given.batch}"]
  config = command.parse(["benchmarks.memory", *arguments], flags.FlagValues())
  assert config is not None
  predicted, measured = measure(config, given.devices)
  print(
    f"{given.config} on cpu:{given.devices}, batch {given.batch}: predicted "
    f"{predicted / targets.GIB:.3f} GiB, measured {measured / targets.GIB:.3f} GiB "
    f"({measured / predicted - 1:+.1%})"
  )


if __name__ == "__main__":
  main()
