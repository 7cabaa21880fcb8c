"""The command a user types, in two processes: they train, evaluate and export like one."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data import captions, shards
from spatialv2a_jax import checkpoint, logbook, schema
from tests import processes, runner, tiny

ROOT = pathlib.Path(__file__).parents[2]


def build(folder, clips):
  """Shards of noise that fit the smoke variant of `configs/tiny.py`; every clip has its caption."""
  shapes = schema.feature_shapes(
    0.64, schema.AUDIO["16k"], clip_dim=64, sync_dim=64, text_len=8, text_dim=32
  )

  def record(item):
    rng = np.random.default_rng(item.payload)
    fields: dict = {
      name: np.abs(rng.standard_normal(shape)).astype("f4")
      for name, shape in shapes.items()
      if name != "text"
    }
    return fields | {"caption": f"caption {item.payload}"}

  def text(caption):
    return np.random.default_rng(len(caption)).standard_normal(shapes["text"]).astype("f4")

  items = [shards.Item(f"{folder.name}{i}", i) for i in range(clips)]
  shards.build(items, record, folder, shards=2, config={})
  names = [f"caption {i}" for i in range(clips)]
  captions.build(names, text, folder, config={}, storage="float32")
  return folder


def start(workdir, data, *more, devices=1):
  options = {
    "workdir": workdir,
    "config.data.path": data / "train",
    "config.data.eval": data / "eval",
    "config.data.batch_size": 4,
    "config.data.eval_batches": 5,
    "config.data.mirror": False,
    "config.every.eval": 2,
    "config.vae": data / "model",
    "config.listen.clips": 1,
    "config.listen.steps": 2,
  }
  given = (f"--{name}={value}" for name, value in options.items())
  return launch(f"--config={ROOT}/configs/tiny.py:smoke", *given, *more, devices=devices)


def launch(*arguments, devices=1):
  return subprocess.Popen(
    [sys.executable, "-m", "launch.train", *arguments],
    env=runner.environment(devices) | {"XLA_FLAGS": os.environ["XLA_FLAGS"]},
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process):
  out, _ = process.communicate(timeout=400)
  assert process.returncode == 0, out
  return out


@pytest.mark.slow
def test_two_processes_evaluate_and_export_like_one(tmp_path):
  build(tmp_path / "train", 14)
  build(tmp_path / "eval", 11)  # Two full batches and three clips of a third.
  tiny.save_model(tmp_path / "model")
  finish(start(tmp_path / "one", tmp_path, devices=2))

  port = processes.free_port()
  members = [
    [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"] for i in (0, 1)
  ]
  started = [start(tmp_path / "two", tmp_path, *member) for member in members]
  told, silent = (finish(process) for process in started)
  assert "2 processes, 2 x cpu" in told and "model folder" in told
  assert "step 1/4" in told and "step 1/4" not in silent

  one, two = (logbook.read_metrics(tmp_path / name) for name in ("one", "two"))
  for what in ("loss", "grad_norm", "eval/loss", "eval/loss/left"):
    series = [[row[what] for row in rows if what in row] for rows in (one, two)]
    assert series[0] == series[1] and len(series[0]) >= 2, what
  a, b = (checkpoint.load_model(tmp_path / name) for name in ("one", "two"))
  assert a.sha256 == b.sha256
  (events,) = (tmp_path / "two").glob("events.*")
  assert b"generated" in events.read_bytes()

  told = finish(launch("--verify", str(tmp_path / "one"), devices=2))
  assert "replaying steps 3 to 4" in told and "the run repeats bit for bit" in told
