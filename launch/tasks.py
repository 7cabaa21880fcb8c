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
from launch import flops
from launch.evaluation import Evaluation as Evaluation
from launch.evaluation import gather as gather
from launch.listen import Listener
from spatialv2a_jax import codec, features, flow, model_folder, schema, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import attention, flow_net
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
    export: writes the model folder of a state.
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
  export: Callable[[pathlib.Path, train_step.State], None]
  row: Callable[[], Mapping[str, np.ndarray]]
  flops: Callable[[], float | None] = lambda: None
  tokens: int | None = None


def build(config: Config, mesh: Mesh, rules: sharding.Rules) -> Task:
  """Returns the task that `config["kind"]` names.

  Raises:
    UserError: for an unknown kind, a model that cannot be built, or missing data.
  """
  kinds = {"flow": flow_task, "vae": vae_task, "mono2binaural": mono2binaural_task}
  if config["kind"] not in kinds:
    raise UserError(f"config.kind={config['kind']!r} is unknown, have: {', '.join(kinds)}")
  if config["audio"] not in schema.AUDIO:
    raise UserError(f"config.audio={config['audio']!r} is unknown, have: {', '.join(schema.AUDIO)}")
  return kinds[config["kind"]](config, mesh, rules)


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


def flow_config(config: Config) -> flow_net.Config:
  """Returns the sizes of the network: those of the model, the features and the audio."""
  keys = ("clip_dim", "sync_dim", "text_dim", "text_len")
  sizes = {name: config["features"][name] for name in keys}
  channels = schema.AUDIO[config["audio"]].latent_channels
  return checked(
    flow_net.Config, "model", {**sizes, "latent_channels": channels, **config["model"]}
  )


