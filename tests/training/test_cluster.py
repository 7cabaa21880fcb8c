"""Processes of a job: they find each other, or say in one line why not."""

import socket
import subprocess
import sys

import jax
import pytest

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import checkpoint, cluster
from tests import processes, runner

CODE = """
import sys
from spatialv2a_jax.training import cluster
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


UNION = """
import sys, time
import jax
from spatialv2a_jax.training import cluster
where, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
cluster.start(where, 2, index)
print("preemption:", jax.config.jax_enable_preemption_service)
time.sleep(3 * index)
cluster.see_same(folder, seconds=-58)  # Then messages have 2 s, once all are there.
cluster.agree("data", "same")
told = ""
try:
  cluster.agree("data", f"of {index}")
except cluster.UserError as error:
  told = str(error)
assert ("has other data than process 0: of 1, there of 0" in told) == (index == 1), told
store = cluster.client()
if index == 0:
  store.blocking_key_value_get("told", 60_000)
print("all:", sorted(cluster.union("bad", [7, index])), cluster.most("wait", index + 0.5))
if index == 1:
  store.key_value_set("told", "")
for path in (folder, folder + str(index)):
  try:
    cluster.see_same(path, seconds=1)
    print("all see it")
  except cluster.UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_processes_count_together_and_know_whether_they_share_a_disk(port, tmp_path):
  folder = str(tmp_path / "run")
  started = [
    subprocess.Popen(
      [sys.executable, "-c", UNION, f"localhost:{port}", str(i), folder],
      env=runner.environment(),
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  out = [process.communicate(timeout=60)[0].splitlines()[-4:] for process in started]
  assert [lines[0] for lines in out] == ["preemption: False"] * 2
  assert [lines[1] for lines in out] == ["all: [0, 1, 7] 1.5", "all: [1, 7] 1.5"]
  assert [lines[2] for lines in out] == ["all see it"] * 2
  for i, lines in enumerate(out):
    assert lines[3].startswith(f"{folder}{i} must lie on a disk that all processes share; ")
    assert lines[3].endswith(f"do not see what process 0 writes there: 1 on {socket.gethostname()}")
  assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
  "digest, folder, message",
  [
    ("b", "run", "has other data than process 0: {'path': 'b'}, there {'path': 'a'}"),
    ("a", "other", "must lie on a disk that all processes share; these do not see"),
  ],
)
def test_processes_of_other_data_or_another_disk_end_the_run(tmp_path, digest, folder, message):
  join = {"coordinator": f"localhost:{processes.free_port()}", "count": 2, "timeout": 60}
  options = {"shape": (2, 1, 1), "steps": 2}
  options["limits"] = dict.fromkeys(("init", "restore", "step", "save"), 60.0)
  members = [
    processes.start(tmp_path / where, join={**join, "index": i}, digest=data, **options)
    for i, (data, where) in enumerate((("a", "run"), (digest, folder)))
  ]
  told = [processes.finish(process, code=2)[1] for process in members]
  assert message in told[1].replace('"', "'"), told
  assert "process 1 on " in told[0] if folder == "run" else message in told[0]
  assert not checkpoint.saved_runs(tmp_path / "run")


def test_who_is_missing_is_told_to_all_in_time(port):
  where = f"localhost:{port}"
  codes, lines = meet((where, 4, 0, 3, "same"), (where, 4, 2, 3, "same"))
  assert codes == [43, 43]  # Their hosts may be on the way.
  assert lines[0] == lines[1] and "2 of 4 processes did not come within 3 s: 1, 3;" in lines[0]


def test_a_missing_coordinator_is_told(port):
  codes, (line,) = meet((f"localhost:{port}", 2, 1, 1, "same"))
  assert codes == [43] and f"process 0 was not found at localhost:{port} within 1 s" in line


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


PART = """
import sys, time
from spatialv2a_jax.training import cluster
where, index, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
cluster.start(where, 2, index, timeout=30)
time.sleep(delay)
clock = time.monotonic()
cluster.part(seconds=4)
print(f"{time.monotonic() - clock:.2f}", flush=True)
cluster.leave(5 + index)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay, least, most", [(2, 0.5, 3.5), (60, 3.9, 20)])
def test_a_process_that_ends_for_a_fault_waits_a_moment_for_the_others(port, delay, least, most):
  first, second = (
    subprocess.Popen(
      [sys.executable, "-c", PART, f"localhost:{port}", str(index), str(index * delay)],
      env=runner.environment(),
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  )
  try:
    waited = float(first.communicate(timeout=90)[0].splitlines()[-1])
    assert first.returncode == 5 and least <= waited <= most
    if delay < 4:  # It said why it ends before the first one took the store away.
      assert float(second.communicate(timeout=90)[0].splitlines()[-1]) < 3.5
      assert second.returncode == 6
  finally:
    second.kill()


JaxError = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
  "error, gone",
  [
    (JaxError("UNAVAILABLE: the task has died"), True),
    (JaxError("INTERNAL: connection closed by peer"), True),
    (JaxError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), False),
    (JaxError("INVALID_ARGUMENT: wrong sizes"), False),
    (JaxError("UNIMPLEMENTED: no such operation"), False),
    (ValueError("Gloo all-reduce failed: connection reset"), True),
    (ValueError("NCCL operation failed: remote process exited"), True),
    (ValueError("UNAVAILABLE: the task has died"), True),
    (ValueError("DEADLINE_EXCEEDED: barrier timed out"), True),
    (ValueError("ABORTED: shut down"), True),
    (ValueError("CANCELLED: by another task"), True),
    (ValueError("shapes (2,) and (3,) do not match"), False),
    (OSError("UNAVAILABLE: Gloo "), False),
    (None, False),
  ],
)
def test_errors_that_tell_of_a_process_that_is_gone(monkeypatch, error, gone):
  """Also below others that they caused or came before; and only where there are others."""
  monkeypatch.setattr(cluster, "client", object)
  monkeypatch.setattr(cluster.distributed.global_state, "num_processes", 2)
  caused, after = UserError("cannot save"), KeyError("name")
  caused.__cause__, after.__context__ = error, caused
  for one in (error, caused, after):
    assert cluster.lost(one) == gone
  monkeypatch.setattr(cluster.distributed.global_state, "num_processes", 1)
  assert not cluster.lost(error)
  monkeypatch.setattr(cluster.distributed.global_state, "num_processes", 2)
  monkeypatch.setattr(cluster, "client", lambda: None)
  assert not cluster.lost(error)
