"""The mel VAE against MMAudio's numbers, and the ways its weights may be scaled."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from spatialv2a_jax.models import vae

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SMALL = vae.Config(n_mels=8, latent_channels=4, width=4)


def _golden(name):
  data = load_file(GOLDEN / f"{name}.safetensors")
  params = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
  return unflatten_dict(params, sep="/"), data


def _random(net):
  """Draws parameters with NumPy: compiling fifty random draws takes longer than the tests."""
  rng = np.random.default_rng(0)
  shapes = nn.unbox(jax.eval_shape(net.init, jax.random.key(0)))
  draw = lambda x: rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
  params = jax.tree.map(lambda x: draw(x) if x.ndim == 3 else np.zeros(x.shape, np.float32), shapes)
  return {**params, "frozen": {"data_mean": np.zeros(8), "data_std": np.ones(8)}}


def _close(got, want, atol):
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_encoder_is_mmaudio_s():
  params, data = _golden("vae16_encoder")
  net = vae.build(vae.Config(80, 20, 24))
  mean, std = jax.jit(net.encode)(params, data["in/mel"])
  _close(mean, data["out/mean"], 3e-5)
  _close(std, data["out/std"], 4e-5)


def test_decoder_is_mmaudio_s():
  params, data = _golden("vae16_decoder")
  net = vae.build(vae.Config(80, 20, 24))
  _close(jax.jit(net.decode)(params, data["in/z"]), data["out/mel"], 3e-5)


@pytest.mark.parametrize(
  ("config", "count"),
  [(vae.Config(80, 20, 384), 171_657_218), (vae.Config(128, 40, 512), 305_479_682)],
)
def test_released_sizes(config, count):
  shapes = jax.eval_shape(vae.build(config).init, jax.random.key(0))
  trained = {k: v for k, v in shapes.items() if k != "frozen"}
  assert sum(x.size for x in jax.tree.leaves(trained)) == count


@pytest.fixture(scope="module")
def small():
  net = vae.build(SMALL)
  params = _random(net)
  mel = jax.random.normal(jax.random.key(1), (2, 8, 12))
  return net, params, mel


def _map_kernels(function, params):
  path_map = jax.tree_util.tree_map_with_path
  return jax.jit(lambda t: path_map(lambda p, x: function(x) if p[-1].key == "kernel" else x, t))(
    params
  )


def test_folded_weights_give_the_same_network(small):
  net, params, mel = small
  folded = _map_kernels(vae.fold, params)
  frozen_net = vae.build(vae.Config(8, 4, 4, folded=True))
  want, _ = jax.jit(net.encode)(params, mel)
  _close(jax.jit(frozen_net.encode)(folded, mel)[0], want, 1e-5)
  # Normalising twice changes a kernel by its epsilon only.
  _close(jax.jit(net.encode)(folded, mel)[0], want, 5e-2)


def test_magnitude_of_a_kernel_does_not_matter(small):
  net, params, mel = small
  louder = _map_kernels(lambda x: 3 * x, params)
  encode = jax.jit(net.encode)
  _close(encode(louder, mel)[0], encode(params, mel)[0], 1e-3)


def test_frozen_statistics_normalise(small):
  net, params, mel = small
  shifted = {**params, "frozen": {"data_mean": jnp.full(8, 2.0), "data_std": jnp.full(8, 3.0)}}
  encode = jax.jit(net.encode)
  _close(encode(shifted, 3 * mel + 2)[0], encode(params, mel)[0], 1e-5)
  z = encode(params, mel)[0]
  _close(jax.jit(net.decode)(shifted, z), 3 * jax.jit(net.decode)(params, z) + 2, 1e-5)


def test_activations_keep_unit_magnitude(small):
  net, params, mel = small
  mean, _ = jax.jit(net.encode)(params, mel)
  assert mean.shape == (2, 6, 4)
  assert 0.3 < float(jnp.sqrt(jnp.square(mean).mean())) < 3
