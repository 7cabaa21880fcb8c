"""The loss on held-out clips."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import evaluation, tasks
from spatialv2a_jax import schema, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import train_step
from tests import loader_shards
from tests.launch.test_train import one_device


def loss(params, stats, batch, key):
  """The square of each clip's number times `params`; a second metric of the other sign."""
  del key
  mean_betc, weight_b = schema.widen(batch)["mean_betc"], batch["weight_b"]
  square_b = jnp.square(params * mean_betc[:, 0, 0, 0])
  value = (weight_b * square_b).sum() / jnp.maximum(weight_b.sum(), 1)
  return value, ({"minus": -value}, stats)


def test_held_out_clips_of_another_layout_are_told_before_the_first_evaluation(tmp_path):
  loader_shards.build(tmp_path)
  config = {"data": {"eval": str(tmp_path), "batch_size": 8}, "seed": 0}
  for frames in (4, 5):
    shapes = loader_shards.SHAPES | {"mean": (2, frames, 3)}
    source = tasks.Source(config, one_device(), sharding.Rules(), "features", shapes)
    hook = evaluation.Evaluation(loss, config, one_device(), sharding.Rules(), source)
    with contextlib.nullcontext() if frames == 4 else pytest.raises(UserError, match="needs .2, 5"):
      hook.check()


def test_every_held_out_clip_counts_the_same_whatever_the_batch(tmp_path):
  order = loader_shards.stream(loader_shards.build(tmp_path), 1, batch_size=22, seed=None)
  mesh, rules = one_device(), sharding.Rules()
  state = train_step.State(0, 5.0, 2.0, {}, {}, {}, means=({},))
  state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
  stop = types.SimpleNamespace(due=lambda: False, poll=lambda: False)

  def evaluate(size, batches=4, listener=None):
    data = {"eval": str(tmp_path), "eval_batches": batches, "batch_size": size}
    config = {"data": data, "seed": 0}
    source = tasks.Source(config, mesh, rules, "features", loader_shards.SHAPES)
    hook = evaluation.Evaluation(loss, config, mesh, rules, source, listener)
    return hook(state, 1, None, stop)

  for size, batches, clips in ((8, 4, 22), (16, 4, 22), (22, 1, 22), (8, 2, 16)):
    mean = np.square(2.0 * np.array(order[:clips])).mean()
    found = evaluate(size, batches)
    assert found == pytest.approx({"eval/loss": mean, "eval/minus": -mean})

  heard = []  # Clips of the first batch; the last one may be filled up.
  evaluate(8, listener=lambda params, stats, batch, *_: heard.append(batch))
  assert [loader_shards.numbers(batch) for batch in heard] == [order[:8]]
