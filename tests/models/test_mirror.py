"""Mirrored pictures give the mirrored condition, though the network is not symmetric."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from spatialv2a_jax.convert import clipseg, engine
from spatialv2a_jax.models import localizer, spatial
from tests.models import encoder_states

WIDTH = 16


@pytest.mark.slow
def test_mirrored_pictures_give_the_mirrored_condition():
  config, params = engine.convert(clipseg.SOURCE, encoder_states.clipseg(), "state")
  net = localizer.build(config)
  rng = np.random.default_rng(0)
  frames_byxc = jnp.asarray(rng.integers(0, 256, (2, 352, 352, 3), np.uint8))
  e_of = jnp.asarray(rng.normal(size=(1, 20)), jnp.float32)
  plain, even = jax.jit(net.heat), jax.jit(localizer.mirror_tta(net.heat))
  probability = np.asarray(plain(params, frames_byxc, e_of, 0.0))
  shift = localizer.calibrated_shift(np.log(probability / (1 - probability)), 0.05)

  net_c = spatial.SpatialCondition(width=WIDTH, ffn=24)
  stats = {"mean": jnp.zeros(WIDTH), "var": jnp.ones(WIDTH)}
  none_b = jnp.zeros(2, bool)
  options = {"latent_len": 5, "train": False}
  zeros = jnp.zeros((1, 2, 5)), stats, none_b[:1], ~none_b[:1]
  weights = nn.unbox(net_c.init(jax.random.key(0), *zeros, **options))

  def condition(d_bvk):
    return net_c.apply(weights, d_bvk, stats, none_b, ~none_b, **options)[0]

  def describe(heat_of, x_byxc):
    return spatial.descriptors(heat_of(params, x_byxc, e_of, shift)[:, None])

  d_bvk, valid_bv = describe(even, frames_byxc)
  mirrored_bvk, _ = describe(even, frames_byxc[:, :, ::-1])
  assert valid_bv.all() and abs(d_bvk[..., 3]).max() > 1e-4
  np.testing.assert_allclose(mirrored_bvk, d_bvk * spatial.MIRROR_SIGNS[None, None], atol=5e-6)
  want = condition(d_bvk * spatial.MIRROR_SIGNS[None, None])
  np.testing.assert_allclose(condition(mirrored_bvk), want, atol=1e-5)
  assert abs(want - condition(d_bvk)).max() > 1e-4

  bare_bvk, _ = describe(plain, frames_byxc)
  bare_mirrored_bvk, _ = describe(plain, frames_byxc[:, :, ::-1])
  assert abs(bare_mirrored_bvk - bare_bvk * spatial.MIRROR_SIGNS[None, None]).max() > 1e-4
