"""BigVGAN versions 1 and 2 against the public implementations, and its anti-aliasing."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from spatialv2a_jax.models import vocoder

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TINY = vocoder.Config(
  n_mels=4, width=4, rates=(4,), kernels=(8,), block_kernels=(3,), dilations=(1,)
)


@pytest.mark.parametrize(
  ("file", "config"),
  [("bigvgan_16k", vocoder.V1_16K), ("bigvgan_v2_44k", vocoder.V2_44K)],
)
@pytest.mark.slow
def test_waveform_is_upstream_s(file, config):
  """The golden begins after the first stage, so the first convolution here passes it on."""
  data = load_file(GOLDEN / f"{file}.safetensors")
  params = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
  params = unflatten_dict(params, sep="/")
  identity = np.zeros((7, 64, 64), np.float32)
  identity[3] = np.eye(64)
  params["conv_pre"] = {"kernel": identity, "bias": np.zeros(64, np.float32)}
  config = dataclasses.replace(
    config, n_mels=64, width=64, rates=config.rates[1:], kernels=config.kernels[1:]
  )
  got = jax.jit(vocoder.build(config).waveform)(params, data["in/hidden"])
  np.testing.assert_allclose(got, data["out/waveform"], rtol=0, atol=3e-5)


def test_first_stage_of_version_2_is_upstream_s():
  data = load_file(GOLDEN / "bigvgan_v2_44k.safetensors")
  got = vocoder.upsample(data["in/stage"], data["in/stage_kernel"], 8)
  got = got + data["in/stage_bias"].reshape(1, 1, -1)
  np.testing.assert_allclose(got, data["out/stage"], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("config", "count"), [(vocoder.V1_16K, 112_199_473), (vocoder.V2_44K, 122_152_752)]
)
def test_released_sizes(config, count):
  shapes = jax.eval_shape(vocoder.build(config).init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(("taps", "rate"), [(4, 2), (8, 4), (6, 4), (3, 3)])
def test_upsample_is_a_transposed_convolution(taps, rate):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 5, 3))
  kernel = rng.standard_normal((taps, 3, 2))
  full = np.zeros((2, 4 * rate + taps, 2))
  for i in range(5):
    full[:, i * rate : i * rate + taps] += np.einsum("bi,kio->bko", x[:, i], kernel)
  pad = (taps - rate) // 2
  got = vocoder.upsample(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), rate)
  np.testing.assert_allclose(got, full[:, pad : pad + 5 * rate], atol=1e-5)


def test_filter_passes_low_frequencies_and_constants():
  time = np.arange(64)
  x = np.stack([np.ones(64), np.sin(0.3 * time)], -1)[None].astype(np.float32)
  got = np.asarray(vocoder.filtered(lambda y: y, jnp.asarray(x)))
  np.testing.assert_allclose(got[..., 0], x[..., 0], atol=1e-6)
  np.testing.assert_allclose(got[:, 8:-8, 1], x[:, 8:-8, 1], atol=2e-2)


def test_filtering_weakens_the_alias_of_a_square():
  """cos^2 at 0.35 of the rate has an overtone at 0.7, which folds to 0.3."""
  x = jnp.asarray(np.cos(0.7 * np.pi * np.arange(200)), jnp.float32).reshape(1, -1, 1)

  def folded(y):
    y = np.asarray(y)[0, 20:-20, 0]
    return abs(np.mean((y - y.mean()) * np.exp(-0.6j * np.pi * np.arange(len(y)))))

  assert folded(vocoder.filtered(jnp.square, x)) < 0.25 * folded(jnp.square(x))


@pytest.mark.parametrize("limit", [2, 50, 1000])
def test_squared_sine(limit):
  x = np.linspace(-limit, limit, 100_001).astype(np.float32)
  want = np.sin(x.astype(np.float64)) ** 2
  np.testing.assert_allclose(jax.jit(vocoder.sin_squared)(x), want, atol=3e-7)
  small = np.float32([1e-12, 3e-5, -1e-3])  # As exact beside nothing as beside one.
  np.testing.assert_allclose(vocoder.sin_squared(jnp.asarray(small)), small**2, rtol=1e-6)


def test_each_frame_makes_one_hop():
  params = nn.unbox(jax.jit(vocoder.build(TINY).init)(jax.random.key(0)))
  audio = jax.jit(vocoder.build(TINY).waveform)(params, np.ones((1, 4, 6), np.float32))
  assert audio.shape == (1, 24) and np.abs(audio).max() <= 1


def test_version_2_is_clipped_not_squashed():
  params = nn.unbox(jax.jit(vocoder.build(TINY).init)(jax.random.key(0)))
  params["conv_post"]["bias"] = jnp.full(1, 0.5)
  quiet = np.zeros((1, 4, 6), np.float32)
  clip = jax.jit(vocoder.build(dataclasses.replace(TINY, bounded="clip")).waveform)
  squashed = jax.jit(vocoder.build(TINY).waveform)(params, quiet)
  np.testing.assert_allclose(squashed, np.tanh(clip(params, quiet)), atol=1e-6)
  params["conv_post"]["bias"] = jnp.full(1, 2.0)
  np.testing.assert_array_equal(clip(params, quiet), 1)


def test_unknown_bound_is_refused():
  with pytest.raises(ValueError, match="tanh"):
    vocoder.build(dataclasses.replace(TINY, bounded="none"))
