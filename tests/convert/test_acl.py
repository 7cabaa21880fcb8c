"""ACL's files as they are released: nested, with settings beside the weights, in PyTorch's zip."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from spatialv2a_jax import cli, model_folder
from spatialv2a_jax.convert import SOURCES, engine
from spatialv2a_jax.errors import UserError
from tests.convert import torch_zip

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SHARED = "encoder.layers.{}.self_attn.relative_attention_bias.weight"


def state_of(name):
  arrays = load_file(GOLDEN / f"{name}.safetensors")
  return {
    k.removeprefix("param/"): x.astype(np.float32)
    for k, x in arrays.items()
    if k.startswith("param/")
  }


def test_nested_files_convert_without_running_their_pickles(tmp_path):
  storages, pairs = {}, {"audio_proj": [], "masker_i": []}
  for key, x in state_of("acl").items():
    part, name = key.split(".", 1)
    number = str(len(storages))
    storages[number] = np.array(x, order="C")
    pairs[part].append((name, torch_zip.tensor(storages[number], number)))
  content = torch_zip.mapping([(part, torch_zip.ordered(rows)) for part, rows in pairs.items()])
  file = torch_zip.write(tmp_path / "Param_best.pth", content, storages)
  assert cli.main(["convert", "acl", str(file), "--out", str(tmp_path / "model")]) == 0
  params = model_folder.load_model(tmp_path / "model").params["acl"]
  assert float(params["mask"]["bias"]) == 11 and params["into"]["kernel"].shape == (96, 96)


def test_settings_beside_the_weights_are_heeded():
  state = state_of("beats")
  released = {"deep_norm": True, "max_distance": 1280, "activation_fn": "gelu", "dropout": 0.1}
  config, _ = engine.convert(SOURCES["beats"], {"cfg": released, "model": state}, "file")
  assert config.max_distance == 1280
  assert (config.layers, config.heads, config.groups, config.buckets) == (12, 2, 4, 320)
  other = released | {"layer_norm_first": True}
  with pytest.raises(UserError, match="cfg.layer_norm_first is True, known is False"):
    engine.convert(SOURCES["beats"], {"cfg": other, "model": state}, "file")


def test_the_table_of_distances_is_one():
  state = state_of("beats")
  single = {k: x for k, x in state.items() if k == SHARED.format(0) or k[-26:] != SHARED[-26:]}
  assert len(single) == len(state) - 11
  _, whole = engine.convert(SOURCES["beats"], state, "file")
  _, once = engine.convert(SOURCES["beats"], single, "file")
  np.testing.assert_array_equal(whole["distances"], once["distances"])
  state[SHARED.format(5)] = state[SHARED.format(5)] + 1
  with pytest.raises(UserError, match="of another shape: .*relative_attention_bias"):
    engine.convert(SOURCES["beats"], state, "file")
