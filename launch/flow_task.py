"""The training task of the two-ear flow network.

Axes: e ear (0 left, 1 right), t latent frame, c latent channel, w text token, f feature.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from data import captions, layout
from launch import flops, tasks
from launch.listen import Listener
from spatialv2a_jax import codec, features, flow, schema, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import attention, flow_net
from spatialv2a_jax.training import optim


def task(config: tasks.Config, mesh: Mesh, rules: sharding.Rules) -> tasks.Task:
  """The two-ear flow model on stored latents and features."""
  audio, sizes = schema.AUDIO[config["audio"]], sizes_of(config)
  device = mesh.devices.flat[0]  # Need not be one of this machine.
  about = (sizes.attention, device, sizes.dtype, sizes.width // sizes.heads)
  if sizes.attention == "cudnn" and not attention.is_fused(*about):
    raise UserError(
      "config.model.attention=cudnn is for dtype=bfloat16, heads of at most 120 in multiples of 8, "
      f"NVIDIA GPUs since Ampere; this mesh is of {device.device_kind}: use auto"
    )
  net = flow_net.build(sizes, sharding.constrainer(mesh, rules), device=device)
  objective = tasks.checked(lambda **x: flow.LossConfig(**x).checked(), "loss", config["loss"])
  encoders = tasks.checked(features.Config, "features", config["features"])
  tasks.lengths_of(config)
  shapes = schema.feature_shapes(
    config["seconds"],
    audio,
    clip_dim=sizes.clip_dim,
    sync_dim=sizes.sync_dim,
    text_len=sizes.text_len,
    text_dim=sizes.text_dim,
    mirror=bool(objective.mirror_weight),
  )
  folder = tasks.start_of(config["vae"], "vae")
  if folder.params and folder.config.get("audio") != audio.name:
    raise UserError(
      f"config.vae: {config['vae']} is for audio {folder.config.get('audio')!r}, this run has "
      f"{audio.name!r}"
    )
  _check_encoded(config, encoders, folder.sha256.get("vae"))
  source = tasks.Source(config, mesh, rules, "features", shapes)

  def loss(params, stats, batch, key, train=True):
    wide = schema.widen(batch)
    return flow.loss(params, stats, wide, key, net=net, config=objective, train=train)

  def values():
    if config["init_from"]:
      start = tasks.start_of(config["init_from"], "flow")
      ears = start.config["flow"].get("ears", 2)
      if ears != sizes.ears:
        again = f"convert its source again with --ears {sizes.ears}"
        raise UserError(f"config.init_from: {config['init_from']} has ears={ears}; {again}")
      return start.params["flow"], start.stats.get("flow", {})
    batches = itertools.islice(source.whole(), config["data"]["statistics"])
    mean_c, std_c = latent_statistics(batches)
    null_wf = null_text(config["data"]["path"], encoders)
    return {"frozen": {"latent_mean": mean_c, "latent_std": std_c, "null_text": null_wf}}

  def export(path, params, stats):
    about = {
      "audio": audio.name,
      "seconds": config["seconds"],
      "features": dataclasses.asdict(encoders),
      "ear_correlation": objective.ear_correlation,
      "guidance": config["listen"]["guidance"],
      "flow": {**dataclasses.asdict(sizes), "attention": "auto"},  # Elsewhere, another may be best.
    }
    content = {"flow": tasks.gather(params)}
    if folder.params:
      content["vae"] = folder.params["vae"]
      about |= {
        name: folder.config[name] for name in ("vae", "vae_source") if name in folder.config
      }
    if config["init_from"]:
      about["flow_source"] = tasks.origin(config["init_from"], "flow")
    tasks.write(path, content, {"flow": tasks.gather(stats)}, about)

  hooks = tasks.Evaluation(functools.partial(loss, train=False), config, mesh, rules, source)
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
  work = functools.partial(flops_per_clip, sizes, objective, shapes, tasks.optimizer_of(config))
  tokens = sizes.ears * shapes["mean"][1] + shapes["clip"][0] + shapes["text"][0]
  stats, row = net.init_stats(), source.row
  return tasks.Task(net.init, stats, loss, values, source, evaluate, export, row, work, tokens)


def sizes_of(config: tasks.Config) -> flow_net.Config:
  """Returns the sizes of the network: those of the model, the features and the audio."""
  keys = ("clip_dim", "sync_dim", "text_dim", "text_len")
  sizes = {name: config["features"][name] for name in keys}
  channels = schema.AUDIO[config["audio"]].latent_channels
  return tasks.checked(
    flow_net.Config, "model", {**sizes, "latent_channels": channels, **config["model"]}
  )


def _check_encoded(config: tasks.Config, encoders: features.Config, vae: str | None) -> None:
  """Raises UserError if shards say that they were encoded by other networks than the run has."""
  for key in ("path", "eval"):
    place = config["data"][key]
    if place in ("", tasks.SYNTHETIC):
      continue
    made = layout.read_json(tasks.place_of(place)[0] / "manifest.json").get("config", {})
    if vae and made.get("vae", vae) != vae:
      raise UserError(
        f"config.vae: {config['vae']} is not the VAE that config.data.{key}={place} was encoded "
        f"with, whose SHA-256 begins with {made['vae'][:12]}: give that one, or encode again"
      )
    for name, value in encoders.identity().items() if "features" in made else ():
      if made["features"].get(name) != value:
        raise UserError(
          f"config.features: {name}={value!r}, but config.data.{key}={place} was encoded with "
          f"{made['features'].get(name)!r}: give that, or encode again"
        )


def null_text(path: str, encoders: features.Config) -> np.ndarray:
  """Returns the features of no text, [w, f], by the encoder that made those of the captions.

  Args:
    path: of the shards, or tasks.SYNTHETIC.
    encoders: which encoder.

  Raises:
    UserError: the shards do not have them.
  """
  if path == tasks.SYNTHETIC or encoders.encoder == "random":
    return features.encode_text(captions.NONE, encoders)
  table = captions.Table(tasks.place_of(path)[0])
  return schema.as_float32(table[captions.NONE])


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


def flops_per_clip(
  sizes: flow_net.Config,
  objective: flow.LossConfig,
  shapes: Mapping[str, tuple[int, ...]],
  optimizer: optim.Config | None = None,
) -> float:
  """Returns the FLOPs of one clip's loss and of its gradient by what `optimizer` trains, or all.

  Matrix products alone, as is usual; what the backward pass recomputes is no work of the model,
  nor are products that only stand in for other operations, as some do in bfloat16.
  """
  plain = {"dtype": "float32", "activations": "float32", "attention": "xla", "gemm": False}
  net = flow_net.build(dataclasses.replace(sizes, unroll=False, remat=False, **plain))
  params = dict(sharding.unboxed(jax.eval_shape(net.init, jax.random.key(0))))
  trainable = optim.adamw(optimizer, params).trainable if optimizer else lambda tree: tree
  constants = params.pop("frozen")  # Nobody needs their gradient.

  def loss(params, constants, *arguments):
    params = trainable({**params, "frozen": constants})
    return flow.loss(params, *arguments, net=net, config=objective)

  batch, key = schema.synthetic_batch(shapes, 1, seed=0), jax.random.key(0)
  return float(flops.count_gradient(loss, params, constants, net.init_stats(), batch, key))
