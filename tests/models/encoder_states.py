"""Random state dicts of the frozen encoders with upstream's names, small, no zeros anywhere."""

import math

import numpy as np


def fill(shapes, seed=0):
  """Returns an array per name: weights keep magnitudes near one, norms scale by about one."""
  rng = np.random.default_rng(seed)
  state = {}
  for name, shape in shapes.items():
    if name.endswith(".weight") and len(shape) == 1:
      state[name] = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("bias"):
      state[name] = rng.normal(0, 0.1, shape)
    else:
      matrix = len(shape) > 1 and not any(part in name for part in ("embed", "token"))
      state[name] = rng.normal(0, 1 / math.sqrt(math.prod(shape[1:])) if matrix else 0.5, shape)
  return {name: np.asarray(x, np.float32) for name, x in state.items()}


def layer(name, out, inputs):
  return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def norm(name, width):
  return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def fused(name, width):
  return {
    f"{name}.in_proj_weight": (3 * width, width),
    f"{name}.in_proj_bias": (3 * width,),
    **layer(f"{name}.out_proj", width, width),
  }


def clip(layers=2, image_width=160, text_width=128, dim=24, vocab=60, grid=3, length=9):
  shapes = {
    "visual.conv1.weight": (image_width, 3, 14, 14),
    "visual.class_embedding": (image_width,),
    "visual.positional_embedding": (grid**2 + 1, image_width),
    **norm("visual.ln_pre", image_width),
    **norm("visual.ln_post", image_width),
    "visual.proj": (image_width, dim),
    "token_embedding.weight": (vocab, text_width),
    "positional_embedding": (length, text_width),
    **norm("ln_final", text_width),
    "text_projection": (text_width, dim),
    "logit_scale": (1,),
  }
  for prefix, width in (("visual.", image_width), ("", text_width)):
    for i in range(layers):
      name = f"{prefix}transformer.resblocks.{i}"
      shapes |= norm(f"{name}.ln_1", width) | norm(f"{name}.ln_2", width)
      shapes |= fused(f"{name}.attn", width)
      shapes |= layer(f"{name}.mlp.c_fc", 4 * width, width)
      shapes |= layer(f"{name}.mlp.c_proj", width, 4 * width)
  return fill(shapes)


def synchformer(layers=2, width=128, grid=2, patch=16):
  shapes = {
    "cls_token": (1, 1, width),
    "pos_embed": (1, 1 + grid**2, width),
    "temp_embed": (1, 8, width),
    "patch_embed.proj.weight": (width, 3, patch, patch),
    "patch_embed.proj.bias": (width,),
    "patch_embed_3d.proj.weight": (width, 3, 2, patch, patch),
    "patch_embed_3d.proj.bias": (width,),
    **norm("norm", width),
    "spatial_attn_agg.cls_token": (1, 1, width),
    **fused("spatial_attn_agg.self_attn", width),
    **norm("spatial_attn_agg.norm1", width),
    **norm("spatial_attn_agg.norm2", width),
    **layer("spatial_attn_agg.linear1", 4 * width, width),
    **layer("spatial_attn_agg.linear2", width, 4 * width),
  }
  for i in range(layers):
    for part in ("attn", "timeattn"):
      shapes |= layer(f"blocks.{i}.{part}.qkv", 3 * width, width)
      shapes |= layer(f"blocks.{i}.{part}.proj", width, width)
    for k in (1, 2, 3):
      shapes |= norm(f"blocks.{i}.norm{k}", width)
    shapes |= layer(f"blocks.{i}.mlp.fc1", 4 * width, width)
    shapes |= layer(f"blocks.{i}.mlp.fc2", width, 4 * width)
  return fill({f"vfeat_extractor.{name}": shape for name, shape in shapes.items()})


def clipseg(width=64, text_width=64, dim=20, vocab=60, side=3, patch=32, length=9, reduced=16):
  def block(name, width, hidden):
    shapes = norm(f"{name}.layer_norm1", width) | norm(f"{name}.layer_norm2", width)
    for part in ("q", "k", "v", "out"):
      shapes |= layer(f"{name}.self_attn.{part}_proj", width, width)
    return (
      shapes | layer(f"{name}.mlp.fc1", hidden, width) | layer(f"{name}.mlp.fc2", width, hidden)
    )

  vision, text = "clip.vision_model", "clip.text_model"
  shapes = {
    f"{vision}.embeddings.class_embedding": (width,),
    f"{vision}.embeddings.patch_embedding.weight": (width, 3, patch, patch),
    f"{vision}.embeddings.position_embedding.weight": (side**2 + 1, width),
    **norm(f"{vision}.pre_layrnorm", width),
    **norm(f"{vision}.post_layernorm", width),
    "clip.visual_projection.weight": (dim, width),
    f"{text}.embeddings.token_embedding.weight": (vocab, text_width),
    f"{text}.embeddings.position_embedding.weight": (length, text_width),
    **norm(f"{text}.final_layer_norm", text_width),
    "clip.text_projection.weight": (dim, text_width),
    "clip.logit_scale": (),
    **layer("decoder.film_mul", reduced, dim),
    **layer("decoder.film_add", reduced, dim),
  }
  for i in range(11):
    shapes |= block(f"{vision}.encoder.layers.{i}", width, 4 * width)
  for i in range(2):
    shapes |= block(f"{text}.encoder.layers.{i}", text_width, 4 * text_width)
  for i in range(3):
    shapes |= layer(f"decoder.reduces.{i}", reduced, width)
    shapes |= block(f"decoder.layers.{i}", reduced, 48)
  head = "decoder.transposed_convolution"
  for i, out, taps in ((0, reduced, 3), (2, reduced // 2, patch // 4), (4, 1, 4)):
    into = reduced // 2 if i == 4 else reduced
    shapes[f"{head}.{i}.weight"] = (out, into, 3, 3) if i == 0 else (into, out, taps, taps)
    shapes[f"{head}.{i}.bias"] = (out,)
  return fill(shapes)
