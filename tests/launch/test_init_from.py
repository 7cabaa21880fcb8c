"""From a mono checkpoint of MMAudio to the training of two ears, by the commands a user types."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from launch import tasks, train
from spatialv2a_jax import cli, compile_cache, model_folder, sharding
from spatialv2a_jax.errors import UserError
from tests.models import reference

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "small_16k.py:smoke"
DEPTH = ["--config.model.joint_depth=1", "--config.model.ear_depth=1"]
SIZES = {  # Those of the smoke variant, less deep.
  "width": 56, "channels": 20, "dims": (16, 16, 16), "text_len": 4,
  "heads": 7, "joint_depth": 1, "ear_depth": 1, "v2": False,
}  # fmt: skip


@pytest.fixture
def converted(tmp_path, monkeypatch):
  """Model folders of one and of two ears, converted from one mono file."""
  monkeypatch.setattr(compile_cache, "keep", lambda: None)
  state = reference.random_state(0, **SIZES)
  file = tmp_path / "mmaudio.safetensors"
  save_file({name: np.asarray(x, np.float32) for name, x in state.items()}, file)
  for ears in ("1", "2"):
    out = str(tmp_path / f"ears{ears}")
    assert cli.main(["convert", "mmaudio", str(file), "--out", out, "--ears", ears]) == 0
  return tmp_path


def test_a_mono_model_folder_is_refused(converted):
  argv = [f"--config={CONFIG}", "--workdir=none", f"--config.init_from={converted / 'ears1'}"]
  config = train.parse(["launch.train", *argv, *DEPTH]).config
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  with pytest.raises(UserError, match="ears1 has ears=1; convert its source again with --ears 2"):
    tasks.build(config, mesh, sharding.Rules()).values()


@pytest.mark.slow
def test_training_starts_from_the_converted_weights(converted):
  start, run = converted / "ears2", converted / "run"
  rate = 1e-4
  argv = [f"--config={CONFIG}", f"--workdir={run}", f"--config.init_from={start}", *DEPTH]
  argv += ["--config.steps=2", f"--config.optim.lr={rate}", "--config.data.eval="]
  assert train.main(["launch.train", *argv]) == 0

  lines = (run / "metrics.jsonl").read_text().splitlines()
  losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
  assert len(losses) == 2 and np.isfinite(losses).all()
  before = model_folder.load_model(start).params["flow"]
  after = model_folder.load_model(run).params["flow"]
  steps = jax.tree.map(lambda a, b: float(abs(a - b).max()), after, before)
  assert max(jax.tree.leaves(steps)) < 4 * rate  # AdamW's two steps, and nothing else.
  left, right = after["ears"]["audio"]["qkv"]["kernel"]
  assert abs(left - right).max() > 0  # They began as one, and were shown different noise.
  for name in ("ear_embedding", "joint_last/cross_mass", "spatial/scale"):
    assert functools.reduce(dict.__getitem__, name.split("/"), steps) > 0
