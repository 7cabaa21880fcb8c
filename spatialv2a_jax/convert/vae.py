"""MMAudio's mel VAEs (16 and 44.1 kHz) -> `models.vae`, its weights normalised once for all."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from spatialv2a_jax import schema
from spatialv2a_jax.convert.engine import (
  WEIGHT,
  Leaf,
  Outputs,
  Source,
  State,
  Table,
  arranged,
  copy,
)
from spatialv2a_jax.models import vae


def configure(state: State) -> vae.Config:
  """Returns the sizes."""
  width, n_mels, _ = state["encoder.conv_in.weight"].shape
  latent_channels = state["decoder.conv_in.weight"].shape[1]
  return vae.Config(n_mels, latent_channels, width, folded=True)


def table(state: State, config: vae.Config) -> Table:
  """Returns the recipes: a convolution's key is its path, but for levels, blocks, resamplers."""
  del state
  shapes = jax.eval_shape(vae.build(config).init, jax.random.key(0))
  paths = traverse_util.flatten_dict(nn.unbox(shapes), sep="/")
  recipes = {}
  for path in paths:
    part, _, name = path.partition("/")
    key = re.sub(r"(down|up)_(\d)_(block|downsample|upsample)_", r"\1.\2.\3.", name)
    key = key.replace("/", ".").replace(".kernel", ".weight")
    if part == "frozen":
      recipes[path] = arranged(key, "1 m 1 -> m")
    elif not path.endswith("/kernel"):
      recipes[path] = copy(f"{part}.{key}")
    elif config.folded:
      recipes[path] = Leaf((f"{part}.{key}",), fold, unfold, exact=False)
    else:
      recipes[path] = arranged(f"{part}.{key}", WEIGHT)
  return recipes


def fold(weight: np.ndarray) -> np.ndarray:
  """Returns our kernel, as `models.vae.fold` does, of a raw weight (out, in, taps)."""
  bias = vae.EPS * np.sqrt(weight[0].size)
  size = np.sqrt(np.square(weight, dtype=np.float64).sum(axis=(1, 2), keepdims=True))
  return (weight / (bias + size)).transpose(2, 1, 0)


def unfold(kernel: np.ndarray) -> tuple[np.ndarray]:
  """Returns the raw weight that folds to a kernel: each output regains its size.

  A norm of s folds to n = s / (s + bias), so that bias / (1 - n) is what it was divided by. Where
  n rounds to 1, the weight was far larger than the bias and any large size will do.
  """
  bias = vae.EPS * np.sqrt(kernel[..., 0].size)
  norm = np.sqrt(np.square(kernel, dtype=np.float64).sum(axis=(0, 1)))
  size = bias / np.maximum(1 - norm, 1e-6)
  return ((kernel * size).astype(np.float32).transpose(2, 1, 0),)


def outputs(config: vae.Config, params: Any, inputs: State) -> Outputs:
  """Returns posterior and reconstruction, by the names of the golden files."""
  net = vae.build(config)
  encode, decode = jax.jit(net.encode), jax.jit(net.decode)

  def posterior():
    return encode(params, jnp.asarray(inputs["mel"]))

  return {
    "mean": lambda: posterior()[0].swapaxes(1, 2),
    "std": lambda: posterior()[1].swapaxes(1, 2),
    "logvar": lambda: 2 * jnp.log(posterior()[1]).swapaxes(1, 2),
    "mel": lambda: decode(params, jnp.asarray(inputs["z"])),
    "mel_roundtrip": lambda: decode(params, posterior()[0]),
  }


SOURCE = Source(
  network="vae",
  upstream="MMAudio's mel VAE (github.com/hkchengrex/MMAudio)",
  licence="CC-BY-NC-4.0: not for commercial use",
  sizes=vae.Config,
  configure=configure,
  table=table,
  build=vae.build,
  outputs=outputs,
  about=lambda config: {"audio": schema.audio_of(config.n_mels)},
)
