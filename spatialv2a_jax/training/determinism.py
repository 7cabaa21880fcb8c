"""The same bits from the same program on a GPU, twice. CPU and TPU need nothing for that."""

import os

from jax._src import xla_bridge

# No atomics in scatters, reductions and convolutions, and no choice of kernels by their speed,
# which would differ from run to run.
FLAG = "--xla_gpu_deterministic_ops=true"


def enforce() -> None:
  """Makes XLA choose deterministic kernels on GPUs; costs speed there and nothing elsewhere.

  Raises:
    RuntimeError: if a backend was used already, which has read the flags.
  """
  have = os.environ.get("XLA_FLAGS", "").split()
  if FLAG in have:
    return
  if xla_bridge.backends_are_initialized():
    raise RuntimeError("determinism.enforce() must come before the first use of a device")
  os.environ["XLA_FLAGS"] = " ".join([*have, FLAG])
