"""Descriptors by closed forms and by the mirror; BatchNorm as a pure function."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import localizers
from spatialv2a_jax.models import layers, spatial
from tests.models.reference import silu

S_H, S_AREA, S_VAR, S_LR, S_SHAPE = range(5)
KEY = jax.random.key(0)


def blob(size, x, y=0.0, wide=0.2, tall=0.2):
  centres = (2 * np.arange(size) + 1) / size - 1
  row = np.exp(-0.5 * ((centres - x) / wide) ** 2)
  return np.outer(np.exp(-0.5 * ((centres - y) / tall) ** 2), row).astype(np.float32)


def describe(*maps, **modes):
  # In one program: each of its operations would be compiled alone, for every shape.
  compiled = jax.jit(functools.partial(spatial.descriptors, **modes))
  d_bvk, valid_bv = compiled(jnp.asarray(np.stack(maps)[None]))
  return np.asarray(d_bvk[0]), np.asarray(valid_bv[0])


def zoo(rows, columns):
  rng = np.random.default_rng(0)
  point = np.zeros((rows, columns), np.float32)
  point[1, -1] = 1
  yield from (np.zeros((rows, columns)), np.ones((rows, columns)), point)
  yield from rng.random((4, rows, columns))
  for x in (-0.6, 0.0, 0.9):
    yield blob(max(rows, columns), x, 0.2, 0.1, 0.3)[:rows, :columns]


def test_the_box_without_jax_is_that_of_the_descriptors():
  """At the threshold, too."""
  heat_vyx = np.round(np.random.default_rng(0).random((400, 2, 9)) ** 12, 1).astype(np.float32)
  d_vk, valid_v = describe(*heat_vyx)
  first_v, end_v, seen_v = localizers.box(heat_vyx)
  np.testing.assert_array_equal(seen_v, valid_v)
  assert 0 < (first_v > 0).sum() and seen_v.sum() < 400 and (heat_vyx.max((1, 2)) == 0.5).any()
  np.testing.assert_allclose(((first_v + end_v) / 9 - 1)[seen_v], d_vk[seen_v, S_H], atol=1e-6)


def test_closed_forms():
  size = 352
  box, edges = np.zeros((2, size, size), np.float32)
  box[:, 300:352] = 1
  edges[:, [0, -1]] = 1
  uniform, box, edges, dark = describe(
    np.ones((size, size), np.float32), box, edges, np.zeros((size, size), np.float32)
  )[0]
  np.testing.assert_allclose(uniform, [0, 1, 1, 0, 0], atol=1e-5)
  var_x, var_y = 3 * (52**2 - 1) / 3 / (size**2 - 1), 1.0
  shape = (var_x - var_y) / (var_x + var_y + 1e-4)
  expected = [652 / 352 - 1, 52 / 352, (var_x + var_y) / 2, 1, shape]
  np.testing.assert_allclose(box, expected, atol=1e-4)
  np.testing.assert_allclose(edges[[S_H, S_VAR, S_LR]], [0, 1.99, 0], atol=1e-2)
  assert not dark.any()


def test_a_point_is_where_it_is():
  heat = np.zeros((9, 20), np.float32)
  heat[4, 15] = 0.7
  d, valid = describe(heat)
  np.testing.assert_allclose(d[0], [31 / 20 - 1, 1 / 180, 0, 1, 0], atol=1e-6)
  assert valid.all()


OTHER_MODES = {"position_mode": "centroid", "lr_support": "frame", "shape_mode": "entropy"}


@pytest.mark.parametrize("modes", [{}, OTHER_MODES])
@pytest.mark.parametrize("size", [(24, 32), (17, 33)])
def test_mirror_law(size, modes):
  maps = np.stack([np.asarray(m, np.float32) for m in zoo(*size)])
  d, valid = describe(*maps, **modes)
  mirrored, also_valid = describe(*maps[:, :, ::-1], **modes)
  np.testing.assert_allclose(mirrored, d * spatial.MIRROR_SIGNS[None], atol=5e-6)
  np.testing.assert_array_equal(valid, also_valid)
  np.testing.assert_allclose(describe(*maps[:, ::-1], **modes)[0], d, atol=5e-6)
  assert (d[:, [S_H, S_LR]] > 0.1).any() and (d[:, [S_H, S_LR]] < -0.1).any()


def test_ranges_and_motion_to_the_right():
  d, _ = describe(*(np.asarray(m, np.float32) for m in zoo(24, 32)))
  assert (abs(d[:, [S_H, S_LR, S_SHAPE]]) <= 1).all()
  assert (d[:, S_AREA] >= 0).all() and (d[:, S_AREA] <= 1).all() and (d[:, S_VAR] >= 0).all()
  slide, _ = describe(*(blob(64, x) for x in np.linspace(-1, 1, 21)))
  assert (np.diff(slide[:, [S_H, S_LR]], axis=0) >= -1e-6).all()
  assert slide[0, S_H] < -0.5 and slide[-1, S_H] > 0.5


def test_shape_tells_wide_from_tall():
  wide, tall = describe(blob(64, 0, wide=0.4, tall=0.1), blob(64, 0, wide=0.1, tall=0.4))[0]
  assert wide[S_SHAPE] > 0.5 and tall[S_SHAPE] < -0.5
  np.testing.assert_allclose(wide[S_VAR], tall[S_VAR], rtol=1e-5)


def test_resolution_hardly_matters():
  small, large = (describe(blob(n, 0.3, -0.2, 0.3, 0.2))[0][0] for n in (224, 352))
  assert (abs(small - large) < [0.01, 0.01, 0.01, 0.03, 0.08]).all()


def test_support_of_the_balance():
  heat = blob(64, 0.6)
  heat = np.maximum(heat, 0.2)  # A diffuse background below the threshold.
  box, frame = describe(heat)[0], describe(heat, lr_support="frame")[0]
  assert box[0, S_LR] == pytest.approx(1) and 0 < frame[0, S_LR] < 0.6
  with pytest.raises(ValueError, match="unknown mode"):
    describe(heat, lr_support="image")


def test_closed_forms_of_the_other_modes():
  full, point = np.ones((8, 24), np.float32), np.zeros((8, 24), np.float32)
  half = full.copy()
  half[:, 12:] = 0.5  # Two thirds of the heat are to the left.
  point[3, 20] = 0.9
  d_vk, _ = describe(full, half, point, **OTHER_MODES)
  np.testing.assert_allclose(d_vk[:, S_H], [0, -1 / 6, 41 / 24 - 1], atol=1e-6)
  np.testing.assert_allclose(d_vk[:, S_LR], [0, -1 / 3, 1], atol=1e-6)
  p = np.array([2 / 3, 1 / 3])
  mixed = 1 - (np.log(2) + (p * np.log(p)).sum()) / np.log(8 * 24)
  np.testing.assert_allclose(d_vk[:, S_SHAPE], [1, mixed, 0], atol=1e-5)


def test_batch_norm_uses_the_clips_that_count():
  rng = np.random.default_rng(0)
  x = rng.normal(2, 3, (5, 7, 4)).astype(np.float32)
  keep = np.array([1, 1, 0, 1, 0], bool)
  scale, bias = rng.random((2, 4)).astype(np.float32)
  stats = {"mean": jnp.full(4, 0.5), "var": jnp.full(4, 2.0)}
  y, new = spatial.batch_norm(jnp.asarray(x), scale, bias, stats, jnp.asarray(keep), train=True)
  mean, var = x[keep].mean((0, 1)), x[keep].var((0, 1))
  np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, atol=1e-5)
  np.testing.assert_allclose(new["mean"], 0.9 * 0.5 + 0.1 * mean, rtol=1e-5)
  np.testing.assert_allclose(new["var"], 0.9 * 2 + 0.1 * var, rtol=1e-5)

  still, same = spatial.batch_norm(
    jnp.asarray(x), scale, bias, stats, jnp.asarray(keep), train=False
  )
  np.testing.assert_allclose(still, (x - 0.5) / np.sqrt(2 + 1e-5) * scale + bias, atol=1e-5)
  assert same is stats
  faint = {"mean": jnp.zeros(4), "var": jnp.full(4, 3e-5)}
  y, _ = spatial.batch_norm(jnp.asarray(x), scale, bias, faint, jnp.asarray(keep), train=False)
  np.testing.assert_allclose(y, x / np.sqrt(4e-5) * scale + bias, rtol=1e-4, atol=1e-4)
  nobody = np.zeros(5, bool)
  y, same = spatial.batch_norm(jnp.asarray(x), scale, bias, stats, jnp.asarray(nobody), train=True)
  assert np.isfinite(y).all()
  jax.tree.map(np.testing.assert_array_equal, same, stats)


@pytest.mark.parametrize("frames, latents", [(64, 250), (64, 345), (16, 63)])
def test_condition_follows_its_frame_and_ignores_the_rest_of_the_batch(frames, latents):
  net = spatial.SpatialCondition(width=8, ffn=16)
  d_bvk = jnp.asarray(np.random.default_rng(0).normal(size=(3, frames, 5)), jnp.float32)
  stats = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
  drop, keep = jnp.array([False, True, False]), jnp.ones(3, bool)
  call = {"latent_len": latents, "train": False}
  init, apply = (jax.jit(functools.partial(f, **call)) for f in (net.init, net.apply))
  params = nn.unbox(init(jax.random.key(0), d_bvk, stats, drop, keep))["params"]
  params["null"] += jnp.arange(8.0)
  c_btd, _ = apply({"params": params}, d_bvk, stats, drop, keep)
  assert c_btd.shape == (3, latents, 8)
  np.testing.assert_array_equal(c_btd[1], np.tile(np.arange(8.0), (latents, 1)))
  alone, _ = apply({"params": params}, d_bvk[2:], stats, drop[2:], keep[2:])
  np.testing.assert_allclose(alone[0], c_btd[2], atol=1e-5)
  # Latents of one video frame share its value.
  index = layers.nearest_exact(frames, latents)
  assert (np.diff(index) <= 1).all() and index[0] == 0 and index[-1] == frames - 1
  steps = np.abs(np.diff(c_btd[0], axis=0)).max(-1) > 0
  np.testing.assert_array_equal(steps, np.diff(index) == 1)


def test_condition_is_convolution_silu_gated_convolutions_upsampling_and_norm():
  net, rng = spatial.SpatialCondition(width=4, ffn=6), np.random.default_rng(0)
  d_bvk = rng.standard_normal((1, 8, 5)).astype(np.float32)
  stats = {"mean": rng.random(4), "var": rng.uniform(0.5, 1.5, 4)}
  one, none = np.ones(1, bool), np.zeros(1, bool)
  call = {"latent_len": 31, "train": False}
  shapes = nn.unbox(jax.eval_shape(lambda k: net.init(k, d_bvk, stats, none, one, **call), KEY))
  draw = lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32)  # noqa: E731
  params = jax.tree.map(draw, shapes["params"])
  got, _ = jax.jit(lambda p: net.apply({"params": p}, d_bvk, stats, none, one, **call))(params)

  def convolve(x, kernel):
    padded = np.pad(x, ((len(kernel) // 2,) * 2, (0, 0)))
    return np.sum([padded[j : j + len(x)] @ w for j, w in enumerate(kernel)], axis=0)

  first, up = params["first"], params["mlp"]["up"]["kernel"]
  x_vd = silu(convolve(d_bvk[0], first["kernel"]) + first["bias"])
  gated = silu(convolve(x_vd, up[0])) * convolve(x_vd, up[1])
  x_td = convolve(gated, params["mlp"]["down"]["kernel"])[layers.nearest_exact(8, 31)]
  want = (x_td - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
  assert first["kernel"].shape == (7, 5, 4) and up.shape == (2, 3, 4, 6)
  np.testing.assert_allclose(got[0], want, atol=1e-5)
