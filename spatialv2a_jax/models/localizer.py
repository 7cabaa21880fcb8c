"""Where something sounds, from a text: CLIPSeg (arXiv 2112.10003) under ACL's calibration.

ACL (arXiv 2311.04066) grounds sounds with CLIPSeg: an embedding in the space of CLIP's texts goes
through two FiLM layers into a small decoder over CLIP's picture tokens, and a learned shift turns
logits into a heat map. The embedding is that of a text, so that silent video can be localised, or
that of a sound (`models.acl`).

Axes: b picture or text, y row, x column, c colour, w text token, n token, d width, r reduced
width, f feature of an embedding, o sound.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from spatialv2a_jax.models import layers, vit
from spatialv2a_jax.models.layers import Linear, logical

FRAME_SIZE = (352, 352)  # Resized with antialiased bicubic interpolation; aspect ratio lost.
SHIFT = 1.4  # ACL's shift at the start of its training: its bias 14 over its slope 10.
PROMPT = "A photo of {}"
EXTRACT = (3, 6, 9)  # Blocks of the image tower, from 0, whose outputs the decoder reads.


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those of CIDAS/clipseg-rd64-refined.

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
    dim: features of an embedding.
    reduced: width of the decoder.
    decoder_heads: its attention heads.
    decoder_ffn: hidden width of its MLPs.
    dtype: of the matmuls.
  """

  grid: int = 22
  patch: int = 16
  image_width: int = 768
  image_layers: int = 12
  image_heads: int = 12
  text_width: int = 512
  text_layers: int = 12
  text_heads: int = 8
  text_len: int = 77
  vocab: int = 49_408
  dim: int = 512
  reduced: int = 64
  decoder_heads: int = 4
  decoder_ffn: int = 2048
  dtype: str = "float32"


class Localizer(NamedTuple):
  """Functions of one localizer; parameters are a plain nested dict.

  Attributes:
    init: key -> boxed parameters.
    text: (params, ids_bw) -> embeddings e_bf of texts, not normalised: FiLM heeds their length.
    sound: (params, word_bd, ids_w) -> embeddings e_bf of a prompt, not padded, of which a word
      that a sound gave is the last before the end.
    image: (params, frames_byxc uint8 RGB) -> embeddings e_bf of whole pictures.
    logits: (params, frames_byxc, e_of) -> logits [o, b, y, x] of each sound, grid * patch a side.
    heat: (params, frames_byxc, e_of, shift) -> heat_byx in 0..1; see `heat`.
  """

  init: Callable[[Array], Any]
  text: Callable[[Any, Array], Array]
  sound: Callable[[Any, Array, Array], Array]
  image: Callable[[Any, Array], Array]
  logits: Callable[[Any, Array, Array], Array]
  heat: Callable[..., Array]


def prompts(caption: str) -> list[str]:
  """Returns ACL's prompt of each synonym of a label; commas separate them.

  Their embeddings are averaged, so that a label with synonyms stays one sound.
  """
  return [PROMPT.format(part.strip()) for part in caption.split(",") if part.strip()]


def heat(logits_obyx: Array, shift: Array | float = SHIFT) -> Array:
  """Returns how likely any of the sounds comes from a place, [b, y, x] in 0..1.

  One sound's map is sigmoid(logit + shift); ACL's slope belongs to its training alone. Sounds
  combine as independent ones.
  """
  return 1 - jnp.prod(1 - nn.sigmoid(logits_obyx + shift), axis=0)


def mirror_tta(heat_of: Callable[..., Array]) -> Callable[..., Array]:
  """Returns a `Localizer.heat` that gives mirrored maps for mirrored pictures, at twice the cost.

  The network itself is not equivariant, for its positions are learned. Each map is the mean of
  that of the picture and of the mirrored one of the mirrored picture.
  """

  def both(params: Any, frames_byxc: Array, *rest: Any) -> Array:
    frames_byxc = jnp.asarray(frames_byxc)
    pair = jnp.stack([frames_byxc, frames_byxc[:, :, ::-1]])
    seen_byx, mirrored_byx = jax.lax.map(lambda x_byxc: heat_of(params, x_byxc, *rest), pair)
    return 0.5 * (seen_byx + mirrored_byx[:, :, ::-1])

  return both


