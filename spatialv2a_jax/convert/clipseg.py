"""Transformers' CLIPSeg (CIDAS/clipseg-rd64-refined) -> `models.localizer`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax.convert.engine import (
  WEIGHT,
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
  under,
)
from spatialv2a_jax.models import localizer, vit

HEAD = 64


def configure(state: State) -> localizer.Config:
  """Returns the sizes; the picture is 352 pixels wide whatever the table of positions."""
  vision, text = "clip.vision_model", "clip.text_model"
  image_width, _, patch, _ = state[f"{vision}.embeddings.patch_embedding.weight"].shape
  vocab, text_width = state[f"{text}.embeddings.token_embedding.weight"].shape
  return localizer.Config(
    grid=localizer.FRAME_SIZE[0] // patch,
    patch=patch,
    image_width=image_width,
    image_layers=count(state, r"clip\.vision_model\.encoder\.layers\.(\d+)\."),
    image_heads=image_width // HEAD,
    text_width=text_width,
    text_layers=count(state, r"clip\.text_model\.encoder\.layers\.(\d+)\."),
    text_heads=text_width // HEAD,
    text_len=len(state[f"{text}.embeddings.position_embedding.weight"]),
    vocab=vocab,
    dim=len(state["clip.visual_projection.weight"]),
    reduced=len(state["decoder.film_mul.bias"]),
    decoder_ffn=len(state["decoder.layers.0.mlp.fc1.bias"]),
  )


def bicubic(source: int, target: int) -> np.ndarray:
  """Returns the matrix [target, source] of PyTorch's bicubic resizing without antialiasing.

  Its kernel has a = -0.75 and clamps at the edges; JAX's has -0.5 and renormalises.
  """
  a = -0.75
  centre = (np.arange(target) + 0.5) * source / target - 0.5
  base = np.floor(centre).astype(int)
  matrix = np.zeros((target, source))
  for tap in range(-1, 3):
    x = np.abs(centre - base - tap)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    index = np.clip(base + tap, 0, source - 1)
    np.add.at(matrix, (np.arange(target), index), np.where(x <= 1, near, far))
  return matrix


def resized(positions: np.ndarray, grid: int) -> np.ndarray:
  """Returns a table of positions (class token first) for grid x grid patches."""
  rows = len(positions) - 1
  side = round(rows**0.5)
  if side == grid:
    return positions
  matrix = bicubic(side, grid)
  table = positions[1:].reshape(side, side, -1).astype(np.float64)
  table = np.einsum("yi,xj,ijd->yxd", matrix, matrix, table).reshape(grid**2, -1)
  return np.concatenate([positions[:1], table.astype(np.float32)])


def block(name: str, heads: int) -> Table:
  """Returns the recipes of one transformer layer."""
  parts = [f"{part}_proj" for part in "qkv"]
  attention = separate_attention(f"{name}.self_attn", heads, parts, "out_proj")
  return {
    **under("attention", attention),
    **under("norm1", norm(f"{name}.layer_norm1")),
    **under("norm2", norm(f"{name}.layer_norm2")),
    **under("mlp/up", linear(f"{name}.mlp.fc1")),
    **under("mlp/down", linear(f"{name}.mlp.fc2")),
  }


def table(state: State, config: localizer.Config) -> Table:
  """Returns the recipes."""
  del state

  def blocks(name: str, layers: int, heads: int) -> Table:
    return stack([block(f"clip.{name}.encoder.layers.{i}", heads) for i in range(layers)])

  def enlarge(name: str) -> Table:  # A transposed convolution's weight is (in, out, y, x).
    kernel = arranged(f"{name}.weight", "i o y x -> i y x o")
    return {"kernel": kernel, "bias": copy(f"{name}.bias")}

  vision, words = "clip.vision_model", "clip.text_model"
  image = {
    "patch/kernel": arranged(f"{vision}.embeddings.patch_embedding.weight", WEIGHT),
    "class": copy(f"{vision}.embeddings.class_embedding"),
    "positions": Leaf(
      (f"{vision}.embeddings.position_embedding.weight",),
      lambda x: resized(x, config.grid),
      lambda x: (x,),
      exact=False,
    ),
    "project/kernel": arranged("clip.visual_projection.weight", WEIGHT),
    **under("norm_pre", norm(f"{vision}.pre_layrnorm")),  # So spelt upstream.
    **under("norm_post", norm(f"{vision}.post_layernorm")),
    **under("blocks", blocks("vision_model", config.image_layers, config.image_heads)),
  }
  text = {
    "tokens": copy(f"{words}.embeddings.token_embedding.weight"),
    "positions": copy(f"{words}.embeddings.position_embedding.weight"),
    "project/kernel": arranged("clip.text_projection.weight", WEIGHT),
    **under("norm", norm(f"{words}.final_layer_norm")),
    **under("blocks", blocks("text_model", config.text_layers, config.text_heads)),
  }
  head = "decoder.transposed_convolution"
  decoder = {
    **under("film_times", linear("decoder.film_mul")),
    **under("film_plus", linear("decoder.film_add")),
    **under("smooth", linear(f"{head}.0")),
    **under("enlarge_0", enlarge(f"{head}.2")),
    **under("enlarge_1", enlarge(f"{head}.4")),
  }
  for i in range(len(localizer.EXTRACT)):
    decoder |= under(f"reduce_{i}", linear(f"decoder.reduces.{i}"))
    decoder |= under(f"block_{i}", block(f"decoder.layers.{i}", config.decoder_heads))
  parts = under("image", image) | under("text", text) | under("decoder", decoder)
  return parts | {"logit_scale": copy("clip.logit_scale")}


def outputs(config: localizer.Config, params: Any, inputs: State) -> Outputs:
  """Returns logits and embeddings; each picture [c, y, x] has a text of its own."""
  net = localizer.build(config)
  image, text, logits = jax.jit(net.image), jax.jit(net.text), jax.jit(net.logits)

  def pictures():
    return jnp.asarray(inputs["image"].transpose(0, 2, 3, 1))

  def ids():
    return jnp.asarray(inputs["input_ids"], jnp.int32)

  def words():
    return text(params, ids())

  def end_states():
    hidden, _ = vit.towers(config)[1](params["text"], ids())
    return jnp.take_along_axis(hidden, ids().argmax(axis=1)[:, None, None], axis=1)[:, 0]

  def paired(e_bf):
    return jnp.moveaxis(jnp.diagonal(logits(params, pictures(), e_bf)), -1, 0)

  return {
    "logits": lambda: paired(words()),
    "logits_given_embedding": lambda: paired(jnp.asarray(inputs["conditional_embeddings"])),
    "conditional_embeddings": words,
    "image_embeds": lambda: image(params, pictures()),
    "text_pooled": end_states,
  }


SOURCE = Source(
  network="clipseg",
  upstream="CLIPSeg (huggingface.co/CIDAS/clipseg-rd64-refined)",
  licence="Apache-2.0, by its model card",
  sizes=localizer.Config,
  configure=configure,
  table=table,
  build=localizer.build,
  outputs=outputs,
  ignore=(r".*\.position_ids",),
  note="positions are those of 352 x 352 pixels: give the vision config image_size 352",
)
