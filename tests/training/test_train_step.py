import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatialv2a_jax import flow, schema, sharding
from spatialv2a_jax.models import flow_net
from spatialv2a_jax.training import optim, train_step

RULES = sharding.Rules()
SGD = optim.Optimizer(optax.sgd(0.1))  # Adam divides the rounding noise of a zero gradient by it.


def toy_init(key):
  """Two layers whose four axes have names; a frozen constant beside them."""
  k1, k2 = jax.random.split(key)
  boxed = nn.LogicallyPartitioned
  return {
    "up": {
      "kernel": boxed(jax.random.normal(k1, (8, 16)) / 8**0.5, ("width", "ffn")),
      "bias": jnp.zeros(16),
    },
    "down": {"kernel": boxed(jax.random.normal(k2, (16, 8)) / 4, ("ffn", "width"))},
    "null": {"text": boxed(jnp.ones(8), ("width",))},
  }


def toy_loss(params, stats, batch, key, constrain=lambda x, *names: x):
  """Denoising of x_bw, noise drawn by clip id; the statistics follow the batch mean."""
  keys_b = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch["id_b"])
  noise_bw = jax.vmap(lambda k: jax.random.normal(k, (8,)))(keys_b)
  x_bw = batch["x_bw"] + 0.1 * noise_bw + params["null"]["text"][None]
  h_bf = jnp.tanh(x_bw @ params["up"]["kernel"] + params["up"]["bias"][None])
  h_bf = constrain(h_bf, "act_batch", "act_width")
  error_b = jnp.square(h_bf @ params["down"]["kernel"] - batch["x_bw"]).mean(axis=1)
  weight_b = batch["weight_b"]
  value = (weight_b * error_b).sum() / jnp.maximum(weight_b.sum(), 1)
  stats = {"mean": 0.9 * stats["mean"] + 0.1 * batch["x_bw"].mean(axis=0)}
  return value, ({"error": value}, stats)


def toy_batch(index, rows=8):
  rng = np.random.default_rng(index)
  return {
    "x_bw": rng.standard_normal((rows, 8), np.float32),
    "id_b": np.arange(rows, dtype=np.uint32) + rows * index,
    "weight_b": np.array([1] * (rows - 1) + [0], np.float32),
  }


def prepare(mesh, optimizer=SGD, ema=None, accumulate=1):
  stats = {"mean": jnp.zeros(8)}
  create, abstract, layout = train_step.init_state(
    toy_init, stats, optimizer, jax.random.key(0), mesh, RULES
  )
  loss = functools.partial(toy_loss, constrain=sharding.constrainer(mesh, RULES))
  step = train_step.make_train_step(
    loss,
    optimizer,
    key=jax.random.key(1),
    mesh=mesh,
    rules=RULES,
    layout=layout,
    ema=ema,
    accumulate=accumulate,
  )
  return create(), abstract, step


def run(mesh, steps=3, batch=toy_batch, **kwargs):
  state, _, step = prepare(mesh, **kwargs)
  losses = []
  for i in range(steps):
    state, metrics = step(state, sharding.global_batch(batch(i), mesh, RULES, 8))
    losses.append(float(metrics["loss"]))
  return losses, state, metrics


def one_device():
  return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_the_mesh_does_not_change_the_mathematics(shape):
  expected, reference, _ = run(one_device())
  losses, state, _ = run(sharding.make_mesh(*shape))
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    jax.device_get(state),
    jax.device_get(reference),
  )
  # The comparison proves nothing unless something was really split.
  split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))
  assert (split > 0) == (shape[1] * shape[2] > 1)


def test_a_clip_ignores_its_place_in_the_batch():
  order = np.random.default_rng(1).permutation(8)
  plain, _, _ = run(one_device(), steps=1)
  moved, _, _ = run(
    one_device(), steps=1, batch=lambda i: {k: v[order] for k, v in toy_batch(i).items()}
  )
  np.testing.assert_allclose(plain, moved, rtol=1e-6)


def test_each_step_draws_its_own_noise():
  state, _, step = prepare(one_device(), optim.Optimizer(optax.set_to_zero()))
  batch = sharding.global_batch(toy_batch(0), one_device(), RULES, 8)
  state, first = step(state, batch)
  _, second = step(state, batch)
  assert float(first["loss"]) != float(second["loss"])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(shape):
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = sharding.make_mesh(*shape, devices=devices)
  whole, a, metrics_a = run(mesh)
  parts, b, metrics_b = run(mesh, accumulate=2)
  np.testing.assert_allclose(parts, whole, rtol=1e-5)
  np.testing.assert_allclose(metrics_b["grad_norm"], metrics_a["grad_norm"], rtol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a.params, b.params
  )


