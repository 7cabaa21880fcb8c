"""BEATs (iter3+, AS2M, fine-tuned; unilm) -> `models.beats`, without its classifier."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax.convert.engine import (
  Leaf,
  Outputs,
  Source,
  State,
  Table,
  arranged,
  copy,
  count,
  linear,
  norm,
  separate_attention,
  stack,
  then,
  under,
  weight_norm,
)
from spatialv2a_jax.models import beats

POSITIONS = "encoder.pos_conv.0"
# What shows in no shape must be as in the released configuration.
FIXED = {
  "deep_norm": True,
  "layer_norm_first": False,
  "relative_position_embedding": True,
  "gru_rel_pos": True,
  "activation_fn": "gelu",
  "input_patch_size": beats.PATCH,
}


def configure(state: State) -> beats.Config:
  """Returns the sizes; `max_distance` shows in no shape."""
  width, group_width, taps = state[weight_norm(state, POSITIONS, axis=2).keys[-1]].shape
  buckets, heads = state["encoder.layers.0.self_attn.relative_attention_bias.weight"].shape
  return beats.Config(
    embed=len(state["patch_embedding.weight"]),
    width=width,
    layers=count(state, r"encoder\.layers\.(\d+)\."),
    heads=heads,
    ffn=len(state["encoder.layers.0.fc1.bias"]),
    taps=taps,
    groups=width // group_width,
    buckets=buckets,
  )


def refine(config: beats.Config, beside: Mapping[str, Any]) -> beats.Config:
  """Returns the sizes with what the file's own `cfg` says."""
  cfg = beside.get("cfg", {})
  for name, value in FIXED.items():
    if cfg.get(name, value) != value:
      raise ValueError(f"cfg.{name} is {cfg[name]!r}, known is {value!r}")
  return dataclasses.replace(config, max_distance=int(cfg.get("max_distance", config.max_distance)))


def table(state: State, config: beats.Config) -> Table:
  """Returns the recipes. All blocks share one table of distances; files repeat it in each."""

  def block(i: int) -> Table:
    name = f"encoder.layers.{i}"
    attention = f"{name}.self_attn"
    gate = f"{attention}.grep_linear"
    parts = {
      "gate/kernel": arranged(f"{gate}.weight", "(a n) k -> k a n", a=2),
      "gate/bias": arranged(f"{gate}.bias", "(a n) -> a n", a=2),
      "gate_scale": arranged(f"{attention}.grep_a", "1 h 1 1 -> h"),
      **separate_attention(attention, config.heads, ["q_proj", "k_proj", "v_proj"], "out_proj"),
    }
    return {
      **under("attention", parts),
      **under("norm1", norm(f"{name}.self_attn_layer_norm")),
      **under("norm2", norm(f"{name}.final_layer_norm")),
      **under("mlp/up", linear(f"{name}.fc1")),
      **under("mlp/down", linear(f"{name}.fc2")),
    }

  def same(*arrays):
    if any((x != arrays[0]).any() for x in arrays):
      raise ValueError("blocks with tables of their own")
    return arrays[0]

  distances = tuple(
    key
    for i in range(config.layers)
    if (key := f"encoder.layers.{i}.self_attn.relative_attention_bias.weight") in state
  )
  return {
    "patch/kernel": arranged("patch_embedding.weight", "o 1 n m -> n m o"),
    **under("norm_patch", norm("layer_norm")),
    **under("project", linear("post_extract_proj")),
    "positions/kernel": then(weight_norm(state, POSITIONS, axis=2), "o i k -> k i o"),
    "positions/bias": copy(f"{POSITIONS}.bias"),
    **under("norm", norm("encoder.layer_norm")),
    "distances": Leaf(distances, same, lambda x: (x,) * len(distances)),
    **under("blocks", stack([block(i) for i in range(config.layers)])),
  }


def outputs(config: beats.Config, params: Any, inputs: State) -> Outputs:
  """Returns filter bank and features of sounds [b, p]."""
  audio_bp = jnp.asarray(np.asarray(inputs["audio"], np.float32))
  encode = jax.jit(beats.build(config).encode)
  return {
    "fbank": lambda: jax.jit(beats.filter_bank)(audio_bp),
    "features": lambda: encode(params, audio_bp),
  }


SOURCE = Source(
  network="beats",
  upstream="BEATs iter3+ AS2M, fine-tuned (github.com/microsoft/unilm)",
  licence="MIT",
  sizes=beats.Config,
  configure=configure,
  table=table,
  build=beats.build,
  outputs=outputs,
  ignore=(r"predictor\..*",),
  wrapper="model",
  refine=refine,
  note="the content of upstream's key 'model' without the classifier; `cfg` stays as it was",
)
