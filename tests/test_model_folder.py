import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from spatialv2a_jax import model_folder
from spatialv2a_jax.errors import MissingAssetError, UserError


def model(seed):
  rng = np.random.default_rng(seed)
  return {
    "block": {"kernel": rng.standard_normal((3, 4)).astype(np.float32)},
    "t": np.array(2, np.float32),
  }


def test_a_model_folder_holds_several_networks(tmp_path):
  stats = {"flow": {"mean": np.arange(4.0, dtype=np.float32)}}
  model_folder.save_model(tmp_path / "m", {"flow": model(0)}, stats, {"flow": {"width": 8}})
  model_folder.save_model(
    tmp_path / "m", {"vae": model(1)}, {}, {"vae": {"width": 4}, "audio": "16k"}
  )
  loaded = model_folder.load_model(tmp_path / "m")
  expected = {"flow": model(0), "vae": model(1)}
  jax.tree.map(
    functools.partial(np.testing.assert_array_equal, strict=True), loaded.params, expected
  )
  jax.tree.map(np.testing.assert_array_equal, loaded.stats, {**stats, "vae": {}})
  assert loaded.config == {"flow": {"width": 8}, "vae": {"width": 4}, "audio": "16k"}
  files = sorted(p.name for p in (tmp_path / "m").iterdir())
  assert files == ["config.json", "flow.safetensors", "vae.safetensors"]
  assert all(len(digest) == 64 for digest in loaded.sha256.values())


def test_what_was_said_of_a_network_goes_with_it(tmp_path):
  about = {"flow": {"width": 8}, "flow_source": {"licence": "CC"}, "flow_average": {"step": 2}}
  model_folder.save_model(tmp_path, {"flow": model(0)}, {}, about)
  other = {"vae": {"width": 4}, "vae_source": {"licence": "MIT"}}
  model_folder.save_model(tmp_path, {"vae": model(1)}, {}, other)
  assert model_folder.load_model(tmp_path).config == about | other
  model_folder.save_model(tmp_path, {"flow": model(2)}, {}, {"flow": {"width": 9}})
  assert model_folder.load_model(tmp_path).config == {"flow": {"width": 9}} | other


def test_a_model_that_cannot_be_written_whole_leaves_the_one_before(tmp_path, monkeypatch):
  both = {"flow": model(0), "vae": model(1)}
  model_folder.save_model(tmp_path / "m", both, {}, {})
  before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
  write = model_folder.tensors.write

  def interrupted(path, flat):
    if "vae" in path.name:
      raise KeyboardInterrupt
    return write(path, flat)

  monkeypatch.setattr(model_folder.tensors, "write", interrupted)
  with pytest.raises(KeyboardInterrupt):
    model_folder.save_model(tmp_path / "m", {"flow": model(2), "vae": model(3)}, {}, {})
  assert before == {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UserError, match="run is the working directory of a run"):
    model_folder.save_model(tmp_path / "run", both, {}, {})
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write to .*file"):
    model_folder.save_model(tmp_path / "file", both, {}, {})


def test_a_transposed_or_device_array_is_saved_as_it_reads(tmp_path):
  """Guards against writing the memory order of a view instead of its values."""
  view = np.arange(6, dtype=np.float32).reshape(2, 3).T
  device = jnp.arange(3, dtype=jnp.bfloat16)
  model_folder.save_model(tmp_path, {"n": {"view": view, "device": device}}, {}, {})
  loaded = model_folder.load_model(tmp_path).params["n"]
  np.testing.assert_array_equal(loaded["view"], view)
  np.testing.assert_array_equal(loaded["device"].astype(np.float32), [0, 1, 2])


def test_damaged_and_missing_model_files_are_one_line(tmp_path):
  with pytest.raises(MissingAssetError, match="no model folder"):
    model_folder.load_model(tmp_path / "nowhere")
  with pytest.raises(MissingAssetError, match="no config.json"):
    model_folder.load_model(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(MissingAssetError, match="a run that has not finished"):
    model_folder.load_model(tmp_path)
  folder = tmp_path / "model"
  model_folder.save_model(folder, {"flow": model(0)}, {}, {})
  assert model_folder.load_model(tmp_path).params.keys() == {"flow"}  # The folder of a run.
  weights = folder / "flow.safetensors"
  raw = bytearray(weights.read_bytes())
  raw[-1] ^= 1
  weights.write_bytes(bytes(raw))
  with pytest.raises(UserError, match="SHA-256"):
    model_folder.load_model(folder)
  weights.unlink()
  with pytest.raises(MissingAssetError, match="lacks flow.safetensors"):
    model_folder.load_model(folder)
  (folder / "config.json").write_text("[")
  with pytest.raises(UserError, match="no JSON object"):
    model_folder.load_model(folder)


def test_config_json_is_readable_by_people(tmp_path):
  model_folder.save_model(tmp_path, {"flow": model(0)}, {}, {"audio": "16k"})
  text = pathlib.Path(tmp_path / "config.json").read_text()
  assert json.loads(text)["audio"] == "16k" and "\n  " in text
  flat = traverse_util.flatten_dict(model_folder.load_model(tmp_path).params, sep="/")
  assert set(flat) == {"flow/block/kernel", "flow/t"}
