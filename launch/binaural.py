"""The training task of the mono-to-binaural network.

Axes: b pair, e ear (0 left, 1 right), p audio sample, y row, x column, c colour.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from data import pairs, shards
from launch import sources, tasks
from spatialv2a_jax import binauralizer, model_folder, schema, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import mono2binaural

AUDIO = "16k"
RESNET = "resnet18"  # A network of ImageNet weights to begin with.


def task(config: tasks.Config, mesh: Mesh, rules: sharding.Rules) -> tasks.Task:
  """Returns what `train.fit` needs; the model folder has one network, `mono2binaural`."""
  if config["audio"] != AUDIO:
    raise UserError(f"config.audio={config['audio']!r}: this network works at {AUDIO}")
  if config["data"]["mirror"]:
    raise UserError("config.data.mirror=True: sources are mirrored as they are cut, leave it False")
  sizes = tasks.checked(mono2binaural.Config, "model", config["model"])
  objective = tasks.checked(binauralizer.LossConfig, "loss", config["loss"])
  net = mono2binaural.build(sizes, sharding.constrainer(mesh, rules))
  loss = functools.partial(binauralizer.loss, net=net, heads=sizes.heads, config=objective)
  source = Pairs(config, mesh, rules, "pairs", {"image": (sizes.rows, sizes.columns, 3)})

  def export(path, params, stats):
    name = binauralizer.NETWORK
    about: dict[str, Any] = {"audio": AUDIO, name: dataclasses.asdict(sizes)}
    if config["init_from"]:
      about[f"{name}_source"] = tasks.origin(config["init_from"], name, RESNET)
    tasks.write(path, {name: tasks.gather(params)}, {name: tasks.gather(stats)}, about)

  held_out = functools.partial(loss, train=False)
  hooks = (
    tasks.Evaluation(held_out, config, mesh, rules, source) if config["data"]["eval"] else None
  )
  values = functools.partial(_start, config["init_from"])
  return tasks.Task(net.init, net.init_stats(), loss, values, source, hooks, export, source.row)


def _start(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns parameters and running statistics to begin with: all, the picture's part, or none."""
  if not path:
    return {}, {}
  model, name = model_folder.load_model(path), binauralizer.NETWORK
  if name in model.params:
    return model.params[name], model.stats[name]
  if RESNET in model.params:
    return {"visual": model.params[RESNET]}, {"visual": model.stats[RESNET]}
  raise UserError(
    f"config.init_from: {path} has neither {name!r} nor {RESNET!r}, only {sorted(model.params)}"
  )


class Pairs(tasks.Source):
  """Batches of pairs mixed on the fly."""

  def _load(self, path: str, **options: Any) -> Iterator[dict[str, np.ndarray]]:
    folder, split = tasks.place_of(path)
    sources.check_size(folder, *self.shapes["image"][:2])
    options.pop("mirror", None)  # Sources are mirrored as they are cut.
    return pairs.loader(shards.paths(folder, split), self.config["data"]["spatializer"], **options)

  def _noise(self, step, first, last, size):
    for number in itertools.count(step):
      rng = np.random.default_rng(number)
      audio_bep = rng.standard_normal((size, 2, schema.PAIR_SAMPLES)) * schema.PAIR_LEVEL / 2**0.5
      image_byxc = rng.integers(0, 256, (size, *self.shapes["image"]), dtype=np.uint8)
      batch = {
        "id_b": np.arange(size, dtype=np.uint32),
        "audio_bep": audio_bep.astype(np.float32),
        "image_byxc": image_byxc,
        "weight_b": np.ones(size, np.float32),
      }
      yield {name: array[first:last] for name, array in batch.items()}
