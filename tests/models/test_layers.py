"""Layers against PyTorch's tables and against plain NumPy."""
# Linen's `apply` and `init` may return more than arrays, by their types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax.models import layers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mmaudio_tables.npz"


@pytest.fixture(scope="module")
def tables():
  with np.load(GOLDEN) as file:
    return dict(file)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_nearest_exact_is_pytorch_on_all_durations(tables):
  names = [name for name in tables if name.startswith("nearest_exact")]
  assert len(names) == 124
  for name in names:
    source, target = map(int, name.split("_")[-2:])
    np.testing.assert_array_equal(layers.nearest_exact(source, target), tables[name], name)


def test_nearest_exact_breaks_ties_in_float32():
  index = layers.nearest_exact(192, 345)
  assert (index[57], index[172]) == (31, 95)  # Real arithmetic gives 32 and 96.


@pytest.mark.parametrize(
  "name, length, scale, atol",
  [
    ("clip_40_of_157", 40, 157 / 40, 3e-5),
    ("clip_64_of_345", 64, 345 / 64, 5e-5),
    ("latent_157", 157, 1.0, 1.5e-5),
    ("latent_345", 345, 1.0, 5e-5),
  ],
)
def test_rope_table_is_upstreams(tables, name, length, scale, atol):
  table = layers.rope_table(length, 64, scale)
  np.testing.assert_allclose(table[:, :, 0::2], tables[f"rope_{name}"], atol=atol)
  np.testing.assert_array_equal(table[:, :, 0::2], table[:, :, 1::2])


def test_rope_rotates_interleaved_pairs_as_upstream(tables):
  x_bthk = tables["rope_in_x"].swapaxes(1, 2)
  y_bthk = layers.rope(x_bthk, layers.rope_table(64, 64, 345 / 64))
  expected = tables["rope_applied_clip_64_of_345"].swapaxes(1, 2)
  np.testing.assert_allclose(y_bthk, expected, atol=1e-4)


def test_rope_makes_products_depend_on_distance_only():
  q, k = normal(0, 1, 1, 1, 16), normal(1, 1, 1, 1, 16)
  table = layers.rope_table(12, 16)
  at = lambda x, i: layers.rope(x, table[:, i : i + 1])  # noqa: E731
  near, far = (jnp.vdot(at(q, i), at(k, i + 3)) for i in (1, 8))
  np.testing.assert_allclose(near, far, rtol=1e-5)
  assert abs(near - jnp.vdot(at(q, 1), at(k, 1))) > 1e-2


def test_time_embedding_is_upstreams(tables):
  for name, size, period, atol in (("v1", 256, 1e4, 1.5e-7), ("v2_128", 128, 1.0, 1e-6)):
    table = layers.timestep_table(size, period)
    np.testing.assert_allclose(table, tables[f"freqs_{name}"], rtol=1e-7)
    features = layers.timestep_features(jnp.asarray(tables["t"]), table)
    np.testing.assert_allclose(features, tables[f"embedding_{name}"], atol=atol)
  large = layers.timestep_table(896, 1.0)
  np.testing.assert_allclose(large, tables["freqs_v2_896"], rtol=3e-7)
  assert (large != tables["freqs_v2_896"]).mean() < 0.02  # NumPy's float32 power: 0.17.


