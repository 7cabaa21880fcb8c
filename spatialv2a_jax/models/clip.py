"""CLIP ViT-H/14 (Apple's DFN5B, as MMAudio uses it): one vector per frame, 77 states per text.

MMAudio conditions on the projected class token of each frame and on all 77 text states after the
last norm, each scaled to unit length (`normalize`). The end token's projection, which MMAudio
leaves out, serves zero-shot labels.

Axes: b image or text, y row, x column, c colour, w text token, d width of the text tower,
f feature.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from spatialv2a_jax.models import vit
from spatialv2a_jax.models.vit import normalize

__all__ = ["FRAME_SIZE", "Clip", "Config", "build", "frame_size", "normalize"]

# MMAudio resizes frames to 384 x 384 (bicubic with antialiasing, on uint8, aspect ratio lost) for
# a network of 378: 27 x 27 patches of 14 fit, the last 6 rows and columns go unseen.
FRAME_SIZE = (384, 384)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those of DFN5B-CLIP-ViT-H-14-378.

  Attributes:
    grid: patches along each side of a picture.
    patch: pixels along each side of a patch.
    image_width: width of the image tower.
    image_layers: its blocks.
    image_heads: its attention heads.
    text_width: width of the text tower.
    text_layers: its blocks.
    text_heads: its attention heads.
    text_len: tokens of a text.
    vocab: tokens known.
    dim: features of a picture, and of a pooled text.
    dtype: of the matmuls.
  """

  grid: int = 27
  patch: int = 14
  image_width: int = 1280
  image_layers: int = 32
  image_heads: int = 16
  text_width: int = 1024
  text_layers: int = 24
  text_heads: int = 16
  text_len: int = 77
  vocab: int = 49_408
  dim: int = 1024
  dtype: str = "float32"


class Clip(NamedTuple):
  """Functions of one CLIP; parameters are a plain nested dict {image, text, logit_scale}.

  Attributes:
    init: key -> boxed parameters.
    image: (params, frames_byxc uint8 RGB) -> features_bf, before `normalize`.
    text: (params, ids_bw) -> states_bwd, pooled_bf, both before `normalize`.
  """

  init: Callable[[Array], Any]
  image: Callable[[Any, Array], Array]
  text: Callable[[Any, Array], tuple[Array, Array]]


def frame_size(config: Config) -> tuple[int, int]:
  """Returns the rows and columns of the frames that a CLIP is given."""
  side = config.grid * config.patch
  return FRAME_SIZE if side == 378 else (side, side)


def build(config: Config) -> Clip:
  """Returns the functions of a CLIP of the given sizes."""
  image_tower, text_tower = vit.towers(config)

  def init(key: Array) -> Any:
    image_key, text_key = jax.random.split(key)
    return {
      "image": image_tower.init(image_key),
      "text": text_tower.init(text_key),
      "logit_scale": nn.initializers.zeros(key, (1,)),
    }

  def image(params: Any, frames_byxc: Array) -> Array:
    x_bnd = image_tower.embed(params["image"], frames_byxc)
    return image_tower.pool(params["image"], image_tower.run(params["image"], x_bnd))

  def text(params: Any, ids_bw: Array) -> tuple[Array, Array]:
    return text_tower(params["text"], jnp.asarray(ids_bw))

  return Clip(init, image, text)
