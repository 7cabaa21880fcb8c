"""How processes find each other: members that are sockets, and clusters that are variables."""

import concurrent.futures
import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest
from jax._src.clusters import cloud_tpu_cluster

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import preflight
from tests import processes, runner

ABOUT = {"settings": "same"}


@pytest.fixture
def host():
  """Starts process 0 of a job of some processes; returns its port and what becomes of it."""
  with concurrent.futures.ThreadPoolExecutor() as pool:

    def start(count, seconds=30.0):
      port = processes.free_port()
      limit = preflight.Limit(seconds)
      return port, pool.submit(preflight.meet, f"localhost:{port}", count, 0, ABOUT, limit)

    yield start


def connected(port):
  end = time.monotonic() + 20
  while True:
    try:
      return socket.create_connection(("localhost", port), timeout=20)
    except ConnectionRefusedError:
      assert time.monotonic() < end
      time.sleep(0.05)


def member(port, index, count=3, token=None, about=ABOUT):
  """Says hello as a process would; returns the connection as lines of text."""
  connection = connected(port)
  hello = {"index": index, "count": count, "host": f"host{index}", "about": about}
  lines = connection.makefile("rw")
  lines.write(json.dumps({**hello, "token": token or str(time.monotonic())}) + "\n")
  lines.flush()
  connection.close()  # `lines` keeps it open.
  return lines


def told(lines):
  """Returns what process 0 says, after a sign of life if it asks for one."""
  while "ask" in (answer := json.loads(lines.readline())):
    lines.write('"here"\n')
    lines.flush()
  return answer["fault"], answer["code"]


def failure(future, code):
  with pytest.raises(UserError) as caught:
    future.result(timeout=60)
  assert caught.value.exit_code == code
  return str(caught.value)


def test_one_that_dies_and_comes_again_is_waited_for(host):
  port, zero = host(3)
  member(port, 1).close()
  again, two = member(port, 1), member(port, 2)
  assert told(again)[0] == told(two)[0] == ""
  zero.result(timeout=20)


def test_one_that_dies_is_named_even_if_all_have_come(host):
  port, zero = host(3, seconds=5)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    member(port, 1).close()
    two = pool.submit(preflight.meet, f"localhost:{port}", 3, 2, ABOUT, preflight.Limit(20))
    text = failure(zero, preflight.EXIT_CODE)
    assert "1 of 3 processes did not come within 5 s: 1 (was there, is gone);" in text
    assert failure(two, preflight.EXIT_CODE) == text


def test_one_whose_connection_was_lost_is_itself(host):
  port, zero = host(3)
  first, same = member(port, 1, token="a"), member(port, 1, token="a")
  two = member(port, 2)
  assert told(same)[0] == told(two)[0] == ""
  zero.result(timeout=20)
  first.close()


def test_one_that_gives_no_sign_of_life_is_replaced(host, monkeypatch):
  """Such as one of a machine without power, which has closed no connection."""
  monkeypatch.setattr(preflight, "_ANSWER_SECONDS", 0.5)
  port, zero = host(3)
  silent, again, two = member(port, 1), member(port, 1), member(port, 2)
  assert told(again)[0] == told(two)[0] == ""
  zero.result(timeout=20)
  silent.close()


def test_two_that_live_cannot_be_the_same(host):
  port, zero = host(3)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(preflight.meet, f"localhost:{port}", 3, 1, ABOUT, preflight.Limit(20))
    time.sleep(0.5)
    second = member(port, 1)
    assert told(second) == (text := failure(zero, 2), 2)
    assert text.startswith("two processes say that they are process 1, on ")
    assert failure(first, 2) == text


@pytest.mark.parametrize(
  "options, message",
  [
    ({"about": {"settings": "b"}}, "process 1 on host1 has settings 'b', process 0 has 'same'"),
    ({"count": 2}, "process 1 on host1 expects 2 processes, process 0 expects 3"),
  ],
)
def test_one_that_differs_ends_all(host, options, message):
  port, zero = host(3)
  with contextlib.closing(member(port, 1, **options)) as one:
    assert failure(zero, 1) == message == told(one)[0]


def test_strangers_are_passed_over(host):
  port, zero = host(2)
  for text in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[]\n", b"null\n", b"{}\n"):
    with connected(port) as stranger:
      stranger.sendall(text)
  assert told(member(port, 1, count=2))[0] == ""
  zero.result(timeout=20)


