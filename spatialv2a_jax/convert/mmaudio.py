"""MMAudio's networks, versions 1 and 2, all five released sizes -> `models.flow_net`, one ear.

`two_ears` makes of it the network with two ears whose first output is dual mono.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax import flow
from spatialv2a_jax.convert.engine import (
  WEIGHT,
  Outputs,
  Source,
  State,
  Table,
  arranged,
  copy,
  count,
  linear,
  stack,
  under,
)
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import flow_net

# Width, blocks in all, latent channels, version 2.
VARIANTS = {
  "small_16k": (448, 12, 20, False),
  "small_44k": (448, 12, 40, False),
  "medium_44k": (896, 12, 40, False),
  "large_44k": (896, 21, 40, False),
  "large_44k_v2": (896, 21, 40, True),
}
SECONDS = 8.0
GUIDANCE = 4.5  # As MMAudio samples.


def configure(state: State) -> flow_net.Config:
  """Returns the sizes, all of which show in the shapes."""
  width = state["clip_cond_proj.bias"].size
  text_len, text_dim = state["empty_string_feat"].shape
  return flow_net.Config(
    width=width,
    heads=width // state["fused_blocks.0.attn.q_norm.weight"].size,
    joint_depth=count(state, r"joint_blocks\.(\d+)\."),
    ear_depth=count(state, r"fused_blocks\.(\d+)\."),
    latent_channels=state["latent_mean"].size,
    clip_dim=state["empty_clip_feat"].size,
    sync_dim=state["empty_sync_feat"].size,
    text_dim=text_dim,
    text_len=text_len,
    ears=1,
    v2="clip_input_proj.2.w1.weight" in state,
    spatial=False,
    ffn=state["global_cond_mlp.w1.weight"].shape[0],
  )


def variant(config: flow_net.Config) -> str:
  """Returns the name of a released size, or "custom"."""
  depth = config.joint_depth + config.ear_depth
  sizes = config.width, depth, config.latent_channels, config.v2
  return next((name for name, known in VARIANTS.items() if known == sizes), "custom")


def table(state: State, config: flow_net.Config) -> Table:
  """Returns the recipes of the one-ear network."""
  del state
  if config.ears != 1 or config.spatial:
    raise UserError("MMAudio has one ear and no spatial condition; a network with them stays here")
  width, heads = config.width, config.heads

  def mlp(name: str) -> Table:
    gates = f"{name}.w1.weight", f"{name}.w3.weight"
    return {
      "up/kernel": arranged(gates, "g o i ... -> g ... i o"),
      "down/kernel": arranged(f"{name}.w2.weight", WEIGHT),
    }

  def mod(name: str) -> Table:
    name = f"{name}.adaLN_modulation.1"
    return {
      "kernel": arranged(f"{name}.weight", "(n o) i -> n i o", o=width),
      "bias": arranged(f"{name}.bias", "(n o) -> n o", o=width),
    }

  def stream(name: str, pre_only: bool = False) -> Table:
    qkv, out = f"{name}.attn.qkv", f"{name}.linear1"
    parts = {  # Output channels of the first are (head, channel, {q, k, v}).
      "qkv/kernel": arranged(f"{qkv}.weight", "(h k j) i -> j i h k", h=heads, j=3),
      "qkv/bias": arranged(f"{qkv}.bias", "(h k j) -> j h k", h=heads, j=3),
      "q_norm/scale": copy(f"{name}.attn.q_norm.weight"),
      "k_norm/scale": copy(f"{name}.attn.k_norm.weight"),
      **under("mod", mod(name)),
    }
    if pre_only:
      return parts
    parts["out/kernel"] = arranged(f"{out}.weight", "o (h k) ... -> ... h k o", h=heads)
    parts["out/bias"] = copy(f"{out}.bias")
    return parts | under("mlp", mlp(f"{name}.ffn"))

  def joint(i: int) -> Table:
    name, last = f"joint_blocks.{i}", i == config.joint_depth - 1
    return {
      **under("audio", stream(f"{name}.latent_block")),
      **under("clip", stream(f"{name}.clip_block", last)),
      **under("text", stream(f"{name}.text_block", last)),
    }

  def project(name: str, index: int) -> Table:
    first, rest = linear(f"{name}_input_proj.0"), mlp(f"{name}_input_proj.{index}")
    return under("first", first) | under("mlp", rest)

  dense = 2 if config.v2 else 1  # Version 2 has an activation between the two.
  condition = {
    "null_clip": arranged("empty_clip_feat", "1 f -> f"),
    "null_sync": arranged("empty_sync_feat", "1 f -> f"),
    "sync_pos": arranged("sync_pos_emb", "1 1 s f -> s f"),
    **under("clip", project("clip", dense)),
    **under("sync", project("sync", 2)),
    **under("text", project("text", dense)),
    **under("clip_mean", linear("clip_cond_proj")),
    **under("text_mean", linear("text_cond_proj")),
    **under("global", mlp("global_cond_mlp")),
  }
  branch = stack([stream(f"fused_blocks.{i}") for i in range(config.ear_depth)])
  final = under("mod", mod("final_layer")) | under("conv", linear("final_layer.conv"))
  recipes = {
    "frozen/latent_mean": arranged("latent_mean", "1 1 c -> c"),
    "frozen/latent_std": arranged("latent_std", "1 1 c -> c"),
    "frozen/null_text": copy("empty_string_feat"),
    **under("condition", condition),
    **under("time/first", linear("t_embed.mlp.0")),
    **under("time/second", linear("t_embed.mlp.2")),
    **under("audio", project("audio", 2)),
    **under("joint_last", joint(config.joint_depth - 1)),
    **under("ears/audio", stack([branch])),
    **under("final", stack([final])),
  }
  if config.joint_depth > 1:
    recipes |= under("joint", stack([joint(i) for i in range(config.joint_depth - 1)]))
  return recipes


def two_ears(
  config: flow_net.Config, params: dict[str, Any], key: jax.Array
) -> tuple[flow_net.Config, dict[str, Any], dict[str, Any]]:
  """Returns sizes, parameters and statistics of a network with two ears that says the same twice.

  Both branches are the mono one. The ears do not hear each other (`cross_mass` 0), nothing tells
  them apart (`ear_embedding` 0), and the spatial condition is silent (scale and offset 0). All of
  these can be learned: a mass of 0 still has a gradient.

  Args:
    config: sizes of the mono network.
    params: its parameters.
    key: of the new layers of the spatial condition.
  """
  config = dataclasses.replace(config, ears=2, spatial=True)
  net = flow_net.build(config)
  fresh = jax.tree.map(np.asarray, nn.unbox(jax.jit(lambda k: net.init(k)["spatial"])(key)))
  params = dict(params)
  for name in ("ears", "final"):
    params[name] = jax.tree.map(lambda x: np.concatenate([x, x]), params[name])
  for name in ("joint", "joint_last"):
    if name in params:
      layers = (config.joint_depth - 1,) if name == "joint" else ()
      params[name] = params[name] | {"cross_mass": np.zeros((*layers, config.heads), np.float32)}
  params["ear_embedding"] = np.zeros((2, config.width), np.float32)
  zero = {name: np.zeros_like(fresh[name]) for name in ("scale", "bias", "null")}
  params["spatial"] = fresh | zero
  return config, params, jax.tree.map(np.asarray, net.init_stats())


def outputs(config: flow_net.Config, params: Any, inputs: State) -> Outputs:
  """Returns what MMAudio computes, by the names of the golden files."""
  net = flow_net.build(config)
  x0, latent = inputs["x0"], inputs["latent"]
  rows, frames = x0.shape[:2]
  cond = {
    "clip_bvf": inputs["clip_f"],
    "sync_bsf": inputs["sync_f"],
    "text_bwf": inputs["text_f"],
    "spatial_bvk": np.zeros((rows, inputs["clip_f"].shape[1], 5), np.float32),
  }

  def mono(x):
    return jnp.asarray(x)[:, None]

  @jax.jit
  def prepare(dropped, text):
    drop = dict.fromkeys(("video", "text", "spatial"), jnp.full(rows, dropped))
    stats = net.init_stats()
    with_text = cond | {"text_bwf": text}
    return net.condition(params, stats, with_text, drop, latent_len=frames, train=False)[0]

  velocity = jax.jit(net.velocity)

  def prepared(name, dropped=False, text="text_f", first=False):
    return lambda: prepare(dropped, inputs[text])[name][: 1 if first else None]

  def at(t, dropped=False):
    return lambda: velocity(
      params, mono(latent), jnp.asarray(inputs[t]), prepare(dropped, inputs["text_f"])
    )[:, 0]

  def path():
    t = inputs["t"][:, None, None]
    return (1 - t) * x0 + t * latent

  def normalized():
    return np.asarray(net.normalize(params, latent))

  def error():
    return jnp.square(at("t")() - (latent - x0)).mean(axis=(1, 2))

  def sample(steps=4, guidance=4.5, negative=None):
    text = None if negative is None else jnp.asarray(inputs[negative])
    guide = flow.guided(
      net, params, net.init_stats(), {n: jnp.asarray(x) for n, x in cond.items()},
      latent_len=frames, guidance=guidance, negative_text_bwf=text,
    )  # fmt: skip
    return jax.jit(lambda x: flow.sample(guide, x, steps=steps))(mono(x0))[:, 0]

  conditions = {
    "clip_f": "clip_bvd",
    "sync_f": "sync_btd",
    "text_f": "text_bwd",
    "clip_f_c": "clip_mean_bd",
    "text_f_c": "text_mean_bd",
  }
  table: Outputs = {}
  for theirs, ours in conditions.items():
    table[f"cond_{theirs}"] = prepared(ours)
    table[f"empty_{theirs}"] = prepared(ours, dropped=True, first=not theirs.endswith("_c"))
  return table | {
    "negative_text_f_c": prepared("text_mean_bd", text="negative_text_f"),
    "latent_normalized": normalized,
    "fm_xt": path,
    "flow": at("t"),
    "flow_empty": at("t", dropped=True),
    "flow_generic_t": at("t_generic"),
    "fm_loss": error,
    "sample": sample,
    "sample_2steps": lambda: sample(steps=2),
    "sample_negative": lambda: sample(negative="negative_text_f"),
    "sample_nocfg": lambda: sample(guidance=1.0),  # Upstream's strength 0; the condition alone.
    "sample_unnormalized": lambda: net.unnormalize(params, sample()),
  }


def about(config: flow_net.Config) -> dict[str, Any]:
  """Returns what a model folder says beside the sizes.

  Two ears start from the same noise, that of one ear with the same seed, without which they would
  not be dual mono. One ear has no spatial condition; motion is then only shown beside the sound,
  and takes no network.
  """
  return {
    "audio": "16k" if config.latent_channels == 20 else "44k",
    "seconds": SECONDS,
    "ear_correlation": 1.0,
    "guidance": GUIDANCE,
    "features": {
      "encoder": "mmaudio",
      "clip_dim": config.clip_dim,
      "sync_dim": config.sync_dim,
      "text_dim": config.text_dim,
      "text_len": config.text_len,
      "localizer": "acl" if config.ears == 2 else "motion",
    },
  }


SOURCE = Source(
  network="flow",
  upstream="MMAudio (github.com/hkchengrex/MMAudio)",
  licence="CC-BY-NC-4.0: not for commercial use",
  sizes=flow_net.Config,
  configure=configure,
  table=table,
  build=flow_net.build,
  outputs=outputs,
  ignore=(r"t_embed\.freqs", r"latent_rot", r"clip_rot"),
  about=about,
)
