"""Rows of clips in groups: which rows meet, what is repeated, what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import groups


def mixed(params, rows, more):
  """A row's result depends on all rows of its group: the worst network there could be."""
  return rows * params + rows.sum(axis=0, keepdims=True), {"more": rows[:, 0] + more}


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_a_group_never_holds_rows_of_two_clips(devices):
  rng = np.random.default_rng(0)
  x_b = [rng.standard_normal((n, 5)).astype(np.float32) for n in (1, 19, 8, 7)]
  mesh = groups.mesh_of(jax.devices()[:devices])
  params = jax.device_put(jnp.float32(2), groups.whole(mesh))
  found = groups.run(mixed, params, x_b, (10.0,), mesh=mesh)
  assert len(found) == len(x_b)
  for x, (y, extra) in zip(x_b, found, strict=True):
    assert isinstance(y, np.ndarray) and y.shape == x.shape
    np.testing.assert_array_equal(extra["more"], x[:, 0] + 10)
    for at in range(0, len(x), groups.SIZE):
      part = x[at : at + groups.SIZE]
      full = np.concatenate([part, np.repeat(part[-1:], groups.SIZE - len(part), axis=0)])
      np.testing.assert_allclose(y[at : at + groups.SIZE], part * 2 + full.sum(0)[None], atol=1e-5)


def test_it_tells_how_far_it_is(monkeypatch):
  monkeypatch.setattr(groups, "REPORT_SECONDS", -1.0)
  told, mesh = [], groups.mesh_of(None)
  x_b = [np.zeros((2 * groups.SIZE, 5), np.float32)] * 2
  groups.run(mixed, jnp.float32(1), x_b, (0.0,), mesh=mesh, report=told.append)
  assert mesh.size == 1 and told == ["25 %", "50 %", "75 %", "100 %"]
