"""Conditional flow matching on the latents of both ears. Knows a velocity, no model.

Path, target and sampling of time follow the paper (section on conditional flow matching, one
velocity field per ear) and MMAudio: x_t = (1 - t) x_0 + t x_1, target x_1 - x_0, t logit-normal.

Axes: b clip, e ear (0 left, 1 right), t latent frame, c latent channel.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt32

Cond = Mapping[str, Array]
Velocity = Callable[[Array, Array], Array]  # (x_betc, t_b) -> v_betc


class Net(Protocol):
  """What the loss and the sampler need of a network (see `models.flow_net`)."""

  def condition(
    self,
    params: Any,
    stats: Any,
    cond: Cond,
    drop: Mapping[str, Array],
    *,
    latent_len: int,
    train: bool,
  ) -> tuple[Any, Any]:
    """Returns the part that depends on neither time nor latents, and the new statistics."""
    ...

  def velocity(self, params: Any, x_betc: Array, t_b: Array, prepared: Any) -> Array:
    """Returns the velocity of both ears."""
    ...

  def normalize(self, params: Any, x_betc: Array) -> Array:
    """Returns latents of zero mean and unit variance."""
    ...

  def unnormalize(self, params: Any, x_betc: Array) -> Array:
    """Inverts `normalize`."""
    ...


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Numbers of the training objective.

  Attributes:
    drop_video: share of clips trained without the semantic and synchronisation features.
    drop_text: share of clips trained without text.
    drop_spatial: share of clips trained without the spatial condition, which those without video
      and text never have: `guided` subtracts what the network says of nothing at all, and would
      meet that in one clip of a thousand.
    ear_correlation: correlation of the two ears' noise in 0..1. Each ear's noise is standard
      normal whatever its value; at 1 both ears start equal, so that what differs between them
      comes from the condition alone.
    difference_weight: weight of the squared error of the left-minus-right velocity, which
      carries the interaural cues; 0 is the paper's objective.
    mirror_weight: weight of the squared difference between the velocity and that of the mirrored
      clip with its ears exchanged, which an ideal model makes equal. Costs a second pass, and
      needs the mirrored condition in the batch; 0 is the paper's objective.
  """

  drop_video: float = 0.1
  drop_text: float = 0.1
  drop_spatial: float = 0.1
  ear_correlation: float = 0.0
  difference_weight: float = 0.0
  mirror_weight: float = 0.0

  def checked(self) -> "LossConfig":
    """Returns itself; ValueError for a number out of its range. Not when made: it may be traced."""
    for name in ("drop_video", "drop_text", "drop_spatial", "ear_correlation"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name}={getattr(self, name)} is not in 0..1")
    for name in ("difference_weight", "mirror_weight"):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(f"{name}={getattr(self, name)} is not 0 or more")
    return self