def test_a_port_that_an_earlier_attempt_still_holds_is_waited_for():
  with socket.create_server(("", 0)) as other, concurrent.futures.ThreadPoolExecutor() as pool:
    where = f"localhost:{other.getsockname()[1]}"
    late = pool.submit(preflight.meet, where, 1, 0, ABOUT, preflight.Limit(0.5))
    assert "cannot listen at port" in failure(late, preflight.EXIT_CODE)
    zero = pool.submit(preflight.meet, where, 1, 0, ABOUT, preflight.Limit(20))
    time.sleep(0.3)
    other.close()
    zero.result(timeout=20)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,b,c,d", "TPU_WORKER_ID": "1"}
SLICES = {
  "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
  "MEGASCALE_NUM_SLICES": "2",
  "MEGASCALE_SLICE_ID": "1",
}
NONE = (None, None, None)


@pytest.fixture
def variables(monkeypatch):
  """Sets the variables of a cluster, and no others."""

  def place(values):
    for name in list(os.environ):
      if name.startswith(("SLURM_", "TPU_", "MEGASCALE_", "OMPI_", "KUBERNETES_", "JAX_COORD")):
        monkeypatch.delenv(name)
    for name, value in values.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", "TPU_WORKER_ID" in values)
    # As on GKE, whose metadata have nothing of a TPU.
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))

  return place


@pytest.mark.parametrize(
  "values, given, found",
  [
    (SLURM | {"SLURM_STEP_NODELIST": "node7"}, NONE, ("node7:61447", 3, 2)),
    (SLURM | {"SLURM_STEP_NODELIST": "node7,gpu9"}, NONE, ("node7:61447", 3, 2)),
    (SLURM | {"SLURM_STEP_NODELIST": "node[003-004,9],gpu9"}, NONE, ("node003:61447", 3, 2)),
    (SLURM | {"SLURM_STEP_NODELIST": "node7"}, ("a:1", None, None), ("a:1", 3, 2)),
    (SLURM | {"SLURM_STEP_NODELIST": "node7"}, (None, 9, 8), ("node7:61447", 9, 8)),
    (GKE, NONE, ("localhost:8482", 4, 1)),
    (GKE | SLICES, NONE, ("localhost:8482", 8, 5)),
    (GKE | SLICES | {"JAX_COORDINATOR_PORT": "99"}, NONE, ("localhost:99", 8, 5)),
    ({}, ("[::1]:5", 2, 1), ("[::1]:5", 2, 1)),
  ],
)
def test_a_cluster_says_who_we_are(variables, values, given, found):
  variables(values)
  assert preflight.detect(*given, preflight.Limit(20)) == found


@pytest.mark.parametrize(
  "values, given, message",
  [
    ({}, NONE, "no cluster .* was found"),
    ({}, ("a:1", None, None), "give --coordinator HOST:PORT, --num_processes and --process_id"),
    ({}, ("a:1", 2, None), "give --coordinator"),
    ({}, (None, 2, 1), "give --coordinator"),
    ({}, ("a:1", 2, 2), "--process_id 2 is not in 0..1"),
    ({}, ("a", 2, 1), "'a' is not HOST:PORT"),
    (SLURM | {"SLURM_STEP_NODELIST": "n"}, (None, 2, None), "--process_id 2 is not in 0..1"),
    (SLURM | {"SLURM_STEP_NODELIST": "n", "SLURM_PROCID": "x"}, NONE, "invalid literal"),
    (GKE | SLICES | {"MEGASCALE_NUM_SLICES": "two"}, NONE, "invalid literal"),
  ],
)
def test_what_no_restart_mends_is_bad_input(variables, values, given, message):
  variables(values)
  with pytest.raises(UserError, match=message) as caught:
    preflight.detect(*given, preflight.Limit(20))
  assert caught.value.exit_code == 2


def test_a_name_that_does_not_resolve_yet_is_a_late_process(variables, monkeypatch):
  variables(GKE | {"TPU_WORKER_HOSTNAMES": "slice-0-0.nowhere.invalid,b"})
  monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda _: None)
  limit = preflight.Limit(1)
  with pytest.raises(UserError, match="slice-0-0.nowhere.invalid") as caught:
    preflight.detect(*NONE, limit)
  assert caught.value.exit_code == preflight.EXIT_CODE and limit.left < 0.5


HANGING = """
import sys, time
import jax
from spatialv2a_jax.training import cluster
cluster._DEVICES_SECONDS = 1.0
jax.devices = lambda: time.sleep(600)
cluster.start(sys.argv[1], 1, 0, timeout=2)
"""


def test_devices_that_do_not_come_end_it_with_the_stacks_of_all_threads():
  done = subprocess.run(
    [sys.executable, "-c", HANGING, f"localhost:{processes.free_port()}"],
    env=runner.environment(),
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == preflight.EXIT_CODE, done.stderr
  assert "process 0 of 1 on " in done.stderr and " waited for the devices: 2 s" in done.stderr
  assert "most recent call first" in done.stderr and "in start" in done.stderr
