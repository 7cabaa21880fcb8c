# pyright: reportMissingImports=false
"""VAE decoder and BigVGAN once more, in plain PyTorch: peers of `benchmarks.against_torch`.

Written channels first, with the grouped convolutions for the anti-aliased activations that the
public BigVGAN has, from this project's parameters.

Axes: b clip, d channel, n frame or sample, c latent channel, m mel bin.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.torch_flow import parameter
from spatialv2a_jax.models import vae, vocoder


class Conv(nn.Module):
  """Convolution of equal length on [b, d, n]."""

  def __init__(self, p: Any, dilation: int = 1, gain: float = 1.0):
    super().__init__()
    kernel = np.asarray(p["kernel"]) * gain  # [taps, i, o]
    self.weight, self.dilation = parameter(np.ascontiguousarray(kernel.T)), dilation
    self.bias = parameter(p["bias"]) if "bias" in p else None
    self.padding = dilation * (kernel.shape[0] - 1) // 2

  def forward(self, x: Tensor) -> Tensor:
    """Returns [b, o, n]."""
    return functional.conv1d(
      x, self.weight, self.bias, padding=self.padding, dilation=self.dilation
    )


def normalize(x: Tensor, dim: int = 1) -> Tensor:
  """Divides by the root mean square over `dim`."""
  return x / (x.square().mean(dim, keepdim=True).sqrt() + 1e-4)


def mp_silu(x: Tensor) -> Tensor:
  """SiLU of unit variance."""
  return functional.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor) -> Tensor:
  """Sum of weights 0.7 and 0.3, of unit variance."""
  return torch.lerp(a, b, 0.3) / math.sqrt(0.7**2 + 0.3**2)


class Block(nn.Module):
  """Residual block of the VAE."""

  def __init__(self, p: Any):
    super().__init__()
    self.conv1, self.conv2 = Conv(p["conv1"]), Conv(p["conv2"])
    self.skip = Conv(p["nin_shortcut"]) if "nin_shortcut" in p else nn.Identity()

  def forward(self, x: Tensor) -> Tensor:
    """Maps [b, d, n]."""
    x = normalize(x)
    h = self.conv2(mp_silu(self.conv1(mp_silu(x))))
    return mp_sum(self.skip(x), h)


class Attention(nn.Module):
  """One head over all frames."""

  def __init__(self, p: Any):
    super().__init__()
    self.qkv, self.proj_out = Conv(p["qkv"]), Conv(p["proj_out"])

  def forward(self, x: Tensor) -> Tensor:
    """Maps [b, d, n]."""
    qkv = normalize(self.qkv(x).unflatten(1, (-1, 3)))
    q, k, v = qkv.permute(2, 0, 3, 1).unbind(0)
    return mp_sum(x, self.proj_out(functional.scaled_dot_product_attention(q, k, v).mT))


class VaeDecoder(nn.Module):
  """The decoder of folded `vae` parameters."""

  def __init__(self, params: Any):
    super().__init__()
    p, frozen = params["decoder"], params["frozen"]
    self.conv_in = Conv(p["conv_in"])
    mid = p["mid"]
    self.mid = nn.Sequential(Block(mid["block_1"]), Attention(mid["attn_1"]), Block(mid["block_2"]))
    self.levels = nn.ModuleList(
      nn.ModuleList([Block(p[f"up_{level}_block_{i}"]) for i in range(3)]) for level in (2, 1, 0)
    )
    self.upsample = Conv(p["up_1_upsample_conv"])
    self.conv_out = Conv(p["conv_out"], gain=1 + float(p["learnable_gain"]))
    self.mean, self.std = parameter(frozen["data_mean"]), parameter(frozen["data_std"])

  def forward(self, z_btc: Tensor) -> Tensor:
    """Returns log-mels [b, m, n]."""
    x = self.mid(self.conv_in(z_btc.mT)).clamp(-256, 256)
    for i, blocks in enumerate(self.levels):
      for block in blocks:
        x = block(x).clamp(-256, 256)
      if i == 1:
        x = self.upsample(functional.interpolate(x, scale_factor=2, mode="nearest-exact"))
    return self.conv_out(mp_silu(x)) * self.std[:, None] + self.mean[:, None]


class Snake(nn.Module):
  """Anti-aliased x + sin^2(a x) / b, by grouped convolutions."""

  def __init__(self, p: Any):
    super().__init__()
    self.alpha, self.beta = parameter(p["alpha"]), parameter(p["beta"])
    taps = torch.from_numpy(vocoder.sinc_filter().copy()).expand(len(self.alpha), 1, -1)
    self.register_buffer("taps", taps.contiguous())

  def forward(self, x: Tensor) -> Tensor:
    """Maps [b, d, n]."""
    d = x.shape[1]
    x = functional.pad(x, (5, 5), mode="replicate")
    x = 2 * functional.conv_transpose1d(x, self.taps, stride=2, groups=d)[..., 15:-15]
    x = x + torch.sin(x * self.alpha.exp()[:, None]).square() / (self.beta.exp()[:, None] + 1e-9)
    x = functional.pad(x, (5, 6), mode="replicate")
    return functional.conv1d(x, self.taps, stride=2, groups=d)


class Layers(nn.Module):
  """Residual layers of one kernel size."""

  def __init__(self, p: Any, dilations: tuple[int, ...]):
    super().__init__()
    self.acts = nn.ModuleList([Snake(p[f"activations_{i}"]) for i in range(2 * len(dilations))])
    self.convs1 = nn.ModuleList([Conv(p[f"convs1_{j}"], d) for j, d in enumerate(dilations)])
    self.convs2 = nn.ModuleList([Conv(p[f"convs2_{j}"]) for j in range(len(dilations))])

  def forward(self, x: Tensor) -> Tensor:
    """Maps [b, d, n]."""
    for j, (first, second) in enumerate(zip(self.convs1, self.convs2, strict=True)):
      x = x + second(self.acts[2 * j + 1](first(self.acts[2 * j](x))))
    return x


class BigVGAN(nn.Module):
  """The generator of `vocoder` parameters."""

  def __init__(self, config: vocoder.Config, params: Any):
    super().__init__()
    self.config, count = config, len(config.block_kernels)
    self.pre, self.post = Conv(params["conv_pre"]), Conv(params["conv_post"])
    self.ups = nn.ParameterList()
    self.biases = nn.ParameterList()
    for i in range(len(config.rates)):
      kernel = np.asarray(params[f"ups_{i}"]["kernel"])
      self.ups.append(parameter(kernel.transpose(1, 2, 0)))  # [i, o, taps]
      self.biases.append(parameter(params[f"ups_{i}"]["bias"]))
    self.blocks = nn.ModuleList(
      Layers(params[f"resblocks_{i}"], config.dilations) for i in range(len(config.rates) * count)
    )
    self.last = Snake(params["activation_post"])

  def forward(self, mel_bmn: Tensor) -> Tensor:
    """Returns samples [b, p]."""
    x, count = self.pre(mel_bmn), len(self.config.block_kernels)
    for i, (rate, weight) in enumerate(zip(self.config.rates, self.ups, strict=True)):
      padding = (weight.shape[2] - rate) // 2
      x = functional.conv_transpose1d(x, weight, self.biases[i], stride=rate, padding=padding)
      x = sum(block(x) for block in self.blocks[i * count : (i + 1) * count]) / count
    x = self.post(self.last(x))[:, 0]
    return torch.tanh(x) if self.config.bounded == "tanh" else x.clamp(-1, 1)


def folded(params: Any) -> Any:
  """Returns VAE parameters with their kernels normalised, as a converter leaves them."""
  if isinstance(params, dict):
    return {k: vae.fold(v) if k == "kernel" else folded(v) for k, v in params.items()}
  return params
