"""Three numbers about a clip, of any length."""

import numpy as np
import pytest

from spatialv2a_jax.metrics import summary


def test_stretches_weigh_by_their_energy_and_silent_ones_not_at_all(monkeypatch):
  rng = np.random.default_rng(0)
  noise = 0.1 * rng.standard_normal((1, 16_000))
  loud, soft = (np.concatenate(pair) for pair in ((noise, noise / 2), (noise / 8, noise / 4)))
  ears = np.concatenate([loud, soft, np.zeros_like(loud)], axis=1)
  monkeypatch.setattr(summary, "STRETCH_SECONDS", 1.0)
  found = summary.spatial_cues(ears, 16_000)
  assert found["ild_clip_db"] == pytest.approx(6.02 * (16 - 1) / (16 + 1), abs=0.02)
  assert found["iacc_clip"] == pytest.approx(1, abs=1e-3)
  late = np.concatenate([noise, np.roll(noise, 4, axis=1)])
  deaf = np.concatenate([late, late * [[1], [0]]], axis=1)  # Its second half has no delay.
  assert summary.spatial_cues(deaf, 16_000)["itd_xc_clip_us"] == pytest.approx(250, abs=2)


def test_cues_do_not_depend_on_the_rate():
  noise = 0.1 * np.random.default_rng(0).standard_normal((1, 48_000))
  ears = np.concatenate([noise, np.roll(noise, 12, axis=1)])
  assert summary.spatial_cues(ears, 48_000)["itd_xc_clip_us"] == pytest.approx(250, abs=2)


def test_cues_of_long_sound_are_averaged_over_stretches(monkeypatch):
  rng = np.random.default_rng(0)
  noise = rng.standard_normal((1, 48_000)).astype(np.float32) * 0.1
  ears = np.concatenate([noise, 0.5 * np.roll(noise, 4, axis=1)])
  whole = summary.spatial_cues(ears, 16_000)
  monkeypatch.setattr(summary, "STRETCH_SECONDS", 1.0)
  parts = summary.spatial_cues(ears, 16_000)
  assert parts == pytest.approx(whole, rel=0.01)
  assert parts["itd_xc_clip_us"] == pytest.approx(250, abs=2)
  assert parts["ild_clip_db"] == pytest.approx(6.02, abs=0.05)
  assert summary.spatial_cues(np.zeros((2, 100), np.float32), 16_000)["iacc_clip"] is None
