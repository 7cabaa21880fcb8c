"""What a config leaves to the devices of its mesh."""

import jax
import pytest

from launch import tasks
from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import flow_net
from tests.launch.test_train import config_of, one_device


def test_attention_of_another_device_is_refused_at_the_start():
  options = {"model.attention": "cudnn", "model.dtype": "bfloat16"}
  with pytest.raises(UserError, match="attention=cudnn is for .* this mesh is of cpu: use auto"):
    tasks.build(config_of("small_16k", "smoke", **options), one_device(), sharding.Rules())


def test_the_devices_of_the_mesh_choose_the_program(monkeypatch):
  """Those of an estimate are not of this machine."""
  given = []
  real = flow_net.build
  monkeypatch.setattr(flow_net, "build", lambda *a, **k: given.append(k.get("device")) or real(*a))
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[3:4])
  tasks.build(config_of("small_16k", "smoke"), mesh, sharding.Rules())
  assert given == [jax.devices()[3]]
