"""BEATs and ACL's projector against PyTorch's numbers; a sound in the place of a word."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from spatialv2a_jax.convert import SOURCES, check, engine
from spatialv2a_jax.models import acl, beats

# Of PyTorch's table for 320 buckets up to 800 tokens.
KNOWN = {
  0: 0,
  1: 1,
  79: 79,
  80: 80,
  82: 80,
  83: 81,
  100: 87,
  200: 111,
  300: 125,
  400: 135,
  495: 143,
}
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name, outputs", [("beats", ["fbank", "features"]), ("acl", ["token"])])
def test_upstreams_numbers_come_out(name, outputs):
  lines = []
  assert check(name, GOLDEN / f"{name}.safetensors", 1e-5, lines.append) == 0
  assert set(outputs) <= {line.split()[0] for line in lines}
  assert all(line.endswith("ok") for line in lines)


def test_the_shift_is_bias_over_slope():
  data = load_file(GOLDEN / "acl.safetensors")
  state = {k.removeprefix("param/"): x for k, x in data.items() if k.startswith("param/")}
  config, params = engine.convert(SOURCES["acl"], state, "golden")
  assert float(acl.build(config).shift(params)) == pytest.approx(11 / 9)


def test_a_tone_is_loudest_at_its_own_mel_bin():
  time_p = np.arange(beats.SAMPLE_RATE) / beats.SAMPLE_RATE
  first, last = 1127 * np.log1p(np.array([20, 8000]) / 700)
  edge = np.linspace(first, last, beats.N_MELS + 2)
  centre_m = 700 * np.expm1(edge[1:-1] / 1127)
  for hertz in (440, 3000, 6500):
    mel_bnm = beats.filter_bank(jnp.asarray(0.1 * np.sin(2 * np.pi * hertz * time_p)[None]))
    assert mel_bnm.shape == (1, 98, 128)
    loudest = np.asarray(mel_bnm[0]).mean(axis=0).argmax()
    assert abs(loudest - abs(centre_m - hertz).argmin()) <= 1


def test_a_constant_is_silence_to_the_filter_bank():
  quiet, constant = (beats.filter_bank(jnp.full((1, 4000), x)) for x in (0.0, 0.5))
  np.testing.assert_allclose(constant, quiet, atol=1e-5)


def test_buckets_are_pytorchs():
  bucket_ij = beats.buckets(496, 320, 800)
  for distance, want in KNOWN.items():
    assert bucket_ij[distance, 0] == want  # The key comes before the query.
    assert bucket_ij[0, distance] == want + (160 if distance else 0)
  assert (np.diff(bucket_ij[:, 0]) >= 0).all() and bucket_ij.max() < 320
  assert beats.buckets(2000, 320, 800)[1500, 0] == 159  # All beyond the largest distance.


def test_the_released_sizes_have_their_numbers_of_parameters():
  def size(init):
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))

  assert size(acl.build(acl.Config()).init) == 7_279_363 + 2
  assert beats.Config().dim == 2304
  # Upstream keeps each tap's size beside the direction of the convolution, which fold to one.
  assert size(beats.build(beats.Config()).init) == 90_311_792 - 128