def clip_keys(key: Key[Array, ""], id_b: UInt32[Array, " b"]) -> Key[Array, " b"]:
  """Returns one key per clip, so that a clip's draws ignore batch order, hosts and mesh."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, id_b)


def ear_noise(
  key: Key[Array, ""], frames: int, channels: int, *, ears: int, correlation: float, start: int = 0
) -> Float[Array, "e t c"]:
  """Returns standard normal noise of which each latent frame has its own key.

  A window that starts at frame `start` of a long clip draws what the whole clip draws there.

  Args:
    key: key of the clip.
    frames: latent frames to draw.
    channels: latent channels.
    ears: 1 or 2.
    correlation: of the ears, in 0..1.
    start: index of the first frame within the clip.
  """

  def frame(index):
    return jax.random.normal(jax.random.fold_in(key, index), (1 + ears, channels))

  draws_tec = jax.vmap(frame)(jnp.arange(start, start + frames, dtype=jnp.uint32))
  shared_etc = jnp.broadcast_to(draws_tec[:, 0], (ears, frames, channels))
  own_etc = jnp.moveaxis(draws_tec[:, 1:], 1, 0)
  return correlation**0.5 * shared_etc + (1 - correlation) ** 0.5 * own_etc


def loss(
  params: Any,
  stats: Any,
  batch: Mapping[str, Array],
  key: Key[Array, ""],
  *,
  net: Net,
  config: LossConfig,
  train: bool = True,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], Any]]:
  """Squared error of the velocity along the path from noise to data, summed over ears.

  Args:
    params: parameters of `net`.
    stats: running statistics of `net`.
    batch: `mean_betc`, `std_betc`, `id_b`, `weight_b` (0 marks padding) and the condition; with
      `mirror_weight` also `clip_mirror_bvf`, `sync_mirror_bsf` and `spatial_mirror_bvk`.
    key: key of this step.
    net: the network.
    config: numbers of the objective.
    train: whether statistics are those of the batch (and are updated).

  Returns:
    The scalar to minimise (mean over real clips), and (metrics, new statistics).
  """
  mean_betc, weight_b = batch["mean_betc"], batch["weight_b"]
  _, ears, frames, channels = mean_betc.shape

  def draw(key):
    k_time, k_noise, k_data, k_drop = jax.random.split(key, 4)
    noise = {"ears": ears, "correlation": config.ear_correlation}
    return (
      jax.nn.sigmoid(jax.random.normal(k_time)),
      ear_noise(k_noise, frames, channels, **noise),
      ear_noise(k_data, frames, channels, **noise),
      jax.random.uniform(k_drop, (3,)),
    )

  t_b, noise_betc, eps_betc, u_bd = jax.vmap(draw)(clip_keys(key, batch["id_b"]))
  drop = {"video": u_bd[:, 0] < config.drop_video, "text": u_bd[:, 1] < config.drop_text}
  nothing_b = drop["video"] & drop["text"]  # Then guidance knows no place either.
  drop["spatial"] = (u_bd[:, 2] < config.drop_spatial) | nothing_b
  cond = {name: batch[name] for name in ("clip_bvf", "sync_bsf", "text_bwf", "spatial_bvk")}
  cond["weight_b"] = weight_b
  prepared, new_stats = net.condition(params, stats, cond, drop, latent_len=frames, train=train)

  data_betc = net.normalize(params, mean_betc + batch["std_betc"] * eps_betc)
  t_b111 = t_b[:, None, None, None]
  x_betc = (1 - t_b111) * noise_betc + t_b111 * data_betc
  velocity_betc = net.velocity(params, x_betc, t_b, prepared)
  error_betc = (velocity_betc - (data_betc - noise_betc)).astype(jnp.float32)

  def clip_mean(x_b):
    return (weight_b * x_b).sum() / jnp.maximum(weight_b.sum(), 1)

  square_be = jnp.square(error_betc).mean(axis=(2, 3))
  per_ear = [clip_mean(square_be[:, i]) for i in range(ears)]
  total = sum(per_ear, jnp.zeros(()))
  names = ("loss/left", "loss/right") if ears == 2 else ("loss/mono",)
  metrics: dict[str, Array] = dict(zip(names, per_ear, strict=True))
  if ears == 2:
    difference_b = jnp.square(error_betc[:, 0] - error_betc[:, 1]).mean(axis=(1, 2))
    metrics["loss/difference"] = clip_mean(difference_b)
    total = total + config.difference_weight * metrics["loss/difference"]
  if config.mirror_weight:
    for name in ("clip_bvf", "sync_bsf", "spatial_bvk"):
      cond[name] = batch[name.replace("_", "_mirror_")]
    prepared, _ = net.condition(params, stats, cond, drop, latent_len=frames, train=train)
    there_betc = net.velocity(params, x_betc[:, ::-1], t_b, prepared)[:, ::-1]
    gap_betc = (velocity_betc - there_betc).astype(jnp.float32)
    metrics["loss/mirror"] = clip_mean(jnp.square(gap_betc).mean(axis=(1, 2, 3)))
    total = total + config.mirror_weight * metrics["loss/mirror"]
  return total, (metrics, new_stats)


def guided(
  net: Net,
  params: Any,
  stats: Any,
  cond: Cond,
  *,
  latent_len: int,
  guidance: float,
  spatial_guidance: float | None = None,
  negative_text_bwf: Array | None = None,
  missing: Mapping[str, Bool[Array, " b"]] | None = None,
) -> Velocity:
  """Returns a velocity with classifier-free guidance; all branches run in one batch.

  v = v_null + guidance (v_plain - v_null) + spatial_guidance (v_full - v_plain), where `plain`
  has every condition but the spatial one. With equal scales this is the usual two-branch rule.

  Args:
    net: the network.
    params: its parameters.
    stats: its running statistics.
    cond: condition of the batch.
    latent_len: latent frames.
    guidance: strength; 0 is the unconditional branch, 1 the conditional one, which then runs alone.
    spatial_guidance: strength of the spatial condition; None is the same as `guidance`.
    negative_text_bwf: text features that replace the null text of the unconditional branch.
    missing: conditions (of "video", "text", "spatial") that each clip does not have.
  """
  rows = cond["clip_bvf"].shape[0]
  none, every = jnp.zeros(rows, bool), jnp.ones(rows, bool)
  absent = {"video": none, "text": none, "spatial": none} | dict(missing or {})
  scale = guidance if spatial_guidance is None else spatial_guidance
  separate = scale != guidance

  branches = [(cond, absent)]
  if guidance != 1.0 or separate:
    negative = dict(cond)
    drop = {"video": every, "text": every, "spatial": every}
    if negative_text_bwf is not None:
      negative["text_bwf"], drop["text"] = negative_text_bwf, none
    branches.append((negative, drop))
  if separate:
    branches.append((cond, absent | {"spatial": every}))

  stacked = {n: jnp.concatenate([c[n] for c, _ in branches]) for n in cond}
  drops = {n: jnp.concatenate([d[n] for _, d in branches]) for n in absent}
  prepared, _ = net.condition(params, stats, stacked, drops, latent_len=latent_len, train=False)

  def velocity(x_betc, t_b):
    n = len(branches)
    v = net.velocity(params, jnp.concatenate([x_betc] * n), jnp.concatenate([t_b] * n), prepared)
    full, *rest = jnp.split(v, n)
    if not rest:
      return full
    null, plain = rest if separate else (rest[0], full)
    v = guidance * plain + (1 - guidance) * null
    return v + scale * (full - plain) if separate else v

  return velocity


class Solver(NamedTuple):
  """An explicit solver; every evaluation starts from at most the one before it.

  Attributes:
    order: of the error, which falls as the number of steps to the minus `order`.
    nodes: time of each evaluation within a step; it is made at x + node dt v, v the one before.
    weights: share of each evaluation in the step.
    memory: share of the last evaluation of the step before, taken from that of the first.
  """

  order: int
  nodes: tuple[float, ...]
  weights: tuple[float, ...]
  memory: float = 0.0


# "ab2" is the two-step Adams-Bashforth method: second order at Euler's price.
SOLVERS = {
  "euler": Solver(1, (0.0,), (1.0,)),
  "ab2": Solver(2, (0.0,), (1.0,), memory=-0.5),
  "midpoint": Solver(2, (0.0, 0.5), (0.0, 1.0)),
  "rk4": Solver(4, (0.0, 0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def sample(
  velocity: Velocity,
  x_betc: Float[Array, "b e t c"],
  *,
  steps: int,
  method: str = "euler",
  compiled: bool = True,
) -> Float[Array, "b e t c"]:
  """Integrates the flow from noise at t = 0 to data at t = 1.

  All evaluations share one program, whatever the solver.

  Args:
    velocity: function of (x, t).
    x_betc: noise.
    steps: equal steps of time.
    method: one of SOLVERS; "euler" and "ab2" evaluate once a step, "midpoint" twice, "rk4" four
      times.
    compiled: False calls `velocity` once for each evaluation, so that it may be any function.

  Raises:
    ValueError: for an unknown method.
  """
  if method not in SOLVERS:
    raise ValueError(f"unknown method {method!r}, have: {', '.join(SOLVERS)}")
  solver = SOLVERS[method]
  count, rows, dt = len(solver.nodes), x_betc.shape[0], 1.0 / steps
  node, weight = np.tile(solver.nodes, steps), np.tile(solver.weights, steps)
  memory = np.zeros(steps * count)
  memory[count::count] = solver.memory  # The first step has nothing to remember.
  time = np.repeat(np.arange(steps), count) / steps + dt * node
  last = np.arange(steps * count) % count == count - 1
  plan = (time, dt * node, dt * (weight - memory), dt * memory)

  def evaluate(state, now):
    x, total, before = state
    (t, reach, share, remembered), ends = now
    v = velocity(x + reach * before, jnp.full(rows, t))
    total = total + (share * v + remembered * before)
    return (jnp.where(ends, total, x), total, v), None

  numbers = tuple(jnp.asarray(row, x_betc.dtype) for row in plan)
  start = x_betc, x_betc, jnp.zeros_like(x_betc)
  if not compiled:
    state = start
    for *now, ends in zip(*numbers, last, strict=True):
      state, _ = evaluate(state, (now, ends))
    return state[0]
  return jax.lax.scan(evaluate, start, (numbers, jnp.asarray(last)))[0][0]
