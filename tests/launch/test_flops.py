"""The work of the model, against closed forms and against published counts."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import figures
from configs import tiny
from launch import flops, flow_task
from spatialv2a_jax import flow, schema
from spatialv2a_jax.models import flow_net
from spatialv2a_jax.training import optim


def test_loops_and_calls_are_counted():
  def work(x, weights):
    x = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, weights)[0]
    x = jax.lax.cond(x.sum() > 0, lambda x: x @ weights[0], lambda x: x, x)
    return jax.checkpoint(lambda x: jax.jit(jnp.dot)(x, weights[0]))(x)

  shapes = jnp.zeros((16, 32)), jnp.zeros((5, 32, 32))
  assert flops.count(work, *shapes) == 7 * 2 * 16 * 32 * 32


def test_convolutions_are_counted():
  def work(x, k):
    return jax.lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

  assert flops.count(work, jnp.zeros((2, 20, 8)), jnp.zeros((3, 8, 16))) == 2 * 2 * 20 * 3 * 8 * 16


def test_a_gradient_has_the_products_that_are_needed():
  """Those of a differentiated program, of which the trace knows nothing."""

  def loss(weights, x):
    def turn(x, w):
      return jax.nn.relu(x @ w), x @ jax.lax.stop_gradient(w)

    first = x @ weights[0]  # Nobody needs the gradient of `x`.
    last, side = jax.lax.scan(turn, first, weights)
    scores = jax.nn.softmax(jax.jit(jnp.matmul)(last, last.T))
    return (scores @ last).sum() + side.sum() + (x @ jnp.ones((32, 8))).sum()

  shapes = jnp.zeros((3, 32, 32)), jnp.zeros((16, 32))
  assert flops.count_gradient(loss, *shapes) == flops.count(jax.value_and_grad(loss), *shapes)
  assert flops.count_gradient(loss, *shapes) < 3 * flops.count(loss, *shapes)


@pytest.mark.slow
def test_what_is_counted_is_what_the_train_step_multiplies():
  counted, once, repeated = figures.flops_of(tiny.get_config().to_dict())
  # The program leaves out what convolutions multiply beyond the ends of a clip.
  assert once < counted < 1.01 * once < repeated


@pytest.mark.parametrize(
  "depth, ears, gflop",
  [
    ((4, 8), 1, 61.3),  # MMAudio's small_16k, as PyTorch counts it.
    ((6, 12), 2, 166.4),
  ],
)
def test_the_network_has_the_work_that_is_known_of_it(depth, ears, gflop):
  sizes = flow_net.Config(joint_depth=depth[0], ear_depth=depth[1], ears=ears, spatial=ears == 2)
  kinds: dict[str, Any] = {"clip_dim": 1024, "sync_dim": 768, "text_len": 77, "text_dim": 1024}
  shapes = schema.feature_shapes(8.0, schema.AUDIO["16k"], **kinds)
  shapes |= {name: (ears, *shapes[name][1:]) for name in ("mean", "std")}
  found = flow_task.flops_per_clip(sizes, flow.LossConfig(), shapes) / 3e9
  assert found == pytest.approx(gflop, rel=0.02)


def test_the_gradient_of_what_is_frozen_is_no_work():
  """Of all but the last layer frozen, the backward pass is that of one product alone."""
  sizes = flow_net.Config(width=16, heads=2, joint_depth=2, ear_depth=1, ffn=32)
  kinds: dict[str, Any] = {"clip_dim": 1024, "sync_dim": 768, "text_len": 77, "text_dim": 1024}
  shapes = schema.feature_shapes(0.64, schema.AUDIO["16k"], **kinds)
  frozen = ("frozen/.*", True)
  tables = {
    "nothing": (frozen, (".*", False)),
    "joint": (frozen, ("joint/.*", True), (".*", False)),
    "all": (frozen, ("final/.*", False), (".*", True)),
  }
  work = {
    name: flow_task.flops_per_clip(
      sizes, flow.LossConfig(), shapes, optim.Config(lr=1, freeze=table)
    )
    for name, table in tables.items()
  }
  assert work["nothing"] == flow_task.flops_per_clip(sizes, flow.LossConfig(), shapes)
  forward = work["nothing"] / 3
  assert forward < work["all"] < 1.2 * forward < work["joint"] < work["nothing"]
