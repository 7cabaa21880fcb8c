"""Two ears made of a mono network: what `generate` samples is dual mono before any training."""

import dataclasses

import jax
import numpy as np
import pytest

from spatialv2a_jax import model_folder
from spatialv2a_jax.convert import mmaudio
from spatialv2a_jax.generator import Generator, Settings
from spatialv2a_jax.windows import Window
from tests import tiny_mmaudio


def folders(tmp_path):
  """Model folders of a mono network, and of the two-ear one that it becomes."""
  sizes, params = tiny_mmaudio.networks(ears=1)["flow"]
  dual = mmaudio.two_ears(sizes, params, jax.random.key(0))
  for name, (config, weights, stats) in {"mono": (sizes, params, {}), "dual": dual}.items():
    out = tiny_mmaudio.save(tmp_path / name, ("vae", "vocoder", "clip", "synchformer", "clipseg"))
    about = mmaudio.about(config) | {"seconds": tiny_mmaudio.SECONDS}
    about["flow"] = dataclasses.asdict(config)
    model_folder.save_model(out, {"flow": weights}, {"flow": stats}, about)
    yield out


def window(seed):
  rng = np.random.default_rng(seed)
  shapes = {"clip_vf": (7, 16), "sync_sf": (16, 24), "spatial_vk": (7, 5)}
  return Window(0, {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()})


@pytest.mark.slow
def test_both_ears_sample_what_the_mono_network_does_bit_for_bit(tmp_path):
  """By the compiled programs of `generate`: the same seed, hence the same noise."""
  settings = Settings(steps=3)
  windows, keys = [window(0), window(1)], [jax.random.key(i) for i in range(2)]
  mono, dual = (Generator(at).sample(windows, keys, settings, rows=2) for at in folders(tmp_path))
  assert mono.shape == (2, 1, 30, 20) and dual.shape == (2, 2, 30, 20)
  np.testing.assert_array_equal(dual[:, :1], mono)
  np.testing.assert_array_equal(dual[:, 1:], mono)
  assert mono.std() > 0.1 and abs(mono[0] - mono[1]).max() > 0.1
