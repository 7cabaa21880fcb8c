"""Features in 8 bits: MXINT8 of the OCP Microscaling Formats (MX) specification v1.0.

32 neighbours share a scale, a power of two whose exponent is a byte (E8M0); each of them is an
integer from -127 to 127, in 64ths of the scale. All such values are exact in bfloat16, so that
networks which compute in it round no further. Imports nothing of ours.

Axes: f feature; q the integers of a row of features, then the bytes of its scales.
"""

from typing import Any

import numpy as np

NAME = "mxint8"
BLOCK = 32  # Neighbours of one scale.
_BIAS, _LEAST, _MOST = 127, -120, 127  # Of exponents; with less, values would be subnormal.


def pack(x: np.ndarray) -> np.ndarray:
  """Rounds features to MXINT8, section 6.3 of the specification.

  Args:
    x: finite [..., f], of any float type.

  Returns:
    int8 [..., q], q = f + ceil(f / 32).

  Raises:
    ValueError: a value is NaN or infinite.
  """
  wide = np.asarray(x, np.float32)
  if not np.isfinite(wide).all():
    raise ValueError("NaN or infinite values have no scale")
  features = wide.shape[-1]
  short = [(0, 0)] * (wide.ndim - 1) + [(0, -features % BLOCK)]
  blocks = np.pad(wide, short).reshape(*wide.shape[:-1], -1, BLOCK)
  exponents = np.clip(np.frexp(np.abs(blocks).max(-1))[1] - 1, _LEAST, _MOST)
  in_64ths = np.ldexp(blocks, 6 - exponents[..., None])
  integers = np.clip(np.rint(in_64ths), -127, 127).astype(np.int8)
  integers = integers.reshape(*wide.shape[:-1], -1)[..., :features]
  return np.concatenate([integers, (exponents + _BIAS).astype(np.uint8).view(np.int8)], -1)


def unpack(packed: Any) -> Any:
  """Returns float32 [..., f] of an int8 [..., q] array, of numpy or JAX, exactly."""
  features = width(packed.shape[-1])
  exponents = packed[..., features:].view(np.uint8).astype(np.uint32)
  scales = ((exponents - 6) << 23).view(np.float32)  # The bits of 2 ** (exponent - 127) / 64.
  return packed[..., :features].astype(np.float32) * scales.repeat(BLOCK, -1)[..., :features]


def width(packed: int) -> int:
  """Returns how many features are in so many bytes."""
  return packed * BLOCK // (BLOCK + 1)
