"""The switch must come before the first device, and XLA must know the flag."""

import subprocess
import sys

import pytest

from spatialv2a_jax.training import determinism
from tests import runner

CODE = """
import os
from spatialv2a_jax.training import determinism
determinism.enforce()
determinism.enforce()
assert os.environ["XLA_FLAGS"].split().count(determinism.FLAG) == 1
import jax.numpy as jnp
print(jnp.arange(3).sum())
"""


def test_xla_accepts_the_flag():
  done = subprocess.run(
    [sys.executable, "-c", CODE],
    env=runner.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout == "3\n", done.stderr  # XLA aborts at a flag that it does not know.


def test_too_late_is_an_error(monkeypatch):
  import jax

  monkeypatch.setenv("XLA_FLAGS", "")
  jax.devices()
  with pytest.raises(RuntimeError, match="before the first use of a device"):
    determinism.enforce()
