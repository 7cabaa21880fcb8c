"""The same bits whatever happens to a run, and the same curve whatever it runs on.

Processes of `launch.train` train the two-ear flow network on real shards.
"""

import itertools
import random
import signal
import time

import jax
import numpy as np
import pytest

from data import captions, pipeline, shards
from spatialv2a_jax import logbook, schema, sharding
from spatialv2a_jax.training import checkpoint, recipe, train
from tests import loader_shards
from tests.processes import finish, members, together, wait_for
from tests.training import test_train_step as toy

STEPS = 24


def build(folder):
  """Shards of noise that fit the smoke variant of `configs/tiny.py`, mirrored features and all."""
  sizes = {"clip_dim": 64, "sync_dim": 64, "text_len": 8, "text_dim": 32}
  shapes = schema.feature_shapes(0.64, schema.AUDIO["16k"], mirror=True, **sizes)
  text = shapes.pop("text")

  def record(item):
    rng = np.random.default_rng(item.payload)
    noise = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    return noise | {"std": np.abs(noise["std"]), "caption": f"caption {item.payload % 5}"}

  def encode(caption):
    return np.random.default_rng(len(caption)).standard_normal(text).astype("f4")

  items = [shards.Item(f"clip{i}", i) for i in range(14)]
  shards.build(items, record, folder, shards=2, config={})
  captions.build([f"caption {i}" for i in range(5)], encode, folder, config={}, storage="bfloat16")


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
  """Starts the processes of a run on four devices, with programs that are kept for all."""
  folder = tmp_path_factory.mktemp("matrix")
  build(folder / "shards")
  started = []

  def start(workdir, count=0, steps=STEPS, verify=False, **values):
    options = {
      "steps": steps,
      "data.path": folder / "shards",
      "data.eval": "",
      "data.batch_size": 4,
      "every.checkpoint": 3,
    }
    given = [f"--config.{name}={value}" for name, value in (options | values).items()]
    config = ["--config=configs/tiny.py:smoke", f"--workdir={workdir}", *given]
    arguments = [f"--verify={workdir}"] if verify else config
    group = members(arguments, count, devices=4 // (count or 1), programs=folder / "programs")
    started.extend(group)
    return group

  yield start
  for process in started:
    process.kill()
    process.wait()


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
  bits = {name: x.tobytes() for name, x in checkpoint.whole(workdir).items()}
  parts = {name.split("/")[0] for name in bits}
  assert {"step", "params", "ema", "opt", "guard"} <= parts
  return curve, bits


@pytest.mark.slow
def test_four_devices_are_the_same_in_one_two_or_four_processes(tmp_path, launch):
  """A job of one process reduces over the network as well, and so in the same order."""
  (whole,) = launch(tmp_path / "whole", count=1, steps=8)
  out, _ = finish(whole)
  assert ", compiled in" in out
  four = launch(tmp_path / "parts", count=4, steps=8)
  wait_for(four[0], "step 4/")
  four[3].send_signal(signal.SIGTERM)
  assert "and saved" in [finish(process, code=42)[0] for process in four][0]
  two = launch(tmp_path / "parts", count=2, steps=8)
  assert "changed since then: machine.processes 4 -> 2" in [finish(x)[0] for x in two][0]
  assert sorted(result(tmp_path / "whole")[0]) == list(range(1, 9))
  assert result(tmp_path / "parts") == result(tmp_path / "whole")


@pytest.mark.slow
def test_kills_stops_and_workers_change_no_bit(tmp_path, launch):
  (whole,) = launch(tmp_path / "whole")
  finish(whole)
  expected = result(tmp_path / "whole")
  assert sorted(expected[0]) == list(range(1, STEPS + 1))

  (stopped,) = launch(tmp_path / "stopped")
  (workers,) = launch(tmp_path / "workers", **{"data.workers": 2})
  wait_for(stopped, "step 8/")
  stopped.send_signal(signal.SIGTERM)
  finish(stopped, code=42)
  (stopped,) = launch(tmp_path / "stopped", **{"data.workers": 1})

  rng = random.Random(0)
  for attempt in range(5):
    # Every other one keeps its clips in memory.
    (process,) = launch(tmp_path / "killed", **{"data.cache_gb": attempt % 2 / 1024})
    wait_for(process, "training to step")
    # A line of step 7 tells that the checkpoint of step 3 is complete: the first to resume from.
    for _ in range(rng.randrange(7) if attempt else 7):
      wait_for(process, f"/{STEPS} ")
    time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  (process,) = launch(tmp_path / "killed")
  out, _ = finish(process)
  assert "resumed at step" in out and "found compiled, read in" in out
  assert result(tmp_path / "killed") == expected
  ledger = [x for x in logbook.read_metrics(tmp_path / "killed") if "goodput" in x][-1]
  total = sum(x for name, x in ledger.items() if name.endswith("_s") and "wall" not in name
              and name.startswith("goodput/"))  # fmt: skip
  assert ledger["goodput/attempts"] == 6 and ledger["goodput/lost_s"] > 0
  assert abs(total - ledger["goodput/wall_s"]) < 0.01 * ledger["goodput/wall_s"]

  (process,) = launch(tmp_path / "killed", verify=True)
  told, _ = finish(process)
  assert "the run repeats bit for bit" in told and "are equal, bit for bit" in told
  finish(stopped)
  assert result(tmp_path / "stopped") == expected
  finish(workers)
  assert result(tmp_path / "workers") == expected


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


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 1, 2)])
def test_processes_may_each_hold_a_part_of_the_weights(tmp_path, folder, shape):
  """One device each; with `tensor` across processes, two of them have the same clips."""
  options = {"shape": shape, "steps": 8, "shards": folder, "sgd": True}
  count = int(np.prod(shape))
  out = [finish(process)[0] for process in together(tmp_path / "many", count, **options)][0]
  assert "mesh data={} fsdp={} tensor={} on {} x cpu".format(*shape, count) in out
  fit(tmp_path / "one", folder, shape, 8, [])
  assert len(curve(tmp_path / "many")) == 8
  np.testing.assert_allclose(curve(tmp_path / "many"), curve(tmp_path / "one"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 1)])
def test_a_run_on_eight_devices_goes_on_at_once_on_two_or_one(tmp_path, folder, shape):
  whole, seen = [], []
  fit(tmp_path / "one", folder, (1, 1, 1), 8, whole)
  fit(tmp_path / "two", folder, (2, 2, 2), 4, seen)
  fit(tmp_path / "two", folder, shape, 8, seen)
  np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=1e-5)
  assert seen == whole
