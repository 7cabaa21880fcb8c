"""What the flow network is before any training: silent, of two ears alike, drawn as MMAudio's."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from spatialv2a_jax.sharding import Rules
from tests.models import test_flow_net as toy

WIDTH = toy.SMALL["width"]


@pytest.fixture(scope="module")
def boxed():
  return jax.jit(toy.two_ears().init)(jax.random.key(0, impl="unsafe_rbg"))  # Compiles fast.


@pytest.fixture(scope="module")
def params(boxed):
  return jax.tree.map(np.asarray, nn.unbox(boxed))


def test_the_start(boxed, params):
  x_betc = toy.normal(4, toy.CLIPS, 2, toy.FRAMES, 4)
  assert not toy.velocity(params, x_betc).any()
  names = ("joint", "joint_last")
  assert all((params[n]["cross_mass"] == 1).all() for n in names)
  assert not params["ear_embedding"].any()
  both = params["ears"]["audio"]["qkv"]["kernel"]
  assert both.shape == (2, 1, 3, 16, 2, 8)
  assert abs(both[0] - both[1]).max() > 0.01  # Each ear draws its own.

  rules = Rules()
  for box in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
    assert isinstance(box, nn.Partitioned) and len(box.names) == box.value.ndim
    rules.spec(*box.names)  # Raises on unknown names and on clashes.


def test_every_block_starts_as_the_identity(params):
  """Not the last layer alone, whose zeros hide what the blocks do."""
  zero = set()
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    names = [key.key for key in path]
    if "mod" in names:
      assert not x.any(), names
      zero.add("/".join(names[:2]))
  streams = {f"{block}/{kind}" for block in ("joint", "joint_last") for kind in ("clip", "text")}
  assert zero == streams | {"joint/audio", "joint_last/audio", "ears/audio", "final/mod"}
  assert not any(params["condition"][n].any() for n in ("null_clip", "null_sync", "sync_pos"))


def test_kernels_are_drawn_as_mmaudios(params):
  """Queries, keys and values as one wide layer, the layers of the time with a deviation of 0.02."""
  wide = np.sqrt(6 / (WIDTH + 3 * WIDTH))
  for stream in (params["joint"]["audio"], params["joint"]["text"], params["ears"]["audio"]):
    assert 0.95 * wide < abs(stream["qkv"]["kernel"]).max() <= wide
    assert all((stream[name]["scale"] == 1).all() for name in ("q_norm", "k_norm"))
  convolved = 1 / np.sqrt(3 * WIDTH)
  for layer in (params["joint"]["audio"]["out"], params["ears"]["audio"]["mlp"]["up"]):
    assert 0.95 * convolved < abs(layer["kernel"]).max() <= convolved
  assert params["ears"]["audio"]["mlp"]["up"]["kernel"].shape == (2, 1, 2, 3, WIDTH, 24)
  dense = np.sqrt(6 / (WIDTH + 24))
  assert 0.95 * dense < abs(params["joint"]["text"]["mlp"]["up"]["kernel"]).max() <= dense
  assert params["time"]["first"]["kernel"].shape == (256, WIDTH)
  for name in ("first", "second"):
    np.testing.assert_allclose(params["time"][name]["kernel"].std(), 0.02, rtol=0.15)
    assert not params["time"][name]["bias"].any()
