import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError

RULES = sharding.Rules()


def box(shape, *names):
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def hold(monkeypatch, numbers):
  """Makes these devices those of this process."""

  def held(self, shape):
    return {d: x for d, x in self.devices_indices_map(shape).items() if d.id in numbers}

  monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", held)


@pytest.mark.parametrize(
  "sizes, expected",
  [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 1, -1), (1, 1, 8))],
)
def test_minus_one_takes_what_is_left(sizes, expected):
  mesh = sharding.make_mesh(*sizes)
  assert tuple(mesh.shape.values()) == expected
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert len(set(mesh.devices.flat)) == 8


@pytest.mark.parametrize(
  "sizes", [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 8), (16, 1, 1)]
)
def test_a_mesh_that_does_not_use_every_device_is_refused(sizes):
  with pytest.raises(UserError, match=f"data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]}"):
    sharding.make_mesh(*sizes)


def test_hosts_follow_each_other_whatever_the_order_of_their_devices():
  class Device:
    def __init__(self, number, host):
      self.id, self.process_index = number, host

  # A slice of 4x2 chips with two hosts, each with a square: numbered row by row.
  devices = [Device(n, host) for n, host in enumerate([0, 0, 1, 1, 0, 0, 1, 1])]
  mesh = sharding.make_mesh(2, 4, 1, devices=devices)
  assert [[d.process_index for d in row] for row in mesh.devices[..., 0]] == [[0] * 4, [1] * 4]
  for device in devices:  # Of four hosts, numbered across two slices.
    device.process_index = device.id // 2
    device.slice_index = device.process_index % 2
  mesh = sharding.make_mesh(2, 4, 1, devices=devices)
  assert [[d.id for d in row] for row in mesh.devices[..., 0]] == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize("held, rows", [((0, 1, 2, 3), (0, 8)), ((6, 7), (12, 16)), ((3,), (6, 8))])
def test_a_process_loads_the_rows_of_its_devices(monkeypatch, held, rows):
  hold(monkeypatch, held)
  assert sharding.local_rows(sharding.make_mesh(8, 1, 1), RULES, 16) == rows


@pytest.mark.parametrize("held", [(0, 2), (0, 1, 3), (0, 7)])
def test_rows_of_a_process_that_do_not_follow_each_other_are_refused(monkeypatch, held):
  hold(monkeypatch, held)
  with pytest.raises(UserError, match="not contiguous; give the data axis whole hosts"):
    sharding.local_rows(sharding.make_mesh(8, 1, 1), RULES, 16)
  # Copies of the same rows are no gap.
  assert sharding.local_rows(sharding.make_mesh(1, 1, 8), RULES, 16) == (0, 16)


def test_names_have_one_meaning():
  assert RULES.spec("width", None, "heads") == P("fsdp", None, "tensor")
  assert sharding.Rules(width="", zero="").spec("width", "ffn") == P(None, "tensor")
  with pytest.raises(ValueError, match="unknown logical axes .'widht'"):
    RULES.spec("widht")
  with pytest.raises(UserError, match="mesh axis fsdp twice by the rules act_batch=data.fsdp, w"):
    RULES.spec("act_batch", "width")
  with pytest.raises(UserError, match="names no mesh axis 'fsdpp', have: data, fsdp, tensor"):
    sharding.Rules(width="fsdpp")
  with pytest.raises(TypeError):
    sharding.Rules(widht="fsdp")  # pyright: ignore


def test_rules_never_change():
  for field in dataclasses.fields(sharding.Rules):
    with pytest.raises(dataclasses.FrozenInstanceError):
      setattr(RULES, field.name, "data")
  assert hash(RULES) == hash(sharding.Rules())


def test_several_mesh_axes_are_one_text():
  rules = sharding.Rules(act_batch="data+fsdp", width="fsdp+tensor", heads="", ffn="")
  assert rules == sharding.Rules(width=("fsdp", "tensor"), heads=None, ffn=None)
  assert rules.spec("act_batch") == P(("data", "fsdp"))
  mesh = sharding.make_mesh(1, 4, 2)
  (found,) = sharding.shardings([box((3, 16), None, "width")], mesh, rules)
  assert found.shard_shape((3, 16)) == (3, 2)
  for wrong in ("data+", "+data", "data+fdsp", "data,fsdp"):
    with pytest.raises(UserError, match="names no mesh axis"):
      sharding.Rules(zero=wrong)
  with pytest.raises(UserError, match="names a mesh axis twice"):
    sharding.Rules(zero="data+data")


