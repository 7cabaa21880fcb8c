"""MMAudio's state dict -> parameters of the one-ear network, for the parity tests."""

import numpy as np


def convert(state, *, heads, joint_depth, ear_depth, v2):
  """Returns the nested parameters; consumes every key of `state` or fails."""
  state = {name: np.asarray(value, np.float32) for name, value in state.items()}
  width = state["clip_cond_proj.bias"].size
  k = width // heads

  def take(name):
    return state.pop(name)

  def kernel(name):  # PyTorch: (out, in[, taps]); here: ([taps,] in, out).
    return take(f"{name}.weight").T

  def linear(name):
    return {"kernel": kernel(name), "bias": take(f"{name}.bias")}

  def mlp(name):
    up = np.stack([kernel(f"{name}.w1"), kernel(f"{name}.w3")], axis=-2)
    return {"up": {"kernel": up}, "down": {"kernel": kernel(f"{name}.w2")}}

  def mod(name):
    both = linear(f"{name}.adaLN_modulation.1")
    parts = both["bias"].size // width
    return {
      "kernel": both["kernel"].reshape(width, parts, width),
      "bias": both["bias"].reshape(parts, width),
    }

  def stream(name, pre_only=False):
    qkv = linear(f"{name}.attn.qkv")  # Output channels are (head, channel, q k v).
    out = {
      "mod": mod(name),
      "qkv": {
        "kernel": qkv["kernel"].reshape(width, heads, k, 3).transpose(0, 3, 1, 2),
        "bias": qkv["bias"].reshape(heads, k, 3).transpose(2, 0, 1),
      },
      "q_norm": {"scale": take(f"{name}.attn.q_norm.weight")},
      "k_norm": {"scale": take(f"{name}.attn.k_norm.weight")},
    }
    if not pre_only:
      project = linear(f"{name}.linear1")
      shape = project["kernel"].shape
      project["kernel"] = project["kernel"].reshape(*shape[:-2], heads, k, width)
      out |= {"out": project, "mlp": mlp(f"{name}.ffn")}
    return out

  def joint(i):
    last = i == joint_depth - 1
    name = f"joint_blocks.{i}"
    return {
      "audio": stream(f"{name}.latent_block"),
      "clip": stream(f"{name}.clip_block", last),
      "text": stream(f"{name}.text_block", last),
    }

  def project(name, index):
    return {"first": linear(f"{name}_input_proj.0"), "mlp": mlp(f"{name}_input_proj.{index}")}

  dense = 2 if v2 else 1
  params = {
    "frozen": {
      "latent_mean": take("latent_mean").ravel(),
      "latent_std": take("latent_std").ravel(),
      "null_text": take("empty_string_feat"),
    },
    "condition": {
      "null_clip": take("empty_clip_feat")[0],
      "null_sync": take("empty_sync_feat")[0],
      "sync_pos": take("sync_pos_emb")[0, 0],
      "clip": project("clip", dense),
      "sync": project("sync", 2),
      "text": project("text", dense),
      "clip_mean": linear("clip_cond_proj"),
      "text_mean": linear("text_cond_proj"),
      "global": mlp("global_cond_mlp"),
    },
    "time": {"first": linear("t_embed.mlp.0"), "second": linear("t_embed.mlp.2")},
    "audio": project("audio", 2),
    "joint_last": joint(joint_depth - 1),
    "ears": stack([stack([{"audio": stream(f"fused_blocks.{i}")} for i in range(ear_depth)])]),
    "final": stack([{"mod": mod("final_layer"), "conv": linear("final_layer.conv")}]),
  }
  if joint_depth > 1:
    params["joint"] = stack([joint(i) for i in range(joint_depth - 1)])
  assert not state, f"unused: {sorted(state)}"
  return params


def stack(trees):
  """Returns one tree whose leaves have a new leading axis."""
  if isinstance(trees[0], dict):
    return {name: stack([tree[name] for tree in trees]) for name in trees[0]}
  return np.stack(trees)
