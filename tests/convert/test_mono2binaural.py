"""PseudoBinaural's networks by upstream's names against upstream's numbers, and its three files.

The golden files hold small random networks of upstream's code (PyTorch 2.13): inputs, every 7th bin
and 5th frame of the outputs (`thin/`), and outputs and running statistics of a training step.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from spatialv2a_jax import convert, io, model_folder
from spatialv2a_jax.convert import engine, mono2binaural
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.models import mono2binaural as model
from tests.convert import torch_zip

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIG = model.Config(width=2, planes=2, rows=64, columns=128, apnet=True, assoconv=True)


@functools.cache
def golden(norm):
  return load_file(GOLDEN / f"mono2binaural_{norm}.safetensors")


def part(norm, prefix):
  return {k.removeprefix(prefix): x for k, x in golden(norm).items() if k.startswith(prefix)}


def inputs(norm):
  return {name: x.astype("f4") if x.dtype == "f2" else x for name, x in part(norm, "in/").items()}


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_upstreams_outputs_come_out(norm):
  config, params = engine.convert(mono2binaural.SOURCE, part(norm, "param/"), "state")
  assert config == model.Config(**{**vars(CONFIG), "norm": norm})
  outputs = mono2binaural.outputs(config, params, inputs(norm))
  features = np.asarray(outputs["visual_features"]())
  assert convert.relative_error(features, golden(norm)["out/visual_features"]) < 1e-5
  for name, want in part(norm, "thin/").items():
    got = np.asarray(outputs[name]())
    assert got.shape == (2, 2, 256, 64)
    assert convert.relative_error(got[..., ::7, ::5], want) < 1e-4, name


def test_a_training_step_has_upstreams_statistics():
  config, params = engine.convert(mono2binaural.SOURCE, part("batch", "param/"), "state")
  stats = params.pop(engine.STATS)
  mix, image = (jnp.moveaxis(inputs("batch")[n], 1, -1) for n in ("audio_mix", "image"))
  apply = jax.jit(model.build(config).apply, static_argnames="train")
  out, new = apply(params, stats, mix, image, train=True)
  want = part("batch", "train/")
  features, mask = (np.moveaxis(np.asarray(out[n]), -1, 1) for n in ("features", "mask"))
  assert convert.relative_error(features, want["visual_features"]) < 1e-4
  assert convert.relative_error(mask[..., ::7, ::5], want["mask_prediction"]) < 1e-4
  # The converter's table finds our place of each of upstream's statistics.
  places = mono2binaural.table(part("batch", "param/"), config)
  ours = {leaf.keys[0]: path for path, leaf in places.items() if path.startswith(engine.STATS)}
  flat = traverse_util.flatten_dict({engine.STATS: new}, sep="/")
  after = part("batch", "after/")
  assert len(after) == 12
  for key, value in after.items():
    np.testing.assert_allclose(
      np.asarray(flat[ours[key]]), value, rtol=1e-4, atol=1e-5, err_msg=key
    )


def split(state, folder, suffix="best"):
  """Writes upstream's three files."""
  for name, prefix in (("visual", "visual."), ("audio", "audio."), ("fusion", "apnet.")):
    own = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
    torch_zip.write_state(folder / f"{name}_{suffix}.pth", own)


def test_three_files_become_a_model_folder(tmp_path):
  state = part("batch", "param/")
  split(state, tmp_path)
  assert convert.run("mono2binaural", tmp_path / "audio_best.pth", tmp_path / "model") == 0
  folder = model_folder.load_model(tmp_path / "model")
  assert folder.config["mono2binaural"]["apnet"] and not folder.config["mono2binaural"]["assoconv"]
  beside = {f"{x}_best.pth": io.file_hash(tmp_path / f"{x}_best.pth") for x in ("visual", "fusion")}
  assert folder.config["mono2binaural_source"]["beside"] == beside
  want = {k: x for k, x in state.items() if not k.startswith("assoconv.")}
  _, params = engine.convert(mono2binaural.SOURCE, want, "state")
  stats = params.pop(engine.STATS)
  for ours, theirs in ((folder.params, params), (folder.stats, stats)):
    flat = traverse_util.flatten_dict(ours["mono2binaural"], sep="/")
    expected = traverse_util.flatten_dict(theirs, sep="/")
    assert flat.keys() == expected.keys()
    for name, x in expected.items():
      np.testing.assert_array_equal(flat[name], x, err_msg=name)


def test_the_way_back_gives_upstreams_tensors(tmp_path):
  state = part("batch", "param/")
  file = tmp_path / "audio_and_all.safetensors"  # Whatever its name, it has no companions.
  save_file(state, file)
  convert.run("mono2binaural", file, tmp_path / "model")
  convert.export("mono2binaural", tmp_path / "model", tmp_path / "back.safetensors")
  back = load_file(tmp_path / "back.safetensors")
  unused = {k for k in state if "num_batches_tracked" in k or "channel_mapping_conv_b" in k}
  assert back.keys() == state.keys() - unused
  for name, x in back.items():
    np.testing.assert_array_equal(x, state[name], err_msg=name)


def test_torchvisions_resnet_is_the_same_network_under_other_names():
  state = {k: x for k, x in part("batch", "param/visual.feature_extraction.").items()}
  names = {"0": "conv1", "1": "bn1", **{str(4 + i): f"layer{i + 1}" for i in range(4)}}
  theirs = {f"{names[k.split('.')[0]]}.{k.partition('.')[2]}": x for k, x in state.items()}
  theirs |= {"fc.weight": np.zeros((1000, 16), "f4"), "fc.bias": np.zeros(1000, "f4")}
  config, params = engine.convert(mono2binaural.RESNET, theirs, "state")
  assert config.planes == 2
  outputs = mono2binaural.RESNET.outputs(config, params, inputs("batch"))
  features = np.asarray(outputs["features"]())
  assert convert.relative_error(features, golden("batch")["out/visual_features"]) < 1e-5
  whole = engine.convert(mono2binaural.SOURCE, part("batch", "param/"), "state")[1]
  stats = params.pop(engine.STATS)
  for ours, want in ((params, whole), (stats, whole[engine.STATS])):
    jax.tree.map(np.testing.assert_array_equal, ours, want["visual"])


def test_a_missing_or_alien_part_is_told(tmp_path):
  state = part("batch", "param/")
  split(state, tmp_path)
  (tmp_path / "visual_best.pth").unlink()
  with pytest.raises(MissingAssetError, match="visual_best.pth"):
    convert.run("mono2binaural", tmp_path / "audio_best.pth", tmp_path / "model")
  with pytest.raises(UserError, match="give audio_SUFFIX.pth"):
    convert.run("mono2binaural", tmp_path / "fusion_best.pth", tmp_path / "model")
  bad = {**state, "audio.extra.weight": np.zeros(1, "f4")}
  del bad["apnet.fusion2.channel_mapping_conv_w.bias"]
  save_file(bad, tmp_path / "bad.safetensors")
  with pytest.raises(UserError, match="fusion2.channel_mapping_conv_w.bias.*audio.extra.weight"):
    convert.run("mono2binaural", tmp_path / "bad.safetensors", tmp_path / "model")
  assert not list((tmp_path / "model").iterdir())
