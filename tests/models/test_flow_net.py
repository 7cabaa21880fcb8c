"""The flow network: parity with MMAudio, and the laws of two ears."""
# Options are spread over configs of several types, and `apply` may return more than arrays.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax.convert import engine, mmaudio
from spatialv2a_jax.models import blocks, flow_net, layers
from spatialv2a_jax.sharding import Rules
from tests.models import reference

SIZE: dict[str, Any] = {
  "width": 32,
  "heads": 2,
  "joint_depth": 2,
  "ear_depth": 2,
  "latent_channels": 4,
  "clip_dim": 6,
  "sync_dim": 5,
  "text_dim": 7,
  "text_len": 3,
}
SMALL = SIZE | {"width": 16, "ffn": 24, "ear_depth": 1}
CLIPS, FRAMES = 3, 23
TIMES = jnp.asarray([0.1, 0.5, 0.9])


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


COND = {
  "clip_bvf": normal(0, CLIPS, 5, 6),
  "sync_bsf": normal(1, CLIPS, 16, 5),
  "text_bwf": normal(2, CLIPS, 3, 7),
  "spatial_bvk": normal(3, CLIPS, 5, 5),
}


def mask(*, video=False, text=False, spatial=False):
  drop = {"video": video, "text": text, "spatial": spatial}
  return {name: jnp.broadcast_to(jnp.asarray(value), CLIPS) for name, value in drop.items()}


