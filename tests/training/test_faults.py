"""Faults of a run, each struck in a process of its own, and the promise seen to hold."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
import warnings

import numpy as np
import pytest

from data import pipeline
from launch import local, train
from spatialv2a_jax import logbook, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import checkpoint, faults
from tests import loader_shards, processes, runner


def run(workdir, code=0, **options):
  return processes.finish(processes.start(workdir, **options), code)


def losses(workdir):
  return {x["step"]: x["loss"] for x in logbook.read_metrics(workdir) if "loss" in x}


@pytest.mark.slow
def test_too_many_bad_updates_stop_the_run_with_all_it_takes_to_replay_them(tmp_path, capsys):
  rules = {"sigma": 0, "cap": 2}
  fault = {"fault": "nan", "at": 5, "guard": rules}
  told, err = run(tmp_path, code=1, steps=20, **fault)
  options = runner.Options(str(tmp_path), steps=20, **fault)
  text = err.splitlines()[-1]
  assert "update of step 8 left out" in text
  assert "clips 56, 57, " in text and "3 of at most 2 (guard.cap); newest checkpoint: " in text
  assert "update of step 6 left out (loss nan, gradient norm nan: not finite)" in told
  assert "1 of at most 2" in told
  reports = [json.loads(p.read_text()) for p in sorted((tmp_path / "faults").glob("*.json"))]
  assert [x["step"] for x in reports] == [6, 7, 8]
  assert reports[2]["clips"] == list(range(56, 64)) and "--verify" in reports[2]["replay"]
  rows = np.load(tmp_path / "faults" / "step-00000008-rows-0.npz")
  assert np.isnan(rows["x_bw"]).all() and rows["id_b"].tolist() == reports[2]["clips"]
  params, _, _ = checkpoint.load_params(tmp_path, None)
  assert all(np.isfinite(x).all() for x in [params["up"]["kernel"], params["down"]["kernel"]])
  # The command that it prints replays the step, although nothing was logged or saved after it.
  arguments = train.parse(shlex.split(reports[2]["replay"])[2:])
  span: dict = {"start": arguments.start, "steps": arguments.steps}
  assert arguments.verify and sum(span.values()) == 8
  assert runner.verify(options, **span)
  told = capsys.readouterr().out
  assert "step 8: left out by the run; equal" in told and "repeats bit for bit" in told
  path = tmp_path / "faults" / "step-00000008.json"
  path.write_text(path.read_text().replace('"loss": "nan"', '"loss": "3.0"'))
  assert not runner.verify(options, **span)
  assert "step 8: left out by the run; other: loss" in capsys.readouterr().out
  # A run that goes on does these steps again.
  run(tmp_path, steps=9, guard=rules)
  assert sorted(p.name for p in path.parent.glob("*8.json*")) == ["step-00000008.json.old"]


def test_a_dump_names_its_clips_and_keeps_the_rows_of_the_newest_as_numbers(tmp_path):
  """Arrays in bfloat16 would be bytes without meaning to numpy."""
  paths, told = loader_shards.build(tmp_path / "shards"), []
  known = schema.clip_id("clip7")
  found = faults.Faults(tmp_path, 2, lambda: None, told.append, names=lambda: pipeline.names(paths))
  rows = {"x_b": np.array([1.5, -2.0], "bfloat16"), "id_b": np.array([3, known], np.uint32)}
  metrics = {"loss": np.nan, "grad_norm": 1.0, "good": 0.0, "sigmas": 0.0}
  for i in range(1, 5):
    more = {"skipped": float(i), "burst": min(i, 2.0)}
    found.check(i, metrics | more, rows, rows)  # pyright: ignore
  with pytest.raises(UserError, match="clips 3, clip7; see .*step-00000007.json and its rows; "):
    found.check(7, metrics | {"skipped": 5.0, "burst": 3.0}, rows, rows)  # pyright: ignore
  assert "clips 3, clip7; see" in told[0]
  report = json.loads((tmp_path / "faults" / "step-00000002.json").read_text())
  assert report["clips"] == [3, known] and report["names"] == [3, "clip7"]
  kept = sorted(path.name for path in (tmp_path / "faults").glob("*.npz"))
  assert kept == [f"step-{step:08d}-rows-0.npz" for step in (3, 4, 7)]
  saved = np.load(tmp_path / "faults" / kept[0])
  assert saved["x_b"].dtype == np.float32 and saved["x_b"].tolist() == [1.5, -2.0]


@pytest.mark.slow
def test_a_spike_is_left_out_told_and_counted_and_the_run_goes_on(tmp_path):
  rules = {"sigma": 6.0, "window": 20, "warmup": 10, "cap": 3}
  told, _ = run(tmp_path, steps=30, fault="spike", at=20, guard=rules, checkpoint=30)
  assert "update of step 21 left out (loss" in told
  assert "sigma above the mean); clips 160, " in told
  rows = {x["step"]: x for x in logbook.read_metrics(tmp_path) if "skipped" in x}
  assert rows[20]["skipped"] == 0 and rows[21]["skipped"] == rows[30]["skipped"] == 1
  assert "loss" not in rows[21] and rows[22]["loss"] < 3


@pytest.mark.slow
def test_a_damaged_record_is_named_passed_over_and_counted_once(tmp_path):
  path = loader_shards.build(tmp_path / "shards")[1]
  loader_shards.damage(path, 2)
  options: dict = {"shards": str(tmp_path / "shards")}
  _, err = run(tmp_path / "run", **options)
  assert f"skipped a damaged record, 1 so far: {path}: record 2" in err
  _, err = run(tmp_path / "run", steps=16, **options)
  assert f"skipped a damaged record, 1 so far: {path}: record 2" in err  # It meets it again.
  rows = {x["step"]: x for x in logbook.read_metrics(tmp_path / "run") if "bad_records" in x}
  assert rows.keys() == set(range(1, 17))
  assert [rows[step]["bad_records"] for step in (8, 9, 16)] == [1, 1, 1]


@pytest.mark.slow
def test_too_many_bad_updates_end_all_processes_with_1_and_the_rows_of_each(tmp_path):
  options = {"shape": (2, 1, 1), "fault": "nan", "rank": 1, "guard": {"sigma": 0, "cap": 1}}
  told = [
    processes.finish(process, code=1)[1]
    for process in processes.together(tmp_path, 2, steps=20, **options)
  ]
  assert "update of step 7 left out" in told[0] and "2 of at most 1 (guard.cap)" in told[0]
  report = json.loads((tmp_path / "faults" / "step-00000007.json").read_text())
  rows = [np.load(tmp_path / "faults" / f"step-00000007-rows-{i}.npz") for i in range(2)]
  assert [x for part in rows for x in part["id_b"]] == report["clips"] == list(range(48, 56))
  assert not np.isnan(rows[0]["x_bw"]).any() and np.isnan(rows[1]["x_bw"]).all()


@pytest.mark.slow
def test_an_error_of_the_program_gives_1_and_its_traceback(tmp_path):
  _, err = run(tmp_path, code=1, fault="error")
  assert "Traceback" in err and "in strike" in err and "ZeroDivisionError" in err
  assert checkpoint.saved_runs(tmp_path)


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_ends_all_of_them_with_1(tmp_path):
  options = {"shape": (1, 2, 1), "ballast": 200_000, "checkpoint": 4, "log": 100}
  options |= {"steps": 10_000, "pause": 0.05, "limits": {"step": 100.0, "save": 100.0}}
  started = processes.together(tmp_path, 2, fault="disk", rank=1, at=7, **options)
  told = [processes.finish(process, code=1)[1] for process in started]
  assert "launch.train: the disk is full: the checkpoint of step 8" in told[1], told
  assert max(checkpoint.saved_runs(tmp_path)) == 4


@pytest.mark.slow
def test_a_collective_that_hangs_is_told_by_all_with_their_stacks(tmp_path):
  """One process hangs inside the step, the other waits for it there."""
  options = {"shape": (2, 1, 1), "fault": "step", "rank": 1, "at": 3}
  started = processes.together(tmp_path, 2, limits={"step": 3.0}, **options)
  for i, process in enumerate(started):
    _, err = processes.finish(process, code=43)
    assert "hung step: the devices did not finish for" in err and "limits.step=3)" in err
    stacks = (tmp_path / "stacks" / f"process-{i}.txt").read_text()
    assert "hung step" in stacks and "Thread 0x" in stacks


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_goes_on_from_the_one_before_with_the_same_bits(tmp_path):
  options = {"ballast": 8_000_000, "checkpoint": 3, "steps": 9, "pause": 0.2}
  process = processes.start(tmp_path / "killed", **options)
  folder = tmp_path / "killed" / "checkpoints"
  while not (folder / "3").is_dir() or not list(folder.glob("6.orbax-checkpoint-tmp*")):
    assert process.poll() is None
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert list(folder.glob("6.orbax-checkpoint-tmp*")) and not (folder / "6").exists()
  assert "resumed at step 3" in run(tmp_path / "killed", **options)[0]
  run(tmp_path / "whole", **options)
  assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
  killed, whole = (checkpoint.whole(tmp_path / name) for name in ("killed", "whole"))
  assert killed.keys() == whole.keys() and len(killed) > 20
  for name, x in whole.items():
    np.testing.assert_array_equal(killed[name], x, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  "fault, name, limits, step",
  [
    ("init", "hung start for", {"init": 5}, 0),
    ("values", "data stall: no batch", {"data": 1.5}, 0),
    ("data", "data stall: no batch", {"data": 1.5}, 6),
    ("step", "hung step", {"step": 1.5}, 6),
    ("eval data", "data stall: no batch", {"data": 1.5}, 4),
    ("export", "hung save of a checkpoint or model", {"save": 3}, 8),
  ],
)
def test_what_does_not_move_ends_with_43_and_the_stacks(tmp_path, fault, name, limits, step):
  _, err = run(tmp_path, code=43, fault=fault, limits=limits, eval=2)
  assert name in err and f"at step {step} (process 0 on " in err
  assert f"limits.{next(iter(limits))}=" in err
  assert "Thread 0x" in err and "runner.py" in err
  (stacks,) = (tmp_path / "stacks").iterdir()
  assert "Thread 0x" in stacks.read_text() and name in stacks.read_text()


@pytest.mark.slow
def test_what_holds_the_interpreter_ends_by_an_alarm_and_the_stacks(tmp_path):
  """The watchdog is a thread of Python, which then does not run."""
  clock = time.monotonic()
  _, err = run(tmp_path, code=-signal.SIGALRM, fault="interpreter", limits={"data": 2, "step": 2})
  assert time.monotonic() - clock < 200  # Of 1000.
  assert "Thread 0x" in err and "runner.py" in err and "in strike" in err


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 8 MiB; where none may be mounted, a folder whose files `runner.fill` bounds."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
  mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
  if not mounted:
    warnings.warn("no disk can be mounted here: the size of files is bounded", stacklevel=1)
  yield folder
  if mounted:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_too_full_for_a_checkpoint_is_told_in_one_line_and_the_last_one_is_intact(
  small_disk, tmp_path
):
  options = {"ballast": 200_000, "checkpoint": 4, "steps": 12, "log": 100}
  _, err = run(small_disk, code=1, fault="disk", at=7, **options)
  # Orbax tells more, from a thread of its own, which may leave no line to begin with.
  (line,) = re.findall("launch.train: .*", err)
  assert "the disk is full: the checkpoint of step 8" in line and "step 4 is intact" in line
  (small_disk / "fill").unlink(missing_ok=True)
  assert "resumed at step 4" in run(small_disk, **options)[0]
  assert run(tmp_path / "whole", **options) and losses(small_disk) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_too_full_for_the_log_is_told_in_one_line_and_is_no_hang(small_disk, tmp_path):
  """TensorBoard's events must not keep the run from saying so."""
  options = {"checkpoint": 8, "pause": 0.02, "limits": {"step": 60.0, "save": 60.0}}
  _, err = run(small_disk, code=1, fault="disk", at=9, steps=10_000, **options)
  assert err.count("launch.train: the disk is full") == 1, err
  (small_disk / "fill").unlink(missing_ok=True)
  saved = max(checkpoint.saved_runs(small_disk))
  assert f"resumed at step {saved}" in run(small_disk, steps=saved + 8, **options)[0]
  assert sorted(losses(small_disk)) == list(range(1, saved + 9))


