"""Decides inside the jitted step whether an update counts.

An update whose loss or gradient is not finite, or far above what the run has lately seen, is left
out: nothing but the step number changes. The decision is a function of the state, which carries
its own running statistics; so it is the same in every process and after every resume. As
`SkipStep` of OLMo-core and Levanter, with exponential instead of windowed statistics.

Axes: q watched quantity (0 loss, 1 norm of the gradient).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from spatialv2a_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
  """When an update is left out, and when the run gives up.

  Attributes:
    sigma: an update is left out if its loss or the norm of its gradient lies more standard
      deviations than this above the running mean; 0: only if one of them is not finite.
    window: updates over which mean and deviation run.
    warmup: updates that are seen before any of them counts as a spike.
    cap: updates left out before the run stops; `window` good ones in a row clear the count.
  """

  sigma: float = 6.0
  window: int = 128
  warmup: int = 64
  cap: int = 10

  def __post_init__(self):
    for name, least in {"sigma": 0, "window": 1, "warmup": 2, "cap": 0}.items():
      if getattr(self, name) < least:
        raise UserError(f"guard.{name}={getattr(self, name)} is less than {least}")


@struct.dataclass
class Guard:
  """State of the guard; part of the state of a run.

  Attributes:
    mean_q: running mean.
    var_q: running variance.
    seen: updates in the statistics.
    skipped: updates left out since the run began.
    burst: updates left out since the count was last cleared.
    good: updates that counted, in a row.
  """

  mean_q: Any
  var_q: Any
  seen: Any
  skipped: Any
  burst: Any
  good: Any


def init() -> Guard:
  """Returns the state of a run that has seen nothing."""
  zero = jnp.zeros((), jnp.int32)
  return Guard(jnp.zeros(2), jnp.zeros(2), zero, zero, zero, zero)


def anew(guard: Guard) -> Guard:
  """Returns a guard that has yet to see what is usual, and knows what was left out before."""
  return jax.tree.map(jnp.zeros_like, guard).replace(skipped=guard.skipped)


def judge(
  config: Config, guard: Guard, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Guard, dict[str, jax.Array]]:
  """Judges one update.

  Args:
    config: the rules.
    guard: what was seen before.
    loss: of the step.
    grad_norm: of the step, before clipping.

  Returns:
    Whether the update counts, the guard after it, and the metrics `sigmas` (how many deviations
    the worse of the two lies above its mean; 0 during the warm-up), `skipped` (updates left out
    so far) and `burst`.
  """
  x_q = jnp.stack([loss, grad_norm]).astype(jnp.float32)
  # A thousandth of the mean is no spike, however constant the quantity was.
  floor_q = jnp.square(1e-3 * guard.mean_q) + 1e-12
  sigmas_q = (x_q - guard.mean_q) / jnp.sqrt(guard.var_q + floor_q)
  sigmas = jnp.where(guard.seen >= config.warmup, sigmas_q.max(), 0.0)
  good = jnp.isfinite(x_q).all()
  if config.sigma:
    good &= sigmas <= config.sigma

  rate = 1 / jnp.minimum(guard.seen + 1, config.window).astype(jnp.float32)
  step_q = rate * (x_q - guard.mean_q)
  mean_q = guard.mean_q + step_q
  var_q = (1 - rate) * (guard.var_q + step_q * (x_q - guard.mean_q))
  row = jnp.where(good, guard.good + 1, 0)
  left_out = jnp.where(good, 0, 1)
  new = Guard(
    mean_q=jnp.where(good, mean_q, guard.mean_q),
    var_q=jnp.where(good, var_q, guard.var_q),
    seen=jnp.where(good, guard.seen + 1, guard.seen),
    skipped=guard.skipped + left_out,
    burst=jnp.where(row >= config.window, 0, guard.burst + left_out),
    good=row,
  )
  metrics = {"sigmas": sigmas, "skipped": new.skipped, "burst": new.burst}
  return good, new, metrics


def select(good: jax.Array, new: Any, old: Any) -> Any:
  """Returns `new` if the update counts, else `old`, bit for bit."""
  return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
