"""Runs in processes of their own, one or several that work together: a toy, or a config."""

import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

from launch import local
from tests import NO_FUSION_EMITTERS, runner


def start(workdir, devices: int = 1, **options) -> subprocess.Popen:
  """Starts one process; errors and output are two streams."""
  return subprocess.Popen(
    runner.command(workdir=str(workdir), **options),
    env=runner.environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def together(workdir, count: int, devices: int = 1, **options) -> list[subprocess.Popen]:
  """Starts the processes of one run, each with its own devices."""
  join = {"coordinator": f"localhost:{free_port()}", "count": count, "timeout": 60}
  return [start(workdir, devices, join={**join, "index": i}, **options) for i in range(count)]


def members(
  arguments: Sequence[str], count: int, devices: int, programs: pathlib.Path
) -> list[subprocess.Popen]:
  """Starts the processes of one run of `launch.train`.

  Args:
    arguments: of `launch.train`.
    count: of processes, whose devices reduce over the network, also those of a single one; 0: one
      that looks for no others, whose devices reduce in memory, at two thirds of the time.
    devices: of each.
    programs: folder of compiled programs.
  """
  environment = {
    **runner.environment(devices),
    "XLA_FLAGS": "--xla_backend_optimization_level=0" + NO_FUSION_EMITTERS,
    "JAX_COMPILATION_CACHE_DIR": str(programs),
  }
  alone = [[sys.executable, "-m", "launch.train", *arguments]]
  return [
    subprocess.Popen(
      command,
      cwd=runner.ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for command in (local.train_commands(count, arguments) if count else alone)
  ]


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
  """Waits for the end; returns what it printed and its errors."""
  try:
    out, err = process.communicate(timeout=500)
  finally:
    process.kill()
  assert process.returncode == code, out + err
  return out, err


def wait_for(process: subprocess.Popen, text: str) -> None:
  """Reads lines until one holds the text."""
  assert process.stdout is not None
  for line in process.stdout:
    if text in line:
      return
  raise AssertionError(f"ended without {text!r}")
