"""The onset detector on sounds with known beginnings, and the matching. Axes: p sample."""

import numpy as np
import pytest

from spatialv2a_jax.metrics import onsets

RATE = 16000


def impacts(times, seconds=4.0, noise=1e-4, seed=0):
  rng = np.random.default_rng(seed)
  mono_p = noise * rng.standard_normal(int(seconds * RATE))
  for time in times:
    start = round(time * RATE)
    p = np.arange(len(mono_p) - start) / RATE
    tone = np.sin(2 * np.pi * rng.uniform(200, 3000) * p) + 0.5 * rng.standard_normal(len(p))
    mono_p[start:] += rng.uniform(0.1, 0.4) * np.exp(-p / rng.uniform(0.02, 0.15)) * tone
  return mono_p


@pytest.mark.parametrize("noise", [0.0, 1e-4, 3e-3])
def test_clean_impacts_within_ten_milliseconds(noise):
  for seed in range(6):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.2, 0.6, 8))
    times = times[times < 3.8]
    found = onsets.detect(impacts(times, noise=noise, seed=seed))
    assert len(found) == len(times)
    assert np.abs(found - times).max() < 0.010


def test_the_first_sample_can_be_an_onset():
  assert onsets.detect(impacts([0.0, 1.0])) == pytest.approx([0.0, 1.0], abs=0.01)


def test_level_does_not_matter_and_silence_has_none():
  mono_p = impacts([0.5, 1.7, 2.2])
  np.testing.assert_array_equal(onsets.detect(mono_p), onsets.detect(0.1 * mono_p))
  assert len(onsets.detect(np.zeros(RATE))) == 0
  assert len(onsets.detect(1e-5 * np.ones(RATE))) == 0


@pytest.mark.parametrize("level_db, count", [(-58, 1), (-62, 0)])
def test_nothing_begins_below_minus_sixty_decibels(level_db, count):
  hum_p = 2**0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
  hum_p[: RATE // 2] = 0
  assert len(onsets.detect(10 ** (level_db / 20) * hum_p)) == count


def test_steady_sounds_begin_once_at_most():
  rng = np.random.default_rng(3)
  p = np.arange(4 * RATE) / RATE
  hum = 0.1 * np.sin(2 * np.pi * (440 * p + 3 * np.sin(2 * np.pi * 5 * p)))  # With vibrato.
  assert len(onsets.detect(hum)) <= 1
  assert len(onsets.detect(0.1 * rng.standard_normal(4 * RATE))) <= 3


def test_one_detection_serves_one_onset():
  error_o, hits = onsets.match(np.array([1.0, 1.05]), np.array([1.02]))
  assert hits == 1
  assert sorted(error_o) == pytest.approx([0.02, 0.5])


def test_matching_minimises_the_total_not_each_distance():
  error_o, hits = onsets.match(np.array([1.0, 1.2]), np.array([1.11, 1.9]))
  assert hits == 1
  assert error_o == pytest.approx([0.5, 0.09])
  assert onsets.match(np.zeros(0), np.array([1.0]))[1] == 0
  assert onsets.match(np.array([1.0]), np.zeros(0))[0] == pytest.approx([0.5])


def test_a_chain_of_pairs_is_matched_in_full():
  true_o, found_o = np.array([0.0, 0.15, 0.30]), np.array([0.08, 0.22, 0.38])
  assert onsets.match(true_o, found_o)[1] == onsets.match(true_o, found_o[::-1])[1] == 3


@pytest.mark.parametrize("distance, hits", [(0.099, 1), (0.101, 0)])
def test_a_hit_is_within_a_tenth_of_a_second(distance, hits):
  for found in (1 - distance, 1 + distance):
    error_o, found_hits = onsets.match(np.array([1.0]), np.array([found]))
    assert found_hits == hits and error_o == pytest.approx([distance])


def test_firing_everywhere_does_not_pay():
  true_o = np.array([0.5, 1.6, 2.7])
  _, honest = onsets.match(true_o, true_o + 0.01)
  everywhere = np.arange(0, 4, 0.05)
  _, hits = onsets.match(true_o, everywhere)
  assert honest == hits == 3
  assert 2 * hits / (len(everywhere) + 3) < 0.1  # F1, against 1 for the honest detector.


def test_merge():
  assert onsets.merge(np.array([2.0, 1.0, 1.01, 1.02])) == pytest.approx([1.0, 2.0])
  assert onsets.merge(np.array([1.0, 1.029, 1.031, 1.058])) == pytest.approx([1.0, 1.031])
