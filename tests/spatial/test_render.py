"""Rendering: interaural goldens, symmetry, linearity, smooth motion, distance, rooms."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from spatialv2a_jax.spatial import hrtf, render

RATE = 16000
HEAD = hrtf.sphere(RATE)


def noise(seconds: float, seed: int = 0):
  return np.random.default_rng(seed).standard_normal(size=round(seconds * RATE), dtype=np.float32)


def tone(seconds: float, hertz=500.0):
  return np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


def phat_us(audio_ep):
  """Left lead by GCC-PHAT, 100 to 7900 Hz, 16 times finer than the samples."""
  size = 2 * audio_ep.shape[1]
  left, right = np.fft.rfft(audio_ep.astype(np.float64), size)
  cross = left * np.conj(right)
  frequency = np.fft.rfftfreq(size, 1 / RATE)
  band = (frequency > 100) & (frequency < 7900)
  correlation = np.fft.irfft(np.where(band, cross / np.abs(cross), 0), 16 * size)
  lags = np.arange(-256, 257)
  return -lags[np.argmax(correlation[lags])] / (16 * RATE) * 1e6


def ild_db(audio_ep):
  energy_e = np.sum(audio_ep.astype(np.float64) ** 2, axis=1)
  return 10 * np.log10(energy_e[0] / energy_e[1])


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize(
  ("azimuth_deg", "lead_us"), [(10, 94), (20, 184), (30, 273), (45, 402), (60, 512), (-30, -273)]
)
def test_interaural_time_of_noise(azimuth_deg, lead_us, moving):
  track = ([0.0, 1.0], [azimuth_deg] * 2) if moving else azimuth_deg
  audio_ep = render.binaural(noise(4), RATE, track, HEAD)
  assert phat_us(audio_ep) == pytest.approx(lead_us, abs=4)


@pytest.mark.parametrize(
  ("azimuth_deg", "level_db"), [(15, 4.2), (30, 8.0), (45, 11.1), (60, 13.0), (75, 12.7), (90, 6.6)]
)
def test_interaural_level_of_noise_at_44_kilohertz(azimuth_deg, level_db):
  audio_ep = render.binaural(noise(4), 44100, azimuth_deg, hrtf.sphere(44100))
  assert ild_db(audio_ep) == pytest.approx(level_db, abs=0.3)


def test_moving_path_of_a_still_source_is_the_convolution():
  mono_p = noise(1.234)
  still = render.binaural(mono_p, RATE, 37.3, HEAD)
  moving = render.binaural(mono_p, RATE, np.full(mono_p.size, 37.3), HEAD)
  assert np.sqrt(np.mean((still - moving) ** 2) / np.mean(still**2)) < 2e-3


def test_output_starts_with_the_sound_and_keeps_the_length():
  for length in (1, 159, 160, 161, 4001):
    mono_p = np.zeros(length, np.float32)
    mono_p[0] = 1
    for track in (0.0, np.zeros(length)):
      audio_ep = render.binaural(mono_p, RATE, track, HEAD)
      assert audio_ep.shape == (2, length) and audio_ep.dtype == np.float32
      assert np.argmax(np.abs(audio_ep[0])) == 0 and audio_ep[0, 0] > 0.5


def test_mirrored_path_swaps_the_ears_exactly():
  mono_p = noise(0.5)
  times, path = [0.0, 0.2, 0.5], np.array([-20.0, 130.0, 200.0])
  for there, back in ((33.3, -33.3), ((times, path), (times, -path))):
    left = render.binaural(mono_p, RATE, there, HEAD, ([0.0, 1.0], [1.0, 4.0]))
    right = render.binaural(mono_p, RATE, back, HEAD, ([0.0, 1.0], [1.0, 4.0]))
    np.testing.assert_array_equal(left, right[::-1])


def test_source_on_the_left_is_louder_and_earlier_in_ear_zero():
  audio_ep = render.binaural(noise(1), RATE, ([0.0, 1.0], [60.0, 60.0]), HEAD)
  assert ild_db(audio_ep) > 5 and phat_us(audio_ep) > 400


def test_rendering_is_linear():
  one, two = noise(0.6, 1), noise(0.6, 2)
  path = ([0.0, 0.6], [-50.0, 50.0])
  room = render.Room(rt60_s=0.2)
  together = render.binaural(2 * one - 3 * two, RATE, path, HEAD, 2.0, room=room)
  parts = [render.binaural(part, RATE, path, HEAD, 2.0, room=room) for part in (one, two)]
  np.testing.assert_allclose(together, 2 * parts[0] - 3 * parts[1], atol=2e-5)


def test_rendering_is_deterministic():
  arguments = noise(0.5), RATE, ([0.0, 0.5], [0.0, 90.0]), HEAD, ([0.0, 0.5], [1.0, 2.0])
  first, second = (render.binaural(*arguments, room=render.Room(seed=3)) for _ in range(2))
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("speed_deg_s", [30, 120, 360])
def test_moving_source_does_not_click(speed_deg_s):
  """A click would bend the waveform far more than the tone itself does."""
  mono_p = tone(2.0)
  path = ([0.0, 2.0], [-90.0, -90.0 + 2 * speed_deg_s])
  distance = ([0.0, 2.0], [3.0, 0.5])
  audio_ep = render.binaural(mono_p, RATE, path, HEAD, distance)[:, 400:-400]
  bend_ep = np.abs(np.diff(audio_ep, 2, axis=1))
  sway = (2 * np.pi * 500 / RATE) ** 2
  envelope_ep = np.stack(
    [np.convolve(np.abs(ear), np.ones(64) / 64 * np.pi / 2, "same") for ear in audio_ep]
  )[:, 1:-1]
  assert np.max((bend_ep / (sway * envelope_ep))[:, 64:-64]) < 1.5


def test_levels_follow_the_path():
  """Each tenth of a second of a sweep has the level difference of a source that stays there."""
  mono_p = noise(4, 5)
  audio_ep = render.binaural(mono_p, RATE, ([0.0, 4.0], [-60.0, 60.0]), HEAD)
  for start in range(0, 4 * RATE - 1600, 6400):
    azimuth_deg = -60 + 120 * (start + 800) / (4 * RATE)
    still = render.binaural(mono_p, RATE, azimuth_deg, HEAD)
    cut = slice(start, start + 1600)
    assert ild_db(audio_ep[:, cut]) == pytest.approx(ild_db(still[:, cut]), abs=0.3)


def test_each_instant_sounds_like_a_still_source_there():
  mono_p = tone(0.5, 1500.0)
  audio_ep = render.binaural(mono_p, RATE, ([0.0, 0.5], [0.0, 30.0]), HEAD)
  error = []
  for sample in range(200, 7800, 97):
    still_ep = render.binaural(mono_p, RATE, 60.0 * sample / RATE, HEAD)
    error.append(audio_ep[:, sample] - still_ep[:, sample])
  assert np.sqrt(np.mean(np.square(error))) < 0.02


@pytest.mark.parametrize("way", [render.binaural, render.ambisonic])
def test_azimuth_track_takes_the_short_way_round(way):
  mono_p = noise(1)
  wrapped = way(mono_p, RATE, ([0.0, 1.0], [170.0, -170.0]), HEAD)
  plain = way(mono_p, RATE, ([0.0, 1.0], [170.0, 190.0]), HEAD)
  np.testing.assert_allclose(wrapped, plain, atol=1e-5)


def test_per_sample_and_timed_tracks_agree():
  mono_p = noise(1)
  time_p = np.arange(mono_p.size) / RATE
  path, distance = ([0.25, 0.75], [-40.0, 40.0]), ([0.0, 1.0], [1.0, 3.0])
  timed = render.binaural(mono_p, RATE, path, HEAD, distance)
  held_p = np.clip(160 * (time_p - 0.5), -40, 40)  # Before its first time and after its last.
  sampled = render.binaural(mono_p, RATE, held_p, HEAD, 1 + 2 * time_p)
  np.testing.assert_allclose(timed, sampled, atol=2e-3)


@pytest.mark.parametrize("elevation", [60.0, ([0.0, 1.0], [60.0, 60.0])])
def test_a_source_above_the_side_is_as_far_aside_as_its_lateral_angle(elevation):
  mono_p = noise(0.5)
  above = render.binaural(mono_p, RATE, 90.0, HEAD, elevation_deg=elevation)
  beside = render.binaural(mono_p, RATE, 30.0, HEAD)
  assert np.sqrt(np.mean((above - beside) ** 2) / np.mean(beside**2)) < 2e-3


def test_level_falls_as_one_over_distance_and_is_clamped():
  mono_p = noise(0.5)
  at_one = render.binaural(mono_p, RATE, 20.0, HEAD)
  np.testing.assert_allclose(render.binaural(mono_p, RATE, 20.0, HEAD, 1.0), at_one)
  np.testing.assert_allclose(render.binaural(mono_p, RATE, 20.0, HEAD, 4.0), at_one / 4, atol=1e-6)
  nearest = render.binaural(mono_p, RATE, 20.0, HEAD, render.MIN_DISTANCE_M)
  np.testing.assert_array_equal(render.binaural(mono_p, RATE, 20.0, HEAD, 0.01), nearest)


def test_room_ratio_falls_with_distance_and_tail_is_diffuse():
  mono_p = noise(3)
  room = render.Room(rt60_s=0.3, drr_db=6.0, seed=4)
  for distance, ratio_db in ((1.0, 6.0), (2.0, 0.0), (4.0, -6.0)):
    dry = render.binaural(mono_p, RATE, 0.0, HEAD, distance)
    tail = render.binaural(mono_p, RATE, 0.0, HEAD, distance, room=room) - dry
    source = np.sum((mono_p / distance) ** 2)
    assert 10 * np.log10(2 * source / np.sum(tail**2)) == pytest.approx(ratio_db, abs=0.4)
  tail_et = room.tail(RATE)
  assert not tail_et[:, :128].any() and tail_et[:, 128].all()  # 8 ms after the direct sound.
  assert abs(np.corrcoef(tail_et)[0, 1]) < 0.1
  energy_t = np.sum(tail_et**2, axis=0)
  early, late = energy_t[128 : 128 + 800].sum(), energy_t[128 + 2400 : 128 + 3200].sum()
  assert 10 * np.log10(early / late) == pytest.approx(30, abs=2)  # 0.15 s is half of rt60
  assert np.any(room.tail(RATE) != render.Room(rt60_s=0.3, drr_db=6.0, seed=5).tail(RATE))


@pytest.mark.parametrize("wrong", [{"rt60_s": 0.0}, {"rt60_s": np.nan}, {"predelay_s": -0.01}])
def test_a_room_without_a_tail_is_refused(wrong):
  with pytest.raises(ValueError, match="want more than 0"):
    render.Room(**wrong)


@pytest.mark.parametrize("peak", [2.0, -2.0])
def test_what_exceeds_full_scale_is_turned_down_in_both_ears_alike(peak):
  audio_ep = np.array([[0.5, peak], [1.0, 0.25]], np.float32)
  turned_ep, gain_db = render.within_full_scale(audio_ep)
  np.testing.assert_allclose(turned_ep, audio_ep / 2 * render.FULL_SCALE, rtol=1e-6)
  assert gain_db == pytest.approx(20 * np.log10(render.FULL_SCALE / 2))
  for quiet_ep in (audio_ep / 4, 0 * audio_ep):
    turned_ep, gain_db = render.within_full_scale(quiet_ep)
    np.testing.assert_array_equal(turned_ep, quiet_ep)
    assert gain_db == 0


def test_long_sources_do_not_depend_on_the_chunk(monkeypatch):
  arguments = noise(1.5), RATE, ([0.0, 1.5], [-80.0, 80.0]), HEAD
  whole = render.binaural(*arguments)
  monkeypatch.setattr(render, "_CHUNK", 7)
  np.testing.assert_allclose(render.binaural(*arguments), whole, atol=1e-5)


def test_bad_arguments_are_refused():
  mono_p = noise(0.1)
  for match, arguments in {
    "44100": (mono_p, 44100, 0.0, HEAD),
    "non-empty channel": (mono_p[None, :], RATE, 0.0, HEAD),
    "finite": (mono_p * np.nan, RATE, 0.0, HEAD),
    "not finite": (mono_p, RATE, float("nan"), HEAD),
    "azimuth_deg: not finite": (mono_p, RATE, ([0.0, 0.1], [0.0, np.nan]), HEAD),
    "samples": (mono_p, RATE, np.zeros(7), HEAD),
    "rising": (mono_p, RATE, ([0.0, 0.0], [1.0, 2.0]), HEAD),
    "equal length": (mono_p, RATE, 0.0, HEAD, ([0.0, 1.0], [1.0])),
  }.items():
    with pytest.raises(ValueError, match=match):
      render.binaural(*arguments)


@pytest.mark.parametrize("decoder", ["pinv", "projection", "max-re"])
def test_first_order_image_lies_on_the_right_side_but_is_narrower(decoder):
  mono_p = noise(2)
  left = render.ambisonic(mono_p, RATE, 60.0, HEAD, decoder=decoder)
  right = render.ambisonic(mono_p, RATE, -60.0, HEAD, decoder=decoder)
  np.testing.assert_allclose(left, right[::-1], atol=1e-4)
  assert 2 < ild_db(left) < ild_db(render.binaural(mono_p, RATE, 60.0, HEAD)) - 1


def test_high_order_recovers_the_direct_render():
  mono_p = tone(1.0, 700.0)
  direct = render.binaural(mono_p, RATE, 40.0, HEAD)[:, 1000:-1000]
  around = render.ambisonic(mono_p, RATE, 40.0, HEAD, order=7, speakers=16)[:, 1000:-1000]
  assert np.sqrt(np.mean((direct - around) ** 2) / np.mean(direct**2)) < 0.05


def test_workers_do_not_load_jax():
  code = "import sys, spatialv2a_jax.spatial.render; sys.exit('jax' in sys.modules)"
  root = pathlib.Path(__file__).parents[2]
  assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
