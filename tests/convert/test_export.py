"""Export: what came from upstream goes back, bit for bit where nothing was folded."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from spatialv2a_jax import cli, convert
from spatialv2a_jax.convert import engine
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.model_folder import load_model
from spatialv2a_jax.models import flow_net, vae, vocoder
from tests.models import encoder_states, reference

RNG = np.random.default_rng(0)
SMALL_VOCODER = vocoder.Config(
  n_mels=128, width=8, rates=(64, 8), kernels=(128, 16), block_kernels=(3, 7), dilations=(1, 3, 5),
  bounded="clip", final_bias=False,
)  # fmt: skip


def mmaudio(v2):
  sizes = {"width": 32, "channels": 20, "dims": (6, 5, 7), "text_len": 3}
  return reference.random_state(0, v2=v2, heads=2, joint_depth=3, ear_depth=2, **sizes)


def golden(name):
  arrays = load_file(pathlib.Path(__file__).parents[1] / "golden" / f"{name}.safetensors")
  return {k.removeprefix("param/"): x for k, x in arrays.items() if k.startswith("param/")}


def raw(source, config):
  """A random state dict of the shapes that our network has upstream, of many magnitudes."""
  chosen = convert.SOURCES[source]
  net = chosen.build(config)
  shapes = nn.unbox(jax.eval_shape(net.init, jax.random.key(0)))
  if chosen.stats:
    shapes[engine.STATS] = jax.eval_shape(net.init_stats)
  ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  state, _ = engine.export(chosen, config, ones, "ones")
  return {
    key: RNG.normal(size=x.shape) * 10 ** RNG.uniform(-2, 2, (len(x),) + (1,) * (x.ndim - 1))
    if x.ndim
    else RNG.normal(size=())
    for key, x in state.items()
  }


STATES = {
  "mmaudio": lambda: mmaudio(False),
  "mmaudio v2": lambda: mmaudio(True),
  "clip": lambda: encoder_states.clip(layers=2),
  "synchformer": lambda: encoder_states.synchformer(layers=2),
  "clipseg": encoder_states.clipseg,
  "vae": lambda: raw("vae", vae.Config(80, 4, 8, folded=True)),
  "bigvgan_v2": lambda: raw("bigvgan_v2", SMALL_VOCODER),
  "beats": lambda: golden("beats"),
  "acl": lambda: golden("acl"),
}
FOLDED = {"beats": 2, "clipseg": 1, "vae": 53, "bigvgan_v2": 2 * (1 + 2 + 2 * 2 * 6 + 1)}


@pytest.mark.parametrize("name", STATES)
def test_there_and_back_is_the_same(name, tmp_path, capsys):
  source = name.split()[0]
  state = {key: np.asarray(x, np.float32) for key, x in STATES[name]().items()}
  save_file(state, tmp_path / "theirs.safetensors")
  assert convert.run(source, tmp_path / "theirs.safetensors", tmp_path / "model") == 0
  back = tmp_path / "back.safetensors"
  assert cli.main(["export", source, str(tmp_path / "model"), "--out", str(back)]) == 0
  assert "of which" in capsys.readouterr().out

  got = load_file(back)
  with safe_open(back, "numpy") as file:
    metadata = file.metadata()
  rebuilt = json.loads(metadata["rebuilt"])
  assert len(rebuilt) == FOLDED.get(source, 0)
  assert metadata["licence"] == convert.SOURCES[source].licence
  unused = {key for key in state if ".patch_embed.proj." in key}
  assert set(got) == set(state) - unused
  for key in set(got) - set(rebuilt):
    np.testing.assert_array_equal(got[key], state[key], key)

  # What was folded may look different, but folds to the same.
  config, want = engine.convert(convert.SOURCES[source], state, "theirs")
  again, params = engine.convert(convert.SOURCES[source], got, "back")
  assert again == config
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-12)


def test_the_vae_regains_the_size_that_its_folding_divides_by():
  """Upstream folds what it loads, and EDM2's folding of a folded weight is another one."""
  state = STATES["vae"]()
  config, params = engine.convert(convert.SOURCES["vae"], state, "state")
  back, _ = engine.export(convert.SOURCES["vae"], config, params, "back")
  for key, weight in state.items():
    if weight.ndim == 3 and key.endswith(".weight"):
      size, want = (np.linalg.norm(x, axis=(1, 2)) for x in (back[key], weight))
      small = want < 3  # A larger one leaves too little trace, and matters as little.
      np.testing.assert_allclose(size[small], want[small], rtol=1e-2)


def test_a_network_that_upstream_does_not_have_is_refused(model_folder, tmp_path):
  with pytest.raises(UserError, match="one ear and no spatial condition"):
    convert.export("mmaudio", model_folder, tmp_path / "out.safetensors")
  with pytest.raises(UserError, match="has no network 'clip', only flow, vae"):
    convert.export("clip", model_folder, tmp_path / "out.safetensors")
  assert not (tmp_path / "out.safetensors").exists()


def test_our_own_training_goes_out_too(model_folder, tmp_path):
  """A VAE trained here keeps unfolded weights, which are upstream's as they are."""
  assert convert.export("vae", model_folder, tmp_path / "out.safetensors") == 0
  ours = load_model(model_folder).params["vae"]
  theirs = load_file(tmp_path / "out.safetensors")
  kernel = ours["decoder"]["up_1_block_2"]["conv1"]["kernel"]
  np.testing.assert_array_equal(theirs["decoder.up.1.block.2.conv1.weight"], kernel.T)


def test_parameters_that_do_not_fit_are_all_told():
  config = flow_net.Config(
    width=8, heads=1, joint_depth=1, ear_depth=1, latent_channels=4, clip_dim=2, sync_dim=2,
    text_dim=2, text_len=2, ears=1, spatial=False, ffn=8,
  )  # fmt: skip
  with pytest.raises(UserError) as caught:
    engine.export(convert.SOURCES["mmaudio"], config, {"alien": np.ones(1)}, "it")
  message = str(caught.value)
  assert (
    "parameters unknown to it: alien" in message
    and "has no: audio/first/bias, audio/first" in message
  )
