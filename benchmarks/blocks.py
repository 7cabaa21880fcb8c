"""Compiles one kind of block for a chip that is not there: static time, forward and backward.

Run: python -m benchmarks.blocks ear|joint --topology v5e:2x2 [--clips 32] [--remat convolutions]
     [--activations bfloat16] [--gemm] [--attention cudnn] [--width 448 --heads 7] [--layers 4]
     [--unroll 1] [--frames 250] [--hlo FILE]

A scan over a few layers of `small_16k`, each recomputed as `--remat` says, in a minute or a few:
for comparing one way to write a block with another. `launch.estimate` compiles the whole step.
"""

import argparse
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch import flops, hlo, hlo_cost, roofline, targets
from spatialv2a_jax import sharding
from spatialv2a_jax.models import blocks, layers, remat
from spatialv2a_jax.training import train_step

VIDEO, TEXT = 64, 77  # Tokens of a clip of 8 s; 250 latent frames at 16 kHz.


def network(given: argparse.Namespace, dtype: Any = jnp.bfloat16) -> tuple[Any, Any]:
  """Returns the block, and the shapes of its tokens and conditions for one clip."""
  d, frames, kind = given.width, given.frames, jnp.dtype(given.activations)
  options = {"dtype": dtype, "gemm": given.gemm}
  if dtype == jnp.bfloat16:
    options["attention"] = given.attention

  def shape(*sizes):
    return jax.ShapeDtypeStruct((1, *sizes), kind)

  size = (d, given.heads, layers.hidden_width(d))
  if given.kind == "ear":
    block = blocks.EarBlock(*size, **options)
    return block, (shape(frames, d), (shape(frames, d),))
  tokens = shape(2, frames, d), shape(1, VIDEO, d), shape(1, TEXT, d)
  return blocks.JointBlock(2, *size, **options), (tokens, (shape(1, frames, d), shape(1, 1, d)))


def measure(given: argparse.Namespace) -> str:
  """Returns a line of results."""
  target = targets.parse(given.topology)
  targets.prepare(target)
  mesh = sharding.make_mesh(devices=targets.devices(target))
  net, (tokens, condition) = network(given)
  params = nn.unbox(jax.eval_shape(net.init, jax.random.key(0), tokens, *condition))["params"]
  # In float32, which has no products that stand in for other operations.
  plain, _ = network(given, jnp.float32)
  useful = 3 * flops.count(
    lambda p, x, c: plain.apply({"params": p}, x, *c), params, tokens, condition
  )

  def resized(tree, rows):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), tree)

  def block(p, x, condition):
    return net.apply({"params": p}, x, *condition)

  if given.remat:
    block = jax.checkpoint(block, policy=remat.POLICIES[given.remat], prevent_cse=False)

  def loss(params, x, condition):
    turn = lambda x, p: (block(p, x, condition), None)  # noqa: E731
    out = jax.lax.scan(turn, x, params, unroll=given.unroll)[0]
    return sum(jnp.square(y.astype(jnp.float32)).sum() for y in jax.tree.leaves(out))

  stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((given.layers, *x.shape), x.dtype), params)
  rows = given.clips * target.count
  whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
  step = jax.jit(
    jax.grad(loss, argnums=(0, 1, 2)),
    in_shardings=(whole, split, split),
    out_shardings=(whole, split, split),
    compiler_options=train_step.COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
  )
  start = time.perf_counter()
  compiled = step.lower(stacked, resized(tokens, rows), resized(condition, rows)).compile()
  took = time.perf_counter() - start
  text = compiled.as_text() or ""
  if given.hlo:
    pathlib.Path(given.hlo).write_text(text)
  module, chip = hlo.parse(text), target.chip
  if chip.clock:
    seconds = sum(hlo_cost.cycles(module).values()) / chip.clock
  else:
    seconds = roofline.seconds(module, chip.peak_flops, chip.bandwidth)
  share = useful * given.clips * given.layers / (seconds * chip.peak_flops)
  return (
    f"{given.kind} block on {target.text}, {given.clips} clips a chip: "
    f"{1e3 * seconds / given.layers:.2f} ms a layer, MFU {100 * share:.1f} % "
    f"(compiled in {took:.0f} s)"
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Prints one line."""
  parser = argparse.ArgumentParser(description="Static time of a block.")
  parser.add_argument("kind", choices=("ear", "joint"))
  parser.add_argument("--topology", required=True)
  parser.add_argument("--clips", type=int, default=32)
  parser.add_argument("--remat", default="convolutions", choices=("", *remat.POLICIES))
  parser.add_argument("--activations", default="bfloat16", choices=("float32", "bfloat16"))
  parser.add_argument("--gemm", action="store_true")
  parser.add_argument("--width", type=int, default=448)
  parser.add_argument("--heads", type=int, default=7)
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--unroll", type=int, default=1)
  parser.add_argument("--frames", type=int, default=250)
  parser.add_argument("--attention", default="xla", choices=("xla", "cudnn"))
  parser.add_argument("--hlo", default="")
  print(measure(parser.parse_args(argv)))


if __name__ == "__main__":
  main()
