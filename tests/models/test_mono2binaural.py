"""The mono-to-binaural network: its convolutions against PyTorch's definition, sizes, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax.models import mono2binaural, resnet
from spatialv2a_jax.sharding import unboxed


def test_sizes_are_pseudobinaurals():
  net = mono2binaural.build(mono2binaural.Config(norm="instance"))
  shapes = unboxed(jax.eval_shape(net.init, jax.random.key(0)))
  count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}
  assert count["visual"] == 11_176_512  # torchvision's ResNet-18 without its last layer.
  assert round(count["audio"] / 1e6, 2) == 23.08
  assert round(count["apnet"] / 1e6, 2) == 1.27


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (8, 2)])
def test_down_and_up_are_strided_and_transposed_convolutions(size):
  """Tap by tap: out[n] = sum x[2 n + k - 1] w[k], and out[2 n + k - 1] += x[n] w[3 - k]."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, *size, 3)).astype("f4")
  for layer, grow in ((mono2binaural.Down(5), False), (mono2binaural.Up(5), True)):
    params = unboxed(layer.init(jax.random.key(1), jnp.asarray(x))["params"])
    params["bias"] += 0.5
    w, b = (np.asarray(params[name]) for name in ("kernel", "bias"))
    f, t = (2 * s if grow else s // 2 for s in size)
    wide = np.zeros((2, 2 * f + 6, 2 * t + 6, 5))
    padded = np.zeros((2, size[0] + 2, size[1] + 2, 3))
    padded[:, 1:-1, 1:-1] = x
    for k in range(4):
      for j in range(4):
        if grow:
          wide[:, k : k + 2 * size[0] : 2, j : j + 2 * size[1] : 2] += x @ w[3 - k, 3 - j]
        else:
          wide[:, :f, :t] += padded[:, k : k + 2 * f : 2, j : j + 2 * t : 2][:, :f, :t] @ w[k, j]
    want = (wide[:, 1 : f + 1, 1 : t + 1] if grow else wide[:, :f, :t]) + b
    got = np.asarray(layer.apply({"params": params}, jnp.asarray(x)))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_mask_is_a_complex_factor():
  rng = np.random.default_rng(1)
  mask, mix = rng.standard_normal((1, 4, 3, 2)), rng.standard_normal((1, 5, 3, 2))
  got = np.asarray(mono2binaural.masked(jnp.asarray(mask), jnp.asarray(mix)))
  want = (mask[..., 0] + 1j * mask[..., 1]) * (mix[..., 0] + 1j * mix[..., 1])[:, :4]
  np.testing.assert_allclose(got[..., 0] + 1j * got[..., 1], want, rtol=1e-5)


def test_sizes_that_cannot_be_built_are_refused():
  with pytest.raises(ValueError, match="must be multiples of 32"):
    mono2binaural.Config(rows=100)
  with pytest.raises(ValueError, match="must be multiples of 32"):
    mono2binaural.Config(columns=0)
  with pytest.raises(ValueError, match="'layer' is unknown"):
    mono2binaural.Config(norm="layer")


def test_pictures_kernels_are_drawn_as_torchvisions():
  """Kaiming's by what goes out, where a convolution widens: half of what it is by what goes in."""
  x = jnp.zeros((1, 4, 4, 16))
  kernel = unboxed(resnet.Conv(64, 3, padding=1).init(jax.random.key(0), x))["params"]["kernel"]
  np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.03)


def test_apnet_gives_the_output_where_both_heads_are():
  assert mono2binaural.Config(assoconv=True).heads == ("apnet", "assoconv")
  assert mono2binaural.Config(apnet=False, assoconv=True).heads == ("assoconv",)


def test_batch_norm_forgets_at_pytorchs_rate():
  norm = resnet.BatchNorm(train=True)
  x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (1, 5, 1, 1)), jnp.float32)
  variables = norm.init(jax.random.key(0), x)
  moved: Any = norm.apply(variables, x, mutable=["stats"])[1]["stats"]
  mean, var = (float(moved[name][0]) for name in ("mean", "var"))
  assert mean == pytest.approx(0.1 * float(x.mean()), rel=1e-5)
  assert var == pytest.approx(0.9 + 0.1 * float(np.var(x, ddof=1)), rel=1e-5)
