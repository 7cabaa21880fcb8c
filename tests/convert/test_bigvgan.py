"""BigVGAN by upstream's names against upstream's numbers, in every spelling of weight norm."""

import pathlib
import re

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from spatialv2a_jax import convert
from spatialv2a_jax.convert import bigvgan, engine
from spatialv2a_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "bigvgan_16k.safetensors"
SPELLINGS = {
  "plain": ("weight_g", "weight_v"),
  "parametrized": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}


@pytest.fixture(scope="module")
def golden():
  """The golden vocoder, folded, under upstream's names; its first convolution passes all on."""
  data = load_file(GOLDEN)
  identity = np.zeros((64, 64, 7), np.float32)
  identity[:, :, 3] = np.eye(64)
  state = {"conv_pre.weight": identity, "conv_pre.bias": np.zeros(64, np.float32)}
  for name, x in data.items():
    if not name.startswith("param/"):
      continue
    key = name.removeprefix("param/").replace("/", ".").replace(".kernel", ".weight")
    key = re.sub(r"^ups_(\d)", r"ups.\1.0", key)
    key = re.sub(r"(resblocks|activations|convs1|convs2)_(\d+)", r"\1.\2", key)
    key = re.sub(r"\.(alpha|beta)$", r".act.\1", key)
    if x.ndim == 3:  # (taps, in, out); upstream has (in, out, taps) where it upsamples.
      x = x.transpose(1, 2, 0) if key.startswith("ups") else x.transpose(2, 1, 0)
    state[key] = np.ascontiguousarray(x)
  ours = {k.removeprefix("param/"): x for k, x in data.items() if k.startswith("param/")}
  return state, ours, data["in/hidden"], data["out/waveform"][:, None]


def spelled(state, names):
  """Takes every weight apart into a size and a direction of another length."""
  out, rng = {}, np.random.default_rng(0)
  for key, x in state.items():
    if not key.endswith(".weight"):
      out[key] = x
      continue
    size = np.sqrt((x.astype(np.float64) ** 2).sum((1, 2), keepdims=True))
    stem = key.removesuffix("weight")
    out[stem + names[0]] = size.astype(np.float32)
    out[stem + names[1]] = (x * rng.uniform(0.1, 10, size.shape)).astype(np.float32)
  return out


@pytest.mark.slow
def test_upstreams_waveform_comes_out(golden, tmp_path):
  state, _, mel, waveform = golden
  arrays = {f"param/{k}": x for k, x in spelled(state, SPELLINGS["plain"]).items()}
  arrays["param/resblocks.0.activations.0.upsample.filter"] = np.ones((1, 1, 12), np.float32)
  save_file(arrays | {"in/mel": mel, "out/waveform": waveform}, tmp_path / "golden.safetensors")
  lines = []
  assert convert.check("bigvgan", tmp_path / "golden.safetensors", 1e-4, lines.append) == 0
  assert len(lines) == 1 and lines[0].startswith("waveform") and lines[0].endswith("ok")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_folds_to_the_same_weights(golden, spelling):
  state, ours, _, _ = golden
  config, want = engine.convert(bigvgan.V1, state, "folded")
  assert config.rates == (4, 2, 2, 2, 2) and config.block_kernels == (3, 7, 11)
  flat = traverse_util.flatten_dict(want, sep="/")
  assert set(flat) - set(ours) == {"conv_pre/kernel", "conv_pre/bias"}
  for name, kernel in ours.items():  # With which the vocoder's own test gives upstream's sound.
    np.testing.assert_array_equal(flat[name], kernel)
  wrapped = {"generator": spelled(state, SPELLINGS[spelling])}
  again, got = engine.convert(bigvgan.V1, wrapped, spelling)
  assert again == config
  for name in ("ups_0", "conv_pre"):
    np.testing.assert_allclose(got[name]["kernel"], want[name]["kernel"], atol=1e-6)
  deep = [x["resblocks_7"]["convs1_2"]["kernel"] for x in (got, want)]
  np.testing.assert_allclose(*deep, atol=1e-6)


def test_version_2_is_clipped_and_needs_no_last_bias(golden):
  state, _, _, _ = golden
  bare = {k: x for k, x in state.items() if k != "conv_post.bias"}
  config, params = engine.convert(bigvgan.V2, bare, "state")
  assert config.bounded == "clip" and not config.final_bias and "bias" not in params["conv_post"]
  assert engine.convert(bigvgan.V1, state, "state")[0].bounded == "tanh"
  # Their files look the same but for that bias; a wrong end went unnoticed.
  for source, other, name in ((bigvgan.V1, bare, "bigvgan_v2"), (bigvgan.V2, state, "bigvgan")):
    with pytest.raises(UserError, match=f"convert it as {name}\\)"):
      engine.convert(source, other, "state")


def test_a_vocoder_of_another_hop_is_refused(golden, tmp_path):
  state, _, _, _ = golden
  halved = {k: x[..., :4] if k == "ups.0.0.weight" else x for k, x in state.items()}
  save_file(halved, tmp_path / "fast.safetensors")
  with pytest.raises(UserError, match=r"fast.safetensors: \d+ mel bins every 32 samples"):
    convert.run("bigvgan", tmp_path / "fast.safetensors", tmp_path / "model")
  assert not (tmp_path / "model" / "config.json").exists()
