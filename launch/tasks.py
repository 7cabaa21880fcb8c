"""What can be trained: joins a model, its loss, its data and what it leaves behind.

Axes: b clip, e ear (0 left, 1 right), t latent frame, c latent channel, p sample, k descriptor.
"""

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from data import captions, layout, pipeline, shards
from launch.evaluation import Evaluation as Evaluation
from launch.evaluation import gather as gather
from spatialv2a_jax import codec, model_folder, schema, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import guard, optim, train_step
from spatialv2a_jax.training.recipe import Recipe, Values

SYNTHETIC = "synthetic"  # As a path: noise of the right shapes, for smoke runs and estimates.
Config = Mapping[str, Any]


class Task(NamedTuple):
  """Arguments of `train.fit` that depend on what is trained, and what comes after it.

  Attributes:
    init: from a key to boxed parameters.
    stats: running statistics to start from.
    loss: (params, stats, batch, key) -> (value, (metrics, new stats)); widens the batch, which
      has the dtypes of the records.
    values: parameters of a new run that come from data or from another model.
    batches: from the index of a batch to the iterator that begins there.
    evaluate: hook of the loop, or None.
    flops: () -> floating point operations of one clip's loss and gradient, or None if unknown.
    export: writes the model folder of averaged parameters and their running statistics.
    row: () -> a batch of one clip of noise, for its names, shapes and dtypes (those of
      `schema.narrow`).
    tokens: of one clip in the joint blocks of a transformer; None for another model.
  """

  init: Callable[[jax.Array], Any]
  stats: Any
  loss: train_step.Loss
  values: Callable[[], Values]
  batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]]
  evaluate: Evaluation | None
  export: Callable[[pathlib.Path, Any, Any], None]
  row: Callable[[], Mapping[str, np.ndarray]]
  flops: Callable[[], float | None] = lambda: None
  tokens: int | None = None


def build(config: Config, mesh: Mesh, rules: sharding.Rules) -> Task:
  """Returns the task that `config["kind"]` names.

  Raises:
    UserError: for an unknown kind, a model that cannot be built, or missing data.
  """
  from launch import binaural, flow_task  # They build on this module.

  kinds = {"flow": flow_task.task, "vae": vae_task, "mono2binaural": binaural.task}
  if config["kind"] not in kinds:
    raise UserError(f"config.kind={config['kind']!r} is unknown, have: {', '.join(kinds)}")
  for name in ("batch_size", "statistics", "eval_batches"):
    if (value := config["data"].get(name, 1)) < 1:
      raise UserError(f"config.data.{name}={value} is less than 1")
  if not 0 <= config["seed"] < 2**32:
    raise UserError(f"config.seed={config['seed']} is not in 0..2**32 - 1")
  if config["audio"] not in schema.AUDIO:
    raise UserError(f"config.audio={config['audio']!r} is unknown, have: {', '.join(schema.AUDIO)}")
  return kinds[config["kind"]](config, mesh, rules)


def lengths_of(config: Config) -> schema.Lengths:
  """Returns how long the parts of a clip are; UserError for one that is too short."""
  try:
    return schema.lengths(config["seconds"], schema.AUDIO[config["audio"]])
  except ValueError as error:
    raise UserError(f"config.seconds: {error}") from error


