# pyright: reportMissingImports=false
"""The two-ear flow network once more, in plain PyTorch: the peer of `benchmarks.against_torch`.

Modules as MMAudio's own code has them (`torch.nn.functional`'s convolutions, fused attention and
norms), built from this project's parameters, so that both frameworks compute the same numbers.

Axes as in `spatialv2a_jax.models.flow_net`.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from spatialv2a_jax.models import flow_net, layers
from spatialv2a_jax.models.conditioning import SYNC_SEGMENT
from spatialv2a_jax.models.spatial import BATCH_NORM_EPS


def parameter(value: Any) -> nn.Parameter:
  """Returns a copy of an array as a trainable tensor."""
  return nn.Parameter(torch.from_numpy(np.array(value, np.float32)))


class Linear(nn.Module):
  """A dense layer, or a convolution over time, on [..., t, i]."""

  def __init__(self, p: Any, inputs: int = 1, taps: int = 0):
    super().__init__()
    kernel = np.asarray(p["kernel"])
    first = 1 if taps else 0
    fan_in = math.prod(kernel.shape[first : first + inputs])
    kernel = kernel.reshape(*kernel.shape[:first], fan_in, -1)
    self.taps = taps
    self.weight = parameter(np.ascontiguousarray(kernel.T))  # [o, i] or [o, i, taps].
    self.bias = parameter(np.ravel(p["bias"])) if "bias" in p else None

  def forward(self, x: Tensor) -> Tensor:
    """Returns [..., t, o]."""
    if not self.taps:
      return functional.linear(x, self.weight, self.bias)
    y = x.flatten(0, -3).transpose(1, 2)
    y = functional.conv1d(y, self.weight, self.bias, padding=self.taps // 2).transpose(1, 2)
    return y.unflatten(0, x.shape[:-2])


def side_by_side(p: Any, taps: int = 0) -> Linear:
  """Returns the parts of a `layers.ParallelLinear` as one layer, as MMAudio has them."""
  kernel = np.asarray(p["kernel"])  # [part, taps if any, i, *features]
  joined = {"kernel": np.moveaxis(kernel, 0, 2 if taps else 1)}
  return Linear(joined | ({"bias": p["bias"]} if "bias" in p else {}), taps=taps)


class GatedMlp(nn.Module):
  """SwiGLU, dense or convolutional."""

  def __init__(self, p: Any, taps: int = 0):
    super().__init__()
    self.up, self.down = side_by_side(p["up"], taps), Linear(p["down"], taps=taps)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [..., t, d] to [..., t, d]."""
    gate, value = self.up(x).chunk(2, dim=-1)
    return self.down(functional.silu(gate) * value)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
  """Returns adaptive LayerNorm."""
  return functional.layer_norm(x, x.shape[-1:], eps=layers.LAYER_NORM_EPS) * (1 + scale) + shift


def rope(x_bhnk: Tensor, table: Tensor) -> Tensor:
  """Rotates the interleaved pairs of the last axis."""
  cos, sin = table
  even, odd = x_bhnk.unflatten(-1, (-1, 2)).unbind(-1)
  return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def rope_table(length: int, size: int, scale: float = 1.0) -> Tensor:
  """Returns (cos, sin) [2, n, k / 2]."""
  return torch.from_numpy(layers.rope_table(length, size, scale)[..., ::2].copy())