@pytest.mark.slow
def test_a_killed_process_lets_the_job_begin_again_and_a_mistake_ends_all_of_it(tmp_path):
  """The other process must not call the loss a fault of its own, nor wait for who will not come."""
  options = {"rank": 1, "shape": (2, 1, 1), "steps": 12, "pause": 0.1}
  attempts = iter([{"fault": "SIGKILL", "at": 5}, {}])

  def commands():
    join = {"coordinator": f"localhost:{processes.free_port()}", "count": 2, "timeout": 60}
    more = {**options, **next(attempts), "workdir": str(tmp_path / "run")}
    return [runner.command(**more, join={**join, "index": i}) for i in range(2)]

  job = local.Job(commands(), runner.environment())
  first = job.wait(grace=60)
  codes = [process.returncode for process in job.processes]
  assert first == codes[1] == -signal.SIGKILL
  assert codes[0] in (43, -signal.SIGABRT)  # By its own hand, or by JAX's.
  assert local.run(commands, runner.environment(), restarts=0) == 0
  assert sorted(losses(tmp_path / "run")) == list(range(1, 13))

  other = processes.together(tmp_path / "other", 2, fault="mistake", **options)
  told = [processes.finish(process, code=2)[1] for process in other]
  assert "a mistake" in told[1] and "process 1 on " in told[0] and "with code 2" in told[0]