def mesh_of(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh of a config over all devices of the job, or over these."""
  return checked(functools.partial(sharding.make_mesh, devices=devices), "mesh", config["mesh"])


def recipe(config: Config, mesh: Mesh) -> tuple[Task, Recipe]:
  """Returns the task of a config, and what its steps are made of on a mesh.

  Raises:
    UserError: as `build`, or if a section is wrong, or batch or parameters do not fit the mesh.
  """
  rules = checked(sharding.Rules, "rules", config["rules"])
  task = build(config, mesh, rules)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  sharding.shardings(shapes, mesh, rules)  # Mistakes are told before anything is built.
  return task, Recipe(
    batches=task.batches,
    batch_size=config["data"]["batch_size"],
    loss=task.loss,
    init=task.init,
    stats=task.stats,
    values=task.values,
    optimizer=optim.adamw(optimizer_of(config), shapes),
    mesh=mesh,
    rules=rules,
    ema=checked(optim.Ema, "ema", config["ema"]),
    seed=config["seed"],
    accumulate=config["accumulate"],
    guard=checked(guard.Config, "guard", config.get("guard", {})),
  )


def optimizer_of(config: Config) -> optim.Config:
  """Returns the numbers of the optimiser."""
  return checked(lambda **values: optim.from_mapping(values), "optim", config["optim"])


def vae_task(config: Config, mesh: Mesh, rules: sharding.Rules) -> Task:
  """The mel VAE, on stored sound of both ears."""
  audio = schema.AUDIO[config["audio"]]
  weights = checked(lambda **x: codec.LossConfig(**x).checked(), "loss", config["loss"])
  try:
    net = codec.build(config["model"], audio, weights)
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise UserError(f"config.model: {error}") from error
  samples = lengths_of(config).samples
  source = Source(config, mesh, rules, "audio", {"audio": (2, samples)})

  def loss(params, stats, batch, key):
    value, metrics = net.loss(params, schema.widen(batch), key)
    return value, (metrics, stats)

  def values():
    if config["init_from"]:
      return start_of(config["init_from"], "vae").params["vae"]
    sound = itertools.islice(source.whole(), config["data"]["statistics"])
    mean_m, std_m = codec.statistics((schema.widen(batch)["audio_bep"] for batch in sound), audio)
    return {"frozen": {"data_mean": mean_m, "data_std": std_m}}

  def export(path, params, stats):
    del stats  # It has none.
    about = {"audio": audio.name, "vae": dict(config["model"])}
    if config["init_from"]:
      about["vae_source"] = origin(config["init_from"], "vae")
    write(path, {"vae": gather(params)}, {}, about)

  hooks = Evaluation(loss, config, mesh, rules, source) if config["data"]["eval"] else None
  return Task(net.init, {}, loss, values, source, hooks, export, source.row)


def place_of(text: str) -> tuple[pathlib.Path, str]:
  """Returns folder and split that a user means by `DIR`, which stands for "train", or `DIR:SPLIT`.

  Colons in the names of folders are none of this: it is a `DIR:SPLIT` if only `DIR` is there.
  """
  match = re.fullmatch(r"(.+):(\w*)", text)
  if match is None or pathlib.Path(text).is_dir() or not pathlib.Path(match[1]).is_dir():
    return pathlib.Path(text), shards.SPLIT
  return pathlib.Path(match[1]), match[2] or shards.SPLIT


@dataclasses.dataclass
class Source:
  """Batches of this process, from any step on."""

  config: Config
  mesh: Mesh
  rules: sharding.Rules
  kind: Any
  shapes: Mapping[str, tuple[int, ...]]

  def __call__(self, start: int, offset: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Returns the rows of this process from a batch on; `offset` clips stand before batch 0."""
    data = self.config["data"]
    options = {"mirror": data["mirror"], "workers": data["workers"], "offset": offset}
    options |= {"cache_gb": data.get("cache_gb", 0.0)}
    return self.read(data["path"], start_step=start, seed=self.config["seed"], **options)

  def whole(self) -> Iterator[dict[str, np.ndarray]]:
    """Returns all rows of the first batches, the same in every process."""
    data = self.config["data"]
    return self.read(data["path"], seed=self.config["seed"], mirror=data["mirror"], whole=True)

  def read(
    self, path: str, *, seed: int | None, whole: bool = False, **options: Any
  ) -> Iterator[dict[str, np.ndarray]]:
    """Returns the batches of a folder of shards, or synthetic ones: the rows of this process."""
    size = self.config["data"]["batch_size"]
    rows = (0, size) if whole else sharding.local_rows(self.mesh, self.rules, size)
    if path == SYNTHETIC:
      return self._noise(options.get("start_step", 0), *rows, size)
    if not path:
      raise UserError("config.data.path is empty: give the folder of the shards to train on")
    return self._load(path, batch_size=size, seed=seed, rows=rows, **options)

  def _load(self, path: str, **options: Any) -> Iterator[dict[str, np.ndarray]]:
    found = shards.paths(*place_of(path))
    return pipeline.loader(found, kind=self.kind, shapes=self.shapes, **options)

  def digests(self) -> dict[str, str]:
    """Returns what tells the data to train on and those held out from any other."""
    found: dict[str, str] = {}
    for name in ("path", "eval"):
      if (path := self.config["data"][name]) not in ("", SYNTHETIC):
        folder, split = place_of(path)
        found[name] = layout.digest(folder, split)
        if (folder / captions.FOLDER).is_dir():
          found[f"{name}_text"] = layout.digest(folder / captions.FOLDER, shards.SPLIT)
    return found

  def remarks(self) -> list[str]:
    """Returns what one may not know of the data to train on."""
    path, size = self.config["data"]["path"], self.config["data"]["batch_size"]
    if path in ("", SYNTHETIC):
      return []
    folder, split = place_of(path)
    clips = sum(shard["records"] for shard in layout.read_manifest(folder).get(split, []))
    copies = f"{clips} clips for batches of {size}: copies in a batch draw the same time and noise"
    return [copies] if clips < size else []

  def names(self) -> dict[int, str]:
    """Returns the names of the clips to train on by their numbers."""
    path = self.config["data"]["path"]
    return {} if path == SYNTHETIC else pipeline.names(shards.paths(*place_of(path)))

  def row(self) -> dict[str, np.ndarray]:
    """Returns a batch of one clip of noise."""
    return next(self._noise(0, 0, 1, 1))

  def _noise(self, step, first, last, size):
    for seed in itertools.count(step):
      if self.kind == "features":
        batch = schema.synthetic_batch(self.shapes, size, seed=seed)
      else:
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((size, *self.shapes["audio"]))
        batch = {
          "audio_bep": 0.1 * noise.astype(np.float32),
          "id_b": rng.integers(0, 2**32, size, dtype=np.uint32),
          "weight_b": np.ones(size, np.float32),
        }
      yield {name: array[first:last] for name, array in schema.narrow(batch).items()}


def write(path: pathlib.Path, *content: Any) -> None:
  """Writes a model folder, from the first process alone."""
  if jax.process_index() == 0:
    model_folder.save_model(path, *content)


def checked(kind: Callable[..., Any], section: str, values: Mapping[str, Any]) -> Any:
  """Builds a dataclass from a section of the config."""
  try:
    return kind(**values)
  except (TypeError, ValueError) as error:
    raise UserError(f"config.{section}: {error}") from error


def origin(path: str, *names: str) -> dict[str, Any]:
  """Returns what a model folder is to say of weights that began as those of `path`, by name.

  That is their licence above all. A run reads `path` at its beginning alone; later it may be gone.
  """
  if not pathlib.Path(path).is_dir():
    return {"init_from": path}
  about = model_folder.open_model(path).config
  known = next((about[key] for name in names if (key := f"{name}_source") in about), {})
  return {**known, "init_from": path}


def start_of(path: str, name: str) -> model_folder.Model:
  """Returns a model folder that must hold the network `name`; an empty one for no path."""
  if not path:
    return model_folder.Model({}, {}, {})
  model = model_folder.load_model(path)
  if name not in model.params:
    raise UserError(f"model folder {path} has no network {name!r}, only {sorted(model.params)}")
  if not isinstance(model.config.get(name), dict):
    raise UserError(f"{path}/config.json describes no model of this version: it lacks {name!r}")
  return model
