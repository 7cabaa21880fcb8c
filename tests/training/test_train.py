import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import checkpoint, optim, recipe, train
from tests.training import test_train_step as toy

RECIPE = {field.name for field in dataclasses.fields(recipe.Recipe)}


def fit(workdir, *, steps=6, batches=None, shape=(1, 1, 1), kind="toy", **kwargs):
  devices = jax.devices()[: int(np.prod(shape))]

  def endless(start):
    index = start
    while True:
      yield toy.toy_batch(index)
      index += 1

  arguments = {
    "batches": batches or endless,
    "batch_size": 8,
    "loss": toy.toy_loss,
    "init": toy.toy_init,
    "stats": {"mean": np.zeros(8, np.float32)},
    "optimizer": optim.adamw(
      optim.Config(lr=1e-2, warmup=2), jax.eval_shape(toy.toy_init, jax.random.key(0))
    ),
    "mesh": sharding.make_mesh(*shape, devices=devices),
  }
  more = {"config": {"model": {"width": 8}}, "every": train.Every(log=1, checkpoint=2)}
  for name, value in kwargs.items():
    (arguments if name in RECIPE else more)[name] = value
  return train.fit(workdir, recipe.Recipe(**arguments), kind=kind, steps=steps, **more)


def lines(workdir):
  """Rows of the log that hold more than the ledger of time."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [row for row in rows if "loss" in row or "eval/answer" in row]


def with_signal(step, number):
  """Batches of the toy problem; one of them sends a signal to this process."""

  def batches(start):
    index = start
    while True:
      if index == step:
        os.kill(os.getpid(), number)
      yield toy.toy_batch(index)
      index += 1

  return batches


def main(reference, killed):
  """Run in a process of its own: an uninterrupted run, then one that dies in step 5."""
  fit(pathlib.Path(reference), steps=8)
  fit(pathlib.Path(killed), steps=8, batches=with_signal(5, signal.SIGKILL))


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "2"}  # Bits depend on NPROC.

  def python(call):
    code = f"from tests.training import test_train as t; t.{call}"
    return subprocess.run(
      [sys.executable, "-c", code],
      env=environment,
      cwd=pathlib.Path(__file__).parents[2],
      capture_output=True,
      text=True,
      check=False,
    )

  first = python(f"main({str(a)!r}, {str(b)!r})")
  assert first.returncode == -signal.SIGKILL, first.stderr
  assert sum("step 8/8" in line for line in first.stdout.splitlines()) == 1
  second = python(f"fit(t.pathlib.Path({str(b)!r}), steps=8)")
  assert second.returncode == 0, second.stderr
  assert "resumed at step" in second.stdout
  for which in (None, 0):
    whole, resumed = checkpoint.load_params(a, which), checkpoint.load_params(b, which)
    jax.tree.map(np.testing.assert_array_equal, whole[:2], resumed[:2])
  losses = [{x["step"]: x["loss"] for x in lines(run)} for run in (a, b)]
  assert losses[0] == losses[1] and sorted(losses[0]) == list(range(1, 9))


def member(port, rank, workdir, steps):
  """One of two processes of a run, slow enough for a signal to reach it; returns its exit code."""
  jax.distributed.initialize(f"localhost:{port}", 2, rank)

  def batches(start):
    for index in range(start, steps):
      time.sleep(0.2)
      yield {name: x[4 * rank : 4 * rank + 4] for name, x in toy.toy_batch(index).items()}

  fit(pathlib.Path(workdir), steps=steps, batches=batches, shape=(2, 1, 1))
  return 0


@pytest.fixture
def pair(tmp_path):
  """Starts both processes of a run; ends what is left of them after the test."""
  started = []

  def launch(steps):
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      port = probe.getsockname()[1]
    for rank in range(2):
      # Leaves as a run does: the thread that reads ahead may be in JAX still.
      call = f"run_process(lambda: t.member({port}, {rank}, {str(tmp_path)!r}, {steps}))"
      code = (
        f"from launch.train import run_process\nfrom tests.training import test_train as t\n{call}"
      )
      process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
      )
      started.append(process)
    return started[-2:]

  yield launch
  for process in started:
    process.kill()
    process.wait()


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on_together(pair):
  first = pair(steps=10_000)
  while "step 3/" not in first[0].stdout.readline():
    assert first[0].poll() is None
  first[1].send_signal(signal.SIGTERM)
  stopped = first[0].stdout.read()
  assert [process.wait(timeout=120) for process in first] == [42, 42]
  (step,) = re.findall(r"stopped at step (\d+)", stopped)
  step = int(step)
  second = pair(steps=step + 2)
  assert f"resumed at step {step}" in second[0].stdout.read()
  assert [process.wait(timeout=120) for process in second] == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_code_42(tmp_path, number):
  told = []
  handler = signal.getsignal(number)
  with pytest.raises(SystemExit) as stop:
    fit(tmp_path, batches=with_signal(3, number), say=told.append, every=train.Every(1, 0, 100))
  assert stop.value.code == 42
  assert signal.getsignal(number) is handler
  assert "stopped at step 3 and saved" in told[-1]
  told.clear()
  state = fit(tmp_path, say=told.append)
  assert "resumed at step 3 from a checkpoint saved " in told[0]
  reference = fit(tmp_path / "reference", say=told.append)
  jax.tree.map(np.testing.assert_array_equal, state, reference)


def test_a_finished_run_returns_at_once(tmp_path):
  first = fit(tmp_path, steps=3)
  told = []

  def no_batches(start):
    raise AssertionError("asked for data")

  again = fit(tmp_path, steps=3, batches=no_batches, say=told.append)
  assert told[-1].startswith("this run is finished") and "step 3 of 3" in told[-1]
  jax.tree.map(np.testing.assert_array_equal, again, first)


def test_a_run_says_what_it_does_and_logs_every_field(tmp_path):
  told = []
  every = train.Every(log=2, checkpoint=100)
  fit(tmp_path, steps=4, say=told.append, every=every, shape=(2, 2, 2), tokens_per_clip=7)
  text = "\n".join(told)
  for part in ("M parameters", "mesh data=2 fsdp=2 tensor=2", "clips/s", "left"):
    assert part in text
  assert re.search("compiled(, read)? in", text)  # The tests keep their programs.
  logged = lines(tmp_path)
  assert [x["step"] for x in logged] == [2, 4]
  expected = "loss error grad_norm param_norm lr clips_per_s tokens_per_s data_wait mfu skipped"
  expected += " bad_records checkpoint_age_s memory/host_peak_gib memory/device_peak_gib goodput"
  assert set(expected.split()) <= logged[0].keys()
  assert logged[0]["tokens_per_s"] == pytest.approx(7 * logged[0]["clips_per_s"])
  assert 0 <= logged[0]["data_wait"] <= 1
  assert json.loads((tmp_path / "config.json").read_text()) == {"model": {"width": 8}}


def test_logged_values_are_means_since_the_line_before(tmp_path):
  fit(tmp_path / "each", steps=4)
  fit(tmp_path / "pairs", steps=4, every=train.Every(log=2, checkpoint=100))
  each = [x["loss"] for x in lines(tmp_path / "each")]
  pairs = [x["loss"] for x in lines(tmp_path / "pairs")]
  np.testing.assert_allclose(pairs, np.reshape(each, (2, 2)).mean(1), rtol=1e-6)


def test_the_data_position_follows_the_examples_when_the_batch_grows(tmp_path):
  asked = []

  def batches(rows):
    def begin(start):
      asked.append(start)
      while True:
        yield toy.toy_batch(0, rows)

    return begin

  fit(tmp_path, steps=4, batches=batches(8))
  fit(tmp_path, steps=6, batches=batches(16), batch_size=16)
  fit(tmp_path, steps=7, batches=batches(8), batch_size=8)
  assert asked == [0, 2, (4 * 8 + 2 * 16) // 8]


def test_a_batch_that_does_not_divide_what_was_seen_begins_between_two(tmp_path):
  asked = []

  def batches(start, offset=0):
    asked.append((start, offset))
    while True:
      yield toy.toy_batch(0, 24)

  fit(tmp_path, steps=4)
  fit(tmp_path, steps=5, batches=batches, batch_size=24)
  assert asked == [(1, 8)]  # 32 clips.


def test_data_that_ends_early_is_one_line(tmp_path):
  with pytest.raises(UserError, match="the data ended before step 3 of 6"):
    fit(tmp_path, batches=lambda start: iter([toy.toy_batch(i) for i in range(start, 2)]))


def test_processes_begin_at_the_step_of_process_0_or_not_at_all(tmp_path, monkeypatch):
  """A shared disk may show some of them an old state."""
  evaluated = []
  more: dict = {"evaluate": lambda *_: evaluated.append(1) or {"eval/answer": 1.0}}
  every = train.Every(log=1, eval=2, checkpoint=2)
  fit(tmp_path, steps=2, every=every, **more)
  (tmp_path / "metrics.jsonl").write_text("")  # Not there yet.
  monkeypatch.setattr(train.multihost_utils, "broadcast_one_to_all", lambda x: (2, True))
  fit(tmp_path, steps=4, every=every, **more)
  assert len(evaluated) == 2  # After steps 2 and 4.
  monkeypatch.setattr(train.multihost_utils, "broadcast_one_to_all", lambda x: (6, True))
  with pytest.raises(UserError, match="process 0 has restored step 4, process 0 step 6: do all"):
    fit(tmp_path, steps=8, every=every, **more)


def test_the_record_is_on_disk_before_a_checkpoint_is(tmp_path, monkeypatch):
  done, save = [], checkpoint.Checkpoints.save
  monkeypatch.setattr(
    os,
    "fsync",
    lambda number: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}"))),
  )

  def noted(self, step, *arguments):
    done.append(step)
    save(self, step, *arguments)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", noted)
  fit(tmp_path, steps=4)
  done = [x for x in done if x in ("metrics.jsonl", 2, 4)]
  assert done == ["metrics.jsonl", 2, "metrics.jsonl", 4]


def test_another_kind_of_run_is_refused_and_changes_are_told(tmp_path):
  fit(tmp_path, steps=2)
  with pytest.raises(UserError, match="kind 'toy', not 'vae'"):
    fit(tmp_path, kind="vae")
  told = []
  fit(tmp_path, steps=3, config={"model": {"width": 9}}, say=told.append)
  assert any("config.model.width 8 -> 9" in line for line in told)


def test_a_run_that_goes_on_otherwise_learns_anew_what_is_usual(tmp_path):
  config: dict = {"model": {"width": 8}, "data": {"batch_size": 8}}
  fit(tmp_path, steps=2, config=config)
  assert int(fit(tmp_path, steps=3, config=config).guard.seen) == 3
  other = config | {"data": {"batch_size": 16}}
  assert int(fit(tmp_path, steps=4, config=other).guard.seen) == 1


def test_a_checkpoint_says_of_which_data_it_is_and_a_change_is_told(tmp_path):
  class Source:
    digests = staticmethod(lambda: {"path": "one", "path_text": "two"})

    def __new__(cls, start):
      return (toy.toy_batch(i) for i in range(start, 100))

  fit(tmp_path, steps=1, batches=Source)
  about = json.loads(checkpoint.saved_runs(tmp_path)[1].read_text())
  assert about["data"] == {"path": "one", "path_text": "two"}
  Source.digests = staticmethod(lambda: {"path": "one", "path_text": "three"})
  told = []
  fit(tmp_path, steps=2, batches=Source, say=told.append)
  changed = [line for line in told if "changed since then: data" in line]
  assert changed == ["  changed since then: data.path_text 'two' -> 'three'"]


def test_the_evaluation_hook_sees_the_state_of_its_step(tmp_path):
  seen = []

  def evaluate(state, step, book, leave):
    seen.append((step, int(state.step)))
    return {"eval/answer": 42.0}

  fit(tmp_path, steps=5, evaluate=evaluate, every=train.Every(log=100, eval=2, checkpoint=100))
  assert seen == [(2, 2), (4, 4), (5, 5)]
  assert [x["step"] for x in lines(tmp_path) if "eval/answer" in x] == [2, 4, 5]


def test_given_values_replace_parameters_of_a_new_run_only(tmp_path):
  calls = []

  def values():
    calls.append(1)
    return {"null": {"text": np.full(8, 5.0, np.float32)}}

  kwargs = {"values": values, "optimizer": optim.Optimizer(optax.set_to_zero())}
  state = fit(tmp_path, steps=2, **kwargs)
  fit(tmp_path, steps=3, **kwargs)
  np.testing.assert_array_equal(state.params["null"]["text"], 5)
  np.testing.assert_array_equal(state.ema["null"]["text"], 5)
  assert len(calls) == 1
  with pytest.raises(UserError, match="null/test of shape .*has None"):
    fit(tmp_path / "typo", values=lambda: {"null": {"test": np.zeros(8)}})


def test_a_run_that_begins_with_part_of_another_says_which_and_takes_its_statistics(tmp_path):
  up, mean = {"bias": np.full(16, 2.0, np.float32)}, np.full(8, 3.0, np.float32)
  given: dict = {"config": {"init_from": "DIR"}, "optimizer": optim.Optimizer(optax.set_to_zero())}
  told, seen = [], []

  def evaluate(state, step, book, leave):
    seen.append(jax.device_get((state.params["up"]["bias"], state.stats["mean"])))
    return {}

  def values():
    return {"up": up}, {"mean": mean}

  every = train.Every(log=1, eval=1)
  fit(
    tmp_path / "a", steps=1, values=values, say=told.append, every=every, evaluate=evaluate, **given
  )
  others = "down/kernel, null/text, up/kernel"
  assert f"1 of 4 parameters from DIR, others as initialised: {others}" in told
  np.testing.assert_array_equal(seen[0][0], up["bias"])
  np.testing.assert_allclose(seen[0][1], 0.9 * mean + 0.1 * toy.toy_batch(0)["x_bw"].mean(0), 1e-5)
  with pytest.raises(UserError, match="init_from: nothing in DIR is a parameter of this network"):
    fit(tmp_path / "b", steps=1, values=dict, **given)


def test_impossible_batches_are_refused_before_anything_is_built(tmp_path):
  with pytest.raises(UserError, match="use a multiple of 4"):
    fit(tmp_path, shape=(2, 2, 2), batch_size=6)
  with pytest.raises(UserError, match="does not divide by accumulate 3 x 1 devices"):
    fit(tmp_path, accumulate=3)
  for shape in ((8, 1, 1), (2, 4, 1)):  # A part of 4 clips cannot span 8 devices.
    with pytest.raises(UserError, match="batch_size 8 does not divide by accumulate 2 x 8 devices"):
      fit(tmp_path, shape=shape, accumulate=2)
  assert not list(tmp_path.iterdir())


def test_the_profiler_traces_the_steps_it_is_told(tmp_path):
  told = []
  fit(tmp_path, steps=6, every=train.Every(log=6, profile=(3, 4)), say=told.append)
  assert f"profiler trace: {tmp_path / 'profile'}" in told
  (trace,) = tmp_path.glob("profile/**/*.xplane.pb")
  raw = trace.read_bytes()
  assert b"step_num" in raw and b"train" in raw
  fit(tmp_path / "none", steps=2, every=train.Every(profile=(3, 4)), say=told.append)
  assert "every.profile=(3, 4) traces nothing: steps 1 to 2 are left" in told
  assert not (tmp_path / "none" / "profile").exists()


def test_an_evaluation_that_was_left_in_the_middle_is_none():
  """The row of whoever left has its step, too."""
  done = {"step": 10, "eval/loss": 1.0}
  rows = [{"step": 9, "eval/loss": 2.0}, {"step": 10, "loss": 3.0}, done, {"step": 10, "time": 4.0}]
  assert train._evaluations(rows, 10) == [done] and not train._evaluations(rows, 8)
