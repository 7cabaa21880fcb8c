"""MMAudio's mel VAEs (16 and 44.1 kHz) -> `models.vae`, its weights normalised once for all."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from spatialv2a_jax.convert.engine import Outputs, Source, State, Table, copy, transposed
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
      recipes[path] = copy(key, np.ravel)
    else:
      recipes[path] = copy(f"{part}.{key}", fold if path.endswith("/kernel") else np.asarray)
  return recipes


def fold(weight: np.ndarray) -> np.ndarray:
  """Returns our kernel of a raw weight (out, in, taps)."""
  return np.asarray(vae.fold(jnp.asarray(transposed(weight))))


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
  configure=configure,
  table=table,
  init=lambda config: vae.build(config).init,
  outputs=outputs,
  about=lambda config: {"audio": "16k" if config.n_mels == 80 else "44k"},
)
