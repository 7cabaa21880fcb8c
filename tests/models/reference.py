"""MMAudio's one-ear network in NumPy float64, on upstream's names: the truth of the parity tests.

Checked against the PyTorch original (v1 at 8 s and 5 s, v2 at 8 s; width 128, two heads, random
weights): its flow differs from PyTorch's float32 by 7e-6 (v1) and 4e-4 (v2, whose time embedding
amplifies the rounding of t) at a magnitude of 6.
"""

import math

import numpy as np


def silu(x):
  return x / (1 + np.exp(-x))


def selu(x):
  negative = 1.6732632423543772 * np.expm1(np.minimum(x, 0))
  return 1.0507009873554805 * np.where(x > 0, x, negative)


def layer_norm(x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def rms_norm(x, weight):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 2.0**-23) * weight


def rotate(x, scale):  # [b, t, h, k]
  t, k = x.shape[1], x.shape[3]
  angle = np.arange(t)[:, None] * scale * 10_000.0 ** (-np.arange(0, k, 2) / k)
  turn = np.exp(1j * angle)[None, :, None]
  z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
  return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


class Reference:
  """The network of a state dict; `depth` counts joint and fused blocks."""

  def __init__(self, state, *, heads, joint_depth, ear_depth, v2):
    self.w = {name: np.asarray(value, np.float64) for name, value in state.items()}
    self.heads, self.joint_depth, self.ear_depth, self.v2 = heads, joint_depth, ear_depth, v2

  def linear(self, name, x):
    """Dense or, if the weight has taps, convolutional; with a bias if there is one."""
    w = self.w[f"{name}.weight"]
    bias = self.w.get(f"{name}.bias", 0)
    if w.ndim == 2:
      return x @ w.T + bias
    taps = w.shape[2]
    p = np.pad(x, ((0, 0), (taps // 2, taps // 2), (0, 0)))
    return sum(p[:, j : j + x.shape[1]] @ w[:, :, j].T for j in range(taps)) + bias

  def mlp(self, name, x):
    gate, value = self.linear(f"{name}.w1", x), self.linear(f"{name}.w3", x)
    return self.linear(f"{name}.w2", silu(gate) * value)

  def project(self, name, x):
    convolves = name in ("audio", "sync")
    x = self.linear(f"{name}_input_proj.0", x)
    if self.v2:
      x = silu(x)
    elif convolves:
      x = selu(x)
    return self.mlp(f"{name}_input_proj.{2 if self.v2 or convolves else 1}", x)

  def condition(self, clip, sync, text, latent_len):
    """Returns tokens and vectors; the index of the upsampling is PyTorch's float32 rule."""
    sync = sync + np.tile(self.w["sync_pos_emb"][0, 0], (sync.shape[1] // 8, 1))
    clip, sync, text = (
      self.project(n, np.asarray(x, np.float64))
      for n, x in (("clip", clip), ("sync", sync), ("text", text))
    )
    half = np.arange(latent_len, dtype=np.float32) + np.float32(0.5)
    index = (half * (np.float32(sync.shape[1]) / np.float32(latent_len))).astype(int)
    clip_c = self.linear("clip_cond_proj", clip.mean(1))
    text_c = self.linear("text_cond_proj", text.mean(1))
    glob = self.mlp("global_cond_mlp", clip_c + text_c)
    return {"clip": clip, "sync": sync[:, index], "text": text, "global": glob}

  def mods(self, name, c, parts):
    return np.split(self.linear(f"{name}.adaLN_modulation.1", silu(c)), parts, axis=-1)

  def qkv(self, name, x, mods, scale):
    h = self.linear(f"{name}.attn.qkv", layer_norm(x) * (1 + mods[1]) + mods[0])
    q, k, v = np.moveaxis(h.reshape(*h.shape[:2], self.heads, -1, 3), -1, 0)
    q = rms_norm(q, self.w[f"{name}.attn.q_norm.weight"])
    k = rms_norm(k, self.w[f"{name}.attn.k_norm.weight"])
    return (q, k, v) if scale is None else (rotate(q, scale), rotate(k, scale), v)

  def attend(self, q, k, v):
    logits = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    return np.einsum("bhts,bshk->bthk", softmax(logits), v).reshape(*q.shape[:2], -1)

  def post(self, name, x, out, mods):
    x = x + self.linear(f"{name}.linear1", out) * mods[2]
    h = layer_norm(x) * (1 + mods[4]) + mods[3]
    return x + self.mlp(f"{name}.ffn", h) * mods[5]

  def flow(self, x, t, prepared):
    """Returns the velocity [b, t, c]."""
    size, top = (self.w["t_embed.mlp.0.weight"].shape[1], 1e4 if self.v2 else 1.0)
    angle = np.asarray(t, np.float64)[:, None] * top * 10_000.0 ** (-np.arange(0, size, 2) / size)
    time = self.linear("t_embed.mlp.0", np.concatenate([np.cos(angle), np.sin(angle)], -1))
    g = (self.linear("t_embed.mlp.2", silu(time)) + prepared["global"])[:, None]
    c = g + prepared["sync"]
    x = self.project("audio", np.asarray(x, np.float64))
    clip, text = prepared["clip"], prepared["text"]
    n, v = x.shape[1], clip.shape[1]
    for i in range(self.joint_depth):
      last = i == self.joint_depth - 1
      names = [f"joint_blocks.{i}.{kind}_block" for kind in ("latent", "clip", "text")]
      tokens = [x, clip, text]
      parts = [6, 2, 2] if last else [6, 6, 6]
      mods = [self.mods(m, y, k) for m, y, k in zip(names, (c, g, g), parts, strict=True)]
      scales = [1.0, n / v, None]
      args = zip(names, tokens, mods, scales, strict=True)
      out = self.attend(*map(lambda *a: np.concatenate(a, 1), *(self.qkv(*a) for a in args)))
      x = self.post(names[0], x, out[:, :n], mods[0])
      if not last:
        clip = self.post(names[1], clip, out[:, n : n + v], mods[1])
        text = self.post(names[2], text, out[:, n + v :], mods[2])
    for i in range(self.ear_depth):
      name = f"fused_blocks.{i}"
      mods = self.mods(name, c, 6)
      x = self.post(name, x, self.attend(*self.qkv(name, x, mods, 1.0)), mods)
    shift, scale = self.mods("final_layer", g, 2)
    return self.linear("final_layer.conv", layer_norm(x) * (1 + scale) + shift)


def random_state(seed, *, width, heads, joint_depth, ear_depth, channels, dims, text_len, v2):
  """Returns a random state dict with upstream's names and shapes, no zeros anywhere."""
  rng = np.random.default_rng(seed)
  hidden = 256 * math.ceil(int(8 * width / 3) / 256)
  clip_dim, sync_dim, text_dim = dims
  k = width // heads
  state = {}

  def linear(name, out, inputs, taps=0, bias=True):
    shape = (out, inputs, taps) if taps else (out, inputs)
    bound = 1 / math.sqrt(inputs * max(taps, 1))
    state[f"{name}.weight"] = rng.normal(0, bound, shape)
    if bias:
      state[f"{name}.bias"] = rng.normal(0, 0.1, out)

  def mlp(name, taps):
    for part, (out, inputs) in {"w1": (hidden, width), "w2": (width, hidden)}.items():
      linear(f"{name}.{part}", out, inputs, taps, bias=False)
    linear(f"{name}.w3", hidden, width, taps, bias=False)

  def stream(name, taps, parts):
    linear(f"{name}.adaLN_modulation.1", parts * width, width)
    linear(f"{name}.attn.qkv", 3 * width, width)
    for norm in ("q_norm", "k_norm"):
      state[f"{name}.attn.{norm}.weight"] = rng.uniform(0.5, 1.5, k)
    if parts == 6:
      linear(f"{name}.linear1", width, width, taps)
      mlp(f"{name}.ffn", taps)

  dense = 2 if v2 else 1
  for name, inputs, first, index, taps in (
    ("audio", channels, 7, 2, 7),
    ("clip", clip_dim, 0, dense, 3),
    ("sync", sync_dim, 7, 2, 3),
    ("text", text_dim, 0, dense, 0),
  ):
    linear(f"{name}_input_proj.0", width, inputs, first)
    mlp(f"{name}_input_proj.{index}", taps)
  for name in ("clip_cond_proj", "text_cond_proj"):
    linear(name, width, width)
  mlp("global_cond_mlp", 0)
  linear("t_embed.mlp.0", width, width if v2 else 256)
  linear("t_embed.mlp.2", width, width)
  for i in range(joint_depth):
    parts = 2 if i == joint_depth - 1 else 6
    stream(f"joint_blocks.{i}.latent_block", 3, 6)
    stream(f"joint_blocks.{i}.clip_block", 3, parts)
    stream(f"joint_blocks.{i}.text_block", 0, parts)
  for i in range(ear_depth):
    stream(f"fused_blocks.{i}", 3, 6)
  linear("final_layer.adaLN_modulation.1", 2 * width, width)
  linear("final_layer.conv", channels, width, 7)
  state |= {
    "latent_mean": rng.normal(size=(1, 1, channels)),
    "latent_std": rng.uniform(0.5, 2, (1, 1, channels)),
    "empty_string_feat": rng.normal(size=(text_len, text_dim)),
    "empty_clip_feat": rng.normal(size=(1, clip_dim)),
    "empty_sync_feat": rng.normal(size=(1, sync_dim)),
    "sync_pos_emb": rng.normal(size=(1, 1, 8, sync_dim)),
  }
  return state
