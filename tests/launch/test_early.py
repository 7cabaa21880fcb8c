"""Programs that are read before their machine code is made."""

import json
import os
import subprocess
import sys

import pytest

from launch import early, estimate

PLACES = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <11 reduce_sum.14 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 1835008, page 0, parameter 0, shape |bf16[8,250,448]| at ShapeIndex {}:
 value: <364 param @0> (size=1835008,offset=0): bf16[8,250,448]{1,2,0:T(8,128)(2,1)}
allocation 2: size 4096, page 0, parameter 1, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
allocation 16: size 458752, page 0, maybe-live-out:
allocation 17: size 180736, page 0, preallocated-temp:
allocation 18: size 16, color 2, page 0, preallocated-temp:
allocation 19: size 53452800, color 1, page 0, preallocated-temp:
"""


def test_memory_is_counted_by_kind_and_on_the_chip_alone():
  found = early.memory(PLACES)
  assert found == {"arguments": 1839104, "temporaries": 180736, "outputs": 459264}


def test_other_chips_need_no_shortcut(capsys):
  arguments = ["--config=configs/tiny.py:smoke", "--topology=cpu:8", "--quick"]
  assert estimate.main(["launch.estimate", *arguments]) == 2
  assert "--quick is for TPUs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_is_read_before_its_machine_code_is_made(tmp_path):
  pytest.importorskip("libtpu")
  out = tmp_path / "out.json"
  arguments = ["--config=configs/tiny.py:smoke", "--topology=v5e:2x4", "--quick", f"--out={out}"]
  done = subprocess.run(
    [sys.executable, "-m", "launch.estimate", *arguments],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},  # It refuses those of the CPU.
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "verdict      fits" in done.stdout and "MFU" not in done.stdout
  found = json.loads(out.read_text())
  held = sum(found["state_bytes"].values())
  assert held < found["memory"]["arguments"] < found["memory"]["peak"]
  assert set(found["collectives"]) == {"all-reduce"}
  flops = found["flops"]
  assert flops["compiled_per_chip"] == pytest.approx(flops["model_per_chip"], rel=0.05)
