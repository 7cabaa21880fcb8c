"""Synchformer's visual encoder (MMAudio's `synchformer_state_dict.pth`) -> `models.synchformer`.

The file holds the whole synchronisation model; its audio encoder and its head are left out, and
so is a 2-D patch embedding that upstream keeps without using it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from spatialv2a_jax.convert.engine import (
  Outputs,
  Source,
  State,
  Table,
  arranged,
  count,
  fused_attention,
  linear,
  norm,
  stack,
  under,
)
from spatialv2a_jax.models import synchformer

PREFIX = "vfeat_extractor."
HEAD = 64


def configure(state: State) -> synchformer.Config:
  """Returns the sizes."""
  width, _, _, patch, _ = state[f"{PREFIX}patch_embed_3d.proj.weight"].shape
  places = state[f"{PREFIX}pos_embed"].shape[1] - 1
  return synchformer.Config(
    size=patch * round(places**0.5),
    patch=patch,
    width=width,
    layers=count(state, r"vfeat_extractor\.blocks\.(\d+)\."),
    heads=width // HEAD,
  )


def table(state: State, config: synchformer.Config) -> Table:
  """Returns the recipes. Norm 3 is that of time, 1 that of space, 2 that of the MLP."""
  del state

  def block(i: int) -> Table:
    name = f"{PREFIX}blocks.{i}"
    parts = {"norm_time": "norm3", "norm_space": "norm1", "norm_mlp": "norm2"}
    table = {p: r for ours, s in parts.items() for p, r in under(ours, norm(f"{name}.{s}")).items()}
    for ours, theirs in (("time", "timeattn"), ("space", "attn")):
      spelling = {"qkv": ("qkv.weight", "qkv.bias"), "out": "proj"}
      table |= under(ours, fused_attention(f"{name}.{theirs}", config.heads, **spelling))
    for ours, theirs in (("up", "fc1"), ("down", "fc2")):
      table |= under(f"mlp/{ours}", linear(f"{name}.mlp.{theirs}"))
    return table

  last = f"{PREFIX}spatial_attn_agg"
  return {
    **under("patch", linear(f"{PREFIX}patch_embed_3d.proj")),
    "class": arranged(f"{PREFIX}cls_token", "1 1 d -> d"),
    "places": arranged(f"{PREFIX}pos_embed", "1 p d -> p d"),
    "times": arranged(f"{PREFIX}temp_embed", "1 t d -> t d"),
    **under("blocks", stack([block(i) for i in range(config.layers)])),
    **under("norm", norm(f"{PREFIX}norm")),
    "summary_class": arranged(f"{last}.cls_token", "1 1 d -> d"),
    **under("summary/attention", fused_attention(f"{last}.self_attn", config.heads)),
    **under("summary/norm1", norm(f"{last}.norm1")),
    **under("summary/norm2", norm(f"{last}.norm2")),
    **under("summary/mlp/up", linear(f"{last}.linear1")),
    **under("summary/mlp/down", linear(f"{last}.linear2")),
  }


def outputs(config: synchformer.Config, params: Any, inputs: State) -> Outputs:
  """Returns the tokens of a video [b, n, c, y, x], by segment and in a row."""
  encode = jax.jit(synchformer.build(config).encode)

  def tokens():
    return encode(params, jnp.asarray(inputs["video"].transpose(0, 1, 3, 4, 2)))

  def by_segment():
    x = tokens()
    return x.reshape(len(x), -1, synchformer.FRAMES // 2, x.shape[-1])

  return {"sync_f": tokens, "features": by_segment}


SOURCE = Source(
  network="synchformer",
  upstream="Synchformer (github.com/v-iashin/Synchformer, as released with MMAudio)",
  licence="MIT",
  sizes=synchformer.Config,
  configure=configure,
  table=table,
  build=synchformer.build,
  outputs=outputs,
  ignore=(r"(?!vfeat_extractor\.).*", r"vfeat_extractor\.patch_embed\.proj\..*"),
  note="the visual encoder alone, without its unused 2-D patch embedding: load with strict=False",
)
