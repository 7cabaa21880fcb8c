"""Heat maps of what sounds -> five descriptors per video frame -> the spatial condition C_s.

The paper (arXiv 2601.15017, visual-guided audio spatialization) names the five descriptors and
the order ConvMLP, upsampling, batch normalisation; the formulas are this project's. All keep or
flip their sign when the image is mirrored, see `MIRROR_SIGNS`.

Axis letters: b batch, v video frame, y image row, x image column (to the right), k descriptor
(S_h, S_area, S_var, S_LR, S_shape), t latent frame, d width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax.models import layers
from spatialv2a_jax.models.layers import GatedMlp, Linear

DESCRIPTORS = ("S_h", "S_area", "S_var", "S_LR", "S_shape")
MIRROR_SIGNS = np.array([-1, 1, 1, -1, 1], np.float32)
THRESHOLD = 0.5
BATCH_NORM_EPS = 1e-5
MOMENTUM = 0.9


def descriptors(
  heat_bvyx: jax.Array,
  *,
  position_mode: str = "box",
  lr_support: str = "box",
  shape_mode: str = "anisotropy",
) -> tuple[jax.Array, jax.Array]:
  """Returns where and how widely something sounds in every frame.

  S_h is the horizontal position in [-1, 1] (right positive), S_area the share of pixels at or
  above one half, S_var the mean variance of the two axes (0 a point, 1 a uniform full frame),
  S_LR the balance (right - left) / (right + left), S_shape in (-1, 1) is positive for wide and
  negative for tall regions. All are 0 where no pixel reaches one half.

  Args:
    heat_bvyx: heat maps in [0, 1].
    position_mode: S_h from the centre of the bounding "box" or from the heat's "centroid".
    lr_support: S_LR within the "box" or over the whole "frame".
    shape_mode: S_shape as "anisotropy", or as normalised "entropy" in [0, 1].

  Returns:
    Descriptors [b, v, k] in float32, and a mask [b, v] of frames in which something sounds.

  Raises:
    ValueError: for an unknown mode.
  """
  for mode, known in (
    (position_mode, ("box", "centroid")),
    (lr_support, ("box", "frame")),
    (shape_mode, ("anisotropy", "entropy")),
  ):
    if mode not in known:
      raise ValueError(f"unknown mode {mode!r}, have: {known}")

  heat = heat_bvyx.astype(jnp.float32)
  rows, columns = heat.shape[-2:]
  mask = heat >= THRESHOLD
  valid_bv = mask.any(axis=(-2, -1))

  first_x, last_x, in_x = _extent(mask.any(axis=-2))
  _, _, in_y = _extent(mask.any(axis=-1))
  q = heat * in_y[..., :, None] * in_x[..., None, :]
  p = q / jnp.maximum(q.sum(axis=(-2, -1), keepdims=True), 1e-6)
  p_x, p_y = p.sum(axis=-2), p.sum(axis=-1)
  mean_x, var_x = _moments(p_x)
  _, var_y = _moments(p_y)

  box_x = (first_x + last_x + 1) / columns - 1
  side_x = jnp.sign(_centres(columns)).reshape(1, 1, -1)
  lr_x = p_x if lr_support == "box" else heat.sum(axis=-2)
  balance = (lr_x * side_x).sum(axis=-1) / jnp.maximum((lr_x * abs(side_x)).sum(axis=-1), 1e-6)
  if shape_mode == "anisotropy":
    shape = (var_x - var_y) / (var_x + var_y + 1e-4)
  else:
    shape = -jax.scipy.special.xlogy(p, p).sum(axis=(-2, -1)) / np.log(max(rows * columns, 2))

  d_bvk = jnp.stack(
    [
      box_x if position_mode == "box" else mean_x,
      mask.mean(axis=(-2, -1)),
      (var_x + var_y) / 2,
      balance,
      shape,
    ],
    axis=-1,
  )
  return jnp.where(valid_bv[..., None], d_bvk, 0.0), valid_bv


def _centres(size: int) -> jax.Array:
  # Odd about the middle to the bit, so that a mirrored map gives the mirrored numbers.
  return jnp.asarray((2 * np.arange(size) + 1 - size) / size, jnp.float32)


def _extent(hit: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """First and last index that is hit, and the mask of the closed interval between them."""
  size = hit.shape[-1]
  first = jnp.argmax(hit, axis=-1)
  last = size - 1 - jnp.argmax(hit[..., ::-1], axis=-1)
  index = jnp.arange(size).reshape(1, 1, -1)
  return first, last, (index >= first[..., None]) & (index <= last[..., None])


def _moments(p: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean, and variance scaled so that a uniform discrete distribution has exactly 1."""
  size = p.shape[-1]
  x = _centres(size).reshape(1, 1, -1)
  mean = (p * x).sum(axis=-1)
  variance = (p * jnp.square(x - mean[..., None])).sum(axis=-1)
  return mean, variance * (3 * size**2 / max(size**2 - 1, 1))


