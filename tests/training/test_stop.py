"""Requests to stop, each sent to a process of its own: it saves, leaves with 42, and goes on."""

import os
import signal
import subprocess
import time
import types

import jax
import numpy as np
import pytest

from spatialv2a_jax import logbook
from spatialv2a_jax.training import checkpoint, preemption
from tests import processes, runner


def run(workdir, code=0, **options):
  return processes.finish(processes.start(workdir, **options), code)


def stop(process, number=signal.SIGTERM):
  """Signals a process; returns its exit code and for how long it still lived."""
  clock = time.monotonic()
  process.send_signal(number)
  out, _ = process.communicate(timeout=60)
  return process.returncode, time.monotonic() - clock, out


@pytest.mark.parametrize("passed", [(5, 3), (2, 2), (0, 4)])
def test_all_processes_leave_at_the_first_point_that_none_has_passed(monkeypatch, passed):
  store = types.SimpleNamespace(
    key_value_set=lambda key, value: None,
    blocking_key_value_get=lambda key, _: str(passed[int(key.rpartition("/")[2])]),
  )
  monkeypatch.setattr(preemption.cluster, "client", lambda: store)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  for rank, points in enumerate(passed):
    monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
    stop = preemption.StopSignal()
    stop._watch = types.SimpleNamespace(tell=lambda _: None)
    assert not any(stop.poll() for _ in range(points))
    stop._agree("stop")
    ahead = [stop.poll() for _ in range(points, max(passed) + 1)]
    assert ahead == [False] * (max(passed) - points) + [True]


@pytest.mark.slow
def test_a_signal_is_heeded_while_compiling(tmp_path):
  process = processes.start(tmp_path, fault="compile")
  processes.wait_for(process, "hanging")
  code, seconds, out = stop(process)
  assert code == 42 and seconds < 20 and "stopped at step 0 before the first step" in out


@pytest.mark.slow
def test_a_signal_is_heeded_while_waiting_for_data(tmp_path):
  process = processes.start(tmp_path, fault="data", at=3, checkpoint=100)
  processes.wait_for(process, "hanging")
  code, seconds, out = stop(process)
  assert code == 42 and seconds < 20 and "stopped at step 3 and saved" in out
  params, _, _ = checkpoint.load_params(tmp_path)
  assert np.isfinite(params["up"]["kernel"]).all()


@pytest.mark.slow
def test_a_signal_is_heeded_while_a_new_run_waits_for_what_its_data_give(tmp_path):
  process = processes.start(tmp_path, fault="values")
  processes.wait_for(process, "hanging")
  code, seconds, out = stop(process)
  assert code == 42 and seconds < 20 and "stopped at step 0 before the first step" in out
  run(tmp_path)


@pytest.mark.slow
def test_a_signal_is_heeded_while_the_evaluation_waits_for_data(tmp_path):
  process = processes.start(tmp_path, fault="eval data", eval=2, checkpoint=100)
  processes.wait_for(process, "hanging")
  code, seconds, out = stop(process)
  assert code == 42 and seconds < 20 and "stopped at step 4 and saved" in out
  run(tmp_path, eval=2)
  rows = logbook.read_metrics(tmp_path)
  assert [x["step"] for x in rows if {"eval/loss", "eval/norm"} & x.keys()] == [2, 4, 6, 8]


@pytest.mark.slow
def test_a_signal_is_heeded_while_evaluating_which_is_done_again(tmp_path):
  process = processes.start(tmp_path, fault="eval", at=4, eval=2, checkpoint=100)
  processes.wait_for(process, "evaluating")
  code, seconds, out = stop(process, signal.SIGINT)
  assert code == 42 and seconds < 20 and "stopped at step 4 and saved" in out
  run(tmp_path, eval=2)
  rows = logbook.read_metrics(tmp_path)
  assert [x["step"] for x in rows if "eval/norm" in x] == [2, 4, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_and_its_run_at_once_saves(tmp_path, number):
  """The run hears of it twice: from the system and from the launcher."""
  toy = runner.command(
    workdir=str(tmp_path), steps=100_000, pause=0.05, checkpoint=100_000, ballast=2_000_000
  )
  process = subprocess.Popen(
    ["bash", str(runner.ROOT / "launch" / "again.sh"), *toy],
    env=runner.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  processes.wait_for(process, "step 3/")
  os.killpg(process.pid, number)
  out, _ = processes.finish(process, code=42)
  (step,) = checkpoint.saved_runs(tmp_path)
  assert f"stopped at step {step} and saved" in out


@pytest.mark.slow
def test_a_second_signal_some_seconds_after_the_first_ends_the_run_at_once(tmp_path):
  process = processes.start(tmp_path, fault="blind", at=3, eval=3, checkpoint=100)
  processes.wait_for(process, "evaluating")
  process.send_signal(signal.SIGTERM)
  time.sleep(preemption._REPEAT_SECONDS + 1)
  assert process.poll() is None
  assert stop(process)[0] == -signal.SIGTERM and not checkpoint.saved_runs(tmp_path)


@pytest.mark.slow
def test_a_signal_before_the_processes_have_met_ends_with_42(tmp_path):
  process = processes.together(tmp_path, 2)[0]
  processes.wait_for(process, "waiting up to")
  code, seconds, out = stop(process)
  assert code == 42 and seconds < 20 and "the same command goes on from there" in out
