"""Figures of training that no other command prints.

Run: python -m benchmarks.figures ROW...

  flops    the model's FLOPs as they are counted for the MFU, against the products in the program
  cold     seconds from the command to the end of the first step, without and with kept programs
  save     milliseconds that the first save of a large state and the next block, seconds to write
           and to restore it
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import numpy as np

from configs import small_16k, tiny
from launch import estimate, hlo, hlo_cost, tasks
from spatialv2a_jax import sharding
from spatialv2a_jax.models import attention
from spatialv2a_jax.training import checkpoint


def _cold(folder: pathlib.Path) -> None:
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
  one = {"steps": 1, "optim.warmup": 0, "every.log": 1}
  values = [f"--config.{name}={x}" for name, x in {"data.path": tasks.SYNTHETIC, **one}.items()]
  for name in ("without", "with"):
    command = ["launch.train", "--config=configs/tiny.py", f"--workdir={folder / name}", *values]
    began = time.monotonic()
    with subprocess.Popen(
      [sys.executable, "-m", *command],
      cwd=pathlib.Path(__file__).parents[1],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
    ) as process:
      assert process.stdout is not None
      how = first = ""
      for line in process.stdout:
        if "step 1/1 " in line:
          first = f"{time.monotonic() - began:.1f} s"
        how = line.partition(";")[0] if line.startswith("traced") else how
    if process.returncode or not first:
      raise SystemExit(f"launch.train left with {process.returncode}")
    print(f"first step {name} kept programs after {first}; {how}", flush=True)


def flops_of(config: dict[str, Any]) -> tuple[float, float, float]:
  """Returns FLOPs of a clip: counted for the MFU, in the program, and with what it repeats."""
  config["data"] |= {"path": tasks.SYNTHETIC, "eval": "", "batch_size": 2}
  # Nothing computed twice, no loop: every product of the model stands in the text once.
  config["model"] |= {"remat": "", "unroll": True, "dtype": "float32", "activations": "float32"}
  config["accumulate"] = 1
  program = estimate.program(config, jax.devices()[:1])
  plain: Any = attention.attend  # Differentiated as it stands, nothing is computed twice.
  with mock.patch.object(attention, "attend", plain.fun):
    once = _products(estimate.program(config, jax.devices()[:1]))
  return program.flops_per_clip() or 0.0, once / 2, _products(program) / 2


def _flops(_: pathlib.Path) -> None:
  for name, module in (("tiny", tiny), ("small_16k", small_16k)):
    counted, once, whole = flops_of(module.get_config().to_dict())
    print(
      f"{name}: {counted / 1e9:.3f} GFLOP a clip counted, {once / 1e9:.3f} in the program "
      f"({100 * (counted / once - 1):+.2f} %), {whole / 1e9:.3f} with what the gradient of "
      "attention computes a second time"
    )


def _products(program: estimate.Program) -> int:
  """Returns the FLOPs of all products of a step, before the compiler changes anything."""
  lowered = program.step.lower(program.state, program.batch)
  text = lowered.compiler_ir("hlo").as_hlo_module().to_string()
  return hlo_cost.flops(hlo.parse(text))


def _save(folder: pathlib.Path) -> None:
  config: dict[str, Any] = small_16k.get_config().to_dict()
  config["data"] |= {"path": tasks.SYNTHETIC, "eval": ""}
  mesh = sharding.make_mesh(jax.device_count(), 1, 1)
  _, abstract, _ = tasks.recipe(config, mesh)[1].state()
  rng = np.random.default_rng(0)

  def fill(x: Any) -> jax.Array:
    if x.dtype != np.float32:
      return jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
    return jax.device_put(rng.standard_normal(x.shape, np.float32), x.sharding)

  state = jax.tree.map(fill, abstract)
  arrays = jax.tree.leaves(state)
  size = sum(x.nbytes for x in arrays)
  blocked = []
  with checkpoint.Checkpoints(folder) as checkpoints:
    for step in (1, 2):
      clock = time.perf_counter()
      checkpoints.save(step, state, {})
      blocked.append(1e3 * (time.perf_counter() - clock))
      checkpoints.wait()
      written = time.perf_counter() - clock
    clock = time.perf_counter()
    found = checkpoints.restore(abstract)
    restored = time.perf_counter() - clock
  assert found is not None
  same = all(bool((a == b).all()) for a, b in zip(arrays, jax.tree.leaves(found[0]), strict=True))
  print(
    f"{size / 2**30:.2f} GiB in {len(arrays)} arrays on {mesh.size} devices: the first save blocks "
    f"{blocked[0]:.0f} ms, the next {blocked[1]:.0f} and is on disk after {written:.1f} s; "
    f"restored in {restored:.1f} s, "
    f"{'bit for bit' if same else 'with OTHER values'}"
  )


ROWS = {"cold": _cold, "flops": _flops, "save": _save}


def main() -> None:
  """Prints the rows."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("rows", nargs="+", choices=ROWS, metavar="ROW")
  args = parser.parse_args()
  for row in args.rows:
    with tempfile.TemporaryDirectory() as folder:
      ROWS[row](pathlib.Path(folder))


if __name__ == "__main__":
  main()
