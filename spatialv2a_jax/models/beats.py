"""BEATs (arXiv 2212.09058): sound at 16 kHz -> tokens, as ACL (arXiv 2311.04066) takes them.

Kaldi's filter bank is cut into patches of 16 frames by 16 bins; a transformer with norms after each
sum reads them, its attention biased by a table of relative positions that each query gates. The
outputs of every fourth block are the features.

Axes: b clip, p sample, n frame, m mel bin, i and j token (time first, then frequency), d width,
h head, k head width, f feature, u bucket of distances.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatialv2a_jax.models import layers, vit
from spatialv2a_jax.models.layers import Linear, logical

SAMPLE_RATE = 16_000
N_MELS = 128
PATCH = 16
EVERY = 4  # Blocks between those whose outputs are features.
_WINDOW, _HOP, _FFT = 400, 160, 512
_MEAN, _STD = 15.41663, 6.55582  # Of the filter bank's values in AudioSet.
_FLOOR = 2.0**-23


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those of BEATs iter3+ (AS2M), fine-tuned.

  Attributes:
    embed: features of a patch before the first block.
    width: d.
    layers: blocks.
    heads: attention heads.
    ffn: hidden width of the MLPs.
    taps: kernel length of the convolution that tells positions, even.
    groups: of its channels.
    buckets: of relative positions, for both directions.
    max_distance: in tokens, from which on all share a bucket.
    dtype: of the matmuls.
  """

  embed: int = 512
  width: int = 768
  layers: int = 12
  heads: int = 12
  ffn: int = 3072
  taps: int = 128
  groups: int = 16
  buckets: int = 320
  max_distance: int = 800
  dtype: str = "float32"

  @property
  def dim(self) -> int:
    """Features of a token: those of the chosen blocks side by side."""
    return self.width * (self.layers // EVERY)


class Beats(NamedTuple):
  """Functions of one encoder; parameters are a plain nested dict.

  Attributes:
    init: key -> boxed parameters.
    encode: (params, audio_bp in -1..1 at 16 kHz, 0.175 s or longer) -> features_bif.
  """

  init: Callable[[Array], Any]
  encode: Callable[[Any, Array], Array]


def filter_bank(audio_bp: Array) -> Array:
  """Returns Kaldi's log mel energies of a sound in -1..1, normalised, float32 [b, n, m].

  Frames of 25 ms every 10 ms that lie whole in the sound, each without its mean, pre-emphasised by
  0.97, under Povey's window; triangles from 20 Hz to half the rate on Kaldi's mel scale.
  """
  count = 1 + (audio_bp.shape[1] - _WINDOW) // _HOP
  index_np = np.arange(count)[:, None] * _HOP + np.arange(_WINDOW)[None]
  x_bnp = 2.0**15 * audio_bp.astype(jnp.float32)[:, index_np]
  x_bnp -= x_bnp.mean(axis=-1, keepdims=True)
  before_bnp = jnp.concatenate([x_bnp[..., :1], x_bnp[..., :-1]], axis=-1)
  window_p = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / (_WINDOW - 1))) ** 0.85
  x_bnp = (x_bnp - 0.97 * before_bnp) * window_p.astype(np.float32)[None, None]
  power = jnp.square(jnp.abs(jnp.fft.rfft(x_bnp, _FFT)))
  mel_bnm = jnp.log(jnp.maximum(power @ _triangles(), _FLOOR))
  return (mel_bnm - _MEAN) / (2 * _STD)


