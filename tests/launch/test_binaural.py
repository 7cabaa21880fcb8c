"""Training of the mono-to-binaural network by its config, from pairs to a folder that is used."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest

from data import sources
from launch import binaural, tasks, train
from spatialv2a_jax import binauralizer, model_folder, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import mono2binaural
from spatialv2a_jax.training import optim
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]


def config_of(variant, **options):
  flags = [f"--config.{key}={value}" for key, value in options.items()]
  config = f"--config={ROOT}/configs/mono2binaural.py:{variant}"
  return train.parse(["launch.train", config, *flags, "--workdir=runs/none"])[0]


def build(config):
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  return tasks.build(config, mesh, sharding.Rules(**config["rules"]))


@pytest.mark.parametrize("variant", ["tiny", "smoke", "paper"])
def test_every_variant_builds_its_model_and_optimizer(variant):
  config = config_of(variant, **{"data.path": "synthetic", "data.batch_size": 2})
  task = build(config)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  optim.adamw(optim.from_mapping(config["optim"]), shapes)
  batch = next(task.batches(0))
  sizes = config["model"]
  assert batch["image_byxc"].shape == (2, sizes["rows"], sizes["columns"], 3)
  assert np.sqrt(np.square(batch["audio_bep"].sum(1)).mean()) == pytest.approx(0.1, rel=0.05)


def test_mistakes_are_one_line(tmp_path):
  for options, message in (
    ({"model.norm": "layer"}, "config.model: norm 'layer' is unknown"),
    ({"loss.power": 3}, "config.loss: power 3"),
    ({"audio": "44k"}, "works at 16k"),
    ({"data.mirror": True}, "config.data.mirror=True: sources are mirrored as they are cut"),
    ({"data.path": ""}, "config.data.path is empty"),
    ({"data.path": str(tmp_path)}, "no finished shards"),
  ):
    with pytest.raises(UserError, match=message):
      build(config_of("smoke", **options)).batches(0)


def test_a_run_begins_with_all_or_with_the_picture_s_part_of_a_model_folder(tmp_path):
  whole = model_folder.load_model(tiny.save_mono2binaural(tmp_path / "whole"))
  params, stats = (tree[binauralizer.NETWORK] for tree in (whole.params, whole.stats))
  stats = jax.tree.map(lambda x: x + 1, stats)
  seen = {"resnet18": params["visual"]}, {"resnet18": stats["visual"]}, {}
  model_folder.save_model(tmp_path / "resnet", *seen)
  for folder, parts in (("whole", {"visual", "audio", "apnet"}), ("resnet", {"visual"})):
    task = build(config_of("smoke", init_from=tmp_path / folder))
    values, running = task.values()
    assert set(values) == set(running) == parts
    assert set(task.stats) == {"visual", "audio", "apnet"}
    for part in parts:
      jax.tree.map(np.testing.assert_array_equal, values[part], params[part])
      jax.tree.map(
        np.testing.assert_array_equal,
        running[part],
        stats[part] if folder == "resnet" else whole.stats[binauralizer.NETWORK][part],
      )
  model_folder.save_model(tmp_path / "other", {"vae": {"x": np.zeros(1, "f4")}}, {}, {})
  with pytest.raises(UserError, match="neither 'mono2binaural' nor 'resnet18'"):
    build(config_of("smoke", init_from=tmp_path / "other")).values()
  build(config_of("smoke", init_from=tmp_path / "gone"))  # Only a new run reads it.


@pytest.fixture
def no_network(monkeypatch):
  net = types.SimpleNamespace(init=None, init_stats=dict)
  monkeypatch.setattr(mono2binaural, "build", lambda *_: net)


def test_what_is_left_says_where_the_picture_s_part_comes_from(tmp_path, no_network):
  """The licence of converted weights stays with them."""
  licence, one = {"licence": "BSD-3-Clause"}, {"x": np.ones(1, "f4")}
  model_folder.save_model(tmp_path / "r", {"resnet18": one}, {}, {"resnet18_source": licence})
  task = build(config_of("smoke", init_from=tmp_path / "r"))
  task.export(tmp_path / "out", one, {"x": 2 * one["x"]})
  model, name = model_folder.load_model(tmp_path / "out"), binauralizer.NETWORK
  assert model.config[f"{name}_source"] == licence | {"init_from": str(tmp_path / "r")}
  assert (model.params[name]["x"], model.stats[name]["x"]) == (1, 2)


def test_pairs_are_read_as_the_config_says(tmp_path, monkeypatch, no_network):
  taken = []
  monkeypatch.setattr(binaural.shards, "paths", lambda *place: place)
  monkeypatch.setattr(binaural.sources, "check_size", lambda *given: taken.append(given))
  monkeypatch.setattr(binaural.pairs, "loader", lambda *given, **more: taken.append((given, more)))
  options = {"path": f"{tmp_path}:val", "spatializer": "paper", "workers": 2, "batch_size": 3}
  config = config_of("smoke", seed=5, **{f"data.{name}": value for name, value in options.items()})
  build(config).batches(3, 4)
  size, (given, more) = taken
  assert size == (tmp_path, config["model"]["rows"], config["model"]["columns"])
  assert given == ((tmp_path, "val"), "paper")
  assert (more["start_step"], more["offset"], more["workers"]) == (3, 4, 2)
  assert (more["batch_size"], more["rows"], more["seed"]) == (3, (0, 3), 5)


def test_held_out_pairs_are_judged_by_the_running_statistics(monkeypatch, no_network):
  monkeypatch.setattr(binauralizer, "loss", lambda *_, train=True, **__: train)
  task = build(config_of("smoke", **{"data.eval": "synthetic"}))
  assert task.loss() and not task.evaluate.loss()


@pytest.mark.slow
def test_training_on_pairs_lowers_the_loss_and_leaves_a_folder_that_is_used(tmp_path):
  media = tmp_path / "media"
  for i in range(6):
    tiny.film(media / f"{i}.mp4", 1.6, seed=i, side=0.15 * (i + 0.5), sound=True)
  settings = sources.Settings(seconds=1.6, rows=32, columns=64)
  sources.build(media, tmp_path / "sources", settings, shards=1)
  run = tmp_path / "run"
  argv = [
    "launch.train", f"--config={ROOT}/configs/mono2binaural.py:smoke", f"--workdir={run}",
    f"--config.data.path={tmp_path / 'sources'}", f"--config.data.eval={tmp_path / 'sources'}",
    "--config.steps=40", "--config.optim.lr=1e-2",
  ]  # fmt: skip
  assert train.main(argv) == 0
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  losses = [row["loss"] for row in rows if "loss" in row]
  assert len(losses) == 40 and np.mean(losses[-8:]) < 0.9 * np.mean(losses[:4])
  assert any("eval/explained_apnet" in row for row in rows)
  model = model_folder.load_model(run / "model")
  assert set(model.params) == {binauralizer.NETWORK} == set(model.stats)
  assert any(x.min() > 0 for x in jax.tree.leaves(model.stats))
  net = binauralizer.Binauralizer(run)  # A run's folder stands for its model.
  mix = np.random.default_rng(0).standard_normal((2, binauralizer.WINDOW)).astype("f4")
  found = net.windows(mix, np.zeros((2, 32, 64, 3), np.uint8))
  assert np.isfinite(found).all() and found.any()
