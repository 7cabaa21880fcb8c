"""Chips that a run can be compiled for without having them, and how to name some of them.

Peaks and memory are the vendors' (cloud.google.com/tpu/docs, the data sheet of the NVIDIA H200),
interconnects those of "How to Scale Your Model" (jax-ml.github.io/scaling-book). Networks: 2 x 100
Gbit/s for the 8 chips of a v5e host, 200 for the 4 of v5p, 4 x 200 for the 8 of v6e, 400 an H200.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from spatialv2a_jax.errors import MissingAssetError, UserError, first_line
from spatialv2a_jax.training import meter


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of device.

  Attributes:
    name: as in --topology.
    platform: of JAX.
    peak_flops: dense bfloat16 FLOP/s.
    memory: bytes that a program may use; what the runtime reserves is taken off. Of a GPU JAX
      gives a program 75 %, unless XLA_CLIENT_MEM_FRACTION says otherwise.
    bandwidth: bytes/s of its memory.
    interconnect: bytes/s between chips of one slice or host, over all links together.
    network: bytes/s of a chip's share of its host's network, to other slices or hosts.
    near: chips of the largest slice, or of a host of GPUs.
    clock: cycles/s of the compiler's estimates; None where it gives none.
  """

  name: str
  platform: str
  peak_flops: float
  memory: float
  bandwidth: float
  interconnect: float
  network: float
  near: int
  clock: float | None = None


GIB = 2.0**30
CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v5e", "tpu", meter.PEAK_FLOPS["TPU v5e"], 15.75 * GIB, 8.1e11, 1.8e11, 3.1e9, 256, 1.5e9),
    Chip(
      "v5p", "tpu", meter.PEAK_FLOPS["TPU v5p"], 95.73 * GIB, 2.8e12, 5.4e11, 6.2e9, 8960, 1.75e9
    ),
    Chip(
      "v6e", "tpu", meter.PEAK_FLOPS["TPU v6e"], 31.24 * GIB, 1.6e12, 3.6e11, 1.25e10, 256, 1.75e9
    ),
    Chip("h200", "cuda", meter.PEAK_FLOPS["H200"], 0.75 * 150.7e9, 4.8e12, 4.5e11, 5e10, 8),
    # One core of a common server, so that the columns can be read; not a promise.
    Chip("cpu", "cpu", 1e11, 4 * GIB, 1e10, 1e10, 1e9, 2**20),
  )
}

# Numbers of sizes that a shape has: the larger one with the number of slices or hosts.
DIMS = {"v5p": (3, 4), "v5e": (2, 3), "v6e": (2, 3), "h200": (1, 2), "cpu": (1,)}

# What XLA must know of a GPU to compile for it; the numbers are those of NVIDIA's data sheets.
_H200 = """
gpu_device_info {
  name: "NVIDIA H200"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for.

  Attributes:
    text: as on the command line, such as "v5e:16x16".
    chip: their kind.
    shape: of a slice, after the number of slices if there are several (TPU); devices of a host,
      after the number of hosts (GPU).
  """

  text: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def count(self) -> int:
    """Number of devices."""
    return math.prod(self.shape)

  @property
  def parts(self) -> int:
    """Number of slices, or of hosts of GPUs."""
    return self.shape[0] if len(self.shape) == max(DIMS[self.chip.name]) > 1 else 1


def parse(text: str) -> Target:
  """Returns the target that "CHIP:SHAPE" names: v5e:16x16, v5p:4x4x4, h200:8, cpu:8.

  A size more comes first and says how many slices or hosts: v5e:4x16x16, h200:2x8.

  Raises:
    UserError: for an unknown chip or a shape it cannot have.
  """
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
  if not found or found.group(1) not in CHIPS:
    raise UserError(
      f"--topology {text!r} is not CHIP:SHAPE with one of {', '.join(CHIPS)}, such as v5e:16x16"
    )
  chip, shape = CHIPS[found.group(1)], tuple(map(int, found.group(2).split("x")))
  dims = DIMS[chip.name]
  if len(shape) not in dims or 0 in shape:
    wanted = " or ".join("x".join("ABCD"[:n]) for n in dims)
    raise UserError(f"--topology {text!r}: the shape of {chip.name} is {wanted}")
  target = Target(text, chip, shape)
  if target.count > target.parts * chip.near:
    part = "host" if chip.platform == "cuda" else "slice"
    example = {"h200": "h200:2x8", "v5p": "v5p:2x16x16x16"}.get(chip.name, f"{chip.name}:4x16x16")
    raise UserError(
      f"--topology {text!r}: a {part} of {chip.name} has at most {chip.near} chips; the number of "
      f"{part}s comes first, as in {example}"
    )
  return target


def prepare(target: Target) -> None:
  """Sets what must be set before JAX makes its first device: nothing may run but the CPU.

  Raises:
    MissingAssetError: if the compiler for the target is not installed.
  """
  needed = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
  modules = needed.get(target.chip.platform, ())
  if modules and not any(importlib.util.find_spec(module) for module in modules):
    package = {"tpu": "spatialv2a_jax[estimate]", "cuda": f"jax[cuda12]=={jax.__version__}"}
    raise MissingAssetError(
      f"--topology {target.text} needs the compiler of {modules[0]}, which is not installed; "
      f"pip install '{package[target.chip.platform]}' (no such hardware is needed)"
    )
  jax.config.update("jax_platforms", "cpu")
  if target.chip.platform == "cpu":
    jax.config.update("jax_num_cpu_devices", target.count)
  if target.chip.platform == "tpu":
    # Without these the library asks a metadata server which slice this machine belongs to.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  if target.chip.platform == "cuda":
    # Tile sizes of Triton's products are found by running them on the device.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_triton_gemm=false".strip()


def devices(target: Target) -> list[Any]:
  """Returns the devices of a target, of which only those of the CPU exist.

  Raises:
    UserError: if there is no slice of this shape.
  """
  if target.chip.platform == "cpu":
    return jax.devices()[: target.count]
  try:
    if target.chip.platform == "tpu":
      one = target.shape[-min(DIMS[target.chip.name]) :]
      several = {"num_slices": target.parts} if target.parts > 1 else {}
      topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{target.chip.name}:{'x'.join(map(str, one))}",
        **several,
      )
    else:
      hosts, per_host = (1, *target.shape)[-2:]
      topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.chip.name,
        target_config=_H200,
        topology=f"1x{hosts}x{per_host}",
      )
  except Exception as error:
    reason = first_line(error)
    raise UserError(f"--topology {target.text} is not possible: {reason}") from error
  found = list(topology.devices)
  if len(found) != target.count:
    raise UserError(
      f"--topology {target.text} has {len(found)} devices in JAX, not {target.count}; "
      "chips of two cores each are not supported"
    )
  return found
