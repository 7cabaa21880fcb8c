"""ACL's trained parts, its audio projector and its image masker -> `models.acl`.

The rest of ACL is CLIPSeg and BEATs, which have sources of their own.
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
  copy,
  linear,
  under,
)
from spatialv2a_jax.models import acl


def configure(state: State) -> acl.Config:
  """Returns the sizes."""
  width, inputs = state["audio_proj.fc2.weight"].shape
  return acl.Config(inputs=inputs, width=width)


def table(state: State, config: acl.Config) -> Table:
  """Returns the recipes; convolutions of one tap are linear layers."""
  del state, config

  def single(name: str) -> Table:
    return {
      "kernel": arranged(f"{name}.weight", "o i 1 -> i o"),
      "bias": copy(f"{name}.bias"),
    }

  attention = "audio_proj.fga"
  return {
    **under("into", linear("audio_proj.fc1")),
    **under("down", linear("audio_proj.fc2")),
    **under("unary", single(f"{attention}.un_models.0.embed")),
    **under("score", single(f"{attention}.un_models.0.feature_reduce")),
    **under("x", single(f"{attention}.pp_models.0.embed_X")),
    **under("y", single(f"{attention}.pp_models.0.embed_Y")),
    "factors": arranged(f"{attention}.reduce_potentials.0.weight", "1 n 1 -> n"),
    "mask/slope": copy("masker_i.w"),
    "mask/bias": copy("masker_i.b"),
  }


def outputs(config: acl.Config, params: Any, inputs: State) -> Outputs:
  """Returns the word that stands for a sound, and the shift of its logits."""
  net = acl.build(config)
  word = jax.jit(net.word)
  return {
    "token": lambda: word(params, jnp.asarray(inputs["features"])),
    "shift": lambda: net.shift(params),
  }


SOURCE = Source(
  network="acl",
  upstream="ACL-SSL (github.com/swimmiing/ACL-SSL)",
  licence="none stated: ask its authors before passing the weights on",
  sizes=acl.Config,
  configure=configure,
  table=table,
  build=acl.build,
  outputs=outputs,
  note="upstream's file is nested: the keys of 'audio_proj' and of 'masker_i'",
)
