"""Waveforms of two ears from mels: level, delay, symmetry, repeatability, length."""

import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import mel, phase
from spatialv2a_jax.schema import AUDIO
from spatialv2a_jax.spatial import hrtf

SPEC = AUDIO["16k"]
FRAMES = 62


@pytest.fixture(scope="module")
def noise_mn():
  audio = 0.1 * np.random.default_rng(0).standard_normal(FRAMES * SPEC.hop)
  return np.asarray(mel.log_mel(jnp.asarray(audio, jnp.float32), SPEC))


def _both(mel_mn, left_db=0.0):
  return np.stack([mel_mn + left_db / 20, mel_mn]).astype(np.float32)


def _delay_us(audio_ep):
  """Lead of the left ear at the peak of the cross-correlation, interpolated 16 times."""
  size = 2 * audio_ep.shape[1]
  cross = np.fft.rfft(audio_ep[1], size) * np.conj(np.fft.rfft(audio_ep[0], size))
  lags = np.fft.irfft(cross, 16 * size)
  lag = int(np.argmax(np.concatenate([lags[-400:], lags[:400]]))) - 400
  return lag / (16 * SPEC.sample_rate) * 1e6


def test_equal_mels_in_front_give_equal_ears(noise_mn):
  ears = phase.binaural(_both(noise_mn), SPEC, np.zeros(FRAMES))
  np.testing.assert_array_equal(ears[0], ears[1])
  derived = phase.binaural(_both(noise_mn), SPEC)
  np.testing.assert_array_equal(derived, ears)


def test_exchanged_ears_and_negated_azimuth_exchange_the_output(noise_mn):
  mels = _both(noise_mn, 6.0)
  azimuth = np.linspace(-20, 60, FRAMES)
  ears = phase.binaural(mels, SPEC, azimuth)
  swapped = phase.binaural(mels[::-1], SPEC, -azimuth)
  np.testing.assert_allclose(swapped[::-1], ears, atol=1e-6)


@pytest.mark.parametrize("level_db", [-20.0, -3.0, 12.0])
def test_a_louder_left_mel_is_a_louder_left_ear(noise_mn, level_db):
  ears = phase.binaural(_both(noise_mn, level_db), SPEC, np.zeros(FRAMES))
  for left, right in (ears, ears[:, : SPEC.hop], ears[:, -SPEC.hop :]):  # To either end.
    ild = 20 * np.log10(np.linalg.norm(left) / np.linalg.norm(right))
    assert abs(ild - level_db) < 0.1


@pytest.mark.parametrize("azimuth", [0, 20, -45, 80, 150])
def test_delay_is_that_of_a_rendered_source(noise_mn, azimuth):
  ears = phase.binaural(_both(noise_mn), SPEC, np.full(FRAMES, float(azimuth)))
  noise = np.random.default_rng(2).standard_normal(FRAMES * SPEC.hop)
  response = hrtf.sphere(SPEC.sample_rate).ir(azimuth)
  truth = _delay_us(np.stack([np.convolve(noise, taps) for taps in response]))
  assert abs(_delay_us(ears) - truth) < 30
  assert np.sign(truth) == np.sign(np.sin(np.radians(azimuth)).round(9))


def test_a_much_fainter_ear_is_forty_decibels_below_the_mid(noise_mn):
  left, right = phase.binaural(_both(noise_mn, -60.0), SPEC, np.zeros(FRAMES))
  ild = 20 * np.log10(np.linalg.norm(left) / np.linalg.norm(right))
  assert abs(ild + 40 + 20 * np.log10(2**0.5)) < 0.1


def test_delay_follows_the_low_frequency_law_at_low_frequencies():
  delay_f = phase.interaural_delay(np.array([40.0]), SPEC)[0] * 1e6
  at = lambda hz: delay_f[round(hz * SPEC.n_fft / SPEC.sample_rate)]  # noqa: E731
  angle, head_us = np.radians(40), 1e6 * hrtf.HEAD_RADIUS_M / hrtf.SOUND_SPEED_M_S
  assert abs(at(200) - 3 * head_us * np.sin(angle)) < 15  # Kuhn's law.
  assert abs(at(7000) - head_us * (angle + np.sin(angle))) < 30  # Woodworth's law.


