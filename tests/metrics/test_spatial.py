"""Closed-form values of every interaural metric, and the symmetries they must keep.

Axes: e ear (0 left, 1 right), p sample.
"""

import functools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialv2a_jax.metrics import analysis, spatial
from spatialv2a_jax.spatial import hrtf

SAMPLES = 8 * 16000
NOISE, OTHER = 0.1 * np.random.default_rng(0).standard_normal((2, SAMPLES))


def delayed(k: int) -> np.ndarray:
  return np.concatenate([np.zeros(k), NOISE[: SAMPLES - k]])


@functools.cache
def table(name: str, value: float = 0) -> dict[str, float]:
  signals = {
    "mono": lambda: (NOISE, NOISE),
    "polarity": lambda: (NOISE, -NOISE),
    "delay": lambda: (NOISE, delayed(int(value))),
    "gain": lambda: (NOISE, NOISE * 10 ** (-value / 20)),
    "independent": lambda: (NOISE, OTHER),
    "mixed": lambda: (NOISE, value * NOISE + math.sqrt(1 - value**2) * OTHER),
    "left only": lambda: (NOISE, 0 * NOISE),
    "right only": lambda: (0 * NOISE, NOISE),
    "silence": lambda: (0 * NOISE, 0 * NOISE),
  }
  return spatial.metrics(analysis.analyse(np.stack(signals[name]())))


def check(values: Mapping[str, float], wanted: Mapping[str, float], tolerance: float = 1e-6):
  got = {name: values[name] for name in wanted}
  assert got == pytest.approx(wanted, abs=tolerance, nan_ok=True)


def test_names_are_those_declared():
  for name in ("mono", "left only", "silence"):
    assert list(table(name)) == list(spatial.METRICS)


def test_mono():
  wanted = dict.fromkeys(
    [
      *("ild_clip_db", "ild_frame_db", "ild_tf_db", "itd_xc_clip_us", "itd_phat_clip_us"),
      *("itd_xc_frame_us", "itd_phat_frame_us", "itd_low_frame_us", "ipd_tf_rad"),
      *("ipd_100_1500_w_rad", "isd_l1", "isd_l2", "isd_cos", "isd_db", "side_energy_ratio"),
      *("ear_silent", "ild_clipped", "itd_clip_flagged"),
    ],
    0.0,
  )
  ones = dict.fromkeys(["iacc_clip", "iacc_frame", "iacc_lag0", "iacc_octave", "iacf_sign"], 1.0)
  check(table("mono"), wanted | ones | {"ipd_coh": 1.0})


def test_polarity_is_coherent_but_opposite():
  wanted = {"iacc_clip": 1, "iacf_sign": -1, "iacc_lag0": -1, "ild_clip_db": 0, "ild_tf_db": 0}
  wanted |= {"itd_xc_clip_us": 0, "ipd_tf_rad": math.pi, "ipd_100_1500_w_rad": math.pi}
  check(table("polarity"), wanted | {"isd_l1": 0, "side_energy_ratio": 1})


@pytest.mark.parametrize(
  ("k", "tf_db", "weighted_rad", "l1", "l2"),
  [(1, 0.03, 0.316, 0.001, 0), (4, 0.12, 1.264, 0.005, 1e-4), (10, 0.31, 1.767, 0.011, 3e-4)],
)
def test_delay(k, tf_db, weighted_rad, l1, l2):
  values = table("delay", k)
  assert values["iacc_clip"] >= 0.999
  check(values, {"itd_xc_clip_us": 62.5 * k, "itd_phat_clip_us": 62.5 * k}, 0.05)
  check(values, {"itd_xc_frame_us": 62.5 * k, "itd_phat_frame_signed_us": 62.5 * k}, 0.2)
  check(values, {"itd_low_frame_signed_us": 62.5 * k}, 0.2)
  check(values, {"itd_xc_frame_samples": k}, 0.01)
  check(values, {"ild_clip_db": 0, "ild_tf_db": tf_db}, 0.01)
  # A whole delay of white noise spreads the phase evenly: the full band measures nothing.
  check(values, {"ipd_tf_rad": math.pi / 2, "ipd_100_1500_w_rad": weighted_rad}, 0.01)
  check(values, {"isd_l1": l1, "isd_l2": l2, "isd_cos": l2}, 6e-4)
  check(values, {"iacc_frame": 1 - k / 1024}, 1e-3)


