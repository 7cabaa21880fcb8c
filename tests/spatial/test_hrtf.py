"""Head-related filters: goldens of the rigid sphere, symmetry, SOFA files, interaural laws."""

import h5py
import numpy as np
import pytest
from scipy import signal

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.spatial import hrtf

FREQUENCY_HZ = np.array([100, 500, 1000, 2000, 4000, 7900, 16000.0])
MAGNITUDE_DB = {
  0: [0.02, 2.21, 3.74, 5.14, 5.70, 5.91, 5.99],
  60: [-0.03, 0.83, 2.76, 3.78, 4.50, 5.08, 5.49],
  90: [-0.05, -0.40, 0.99, 1.56, 2.17, 2.44, 2.66],
  120: [-0.03, -0.69, -2.10, -0.62, -1.43, -2.71, -4.31],
  150: [0.0, 0.01, -0.79, -5.23, -4.21, -6.99, -11.54],
  180: [0.02, 0.41, 0.89, 1.24, 1.00, -0.13, -2.56],
}


def ild_db(filter_et):
  energy_e = np.sum(np.asarray(filter_et, np.float64) ** 2, axis=1)
  return 10 * np.log10(energy_e[0] / energy_e[1])


def itd_us(filter_et, rate, low=None, high=None):
  """Left lead of the strongest cross-correlation, optionally within a band."""
  size = 1 << 14
  cross_f = np.prod([np.fft.rfft(filter_et[0], size), np.conj(np.fft.rfft(filter_et[1], size))], 0)
  frequency_f = np.fft.rfftfreq(size, 1 / rate)
  if high is not None:
    cross_f = np.where((frequency_f >= low) & (frequency_f <= high), cross_f, 0)
  correlation = np.fft.irfft(cross_f, 16 * size)
  lag = int(np.argmax(np.roll(correlation, 16 * size // 2))) - 16 * size // 2
  return -lag / (16 * rate) * 1e6


@pytest.mark.parametrize("angle_deg", MAGNITUDE_DB)
def test_sphere_magnitude(angle_deg):
  response_f = hrtf.sphere_response(FREQUENCY_HZ, np.array([float(angle_deg)]))[0]
  np.testing.assert_allclose(
    20 * np.log10(np.abs(response_f)), MAGNITUDE_DB[angle_deg], rtol=0, atol=0.0101
  )


def test_sphere_limits():
  assert hrtf.sphere_response(np.zeros(1), np.array([70.0]))[0, 0] == 1
  bright = hrtf.sphere_response(np.array([20000.0]), np.zeros(1))[0, 0]
  assert 20 * np.log10(abs(bright)) == pytest.approx(6.02, abs=0.05)


def test_finite_range_tends_to_far_field_and_deepens_the_shadow_nearby():
  angle_deg = np.array([0.0, 60, 120, 150, 180])
  far = np.abs(hrtf.sphere_response(FREQUENCY_HZ, angle_deg))
  distant = np.abs(hrtf.sphere_response(FREQUENCY_HZ, angle_deg, distance_m=100.0))
  np.testing.assert_allclose(distant, far, rtol=0.005)
  room = np.abs(hrtf.sphere_response(FREQUENCY_HZ, angle_deg, distance_m=1.5))
  assert np.max(np.abs(20 * np.log10(room / far))) < 1.3
  near, usual = hrtf.sphere(16000, distance_m=0.2), hrtf.sphere(16000)
  assert ild_db(near.ir(90)) > ild_db(usual.ir(90)) + 3
  for inside in (0.05, hrtf.HEAD_RADIUS_M):
    with pytest.raises(ValueError, match="outside"):
      hrtf.sphere_response(FREQUENCY_HZ, angle_deg, distance_m=inside)


@pytest.mark.parametrize(
  ("azimuth_deg", "phase", "low", "full", "level_db"),
  [
    (15, 204, 154, 136, 4.2),
    (30, 393, 315, 268, 8.0),
    (45, 554, 479, 391, 11.1),
    (60, 676, 608, 502, 13.0),
    (75, 752, 679, 598, 12.7),
    (90, 778, 700, 666, 6.6),
  ],
)
def test_interaural_goldens_at_44_kilohertz(azimuth_deg, phase, low, full, level_db):
  filter_et = hrtf.sphere(44100).ir(azimuth_deg)
  cross_f = np.prod(
    [np.fft.rfft(filter_et[0], 44100), np.conj(np.fft.rfft(filter_et[1], 44100))], 0
  )
  assert np.angle(cross_f[200]) / (2 * np.pi * 200) * 1e6 == pytest.approx(phase, abs=3)
  assert itd_us(filter_et, 44100, 0, 1500) == pytest.approx(low, abs=3)
  assert itd_us(filter_et, 44100) == pytest.approx(full, abs=3)
  assert ild_db(filter_et) == pytest.approx(level_db, abs=0.2)


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000])
def test_taps_last_sixteen_milliseconds_and_are_cached(rate):
  head = hrtf.sphere(rate)
  assert head.taps == pytest.approx(0.016 * rate, abs=2)
  assert head is hrtf.load("sphere", rate)
  filter_et = head.ir(0)
  assert filter_et.shape == (2, head.taps) and filter_et.dtype == np.float32
  assert np.argmax(np.abs(filter_et[0])) == pytest.approx(head.lead, abs=1)


@pytest.mark.parametrize("azimuth_deg", [0.0, 10.3, 47.77, 90.0, 133.1])
def test_mirrored_source_swaps_ears_exactly(azimuth_deg):
  head = hrtf.sphere(16000)
  np.testing.assert_array_equal(head.ir(azimuth_deg), head.ir(-azimuth_deg)[::-1])


def test_sphere_folds_rear_and_elevation_onto_the_lateral_angle():
  head = hrtf.sphere(16000)
  np.testing.assert_allclose(head.ir(150), head.ir(30), atol=1e-6)
  lateral = np.degrees(np.arcsin(np.sin(np.radians(70)) * np.cos(np.radians(40))))
  np.testing.assert_allclose(head.ir(70, 40), head.ir(lateral), atol=1e-6)
  assert abs(ild_db(head.ir(90, 90))) < 1e-3


def test_interpolation_between_grid_points_does_not_comb():
  """Half-way filters match the series itself to a tenth of a decibel below 7 kHz."""
  head = hrtf.sphere(16000)
  for lateral in (20.5, 55.5, 80.5):
    frequency_f = np.fft.rfftfreq(512, 1 / 16000)
    exact_df = hrtf.sphere_response(frequency_f, np.array([90 - lateral, 90 + lateral]))
    found_ef = np.fft.rfft(head.ir(lateral), 512)
    band = (frequency_f > 100) & (frequency_f < 7000)
    ratio_db = 20 * np.log10(np.abs(found_ef[:, band]) / np.abs(exact_df[:, band]))
    assert np.max(np.abs(ratio_db)) < 0.1


def test_identity_depends_on_what_shapes_the_filters():
  hashes = {
    hrtf.sphere(16000).hash,
    hrtf.sphere(44100).hash,
    hrtf.sphere(16000, distance_m=1.0).hash,
    hrtf.sphere(16000, radius_m=0.08).hash,
  }
  assert len(hashes) == 4


# Measured sets: a SOFA file made of sphere responses must bring the sphere back.


def sphere_set(rate=44100, elevations=(-30, 0, 30, 60), step=10):
  head = hrtf.sphere(rate)
  directions = [(azimuth, e) for e in elevations for azimuth in range(0, 360, step)]
  return np.array(directions, float), np.stack([head.ir(*direction) for direction in directions])


def write_sofa(path, direction_d2, response_det, rate=44100, convention="SimpleFreeFieldHRIR"):
  with h5py.File(path, "w") as file:
    file.attrs["Conventions"] = "SOFA"
    file.attrs["SOFAConventions"] = convention
    file["Data.IR"] = response_det
    file["Data.SamplingRate"] = np.array([float(rate)])
    file["Data.Delay"] = np.zeros((1, 2))
    file["SourcePosition"] = np.pad(direction_d2, ((0, 0), (0, 1)), constant_values=1.4)
    file["SourcePosition"].attrs["Type"] = "spherical"
  return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  path = tmp_path_factory.mktemp("sofa") / "head.sofa"
  return write_sofa(path, *sphere_set())


@pytest.mark.parametrize("azimuth_deg", [-65, 0, 25, 30, 37.5, 60, 145])
def test_sofa_is_resampled_with_its_gain_and_interpolated(measured, azimuth_deg):
  found = hrtf.load(f"sofa:{measured}", 16000).ir(azimuth_deg)
  expected = hrtf.sphere(16000).ir(azimuth_deg)
  assert ild_db(found) == pytest.approx(ild_db(expected), abs=0.5)
  assert itd_us(found, 16000) == pytest.approx(itd_us(expected, 16000), abs=12)
  frequency_f = np.fft.rfftfreq(256, 1 / 16000)
  band = (frequency_f > 200) & (frequency_f < 6500)
  spectra_ef, target_ef = (np.abs(np.fft.rfft(part)) for part in (found, expected))
  ratio_db = 20 * np.log10(spectra_ef[:, band] / target_ef[:, band])
  assert np.sqrt(np.mean(ratio_db**2)) < 1.0


def test_sofa_keeps_a_measured_direction(measured):
  head = hrtf.sofa(measured, 44100)
  expected = hrtf.sphere(44100).ir(50, 30)
  found = head.ir(50, 30)
  assert np.argmax(found[0]) == pytest.approx(np.argmax(expected[0]), abs=3)
  found_f, expected_f = (np.abs(np.fft.rfft(part, 2048)) for part in (found, expected))
  np.testing.assert_allclose(found_f[:, 20:900], expected_f[:, 20:900], rtol=0.02)


def test_sofa_moves_smoothly_and_covers_the_whole_sphere(measured):
  head = hrtf.sofa(measured, 16000)
  azimuth_q = np.arange(-180.0, 180, 0.5)
  spectra_eqf = head.spectra(azimuth_q, np.zeros_like(azimuth_q), 512)[:, :, 8:120]
  step_eq = np.abs(np.diff(spectra_eqf, axis=1)).max(axis=2)
  assert step_eq.max() < 0.15
  for elevation in (-90.0, -60.0, 90.0):
    assert np.abs(head.ir(20.0, elevation)).max() > 0.1


def test_sofa_of_a_horizontal_ring_alone(tmp_path):
  path = write_sofa(tmp_path / "ring.sofa", *sphere_set(elevations=(0,), step=5))
  found = hrtf.sofa(path, 16000)
  expected = hrtf.sphere(16000).ir(42)
  assert itd_us(found.ir(42), 16000) == pytest.approx(itd_us(expected, 16000), abs=10)
  np.testing.assert_allclose(found.ir(42, 20), found.ir(42), atol=1e-5)


def test_sofa_delays_and_cartesian_positions(tmp_path, measured):
  direction_d2, response_det = sphere_set()
  path = write_sofa(tmp_path / "variant.sofa", direction_d2, response_det)
  azimuth_d, elevation_d = np.radians(direction_d2.T)
  flat_d = np.cos(elevation_d)
  position = [flat_d * np.cos(azimuth_d), flat_d * np.sin(azimuth_d), np.sin(elevation_d)]
  with h5py.File(path, "a") as file:
    del file["SourcePosition"], file["Data.Delay"]
    file["SourcePosition"] = 1.4 * np.stack(position, 1)
    file["SourcePosition"].attrs["Type"] = np.bytes_("cartesian")
    # the right ear four samples later, and both at the very end of the stored taps
    file["Data.Delay"] = np.array([[525.0, 529.0]])
  plain, late = hrtf.sofa(measured, 44100).ir(30), hrtf.sofa(path, 44100).ir(30)
  assert itd_us(late, 44100) - itd_us(plain, 44100) == pytest.approx(4e6 / 44100, abs=2)


def test_sofa_with_exchanged_ears_is_refused(tmp_path):
  direction_d2, response_det = sphere_set()
  path = write_sofa(tmp_path / "swapped.sofa", direction_d2, response_det[:, ::-1])
  with pytest.raises(UserError, match=r"swapped\.sofa.*exchanged"):
    hrtf.sofa(path, 16000)


def test_sofa_with_a_quiet_left_ear_is_refused(tmp_path):
  direction_d2, response_det = sphere_set()
  path = write_sofa(tmp_path / "quiet.sofa", direction_d2, response_det * [[0.3], [1.0]])
  with pytest.raises(UserError, match=r"quiet\.sofa.*mislabelled"):
    hrtf.sofa(path, 16000)


def test_sofa_with_mirrored_azimuths_is_refused(tmp_path):
  direction_d2, response_det = sphere_set()
  path = write_sofa(tmp_path / "mirrored.sofa", direction_d2 * [-1, 1], response_det)
  with pytest.raises(UserError, match=r"mirrored\.sofa.*exchanged"):
    hrtf.sofa(path, 16000)


def test_sofa_with_a_late_near_ear_is_refused(tmp_path):
  path = write_sofa(tmp_path / "late.sofa", *sphere_set())
  with h5py.File(path, "a") as file:
    del file["Data.Delay"]
    file["Data.Delay"] = [[60.0, 0.0]]  # Each ear still has the level of its own side.
  with pytest.raises(UserError, match=r"late\.sofa.*exchanged"):
    hrtf.sofa(path, 16000)


def test_unusable_files_are_refused_in_one_line(tmp_path):
  direction_d2, response_det = sphere_set(elevations=(0,))
  (tmp_path / "text.sofa").write_text("not HDF5")
  write_sofa(tmp_path / "kind.sofa", direction_d2, response_det, convention="GeneralFIR")
  write_sofa(tmp_path / "mono.sofa", direction_d2, response_det[:, :1])
  write_sofa(tmp_path / "nan.sofa", direction_d2, response_det * np.nan)
  front = np.abs(direction_d2[:, 0]) < 40
  write_sofa(tmp_path / "front.sofa", direction_d2[front], response_det[front])
  with h5py.File(write_sofa(tmp_path / "bare.sofa", direction_d2, response_det), "a") as file:
    del file["Data.IR"]
  whole = write_sofa(tmp_path / "whole.sofa", direction_d2, response_det).read_bytes()
  (tmp_path / "cut.sofa").write_bytes(whole[: len(whole) // 2])
  for name in ("absent", "text", "kind", "mono", "nan", "front", "bare", "cut"):
    with pytest.raises(UserError, match=rf"{name}\.sofa") as caught:
      hrtf.load(f"sofa:{tmp_path / name}.sofa", 16000)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
  with pytest.raises(UserError, match="kemar"):
    hrtf.load("kemar", 16000)


def test_sofa_written_by_the_reference_package(tmp_path):
  sofar = pytest.importorskip("sofar")
  direction_d2, response_det = sphere_set()
  file = sofar.Sofa("SimpleFreeFieldHRIR")
  file.Data_IR, file.Data_SamplingRate = response_det, 44100
  file.SourcePosition = np.pad(direction_d2, ((0, 0), (0, 1)), constant_values=1.4)
  sofar.write_sofa(str(tmp_path / "reference.sofa"), file)
  found = hrtf.sofa(tmp_path / "reference.sofa", 16000).ir(30)
  assert ild_db(found) == pytest.approx(ild_db(hrtf.sphere(16000).ir(30)), abs=0.5)


def test_sofa_has_the_level_of_the_sphere_whatever_that_of_the_file(tmp_path, measured):
  direction_d2, response_det = sphere_set()
  expected = hrtf.sofa(measured, 16000)
  for gain in (0.01, 20):
    path = write_sofa(tmp_path / f"{gain}.sofa", direction_d2, gain * response_det)
    np.testing.assert_allclose(hrtf.sofa(path, 16000).aligned_det, expected.aligned_det, atol=1e-5)


def test_identity_of_a_sofa_is_its_content_and_rate_wherever_it_lies(tmp_path):
  direction_d2, response_det = sphere_set(elevations=(0,))
  path = write_sofa(tmp_path / "head.sofa", direction_d2, response_det)
  before = hrtf.sofa(path, 16000)
  (tmp_path / "copy.sofa").write_bytes(path.read_bytes())
  assert before.name == "sofa:head.sofa"
  assert hrtf.sofa(tmp_path / "copy.sofa", 16000).hash == before.hash
  assert hrtf.sofa(path, 22050).hash != before.hash
  write_sofa(path, direction_d2, response_det * [[1.0], [0.5]])  # Edited, it is read again.
  after = hrtf.sofa(path, 16000)
  assert after.hash != before.hash and ild_db(after.ir(0)) > ild_db(before.ir(0)) + 3


def test_a_tail_beyond_the_taps_fades(tmp_path):
  direction_d2, response_det = sphere_set(elevations=(0,))
  late = np.random.default_rng(0).standard_normal((*response_det.shape[:2], 800)) * 1e-3
  path = write_sofa(tmp_path / "room.sofa", direction_d2, np.append(response_det, late, axis=2))
  aligned_det = hrtf.sofa(path, 44100).aligned_det
  assert np.abs(aligned_det[..., -1]).max() < 1e-6 < np.abs(aligned_det[..., -80:-60]).max()


def test_sofa_without_low_frequencies_is_refused(tmp_path):
  """Its level is set by them."""
  direction_d2, response_det = sphere_set(elevations=(0,))
  high = signal.sosfilt(signal.butter(8, 2000, "high", fs=44100, output="sos"), response_det)
  with pytest.raises(UserError, match=r"thin\.sofa has next to nothing at 100 to 500 Hz"):
    hrtf.sofa(write_sofa(tmp_path / "thin.sofa", direction_d2, high), 16000)


def test_sofa_of_several_distances_is_refused(tmp_path):
  """Which of them would be heard was a matter of chance."""
  direction_d2, response_det = sphere_set(elevations=(0,))
  path = write_sofa(tmp_path / "rings.sofa", direction_d2, response_det)
  with h5py.File(path, "a") as file:
    file["SourcePosition"][::2, 2] = 0.5
  with pytest.raises(UserError, match=r"rings\.sofa was measured at several distances, 0.5 to 1.4"):
    hrtf.sofa(path, 16000)


def test_a_good_sofa_serves_low_rates_too(measured):
  """There its ears differ less than the check of their order asks for."""
  assert ild_db(hrtf.sofa(measured, 4000).ir(90)) > 1


@pytest.mark.parametrize(
  "variable, value",
  [
    ("Data.Delay", np.full((1, 2), np.nan)),
    ("Data.Delay", np.zeros((3, 2))),
    ("Data.SamplingRate", np.array([np.inf])),
    ("Data.SamplingRate", np.array([44099.5])),
    ("Data.SamplingRate", np.array([-44100.0])),
    ("Data.SamplingRate", np.zeros(0)),
    ("Data.IR", np.zeros((36, 2, 0))),
    ("Data.IR", "none"),
    ("SourcePosition", np.full((36, 3), np.nan)),
    ("SourcePosition", np.pad(10.0 * np.arange(37)[:, None], [(0, 0), (0, 2)], constant_values=1)),
  ],
)
def test_variables_that_cannot_be_are_one_line(tmp_path, variable, value):
  path = write_sofa(tmp_path / "odd.sofa", *sphere_set(elevations=(0,)))
  with h5py.File(path, "a") as file:
    del file[variable]
    file[variable] = value
    file["SourcePosition"].attrs["Type"] = "spherical"
  with pytest.raises(UserError, match=r"odd\.sofa"):
    hrtf.sofa(path, 16000)


def test_delays_below_zero_are_delays(tmp_path, measured):
  path = write_sofa(tmp_path / "early.sofa", *sphere_set())
  with h5py.File(path, "a") as file:
    file["Data.Delay"][:] = [[-4.0, 0.0]]
  plain, early = hrtf.sofa(measured, 44100).ir(30), hrtf.sofa(path, 44100).ir(30)
  assert itd_us(early, 44100) - itd_us(plain, 44100) == pytest.approx(4e6 / 44100, abs=2)


def test_woodworths_law_is_inverted():
  lateral = np.radians(sweep_deg := np.linspace(-90, 90, 181))
  law_us = 1e6 * hrtf.HEAD_RADIUS_M / hrtf.SOUND_SPEED_M_S * (lateral + np.sin(lateral))
  np.testing.assert_allclose(law_us[[120, 150, 180]], [261, 488, 656], atol=0.6)
  np.testing.assert_allclose(hrtf.woodworth_azimuth_deg(law_us), sweep_deg, atol=1e-5)
  np.testing.assert_allclose(
    hrtf.woodworth_azimuth_deg(np.array([-5000.0, 5000])), [-90, 90], atol=1e-6
  )
  np.testing.assert_allclose(
    hrtf.woodworth_azimuth_deg(np.array([94.0, 273, 512])), [10.6, 31.5, 63.6], atol=0.1
  )


@pytest.mark.parametrize(("law", "quarter_deg"), [("linear", 30.0), ("pinhole", 40.9)])
def test_pixel_laws(law, quarter_deg):
  assert hrtf.pixel_to_azimuth(0.25, law=law) == pytest.approx(quarter_deg, abs=0.01)
  u = np.linspace(0, 1, 11)
  azimuth_deg = hrtf.pixel_to_azimuth(u, 90.0, law)
  np.testing.assert_allclose(azimuth_deg[[0, 5, 10]], [45, 0, -45], atol=1e-9)


def test_an_unknown_law_is_refused():
  with pytest.raises(ValueError, match="fisheye"):
    hrtf.pixel_to_azimuth(0.5, law="fisheye")
