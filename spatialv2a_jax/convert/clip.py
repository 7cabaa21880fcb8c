"""open_clip's CLIP (Apple's DFN5B ViT-H/14, as MMAudio uses it) -> `models.clip`."""

from typing import Any

import jax
import jax.numpy as jnp

from spatialv2a_jax.convert.engine import (
  WEIGHT,
  Outputs,
  Source,
  State,
  Table,
  arranged,
  copy,
  count,
  fused_attention,
  linear,
  norm,
  stack,
  under,
)
from spatialv2a_jax.models import clip

IMAGE_HEAD, TEXT_HEAD = 80, 64  # Width of one attention head; no shape shows it.


def configure(state: State) -> clip.Config:
  """Returns the sizes."""
  image_width, _, patch, _ = state["visual.conv1.weight"].shape
  vocab, text_width = state["token_embedding.weight"].shape
  return clip.Config(
    grid=round((len(state["visual.positional_embedding"]) - 1) ** 0.5),
    patch=patch,
    image_width=image_width,
    image_layers=count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
    image_heads=image_width // IMAGE_HEAD,
    text_width=text_width,
    text_layers=count(state, r"transformer\.resblocks\.(\d+)\."),
    text_heads=text_width // TEXT_HEAD,
    text_len=len(state["positional_embedding"]),
    vocab=vocab,
    dim=state["text_projection"].shape[1],
  )


def table(state: State, config: clip.Config) -> Table:
  """Returns the recipes; both projections are stored as they multiply, (in, out)."""
  del state

  def block(name: str, heads: int) -> Table:
    return {
      **under("norm1", norm(f"{name}.ln_1")),
      **under("norm2", norm(f"{name}.ln_2")),
      **under("attention", fused_attention(f"{name}.attn", heads)),
      **under("mlp/up", linear(f"{name}.mlp.c_fc")),
      **under("mlp/down", linear(f"{name}.mlp.c_proj")),
    }

  def blocks(name: str, layers: int, heads: int) -> Table:
    return stack([block(f"{name}transformer.resblocks.{i}", heads) for i in range(layers)])

  image = {
    "patch/kernel": arranged("visual.conv1.weight", WEIGHT),
    "class": copy("visual.class_embedding"),
    "positions": copy("visual.positional_embedding"),
    "project/kernel": copy("visual.proj"),
    **under("norm_pre", norm("visual.ln_pre")),
    **under("norm_post", norm("visual.ln_post")),
    **under("blocks", blocks("visual.", config.image_layers, config.image_heads)),
  }
  text = {
    "tokens": copy("token_embedding.weight"),
    "positions": copy("positional_embedding"),
    "project/kernel": copy("text_projection"),
    **under("norm", norm("ln_final")),
    **under("blocks", blocks("", config.text_layers, config.text_heads)),
  }
  scale = {"logit_scale": copy("logit_scale")}
  return under("image", image) | under("text", text) | scale


def outputs(config: clip.Config, params: Any, inputs: State) -> Outputs:
  """Returns features as open_clip and MMAudio compute them; pictures come as [b, c, y, x]."""
  net = clip.build(config)
  image, text = jax.jit(net.image), jax.jit(net.text)

  def picture():
    return image(params, jnp.asarray(inputs["image"].transpose(0, 2, 3, 1)))

  def words(i):
    return text(params, jnp.asarray(inputs["text"], jnp.int32))[i]

  return {
    "image_features": lambda: clip.normalize(picture()),
    "image_features_unnormalized": picture,
    "text_features": lambda: clip.normalize(words(0)),
    "text_hidden": lambda: words(0),
    "text_pooled": lambda: clip.normalize(words(1)),
    "text_pooled_unnormalized": lambda: words(1),
  }


SOURCE = Source(
  network="clip",
  upstream="DFN5B-CLIP ViT-H/14 (huggingface.co/apple/DFN5B-CLIP-ViT-H-14-378)",
  licence="Apple's research licence: read it before passing the weights on",
  sizes=clip.Config,
  configure=configure,
  table=table,
  build=clip.build,
  outputs=outputs,
  ignore=(r"(.*\.)?attn_mask",),
)
