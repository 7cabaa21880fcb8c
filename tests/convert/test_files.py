"""Reading foreign files: PyTorch's zip format by hand, hostile ones, safetensors."""

import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from spatialv2a_jax.convert import files
from spatialv2a_jax.errors import MissingAssetError, UserError
from tests.convert import torch_zip as z

A = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_tensors_of_a_zip_file(tmp_path):
  half, whole = A.astype(np.float16), np.array([1, -(2**40)])
  content = z.mapping(
    [
      ("plain", z.tensor(A, "0")),
      ("transposed", z.tensor(A, "0", shape=(4, 3), stride=(1, 4))),
      ("part", z.tensor(A, "0", offset=5, shape=(2, 2), stride=(4, 1))),
      ("scalar", z.tensor(A, "0", offset=7, shape=(), stride=())),
      ("empty", z.tensor(A, "0", shape=(0, 4), stride=(4, 1))),
      ("half", z.tensor(half, "1")),
      ("nested", z.ordered([("parameter", z.parameter(z.tensor(whole, "2")))])),
      ("epoch", z.integer(3)),
    ]
  )
  path = z.write(tmp_path / "a.pth", content, {"0": A, "1": half, "2": whole})
  got = files.read(path)
  np.testing.assert_array_equal(got["plain"], A)
  np.testing.assert_array_equal(got["transposed"], A.T)
  np.testing.assert_array_equal(got["part"], A.ravel()[5:].reshape(-1)[[[0, 1], [4, 5]]])
  assert got["scalar"] == 7 and got["scalar"].shape == () and got["empty"].shape == (0, 4)
  assert got["half"].dtype == np.float16 and got["epoch"] == 3
  np.testing.assert_array_equal(got["nested"]["parameter"], whole)


def test_bfloat16_and_big_endian_files(tmp_path):
  bits = np.array([1.5, -2.0, 3e38], ml_dtypes.bfloat16).view(np.uint16)
  path = z.write(tmp_path / "b.pt", z.mapping([("x", z.tensor(bits, "0"))]), {"0": bits})
  np.testing.assert_array_equal(files.read(path)["x"], bits.view(ml_dtypes.bfloat16))
  big = z.write(tmp_path / "c.pt", z.mapping([("x", z.tensor(A, "0"))]), {"0": A}, order="big")
  np.testing.assert_array_equal(files.read(big)["x"], A)


def test_every_kind_of_tensor_is_read_as_what_it_is(tmp_path):
  raw = np.arange(250, 266, dtype=np.uint16).view(np.uint8)
  made = {kind: raw.view(kind) for kind in z.KINDS if kind not in ("bool", "uint16")}
  made["bool"] = raw > 3
  got = files.read(z.write_state(tmp_path / "a.pth", made))
  for kind, array in made.items():
    np.testing.assert_array_equal(got[kind], array, kind, strict=True)


def test_a_flipped_bit_among_the_weights_is_told(tmp_path):
  path = z.write_state(tmp_path / "a.pth", {"x": A})
  raw = bytearray(path.read_bytes())
  raw[raw.index(A.tobytes()) + 5] ^= 1
  path.write_bytes(raw)
  with pytest.raises(UserError, match="another checksum than the file says"):
    files.read(path)


def attack(module, attribute, *arguments):
  return z.name(module, attribute) + z.sequence(*arguments) + b"R"


HOSTILE = {
  "posix.system": attack("posix", "system", z.text("touch PWNED")),
  "builtins.eval": attack("builtins", "eval", z.text("open('PWNED', 'w')")),
  "builtins.getattr": z.name("builtins", "getattr"),
  "torch.load": z.name("torch", "load"),
  "torch._utils._rebuild_tensor_v2.__globals__": z.name(
    "torch._utils", "_rebuild_tensor_v2.__globals__"
  ),
  "collections.OrderedDict.__init__": z.name("collections", "OrderedDict.__init__"),
  "numpy.fromfile": b"(" + z.text("PWNED") + b"inumpy\nfromfile\n",
}