def test_delays_lie_between_those_of_whole_degrees():
  low_f, half_f, high_f = phase.interaural_delay(np.array([-30.0, -30.5, -31.0]), SPEC)
  np.testing.assert_allclose(half_f, (low_f + high_f) / 2, rtol=1e-5)
  assert (high_f < low_f).mean() > 0.9


@pytest.mark.parametrize("azimuth", [-45.0, 10.0, 30.0, 60.0])
def test_azimuth_is_found_from_levels(azimuth):
  noise = 0.1 * np.random.default_rng(3).standard_normal(FRAMES * SPEC.hop)
  response = hrtf.sphere(SPEC.sample_rate).ir(azimuth)
  audio = np.stack([np.convolve(noise, taps)[: len(noise)] for taps in response])
  mels = np.asarray(mel.log_mel(jnp.asarray(audio, jnp.float32), SPEC))
  found = phase.azimuth_from_levels(mels, SPEC)
  assert np.abs(found[4:-4] - azimuth).max() < 3
  np.testing.assert_allclose(phase.azimuth_from_levels(mels[::-1], SPEC), -found, atol=1e-9)
  faint = np.array(mels)
  faint[:, :, 30] = mels[::-1, :, 30] - 2  # One frame from the other side, 40 dB below.
  assert np.abs(phase.azimuth_from_levels(faint, SPEC)[4:-4] - azimuth).max() < 3


def test_what_is_below_the_floor_is_silence():
  """A decoder may make less; as a weight it drew the place of loud frames past the sides."""
  floor = 20 * np.log10(mel.FLOOR) / mel.db_per_unit(SPEC)
  mels = np.full((2, SPEC.n_mels, FRAMES), floor, np.float32)
  mels[:, :, 28:34] += 2.0
  mels[0, :, 28:34] += 0.01
  expected = phase.azimuth_from_levels(mels, SPEC)
  below = np.where(mels <= floor, mels - np.float32(0.2), mels)
  np.testing.assert_allclose(phase.azimuth_from_levels(below, SPEC), expected, atol=1e-6)
  noise = 0.1 * np.random.default_rng(0).standard_normal(mels.shape)
  assert np.abs(phase.azimuth_from_levels(floor + noise, SPEC)).max() <= 70


def test_level_and_spectrum_are_those_of_the_mel(noise_mn):
  for gain in (0.0, -2.0):  # 0 and -40 dB: nothing is normalised.
    audio = phase.mono(noise_mn + gain, SPEC)
    again = np.asarray(mel.log_mel(jnp.asarray(audio), SPEC))
    error_db = 20 * (again - noise_mn - gain)
    assert np.abs(error_db).mean() < 1.5
    assert abs(error_db.mean()) < 0.7


def test_small_errors_of_the_mel_stay_small(noise_mn):
  """A clip decoded alone or in a batch differs by rounding, which must not become audible."""
  nudge = np.random.default_rng(1).standard_normal(noise_mn.shape).astype(np.float32) * 4e-7
  audio, other = phase.mono(noise_mn, SPEC), phase.mono(noise_mn + nudge, SPEC)
  assert np.abs(audio - other).max() < 1e-4 * np.abs(audio).max()


def test_pieces_join_without_a_gap(noise_mn, monkeypatch):
  tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(256 * SPEC.hop) / SPEC.sample_rate)
  mel_mn = np.asarray(mel.log_mel(jnp.asarray(tone, jnp.float32), SPEC))
  monkeypatch.setattr(phase, "_PIECE_S", 128 * SPEC.hop / SPEC.sample_rate)
  audio = phase.binaural(_both(mel_mn), SPEC)
  assert audio.shape == (2, 256 * SPEC.hop)
  level = np.sqrt(np.square(audio[0]).reshape(-1, 1024).mean(1))[2:-2]
  assert level.min() > 0.7 * np.median(level)


