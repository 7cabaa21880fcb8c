"""Noise -> latents: single windows in batches, and all windows of a long clip together.

A clip longer than a window is one trajectory, as in MultiDiffusion (arXiv 2302.08113): in each step
every window tells the velocity of its frames, those of neighbours are cross-faded, and the clip
takes the step as a whole. Windows therefore agree on what they share. Finished latents of windows
that were sampled apart differ there, and their mean has less variance than either: dull sound.

Axes: b window, e ear (0 left, 1 right), t latent frame, c latent channel, n frame of a window,
w text token, f feature.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax import flow, schema
from spatialv2a_jax.models.flow_net import FlowNet


def clip_key(seed: int, sha256: str) -> jax.Array:
  """Returns the key of a clip's noise: of the seed and the video's content."""
  key = jax.random.key(seed, impl="threefry2x32")  # JAX's default may be set from outside.
  key = jax.random.fold_in(key, schema.clip_id("noise"))
  return jax.random.fold_in(key, int(sha256[:8], 16))


class Choice(NamedTuple):
  """What of the settings is compiled in, and how many steps are taken."""

  guidance: float
  spatial_guidance: float | None
  steps: int
  method: str


class Condition(NamedTuple):
  """Features of the windows of a batch.

  Attributes:
    cond: `clip_bvf`, `sync_bsf`, `spatial_bvk`, `text_bwf`.
    negative_bwf: features of the negative text, if there is one.
    missing_text_b: which windows have no text.
  """

  cond: Mapping[str, Any]
  negative_bwf: Any
  missing_text_b: Any

  def rows(self, index: Sequence[int]) -> "Condition":
    """Returns some of the windows, in any order."""
    return jax.tree.map(lambda x: x[np.asarray(index)], self)


class Sampler:
  """The sampler of one network, compiled once for each number of windows in a batch."""

  def __init__(self, net: FlowNet, frames: int):
    """Takes a network and the latent frames of a window."""
    self.net, self.frames = net, frames

  def _guided(self, params: Any, stats: Any, given: Condition, choice: Choice) -> flow.Velocity:
    none_b = jnp.zeros_like(given.missing_text_b)
    missing = {"video": none_b, "text": given.missing_text_b, "spatial": none_b}
    return flow.guided(
      self.net,
      params,
      stats,
      given.cond,
      latent_len=self.frames,
      guidance=choice.guidance,
      spatial_guidance=choice.spatial_guidance,
      negative_text_bwf=given.negative_bwf,
      missing=missing,
    )

  @functools.cached_property
  def windows(self) -> Callable[..., jax.Array]:
    """(params, stats, condition, noise_betc, choice) -> latents [b, e, t, c] of single windows."""

    def run(params, stats, given, noise_betc, choice):
      velocity = self._guided(params, stats, given, choice)
      x_betc = flow.sample(velocity, noise_betc, steps=choice.steps, method=choice.method)
      return self.net.unnormalize(params, x_betc)

    return jax.jit(run, static_argnums=4)

  @functools.cached_property
  def _velocity(self) -> Callable[..., jax.Array]:
    def run(params, stats, given, x_betc, t_b, choice):
      return self._guided(params, stats, given, choice)(x_betc, t_b)

    return jax.jit(run, static_argnums=5)

  def together(
    self,
    params: Any,
    stats: Any,
    given: Condition,
    noise_etc: jax.Array,
    choice: Choice,
    *,
    firsts: Sequence[int],
    share_bn: np.ndarray,
    rows: int,
    advance: Callable[[float], None],
  ) -> np.ndarray:
    """Returns the latents [e, t, c] of a clip of several windows.

    Args:
      params: of the network.
      stats: its running statistics.
      given: features of all windows.
      noise_etc: of the whole clip.
      choice: settings.
      firsts: first latent frame of each window.
      share_bn: of each window in its frames, see `windows.shares`.
      rows: windows that go through the network at once.
      advance: takes the share of all work that has been done, after each part of it.
    """
    evaluations = choice.steps * len(flow.SOLVERS[choice.method].nodes)
    fixed = choice._replace(steps=0, method="")  # Of these the program knows nothing.
    groups = [range(at, min(at + rows, len(firsts))) for at in range(0, len(firsts), rows)]
    parts = [given.rows([*group, *[group[0]] * (rows - len(group))]) for group in groups]

    def velocity(x_betc: jax.Array, t_b: jax.Array) -> jax.Array:
      x_etc = np.asarray(x_betc)[0]
      v_etc = np.zeros_like(x_etc)
      times_b = np.full(rows, t_b[0], np.float32)
      for group, part in zip(groups, parts, strict=True):
        piece_betc = np.zeros((rows, len(x_etc), self.frames, x_etc.shape[2]), np.float32)
        for i, b in enumerate(group):
          piece_betc[i] = x_etc[:, firsts[b] : firsts[b] + self.frames]
        found_betc = np.asarray(self._velocity(params, stats, part, piece_betc, times_b, fixed))
        for i, b in enumerate(group):
          span = slice(firsts[b], firsts[b] + self.frames)
          v_etc[:, span] += share_bn[b][None, :, None] * found_betc[i]
        advance(1 / (evaluations * len(groups)))
      return jnp.asarray(v_etc[None])

    x_betc = flow.sample(
      velocity, noise_etc[None], steps=choice.steps, method=choice.method, compiled=False
    )
    return np.asarray(self.net.unnormalize(params, x_betc))[0]
