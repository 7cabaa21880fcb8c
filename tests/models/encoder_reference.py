"""The frozen encoders in NumPy float64, on upstream's names: the truth of the parity tests.

Written from upstream's definitions, loop by loop, and not from the code under test; it agrees
with the PyTorch originals to 1e-6 on random weights.
"""

import math

import numpy as np
from scipy.special import erf

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


def quick_gelu(x):
  return x / (1 + np.exp(-1.702 * x))


def exact_gelu(x):
  return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def relu(x):
  return np.maximum(x, 0)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Weights:
  """A state dict seen through the layers that read it."""

  def __init__(self, state, prefix=""):
    self.state, self.prefix = state, prefix

  def __call__(self, name):
    return np.asarray(self.state[self.prefix + name], np.float64)

  def linear(self, name, x):
    return x @ self(f"{name}.weight").T + self(f"{name}.bias")

  def norm(self, name, x, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * self(f"{name}.weight") + self(f"{name}.bias")


def attention(q, k, v, heads, mask=None):
  """Softmax attention of [tokens, d] with [keys, d], head by head."""
  out = []
  for qh, kh, vh in zip(*(np.split(x, heads, axis=1) for x in (q, k, v)), strict=True):
    logits = qh @ kh.T / math.sqrt(qh.shape[1])
    if mask is not None:
      logits = np.where(mask, logits, -np.inf)
    weight = np.exp(logits - logits.max(1, keepdims=True))
    out.append(weight / weight.sum(1, keepdims=True) @ vh)
  return np.concatenate(out, axis=1)


def causal(n):
  return np.tril(np.ones((n, n), bool))


def patches(picture, size):
  """[c, y, x] -> [patches, c * size * size] in reading order; what does not fit is left out."""
  rows, columns = picture.shape[1] // size, picture.shape[2] // size
  cut = [
    picture[:, size * i : size * (i + 1), size * j : size * (j + 1)].ravel()
    for i in range(rows)
    for j in range(columns)
  ]
  return np.stack(cut)


def open_clip_block(w, name, x, heads, mask=None):
  h = w.norm(f"{name}.ln_1", x)
  h = h @ w(f"{name}.attn.in_proj_weight").T + w(f"{name}.attn.in_proj_bias")
  x = x + w.linear(f"{name}.attn.out_proj", attention(*np.split(h, 3, axis=1), heads, mask))
  h = quick_gelu(w.linear(f"{name}.mlp.c_fc", w.norm(f"{name}.ln_2", x)))
  return x + w.linear(f"{name}.mlp.c_proj", h)


def clip_image(state, picture, heads, layers):
  """Projected class token of one uint8 picture [c, y, x]."""
  w = Weights(state, "visual.")
  kernel = w("conv1.weight")
  x = (picture.transpose(1, 2, 0) / 255 - CLIP_MEAN) / CLIP_STD
  x = patches(x.transpose(2, 0, 1), kernel.shape[-1]) @ kernel.reshape(len(kernel), -1).T
  x = np.concatenate([w("class_embedding")[None], x]) + w("positional_embedding")
  x = w.norm("ln_pre", x)
  for i in range(layers):
    x = open_clip_block(w, f"transformer.resblocks.{i}", x, heads)
  return w.norm("ln_post", x[0]) @ w("proj")


def clip_text(state, ids, heads, layers):
  """All states after the last norm, and the projected one of the end token, of one text."""
  w = Weights(state)
  x = w("token_embedding.weight")[ids] + w("positional_embedding")[: len(ids)]
  for i in range(layers):
    x = open_clip_block(w, f"transformer.resblocks.{i}", x, heads, causal(len(x)))
  x = w.norm("ln_final", x)
  return x, x[ids.argmax()] @ w("text_projection")


def divided(w, name, x, heads, groups):
  """Divided attention: row 0 sees all rows; every group of rows sees row 0 and itself."""
  q, k, v = np.split(w.linear(f"{name}.qkv", x), 3, axis=1)
  out = np.empty_like(x)
  out[:1] = attention(q[:1], k, v, heads)
  for rows in groups:
    seen = [0, *rows]
    out[rows] = attention(q[rows], k[seen], v[seen], heads)
  return w.linear(f"{name}.proj", out)


def synchformer(state, frames, heads, layers):
  """Tokens [8, d] of one segment of 16 uint8 frames [z, c, y, x]."""
  w, eps = Weights(state, "vfeat_extractor."), 1e-6
  kernel = w("patch_embed_3d.proj.weight")
  frames = frames / 127.5 - 1
  times, size = len(frames) // 2, kernel.shape[-1]
  pairs = [[patches(frames[2 * t + z], size) for z in (0, 1)] for t in range(times)]
  places = len(pairs[0][0])
  x = []
  for pair in pairs:
    both = np.stack([p.reshape(places, 3, -1) for p in pair], axis=2)  # [place, c, z, pixel]
    x.append(both.reshape(places, -1) @ kernel.reshape(len(kernel), -1).T)
  x = np.stack(x) + w("patch_embed_3d.proj.bias")
  x = x + w("pos_embed")[0, 1:] + w("temp_embed")[0][:, None]
  x = np.concatenate([w("cls_token")[0] + w("pos_embed")[0, :1], x.reshape(times * places, -1)])
  index = 1 + np.arange(times * places).reshape(times, places)
  for i in range(layers):
    name = f"blocks.{i}"
    x = x + divided(w, f"{name}.timeattn", w.norm(f"{name}.norm3", x, eps), heads, index.T)
    x = x + divided(w, f"{name}.attn", w.norm(f"{name}.norm1", x, eps), heads, index)
    h = exact_gelu(w.linear(f"{name}.mlp.fc1", w.norm(f"{name}.norm2", x, eps)))
    x = x + w.linear(f"{name}.mlp.fc2", h)
  x = w.norm("norm", x, eps)
  w, out = Weights(state, "vfeat_extractor.spatial_attn_agg."), []
  for rows in index:
    y = np.concatenate([w("cls_token")[0], x[rows]])
    h = w.norm("norm1", y, eps)
    h = h @ w("self_attn.in_proj_weight").T + w("self_attn.in_proj_bias")
    y = y + w.linear("self_attn.out_proj", attention(*np.split(h, 3, axis=1), heads))
    h = exact_gelu(w.linear("linear1", w.norm("norm2", y, eps)))
    out.append((y + w.linear("linear2", h))[0])
  return np.stack(out)


def clipseg_attention(w, name, x, heads, mask=None):
  qkv = (w.linear(f"{name}.{part}_proj", x) for part in "qkv")
  return w.linear(f"{name}.out_proj", attention(*qkv, heads, mask))


def clipseg_block(w, name, x, heads, mask=None):
  x = x + clipseg_attention(w, f"{name}.self_attn", w.norm(f"{name}.layer_norm1", x), heads, mask)
  h = quick_gelu(w.linear(f"{name}.mlp.fc1", w.norm(f"{name}.layer_norm2", x)))
  return x + w.linear(f"{name}.mlp.fc2", h)


def clipseg_text(state, ids, heads, layers):
  """The end token's state, and its projection, of one text."""
  w = Weights(state, "clip.text_model.")
  x = w("embeddings.token_embedding.weight")[ids]
  x = x + w("embeddings.position_embedding.weight")
  for i in range(layers):
    x = clipseg_block(w, f"encoder.layers.{i}", x, heads, causal(len(x)))
  x = w.norm("final_layer_norm", x)[ids.argmax()]
  return x, x @ np.asarray(state["clip.text_projection.weight"], np.float64).T


def cubic(x, a=-0.75):
  x = abs(x)
  if x <= 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def enlarged(table, target):
  """[y, x, d] resized by the bicubic kernel that clamps at the edges, pixel by pixel."""
  source = len(table)
  out = np.zeros((target, table.shape[1], table.shape[2]))
  for i in range(target):
    at = (i + 0.5) * source / target - 0.5
    for j in range(math.floor(at) - 1, math.floor(at) + 3):
      out[i] += cubic(at - j) * table[min(max(j, 0), source - 1)]
  return out


def clipseg_image(state, picture, heads, layers):
  """Projected class token, and the outputs of all blocks, of one uint8 picture [c, y, x]."""
  w = Weights(state, "clip.vision_model.")
  kernel = w("embeddings.patch_embedding.weight")
  x = (picture.transpose(1, 2, 0) / 255 - CLIP_MEAN) / CLIP_STD
  x = patches(x.transpose(2, 0, 1), kernel.shape[-1]) @ kernel.reshape(len(kernel), -1).T
  table = w("embeddings.position_embedding.weight")
  side, grid = math.isqrt(len(table) - 1), math.isqrt(len(x))
  square = enlarged(table[1:].reshape(side, side, -1), grid).swapaxes(0, 1)
  square = enlarged(square, grid).swapaxes(0, 1)
  x = np.concatenate([w("embeddings.class_embedding")[None], x])
  x = x + np.concatenate([table[:1], square.reshape(grid**2, -1)])
  x = w.norm("pre_layrnorm", x)
  hidden = []
  for i in range(layers):
    x = clipseg_block(w, f"encoder.layers.{i}", x, heads)
    hidden.append(x)
  project = np.asarray(state["clip.visual_projection.weight"], np.float64)
  return w.norm("post_layernorm", x[0]) @ project.T, hidden


def clipseg_logits(state, hidden, embedding, heads=4):
  """Logits [y, x] of one picture, from the outputs of its blocks."""
  w = Weights(state, "decoder.")
  x = 0.0
  for i, depth in enumerate((9, 6, 3)):
    x = x + w.linear(f"reduces.{i}", hidden[depth])
    if i == 0:
      x = w.linear("film_mul", embedding) * x + w.linear("film_add", embedding)
    x = x + clipseg_attention(w, f"layers.{i}.self_attn", x, heads)
    x = w.norm(f"layers.{i}.layer_norm1", x)
    h = w.linear(f"layers.{i}.mlp.fc2", relu(w.linear(f"layers.{i}.mlp.fc1", x)))
    x = w.norm(f"layers.{i}.layer_norm2", x + h)
  grid = math.isqrt(len(x) - 1)
  x = x[1:].reshape(grid, grid, -1)
  kernel, padded = w("transposed_convolution.0.weight"), np.pad(x, ((1, 1), (1, 1), (0, 0)))
  x = sum(
    padded[i : i + grid, j : j + grid] @ kernel[:, :, i, j].T for i in range(3) for j in range(3)
  )
  x = relu(x + w("transposed_convolution.0.bias"))
  for i in (2, 4):
    kernel = w(f"transposed_convolution.{i}.weight")  # (in, out, y, x)
    rate = kernel.shape[-1]
    y = np.zeros((len(x) * rate, len(x) * rate, kernel.shape[1]))
    for dy in range(rate):
      for dx in range(rate):
        y[dy::rate, dx::rate] = x @ kernel[:, :, dy, dx]
    y += w(f"transposed_convolution.{i}.bias")
    x = relu(y) if i == 2 else y
  return x[..., 0]
