"""The strict engine: everything without a counterpart is told, at once; layouts and weight norm."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax.convert import engine
from spatialv2a_jax.errors import UserError

RNG = np.random.default_rng(0)


def source(**changes):
  def build(config):
    up = {"kernel": jnp.zeros((3, config)), "bias": jnp.zeros(config)}
    return types.SimpleNamespace(init=lambda key: {"up": up, "gain": jnp.zeros(())})

  def table(state, config):
    return engine.under("up", engine.linear("fc")) | {"gain": engine.copy("gain")}

  fields = {
    "network": "toy",
    "upstream": "Toy",
    "licence": "none",
    "sizes": int,
    "configure": lambda state: len(state["fc.weight"]),
    "table": table,
    "build": build,
    "outputs": lambda config, params, inputs: {},
    "ignore": (r"buffer\..*",),
    "wrapper": "model",
  }
  return engine.Source(**fields | changes)


def state(**changes):
  good = {"fc.weight": RNG.normal(size=(5, 3)), "fc.bias": RNG.normal(size=5), "gain": np.ones(())}
  return good | changes


def test_a_checkpoint_that_fits_converts_in_float32():
  given = state(**{"buffer.x": np.ones(2)})
  for wrapped in (given, {"model": given, "epoch": 3}):
    config, params = engine.convert(source(), wrapped, "file")
    assert config == 5
    np.testing.assert_array_equal(params["up"]["kernel"], given["fc.weight"].T.astype(np.float32))
    assert params["up"]["kernel"].dtype == np.float32 and params["gain"].shape == ()
    assert params["up"]["kernel"].flags.c_contiguous


def test_all_that_does_not_match_is_told_at_once():
  given = state(**{"fc.scale": np.ones(2), "epoch": 3})
  given["fc.bias"] = np.ones(4)
  del given["gain"]
  with pytest.raises(UserError) as caught:
    engine.convert(source(), given, "file.pth")
  message = str(caught.value)
  assert message.startswith("file.pth does not fit Toy; ")
  assert "missing in the file: gain" in message
  assert "unknown in the file: epoch, fc.scale" in message
  assert "of another shape: fc.bias (for up/bias (5,))" in message


def test_a_value_that_is_not_finite_is_told():
  """Statistics that nobody gathered are NaN upstream; sound made with them is silence."""
  given = state()
  given["fc.bias"] = np.full_like(given["fc.bias"], np.nan)
  with pytest.raises(UserError, match="does not fit Toy; not finite: fc.bias"):
    engine.convert(source(), given, "file.pth")


def test_leaves_of_ours_without_a_recipe_and_recipes_without_a_leaf_are_told():
  def table(state, config):
    kernel = engine.arranged("fc.weight", engine.WEIGHT)
    return {"up/kernel": kernel, "up/more": engine.copy("gain")}

  with pytest.raises(UserError) as caught:
    engine.convert(source(table=table), state(), "file")
  assert "unknown in the file: fc.bias" in str(caught.value)
  assert "without a recipe: gain, up/bias" in str(caught.value)
  assert "without a parameter: up/more" in str(caught.value)


def test_a_file_of_another_kind_is_told_by_the_key_it_lacks():
  with pytest.raises(UserError, match="holds no Toy weights: it lacks 'fc.weight'; .*: a, b"):
    engine.convert(source(), {"b": np.ones(1), "a": np.ones(1)}, "file")


def test_stack_keeps_the_order_of_blocks_and_their_layouts():
  gates = engine.Leaf(("0.a", "0.b"), lambda a, b: np.stack([a, 2 * b]))
  more = engine.Leaf(("1.a", "1.b"), lambda a, b: np.stack([a, 2 * b]))
  leaf = engine.stack([{"x": gates}, {"x": more}])["x"]
  assert leaf.keys == ("0.a", "0.b", "1.a", "1.b")
  np.testing.assert_array_equal(leaf.layout(*map(np.float32, (1, 2, 3, 4))), [[1, 4], [3, 8]])
  with pytest.raises(ValueError, match="differ"):
    engine.stack([{"x": gates}, {"y": more}])


def test_weight_norm_is_folded_in_all_three_spellings():
  v, g = RNG.normal(size=(4, 3, 5)).astype(np.float32), RNG.normal(size=(4, 1, 1))
  want = g * v / np.sqrt((v.astype(np.float64) ** 2).sum((1, 2), keepdims=True))
  for names in (
    ("c.weight_g", "c.weight_v"),
    ("c.parametrizations.weight.original0", "c.parametrizations.weight.original1"),
  ):
    leaf = engine.weight_norm(dict(zip(names, (g, v), strict=True)), "c")
    assert leaf.keys == names
    got = leaf.layout(g.astype(np.float32), v)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
  leaf = engine.weight_norm({"c.weight": want}, "c")
  assert leaf.keys == ("c.weight",)
  np.testing.assert_array_equal(leaf.layout(want), want)


def test_fused_rows_are_queries_then_keys_then_values():
  x, w, b = RNG.normal(size=(7, 6)), RNG.normal(size=(18, 6)), RNG.normal(size=18)
  leaves = engine.fused_attention("a", 2)
  kernel, bias = leaves["qkv/kernel"].layout(w), leaves["qkv/bias"].layout(b)
  got = np.einsum("ni,iqhk->nqhk", x, kernel) + bias
  for i, part in enumerate(np.split(x @ w.T + b, 3, axis=1)):
    np.testing.assert_allclose(got[:, i], part.reshape(7, 2, 3), atol=1e-12)
  out, heads = RNG.normal(size=(6, 6)), RNG.normal(size=(7, 2, 3))
  got = np.einsum("nhk,hko->no", heads, leaves["out/kernel"].layout(out))
  np.testing.assert_allclose(got, heads.reshape(7, 6) @ out.T, atol=1e-12)


def test_a_checkpoint_of_a_training_run_is_one_line():
  """Its optimiser has numbers as keys."""
  state = {"weights": {"a": np.ones(2, "f4")}, "optimizer": {"state": {0: {"step": 3}}}, "it": 7}
  with pytest.raises(UserError, match="its keys begin with: it, optimizer.state.0.step, weights.a"):
    engine.convert(source(), state, "file")