def test_delay_at_the_edge_counts_and_beyond_is_flagged():
  edge, beyond = table("delay", 16), table("delay", 17)
  assert edge["iacc_clip"] >= 0.999
  assert beyond["iacc_clip"] < 0.02
  check(edge, {"itd_xc_clip_us": 1000, "itd_clip_flagged": 0, "ild_tf_db": 0.48}, 0.01)
  check(edge, {"isd_l1": 0.018, "isd_l2": 8e-4, "ipd_tf_rad": math.pi / 2}, 0.01)
  check(beyond, {"itd_clip_flagged": 1, "itd_xc_clip_us": np.nan, "itd_phat_clip_us": np.nan})
  check(beyond, {"ild_tf_db": 0.51, "isd_l1": 0.019}, 0.01)


@pytest.mark.parametrize("gain_db", [3.0, 6.0, 20.0])
def test_gain(gain_db):
  a = 10 ** (-gain_db / 20)
  values = table("gain", gain_db)
  levels = ["ild_clip_db", "ild_clip_abs_db", "ild_frame_db", "ild_frame_signed_db"]
  levels += ["ild_tf_db", "ild_tf_signed_db"]
  check(values, dict.fromkeys(levels, gain_db), 1e-4)
  check(values, {"iacc_clip": 1, "itd_xc_clip_us": 0, "ipd_tf_rad": 0, "isd_cos": 0, "isd_db": 0})
  check(values, {"isd_l1": (1 - a) / (1 + a), "isd_l2": (1 - a) ** 2 / (1 + a**2)})
  check(values, {"side_energy_ratio": (1 - a) ** 2 / (2 + 2 * a**2)})
  check(values, {"spl_left_dbfs": -20, "spl_right_dbfs": -20 - gain_db}, 0.03)


def test_independent_ears():
  values = table("independent")
  assert values["iacc_clip"] < 0.02
  assert values["itd_clip_flagged"] == 1
  check(values, {"ild_clip_db": 0, "ild_tf_db": 20 * math.log(2) / math.log(10)}, 0.05)
  check(values, {"itd_xc_frame_us": 500}, 40)
  check(values, {"ipd_tf_rad": math.pi / 2, "ipd_100_1500_w_rad": math.pi / 2}, 0.01)
  check(values, {"isd_l1": 1 - 1 / math.sqrt(2), "isd_l2": 1 - math.pi / 4}, 0.003)
  check(values, {"isd_cos": 1 - math.pi / 4, "side_energy_ratio": 0.5}, 0.003)
  check(values, {"ipd_coh": 0}, 0.02)


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_partial_coherence(rho):
  values = table("mixed", rho)
  check(values, {"iacc_clip": rho, "iacc_lag0": rho}, 3 / math.sqrt(SAMPLES))
  check(values, {"iacc_octave": rho}, 0.05)
  check(values, {"ild_clip_db": 0, "itd_xc_clip_us": 0}, 1)
  assert 0 < values["ipd_tf_rad"] < math.pi / 2
  assert 0 < values["isd_l1"] < 1 - 1 / math.sqrt(2)


