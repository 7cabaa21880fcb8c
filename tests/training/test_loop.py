"""The loop leaves the devices alone: nothing compiles twice, nothing waits for the step at work."""

import json
import time
import types

import jax
import numpy as np
import pytest

from spatialv2a_jax import goodput, logbook
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import checkpoint, cluster, meter, recipe, train, train_step
from tests.training import test_train_step as toy
from tests.training.test_train import fit, lines


def test_nothing_compiles_after_the_second_step(tmp_path):
  step, compiled = [0], []

  def listen(event, duration_secs, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(step[0])

  def say(line):
    if line.startswith("step "):
      step[0] = int(line.split()[1].partition("/")[0])

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    fit(tmp_path, steps=8, say=say, every=train.Every(log=1, checkpoint=3))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled and step == [8] and max(compiled) <= 2


def test_compiling_is_told_before_it_begins_and_is_its_own_stage(tmp_path, monkeypatch):
  told = []

  def slow(function):
    def run(*arguments):
      time.sleep(0.5)
      return function(*arguments)

    return run

  def make(*arguments, **options):
    real = train_step.make_train_step(*arguments, **options)

    def lower(*arguments):
      assert told[-1] == "compiling the train step ..."
      return slow(real.lower)(*arguments)

    return types.SimpleNamespace(lower=lower)

  def init(*arguments):
    create, *rest = train_step.init_state(*arguments)
    return slow(create), *rest

  monkeypatch.setattr(recipe, "make_train_step", make)
  monkeypatch.setattr(recipe, "init_state", init)
  fit(tmp_path, steps=2, say=told.append)
  first, *_, last = logbook.read_metrics(tmp_path)
  assert first["goodput/compile_s"] >= 0.5  # The state is there, the step is not compiled yet.
  assert last["goodput/compile_s"] >= first["goodput/compile_s"] + 0.5
  assert told.index("compiling the train step ...") + 1 == next(
    i for i, line in enumerate(told) if line.startswith("traced in")
  )


class Late:
  """A metric that calls a function when it is read."""

  def __init__(self, value, read, is_ready=lambda: False):
    self.value, self.read, self.is_ready = value, read, is_ready

  def __array__(self, dtype=None, copy=None):
    self.read()
    return np.asarray(self.value, dtype)


def replace_metrics(monkeypatch, late):
  """Makes each metric of a step `late(value)`."""

  def make(*arguments, **options):
    real = train_step.make_train_step(*arguments, **options)

    def run(state, batch):
      state, metrics = real(state, batch)
      return state, late(metrics)

    return types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=lambda: run))

  monkeypatch.setattr(recipe, "make_train_step", make)


def test_metrics_are_read_while_the_next_step_is_at_work(tmp_path, monkeypatch):
  dispatched, when = [], {}

  def late(metrics):
    dispatched.append(n := len(dispatched) + 1)
    read = lambda: when.setdefault(n, len(dispatched))  # noqa: E731
    return {name: Late(x, read) for name, x in metrics.items()}

  replace_metrics(monkeypatch, late)
  monkeypatch.setattr(jax, "block_until_ready", lambda x: x)
  fit(tmp_path, steps=9, every=train.Every(log=4, checkpoint=6))
  # At once only before a line of the log, a save and the end.
  assert when == {1: 2, 2: 3, 3: 4, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8, 9: 9}


