"""Features of a clip -> conditions of the flow network; nothing here depends on flow time.

Axis letters: b batch, v video frame, s synchronisation token, w text token, t latent frame,
f feature of an encoder, k spatial descriptor, d width.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from spatialv2a_jax.models import layers
from spatialv2a_jax.models.layers import GatedMlp, Linear

SYNC_SEGMENT = 8  # Synchformer gives this many tokens per segment of 16 video frames.
normal = nn.initializers.normal(0.02)


class Project(nn.Module):
  """One modality's input projection: linear map or convolution, activation, gated MLP.

  MMAudio v1 activates only the convolutions, with SELU; v2 activates all, with SiLU.
  """

  width: int
  ffn: int
  source: str | None
  first_taps: int
  taps: int
  v2: bool
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x_btf: jax.Array) -> jax.Array:
    """Maps features [..., t, f] to tokens [..., t, d]."""
    first_axes = (self.source, "width")
    first = Linear((self.width,), first_axes, self.first_taps, dtype=self.dtype, name="first")
    x_btd = first(x_btf)
    if self.v2:
      x_btd = nn.silu(x_btd)
    elif self.first_taps:
      x_btd = nn.selu(x_btd)
    return GatedMlp(self.ffn, self.taps, dtype=self.dtype, name="mlp")(x_btd)


class Condition(nn.Module):
  """Null features for what is dropped, projections, upsampling of the synchronisation tokens."""

  width: int
  ffn: int
  clip_dim: int
  sync_dim: int
  v2: bool
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    cond: Mapping[str, jax.Array],
    drop: Mapping[str, jax.Array],
    null_text_wf: jax.Array,
    latent_len: int,
  ) -> dict[str, jax.Array]:
    """Returns tokens and vectors by name; see `flow_net.FlowNet.condition`."""
    null_clip = self.param("null_clip", layers.logical(layers.zeros, None), (self.clip_dim,))
    null_sync = self.param("null_sync", layers.logical(layers.zeros, None), (self.sync_dim,))
    pos_init = layers.logical(layers.zeros, None, None)
    sync_pos = self.param("sync_pos", pos_init, (SYNC_SEGMENT, self.sync_dim))

    video_b11 = drop["video"][:, None, None]
    clip_bvf = jnp.where(video_b11, null_clip[None, None], cond["clip_bvf"])
    sync_bsf = jnp.where(video_b11, null_sync[None, None], cond["sync_bsf"])
    text_bwf = jnp.where(drop["text"][:, None, None], null_text_wf[None], cond["text_bwf"])
    segments = sync_bsf.shape[1] // SYNC_SEGMENT
    sync_bsf += jnp.tile(sync_pos, (segments, 1))[None]

    kind = {"v2": self.v2, "dtype": self.dtype}
    clip_bvd = Project(self.width, self.ffn, None, 0, 3, name="clip", **kind)(clip_bvf)
    sync_bsd = Project(self.width, self.ffn, None, 7, 3, name="sync", **kind)(sync_bsf)
    text_bwd = Project(self.width, self.ffn, None, 0, 0, name="text", **kind)(text_bwf)
    sync_btd = sync_bsd[:, layers.nearest_exact(sync_bsd.shape[1], latent_len)]

    def vector(name, x_bnd):
      # Whole on every device: so small an input would be split like the weights, not they gathered.
      axes = (None, None)
      mean_bd = x_bnd.astype(jnp.float32).mean(axis=1)
      return Linear((self.width,), axes, dtype=self.dtype, name=name)(mean_bd)

    clip_bd, text_bd = vector("clip_mean", clip_bvd), vector("text_mean", text_bwd)
    global_bd = GatedMlp(self.ffn, dtype=self.dtype, name="global")(clip_bd + text_bd)
    return {
      "clip_bvd": clip_bvd,
      "text_bwd": text_bwd,
      "sync_btd": sync_btd,
      "clip_mean_bd": clip_bd,
      "text_mean_bd": text_bd,
      "global_bd": global_bd,
    }


class TimeEmbedding(nn.Module):
  """Flow time -> vector: sines and cosines in float32, then a two-layer MLP.

  MMAudio v1 uses 256 features of frequency 1 and below, v2 `width` features up to 10000.
  """

  width: int
  v2: bool
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, t_b: jax.Array) -> jax.Array:
    """Maps times in [0, 1] to [b, d]."""
    size, period = (self.width, 1.0) if self.v2 else (256, 10_000.0)
    x = layers.timestep_features(t_b, layers.timestep_table(size, period))
    dense = {"kernel_init": normal, "dtype": self.dtype}
    x = nn.silu(Linear((self.width,), (None, "width"), name="first", **dense)(x))
    return Linear((self.width,), ("width", None), name="second", **dense)(x)
