"""The optimiser: AdamW with its schedule, tables over parameter names, and weight averages.

The recipe is MMAudio's (github.com/hkchengrex/MMAudio), which the paper trains with: linear
warm-up, step decay counted after the warm-up, one global gradient norm, decay on all weights.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spatialv2a_jax.errors import UserError
from spatialv2a_jax.sharding import parameter_name

Table = Sequence[tuple[str, Any]]  # (regex over whole parameter names, value); first match wins


@dataclasses.dataclass(frozen=True)
class Config:
  """Numbers of the optimiser.

  Attributes:
    lr: peak learning rate.
    warmup: steps of linear warm-up.
    decay: "constant", "step" or "cosine".
    milestones: steps after the warm-up at which "step" multiplies the rate by `gamma`.
    gamma: factor of "step".
    steps: length of "cosine", warm-up included; the configs give that of the run.
    final: share of the peak at which "cosine" ends.
    betas: decay of the two moments of Adam.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay, multiplied by the learning rate.
    clip: largest global norm of the gradient of what is trained; 0 turns clipping off.
    freeze: table of booleans; frozen parameters get no gradient and no optimiser state.
    lr_scale: table of factors of the learning rate.
    decay_scale: table of factors of the weight decay.

  Raises:
    ValueError: for a value out of its range, or a schedule that contradicts itself.
  """

  lr: float = 1e-4
  warmup: int = 1000
  decay: str = "constant"
  milestones: tuple[int, ...] = ()
  gamma: float = 0.1
  steps: int = 0
  final: float = 0.0
  betas: tuple[float, float] = (0.9, 0.95)
  eps: float = 1e-8
  weight_decay: float = 1e-6
  clip: float = 1.0
  freeze: Table = ((".*", False),)
  lr_scale: Table = ((".*", 1.0),)
  decay_scale: Table = ((".*", 1.0),)

  def __post_init__(self):
    if self.decay not in ("constant", "step", "cosine"):
      raise ValueError(f"decay={self.decay!r} is unknown, have: constant, step, cosine")
    for name in ("lr", "eps", "gamma"):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f"{name}={getattr(self, name)} is not above 0")
    for name in ("warmup", "weight_decay", "clip"):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(f"{name}={getattr(self, name)} is not 0 or more")
    if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
      raise ValueError(f"betas={self.betas} are not two numbers in [0, 1)")
    if not 0 <= self.final <= 1:
      raise ValueError(f"final={self.final} is not in 0..1")
    if list(self.milestones) != sorted({x for x in self.milestones if x >= 0}):
      raise ValueError(f"milestones={self.milestones} are not steps in rising order")
    if self.decay == "cosine" and self.steps <= self.warmup:
      raise ValueError(f"cosine ends at steps={self.steps}, not after warmup={self.warmup}")
    _check(self.freeze, "freeze", lambda x: isinstance(x, bool), "True or False")
    for name in ("lr_scale", "decay_scale"):
      _check(getattr(self, name), name, _factor, "a number of 0 or more")

  def remarks(self, steps: int) -> list[str]:
    """Returns lines on what of the schedule a run of `steps` steps does not reach."""
    if steps <= self.warmup:
      return [
        f"the learning rate does not reach optim.lr={self.lr:g}: the run has {steps} steps, the "
        f"warm-up {self.warmup}"
      ]
    late = [self.warmup + x for x in self.milestones if self.warmup + x >= steps]
    if self.decay != "step" or not late:
      return []
    return [
      f"the learning rate does not fall at {late}: the run has {steps} steps, and "
      "optim.milestones are counted after the warm-up"
    ]


def _factor(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _check(table: Table, label: str, fits: Callable[[Any], bool], kind: str) -> None:
  """Raises ValueError with the first row that is no regex and value."""
  for row in table:
    pair = isinstance(row, list | tuple) and len(row) == 2 and isinstance(row[0], str)
    if not pair or not fits(row[1]):
      raise ValueError(f"table {label}: {row!r} is not (regex, {kind})")
    try:
      re.compile(row[0])
    except re.error as error:
      raise ValueError(f"table {label}: {row!r} is no regular expression: {error}") from error


class Optimizer(NamedTuple):
  """What a train step needs.

  Attributes:
    tx: the update rule.
    lr: learning rate of a step, for the log.
    trainable: function that cuts the gradient of the frozen parameters.
  """

  tx: optax.GradientTransformation
  lr: Callable[[Any], Any] | None = None
  trainable: Callable[[Any], Any] = lambda params: params


def names(tree: Any) -> list[str]:
  """Returns the parameter names of a tree, as "block/qkv/kernel"."""
  return [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def lookup(table: Table, parameters: Sequence[str], label: str) -> dict[str, Any]:
  """Returns the value of each parameter: that of the first regex that matches its whole name.

  Args:
    table: pairs of a regex and a value.
    parameters: parameter names.
    label: name of the table, for messages.

  Raises:
    UserError: if a parameter matches no regex, or a regex other than ".*" decides nothing.
  """
  values, used = {}, set()
  for name in parameters:
    index = next((i for i, (regex, _) in enumerate(table) if re.fullmatch(regex, name)), None)
    if index is None:
      raise UserError(f'table {label} covers no parameter {name!r}; end it with (".*", value)')
    values[name] = table[index][1]
    used.add(index)
  for i, (regex, _) in enumerate(table):
    if i not in used and regex != ".*":
      raise UserError(f"table {label}: {regex!r} matches no parameter, or an earlier row hides it")
  return values


def schedule(config: Config) -> Callable[[Any], Any]:
  """Returns the learning rate as a function of the step, counted from 0."""

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum((step + 1) / (config.warmup + 1), 1.0) if config.warmup else 1.0
    after = jnp.maximum(step - config.warmup, 0)
    scale = jnp.ones(())
    for milestone in config.milestones if config.decay == "step" else ():
      scale = jnp.where(after >= milestone, config.gamma * scale, scale)
    if config.decay == "cosine":
      done = jnp.minimum(after / (config.steps - config.warmup), 1.0)
      scale = config.final + (1 - config.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return config.lr * warm * scale

  return rate


def adamw(config: Config, params: Any) -> Optimizer:
  """Returns AdamW with the tables of `config` resolved for these parameters.

  Args:
    config: numbers and tables.
    params: parameters or their shapes, boxed or plain.

  Raises:
    UserError: if a table does not cover the parameters, trains what models call frozen, or
      freezes everything.
  """
  known = names(params)
  frozen = lookup(config.freeze, known, "freeze")
  if all(frozen.values()):
    raise UserError(f"table freeze leaves nothing to train: {tuple(config.freeze)!r}")
  if trained := [name for name in known if name.startswith("frozen/") and not frozen[name]]:
    raise UserError(
      f"table freeze would train the constant {trained[0]!r}; begin it with ('frozen/.*', True)"
    )
  lr_scale = lookup(config.lr_scale, known, "lr_scale")
  decay = lookup(config.decay_scale, known, "decay_scale")
  rate = schedule(config)

  def by_name(function):
    """Maps function(name, leaf) over boxed, plain or masked trees."""
    return lambda tree: jax.tree_util.tree_map_with_path(
      lambda path, leaf: function(parameter_name(path), leaf), tree
    )

  def add_decay(updates, params):
    return jax.tree_util.tree_map_with_path(
      lambda path, u, p: u + config.weight_decay * decay[parameter_name(path)] * p, updates, params
    )

  def scale_rate(updates, params):
    del params
    return by_name(lambda name, u: lr_scale[name] * u)(updates)

  chain = [
    optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
    optax.scale_by_adam(*config.betas, eps=config.eps),
    optax.stateless(add_decay),
    optax.stateless(scale_rate),
    optax.scale_by_learning_rate(rate),
  ]
  labels = by_name(lambda name, _: "frozen" if frozen[name] else "trained")
  tx = optax.partition({"trained": optax.chain(*chain), "frozen": optax.set_to_zero()}, labels)
  stop = by_name(lambda name, p: jax.lax.stop_gradient(p) if frozen[name] else p)
  return Optimizer(tx, rate, stop)


@dataclasses.dataclass(frozen=True)
class Ema:
  """Exponential moving averages of the parameters.

  Attributes:
    decay: of the plain average, reached through the warm-up (1 + n) / (10 + n) at update n.
    sigma_rel: which average is evaluated and exported: the power-function one of this relative
      width (EDM2, arXiv 2312.02696; MMAudio ships 0.05), or the plain one for 0 or None.
    beside: more averages that are tracked, likewise: of two power-function widths any other can be
      made after the run (`averages`), 0 is the plain one. Each costs the memory of the parameters.
  """

  decay: float = 0.9999
  sigma_rel: float | None = None
  beside: tuple[float, ...] = ()

  def __post_init__(self):
    if not 0 <= self.decay < 1:
      raise UserError(f"ema.decay={self.decay} is not in [0, 1)")
    if len(set(self.widths)) < len(self.widths):
      raise UserError(f"ema tracks a width twice: {self.widths}")
    for width in self.widths:
      if not 0 <= width < 0.28:
        raise UserError(f"ema width {width} is not in (0, 0.28), nor 0 for the plain average")

  @property
  def widths(self) -> tuple[float, ...]:
    """Relative widths that are tracked, that of the state's `ema` first; 0 is the plain average."""
    return (self.sigma_rel or 0.0, *self.beside)

  def all(self) -> tuple["Ema", ...]:
    """Returns this average and those that are tracked beside it."""
    return (self, *(Ema(self.decay, width) for width in self.beside))

  def take(self, update: Any) -> Any:
    """Returns the weight of the new parameters in update number `update`, counted from 1."""
    n = jnp.asarray(update, jnp.float32)
    if not self.sigma_rel:
      return 1 - jnp.minimum(self.decay, (1 + n) / (10 + n))
    power = (1 + power_gamma(self.sigma_rel)) / 2
    # 1 - ((1 - 1/(n+1)) (1 - 1/(n+2)))^power, which late in a run would be rounding in float32.
    # The first update copies: the average starts at the weights after it.
    late = -jnp.expm1(power * (jnp.log1p(-1 / (n + 1)) + jnp.log1p(-1 / (n + 2))))
    return jnp.where(n > 1, late, 1.0)

  def update(self, average: Any, params: Any, update: Any) -> Any:
    """Returns the average after update number `update`; constants stay exactly what they are."""
    new = self.take(update)
    return jax.tree.map(lambda a, p: a + (new * (p - a)).astype(a.dtype), average, params)


def power_gamma(sigma_rel: float) -> float:
  """Returns the exponent of the power-function average of relative width `sigma_rel`."""
  roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
  return float(roots.real.max())


def from_mapping(values: Mapping[str, Any]) -> Config:
  """Returns a Config from a mapping, with lists made tuples.

  Raises:
    UserError: if a key is unknown.
    ValueError: as `Config`.
  """
  known = [field.name for field in dataclasses.fields(Config)]
  if unknown := sorted(set(values) - set(known)):
    raise UserError(f"optim has no {unknown}, have: {known}")
  tuples: dict[str, Any] = {
    k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()
  }
  return Config(**tuples)