@pytest.mark.parametrize("wants", HOSTILE)
def test_a_pickle_that_wants_more_than_tensors_is_refused_and_nothing_runs(
  tmp_path, monkeypatch, wants
):
  monkeypatch.chdir(tmp_path)
  path = z.write(tmp_path / "evil.pth", z.mapping([("x", HOSTILE[wants])]), {})
  with pytest.raises(UserError, match=f"wants to run {wants}, which no weights need"):
    files.read(path)
  assert os.listdir(tmp_path) == ["evil.pth"]


def test_a_pickle_cannot_change_the_reader(tmp_path):
  """BUILD sets attributes of what is on the stack: neither our function nor our types take any."""
  state = z.mapping([("__defaults__", z.sequence()), ("__code__", z.integer(1))])
  for target in (
    z.name("torch._utils", "_rebuild_tensor_v2"),
    z.name("torch", "FloatStorage"),
    z.name("collections", "OrderedDict"),
  ):
    content = z.mapping([("x", target + b"N" + state + b"\x86b")])
    with pytest.raises(UserError, match="is damaged or no PyTorch checkpoint"):
      files.read(z.write(tmp_path / "evil.pth", content, {}))


@pytest.mark.parametrize(
  "view",
  [
    {"shape": (1000,), "stride": (1,)},
    {"shape": (2,), "stride": (12,)},
    {"shape": (2,), "stride": (-1,), "offset": 1},
    {"shape": (3,), "stride": (1,), "offset": -1},
    {"shape": (1,), "stride": (1,), "offset": 12},
    {"shape": (-1,), "stride": (1,)},
    {"shape": (2, 2), "stride": (1,)},
    {"count": 13},
  ],
)
def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path, view):
  content = z.mapping([("x", z.tensor(A, "0", **view))])
  with pytest.raises(UserError, match="is damaged"):
    files.read(z.write(tmp_path / "bad.pth", content, {"0": A}))


def test_one_storage_has_one_type(tmp_path):
  content = z.mapping([("x", z.tensor(A, "0")), ("y", z.tensor(A.astype(np.float16), "0"))])
  with pytest.raises(UserError, match="storage 0 is not what its tensors say"):
    files.read(z.write(tmp_path / "bad.pth", content, {"0": A}))


def test_damaged_and_foreign_files_are_one_line(tmp_path):
  good = z.write_state(tmp_path / "good.pth", {"x": A})
  raw = good.read_bytes()
  cases = {
    "cut": (raw[: len(raw) // 2], "is damaged or no PyTorch checkpoint"),
    "text": (b"<html>not found</html>", "neither safetensors nor a PyTorch zip file"),
    "empty": (b"", "neither safetensors nor a PyTorch zip file"),
    "old": (files._OLD_MAGIC + b"rest", "format from before 1.6"),
  }
  for name, (content, message) in cases.items():
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
      files.read(path)
    assert "\n" not in str(caught.value)
  with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
    archive.writestr("readme", "hello")
  with pytest.raises(UserError, match="without one data.pkl"):
    files.read(tmp_path / "other.zip")
  with pytest.raises(UserError, match="holds a int, a dictionary of tensors is needed"):
    files.read(z.write(tmp_path / "int.pth", z.integer(1), {}))
  bomb = z.write(
    tmp_path / "bomb.pth",
    z.mapping([("x", z.tensor(A, "0"))]),
    {"0": A},
    compression=zipfile.ZIP_DEFLATED,
  )
  with pytest.raises(UserError, match="compressed tensor data"):
    files.read(bomb)
  with pytest.raises(MissingAssetError, match="no such file"):
    files.read(tmp_path / "nowhere.pth")


def test_safetensors_in_any_precision(tmp_path):
  arrays = {"a": A, "h": A.astype(np.float16), "b": A.astype(ml_dtypes.bfloat16)}
  plain = {k: v for k, v in arrays.items() if k != "b"}
  save_file(plain, tmp_path / "plain.safetensors", metadata={"note": "x"})
  got, metadata = files.read_safetensors(tmp_path / "plain.safetensors")
  assert metadata == {"note": "x"}
  from safetensors.flax import save_file as save_wide

  save_wide({k: v for k, v in arrays.items()}, tmp_path / "wide.safetensors")
  got = files.read(tmp_path / "wide.safetensors")
  for name, array in arrays.items():
    np.testing.assert_array_equal(np.asarray(got[name], np.float32), array.astype(np.float32))
