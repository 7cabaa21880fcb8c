"""Placing sound where the picture moves."""

import numpy as np
import pytest

from data import spatialise
from spatialv2a_jax import localizers
from spatialv2a_jax.spatial import hrtf
from tests import tiny
from tests.data import clips
from tests.data.clips import RATE, noise
from tests.spatial.test_hrtf import sphere_set, write_sofa

SECONDS = 4.0
STILL = np.zeros(32)


def test_a_track_has_no_jumps_and_bridges_gaps():
  jumping = np.where(np.arange(80) < 40, -50.0, 50.0)
  track = localizers.smooth(jumping, np.ones(80))
  assert np.abs(np.diff(track)).max() < 15 and track[0] == -50 and track[-1] == 50
  located = np.ones(80)
  located[10:70] = 0
  bridged = localizers.smooth(np.where(located, jumping, 0.0), located)
  assert (
    np.all(np.diff(bridged) >= -1e-9) and abs(bridged[0] + 50) < 0.01
  )  # Zeros of gaps take no part.
  assert not localizers.smooth(jumping, np.zeros(80)).any()


def test_motion_makes_no_clicks():
  """A tone stays a tone: its second difference is bounded by its own curvature."""
  hertz, jumping = 400.0, np.where(np.arange(32) // 8 % 2, 55.0, -55.0)
  mono_p = np.sin(2 * np.pi * hertz * np.arange(SECONDS * RATE) / RATE).astype(np.float32)
  track = localizers.smooth(jumping, np.ones(32))
  for name in ("sphere", "paper"):
    place = spatialise.Placer(name, RATE)
    heard_ep = place(mono_p[None] * 0.2, "mono", track).audio_ep
    inner_ep = heard_ep[:, 800:-800].astype(np.float64)  # Away from the tone's own onset.
    curve_ep = np.abs(np.diff(inner_ep, 2, axis=1))
    assert curve_ep.max() < 1.1 * (2 * np.pi * hertz / RATE) ** 2 * np.abs(inner_ep).max()
    level_eq = np.square(inner_ep).reshape(2, -1, 800).sum(2)
    assert np.ptp(10 * np.log10(level_eq[0] / level_eq[1])) > 1  # It did move.


def test_mono_is_rendered_to_the_side_of_the_picture():
  place = spatialise.Placer("sphere", RATE)
  placed = place(noise(SECONDS)[None], "mono", STILL + 40)
  assert placed.spatializer == "sphere" and placed.hrtf == hrtf.sphere(RATE).hash
  left, right = np.square(placed.audio_ep).sum(1)
  assert 10 * np.log10(left / right) > 6 and placed.gain_db == 0


def test_a_frame_of_a_track_tells_of_its_middle():
  half_p = noise(SECONDS / 2)
  mono_p = np.concatenate([half_p, half_p[::-1]])  # Backwards it sounds the same.
  sweep = np.linspace(-60, 60, 32)
  heard_ep = spatialise.Placer("sphere", RATE)(mono_p[None], "mono", sweep).audio_ep
  level_ev = np.square(heard_ep.astype("f8")).reshape(2, 32, -1).sum(2)
  side_v = 10 * np.log10(level_ev[0] / level_ev[1])
  assert abs((side_v + side_v[::-1])[2:-2].mean()) < 0.05


def test_true_stereo_stays_as_it_is_unless_asked_or_turned_round():
  mono_p, swing = noise(SECONDS), 50 * np.sin(np.arange(32) / 3)
  heard_ep = spatialise.Placer("sphere", RATE)(mono_p[None], "mono", swing).audio_ep
  keep, render = spatialise.Placer("sphere", RATE), spatialise.Placer("sphere", RATE, False)
  kept = keep(heard_ep, "stereo", swing)
  assert kept.spatializer == "recorded" and kept.hrtf == "" and kept.agreement > 0.9
  np.testing.assert_array_equal(kept.audio_ep, heard_ep)
  turned = keep(heard_ep[::-1], "stereo", swing)
  assert turned.spatializer == "sphere" and turned.agreement < -0.9
  assert render(heard_ep, "stereo", swing).spatializer == "sphere"
  still = keep(heard_ep, "stereo", STILL)  # A picture that says nothing contradicts nothing.
  assert still.spatializer == "recorded" and np.isnan(still.agreement)


def test_chance_does_not_overrule_a_recording():
  """Level and picture that wander independently of each other."""
  keep = spatialise.Placer("sphere", RATE)
  kept = 0
  for seed in range(40):
    rng = np.random.default_rng(seed)
    wander = [3 * localizers.smooth(rng.uniform(-60, 60, 80), np.ones(80)) for _ in range(2)]
    level_p = np.interp(np.arange(10 * RATE) / RATE, np.arange(80) / 8, wander[0] / 10)
    audio_ep = np.stack([noise(10.0, seed) * 10 ** (level_p / 20), noise(10.0, seed + 99)])
    kept += keep(audio_ep.astype(np.float32), "stereo", wander[1]).spatializer == "recorded"
  assert kept >= 39


def test_full_scale_is_kept_with_both_ears_turned_down_alike():
  loud_ep = np.stack([noise(SECONDS, level=0.5), noise(SECONDS, 1, 0.25)])
  placed = spatialise.Placer("sphere", RATE)(loud_ep, "stereo", STILL)
  peak = np.abs(loud_ep).max()
  assert peak > 1 and np.abs(placed.audio_ep).max() == pytest.approx(32767 / 32768, abs=1e-6)
  assert placed.gain_db == pytest.approx(-20 * np.log10(peak), abs=0.01)
  np.testing.assert_allclose(placed.audio_ep * peak, loud_ep, atol=1e-4)


def test_a_network_places_what_is_not_stereo(tmp_path):
  folder = tiny.save_mono2binaural(tmp_path / "model")
  video = str(clips.write(tmp_path / "a.mp4", 2.0))
  mono_p = noise(2.0)
  place = spatialise.Placer(f"network:{folder}", RATE)
  placed = place(mono_p[None], "mono", STILL[:16], video)
  assert placed.spatializer == "network" and len(placed.hrtf) == 16
  np.testing.assert_allclose(placed.audio_ep.mean(0), mono_p, atol=1e-6)
  assert np.abs(placed.audio_ep[0] - placed.audio_ep[1]).max() > 1e-3
  stereo_ep = np.stack([mono_p, noise(2.0, 1)])
  assert place(stereo_ep, "stereo", STILL[:16], video).spatializer == "recorded"


@pytest.mark.parametrize("way", ["sofa:{}", "paper:sofa:{}"])
def test_measured_heads_by_their_file_name_alone(tmp_path, way):
  path = write_sofa(tmp_path / "head.sofa", *sphere_set())
  place = spatialise.Placer(way.format(path), RATE)
  placed = place(noise(SECONDS)[None], "mono", STILL + 40)
  assert placed.spatializer == way.format("head.sofa") and placed.hrtf == place.hash != ""
  left, right = np.square(placed.audio_ep).sum(1)
  assert left > 1.5 * right
