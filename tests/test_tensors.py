"""Safetensors files: readable by the package of that name, mapped, streamed, refused if damaged."""

import hashlib
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spatialv2a_jax import tensors

KINDS = st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"])
ARRAYS = hnp.arrays(KINDS, hnp.array_shapes(min_dims=0, min_side=0, max_side=5))


@given(st.dictionaries(st.text(min_size=1, max_size=12), ARRAYS, max_size=5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_packages_read_what_either_wrote(tmp_path, arrays):
  arrays.pop("__metadata__", None)
  ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
  digest = tensors.write(ours, arrays)
  assert digest == hashlib.sha256(ours.read_bytes()).hexdigest() == tensors.digest(ours)
  safetensors.numpy.save_file(arrays, theirs, metadata={"note": "x"})
  read_by_them = safetensors.numpy.load_file(ours)
  (read_by_us, none), (read_back, note) = tensors.read(ours), tensors.read(theirs)
  assert none == {} and note == {"note": "x"}
  for got in (read_by_them, read_by_us, read_back):
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
      np.testing.assert_array_equal(got[name], array, strict=True)


def test_values_are_written_not_the_order_in_memory(tmp_path):
  view = np.arange(6, dtype=np.float32).reshape(2, 3).T
  wide = jnp.arange(3, dtype=jnp.bfloat16)
  tensors.write(tmp_path / "x", {"view": view, "wide": wide, "none": np.zeros((0, 4))})
  got, _ = tensors.read(tmp_path / "x")
  np.testing.assert_array_equal(got["view"], view)
  np.testing.assert_array_equal(got["wide"], np.arange(3, dtype=np.float32), strict=True)
  assert got["none"].shape == (0, 4)


def test_bfloat16_of_others_is_read_as_such(tmp_path):
  from safetensors.flax import save_file

  array = np.arange(5).astype(ml_dtypes.bfloat16)
  save_file({"b": jnp.asarray(array)}, tmp_path / "x")
  np.testing.assert_array_equal(tensors.read(tmp_path / "x")[0]["b"], array, strict=True)


def test_arrays_are_maps_that_reach_the_device_without_a_copy(tmp_path):
  tensors.write(
    tmp_path / "x", {"odd": np.zeros(3, "u1"), "a": np.ones(48, "f4"), "b": np.ones(16)}
  )
  got, _ = tensors.read(tmp_path / "x")
  for name in ("a", "b"):
    assert got[name].ctypes.data % 64 == 0 and not got[name].flags.writeable
  device = jax.device_put(got["a"], jax.local_devices(backend="cpu")[0])
  assert device.unsafe_buffer_pointer() == got["a"].ctypes.data


def test_writing_holds_one_array_at_a_time(tmp_path):
  """Reversed views must be copied to be written: a file of 64 MB takes 2 MB of memory."""
  block = np.zeros(1 << 19, np.float32)
  tracemalloc.start()
  tensors.write(tmp_path / "x", {str(i): block[::-1] for i in range(32)})
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 2.5 * block.nbytes and (tmp_path / "x").stat().st_size > 32 * block.nbytes


@pytest.mark.parametrize(
  "change",
  [
    lambda raw: raw[:-1],
    lambda raw: raw[:20],
    lambda raw: raw[:4],
    lambda raw: b"",
    lambda raw: b"<html>not found</html>",
    lambda raw: raw.replace(b"[3,4]", b"[3,5]"),
    lambda raw: raw.replace(b"[0,48]", b"[9,57]"),
    lambda raw: raw.replace(b'"F32"', b'"F99"'),
    lambda raw: raw.replace(b"[3,4]", b"3,[4]"),
    lambda raw: raw.replace(b"data_offsets", b"data_offsexs"),
  ],
)
def test_damage_is_refused(tmp_path, change):
  path = tmp_path / "x"
  tensors.write(path, {"a": np.zeros((3, 4), "f4")})
  raw = path.read_bytes()
  assert json.loads(raw[8:].split(b"\0")[0])["a"]["data_offsets"] == [0, 48]
  path.write_bytes(change(raw))
  with pytest.raises(ValueError):
    tensors.read(path)