def flow_task(config: Config, mesh: Mesh, rules: sharding.Rules) -> Task:
  """The two-ear flow model on stored latents and features."""
  audio, sizes = schema.AUDIO[config["audio"]], flow_config(config)
  device = mesh.devices.flat[0]  # Need not be one of this machine.
  about = (sizes.attention, device, sizes.dtype, sizes.width // sizes.heads)
  if sizes.attention == "cudnn" and not attention.is_fused(*about):
    raise UserError(
      "config.model.attention=cudnn is for dtype=bfloat16, heads of at most 120 in multiples of 8, "
      f"NVIDIA GPUs since Ampere; this mesh is of {device.device_kind}: use auto"
    )
  net = flow_net.build(sizes, sharding.constrainer(mesh, rules), device=device)
  objective = checked(lambda **x: flow.LossConfig(**x).checked(), "loss", config["loss"])
  encoders = checked(features.Config, "features", config["features"])
  shapes = schema.feature_shapes(
    config["seconds"],
    audio,
    clip_dim=sizes.clip_dim,
    sync_dim=sizes.sync_dim,
    text_len=sizes.text_len,
    text_dim=sizes.text_dim,
    mirror=bool(objective.mirror_weight),
  )
  folder = start_of(config["vae"], "vae")
  if folder.params and folder.config.get("audio") != audio.name:
    raise UserError(
      f"config.vae: {config['vae']} is for audio {folder.config.get('audio')!r}, this run has "
      f"{audio.name!r}"
    )
  source = Source(config, mesh, rules, "features", shapes)

  def loss(params, stats, batch, key, train=True):
    wide = schema.widen(batch)
    return flow.loss(params, stats, wide, key, net=net, config=objective, train=train)

  def values():
    if config["init_from"]:
      start = start_of(config["init_from"], "flow")
      ears = start.config["flow"].get("ears", 2)
      if ears != sizes.ears:
        again = f"convert its source again with --ears {sizes.ears}"
        raise UserError(f"config.init_from: {config['init_from']} has ears={ears}; {again}")
      return start.params["flow"], start.stats.get("flow", {})
    batches = itertools.islice(source.whole(), config["data"]["statistics"])
    mean_c, std_c = latent_statistics(batches)
    null_wf = null_text(config["data"]["path"], encoders)
    return {"frozen": {"latent_mean": mean_c, "latent_std": std_c, "null_text": null_wf}}

  def export(path, state):
    about = {
      "audio": audio.name,
      "seconds": config["seconds"],
      "features": dataclasses.asdict(encoders),
      "ear_correlation": objective.ear_correlation,
      "guidance": config["listen"]["guidance"],
      "flow": dataclasses.asdict(sizes),
    }
    params = {"flow": gather(state.ema)}
    if folder.params:
      params["vae"], about["vae"] = folder.params["vae"], folder.config["vae"]
    write(path, params, {"flow": gather(state.stats)}, about)

  hooks = Evaluation(functools.partial(loss, train=False), config, mesh, rules, source)
  if folder.params:
    decoder = codec.build(folder.config["vae"], audio)
    hooks.listener = Listener(
      flow_net.build(sizes),  # Few clips: their batch need not divide by the mesh.
      decoder,
      folder.params["vae"],
      audio,
      config["listen"],
      objective.ear_correlation,
    )
  evaluate = hooks if config["data"]["eval"] else None
  work = functools.partial(flow_flops, sizes, objective, shapes)
  tokens = sizes.ears * shapes["mean"][1] + shapes["clip"][0] + shapes["text"][0]
  stats, row = net.init_stats(), source.row
  return Task(net.init, stats, loss, values, source, evaluate, export, row, work, tokens)


def null_text(path: str, encoders: features.Config) -> np.ndarray:
  """Returns the features of no text, [w, f], by the encoder that made those of the captions.

  Args:
    path: of the shards, or SYNTHETIC.
    encoders: which encoder.

  Raises:
    UserError: the shards do not have them.
  """
  if path == SYNTHETIC or encoders.encoder == "random":
    return features.encode_text(captions.NONE, encoders)
  table = captions.Table(shards.paths(path)[0].parent)
  return schema.as_float32(table[captions.NONE])


def flow_flops(
  sizes: flow_net.Config, objective: flow.LossConfig, shapes: Mapping[str, tuple[int, ...]]
) -> float:
  """Returns the FLOPs of one clip's loss and gradient by the parameters.

  Matrix products alone, as is usual; what the backward pass recomputes is no work of the model,
  nor are products that only stand in for other operations, as some do in bfloat16.
  """
  plain = {"dtype": "float32", "activations": "float32", "attention": "xla", "gemm": False}
  net = flow_net.build(dataclasses.replace(sizes, unroll=False, remat=False, **plain))
  params = dict(sharding.unboxed(jax.eval_shape(net.init, jax.random.key(0))))
  constants = params.pop("frozen")  # Nobody needs their gradient.

  def loss(params, constants, *arguments):
    return flow.loss({**params, "frozen": constants}, *arguments, net=net, config=objective)

  batch, key = schema.synthetic_batch(shapes, 1, seed=0), jax.random.key(0)
  return float(flops.count_gradient(loss, params, constants, net.init_stats(), batch, key))


def vae_task(config: Config, mesh: Mesh, rules: sharding.Rules) -> Task:
  """The mel VAE, on stored sound of both ears."""
  audio = schema.AUDIO[config["audio"]]
  weights = checked(codec.LossConfig, "loss", config["loss"])
  try:
    net = codec.build(config["model"], audio, weights)
  except (TypeError, ValueError) as error:
    raise UserError(f"config.model: {error}") from error
  samples = schema.lengths(config["seconds"], audio).samples
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

  def export(path, state):
    about = {"audio": audio.name, "vae": dict(config["model"])}
    write(path, {"vae": gather(state.ema)}, {}, about)

  hooks = Evaluation(loss, config, mesh, rules, source) if config["data"]["eval"] else None
  return Task(net.init, {}, loss, values, source, hooks, export, source.row)


def mono2binaural_task(config: Config, mesh: Mesh, rules: sharding.Rules) -> Task:
  """The mono-to-binaural network, on pairs that are mixed on the fly."""
  from launch import binaural  # It builds on this module.

  return binaural.task(config, mesh, rules)


def latent_statistics(batches: Iterator[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean_c and std_c of the latents' posteriors, over clips, ears and frames."""
  count, total, square = 0, np.zeros(()), np.zeros(())
  for batch in batches:
    mean = batch["mean_betc"].astype(np.float64)
    variance = np.square(batch["std_betc"].astype(np.float64))
    count += mean[..., 0].size
    total = total + mean.sum((0, 1, 2))
    square = square + (np.square(mean) + variance).sum((0, 1, 2))
  mean_c = total / count
  std_c = np.sqrt(np.maximum(square / count - np.square(mean_c), 1e-8))
  return mean_c.astype(np.float32), std_c.astype(np.float32)


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


def start_of(path: str, name: str) -> model_folder.Model:
  """Returns a model folder that must hold the network `name`; an empty one for no path."""
  if not path:
    return model_folder.Model({}, {}, {})
  model = model_folder.load_model(path)
  if name not in model.params:
    raise UserError(f"model folder {path} has no network {name!r}, only {sorted(model.params)}")
  return model