def test_pieces_cross_fade_from_the_old_to_the_new(monkeypatch):
  monkeypatch.setattr(phase, "_PIECE_S", 128 * SPEC.hop / SPEC.sample_rate)
  pasts = []

  def synthesize(log_mel_mn, past_p):
    pasts.append(past_p)
    return np.full(log_mel_mn.shape[1] * SPEC.hop, len(pasts), np.float32)

  made = phase.mono(np.zeros((SPEC.n_mels, 224)), SPEC, synthesize)
  assert (made[: 96 * SPEC.hop] == 1).all() and (made[128 * SPEC.hop :] == 2).all()
  assert (np.diff(made) >= 0).all() and np.diff(made).max() < 1e-3


def test_any_synthesizer_gives_the_mid_waveform(noise_mn):
  seen = []

  def synthesize(log_mel_mn, past_p):
    seen.append((log_mel_mn, len(past_p)))
    return np.ones(log_mel_mn.shape[1] * SPEC.hop, np.float32)

  ears = phase.binaural(_both(noise_mn), SPEC, np.zeros(FRAMES), synthesize=synthesize)
  np.testing.assert_allclose(seen[0][0], noise_mn, atol=1e-5)  # No silence behind its end.
  assert seen[0][1] == 0
  np.testing.assert_allclose(ears[:, 600:-1200], 1, atol=1e-4)


def test_each_piece_has_the_azimuth_of_its_time_and_the_mid_before_it(monkeypatch):
  monkeypatch.setattr(phase, "_PIECE_S", 128 * SPEC.hop / SPEC.sample_rate)
  rng, pasts, made = np.random.default_rng(0), [], []

  def synthesize(log_mel_mn, past_p):
    pasts.append(np.array(past_p))
    made.append(rng.standard_normal(log_mel_mn.shape[1] * SPEC.hop).astype(np.float32))
    return made[-1]

  azimuth = np.repeat([-60.0, 60.0], 112)
  ears = phase.binaural(np.zeros((2, SPEC.n_mels, 224)), SPEC, azimuth, synthesize=synthesize)
  second = slice(96 * SPEC.hop, 128 * SPEC.hop)  # The second piece begins 128 before the end.
  np.testing.assert_array_equal(pasts[1], made[0][second])
  assert _delay_us(ears[:, : 96 * SPEC.hop]) < -400 and _delay_us(ears[:, second.stop :]) > 400


@pytest.mark.parametrize("frames", [300, 256, 250, 129, 128, 127, 40, 1])
def test_a_network_gets_pieces_of_one_length_that_end_with_the_clip(frames, monkeypatch):
  monkeypatch.setattr(phase, "_PIECE_S", 128 * SPEC.hop / SPEC.sample_rate)
  mel_mn = np.tile(np.arange(frames, dtype=np.float32) / 300, (SPEC.n_mels, 1))
  seen = []

  def synthesize(log_mel_mn, past_p):
    del past_p
    seen.append(log_mel_mn[0])
    return np.repeat(log_mel_mn[0], SPEC.hop)

  made = phase.mono(mel_mn, SPEC, synthesize)
  np.testing.assert_allclose(made, np.repeat(mel_mn[0], SPEC.hop), atol=1e-6)
  assert {len(x) for x in seen} == {min(frames, 128)} and seen[-1][-1] == mel_mn[0, -1]
  assert len(seen) == 1 + max(0, -(-(frames - 128) // 96))


def test_independent_ears_are_two_mono_reconstructions(noise_mn):
  mels = _both(noise_mn, 6.0)
  ears = phase.binaural(mels, SPEC, phase="independent")
  np.testing.assert_array_equal(ears[1], phase.mono(noise_mn, SPEC))

  def synthesize(log_mel_mn, past_p):
    del past_p
    return np.full(log_mel_mn.shape[1] * SPEC.hop, log_mel_mn.mean(), np.float32)

  ears = phase.binaural(mels, SPEC, phase="independent", synthesize=synthesize)
  np.testing.assert_allclose(ears[:, 0], mels.mean((1, 2)), rtol=1e-5)


def test_bad_input_is_refused(noise_mn):
  with pytest.raises(ValueError, match="shared"):
    phase.binaural(_both(noise_mn), SPEC, phase="both")  # type: ignore[arg-type]
  with pytest.raises(ValueError, match="3 azimuths"):
    phase.binaural(_both(noise_mn), SPEC, np.zeros(3))
