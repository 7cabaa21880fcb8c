"""ACL's ear (arXiv 2311.04066): tokens of a sound -> one vector in the place of a word.

A projector sums the tokens by factor-graph attention, after which the sum stands for the name of
what sounds in a prompt that `models.localizer` reads. The shift that turns logits into a heat map
was learned with it.

Axes: b sound, i and j token, f feature of a token, d width of a word.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spatialv2a_jax.models import layers, vit
from spatialv2a_jax.models.layers import Linear, logical

SECONDS = 10.0  # Of a sound that it was trained with; shorter ones end in silence.


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those released.

  Attributes:
    inputs: features of a token, those of `models.beats`.
    width: of a word in CLIPSeg's text tower.
    dtype: of the matmuls.
  """

  inputs: int = 2304
  width: int = 512
  dtype: str = "float32"


class Acl(NamedTuple):
  """Functions of one projector; parameters are a plain nested dict.

  Attributes:
    init: key -> boxed parameters.
    word: (params, features_bif) -> word_bd, for `localizer.Localizer.sound`.
    shift: params -> what is added to the logits of a sound before the sigmoid.
  """

  init: Callable[[Array], Any]
  word: Callable[[Any, Array], Array]
  shift: Callable[[Any], Array]


def build(config: Config) -> Acl:
  """Returns the functions of a projector of the given sizes."""
  c = config
  into = Linear((c.inputs,), (None, "width"), dtype=c.dtype)
  down = Linear((c.width,), ("width", None), dtype=c.dtype)
  square = Linear((c.width,), (None, None), dtype=c.dtype)
  single = Linear((1,), (None, None), dtype=c.dtype)
  parts = {"into": into, "down": down, "unary": square, "score": single, "x": square, "y": square}

  def init(key: Array) -> Any:
    keys = jax.random.split(key, len(parts))
    inputs = {name: jnp.zeros((1, 1, c.inputs if part in (into, down) else c.width))
              for name, part in parts.items()}  # fmt: skip
    made = {
      name: part.init(k, inputs[name])["params"]
      for (name, part), k in zip(parts.items(), keys, strict=True)
    }
    return made | {
      "factors": logical(layers.ones, None)(key, (2,)),
      "mask": {"slope": 10 * layers.ones(key, ()), "bias": 14 * layers.ones(key, ())},
    }

  def word(params: Any, features_bif: Array) -> Array:
    def apply(name, x):
      return jnp.asarray(parts[name].apply({"params": params[name]}, x), jnp.float32)

    x_bid = apply("down", vit.exact_gelu(apply("into", features_bif)))
    own_bi = apply("score", jax.nn.relu(apply("unary", x_bid)))[..., 0]
    # The mean similarity to all tokens is the similarity to their mean direction.
    others_bd = vit.normalize(apply("y", x_bid)).mean(axis=1)
    alike_bi = jnp.einsum("bid,bd->bi", vit.normalize(apply("x", x_bid)), others_bd)
    score_bi = params["factors"][0] * own_bi + params["factors"][1] * alike_bi
    return jnp.einsum("bi,bid->bd", jax.nn.softmax(score_bi, axis=-1), x_bid)

  def shift(params: Any) -> Array:
    return params["mask"]["bias"] / params["mask"]["slope"]

  return Acl(init, word, shift)
