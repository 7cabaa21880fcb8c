"""Distances to a reference on signals whose values are known. Axes: e ear, p sample."""

import math

import numpy as np
import pytest

from spatialv2a_jax.metrics import analysis, distances

NOISE_EP = np.random.default_rng(1).standard_normal((2, 64000))


def waves(pred_ep, ref_ep, **kwargs):
  return distances.wave_distances(pred_ep, ref_ep, peak_normalise=False, **kwargs)


def test_identical():
  values = waves(NOISE_EP, NOISE_EP)
  power = np.square(NOISE_EP).mean()
  assert values["snr_db"] == pytest.approx(10 * math.log10(1e4 * power + 1))
  assert [values[name] for name in list(values)[:3]] == pytest.approx([0, 0, 0], abs=1e-9)


def test_negated_costs_four_times_nothing_and_keeps_the_envelope():
  negated, nothing = waves(-NOISE_EP, NOISE_EP), waves(0 * NOISE_EP, NOISE_EP)
  assert negated["stft_distance"] == pytest.approx(4 * nothing["stft_distance"])
  assert negated["env_distance"] == pytest.approx(0, abs=1e-9)
  assert negated["phase_distance_rad"] == pytest.approx(math.pi)
  assert nothing["stft_distance"] == pytest.approx(150, rel=0.02)
  assert nothing["snr_db"] == pytest.approx(0)
  assert math.isnan(nothing["phase_distance_rad"])


def test_half_gain_and_swapped_ears():
  half, swapped = waves(0.5 * NOISE_EP, NOISE_EP), waves(NOISE_EP[::-1], NOISE_EP)
  assert half["snr_db"] == pytest.approx(6.02, abs=0.01)
  assert half["env_distance"] == pytest.approx(1.414, abs=0.02)
  assert swapped["env_distance"] == pytest.approx(2 * math.sqrt(4 - math.pi), abs=0.02)
  assert swapped["stft_distance"] == pytest.approx(300, rel=0.02)
  assert swapped["phase_distance_rad"] == pytest.approx(math.pi)


def test_unrelated_phase():
  other_ep = np.random.default_rng(2).standard_normal((2, 64000))
  assert waves(other_ep, NOISE_EP)["phase_distance_rad"] == pytest.approx(math.pi / 2, abs=0.02)


def test_peak_normalisation_forgives_gain_and_lengths_may_differ():
  values = distances.wave_distances(0.3 * NOISE_EP[:, :-5000], NOISE_EP[:, :-5000])
  assert values["stft_distance"] == pytest.approx(0, abs=1e-12)
  assert waves(NOISE_EP[:, :-5000], NOISE_EP)["env_distance"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("quieter", [0, 1])
def test_peak_normalisation_keeps_the_level_between_the_ears(quieter):
  """Both ears are divided by the peak of the louder, whatever its sign."""
  ref_ep = np.stack([NOISE_EP[0], -NOISE_EP[0]])
  ref_ep[quieter] *= 0.5
  pred_ep = ref_ep.copy()
  pred_ep[quieter] = 0
  values = distances.wave_distances(pred_ep, ref_ep)
  power = np.square(ref_ep / np.abs(NOISE_EP[0]).max())
  noise = power[quieter].mean() / 2
  assert values["snr_db"] == pytest.approx(10 * math.log10((power.mean() + 1e-4) / (noise + 1e-4)))


def cues(left_lag: int, right_gain: float = 1.0) -> distances.Cues:
  source = 0.1 * NOISE_EP[0]
  return distances.cues(
    analysis.analyse(np.stack([source, right_gain * np.roll(source, left_lag)]))
  )


def test_delay_errors_are_in_stated_units():
  errors = distances.cue_errors(cues(8), cues(0))  # 0.5 ms
  assert errors["itd_error_frame_us"] == pytest.approx(500, abs=0.5)
  assert errors["gcc_mse"] == pytest.approx(250, rel=1e-3)
  swapped = distances.cue_errors(cues(4), cues(-4))
  assert swapped["gcc_mse"] == pytest.approx(4000 * 0.25**2, rel=1e-3)
  assert distances.cue_errors(cues(4), cues(4))["gcc_mse"] == 0


def test_level_errors():
  errors = distances.cue_errors(cues(3, 0.5), cues(3))
  assert errors["ild_error_frame_db"] == pytest.approx(20 * math.log10(2), abs=1e-3)
  assert errors["spl_error_left_db"] == pytest.approx(0, abs=1e-9)
  assert errors["spl_error_right_db"] == pytest.approx(20 * math.log10(2), abs=1e-6)
  loud, hiss = 0.1 * NOISE_EP, 1e-5 * NOISE_EP
  one, other = (
    distances.cues(analysis.analyse(np.concatenate([loud, hiss * gain], axis=1)))
    for gain in ([[1], [4]], [[4], [1]])
  )
  assert distances.cue_errors(one, other)["ild_error_frame_db"] < 0.01  # Quiet frames have none.
  mono = distances.cue_errors(cues(0), cues(0))
  assert math.isnan(mono["spl_error_side_db"])  # No side signal, hence no level of it.
