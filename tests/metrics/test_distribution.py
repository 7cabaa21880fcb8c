"""Closed forms of the statistics of features. Axes: n clip, d feature, k class."""

import math

import numpy as np
import pytest

from spatialv2a_jax.metrics import distribution

FEATURES_ND = np.random.default_rng(0).standard_normal((500, 12))


@pytest.mark.parametrize("width", [1, 12])
def test_frechet_of_itself_and_of_a_shift(width):
  shift_d, features_nd = np.linspace(-1, 2, width), FEATURES_ND[:, :width]
  assert distribution.frechet_distance(features_nd, features_nd) == pytest.approx(0, abs=1e-6)
  moved = distribution.frechet_distance(features_nd + shift_d[None, :], features_nd)
  assert moved == pytest.approx(np.square(shift_d).sum())


def test_frechet_of_scaled_normals():
  whitened_nd = np.linalg.qr(FEATURES_ND - FEATURES_ND.mean(0, keepdims=True))[0] * 499**0.5
  scaled = distribution.frechet_distance(whitened_nd, 3 * whitened_nd)
  assert scaled == pytest.approx(12 * (1 - 3) ** 2)


def test_frechet_does_not_depend_on_the_basis_or_the_order():
  other_nd = FEATURES_ND**3
  basis_dd = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))[0]
  plain = distribution.frechet_distance(FEATURES_ND, other_nd)
  turned = distribution.frechet_distance(FEATURES_ND @ basis_dd, other_nd @ basis_dd)
  assert turned == pytest.approx(plain)
  assert distribution.frechet_distance(other_nd, FEATURES_ND) == pytest.approx(plain)


def test_frechet_survives_fewer_clips_than_features():
  few_nd = FEATURES_ND[:5]
  assert distribution.frechet_distance(few_nd, few_nd) == pytest.approx(0, abs=1e-6)


def test_kl():
  logits = np.log([[0.5, 0.5], [0.9, 0.1]])
  other = np.log([[0.25, 0.75], [0.9, 0.1]])
  wanted = 0.5 * (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
  assert distribution.kl_divergence(logits, logits) == 0
  assert distribution.kl_divergence(other, logits) == pytest.approx(wanted)
  assert distribution.kl_divergence(logits, other) != pytest.approx(wanted)


def test_inception_score():
  assert distribution.inception_score(np.ones((40, 7)))[0] == pytest.approx(1)
  one_hot = np.tile(50 * np.eye(8), (5, 1))
  assert distribution.inception_score(one_hot, splits=1)[0] == pytest.approx(8)


def test_unusable_features_are_refused():
  with pytest.raises(ValueError, match="width"):
    distribution.frechet_distance(FEATURES_ND, FEATURES_ND[:, :3])
  with pytest.raises(ValueError, match="finite"):
    distribution.kl_divergence(np.full((3, 2), np.nan), np.zeros((3, 2)))
  with pytest.raises(ValueError, match="splits"):
    distribution.inception_score(np.ones((4, 2)))
