"""Ways to place a source by name: straight through a head's filters, or as the paper does it.

Axes: p sample, e ear (0 left, 1 right).

"sphere" and "sofa:FILE" render the source directly. "paper" goes through first-order spherical
harmonics and a ring of eight virtual loudspeakers (arXiv 2601.15017) that a rigid sphere hears, or
with "paper:sofa:FILE" a measured head. Its loudspeaker gains are the encoding matrix, which is what
PseudoBinaural's program runs and what gives statistics like the published ones, near mono;
"paper-pinv" uses the inverse that both publications print, which keeps more of the time difference.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.spatial import hrtf, render

ORDER, SPEAKERS = 1, 8
DECODERS: dict[str, str | None] = {"paper": "projection", "paper-pinv": "pinv"}


@dataclasses.dataclass(frozen=True)
class Spatializer:
  """Renders one source at a time.

  Attributes:
    name: as given to `load`.
    head: whose ears hear.
    decoder: of the virtual loudspeakers; None renders directly.
  """

  name: str
  head: hrtf.Hrtf
  decoder: str | None = None

  def __call__(
    self, mono_p: np.ndarray, azimuth_deg: render.Track, elevation_deg: render.Track = 0.0
  ) -> np.ndarray:
    """Places a source.

    Args:
      mono_p: [p] samples at the head's rate.
      azimuth_deg: track as for `render.binaural`, + left.
      elevation_deg: track of degrees, + up.

    Returns:
      float32 [2, p], left ear first, never normalised; the level of a frontal source does not
      depend on the way it is rendered by more than the head does.

    Raises:
      ValueError: as `render.binaural`.
    """
    rate = self.head.sample_rate
    if self.decoder is None:
      return render.binaural(mono_p, rate, azimuth_deg, self.head, elevation_deg=elevation_deg)
    heard_ep = render.ambisonic(
      mono_p,
      rate,
      azimuth_deg,
      self.head,
      elevation_deg=elevation_deg,
      order=ORDER,
      speakers=SPEAKERS,
      decoder=self.decoder,
    )
    # Projection's gains sum to the number of loudspeakers, those of the inverse to 1.
    return heard_ep / SPEAKERS if self.decoder == "projection" else heard_ep


def load(name: str, sample_rate: int) -> Spatializer:
  """Returns the spatializer of a name: sphere, sofa:FILE, paper, paper-pinv, paper:sofa:FILE, ...

  Raises:
    UserError: unknown name, or a SOFA file that cannot be used.
  """
  way, _, head = name.partition(":")
  if way in DECODERS:
    return Spatializer(name, hrtf.load(head or "sphere", sample_rate), DECODERS[way])
  if way not in ("sphere", "sofa"):
    raise UserError(
      f'unknown spatializer "{name}"; use sphere, sofa:FILE, paper or paper-pinv, and after the'
      " latter two a head of their own, as in paper:sofa:FILE"
    )
  return Spatializer(name, hrtf.load(name, sample_rate))