def band(signal_p: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
  hz = np.fft.rfftfreq(len(signal_p), 1 / 16000)
  return np.fft.irfft(np.where((hz >= low_hz) & (hz < high_hz), np.fft.rfft(signal_p), 0))


def test_delays_of_low_frequencies_are_those_of_the_low_band():
  low, high = band(NOISE, 0, 1500), band(NOISE, 1500, 8000)
  ears = np.stack([low + high, np.roll(low, 8) + np.roll(high, -8)])
  values = spatial.metrics(analysis.analyse(ears))
  check(values, {"itd_low_clip_us": 500, "itd_low_frame_signed_us": 500}, 25)
  check(values, {"itd_xc_clip_us": -500, "itd_phat_clip_us": -500}, 5)


def test_phases_weigh_by_the_level_of_their_frequency():
  loud, faint = band(NOISE, 0, 800), 0.1 * band(NOISE, 800, 8000)
  values = spatial.metrics(analysis.analyse(np.stack([loud + faint, loud - faint])))
  check(values, {"ipd_100_1500_w_rad": math.pi * 0.01 / 1.01}, 0.02)


def test_octaves_of_coherence_reach_from_354_to_2828_hertz():
  shared = band(NOISE, 354, 2828)
  ears = np.stack([NOISE, shared + OTHER - band(OTHER, 354, 2828)])
  values = spatial.metrics(analysis.analyse(ears))
  check(values, {"iacc_octave": 1, "iacc_clip": 2474 / 8000}, 0.02)


def test_thirds_that_differ_by_twelve_decibels_deviate_by_six():
  """Nine of the bands lie below 891 Hz, nine above."""
  low, high = band(NOISE, 0, 891), band(NOISE, 891, 8000)
  values = spatial.metrics(analysis.analyse(np.stack([low + high, low / 4 + high])))
  check(values, {"isd_db": 10 * math.log10(4)}, 0.2)


@pytest.mark.parametrize(("name", "sign"), [("left only", 1), ("right only", -1)])
def test_one_silent_ear(name, sign):
  values = table(name)
  wanted = {"ild_clip_db": 60 * sign, "ild_frame_db": 60, "ild_tf_signed_db": 60 * sign}
  wanted |= {"iacc_clip": 0, "iacc_frame": 0, "isd_l1": 1, "isd_l2": 1, "ild_clipped": 1}
  check(values, wanted | {"ear_silent": 1, "side_energy_ratio": 0.5})
  undefined = ("itd_xc_clip_us", "itd_phat_frame_us", "ipd_tf_rad", "ipd_coh", "isd_cos")
  assert all(math.isnan(values[name]) for name in undefined)


@pytest.mark.parametrize(("gain_db", "silent"), [(58, 0), (62, 1)])
def test_an_ear_is_silent_sixty_decibels_below_the_other(gain_db, silent):
  check(table("gain", gain_db), {"ear_silent": silent, "iacc_clip": 1 - silent})


def test_frames_of_a_silent_ear_have_no_delay():
  ears = np.stack([NOISE, delayed(4)])[:, :32768]
  ears[0, :16384] = 0
  clip = analysis.analyse(ears)
  assert np.isnan(spatial.frame_itd(clip)[:31]).all()
  wanted = {"itd_xc_frame_us": 250, "itd_low_frame_us": 250, "itd_phat_frame_signed_us": 250}
  check(spatial.metrics(clip), wanted, 10)


def test_silence_is_undefined_not_zero():
  assert all(math.isnan(value) for value in table("silence").values())


def test_quiet_frames_do_not_count():
  loud = np.stack([NOISE, 0.5 * NOISE])[:, :64000]
  hiss = 1e-4 * np.stack([0.5 * OTHER, NOISE[::-1]])[:, :64000]
  both = spatial.metrics(analysis.analyse(np.concatenate([loud, hiss], 1)))
  levels = ["ild_frame_db", "ild_frame_signed_db", "ild_tf_db"]
  check(both, dict.fromkeys(levels, 20 * math.log10(2)), 0.1)
  check(both, {"iacc_frame": 1}, 0.01)


@pytest.mark.parametrize("pink", [False, True])
@pytest.mark.parametrize(
  ("azimuth", "itd_us"), [(10, 94), (20, 184), (30, 273), (45, 402), (60, 512)]
)
def test_sphere(azimuth, itd_us, pink):
  spectrum = np.fft.rfft(NOISE[:32000])
  if pink:
    spectrum = spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 20))
  mono_p = np.fft.irfft(spectrum)
  mono_p = 0.1 * mono_p / mono_p.std()
  ears = [np.convolve(mono_p, taps) for taps in hrtf.sphere(16000).ir(azimuth)]
  values = spatial.metrics(analysis.analyse(np.stack(ears)))
  assert values["itd_phat_frame_signed_us"] == pytest.approx(itd_us, abs=4)
  assert values["ild_frame_signed_db"] > 0


@pytest.mark.parametrize("azimuth", [-60, -30, 10, 30, 60])
@pytest.mark.parametrize("partials", [1, 11])
def test_tones_have_the_delay_of_their_place(azimuth, partials):
  """Low ones are later than the law of high frequencies says, by half at most (Kuhn)."""
  time_p = np.arange(32000) / 16000
  order_k = np.arange(1, partials + 1)[:, None]
  hz = 660 / partials**0.5
  mono_p = (np.sin(2 * np.pi * hz * order_k * time_p + order_k**2) / order_k).sum(0)
  ears = [np.convolve(0.1 * mono_p, taps)[:24000] for taps in hrtf.sphere(16000).ir(azimuth)]
  values = spatial.metrics(analysis.analyse(np.stack(ears)))
  wanted = {10: 94, 30: 273, 60: 512}[abs(azimuth)] * np.sign(azimuth)
  for name in ("itd_xc_clip_us", "itd_phat_clip_us", "itd_xc_frame_signed_us"):
    assert 0.95 < values[name] / wanted < 1.5, name
  if partials > 1:  # A single tone has other peaks as high.
    assert 0.95 < values["itd_phat_frame_signed_us"] / wanted < 1.2
    assert values["itd_phat_rejected"] < 0.1