@pytest.mark.parametrize("taps", [0, 3, 7])
def test_linear_with_several_axes(taps):
  x = normal(0, 2, 3, 9, 4, 5)  # Two leading axes, time, then two input axes.
  net = layers.Linear((2, 6), ("heads", "head_dim", None, "width"), taps)
  params = net.init(jax.random.key(0), x)["params"]
  names = (None, "heads", "head_dim", None, "width")
  assert params["kernel"].names == (names if taps else names[1:])
  params = nn.unbox(params)
  bias = normal(1, 2, 6)
  y = net.apply({"params": {**params, "bias": bias}}, x)
  kernel = np.asarray(params["kernel"]).reshape(max(taps, 1), 4, 5, 2, 6)
  padded = np.pad(x, ((0, 0), (0, 0), (taps // 2, taps // 2), (0, 0), (0, 0)))
  expected = sum(
    np.einsum("abthk,hkpd->abtpd", padded[:, :, j : j + 9], part) for j, part in enumerate(kernel)
  )
  np.testing.assert_allclose(y, expected + np.asarray(bias)[None, None, None], atol=1e-5)


def test_initialisers_are_pytorchs():
  x = jnp.zeros((1, 8, 48))
  dense = nn.unbox(layers.Linear((96,), ("width", None)).init(jax.random.key(0), x))["params"]
  bound = np.sqrt(6 / (48 + 96))
  assert 0.98 * bound < abs(dense["kernel"]).max() <= bound
  assert not dense["bias"].any()
  conv = layers.Linear((96,), ("width", None), taps=7).init(jax.random.key(0), x)
  conv = nn.unbox(conv)["params"]
  bound = 1 / np.sqrt(48 * 7)
  for value in conv.values():
    assert 0.95 * bound < abs(value).max() <= bound
  # A fused pair of matrices or convolutions starts as two separate ones would.
  for taps, bound in ((0, np.sqrt(6 / (48 + 96))), (3, 1 / np.sqrt(48 * 3))):
    mlp = nn.unbox(layers.GatedMlp(96, taps).init(jax.random.key(0), x))["params"]
    assert 0.98 * bound < abs(mlp["up"]["kernel"]).max() <= bound


def test_hidden_width_is_upstreams():
  assert [layers.hidden_width(d) for d in (96, 128, 448, 896)] == [256, 512, 1280, 2560]


def test_norms_in_float64():
  x = 3 * normal(0, 2, 5, 16) + 100
  wide = np.asarray(x, np.float64)
  centred = wide - wide.mean(-1, keepdims=True)
  expected = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
  # The one-pass variance E[x^2] - E[x]^2 would be off by 1e-3 here.
  np.testing.assert_allclose(layers.layer_norm(x), expected, atol=5e-5)
  tiny = 1e-4 * normal(1, 2, 16)
  y = layers.RMSNorm().apply({"params": {"scale": jnp.full(16, 2.0)}}, tiny)
  wide = np.asarray(tiny, np.float64)
  expected = 2 * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1.1920929e-07)
  np.testing.assert_allclose(y, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 5, 16), (2, 1, 1, 16)])
def test_the_gradient_of_modulate_is_that_of_its_definition(shape):
  x, shift, scale = 3 + 2 * normal(0, 2, 2, 5, 16), normal(1, *shape), normal(2, *shape)

  def plain(x, shift, scale):
    return layers.layer_norm(x) * (1 + scale) + shift

  ours, theirs = (
    jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), argnums=(0, 1, 2))(x, shift, scale)
    for f in (layers.modulate, plain)
  )
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("by_product", [False, True])
def test_rope_of_bfloat16_rotates_the_same_values(by_product):
  x = normal(0, 2, 12, 3, 16).astype(jnp.bfloat16)
  table = layers.rope_table(12, 16)
  expected = layers.rope(x.astype(jnp.float32), table)
  np.testing.assert_allclose(layers.rope(x, table, by_product), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taps", [1, 3, 7])
def test_a_convolution_by_products_is_one(taps):
  x, kernel = normal(0, 2, 3, 9, 4), normal(1, taps, 4, 5)
  expected = layers.convolve(x, kernel)
  np.testing.assert_allclose(layers.convolve_by_product(x, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("taps", [0, 3])
def test_parallel_layers_are_layers_side_by_side(taps):
  net = layers.ParallelLinear(2, (3, 2), (None, None, None), taps)
  x = normal(0, 2, 9, 4)
  params = nn.unbox(net.init(jax.random.key(0), x))["params"]
  params["bias"] = normal(1, 2, 3, 2)
  wide = layers.Linear((6,), (None, None), taps)
  for i, part in enumerate(net.apply({"params": params}, x)):
    kernel = params["kernel"][i].reshape(*([taps] if taps else []), 4, 6)
    one = {"kernel": kernel, "bias": params["bias"][i].reshape(6)}
    expected = wide.apply({"params": one}, x)
    np.testing.assert_allclose(part.reshape(2, 9, 6), expected, atol=1e-6)