class Decoder(nn.Module):
  """Pictures' tokens of three depths and an embedding -> logits of every pixel."""

  config: Config

  @nn.compact
  def __call__(self, tokens: list[Array], e_bf: Array) -> Array:
    """Returns [b, y, x], float32.

    Args:
      tokens: outputs [b, n, d] of the EXTRACT blocks, shallow ones first, class token first.
      e_bf: embeddings.
    """
    c = self.config
    film = {"axes": (None, None), "dtype": c.dtype}
    times_br = Linear((c.reduced,), name="film_times", **film)(e_bf)
    plus_br = Linear((c.reduced,), name="film_plus", **film)(e_bf)
    x_bnr = jnp.zeros(())
    for i, x_bnd in enumerate(reversed(tokens)):  # The deepest first.
      reduce = Linear((c.reduced,), ("width", None), dtype=c.dtype, name=f"reduce_{i}")
      x_bnr = x_bnr + reduce(x_bnd)
      if i == 0:
        x_bnr = times_br[:, None] * x_bnr + plus_br[:, None]
      block = vit.Block(
        c.decoder_heads, c.decoder_ffn, nn.relu, post=True, dtype=c.dtype, name=f"block_{i}"
      )
      x_bnr = block(x_bnr)
    x_byxr = x_bnr[:, 1:].reshape(-1, c.grid, c.grid, c.reduced)
    x_byxr = nn.relu(Smooth(c.reduced, name="smooth")(x_byxr))
    x_byxr = nn.relu(Enlarge(c.reduced // 2, c.patch // 4, name="enlarge_0")(x_byxr))
    return Enlarge(1, 4, name="enlarge_1")(x_byxr)[..., 0]


class Smooth(nn.Module):
  """A 3 x 3 convolution, zero padded."""

  features: int

  @nn.compact
  def __call__(self, x_byxr: Array) -> Array:
    """Returns [b, y, x, features]."""
    shape = (3, 3, x_byxr.shape[-1], self.features)
    kernel = self.param("kernel", logical(vit.normal, *(None,) * 4), shape)
    bias = self.param("bias", logical(layers.zeros, None), (self.features,))
    y = jax.lax.conv_general_dilated(
      x_byxr, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + bias.reshape(1, 1, 1, -1)


class Enlarge(nn.Module):
  """A transposed convolution without overlap: every pixel becomes `rate` x `rate` of them."""

  features: int
  rate: int

  @nn.compact
  def __call__(self, x_byxr: Array) -> Array:
    """Returns [b, y * rate, x * rate, features]."""
    rows, height, width, inputs = x_byxr.shape
    shape = (inputs, self.rate, self.rate, self.features)
    kernel = self.param("kernel", logical(vit.normal, *(None,) * 4), shape)
    bias = self.param("bias", logical(layers.zeros, None), (self.features,))
    y = jnp.einsum("byxi,ijko->byjxko", x_byxr, kernel)
    y = y.reshape(rows, height * self.rate, width * self.rate, self.features)
    return y + bias.reshape(1, 1, 1, -1)


def build(config: Config) -> Localizer:
  """Returns the functions of a localizer of the given sizes."""
  c = config
  image_tower, words = vit.towers(c)
  decoder = Decoder(c)

  def init(key: Array) -> Any:
    image_key, text_key, decoder_key = jax.random.split(key, 3)
    tokens = [jnp.zeros((1, c.grid**2 + 1, c.image_width))] * len(EXTRACT)
    return {
      "image": image_tower.init(image_key),
      "text": words.init(text_key),
      "decoder": decoder.init(decoder_key, tokens, jnp.zeros((1, c.dim)))["params"],
      "logit_scale": nn.initializers.zeros(key, ()),
    }

  def text(params: Any, ids_bw: Array) -> Array:
    return words(params["text"], jnp.asarray(ids_bw))[1]

  def sound(params: Any, word_bd: Array, ids_w: Array) -> Array:
    prompt_wd = params["text"]["tokens"][jnp.asarray(ids_w)]
    prompt_bwd = jnp.broadcast_to(prompt_wd, (len(word_bd), *prompt_wd.shape))
    parts = [prompt_bwd[:, :-1], word_bd[:, None], prompt_bwd[:, -1:]]
    x_bwd = words.states(params["text"], jnp.concatenate(parts, axis=1))
    return words.project(params["text"], x_bwd[:, -1])

  def image(params: Any, frames_byxc: Array) -> Array:
    x_bnd = image_tower.embed(params["image"], frames_byxc)
    return image_tower.pool(params["image"], image_tower.run(params["image"], x_bnd))

  def logits(params: Any, frames_byxc: Array, e_of: Array) -> Array:
    x_bnd = image_tower.embed(params["image"], frames_byxc)
    tokens = []
    for first, last in itertools.pairwise((-1, *EXTRACT)):
      x_bnd = image_tower.run(params["image"], x_bnd, first + 1, last + 1)
      tokens.append(x_bnd)

    def one(e_f):
      e_bf = jnp.broadcast_to(e_f, (len(frames_byxc), c.dim))
      return jnp.asarray(decoder.apply({"params": params["decoder"]}, tokens, e_bf))

    return jax.lax.map(one, e_of)

  def heat_of(params: Any, frames_byxc: Array, e_of: Array, shift: float = SHIFT) -> Array:
    return heat(logits(params, frames_byxc, e_of), shift)

  return Localizer(init, text, sound, image, logits, heat_of)