def test_activations_that_would_use_a_mesh_axis_twice_are_refused():
  with pytest.raises(UserError, match="act_batch=data.fsdp, act_width=fsdp; leave one"):
    sharding.Rules(act_width="fsdp")
  sharding.Rules(act_width="tensor")


def test_axes_of_a_parameter_that_clash_are_named():
  tree = {"block": {"qkv": {"kernel": box((4, 8, 2), "width", "heads", None)}}}
  rules = sharding.Rules(width="tensor")
  with pytest.raises(UserError) as stop:
    sharding.shardings(tree, sharding.make_mesh(8, 1, 1), rules)
  told = str(stop.value)
  assert told.startswith(
    "block/qkv/kernel: axes ('width', 'heads', None) would use mesh axis tensor"
  )
  assert "width=tensor, heads=tensor" in told


def test_the_weights_of_the_ears_may_lie_apart():
  mesh = sharding.make_mesh(4, 1, 2)
  rules = sharding.Rules(ear="tensor", heads="", ffn="")
  (found,) = sharding.shardings([box((2, 3, 8), "ear", "layers", "width")], mesh, rules)
  assert found.shard_shape((2, 3, 8)) == (1, 3, 8)


def test_leaves_go_where_their_names_say():
  mesh = sharding.make_mesh(2, 2, 2)
  tree = {
    "kernel": box((4, 6), "width", "ffn"),
    "one": box((1, 6), "width", "ffn"),
    "bias": jax.ShapeDtypeStruct((7,), jnp.float32),
  }
  found = sharding.shardings(tree, mesh, RULES)
  assert found["kernel"] == NamedSharding(mesh, P("fsdp", "tensor"))
  assert found["one"] == NamedSharding(mesh, P(None, "tensor"))
  assert found["bias"] == NamedSharding(mesh, P())


def test_a_dimension_that_does_not_divide_names_its_parameter():
  mesh = sharding.make_mesh(2, 2, 2)
  with pytest.raises(UserError, match="block/qkv/kernel: axis heads of size 7 .* 2 devices"):
    sharding.shardings({"block": {"qkv": {"kernel": box((4, 7), "width", "heads")}}}, mesh, RULES)
  with pytest.raises(ValueError, match="other axes than its names"):
    sharding.shardings({"kernel": box((4, 6, 2), "width", "ffn")}, mesh, RULES)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_a_global_batch_is_the_local_one_in_order(sizes):
  mesh = sharding.make_mesh(*sizes)
  batch = {"id_b": np.arange(16, dtype=np.uint32), "x_bw": np.random.rand(16, 3).astype("f4")}
  assert sharding.local_rows(mesh, RULES, 16) == (0, 16)
  out = sharding.global_batch(batch, mesh, RULES, 16)
  for name, value in batch.items():
    np.testing.assert_array_equal(out[name], value)
    assert out[name].sharding.shard_shape(value.shape)[0] == 16 // (sizes[0] * sizes[1])


def test_a_batch_of_another_size_is_refused():
  mesh = sharding.make_mesh(2, 2, 2)
  with pytest.raises(UserError, match="x_bw has 4 rows, expected 8"):
    sharding.global_batch({"x_bw": np.zeros((4, 2))}, mesh, RULES, 8)
  with pytest.raises(UserError, match="use a multiple of 4"):
    sharding.local_rows(mesh, RULES, 10)


def test_activations_are_pinned():
  mesh = sharding.make_mesh(4, 2, 1)
  constrain = sharding.constrainer(mesh, RULES)
  pinned = jax.jit(lambda x: constrain(2 * x, "act_batch", "act_time", "act_width"))
  out = pinned(np.ones((8, 3, 2), np.float32))
  assert out.sharding.shard_shape(out.shape) == (1, 3, 2)


def test_bytes_are_those_of_the_fullest_device():
  mesh = sharding.make_mesh(2, 4, 1)
  split = jax.device_put(np.zeros((8, 2), np.float32), NamedSharding(mesh, P("fsdp")))
  whole = jax.device_put(np.zeros(5, np.float32), NamedSharding(mesh, P()))
  assert sharding.bytes_per_device([split, whole]) == 8 * 2 * 4 // 4 + 5 * 4