SIGNED = [name for name in spatial.METRICS if "signed" in name or name.endswith("_clip_us")]
SIGNED.append("ild_clip_db")
EARS = ("spl_left_dbfs", "spl_right_dbfs")


@st.composite
def scenes(draw):
  """One source with its own delay and gain at the right ear, over independent noise."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  source, *noise = rng.standard_normal((3, 8192))
  right = np.roll(source, draw(st.integers(-10, 10))) * draw(st.floats(0.2, 5))
  level = draw(st.floats(0.01, 0.3))
  return 0.1 * np.stack([source + level * noise[0], right + level * noise[1]])


@settings(max_examples=10, deadline=None)
@given(scenes())
def test_swapping_ears(audio_ep):
  plain = spatial.metrics(analysis.analyse(audio_ep))
  swapped = spatial.metrics(analysis.analyse(audio_ep[::-1]))
  for name in set(spatial.METRICS) - set(EARS):
    sign = -1 if name in SIGNED else 1
    assert swapped[name] == pytest.approx(sign * plain[name], rel=1e-6, abs=1e-6, nan_ok=True), name
  assert swapped[EARS[0]] == pytest.approx(plain[EARS[1]])


@settings(max_examples=10, deadline=None)
@given(scenes(), st.floats(-20, 15))
def test_common_gain_changes_nothing(audio_ep, gain_db):
  plain = spatial.metrics(analysis.analyse(audio_ep))
  louder = spatial.metrics(analysis.analyse(audio_ep * 10 ** (gain_db / 20)))
  for name in set(spatial.METRICS) - set(EARS):
    assert louder[name] == pytest.approx(plain[name], rel=1e-6, abs=1e-6, nan_ok=True), name
  assert louder[EARS[0]] - plain[EARS[0]] == pytest.approx(gain_db)


@settings(max_examples=5, deadline=None)
@given(scenes(), st.integers(1, 400))
def test_common_delay_changes_nothing(audio_ep, samples):
  plain = spatial.metrics(analysis.analyse(audio_ep))
  later = spatial.metrics(analysis.analyse(np.pad(audio_ep, ((0, 0), (samples, 0)))))
  for name in ("iacc_clip", "iacc_lag0", "iacc_octave", "ild_clip_db", "itd_xc_clip_us"):
    assert later[name] == pytest.approx(plain[name], abs=1e-3, nan_ok=True), name


@settings(max_examples=10, deadline=None)
@given(st.floats(-12, 12), st.integers(0, 99))
def test_fractions_of_a_sample(lag, seed):
  spectrum = np.fft.rfft(0.1 * np.random.default_rng(seed).standard_normal(32768))
  turn = np.exp(-2j * np.pi * np.arange(len(spectrum)) / 32768 * lag)
  turn[-1] = 0
  values = spatial.metrics(
    analysis.analyse(np.stack([np.fft.irfft(spectrum), np.fft.irfft(spectrum * turn)]))
  )
  for name in ("itd_xc_clip_us", "itd_phat_clip_us", "itd_low_clip_us"):
    assert values[name] == pytest.approx(62.5 * lag, abs=0.2), name  # A grid step is 3.9.


def test_frame_delays_keep_their_sign_and_ambiguous_ones_are_left_out():
  early = analysis.analyse(np.stack([NOISE, delayed(6)])[:, :16000])
  assert spatial.frame_itd(early) == pytest.approx(375, abs=1)
  two_ways = np.stack([NOISE, np.roll(NOISE, 5) + np.roll(NOISE, -7)])[:, :16000]
  assert np.isnan(spatial.frame_itd(analysis.analyse(two_ways))).mean() > 0.8
  assert spatial.metrics(analysis.analyse(two_ways))["itd_phat_rejected"] > 0.8


def test_frames_do_not_wrap_around():
  audio_ep = np.zeros((2, 1024))
  audio_ep[0, 2], audio_ep[1, 1020] = 1, 1  # 1018 samples apart, 6 if time were a circle.
  assert np.abs(analysis.analyse(audio_ep).xc_il).max() < 0.1


def test_unusable_arrays_are_refused():
  for shape in [(2, 100), (1, 5000), (5000,), (3, 5000)]:
    with pytest.raises(ValueError, match="samples"):
      analysis.analyse(np.zeros(shape))
  with pytest.raises(ValueError, match="finite"):
    analysis.analyse(np.full((2, 5000), np.nan))
