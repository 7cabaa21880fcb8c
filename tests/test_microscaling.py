import jax
import ml_dtypes
import numpy as np
import pytest

from spatialv2a_jax import microscaling


def features(*shape: int, seed: int = 0) -> np.ndarray:
  """Rows of very different sizes, one of zeros."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * np.exp(8 * rng.standard_normal((*shape[:-1], 1)))
  x[0] = 0
  return x.astype(np.float32)


@pytest.mark.parametrize("width", [1, 5, 31, 32, 33, 64, 768])
def test_rows_of_any_width_come_back_within_half_a_step(width):
  x = features(4, 3, width)
  packed = microscaling.pack(x)
  assert packed.dtype == np.int8 and packed.shape == (4, 3, width + -(-width // 32))
  back = microscaling.unpack(packed)
  assert back.dtype == np.float32 and back.shape == x.shape
  for start in range(0, width, 32):
    block, found = x[..., start : start + 32], back[..., start : start + 32]
    largest = np.abs(block).max(-1, keepdims=True)
    step = 2.0 ** np.floor(np.log2(np.where(largest, largest, 1))) / 64
    saturated = np.abs(block) > 127.5 * step  # Such are cut to 127 steps.
    assert np.all(np.abs(block - found) <= np.where(saturated, 1, 0.5) * step)
    assert np.all(np.sign(block) * np.sign(found) >= 0) and np.all(found[block == 0] == 0)


def test_rounding_leaves_a_hundredth_of_the_size_of_normal_features():
  x = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
  shares = [
    float(np.sqrt(np.mean((back - x) ** 2) / np.mean(x**2)))
    for back in (microscaling.unpack(microscaling.pack(x)), x.astype("bfloat16").astype("f4"))
  ]
  assert shares == pytest.approx([0.008, 0.0017], rel=0.05)


def test_values_are_those_of_the_specification():
  """Integers are in 64ths and the exponent of a scale is biased by 127 (sections 5.3.4, 5.4)."""
  x = np.zeros((1, 34), np.float32)
  x[0, :4], x[0, 32:] = [1.0, -1.5, 1 / 64, 1.99], [-0.25, 0.0]
  [packed] = microscaling.pack(x)
  assert packed[:4].tolist() == [64, -96, 1, 127] and packed[32:34].tolist() == [-64, 0]
  assert packed[34:].view(np.uint8).tolist() == [127, 125]
  scales = packed[34:].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
  expected = packed[:34] / np.float32(64) * np.repeat(scales, 32)[:34]
  np.testing.assert_array_equal(microscaling.unpack(packed), expected)


@pytest.mark.parametrize("width", [33, 64])
def test_devices_and_hosts_unpack_alike_and_exactly_in_bfloat16(width):
  packed = microscaling.pack(features(6, width))
  back = microscaling.unpack(packed)
  np.testing.assert_array_equal(jax.jit(microscaling.unpack)(packed), back)
  np.testing.assert_array_equal(back.astype("bfloat16").astype(np.float32), back)
  np.testing.assert_array_equal(microscaling.pack(back), packed)


def test_extreme_sizes_stay_finite():
  x = np.zeros((4, 32), np.float32)
  x[:, 0] = [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-40, -1e30]
  back = microscaling.unpack(microscaling.pack(x))
  assert np.all(np.isfinite(back)) and np.all(back[:, 1:] == 0)
  np.testing.assert_allclose(back[[0, 3], 0], x[[0, 3], 0], rtol=1 / 64)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_has_no_scale_is_refused(value):
  with pytest.raises(ValueError, match="NaN or infinite values"):
    microscaling.pack(np.array([1.0, value]))