def randomize(shapes, size=0.3):
  """Draws every parameter: at their start, gates of zero would hide all errors."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    value = size * rng.standard_normal(x.shape)
    return jnp.asarray(value + (path[-1].key in ("scale", "cross_mass")), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


def run(net, params, x_betc, cond, drop, train=False):
  prepared, _ = net.condition(params, net.init_stats(), cond, drop, latent_len=FRAMES, train=train)
  return net.velocity(params, x_betc, TIMES, prepared)


@functools.cache
def two_ears(**options):
  return flow_net.build(flow_net.Config(**SMALL | options))


@functools.cache
def two_ear_params(**options):
  return randomize(jax.eval_shape(two_ears(**options).init, jax.random.key(0)))


@functools.cache
def compiled():
  return jax.jit(functools.partial(run, two_ears()))


def velocity(params, x_betc, cond=COND, drop=None):
  return compiled()(params, x_betc, cond, drop or mask())


@pytest.mark.parametrize(
  "width, heads, joint_depth, ear_depth, channels, v2, count",
  [
    (448, 7, 4, 8, 20, False, 157_283_644),
    (448, 7, 4, 8, 40, False, 157_409_144),
    (896, 14, 4, 8, 40, False, 621_805_944),
    (896, 14, 7, 14, 40, False, 1_030_002_168),
    (896, 14, 7, 14, 40, True, 1_030_575_608),
  ],
)
def test_mmaudio_has_its_number_of_parameters(
  width, heads, joint_depth, ear_depth, channels, v2, count
):
  config = flow_net.Config(
    width, heads, joint_depth, ear_depth, channels, ears=1, v2=v2, spatial=False
  )
  shapes = jax.eval_shape(flow_net.build(config).init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("v2", [False, True])
def test_one_ear_is_mmaudio(v2):
  depth = {"heads": 2, "joint_depth": 2, "ear_depth": 2}
  state = reference.random_state(
    0, width=32, channels=4, dims=(6, 5, 7), text_len=3, v2=v2, **depth
  )
  truth = reference.Reference(state, v2=v2, **depth)
  config, params = engine.convert(mmaudio.SOURCE, state, "reference")
  sizes = flow_net.Config(**SIZE, ears=1, v2=v2, spatial=False, ffn=layers.hidden_width(32))
  assert config == sizes
  params = jax.tree.map(jnp.asarray, params)
  net = flow_net.build(config)
  expected_shapes = nn.unbox(jax.eval_shape(net.init, jax.random.key(0)))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected_shapes)

  x_btc = normal(4, CLIPS, FRAMES, 4)
  # Powers of two: v2's embedding multiplies the rounding error of other times by 10000.
  t_b = jnp.asarray([0.0, 0.25, 0.5])
  drop = mask(video=[False, True, False], text=[False, False, True])
  empty = [state[f"empty_{name}_feat"] for name in ("clip", "sync", "string")]
  raw = [np.asarray(COND[n], np.float64) for n in ("clip_bvf", "sync_bsf", "text_bwf")]
  raw[0][1], raw[1][1], raw[2][2] = empty
  expected = truth.condition(*raw, FRAMES)

  @jax.jit
  def both(params):
    prepared, _ = net.condition(params, {}, COND, drop, latent_len=FRAMES, train=False)
    return prepared, net.trace(params, x_btc[:, None], t_b, prepared)

  prepared, (v_betc, mids) = both(params)
  for name, key in (("clip", "clip_bvd"), ("sync", "sync_btd"), ("text", "text_bwd")):
    np.testing.assert_allclose(prepared[key], expected[name], atol=2e-5)
  np.testing.assert_allclose(prepared["global_bd"], expected["global"], atol=2e-5)
  assert len(mids["joint"]) == 1 and len(mids["ears"]) == 2
  flow = truth.flow(x_btc, t_b, expected)
  assert flow.std() > 0.5
  np.testing.assert_allclose(v_betc[:, 0], flow, atol=2e-3 if v2 else 1e-4)


@pytest.mark.slow
def test_two_ears_from_a_mono_network_are_that_network_twice():
  config = flow_net.Config(**SMALL, ears=1, spatial=False)
  net = flow_net.build(config)
  mono = randomize(jax.eval_shape(net.init, jax.random.key(0)))
  x_b1tc = normal(4, CLIPS, 1, FRAMES, 4)
  _, twice, _ = mmaudio.two_ears(config, mono, jax.random.key(0))
  dual = velocity(twice, jnp.concatenate([x_b1tc, x_b1tc], axis=1))
  np.testing.assert_array_equal(dual[:, 0], dual[:, 1])
  # XLA compiles two programs, and fuses and so rounds them differently.
  single = jax.jit(functools.partial(run, net))(mono, x_b1tc, COND, mask())
  np.testing.assert_allclose(dual[:, :1], single, atol=1e-5 * float(abs(single).max()))
  assert single.std() > 0.5


def test_swapping_the_ears_swaps_the_outputs_exactly():
  params, x_betc = two_ear_params(), normal(4, CLIPS, 2, FRAMES, 4)
  flip = {n: jax.tree.map(lambda x: x[::-1], params[n]) for n in ("ears", "final", "ear_embedding")}
  plain = velocity(params, x_betc)
  swapped = velocity(params | flip, x_betc[:, ::-1])
  np.testing.assert_array_equal(swapped[:, ::-1], plain)
  assert abs(plain[:, 0] - plain[:, 1]).mean() > 0.1 * abs(plain).mean()
  kept = velocity(params | {n: flip[n] for n in ("ears", "final")}, x_betc[:, ::-1])
  assert abs(kept[:, ::-1] - plain).max() > 1e-3  # The embedding tells the ears apart.


def test_each_ear_hears_the_other():
  params, x_betc = two_ear_params(), normal(4, CLIPS, 2, FRAMES, 4)
  other = velocity(params, x_betc.at[:, 1].add(1.0))
  assert abs(other[:, 0] - velocity(params, x_betc)[:, 0]).max() > 1e-3


@pytest.mark.parametrize("last", [False, True])
def test_joint_attention_of_mass_one_is_attention_over_all_tokens(last):
  d, heads, k = 32, 2, 16
  net = blocks.JointBlock(2, d, heads, 48, last=last)
  tokens = normal(0, 2, 2, 9, d), normal(1, 2, 1, 4, d), normal(2, 2, 1, 3, d)
  c_b1td, g_b11d = normal(3, 2, 1, 9, d), normal(4, 2, 1, 1, d)
  shapes = jax.eval_shape(net.init, jax.random.key(0), tokens, c_b1td, g_b11d)
  params = randomize(shapes["params"])
  params["cross_mass"] = jnp.ones(heads)
  result = jax.jit(net.apply)({"params": params}, tokens, c_b1td, g_b11d)
  tables = layers.rope_table(9, k), layers.rope_table(4, k, 9 / 4), None
  taps, ends = (3, 3, 0), (False, last, last)

  @jax.jit
  def in_one_row(params, tokens, c_b1td, g_b11d):
    streams = [
      blocks.Stream(d, heads, 48, taps=n, pre_only=e).bind({"params": params[name]})
      for name, n, e in zip(("audio", "clip", "text"), taps, ends, strict=True)
    ]
    mods = [s.modulation(c) for s, c in zip(streams, (c_b1td, g_b11d, g_b11d), strict=True)]
    parts = [s.before(x, m, t) for s, x, m, t in zip(streams, tokens, mods, tables, strict=True)]
    # Left, right, clip, text.
    flat = [
      jnp.concatenate([x.reshape(2, -1, heads, k) for x in row], 1)
      for row in zip(*parts, strict=True)
    ]
    out = jax.nn.dot_product_attention(*flat)
    audio, clip, text = jnp.split(out, [18, 22], axis=1)
    outs = audio.reshape(2, 2, 9, heads, k), clip[:, None], text[:, None]
    rows = zip(streams, tokens, outs, mods, ends, strict=True)
    return [x if end else s.after(x, o, m) for s, x, o, m, end in rows]

  for y, expected in zip(result, in_one_row(params, tokens, c_b1td, g_b11d), strict=True):
    np.testing.assert_allclose(y, expected, atol=1e-5 * float(abs(expected).max()))


@pytest.mark.slow
def test_scanning_blocks_and_batching_ears_changes_nothing():
  depth = {"joint_depth": 3, "ear_depth": 2}
  params, x_betc = two_ear_params(**depth), normal(4, CLIPS, 2, FRAMES, 4)
  plain, scanned = (
    jax.jit(functools.partial(run, two_ears(**depth, unroll=unroll)))(params, x_betc, COND, mask())
    for unroll in (True, False)
  )
  np.testing.assert_allclose(scanned, plain, atol=1e-5 * float(abs(plain).max()))


@pytest.mark.slow
def test_scan_and_remat_keep_gradients():
  params, x_betc = two_ear_params(), normal(4, CLIPS, 2, FRAMES, 4)

  def grads(dtype, **options):
    net = two_ears(dtype=dtype, activations=dtype, **options)
    loss = lambda p: jnp.square(run(net, p, x_betc, COND, mask())).mean()  # noqa: E731
    return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

  def distance(some):
    pairs = [(a, b) for a, b in zip(some, exact, strict=True) if b.any()]
    return sum(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)

  exact, looped = grads("float32"), {"unroll": False, "remat": "convolutions"}
  for a, b in zip(grads("float32", **looped), exact, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * float(abs(b).max()))
  # Loops stack gradients in bfloat16 and lose nothing by it.
  low = grads("bfloat16", **looped)
  assert {x.dtype for x in low} == {jnp.dtype("float32")}
  assert distance(low) < 1.1 * distance(grads("bfloat16"))


@pytest.mark.slow
def test_a_dropped_condition_is_the_null_condition():
  params, x_betc = two_ear_params(), normal(4, CLIPS, 2, FRAMES, 4)
  null = {
    "clip_bvf": params["condition"]["null_clip"],
    "sync_bsf": params["condition"]["null_sync"],
    "text_bwf": params["frozen"]["null_text"],
  }
  explicit = COND | {n: jnp.broadcast_to(v, COND[n].shape) for n, v in null.items()}
  dropped = velocity(params, x_betc, COND, mask(video=True, text=True))
  np.testing.assert_allclose(dropped, velocity(params, x_betc, explicit), rtol=1e-4, atol=1e-3)

  # One clip's drop changes that clip, and each kind of drop changes something.
  plain = velocity(params, x_betc)
  for kind in ("video", "text", "spatial"):
    one = velocity(params, x_betc, COND, mask(**{kind: [False, True, False]}))
    np.testing.assert_array_equal(one[::2], plain[::2])
    assert abs(one[1] - plain[1]).max() > 1e-3, kind
  louder, silent = COND | {"spatial_bvk": 9 * COND["spatial_bvk"]}, mask(spatial=True)
  np.testing.assert_array_equal(
    velocity(params, x_betc, louder, silent), velocity(params, x_betc, COND, silent)
  )


def test_statistics_leave_out_padding_and_dropped_clips():
  net, params = two_ears(), two_ear_params()

  @jax.jit
  def stats(cond, drop):
    condition = functools.partial(net.condition, latent_len=FRAMES, train=True)
    return condition(params, net.init_stats(), cond, drop)[1]["spatial"]["mean"]

  padded = COND | {"weight_b": jnp.asarray([1.0, 1.0, 0.0])}
  first_two = {n: v[:2] for n, v in COND.items()}
  expected = stats(first_two, {n: v[:2] for n, v in mask().items()})
  np.testing.assert_allclose(stats(padded, mask()), expected, atol=1e-6)
  dropped = stats(COND, mask(spatial=[False, False, True]))
  np.testing.assert_allclose(dropped, expected, atol=1e-6)
  assert abs(stats(COND, mask()) - expected).max() > 1e-3


@pytest.mark.slow
def test_gradients_reach_what_learns_and_only_that():
  params, x_betc = two_ear_params(), normal(4, CLIPS, 2, FRAMES, 4)
  drop = mask(video=[True, False, False], text=[False, True, False], spatial=[False, False, True])

  @jax.jit
  @jax.grad
  def grads(params):
    return jnp.square(run(two_ears(), params, x_betc, COND, drop, train=True)).mean()

  # The last block's visual and text tokens ask nothing.
  idle = {f"joint_last/{n}/q_norm/scale" for n in ("clip", "text")}
  for path, g in jax.tree_util.tree_leaves_with_path(grads(params)):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert bool(jnp.any(g != 0)) == (name not in idle and "frozen" not in name), name


def test_latents_are_normalised_per_channel():
  mean_c, std_c = jnp.arange(4.0), jnp.asarray([0.5, 1.0, 2.0, 4.0])
  params = {"frozen": {"latent_mean": mean_c, "latent_std": std_c}}
  z = normal(0, 2, 2, 9, 4)
  x = flow_net.unnormalize(params, z)
  np.testing.assert_allclose(x[0, 0, 0], z[0, 0, 0] * std_c + mean_c, rtol=1e-6)
  np.testing.assert_allclose(flow_net.normalize(params, x), z, atol=1e-5)


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_activations_are_pinned_in_their_dtype(activations):
  seen = []

  def constrain(x, *names):
    assert len(names) == x.ndim and x.dtype == activations
    Rules().spec(*names)
    seen.append(names)
    return x

  options = {"dtype": "bfloat16", "activations": activations}
  net = flow_net.build(flow_net.Config(**SMALL, **options), constrain)
  x_betc = normal(4, CLIPS, 2, FRAMES, 4)
  v_betc = jax.eval_shape(functools.partial(run, net), two_ear_params(), x_betc, COND, mask())
  assert v_betc.dtype == jnp.float32
  assert seen.count(("act_batch", "ear", "act_time", "act_width")) == 1 + SMALL["joint_depth"]
  assert seen.count(("act_batch", "act_time", "act_width")) == 2 * SMALL["ear_depth"]


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_bfloat16_is_close(activations):
  params = jax.tree.map(lambda x: 0.5 * x, two_ear_params())
  x_betc = normal(4, CLIPS, 2, FRAMES, 4)
  net = two_ears(dtype="bfloat16", activations=activations)
  half = jax.jit(functools.partial(run, net))(params, x_betc, COND, mask())
  full = velocity(params, x_betc)
  error = jnp.linalg.norm(half - full) / jnp.linalg.norm(full)
  assert 1e-5 < error < 0.05


@pytest.mark.parametrize(
  "options, message",
  [
    ({"activations": "bfloat16"}, "no dtype=float32 with activations=bfloat16"),
    ({"dtype": "bf16", "activations": "bf16"}, "no dtype=bf16"),
    ({"ears": 3}, "ears"),
    ({"remat": "some"}, "remat"),
    ({"attention": "best"}, "attention"),
    ({"width": 30, "heads": 4}, "heads"),
    ({"ear_depth": 0}, "at least 1"),
  ],
)
def test_impossible_configs_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    flow_net.Config(**options)