def test_the_average_and_the_statistics_follow_the_steps():
  batch = sharding.global_batch(toy_batch(0), one_device(), RULES, 8)
  state, _, step = prepare(one_device(), ema=optim.Ema(decay=0.5))
  before = jax.device_get(state)
  state, metrics = step(state, batch)
  keep = 2 / 11  # Warm-up of the average at its first update.
  for name in ("up", "down"):
    old, new = before.params[name]["kernel"], state.params[name]["kernel"]
    expected = keep * old + (1 - keep) * new
    np.testing.assert_allclose(state.ema[name]["kernel"], expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(state.stats["mean"], 0.1 * toy_batch(0)["x_bw"].mean(0), rtol=1e-5)
  assert int(state.step) == 1
  assert {"loss", "error", "grad_norm", "param_norm"} <= metrics.keys()


def test_frozen_parameters_keep_their_bits_and_have_no_optimizer_state():
  config = optim.Config(warmup=0, lr=0.1, freeze=(("null/.*", True), (".*", False)))
  optimizer = optim.adamw(config, jax.eval_shape(toy_init, jax.random.key(0)))
  _, state, metrics = run(one_device(), optimizer=optimizer)
  np.testing.assert_array_equal(state.params["null"]["text"], np.ones(8, np.float32))
  np.testing.assert_array_equal(state.ema["null"]["text"], np.ones(8, np.float32))
  shapes = [x.shape for x in jax.tree.leaves(state.opt)]
  assert (8,) not in shapes and shapes.count((8, 16)) == 2
  assert float(metrics["lr"]) == pytest.approx(0.1)


def test_the_rate_that_is_logged_is_how_far_parameters_move():
  """Adam that remembers nothing divides the gradient by its size."""
  config = optim.Config(lr=0.1, warmup=3, clip=0.0, weight_decay=0.0, betas=(0.0, 0.0), eps=1e-12)
  optimizer = optim.adamw(config, jax.eval_shape(toy_init, jax.random.key(0)))
  state, _, step = prepare(one_device(), optimizer)
  batch = sharding.global_batch(toy_batch(0), one_device(), RULES, 8)
  rates = []
  for _ in range(4):
    before = jax.device_get(state.params)
    state, metrics = step(state, batch)
    moved = jax.tree.map(lambda a, b: np.abs(a - b), jax.device_get(state.params), before)
    for x in jax.tree.leaves(moved):
      np.testing.assert_allclose(x, metrics["lr"], rtol=1e-3)
    rates.append(float(metrics["lr"]))
  np.testing.assert_allclose(rates, [0.025, 0.05, 0.075, 0.1], rtol=1e-5)


def test_the_moments_are_split_like_the_parameters():
  mesh = sharding.make_mesh(2, 2, 2)
  optimizer = optim.adamw(optim.Config(), jax.eval_shape(toy_init, jax.random.key(0)))
  state, _, _ = prepare(mesh, optimizer)
  kernel = state.params["up"]["kernel"].sharding
  same = [x for x in jax.tree.leaves(state.opt) if x.shape == (8, 16)]
  assert same and all(x.sharding == kernel for x in same)
  assert state.ema["up"]["kernel"].sharding == kernel


def test_a_state_that_is_compiled_in_haste_has_the_same_bits():
  def init(key):
    keys = jax.random.split(key)
    return {
      "normal": 0.02 * jax.random.normal(keys[0], (37, 64)),
      "uniform": jax.random.uniform(keys[1], (3, 70), minval=-0.1, maxval=0.1),
    }

  key = jax.random.key(5)
  create, _, _ = train_step.init_state(init, {}, SGD, key, one_device(), RULES)
  thorough = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    **dict.fromkeys(train_step.FUSION_EMITTERS, True),
  }
  jax.tree.map(
    np.testing.assert_array_equal,
    create().params,
    jax.jit(init, compiler_options=thorough)(key),
  )


