"""Agreement of rendered sound with the truth it was rendered from. Axes: e ear, p sample."""

import dataclasses
import json
import math

import numpy as np
import pytest

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import alignment, analysis, stats
from spatialv2a_jax.metrics.alignment import Truth
from spatialv2a_jax.spatial import hrtf

RATE, FPS, SECONDS = 16000, 8, 4
NOISE = 0.1 * np.random.default_rng(0).standard_normal(RATE // 2)


def stepping(angles):
  """Half a second of noise from each angle, with its truth; None is silence."""
  parts, head = [], hrtf.sphere(RATE)
  for angle in angles:
    ears = np.zeros((2, len(NOISE)))
    if angle is not None:
      ears = np.stack([np.convolve(NOISE, taps)[: len(NOISE)] for taps in head.ir(angle)])
    parts.append(ears)
  azimuth_v = np.repeat([np.nan if a is None else a for a in angles], FPS // 2)
  return np.concatenate(parts, 1), Truth(len(angles) / 2, FPS, azimuth_v, np.zeros(0))


def values(audio_ep, truth):
  parts = alignment.agreement(alignment.listen(analysis.analyse(audio_ep)), truth)
  return {n: stats.per_clip(m, [parts[n]])[0] for n, m in alignment.METRICS.items()}


SWEEP = [-60.0, -30.0, -15.0, 0.0, 20.0, 40.0, 60.0, 15.0]


def test_faithful_sound_scores_high():
  got = values(*stepping(SWEEP))
  assert got["sign_agreement"] > 0.9 and got["sign_agreement_itd"] > 0.9
  assert got["azimuth_pearson_r"] > 0.95 and got["azimuth_pearson_r_itd"] > 0.95
  assert got["azimuth_mae_deg"] < 6 and got["azimuth_mae_itd_deg"] < 6
  assert got["window_coverage"] == 1


def test_sound_of_any_length_is_heard_in_stretches(monkeypatch):
  audio_ep, _ = stepping([-60, None, 40, 10, 0, -20])
  audio_ep[:, : RATE // 2] *= 1e-3  # What is loud enough is decided over all of it.
  whole = alignment.listen(analysis.analyse(audio_ep))
  monkeypatch.setattr(alignment, "STRETCH", 5)
  parts = alignment.listen_along(audio_ep)
  assert len(parts.active_w) == len(whole.active_w) == 22 and not whole.active_w.all()
  np.testing.assert_array_equal(parts.active_w, whole.active_w)
  loud_w = whole.active_w
  for name in ("ild_db_w", "ild_broadband_db_w", "itd_us_w", "azimuth_ild_w", "azimuth_itd_w"):
    one, other = getattr(parts, name)[loud_w], getattr(whole, name)[loud_w]
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("angle", [-80, -45, -10, 0, 30, 60, 90, 150])
def test_still_source_is_located(angle):
  got = values(*stepping([angle] * 4))
  assert got["azimuth_mae_deg"] < 1  # 150 degrees is behind: the lateral angle is 30.
  # The full-band delay of a sphere exceeds the law far to the side: 30 reads 31.6, 80 reads 89.
  assert got["azimuth_mae_itd_deg"] < (4 if abs(angle) <= 60 else 10)
  if abs(angle) > alignment.SIDE_DEG:
    assert got["sign_agreement"] == 1


def test_swapped_ears_are_as_wrong_as_can_be():
  audio_ep, truth = stepping(SWEEP)
  plain, swapped = values(audio_ep, truth), values(audio_ep[::-1], truth)
  for name in ("sign_agreement", "sign_agreement_itd"):
    assert swapped[name] == pytest.approx(1 - plain[name])
  for name in ("azimuth_pearson_r", "azimuth_pearson_r_itd"):
    assert swapped[name] == pytest.approx(-plain[name])
  assert swapped["azimuth_mae_deg"] > 40


def test_dual_mono_is_at_chance():
  audio_ep, truth = stepping(SWEEP)
  got = values(np.repeat(audio_ep.mean(0, keepdims=True), 2, 0), truth)
  assert got["sign_agreement"] == got["sign_agreement_itd"] == 0.5
  assert math.isnan(got["azimuth_pearson_r"])
  true_w = alignment.window_truth(truth, 30)[0]
  assert got["azimuth_mae_deg"] == pytest.approx(np.nanmean(np.abs(true_w)), rel=1e-6)


@pytest.mark.parametrize("cue, tie", [("ild_db_w", 1e-3), ("itd_us_w", 0.1)])
def test_a_cue_of_no_side_counts_half(cue, tie):
  """Less than a thousandth of a decibel or a tenth of a microsecond is rounding."""
  zeros_w = np.zeros(4)
  heard = alignment.Heard(zeros_w == 0, *[zeros_w] * 5, np.zeros(0))
  heard = dataclasses.replace(heard, **{cue: tie * np.array([0.9, 0.9, -1.1, -1.1])})
  truth = Truth(1.0, FPS, np.full(FPS, 30.0), np.zeros(0))
  name = "sign_agreement" if cue == "ild_db_w" else "sign_agreement_itd"
  np.testing.assert_array_equal(alignment.agreement(heard, truth)[name], [1, 4])


def test_only_sounding_windows_count():
  audio_ep, truth = stepping([30, None, None, 30])
  got = values(audio_ep, truth)
  assert got["azimuth_mae_deg"] < 1
  silent = values(0 * audio_ep, truth)
  assert silent["window_coverage"] == 0 and math.isnan(silent["sign_agreement"])
  short = values(audio_ep[:, : RATE // 2], truth)
  assert 0.3 < short["window_coverage"] < 0.7


@pytest.mark.parametrize(
  "loud_db, quiet_db, counts",
  [(-10, -48, True), (-10, -52, False), (-40, -58, True), (-40, -62, False)],
)
def test_what_is_loud_enough_counts(loud_db, quiet_db, counts):
  """Above -60 dBFS and within 40 dB of the loudest."""
  level_p = 10 ** (np.repeat([loud_db, quiet_db], RATE) / 20)
  clip = analysis.analyse(np.random.default_rng(1).standard_normal((2, 2 * RATE)) * level_p)
  for active in (clip.active_i, alignment.listen(clip).active_w):
    half = len(active) // 2
    assert active[: half - 2].all() and (active[half + 2 :] == counts).all()


def test_the_side_is_read_from_what_the_head_shades():
  spectrum = np.fft.rfft(NOISE)
  high = np.fft.irfft(np.where(np.arange(len(spectrum)) < 0.5 * 1500, 0, spectrum))
  low = 4 * (NOISE - high)
  heard = alignment.listen(analysis.analyse(np.stack([low + high / 4, low / 4 + high])))
  assert (heard.ild_db_w < -10).all() and (heard.ild_broadband_db_w > 3).all()


def test_a_silent_ear_has_a_level_but_no_delay():
  audio_ep, truth = stepping([-60.0] * 4)
  got = values(audio_ep * [[0], [1]], truth)
  assert got["sign_agreement"] == got["sign_agreement_broadband"] == 1
  for name in ("sign_agreement_itd", "azimuth_pearson_r_itd", "azimuth_mae_itd_deg"):
    assert math.isnan(got[name])


def test_faint_bands_do_not_draw_a_source_to_the_middle():
  taps = np.hanning(24) / 12
  dull = np.convolve(np.convolve(NOISE, taps), taps)  # Nothing above 1.3 kHz, but a faint hiss.
  ears = np.stack([np.convolve(dull, ear)[: len(NOISE)] for ear in hrtf.sphere(RATE).ir(-30)])
  heard = alignment.listen(analysis.analyse(ears + 1e-3 * NOISE[::-1]))
  assert np.abs(heard.azimuth_ild_w + 30).max() < 5


def test_the_truth_of_a_window_is_that_of_its_middle():
  time_v = np.arange(8) / 4
  truth = Truth(2.0, 4.0, 40 * time_v - 35, np.zeros(0))
  true_w, sounds_w = alignment.window_truth(truth, 12)
  np.testing.assert_allclose(true_w, 40 * 0.128 * np.arange(1, 13) - 35)
  assert sounds_w.all()


def test_a_window_sounds_if_half_of_it_does():
  azimuth_v = np.array([20.0] * 4 + [np.nan] * 4)  # Until half-way to the next frame, 448 ms.
  silent_later = Truth(1.0, 1000 / 128, azimuth_v, np.zeros(0))
  assert alignment.window_truth(silent_later, 6)[1].tolist() == [True] * 3 + [False] * 3
  ends = Truth(0.512, 8.0, np.full(8, 20.0), np.zeros(0))
  assert alignment.window_truth(ends, 6)[1].tolist() == [True] * 4 + [False] * 2


def test_sound_that_outlasts_the_truth_covers_no_more_than_all_of_it():
  audio_ep, longer = stepping([30, 30, -60])
  truth = Truth(1.0, FPS, longer.azimuth_v[:FPS], np.zeros(0))
  got = values(audio_ep, truth)
  assert got["window_coverage"] == 1 and got["azimuth_mae_deg"] < 1


def test_angles_near_the_middle_are_not_asked_for_their_side():
  assert math.isnan(values(*stepping([8, -8]))["sign_agreement"])


def test_onsets_score():
  audio_ep = np.zeros((2, SECONDS * RATE))
  times = np.array([0.5, 1.5, 2.5, 3.5])
  for time in times[:3]:
    start = int(time * RATE)
    audio_ep[:, start : start + 1600] = NOISE[:1600]
  truth = Truth(SECONDS, FPS, np.zeros(SECONDS * FPS), times)
  got = values(audio_ep, truth)
  assert got["onset_recall"] == 0.75 and got["onset_precision"] == 1
  assert got["onset_f1"] == pytest.approx(6 / 7) and got["onset_false_alarms"] == 0
  assert got["onset_error_ms"] < 10
  longer = np.concatenate([audio_ep, audio_ep], 1)  # Nothing is known of its second half.
  assert values(longer, truth) == pytest.approx(got, nan_ok=True)
  near = Truth(SECONDS, FPS, truth.azimuth_v, np.append(times, times + 0.01))
  assert values(audio_ep, near) == pytest.approx(got, nan_ok=True)  # Cannot be heard apart.
  assert values(audio_ep * [[0], [1]], truth)["onset_recall"] == 0.75
  late = values(np.roll(audio_ep, RATE // 20, 1), truth)
  assert late["onset_error_ms"] == pytest.approx(50, abs=10)


def test_unknown_has_the_shape_of_known():
  known = alignment.agreement(
    alignment.listen(analysis.analyse(stepping([0])[0])), stepping([0])[1]
  )
  unknown = alignment.unknown()
  assert list(known) == list(unknown) == list(alignment.METRICS)
  for name, metric in alignment.METRICS.items():
    assert math.isnan(stats.per_clip(metric, [unknown[name]])[0])
    assert np.isfinite(known[name]).all()


def test_read_truth(tmp_path):
  path = tmp_path / "a.json"
  data = {"seconds": 1, "fps": 4, "azimuth_deg": [10, None, -5.5, 0]}
  data["sources"] = [{"onsets_s": [0.5]}, {"onsets_s": [0.1, 0.9]}]
  path.write_text(json.dumps(data))
  truth = alignment.read_truth(path)
  np.testing.assert_array_equal(truth.azimuth_v, [10, np.nan, -5.5, 0])
  assert sorted(truth.onsets_s) == [0.1, 0.5, 0.9]


ODD = ["", "[]", "{}", '{"seconds": 1, "fps": 0}', "\x00", "[" * 100_000]


@pytest.mark.parametrize("text", ODD)
def test_wrong_truth_is_named(tmp_path, text):
  path = tmp_path / "a.json"
  path.write_text(text)
  with pytest.raises(UserError, match="a.json"):
    alignment.read_truth(path)


@pytest.mark.parametrize(
  "name, value",
  [
    ("sources", [{"onsets_s": [None]}]),
    ("sources", [{"onsets_s": [[0.5]]}]),
    ("azimuth_deg", [[1, 2], [3, 4]]),
    ("azimuth_deg", []),
    ("azimuth_deg", [math.inf]),
    ("seconds", 10**400),
    ("fps", math.inf),
    ("fps", 0),
    ("seconds", 0),
    ("seconds", math.nan),
  ],
)
def test_truth_with_an_odd_value_is_named(tmp_path, name, value):
  """Otherwise one such clip ended the scores of all."""
  path = tmp_path / "a.json"
  data = {"seconds": 1, "fps": 4, "azimuth_deg": [0], "sources": [{"onsets_s": [0.5]}]}
  path.write_text(json.dumps(data | {name: value}))
  with pytest.raises(UserError, match="a.json is not the truth of a scene"):
    alignment.read_truth(path)
