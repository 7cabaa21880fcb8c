"""Directions of measured sets: in which coordinates they come, and which tell the ears apart."""

import h5py
import numpy as np
import pytest

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.spatial import hrtf, sofa
from tests.spatial.test_hrtf import sphere_set, write_sofa


def test_cartesian_positions_are_directions_at_any_distance(tmp_path):
  direction_d2, response_det = sphere_set(elevations=(-30, 0, 30), step=15)
  spherical = write_sofa(tmp_path / "a.sofa", direction_d2, response_det)
  cartesian = write_sofa(tmp_path / "b.sofa", direction_d2, response_det)
  with h5py.File(cartesian, "a") as file:
    file["SourcePosition"][:] = 0.2 * sofa.vectors(*direction_d2.T)
    file["SourcePosition"].attrs["Type"] = "cartesian"
  found, expected = hrtf.sofa(cartesian, 16000), hrtf.sofa(spherical, 16000)
  for place in ((35, 10), (-100, -45), (10, 80)):
    np.testing.assert_allclose(found.ir(*place), expected.ir(*place), atol=1e-5)


@pytest.mark.parametrize(
  "azimuth_deg, elevation_deg, asked",
  [
    (60, 0, True), (90, 0, True), (75, 20, True), (75, -20, True),
    (59, 0, False), (91, 0, False), (75, 21, False), (75, -21, False), (-75, 0, False),
  ],
)  # fmt: skip
def test_ears_are_told_apart_by_sources_far_to_the_left(azimuth_deg, elevation_deg, asked):
  """In front and behind, above and below, the ears of a good set may differ little."""
  response_det = hrtf.sphere(44100).ir(75)[None]
  direction_d3 = sofa.vectors(np.array([azimuth_deg]), np.array([elevation_deg]))
  if asked:
    sofa._check_ears("a.sofa", response_det, direction_d3)
  with pytest.raises(UserError, match="exchanged" if asked else "has no direction at azimuth"):
    sofa._check_ears("a.sofa", response_det[:, ::-1], direction_d3)
