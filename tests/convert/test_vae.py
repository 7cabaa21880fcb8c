"""MMAudio's VAE by upstream's names, raw, against upstream's numbers; folding; file to folder."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from spatialv2a_jax import convert, model_folder
from spatialv2a_jax.convert import engine, vae
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import vae as models_vae
from tests.convert import torch_zip

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden():
  """Both halves of the golden VAE under upstream's names and layouts."""
  data = load_file(GOLDEN / "vae16_encoder.safetensors")
  data |= load_file(GOLDEN / "vae16_decoder.safetensors")
  arrays = {n: x for n, x in data.items() if n in ("in/mel", "in/z", "out/mel")}
  arrays |= {n: data[n].swapaxes(1, 2) for n in ("out/mean", "out/std")}
  for name, x in data.items():
    if not name.startswith("param/"):
      continue
    key = re.sub(r"_(\d)_block_(\d)/", r"/\1/block/\2/", name).removeprefix("param/")
    key = key.replace("down_0_downsample_", "down/0/downsample/")
    key = key.replace("up_1_upsample_", "up/1/upsample/").replace("frozen/", "")
    key = key.replace("/", ".").replace(".kernel", ".weight")
    frozen = key in ("data_mean", "data_std")
    arrays[f"param/{key}"] = x.reshape(1, -1, 1) if frozen else x.T.copy()
  return {name: np.array(x, order="C") for name, x in arrays.items()}


def state_of(golden):
  return {k.removeprefix("param/"): x for k, x in golden.items() if k.startswith("param/")}


def test_the_golden_file_has_all_of_upstreams_tensors(golden):
  assert len(state_of(golden)) == 57


@pytest.mark.slow
def test_upstreams_outputs_come_out(golden, tmp_path):
  save_file(golden, tmp_path / "golden.safetensors")
  lines = []
  assert convert.check("vae", tmp_path / "golden.safetensors", 1e-5, lines.append) == 0
  names = [line.split()[0] for line in lines]
  assert names == ["mean", "mel", "std"] and all(line.endswith("ok") for line in lines)


def test_weights_are_folded_once(golden):
  state = state_of(golden)
  config, params = engine.convert(vae.SOURCE, state, "state")
  assert config.folded and (config.n_mels, config.latent_channels, config.width) == (80, 20, 24)
  raw = state["encoder.down.1.block.0.conv1.weight"].astype(np.float64)  # (48, 24, 3).
  size = np.sqrt((raw**2).sum((1, 2), keepdims=True))
  want = raw / (np.sqrt(24 * 3) * 1e-4 + size)
  got = params["encoder"]["down_1_block_0"]["conv1"]["kernel"]
  np.testing.assert_allclose(got.transpose(2, 1, 0), want, rtol=1e-5)


def test_every_weight_is_the_folded_one_of_the_golden_file(golden):
  """With which the VAE's own test gives upstream's latents and mels."""
  _, params = engine.convert(vae.SOURCE, state_of(golden), "state")
  flat = traverse_util.flatten_dict(params, sep="/")
  ours = load_file(GOLDEN / "vae16_encoder.safetensors")
  ours |= load_file(GOLDEN / "vae16_decoder.safetensors")
  want = {k.removeprefix("param/"): x for k, x in ours.items() if k.startswith("param/")}
  assert set(flat) == set(want)
  kernels = {name: x for name, x in want.items() if name.endswith("kernel")}
  want |= jax.jit(lambda kernels: jax.tree.map(models_vae.fold, kernels))(kernels)
  for name, expected in want.items():
    np.testing.assert_allclose(np.asarray(flat[name]), expected, rtol=1e-6, atol=1e-8)


def test_a_file_becomes_a_model_folder_with_its_origin(golden, tmp_path, capsys):
  file = torch_zip.write_state(tmp_path / "v1-16.pth", state_of(golden))
  assert convert.run("vae", file, tmp_path / "model") == 0
  assert "CC-BY-NC-4.0" in capsys.readouterr().out
  model = model_folder.load_model(tmp_path / "model")
  about = json.loads((tmp_path / "model" / "config.json").read_text())
  assert about["audio"] == "16k" and about["vae"]["width"] == 24
  origin = about["vae_source"]
  assert origin["file"] == "v1-16.pth" and len(origin["sha256"]) == 64
  want = engine.convert(vae.SOURCE, state_of(golden), "state")[1]
  got = model.params["vae"]["decoder"]["conv_in"]["kernel"]
  np.testing.assert_array_equal(got, want["decoder"]["conv_in"]["kernel"])


def test_nothing_is_written_for_a_checkpoint_that_does_not_fit(golden, tmp_path):
  state = state_of(golden)
  del state["encoder.mid.attn_1.qkv.weight"]
  file = torch_zip.write_state(tmp_path / "bad.pth", state)
  with pytest.raises(UserError, match="missing in the file: encoder.mid.attn_1.qkv.weight"):
    convert.run("vae", file, tmp_path / "model")
  assert not list((tmp_path / "model").glob("*"))


def test_a_folder_is_for_one_rate_of_sound(golden, tmp_path):
  """The networks of the other rate have the same file names."""
  save_file(state_of(golden), tmp_path / "vae.safetensors")
  out = tmp_path / "out"
  model_folder.save_model(out, {"vae": {"x": np.ones(1, np.float32)}}, {}, {"audio": "44k"})
  with pytest.raises(UserError, match="networks for 44k sound .* 16k sound; give --out another"):
    convert.run("vae", tmp_path / "vae.safetensors", out)
  assert list(model_folder.load_model(out).params["vae"]) == ["x"]
  for _ in range(2):  # The same again is no mistake.
    assert convert.run("vae", tmp_path / "vae.safetensors", tmp_path / "other") == 0