def test_every_copy_to_a_device_is_asked_for(tmp_path):
  """Arrays that slip into the step as they are would be copied while the device waits."""

  def batches(start):
    for index in range(start, 8):
      if index == 3:
        jax.config.update("jax_transfer_guard", "disallow")
      yield toy.toy_batch(index)

  try:
    fit(tmp_path, steps=8, batches=batches, every=train.Every(log=2, checkpoint=4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
      jax.jit(lambda x: x + 1)(np.ones(3, np.float32))
  finally:
    jax.config.update("jax_transfer_guard", "allow")


@pytest.mark.parametrize("step, wait, share", [(0.2, 0.1, 0.0), (0.1, 0.2, 0.5)])
def test_only_what_the_devices_wait_for_counts_as_waiting(tmp_path, monkeypatch, step, wait, share):
  """Steps that take `step` seconds after they were dispatched, batches that take `wait`."""
  end = [0.0]

  def late(metrics):
    at = end[0] = max(time.monotonic(), end[0]) + step
    read = lambda: time.sleep(max(at - time.monotonic(), 0))  # noqa: E731
    ready = lambda: time.monotonic() >= at  # noqa: E731
    return {name: Late(x, read, ready) for name, x in jax.device_get(metrics).items()}

  def batches(start):
    for index in range(start, 100):
      time.sleep(wait)
      yield toy.toy_batch(index)

  replace_metrics(monkeypatch, late)
  monkeypatch.setattr(jax, "device_count", lambda: 1)  # Several, on a CPU, go in lockstep.
  fit(tmp_path, steps=12, batches=batches, every=train.Every(log=6, checkpoint=100))
  row, ledger = lines(tmp_path)[-1], last(tmp_path)
  assert share - 0.2 < row["data_wait"] < share + 0.2
  assert ledger["goodput/step_s"] > 0.8 * 12 * step
  assert row["clips_per_s"] == pytest.approx(8 / max(step, wait), rel=0.3)


def last(workdir):
  return train.read_metrics(workdir)[-1]


def damaged(*numbers, most=None):
  """Makes batches of a source that has passed over these records."""

  class Source:
    bad, max_bad = numbers, most

    def __init__(self, start):
      self.index = start

    def __iter__(self):
      return self

    def __next__(self):
      self.index += 1
      return toy.toy_batch(self.index, 8)

  return Source


def test_damaged_records_of_all_processes_together_end_the_run(tmp_path, monkeypatch):
  """Each alone may meet with few of them."""
  source = damaged(4, 5, most=3)
  monkeypatch.setattr(cluster, "union", lambda name, numbers: {*numbers, 6})
  fit(tmp_path, steps=2, batches=source)
  assert lines(tmp_path)[-1]["bad_records"] == 3
  monkeypatch.setattr(cluster, "union", lambda name, numbers: {*numbers, 6, 7})
  with pytest.raises(UserError, match="4 damaged records, more than 3"):
    fit(tmp_path, steps=4, batches=source)


def test_damaged_records_of_before_a_resume_count_with_those_after_it(tmp_path):
  for steps, number, known in ((1, 7, [7]), (2, 3, [3, 7])):
    fit(tmp_path, steps=steps, batches=damaged(number))
    saved = json.loads(checkpoint.saved_runs(tmp_path)[steps].read_text())
    assert saved["bad_records"] == known and lines(tmp_path)[-1]["bad_records"] == len(known)


def test_rates_are_clips_over_the_seconds_of_their_steps(tmp_path, monkeypatch):
  """By a clock that only the loader moves."""
  now = [time.monotonic()]
  clock = types.SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0])
  monkeypatch.setattr(goodput, "time", clock)
  monkeypatch.setitem(meter.PEAK_FLOPS, jax.devices()[0].device_kind, 1e6)

  def batches(start):
    for index in range(start, 100):
      now[0] += 3
      yield toy.toy_batch(index)

  every = train.Every(log=2, checkpoint=100)
  more = {"flops_per_clip": 5e6, "tokens_per_clip": 7}
  fit(tmp_path, steps=6, batches=batches, every=every, **more)
  first, row, _ = lines(tmp_path)
  clips = 2 * 8 / 6  # Two batches came in two steps; what came before the first is no part of it.
  assert first["clips_per_s"] == pytest.approx(clips) == row["clips_per_s"]
  assert row["tokens_per_s"] == pytest.approx(7 * clips) and row["data_wait"] == 1
  assert row["mfu"] == pytest.approx(5e6 * clips / (1e6 * jax.device_count()))