def test_evaluation_is_the_loss_with_the_same_noise_at_every_step():
  mesh, key = one_device(), jax.random.key(2)
  state, _, step = prepare(mesh, optim.Optimizer(optax.set_to_zero()))
  layout = jax.tree.map(lambda x: x.sharding, state)
  evaluate = train_step.make_eval_step(toy_loss, key=key, mesh=mesh, rules=RULES, layout=layout)
  batch = sharding.global_batch(toy_batch(0), mesh, RULES, 8)
  by_hand, _ = toy_loss(state.params, state.stats, batch, key)
  for _ in range(2):
    found = evaluate(state.params, state.stats, batch)
    np.testing.assert_allclose([found["loss"], found["error"]], by_hand, rtol=1e-5)
    assert float(found["clips"]) == 7  # The eighth has no weight.
    state, trained = step(state, batch)
    assert not np.isclose(trained["loss"], by_hand, rtol=1e-6)


def flow_losses(mesh):
  """Three steps of the real model, loss and data contract."""
  sizes = flow_net.Config(
    width=32,
    heads=2,
    joint_depth=1,
    ear_depth=2,
    latent_channels=4,
    clip_dim=6,
    sync_dim=6,
    text_dim=6,
    text_len=3,
    unroll=False,  # The code path of accelerators, over stacked weights.
  )
  shapes = {
    "mean": (2, 10, 4), "std": (2, 10, 4), "clip": (5, 6), "sync": (8, 6), "text": (3, 6),
    "spatial": (5, 5),
  }  # fmt: skip
  net = flow_net.build(sizes, sharding.constrainer(mesh, RULES))
  create, _, layout = train_step.init_state(
    net.init, net.init_stats(), SGD, jax.random.key(0), mesh, RULES
  )
  step = train_step.make_train_step(
    functools.partial(flow.loss, net=net, config=flow.LossConfig()),
    SGD,
    key=jax.random.key(1),
    mesh=mesh,
    rules=RULES,
    layout=layout,
  )
  state, losses = create(), []
  for i in range(3):
    batch = schema.synthetic_batch(shapes, 8, seed=i)
    state, metrics = step(state, sharding.global_batch(batch, mesh, RULES, 8))
    losses.append([float(metrics[name]) for name in ("loss/left", "loss/right", "grad_norm")])
  return losses, state


@pytest.fixture(scope="module")
def flow_on_one_device():
  return flow_losses(one_device())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_the_mesh_does_not_change_the_flow_model(flow_on_one_device, shape):
  expected, reference = flow_on_one_device
  losses, state = flow_losses(sharding.make_mesh(*shape))
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    jax.device_get(state.params),
    jax.device_get(reference.params),
  )
  split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))
  assert (split > 20) == (shape[1] * shape[2] > 1)


def test_an_update_that_is_left_out_has_a_number_and_moves_no_average():
  """Snapshots are weighted by the step; update 3 weighs the same whatever came before it."""
  ema = optim.Ema(sigma_rel=0.1)
  state, _, step = prepare(one_device(), ema=ema)
  average = np.asarray(state.ema["up"]["kernel"], np.float64)
  for number in range(1, 6):
    batch = toy_batch(number)
    batch["x_bw"] *= np.float32(np.nan if number == 2 else 1)
    state, metrics = step(state, sharding.global_batch(batch, one_device(), RULES, 8))
    assert metrics["good"] == (number != 2)
    if number != 2:
      average = average + float(ema.take(number)) * (state.params["up"]["kernel"] - average)
    np.testing.assert_allclose(state.ema["up"]["kernel"], average, rtol=1e-5, atol=1e-6)


def test_norms_are_those_of_the_trained_gradient_and_of_the_new_parameters():
  config = optim.Config(warmup=0, lr=0.1, clip=0.01, freeze=(("null/.*", True), (".*", False)))
  optimizer = optim.adamw(config, jax.eval_shape(toy_init, jax.random.key(0)))
  state, _, step = prepare(one_device(), optimizer)
  before = jax.device_get(state)
  key = jax.random.fold_in(jax.random.key(1), 0)
  gradient = jax.jit(jax.grad(toy_loss, has_aux=True))
  grads, _ = gradient(before.params, before.stats, toy_batch(0), key)

  def norm(tree):
    return np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]))

  trained = norm({name: x for name, x in grads.items() if name != "null"})
  assert norm(grads) > 1.01 * trained > 1.01 * 0.01
  state, metrics = step(state, sharding.global_batch(toy_batch(0), one_device(), RULES, 8))
  np.testing.assert_allclose(metrics["grad_norm"], trained, rtol=1e-5)
  new, old = norm(state.params), norm(before.params)
  np.testing.assert_allclose(metrics["param_norm"], new, rtol=1e-6)
  assert abs(new - old) > 1e-3 * old