def _triangles() -> np.ndarray:
  """Returns the weights of the power spectrum in each mel bin, float32 [257, 128]."""

  def mel(hertz):
    return 1127 * np.log1p(np.asarray(hertz) / 700)

  edge = np.linspace(mel(20), mel(SAMPLE_RATE / 2), N_MELS + 2)
  at = mel(np.arange(_FFT // 2 + 1) * SAMPLE_RATE / _FFT)[:, None]
  rise = (at - edge[None, :-2]) / (edge[1:-1] - edge[:-2])[None]
  fall = (edge[None, 2:] - at) / (edge[2:] - edge[1:-1])[None]
  weight = np.maximum(np.minimum(rise, fall), 0)
  weight[-1] = 0  # Kaldi leaves the last bin out.
  return weight.astype(np.float32)


def buckets(count: int, total: int, max_distance: int) -> np.ndarray:
  """Returns the bucket of each pair of tokens, int [i, j].

  The first half is for keys at or before the query. Of each half, the first half is for single
  distances, the rest grows with the logarithm up to `max_distance`, in float32 as in PyTorch.
  """
  half, exact = total // 2, total // 4
  offset = np.arange(count)[None] - np.arange(count)[:, None]
  far = np.maximum(np.abs(offset), 1)
  step = np.log(far.astype(np.float32) / np.float32(exact)) / np.float32(
    math.log(max_distance / exact)
  )
  large = exact + (step * np.float32(half - exact)).astype(np.int64)
  bucket = np.where(np.abs(offset) < exact, np.abs(offset), np.minimum(large, half - 1))
  return bucket + half * (offset > 0)


class Attention(nn.Module):
  """Self-attention with a bias of relative positions, gated by each query."""

  heads: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x_bid: Array, bias_hij: Array) -> Array:
    """Returns [b, i, d]."""
    d, h, k = x_bid.shape[-1], self.heads, x_bid.shape[-1] // self.heads
    axes = ("width", None, "heads", "head_dim")
    qkv = Linear((3, h, k), axes, dtype=self.dtype, name="qkv")(x_bid)
    q_bihk, k_bjhk, v_bjhk = jnp.unstack(qkv, axis=-3)
    gates = Linear((2, 4), ("head_dim", None, None), dtype=self.dtype, name="gate")(q_bihk)
    first_bih, second_bih = jnp.unstack(nn.sigmoid(gates.sum(axis=-1)), axis=-1)
    scale_h = self.param("gate_scale", logical(layers.ones, "heads"), (h,))
    gate_bih = first_bih * (second_bih * scale_h[None, None] - 1) + 2
    logits = jnp.einsum("bihk,bjhk->bhij", q_bihk, k_bjhk, preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(k) + jnp.einsum("bih,hij->bhij", gate_bih, bias_hij)
    weight = jax.nn.softmax(logits, axis=-1).astype(v_bjhk.dtype)
    out_bihk = jnp.einsum("bhij,bjhk->bihk", weight, v_bjhk)
    return Linear((d,), ("heads", "head_dim", "width"), dtype=self.dtype, name="out")(out_bihk)


class Block(nn.Module):
  """Attention and MLP; the skip weighs `alpha` times its branch (DeepNorm), then comes a norm."""

  heads: int
  hidden: int
  alpha: float
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x_bid: Array, bias_hij: Array) -> Array:
    """Returns [b, i, d], float32."""
    attention = Attention(self.heads, self.dtype, name="attention")
    mlp = vit.Mlp(self.hidden, vit.exact_gelu, self.dtype, name="mlp")
    x_bid = vit.Norm(name="norm1")(self.alpha * x_bid + attention(x_bid, bias_hij))
    return vit.Norm(name="norm2")(self.alpha * x_bid + mlp(x_bid))


class Positions(nn.Module):
  """What a grouped convolution over the tokens tells of their neighbourhood, added to them."""

  taps: int
  groups: int

  @nn.compact
  def __call__(self, x_bid: Array) -> Array:
    """Returns [b, i, d]."""
    d = x_bid.shape[-1]
    shape = (self.taps, d // self.groups, d)
    kernel = self.param("kernel", logical(vit.normal, None, None, None), shape)
    bias = self.param("bias", logical(layers.zeros, None), (d,))
    y_bid = jax.lax.conv_general_dilated(
      x_bid,
      kernel,
      (1,),
      [(self.taps // 2, self.taps // 2 - 1)],
      dimension_numbers=("NWC", "WIO", "NWC"),
      feature_group_count=self.groups,
    )
    return x_bid + vit.exact_gelu(y_bid + bias[None, None])


def build(config: Config) -> Beats:
  """Returns the functions of an encoder of the given sizes."""
  c = config
  patch = Linear((c.embed,), (None, None, "width"), bias=False, dtype=c.dtype)
  project = Linear((c.width,), (None, "width"), dtype=c.dtype)
  positions = Positions(c.taps, c.groups)
  block = Block(c.heads, c.ffn, (2 * c.layers) ** 0.25, c.dtype)

  def init(key: Array) -> Any:
    keys = jax.random.split(key, 7)
    x_bie, x_bid = jnp.zeros((1, 1, c.embed)), jnp.zeros((1, 1, c.width))
    bias_hij = jnp.zeros((c.heads, 1, 1))
    return {
      "patch": patch.init(keys[0], jnp.zeros((1, 1, PATCH, PATCH)))["params"],
      "norm_patch": vit.Norm().init(keys[1], x_bie)["params"],
      "project": project.init(keys[2], x_bie)["params"],
      "positions": positions.init(keys[3], x_bid)["params"],
      "norm": vit.Norm().init(keys[4], x_bid)["params"],
      "distances": logical(vit.normal, None, "heads")(keys[5], (c.buckets, c.heads)),
      "blocks": vit.init_blocks(block, keys[6], c.layers, x_bid, bias_hij),
    }

  def encode(params: Any, audio_bp: Array) -> Array:
    mel_bnm = filter_bank(audio_bp)
    rows = mel_bnm.shape[1] // PATCH
    x = mel_bnm[:, : rows * PATCH].reshape(-1, rows, PATCH, N_MELS // PATCH, PATCH)
    x = x.swapaxes(2, 3).reshape(len(mel_bnm), -1, PATCH, PATCH)
    x = patch.apply({"params": params["patch"]}, x)
    x = project.apply(
      {"params": params["project"]}, vit.Norm().apply({"params": params["norm_patch"]}, x)
    )
    x = positions.apply({"params": params["positions"]}, jnp.asarray(x, jnp.float32))
    x_bid = jnp.asarray(vit.Norm().apply({"params": params["norm"]}, x))
    bucket_ij = buckets(x_bid.shape[1], c.buckets, c.max_distance)
    bias_hij = jnp.moveaxis(params["distances"][bucket_ij], -1, 0)
    features = []
    for first in range(0, EVERY * (c.layers // EVERY), EVERY):
      x_bid = vit.run_blocks(
        block, params["blocks"], x_bid, first, first + EVERY, extra=(bias_hij,)
      )
      features.append(x_bid)
    return jnp.concatenate(features, axis=-1)

  return Beats(init, encode)
