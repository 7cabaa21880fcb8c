"""Saves and restores of two processes, one of which is late, fails or dies."""

import signal

import pytest

from spatialv2a_jax.training import checkpoint
from tests import processes

OPTIONS = {"shape": (2, 1, 1), "steps": 6, "checkpoint": 3, "average": 3}


def codes(group):
  """Returns the exit codes of processes, and their errors."""
  told = [process.communicate(timeout=200)[1] for process in group]
  return [process.returncode for process in group], told


@pytest.mark.slow
def test_a_checkpoint_is_not_complete_before_a_late_process_has_written_its_part(tmp_path):
  """Nor may the average of the same step, which has been written meanwhile, stand in for it."""
  late = {"fault": "late checkpoint", "rank": 1}
  assert codes(processes.together(tmp_path, 2, **OPTIONS, **late)) == ([0, 0], ["", ""])
  assert list(checkpoint.saved_runs(tmp_path)) == [3, 6]
  assert sorted(path.name for path in (tmp_path / "averages").glob("[0-9]*")) == ["3", "6"]
  for name in ("3", "6"):
    assert checkpoint.whole(tmp_path, int(name))


@pytest.mark.slow
def test_an_average_that_one_process_cannot_write_ends_both_with_1(tmp_path):
  group = processes.together(tmp_path, 2, **OPTIONS, fault="no average", rank=1)
  found, told = codes(group)
  assert found == [1, 1], told
  assert f"cannot write to {tmp_path}/averages ([Errno 28] No space left" in told[1]


@pytest.mark.slow
def test_who_dies_while_it_restores_leaves_the_checkpoint_where_it_is(tmp_path):
  assert codes(processes.together(tmp_path, 2, **OPTIONS))[0] == [0, 0]
  for _ in range(2):
    group = processes.together(tmp_path, 2, **OPTIONS | {"steps": 9}, fault="restore", rank=1)
    found, told = codes(group)
    assert found[0] in (43, -signal.SIGABRT) and found[1] == -signal.SIGKILL, told
    assert not list(tmp_path.glob("damaged*"))
  assert codes(processes.together(tmp_path, 2, **OPTIONS | {"steps": 9}))[0] == [0, 0]
  assert max(checkpoint.saved_runs(tmp_path)) == 9


@pytest.mark.slow
def test_the_others_wait_for_the_one_that_exports(tmp_path):
  """JAX would give them five minutes, and then end the one that still writes."""
  hangs = {"fault": "export", "rank": 0, "limits": {"save": 6.0}}
  found, told = codes(processes.together(tmp_path, 2, **OPTIONS, **hangs))
  assert found == [43, 43], told
  assert all("hung save of a checkpoint or model" in text for text in told)