@pytest.mark.slow
def test_a_stall_of_one_process_is_told_by_all_with_their_stacks(tmp_path):
  limits = {"data": 2.0, "step": 60.0}
  options = {"fault": "data", "rank": 1, "limits": limits, "shape": (2, 1, 1), "checkpoint": 100}
  started = processes.together(tmp_path, 2, **options)
  told = [processes.finish(process, code=43)[1] for process in started]
  for i, text in enumerate(told):
    assert "data stall: no batch for " in text and "(process 1 on " in text
    stacks = (tmp_path / "stacks" / f"process-{i}.txt").read_text()
    assert "data stall" in stacks and "Thread 0x" in stacks
  assert "block_until_ready" in (tmp_path / "stacks" / "process-0.txt").read_text()


@pytest.mark.slow
def test_a_job_of_two_processes_goes_on_from_before_a_damaged_checkpoint(tmp_path):
  options = {"shape": (2, 1, 1), "steps": 8, "workdir": str(tmp_path)}

  def commands():
    join = {"coordinator": f"localhost:{processes.free_port()}", "count": 2, "timeout": 60}
    return [runner.command(**options, join={**join, "index": i}) for i in range(2)]

  run(devices=2, **options)
  whole = losses(tmp_path)
  for file in (tmp_path / "checkpoints" / "8" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  options["steps"] = 10
  assert local.run(commands, runner.environment(), restarts=1) == 0
  assert len(list(tmp_path.glob("damaged-8-*"))) == 1
  rows = [x for x in logbook.read_metrics(tmp_path) if "loss" in x]
  assert sorted(losses(tmp_path)) == list(range(1, 11))
  assert {step: losses(tmp_path)[step] for step in whole} == whole and rows[-1]["step"] == 10


@pytest.mark.slow
def test_two_processes_refuse_a_checkpoint_of_another_optimiser_and_move_nothing(tmp_path):
  run(tmp_path, devices=2, shape=(2, 1, 1), steps=4)
  before = sorted((tmp_path / "checkpoints").rglob("*"))
  for process in processes.together(tmp_path, 2, shape=(2, 1, 1), steps=6, sgd=True):
    _, err = processes.finish(process, code=2)
    assert "checkpoints/4 holds another state of the optimiser: opt/" in err
  assert sorted((tmp_path / "checkpoints").rglob("*")) == before
  assert not list(tmp_path.glob("damaged*"))
