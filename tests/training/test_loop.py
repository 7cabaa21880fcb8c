"""The loop leaves the devices alone: nothing compiles twice, nothing waits for the step at work."""

import time
import types

import jax
import numpy as np
import pytest

from spatialv2a_jax import logbook
from spatialv2a_jax.training import recipe, train, train_step
from tests.training import test_train_step as toy
from tests.training.test_train import fit


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
  """A metric that notes how many steps were dispatched when it was read."""

  def __init__(self, value, read):
    self.value, self.read = value, read

  def __array__(self, dtype=None, copy=None):
    self.read()
    return np.asarray(self.value, dtype)


def test_metrics_are_read_while_the_next_step_is_at_work(tmp_path, monkeypatch):
  dispatched, when = [], {}

  def make(*arguments, **options):
    real = train_step.make_train_step(*arguments, **options)

    def run(state, batch):
      state, metrics = real(state, batch)
      dispatched.append(n := len(dispatched) + 1)
      late = {name: Late(x, lambda: when.setdefault(n, len(dispatched)))
              for name, x in metrics.items()}  # fmt: skip
      return state, late

    return types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=lambda: run))

  monkeypatch.setattr(recipe, "make_train_step", make)
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
