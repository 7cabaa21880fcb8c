"""BigVGAN version 1 (16 kHz, from Make-An-Audio 2) and 2 (44.1 kHz, NVIDIA) -> `models.vocoder`.

Files hold the weights with weight norm in either spelling of PyTorch, or folded.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from spatialv2a_jax import schema
from spatialv2a_jax.convert.engine import (
  WEIGHT,
  Outputs,
  Source,
  State,
  Table,
  copy,
  count,
  then,
  under,
  weight_norm,
)
from spatialv2a_jax.models import vocoder


def configure(state: State, *, base: vocoder.Config) -> vocoder.Config:
  """Returns the sizes; what no shape shows (dilations, the end) is that of the version.

  Raises:
    ValueError: the other version.
  """

  def shape(name):
    return state[weight_norm(state, name).keys[-1]].shape

  width, n_mels, _ = shape("conv_pre")
  kernels = tuple(shape(f"ups.{i}.0")[2] for i in range(count(state, r"ups\.(\d+)\.")))
  blocks = count(state, r"resblocks\.(\d+)\.") // len(kernels)
  if ("conv_post.bias" in state) != base.final_bias:
    version = ("bigvgan_v2", "bigvgan")["conv_post.bias" in state]
    raise ValueError(f"as of the other version: convert it as {version}")
  return dataclasses.replace(
    base,
    n_mels=n_mels,
    width=width,
    kernels=kernels,
    rates=tuple(taps // 2 for taps in kernels),  # As in every released configuration.
    block_kernels=tuple(shape(f"resblocks.{i}.convs1.0")[2] for i in range(blocks)),
  )


def table(state: State, config: vocoder.Config) -> Table:
  """Returns the recipes."""

  def conv(name, pattern=WEIGHT, bias=True):
    kernel = {"kernel": then(weight_norm(state, name), pattern)}
    return kernel | ({"bias": copy(f"{name}.bias")} if bias else {})

  def snake(name):
    return {part: copy(f"{name}.act.{part}") for part in ("alpha", "beta")}

  recipes = {
    **under("conv_pre", conv("conv_pre")),
    **under("activation_post", snake("activation_post")),
    **under("conv_post", conv("conv_post", bias=config.final_bias)),
  }
  for i in range(len(config.kernels)):  # Transposed convolutions are stored (in, out, taps).
    recipes |= under(f"ups_{i}", conv(f"ups.{i}.0", "i o k -> k i o"))
  for i in range(len(config.kernels) * len(config.block_kernels)):
    for j in range(len(config.dilations)):
      for part in ("convs1", "convs2"):
        recipes |= under(f"resblocks_{i}/{part}_{j}", conv(f"resblocks.{i}.{part}.{j}"))
    for j in range(2 * len(config.dilations)):
      name = f"resblocks.{i}.activations.{j}"
      recipes |= under(f"resblocks_{i}/activations_{j}", snake(name))
  return recipes


def outputs(config: vocoder.Config, params: Any, inputs: State) -> Outputs:
  """Returns the waveform [b, 1, p]."""
  waveform = jax.jit(vocoder.build(config).waveform)
  return {"waveform": lambda: waveform(params, jnp.asarray(inputs["mel"]))[:, None]}


def _source(upstream: str, licence: str, base: vocoder.Config) -> Source:
  return Source(
    network="vocoder",
    upstream=upstream,
    licence=licence,
    sizes=vocoder.Config,
    configure=functools.partial(configure, base=base),
    table=table,
    build=vocoder.build,
    outputs=outputs,
    ignore=(r".*\.(upsample|downsample\.lowpass)\.filter",),  # A constant of the architecture.
    wrapper="generator",
    about=lambda config: {"audio": schema.audio_of(config.n_mels, math.prod(config.rates))},
    note="the content of upstream's key 'generator', without the constant filters of the "
    "activations: load it with strict=False, before remove_weight_norm()",
  )


V1 = _source(
  "BigVGAN (16 kHz, Make-An-Audio 2, as released with MMAudio)",
  "not stated beside MMAudio's CC-BY-NC-4.0 (code: MIT); ask before commercial use",
  vocoder.V1_16K,
)
V2 = _source("BigVGAN v2 (nvidia/bigvgan_v2_44khz_128band_512x)", "MIT", vocoder.V2_44K)