class Stream(nn.Module):
  """Adaptive norms, projections and MLP of one kind of tokens."""

  def __init__(self, p: Any, heads: int, taps: int = 3, pre_only: bool = False):
    super().__init__()
    self.heads, self.pre_only = heads, pre_only
    self.mod, self.qkv = side_by_side(p["mod"]), side_by_side(p["qkv"])
    self.q_scale, self.k_scale = parameter(p["q_norm"]["scale"]), parameter(p["k_norm"]["scale"])
    if not pre_only:
      self.out = Linear(p["out"], inputs=2, taps=taps)
      self.mlp = GatedMlp(p["mlp"], taps)

  def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
    """Returns shifts, scales and gates [..., d]."""
    return self.mod(functional.silu(c)).chunk(2 if self.pre_only else 6, dim=-1)

  def before(self, x_bnd: Tensor, mods: tuple[Tensor, ...], table: Tensor | None):
    """Returns queries, keys and values [b, h, n, k]."""
    qkv = self.qkv(modulate(x_bnd, mods[0], mods[1])).unflatten(-1, (3, self.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = functional.rms_norm(q, q.shape[-1:], self.q_scale, layers.RMS_EPS)
    k = functional.rms_norm(k, k.shape[-1:], self.k_scale, layers.RMS_EPS)
    if table is not None:
      q, k = rope(q, table), rope(k, table)
    return q, k, v

  def after(self, x_bnd: Tensor, out_bhnk: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
    """Returns the tokens after output projection and MLP."""
    gate1, shift2, scale2, gate2 = mods[2:]
    x_bnd = x_bnd + self.out(out_bhnk.transpose(1, 2).flatten(2)) * gate1
    return x_bnd + self.mlp(modulate(x_bnd, shift2, scale2)) * gate2


class EarBlock(nn.Module):
  """Self-attention and ConvMLP over the frames of one ear."""

  def __init__(self, p: Any, heads: int):
    super().__init__()
    self.audio = Stream(p["audio"], heads)

  def forward(self, x_btd: Tensor, c_btd: Tensor, table: Tensor) -> Tensor:
    """Maps [b, t, d]."""
    mods = self.audio.modulation(c_btd)
    q, k, v = self.audio.before(x_btd, mods, table)
    return self.audio.after(x_btd, functional.scaled_dot_product_attention(q, k, v), mods)


class JointBlock(nn.Module):
  """One attention over the latents of both ears, the visual and the text tokens."""

  def __init__(self, p: Any, heads: int, last: bool):
    super().__init__()
    self.last = last
    self.audio = Stream(p["audio"], heads)
    self.clip = Stream(p["clip"], heads, pre_only=last)
    self.text = Stream(p["text"], heads, taps=0, pre_only=last)

  def forward(self, x_betd, clip_bvd, text_bwd, c_btd, g_b1d, table, clip_table):
    """Returns the three kinds of tokens."""
    b, ears, frames, _ = x_betd.shape
    x = x_betd.flatten(0, 1)
    audio_mods = tuple(m.repeat_interleave(ears, 0) for m in self.audio.modulation(c_btd))
    clip_mods, text_mods = self.clip.modulation(g_b1d), self.text.modulation(g_b1d)
    audio = [  # The ears' frames side by side: [b, h, e t, k].
      y.unflatten(0, (b, ears)).transpose(1, 2).flatten(2, 3)
      for y in self.audio.before(x, audio_mods, table)
    ]
    clip = self.clip.before(clip_bvd, clip_mods, clip_table)
    text = self.text.before(text_bwd, text_mods, None)
    q, k, v = (torch.cat(parts, dim=2) for parts in zip(audio, clip, text, strict=True))
    out = functional.scaled_dot_product_attention(audio[0] if self.last else q, k, v)
    own = out[:, :, : ears * frames].unflatten(2, (ears, frames)).transpose(1, 2).flatten(0, 1)
    x_betd = self.audio.after(x, own, audio_mods).unflatten(0, (b, ears))
    if not self.last:
      end = ears * frames + clip_bvd.shape[1]
      clip_bvd = self.clip.after(clip_bvd, out[:, :, ears * frames : end], clip_mods)
      text_bwd = self.text.after(text_bwd, out[:, :, end:], text_mods)
    return x_betd, clip_bvd, text_bwd


class Project(nn.Module):
  """Linear map or convolution, activation of version 1, gated MLP."""

  def __init__(self, p: Any, first_taps: int, taps: int):
    super().__init__()
    self.first, self.mlp = Linear(p["first"], taps=first_taps), GatedMlp(p["mlp"], taps)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [..., t, f] to [..., t, d]."""
    x = self.first(x)
    return self.mlp(functional.selu(x) if self.first.taps else x)


class FlowNet(nn.Module):
  """The network of `flow_net.Config(ears=2, v2=False)`, from its unboxed parameters."""

  def __init__(self, config: flow_net.Config, params: Any):
    super().__init__()
    assert config.ears == 2 and not config.v2 and config.spatial and config.joint_depth > 1
    self.config, c, p = config, config, params["condition"]
    self.clip, self.sync = Project(p["clip"], 0, 3), Project(p["sync"], 7, 3)
    self.text = Project(p["text"], 0, 0)
    self.clip_mean, self.text_mean = Linear(p["clip_mean"]), Linear(p["text_mean"])
    self.global_mlp, self.sync_pos = GatedMlp(p["global"]), parameter(p["sync_pos"])
    s = params["spatial"]
    self.spatial_first, self.spatial_mlp = Linear(s["first"], taps=7), GatedMlp(s["mlp"], 3)
    self.norm_scale, self.norm_bias = parameter(s["scale"]), parameter(s["bias"])
    self.time1, self.time2 = Linear(params["time"]["first"]), Linear(params["time"]["second"])
    self.audio = Project(params["audio"], 7, 7)
    self.ear_embedding = parameter(params["ear_embedding"])
    joint = flow_net.unstack(params["joint"])
    self.joint = nn.ModuleList([JointBlock(q, c.heads, False) for q in joint])
    self.joint.append(JointBlock(params["joint_last"], c.heads, True))
    self.ears = nn.ModuleList(
      nn.ModuleList([EarBlock(q, c.heads) for q in flow_net.unstack(ear)])
      for ear in flow_net.unstack(params["ears"])
    )
    final = flow_net.unstack(params["final"])
    self.final_mod = nn.ModuleList([side_by_side(q["mod"]) for q in final])
    self.final_conv = nn.ModuleList([Linear(q["conv"], taps=7) for q in final])
    self.register_buffer("frequencies", torch.from_numpy(layers.timestep_table(256, 10_000.0)))

  def condition(
    self, cond: dict[str, Tensor], latent_len: int, *, train: bool = False
  ) -> dict[str, Tensor]:
    """Returns what depends on neither time nor latents."""
    sync_bsf = cond["sync_bsf"]
    sync_bsf = sync_bsf + self.sync_pos.repeat(sync_bsf.shape[1] // SYNC_SEGMENT, 1)
    clip_bvd, sync_bsd, text_bwd = (
      self.clip(cond["clip_bvf"]), self.sync(sync_bsf), self.text(cond["text_bwf"]),
    )  # fmt: skip
    global_bd = self.clip_mean(clip_bvd.mean(1)) + self.text_mean(text_bwd.mean(1))
    x_bvd = self.spatial_mlp(functional.silu(self.spatial_first(cond["spatial_bvk"])))
    x_btd = x_bvd[:, layers.nearest_exact(x_bvd.shape[1], latent_len)]
    var, mean = torch.ones(()), torch.zeros(())  # Running statistics of a new network.
    if train:
      var, mean = torch.var_mean(x_btd, dim=(0, 1), correction=0)
    spatial_btd = (x_btd - mean) * torch.rsqrt(var + BATCH_NORM_EPS)
    return {
      "clip_bvd": clip_bvd,
      "text_bwd": text_bwd,
      "sync_btd": sync_bsd[:, layers.nearest_exact(sync_bsd.shape[1], latent_len)],
      "global_bd": self.global_mlp(global_bd),
      "spatial_btd": spatial_btd * self.norm_scale + self.norm_bias,
    }

  def forward(self, x_betc: Tensor, t_b: Tensor, prepared: dict[str, Tensor]) -> Tensor:
    """Returns the velocity of both ears."""
    size, frames = self.config.width // self.config.heads, x_betc.shape[2]
    angle = t_b[:, None] * self.frequencies
    time_bd = self.time1(torch.cat([angle.cos(), angle.sin()], dim=-1))
    time_bd = self.time2(functional.silu(time_bd))
    g_b1d = (time_bd + prepared["global_bd"])[:, None]
    c_btd = g_b1d + prepared["sync_btd"] + prepared["spatial_btd"]
    x_betd = self.audio(x_betc) + self.ear_embedding[:, None]
    clip_bvd, text_bwd = prepared["clip_bvd"], prepared["text_bwd"]
    table = rope_table(frames, size)
    clip_table = rope_table(clip_bvd.shape[1], size, frames / clip_bvd.shape[1])
    for block in self.joint:
      x_betd, clip_bvd, text_bwd = block(
        x_betd, clip_bvd, text_bwd, c_btd, g_b1d, table, clip_table
      )
    outputs = []
    for e, blocks in enumerate(self.ears):
      x_btd = x_betd[:, e]
      for block in blocks:
        x_btd = block(x_btd, c_btd, table)
      shift, scale = self.final_mod[e](functional.silu(g_b1d)).chunk(2, dim=-1)
      outputs.append(self.final_conv[e](modulate(x_btd, shift, scale)))
    return torch.stack(outputs, dim=1)
