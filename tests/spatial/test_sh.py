"""Spherical harmonics and ring decoders against closed forms."""

import numpy as np
import pytest
from scipy import special

from spatialv2a_jax.spatial import sh


def test_first_order_is_w_y_z_x():
  azimuth_q, elevation_q = np.array([0.3, -2.0]), np.array([0.7, -0.4])
  expected_qc = np.stack(
    [
      np.ones(2),
      np.sin(azimuth_q) * np.cos(elevation_q),
      np.sin(elevation_q),
      np.cos(azimuth_q) * np.cos(elevation_q),
    ],
    axis=1,
  )
  np.testing.assert_allclose(sh.harmonics(azimuth_q, elevation_q), expected_qc, atol=1e-12)


def test_n3d_is_orthonormal_over_the_sphere():
  height, weight = special.roots_legendre(8)
  azimuth = 2 * np.pi * np.arange(16) / 16
  grid_a, grid_h = (part.ravel() for part in np.meshgrid(azimuth, height))
  measure = np.repeat(weight, 16) / 32
  values = sh.harmonics(grid_a, np.arcsin(grid_h), 3, "n3d")
  gram = np.einsum("qc,q,qd->cd", values, measure, values)
  np.testing.assert_allclose(gram, np.eye(16), atol=1e-12)


def test_second_order_has_no_condon_shortley_sign():
  azimuth, elevation = 0.4, 0.5
  values = sh.harmonics(np.array([azimuth]), np.array([elevation]), 2)[0]
  np.testing.assert_allclose(
    values[7], np.sqrt(3) / 2 * np.sin(2 * elevation) * np.cos(azimuth), atol=1e-12
  )


def test_ring_starts_behind():
  np.testing.assert_allclose(np.degrees(sh.ring(8)), np.arange(-180, 180, 45))


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    ("projection", [0, 0.293, 1, 1.707, 2, 1.707, 1, 0.293]),
    ("pinv", np.array([-1, -0.414, 1, 2.414, 3, 2.414, 1, -0.414]) / 8),
    ("max-re", np.array([1 - 2**0.5, 0, 1, 2, 1 + 2**0.5, 2, 1, 0]) / 8),
  ],
)
def test_gains_of_a_frontal_source(kind, expected):
  gain_s = sh.decoder(sh.ring(8), 1, kind) @ sh.harmonics(np.zeros(1), np.zeros(1))[0]
  np.testing.assert_allclose(gain_s, expected, atol=5e-4)


def test_pinv_decoder_inverts_what_a_ring_can_carry():
  ring_s = sh.ring(8)
  encoding_sc = sh.harmonics(ring_s, np.zeros(8))
  projector_ss = encoding_sc @ sh.decoder(ring_s).T
  np.testing.assert_allclose(projector_ss, projector_ss.T, atol=1e-12)
  np.testing.assert_allclose(projector_ss @ projector_ss, projector_ss, atol=1e-12)
  assert np.linalg.matrix_rank(projector_ss) == 3


@pytest.mark.parametrize("order", [1, 3])
def test_pinv_gains_sum_to_one_for_any_direction(order):
  direction_q = np.linspace(-3, 3, 7)
  gain_qs = sh.harmonics(direction_q, np.zeros(7), order) @ sh.decoder(sh.ring(8), order).T
  np.testing.assert_allclose(gain_qs.sum(axis=1), 1, atol=1e-9)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="norm"):
    sh.harmonics(np.zeros(1), np.zeros(1), norm="fuma")
  with pytest.raises(ValueError, match="decoder"):
    sh.decoder(sh.ring(8), kind="vbap")
