"""Processes of a job: they find each other, or say in one line why not."""

import socket
import subprocess
import sys

import pytest

from tests import runner

CODE = """
import sys
from spatialv2a_jax import cluster
from spatialv2a_jax.errors import UserError
where, count, index, timeout, about = sys.argv[1:]
try:
  cluster.start(where, int(count), int(index), timeout=float(timeout), about={"settings": about})
except UserError as error:
  print(error)
  sys.exit(error.exit_code)
"""


@pytest.fixture
def port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def meet(*members):
  """Starts processes with these arguments; returns the exit code and the last line of each."""
  started = [
    subprocess.Popen(
      [sys.executable, "-c", CODE, *map(str, member)],
      env=runner.environment(),
      stdout=subprocess.PIPE,
      text=True,
    )
    for member in members
  ]
  out = [process.communicate(timeout=60)[0].splitlines()[-1] for process in started]
  return [process.returncode for process in started], out


def test_all_come(port):
  where = f"localhost:{port}"
  codes, lines = meet(*((where, 3, i, 30, "same") for i in (1, 0, 2)))
  assert codes == [0, 0, 0] and lines[1] == "3 processes, 3 x cpu"


def test_who_is_missing_is_told_to_all_in_time(port):
  where = f"localhost:{port}"
  codes, lines = meet((where, 4, 0, 3, "same"), (where, 4, 2, 3, "same"))
  assert codes == [1, 1]
  assert lines[0] == lines[1] and "2 of 4 processes did not come within 3 s: 1, 3;" in lines[0]


def test_a_missing_coordinator_is_told(port):
  codes, (line,) = meet((f"localhost:{port}", 2, 1, 1, "same"))
  assert codes == [1] and f"process 0 was not found at localhost:{port} within 1 s" in line


def test_processes_that_differ_do_not_begin(port):
  where = f"localhost:{port}"
  codes, lines = meet((where, 2, 0, 20, "a"), (where, 2, 1, 20, "b"))
  assert codes == [1, 1]
  assert all("process 1 on " in line and "has settings 'b', process 0 has 'a'" in line
             for line in lines)  # fmt: skip


@pytest.mark.parametrize(
  "member, message",
  [
    (("localhost", 2, 0), "--coordinator 'localhost' is not HOST:PORT"),
    (("localhost:1", 2, 2), "--process_id 2 is not in 0..1"),
  ],
)
def test_impossible_arguments(member, message):
  codes, (line,) = meet((*member, 5, "same"))
  assert codes == [2] and message in line