def batch_norm(
  x_btd: jax.Array,
  scale_d: jax.Array,
  bias_d: jax.Array,
  stats: dict[str, jax.Array],
  keep_b: jax.Array,
  *,
  train: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Batch normalisation over clips and time as a pure function.

  Args:
    x_btd: input.
    scale_d: learned scale.
    bias_d: learned offset.
    stats: running `mean` and (biased) `var`.
    keep_b: clips that count in the statistics of the batch.
    train: normalises with the statistics of the batch and moves the running ones.

  Returns:
    The normalised input in float32, and the new running statistics.
  """
  x = x_btd.astype(jnp.float32)
  mean, var = stats["mean"], stats["var"]
  if train:
    share_b11 = (keep_b / jnp.maximum(keep_b.sum() * x.shape[1], 1))[:, None, None]
    mean = (x * share_b11).sum(axis=(0, 1))
    var = (jnp.square(x - mean[None, None]) * share_b11).sum(axis=(0, 1))
    momentum = jnp.where(keep_b.any(), MOMENTUM, 1.0)
    new = {"mean": mean, "var": var}
    new = {n: momentum * stats[n] + (1 - momentum) * new[n] for n in new}
    stats = jax.lax.stop_gradient(new)
  x = (x - mean[None, None]) * jax.lax.rsqrt(var + BATCH_NORM_EPS)[None, None]
  return x * scale_d[None, None] + bias_d[None, None], stats


class SpatialCondition(nn.Module):
  """Descriptors -> C_s at the latent rate: Conv1d, SiLU, ConvMLP, upsampling, BatchNorm.

  Attributes:
    width: d.
    ffn: hidden width of the ConvMLP.
    dtype: of the convolutions.
  """

  width: int
  ffn: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    d_bvk: jax.Array,
    stats: dict[str, jax.Array],
    drop_b: jax.Array,
    keep_b: jax.Array,
    *,
    latent_len: int,
    train: bool,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns C_s [b, t, d] and the new running statistics.

    Args:
      d_bvk: descriptors of every video frame.
      stats: running statistics of the BatchNorm.
      drop_b: clips whose condition becomes the learned null vector, after the BatchNorm.
      keep_b: clips that count in the statistics.
      latent_len: latent frames t.
      train: see `batch_norm`.
    """
    d = self.width
    x = Linear((d,), (None, "width"), taps=7, dtype=self.dtype, name="first")(d_bvk)
    x = GatedMlp(self.ffn, taps=3, dtype=self.dtype, name="mlp")(nn.silu(x))
    x_btd = x[:, layers.nearest_exact(x.shape[1], latent_len)]
    scale = self.param("scale", layers.logical(layers.ones, None), (d,))
    bias = self.param("bias", layers.logical(layers.zeros, None), (d,))
    null = self.param("null", layers.logical(layers.zeros, None), (d,))
    y_btd, stats = batch_norm(x_btd, scale, bias, stats, keep_b, train=train)
    return jnp.where(drop_b[:, None, None], null[None, None], y_btd), stats
