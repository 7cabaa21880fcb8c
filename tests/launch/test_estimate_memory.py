"""The memory that the estimate predicts, against what a process takes."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_memory_is_predicted_within_15_percent():
  command = [sys.executable, "-m", "benchmarks.memory"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  found = re.search(r"predicted ([\d.]+) GiB, measured ([\d.]+) GiB", done.stdout)
  assert found, done.stdout
  predicted, measured = map(float, found.groups())
  assert measured > 0.5  # Less would be lost among what else a process takes.
  assert measured == pytest.approx(predicted, rel=0.15)
