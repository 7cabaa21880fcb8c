"""From a config to what the steps of a run are made of."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from data import shards
from launch import binaural, flow_task, tasks
from spatialv2a_jax import codec, sharding
from spatialv2a_jax.training import guard, optim, recipe
from tests import loader_shards
from tests.launch.test_train import config_of, one_device

OPTIONS = {
  "seed": 7, "accumulate": 2, "data.batch_size": 4, "rules.width": "", "rules.zero": "data",
  "ema.decay": 0.5, "ema.sigma_rel": 0.07, "ema.beside": "(0.2,)",
  "guard.sigma": 5.0, "guard.window": 9, "guard.warmup": 3, "guard.cap": 1,
  "optim.lr": 0.25, "optim.warmup": 3,
}  # fmt: skip


def test_a_recipe_has_every_value_of_its_config():
  config, mesh = config_of("tiny", "smoke", **OPTIONS), one_device()
  task, made = tasks.recipe(config, mesh)
  assert float(made.optimizer.lr(0)) == pytest.approx(0.25 / 4)
  expected = recipe.Recipe(
    batches=task.batches,
    batch_size=4,
    loss=task.loss,
    init=task.init,
    optimizer=made.optimizer,
    mesh=mesh,
    stats=task.stats,
    values=task.values,
    rules=sharding.Rules(**config["rules"]),
    ema=optim.Ema(0.5, 0.07, (0.2,)),
    seed=7,
    accumulate=2,
    guard=guard.Config(5.0, 9, 3, 1),
  )
  given = ("batches", "batch_size", "loss", "init", "optimizer", "mesh")
  usual = recipe.Recipe(**{name: getattr(made, name) for name in given})
  for name in (field.name for field in dataclasses.fields(recipe.Recipe)):
    assert getattr(made, name) == getattr(expected, name), name
    assert name in given or getattr(made, name) != getattr(usual, name), name


@pytest.mark.parametrize(
  "name, kind, shapes, source",
  [
    ("tiny", "features", loader_shards.SHAPES, tasks.Source),
    ("vae_tiny", "audio", {"audio": (2, 9)}, tasks.Source),
    ("mono2binaural", "pairs", {"image": (4, 8, 3)}, binaural.Pairs),
  ],
)
def test_noise_is_that_of_its_step_wherever_a_run_begins(monkeypatch, name, kind, shapes, source):
  """And a process has its own rows of it alone."""
  config = config_of(name, "smoke", **{"data.path": "synthetic", "data.batch_size": 4})
  read = source(config, one_device(), sharding.Rules(), kind, shapes)
  first, second = itertools.islice(read(0), 2)
  monkeypatch.setattr(sharding, "local_rows", lambda *_: (1, 3))
  same = np.testing.assert_array_equal
  for field, value in first.items():
    same(next(read(0))[field], value[1:3])
    same(next(read(1))[field], second[field][1:3])
    same(next(read.whole())[field], value)
  assert not all(np.array_equal(value, second[field]) for field, value in first.items())


@pytest.mark.parametrize(
  "name, module, function",
  [("tiny", flow_task, "latent_statistics"), ("vae_tiny", codec, "statistics")],
)
def test_a_new_run_measures_as_many_batches_as_its_config_says(monkeypatch, name, module, function):
  monkeypatch.setattr(module, function, lambda batches, *_: (0, len(list(batches))))
  options = {"path": "synthetic", "statistics": 3, "batch_size": 2}
  config = config_of(name, "smoke", **{f"data.{name}": x for name, x in options.items()})
  values = tasks.build(config, one_device(), sharding.Rules()).values()["frozen"]
  assert values["latent_std" if name == "tiny" else "data_std"] == 3


def test_a_model_folder_is_written_once(tmp_path, monkeypatch):
  """Processes that share it would write to the same files."""
  for rank in (1, 0):
    monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
    tasks.write(tmp_path / "out", {"x": {"y": np.ones(1, "f4")}}, {}, {})
    assert (tmp_path / "out").exists() == (rank == 0)


def test_a_batch_larger_than_the_data_is_told(tmp_path):
  """A clip's draws follow from its name and the step: copies in a batch are no more data."""
  items = [shards.Item(f"{i}", i, split="test" if i > 4 else "train") for i in range(8)]
  shards.build(items, lambda _: {"x": np.zeros(2)}, tmp_path, shards=2, config={})

  def source(**data):
    config = config_of("vae_tiny", "smoke", **{f"data.{name}": x for name, x in data.items()})
    return tasks.Source(config, one_device(), sharding.Rules(), "audio", {"audio": (2, 9)})

  def remarks(**data):
    return source(**data).remarks()

  (line,) = remarks(path=tmp_path, batch_size=8)
  assert line.startswith("5 clips for batches of 8: copies")
  assert remarks(path=tmp_path, batch_size=5) == remarks(path="synthetic") == []
  (line,) = remarks(path=f"{tmp_path}:test", batch_size=4)
  assert line.startswith("3 clips for batches of 4")
  digests = source(path=tmp_path, eval=f"{tmp_path}:test").digests()
  assert digests.keys() == {"path", "eval"} and digests["path"] != digests["eval"]
