"""Builds the one jitted function of training. All it needs comes in as arguments.

Axes: b clip, n part of a batch that is accumulated.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import guard as guards
from spatialv2a_jax.training import optim

# Otherwise XLA multiplies weights that are split part by part, as they come round a ring: at widths
# of 448 to 896 that takes twice as long as to gather them and multiply at once.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}

# XLA has no others since jax 0.11, and refuses the option.
FUSION_EMITTERS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}

# A program that runs once, of one random generator per parameter: LLVM would take minutes to make
# it no faster. Below level 1 it would also round otherwise.
INIT_OPTIONS = {
  "cpu": {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
    **FUSION_EMITTERS,
  }
}

Loss = Callable[..., Any]  # (params, stats, batch, key) -> (value, (metrics, new stats))


@struct.dataclass
class State:
  """What a checkpoint holds: arrays only, no functions, no keys.

  Attributes:
    step: updates done so far, int32; those that the guard left out count as well.
    params: parameters.
    ema: their moving average.
    opt: state of the optimiser.
    stats: running statistics of the normalisation layers; may be empty.
    guard: what decides whether an update counts.
    beside: averages of the widths `optim.Ema.beside`, in their order.
    means: averages of `stats`, one for `ema` and each of `beside`: averaged weights have other
      statistics than the newest ones, and the newest ones are those of few batches.
  """

  step: Any
  params: Any
  ema: Any
  opt: Any
  stats: Any
  guard: Any
  beside: tuple[Any, ...] = ()
  means: tuple[Any, ...] = ()

  def averages(self) -> tuple[tuple[Any, Any], ...]:
    """Returns each average of parameters and statistics, in the order of `optim.Ema.widths`."""
    return tuple(zip((self.ema, *self.beside), self.means, strict=True))


def init_state(
  init: Callable[[jax.Array], Any],
  stats: Any,
  optimizer: optim.Optimizer,
  key: jax.Array,
  mesh: Mesh,
  rules: sharding.Rules,
  ema: optim.Ema | None = None,
) -> tuple[Callable[[], State], Any, State]:
  """Returns a function that creates the state in place on every device, and its layout.

  Args:
    init: from a key to parameters, boxed with their axis names.
    stats: running statistics to start from.
    optimizer: from `optim.adamw`.
    key: from which the parameters derive.
    mesh: where the state lives.
    rules: meaning of the axis names.
    ema: moving average; None is the default one.

  Returns:
    create() -> State, the tree of shapes with shardings (what a restore needs), the shardings.

  All but the parameters is split further over the mesh axes of `rules.zero`.

  Raises:
    UserError: if a parameter does not divide by the mesh, or `fsdp` splits too few of them.
  """

  count = 1 + len(ema.beside if ema else ())

  def boxed(key, stats):
    params = init(key)
    opt = optimizer.tx.init(params)
    beside, means = (params,) * (count - 1), (stats,) * count
    return State(jnp.zeros((), jnp.int32), params, params, opt, stats, guards.init(), beside, means)

  shapes = jax.eval_shape(boxed, key, stats)
  whole, layout = (sharding.shardings(shapes, mesh, rules, zero=zero) for zero in (False, True))
  layout = layout.replace(params=whole.params)
  sharding.check_split(sharding.unboxed(shapes.params), layout.params, mesh, rules)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    sharding.unboxed(shapes),
    layout,
  )

  def create():
    def plain(key, stats):
      return sharding.unboxed(boxed(key, stats))

    options = INIT_OPTIONS.get(mesh.devices.flat[0].platform)
    return jax.jit(plain, out_shardings=layout, compiler_options=options)(key, stats)

  return create, abstract, layout


def overwrite(
  state: State, values: Mapping[str, Any], stats: Mapping[str, Any] | None = None
) -> State:
  """Returns the state with some parameters, their averages and running statistics replaced.

  Args:
    state: any state.
    values: part of the parameter tree, as arrays on the host.
    stats: likewise of the running statistics.

  Raises:
    UserError: naming the first parameter that is unknown or has another shape.
  """

  def replaced(tree: Any, part: Mapping[str, Any]) -> Any:
    flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    new: dict[str, Any] = traverse_util.flatten_dict(dict(part), sep="/")
    for name, value in new.items():
      have = flat[name].shape if name in flat else None
      if have != np.shape(value):
        raise UserError(
          f"cannot start from {name} of shape {np.shape(value)}: the model has {have}"
        )
      flat[name] = jax.device_put(np.asarray(value, flat[name].dtype), flat[name].sharding)
    return traverse_util.unflatten_dict(flat, sep="/")

  params = replaced(state.params, values)
  running = replaced(state.stats, stats) if stats else state.stats

  def copies(*trees):
    # The step donates its state, so that parameters and averages may not share a buffer.
    return tuple(jax.tree.map(jnp.copy, trees) for _ in state.means)

  # One program: copied one by one, every shape would be compiled.
  shardings = jax.tree.map(lambda x: x.sharding, state.averages())
  averages = jax.jit(copies, out_shardings=shardings)(params, running)
  (ema, *beside), means = zip(*averages, strict=True)
  return state.replace(  # pyright: ignore
    params=params, ema=ema, beside=tuple(beside), stats=running, means=means
  )


def make_train_step(
  loss: Loss,
  optimizer: optim.Optimizer,
  *,
  key: jax.Array,
  mesh: Mesh,
  rules: sharding.Rules,
  layout: State,
  ema: optim.Ema | None = None,
  accumulate: int = 1,
  guard: guards.Config | None = None,
) -> Callable[[State, Any], tuple[State, dict[str, jax.Array]]]:
  """Returns the jitted `step(state, batch) -> (state, metrics)`, which donates `state`.

  Args:
    loss: (params, stats, batch, key) -> (value, (metrics, new stats)); folds the clip ids into
      its key, so that a clip's draws ignore its place in the batch.
    optimizer: from `optim.adamw`.
    key: of the run; that of a step is fold_in(key, step), so a resumed run draws the same.
    mesh: where state and batch live.
    rules: which mesh axes split the batch.
    layout: shardings of the state.
    ema: moving average; None is the default one.
    accumulate: parts the batch is processed in, one after the other, to save memory: part i has
      the rows i, i + accumulate, ... Value, metrics and gradient are the means over the whole
      batch, by the weights of its clips, as without parts, but for rounding and for what a loss
      takes from the batch as a whole: the flow network's BatchNorm normalises each part by the
      part's own statistics, and moves the running ones once per part.
    guard: which updates are left out; None is the default one.

  The metrics are those of the loss and `loss`, `grad_norm` (before clipping), `param_norm`, `lr`,
  `good` (whether the update counts) and those of `guard.judge`.
  """
  average = optim.Ema() if ema is None else ema
  if len(layout.beside) != len(average.beside):
    raise ValueError("the state has other averages than ema: give `init_state` the same ema")
  guard = guards.Config() if guard is None else guard

  def objective(params, stats, batch, key):
    return loss(optimizer.trainable(params), stats, batch, key)

  gradient = jax.value_and_grad(objective, has_aux=True)

  def accumulated(params, stats, batch, key):
    # Strided parts: every device keeps the rows it has, and each part spans all devices.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    weight_n = parts["weight_b"].sum(axis=1) if "weight_b" in parts else jnp.ones(accumulate)
    share_n = weight_n / jnp.maximum(weight_n.sum(), 1)

    def part(carry, xs):
      stats, total = carry
      rows, share = xs
      (value, (metrics, stats)), grads = gradient(params, stats, rows, key)
      new = jax.tree.map(lambda x: share * x, ((value, metrics), grads))
      return (stats, jax.tree.map(jnp.add, total, new)), None

    first = jax.tree.map(lambda x: x[0], parts)
    (value, (metrics, _)), grads = jax.eval_shape(gradient, params, stats, first, key)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ((value, metrics), grads))
    (stats, ((value, metrics), grads)), _ = jax.lax.scan(part, (stats, zero), (parts, share_n))
    return (value, (metrics, stats)), grads

  def step(state, batch):
    step_key = jax.random.fold_in(key, state.step)
    run = gradient if accumulate == 1 else accumulated
    (value, (metrics, stats)), grads = run(state.params, state.stats, batch, step_key)
    # Once, not for each average.
    stats = jax.lax.with_sharding_constraint(stats, layout.stats)
    # Under ZeRO-1 each device updates the part of which it holds the moments; the layout of the
    # result then gathers the parameters.
    grads, own = jax.lax.with_sharding_constraint((grads, state.params), (layout.ema, layout.ema))
    updates, opt = optimizer.tx.update(grads, state.opt, own)
    params = optax.apply_updates(own, updates)
    averages = tuple(
      one.update(old, (params, stats), state.step + 1)
      for one, old in zip(average.all(), state.averages(), strict=True)
    )
    grad_norm = optax.tree.norm(grads)
    good, watch, judged = guards.judge(guard, state.guard, value, grad_norm)
    old = (own, state.averages(), state.opt, state.stats)
    params, averages, opt, stats = guards.select(good, (params, averages, opt, stats), old)
    metrics = metrics | judged | {"loss": value, "grad_norm": grad_norm, "good": good}
    metrics["param_norm"] = optax.tree.norm(params)
    if optimizer.lr is not None:  # The schedule counts the updates that count.
      metrics["lr"] = optimizer.lr(state.step - state.guard.skipped)
    (first, *beside), means = zip(*averages, strict=True)
    return State(state.step + 1, params, first, opt, stats, watch, tuple(beside), means), metrics

  return jax.jit(
    step,
    in_shardings=(layout, NamedSharding(mesh, rules.spec("act_batch"))),
    out_shardings=(layout, NamedSharding(mesh, P())),
    donate_argnums=0,
    compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
  )


def make_eval_step(
  loss: Loss, *, key: jax.Array, mesh: Mesh, rules: sharding.Rules, layout: State
) -> Callable[[Any, Any, Any], dict[str, jax.Array]]:
  """Returns `evaluate(params, stats, batch) -> metrics`, without update.

  The metrics are those of the loss, `loss` and `clips`, the sum of the batch's weights. The key is
  the same at each call: evaluations of one run differ by the parameters alone.
  """

  def evaluate(params, stats, batch):
    value, (metrics, _) = loss(params, stats, batch, key)
    return metrics | {"loss": value, "clips": batch["weight_b"].sum()}

  return jax.jit(
    evaluate,
    in_shardings=(layout.params, layout.stats, NamedSharding(mesh, rules.spec("act_batch"))),
    out_shardings=NamedSharding(mesh, P()),
  )
