"""In float64, the time embedding has the digits of upstream's float64 numbers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax.models import layers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mmaudio_tables.npz"


@pytest.mark.parametrize("name, size, period", [("v1", 256, 1e4), ("v2_448", 448, 1.0)])
def test_time_embedding_in_float64(name, size, period):
  with np.load(GOLDEN) as file:
    times, frequencies = file["t"], file[f"freqs_{name}_float64"]
    want = file[f"embedding_{name}_float64"]
  table = layers.timestep_table(size, period, np.float64)
  np.testing.assert_allclose(table, frequencies, rtol=1e-14)
  with jax.enable_x64(True):
    got = np.asarray(layers.timestep_features(jnp.asarray(times, jnp.float64), table))
  assert want.dtype == got.dtype == np.float64
  assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-9
