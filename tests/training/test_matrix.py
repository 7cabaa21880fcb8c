"""The same bits whatever happens to a run, and the same curve whatever it runs on.

Real processes train the toy problem on real shards.
"""

import itertools
import random
import signal
import time

import jax
import numpy as np
import pytest

from data import pipeline, shards
from spatialv2a_jax import logbook, sharding
from spatialv2a_jax.training import checkpoint, recipe, train
from tests import loader_shards
from tests.processes import finish, start, together, wait_for
from tests.training import test_train_step as toy

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Small shards."""
  path = tmp_path_factory.mktemp("shards")
  loader_shards.build(path)
  return str(path)


def result(workdir):
  """Everything that must repeat: the logged curve and the bits of the last state."""
  curve = {
    x["step"]: (x["loss"], x["grad_norm"], x["param_norm"])
    for x in logbook.read_metrics(workdir)
    if "loss" in x
  }
  params, stats, _ = checkpoint.load_params(workdir, "params")
  ema, _, _ = checkpoint.load_params(workdir, "ema")
  bits = [np.asarray(x).tobytes() for x in jax.tree.leaves((params, ema, stats))]
  return curve, bits


@pytest.mark.slow
def test_kills_stops_and_workers_change_no_bit(tmp_path, folder):
  options = {"steps": STEPS, "shards": folder, "log": 4, "checkpoint": 3}
  finish(start(tmp_path / "whole", **options))
  expected = result(tmp_path / "whole")
  assert sorted(expected[0]) == list(range(4, STEPS + 1, 4))

  rng, kills = random.Random(0), 0
  while kills < 5:
    process = start(tmp_path / "killed", pause=0.1, **options)
    wait_for(process, "compiled")
    time.sleep(rng.uniform(0.1, 0.7))
    process.send_signal(signal.SIGKILL)
    kills += process.wait() == -signal.SIGKILL
  out, _ = finish(start(tmp_path / "killed", **options))
  assert "resumed at step" in out
  assert result(tmp_path / "killed") == expected

  process = start(tmp_path / "stopped", pause=0.1, **options)
  wait_for(process, "step 8/")
  process.send_signal(signal.SIGTERM)
  finish(process, code=42)
  finish(start(tmp_path / "stopped", workers=1, **options))
  assert result(tmp_path / "stopped") == expected
  finish(start(tmp_path / "workers", workers=2, **options))
  assert result(tmp_path / "workers") == expected

  ledger = [x for x in logbook.read_metrics(tmp_path / "killed") if "goodput" in x][-1]
  total = sum(x for name, x in ledger.items() if name.endswith("_s") and "wall" not in name
              and name.startswith("goodput/"))  # fmt: skip
  assert ledger["goodput/attempts"] == 6 and ledger["goodput/lost_s"] > 0
  assert abs(total - ledger["goodput/wall_s"]) < 0.01 * ledger["goodput/wall_s"]

  told, _ = finish(start(tmp_path / "killed", verify=True, **options))
  assert "the run repeats bit for bit" in told and "are equal, bit for bit" in told


@pytest.mark.slow
def test_two_processes_are_one_with_as_many_devices(tmp_path, folder):
  options = {"shards": folder, "checkpoint": 10, "shape": (2, 1, 1)}
  finish(start(tmp_path / "one", devices=2, steps=24, **options))
  for process in together(tmp_path / "both", 2, steps=12, **options):
    finish(process)
  finish(start(tmp_path / "both", devices=2, steps=24, **options))
  assert result(tmp_path / "both") == result(tmp_path / "one")


@pytest.mark.slow
def test_four_devices_are_the_same_in_one_two_or_four_processes(tmp_path, folder):
  """A job of one process reduces over the network as well, and so in the same order."""
  options = {"shards": folder, "checkpoint": 10, "shape": (4, 1, 1), "steps": 12}
  for count in (1, 2, 4):
    for process in together(tmp_path / str(count), count, devices=4 // count, **options):
      finish(process)
  first, *others = (result(tmp_path / str(count)) for count in (1, 2, 4))
  assert sorted(first[0]) == list(range(1, 13)) and others == [first, first]


def fit(workdir, folder, shape, steps, seen, checkpoint_every=100):
  """The toy problem with SGD on some of the devices of this process; `seen` collects clips."""
  devices = jax.devices()[: int(np.prod(shape))]

  def batches(start):
    source = pipeline.loader(
      shards.paths(folder), batch_size=8, seed=3, mirror=True, start_step=start
    )
    for batch in source:
      seen.append(batch["id_b"].tolist())
      rows = batch["mean_betc"].reshape(8, -1)[:, :8]
      yield {"id_b": batch["id_b"], "weight_b": batch["weight_b"], "x_bw": 0.02 * rows}

  return train.fit(
    workdir,
    recipe.Recipe(
      batches=batches,
      batch_size=8,
      loss=toy.toy_loss,
      init=toy.toy_init,
      stats={"mean": np.zeros(8, np.float32)},
      optimizer=toy.SGD,
      mesh=sharding.make_mesh(*shape, devices=devices),
    ),
    kind="toy",
    config={},
    steps=steps,
    every=train.Every(log=1, checkpoint=checkpoint_every),
    say=lambda line: None,
  )


def curve(workdir):
  return [x["loss"] for x in logbook.read_metrics(workdir) if "loss" in x]


@pytest.mark.slow
def test_a_change_of_the_mesh_in_the_middle_changes_neither_curve_nor_clips(tmp_path, folder):
  whole = []
  fit(tmp_path / "one", folder, (1, 1, 1), 22, whole)
  expected = curve(tmp_path / "one")
  assert len(expected) == 22
  # 22 steps of 8 are 8 epochs of 22 clips.
  flat = list(itertools.chain(*whole))
  epochs = [sorted(flat[i : i + loader_shards.CLIPS]) for i in range(0, len(flat), 22)]
  assert all(epoch == sorted(loader_shards.NUMBER) for epoch in epochs)

  seen, shapes = [], [(2, 4, 1), (2, 2, 2), (8, 1, 1), (4, 1, 1), (1, 2, 1), (1, 1, 1)]
  for shape, steps in zip(shapes, (4, 8, 12, 15, 18, 22), strict=True):
    fit(tmp_path / "many", folder, shape, steps, seen)
  np.testing.assert_allclose(curve(tmp_path / "many"), expected, rtol=1e-5)
  assert seen == whole
