"""Whole runs of `launch.train`: what they log, that they repeat, and what they set before JAX."""

import errno
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch import tasks, train
from spatialv2a_jax import io, sharding
from spatialv2a_jax.training import determinism, meter
from tests import runner
from tests.launch.test_train import ROOT, one_device


@pytest.mark.slow
def test_a_run_in_bfloat16_logs_its_utilisation_and_repeats_here_and_elsewhere(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setitem(meter.PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
  argv = ["launch.train", f"--config={ROOT}/configs/tiny.py:smoke", f"--workdir={tmp_path}"]
  more = ["model.dtype=bfloat16", "data.eval=", "data.batch_size=8"]
  assert train.main([*argv, *(f"--config.{x}" for x in more)]) == 0
  path = tmp_path / "metrics.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  logged = [row for row in rows if "loss" in row]
  config = json.loads((tmp_path / "config.json").read_text())
  flops = tasks.build(config, one_device(), sharding.Rules()).flops()
  for row in logged:
    assert flops and row["mfu"] == pytest.approx(
      flops * row["clips_per_s"] / (1e9 * jax.device_count())
    )
  verify = ["launch.train", f"--verify={tmp_path}", "--start=0", "--steps=4"]
  assert train.main(verify) == 0 and "repeats bit for bit" in capsys.readouterr().out
  assert train.main([*verify, "--config.mesh.tensor=2"]) == 0
  assert "repeats to 0.001 times the root of the steps (bfloat16" in capsys.readouterr().out
  logged[3]["loss"] = float(np.nextafter(np.float32(logged[3]["loss"]), np.float32(9e9)))
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert train.main(verify) == 1
  assert "step 4: loss" in (told := capsys.readouterr().out) and "does NOT repeat" in told


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path, capsys):
  (tmp_path / "file").touch()
  argv = ["launch.train", f"--config={ROOT}/configs/tiny.py:smoke"]
  assert train.main([*argv, f"--workdir={tmp_path}/file"]) == 2
  told = capsys.readouterr().err
  assert told == f"launch.train: cannot make the folder {tmp_path}/file: File exists\n"


def test_a_disk_that_fills_or_fails_is_a_fault_whoever_meets_it(tmp_path, capsys, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def write():
    with io.atomic_path(tmp_path / "file"):
      return 0

  assert train.told(write) == 0 and train.told(full) == 1
  monkeypatch.setattr(os, "replace", full)
  assert train.told(write) == 1
  monkeypatch.setattr(os, "open", full)
  assert train.told(write) == 1
  assert capsys.readouterr().err.count("No space left on device") == 3


DETERMINISTIC = """
import os, sys
from jax._src import xla_bridge
from launch import train
train.run = lambda *_: print(os.environ.get("XLA_FLAGS", ""), xla_bridge.backends_are_initialized())
train.main(["launch.train", *sys.argv[1:]])
"""


@pytest.mark.parametrize("asked", ["true", "false"])
def test_determinism_is_asked_for_before_devices_start(tmp_path, asked):
  argv = [f"--config={ROOT}/configs/tiny.py:smoke", f"--workdir={tmp_path}"]
  done = subprocess.run(
    [sys.executable, "-c", DETERMINISTIC, *argv, f"--config.deterministic={asked}"],
    env={**runner.environment(), "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  flag = f"{determinism.FLAG} " if asked == "true" else " "
  assert done.stdout == f"{flag}False\n", done.stdout + done.stderr
