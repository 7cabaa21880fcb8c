"""Pooling, intervals and the fixed pairing of clips with strangers."""

import math

import numpy as np
import pytest

from spatialv2a_jax.metrics import stats
from spatialv2a_jax.metrics.stats import Metric


def summary(pool, parts):
  return stats.summary(Metric("1", "none", pool), parts, stats.draws(len(parts)))


def test_mean_leaves_undefined_clips_out_and_counts_them():
  row = summary("mean", [np.array([x]) for x in (1.0, 2.0, np.nan, 6.0, 2.0, 4.0)])
  assert (row["value"], row["median"], row["n"], row["undefined"]) == (3.0, 2.0, 5, 1)
  assert (row["p5"], row["p95"]) == pytest.approx((1.2, 5.6))
  assert 1 <= row["ci95"][0] < 3 < row["ci95"][1] <= 6


def test_ratio_pools_windows_not_clips():
  row = summary("ratio", [np.array([1.0, 1.0]), np.array([0.0, 3.0]), np.array([0.0, 0.0])])
  assert (row["value"], row["median"], row["n"], row["undefined"]) == (0.25, 0.5, 2, 1)


def test_pearson_is_that_of_the_pooled_points():
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((2, 5, 40)) + np.arange(5)[:, None]
  parts = [stats.moments(a, b) for a, b in zip(x, y, strict=True)]
  row = summary("pearson", [*parts, stats.moments(np.zeros(9), np.arange(9.0))])
  pooled = np.corrcoef(np.append(x, np.zeros(9)), np.append(y, np.arange(9.0)))[0, 1]
  assert row["value"] == pytest.approx(pooled)
  assert row["median"] == pytest.approx(
    np.median([np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)])
  )
  assert (row["n"], row["undefined"]) == (6, 0)
  assert summary("pearson", [stats.moments(x[0, :2], y[0, :2])])["value"] is None  # Always a line.


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_median_pools_values(count):
  values = np.random.default_rng(count).permutation(count).astype(float)
  row = summary("median", np.array_split(values, 3))
  assert row["value"] == pytest.approx(np.median(values))
  assert row["undefined"] == max(0, 3 - count)


@pytest.mark.parametrize("clips, least", [(5, 0.9), (8, 0.9), (20, 0.92)])
def test_an_interval_of_few_clips_holds_the_truth_as_often_as_it_says(clips, least):
  """Percentiles of the draws as they are hold it in 84, 88 and 90 % of these."""
  rng = np.random.default_rng(0)
  intervals = [summary("mean", list(rng.standard_normal((clips, 1))))["ci95"] for _ in range(400)]
  assert least < np.mean([low <= 0 <= high for low, high in intervals]) < 0.98


def test_too_few_clips_have_no_interval():
  assert summary("mean", [np.array([2.0])])["ci95"] == [None, None]
  assert summary("mean", [np.array([x]) for x in (1.0, 2.0, 3.0, 4.0, np.nan)])["ci95"][0] is None
  empty = summary("mean", [np.array([np.nan])])
  assert empty["value"] is None and empty["median"] is None and empty["undefined"] == 1


def test_bootstrap_interval_has_the_known_width():
  x = np.random.default_rng(1).standard_normal(400)
  low, high = summary("mean", list(x[:, None]))["ci95"]
  assert high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.1)


def test_derangement_uses_every_clip_once_and_never_itself():
  for clips in range(2, 40):
    partner = stats.derangement(clips)
    assert sorted(partner) == list(range(clips))
    assert (partner != np.arange(clips)).all()
    np.testing.assert_array_equal(partner, stats.derangement(clips))


def test_sources_that_stand_still_have_a_correlation_over_clips():
  """None has one by itself."""
  azimuth = np.arange(-3.0, 4.0)
  parts = [
    stats.moments(np.full(9, x), np.full(9, 2 * x + 0.1 * (-1) ** i)) for i, x in enumerate(azimuth)
  ]
  row = summary("pearson", [*parts, stats.moments(np.empty(0), np.empty(0))])
  assert row["n"] == 7 and row["undefined"] == 1 and row["value"] > 0.99
  assert row["median"] is None and row["ci95"][0] > 0.9
