"""MMAudio's checkpoints: which of five, and the two-ear network that one becomes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from spatialv2a_jax import convert, model_folder
from spatialv2a_jax.convert import engine, mmaudio
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import flow_net
from tests.models import reference

DEPTH = {"heads": 2, "joint_depth": 2, "ear_depth": 2}
ROWS, FRAMES = 2, 9


def state(v2=False, **changes):
  sizes = {"width": 32, "channels": 20, "dims": (6, 5, 7), "text_len": 3, **DEPTH} | changes
  random = reference.random_state(0, v2=v2, **sizes)
  return {name: np.asarray(x, np.float32) for name, x in random.items()}


@pytest.mark.parametrize(
  "name, sizes",
  [
    ("small_16k", (448, 7, 4, 8, 20, False)),
    ("small_44k", (448, 7, 4, 8, 40, False)),
    ("medium_44k", (896, 14, 4, 8, 40, False)),
    ("large_44k", (896, 14, 7, 14, 40, False)),
    ("large_44k_v2", (896, 14, 7, 14, 40, True)),
  ],
)
def test_the_released_sizes_are_told_apart(name, sizes):
  width, heads, joint, ear, channels, v2 = sizes
  config = flow_net.Config(width, heads, joint, ear, channels, ears=1, v2=v2, spatial=False)
  assert mmaudio.variant(config) == name
  assert mmaudio.about(config)["audio"] == name.split("_")[1]
  assert mmaudio.variant(dataclasses.replace(config, width=64, heads=1)) == "custom"


@pytest.mark.parametrize("v2", [False, True])
def test_sizes_show_in_the_shapes_and_old_buffers_are_left_out(v2):
  old = {"t_embed.freqs": np.ones(4), "latent_rot": np.ones(4), "clip_rot": np.ones(4)}
  config, _ = engine.convert(mmaudio.SOURCE, state(v2) | old, "state")
  want = {"width": 32, "heads": 2, "joint_depth": 2, "ear_depth": 2, "latent_channels": 20,
          "clip_dim": 6, "sync_dim": 5, "text_dim": 7, "text_len": 3, "ears": 1, "v2": v2,
          "spatial": False, "ffn": 256}  # fmt: skip
  assert {n: getattr(config, n) for n in want} == want


def test_one_joint_block_is_enough():
  config, params = engine.convert(mmaudio.SOURCE, state(joint_depth=1), "state")
  assert config.joint_depth == 1 and "joint" not in params


def test_a_file_of_the_other_version_is_refused():
  mixed = state() | {"clip_input_proj.2.w1.weight": np.ones((256, 32, 3), np.float32)}
  with pytest.raises(UserError, match="missing in the file: clip_input_proj.2.w2.weight"):
    engine.convert(mmaudio.SOURCE, mixed, "state")


def conditions():
  rng = np.random.default_rng(1)
  shapes = {"clip_bvf": (5, 6), "sync_bsf": (8, 5), "text_bwf": (3, 7), "spatial_bvk": (5, 5)}
  return {n: rng.normal(size=(ROWS, *s)).astype(np.float32) for n, s in shapes.items()}


def velocity(config, params, stats, x_betc, **options):
  net = flow_net.build(config, **options)
  drop = {name: jnp.zeros(ROWS, bool) for name in ("video", "text", "spatial")}

  def run(params, x_betc):
    prepared, _ = net.condition(params, stats, conditions(), drop, latent_len=FRAMES, train=False)
    return net.velocity(params, x_betc, jnp.asarray([0.25, 0.5]), prepared)

  return jax.jit(run)(params, jnp.asarray(x_betc))


@pytest.mark.slow
def test_two_ears_of_a_mono_file_are_dual_mono_bit_for_bit(tmp_path):
  file = tmp_path / "mono.safetensors"
  save_file(state(ear_depth=1), file)
  for ears in (1, 2):
    assert convert.run("mmaudio", file, tmp_path / f"{ears}", ears=ears) == 0
  models = [model_folder.load_model(tmp_path / f"{ears}") for ears in (1, 2)]
  configs = [flow_net.Config(**model.config["flow"]) for model in models]
  assert (configs[1].ears, configs[1].spatial, models[1].config["ear_correlation"]) == (2, True, 1)
  assert models[0].config["flow_source"]["variant"] == "custom"
  shapes = jax.eval_shape(flow_net.build(configs[1]).init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(
    x.size for x in jax.tree.leaves(models[1].params["flow"])
  )

  x_b1tc = np.random.default_rng(2).normal(size=(ROWS, 1, FRAMES, 20)).astype(np.float32)
  mono, dual = (
    velocity(
      config, model.params["flow"], model.stats["flow"], np.repeat(x_b1tc, config.ears, 1),
      sealed=True,
    )
    for config, model in zip(configs, models, strict=True)
  )  # fmt: skip
  np.testing.assert_array_equal(dual[:, :1], mono)
  np.testing.assert_array_equal(dual[:, 1:], mono)
  assert mono.std() > 0.1


@pytest.mark.slow
def test_both_ears_are_the_mono_network_bit_for_bit_when_run_op_by_op():
  """Not sealed; compiled, each would be a program that XLA fuses in its own way."""
  config, params = engine.convert(mmaudio.SOURCE, state(ear_depth=1), "state")
  dual_config, dual_params, stats = mmaudio.two_ears(config, params, jax.random.key(0))
  x_b1tc = np.random.default_rng(2).normal(size=(ROWS, 1, FRAMES, 20)).astype(np.float32)
  with jax.disable_jit():
    mono = velocity(config, params, {}, x_b1tc)
    dual = velocity(dual_config, dual_params, stats, np.repeat(x_b1tc, 2, 1))
  np.testing.assert_array_equal(dual[:, :1], mono)
  np.testing.assert_array_equal(dual[:, 1:], mono)


@pytest.mark.slow
def test_what_makes_the_ears_alike_can_be_learned():
  config, params = engine.convert(mmaudio.SOURCE, state(), "state")
  config, params, stats = mmaudio.two_ears(config, params, jax.random.key(0))
  x_betc = np.random.default_rng(2).normal(size=(ROWS, 2, FRAMES, 20)).astype(np.float32)
  slope = jax.grad(lambda p: jnp.square(velocity(config, p, stats, x_betc)[:, 0]).mean())(params)
  for leaf in (
    slope["ear_embedding"], slope["joint_last"]["cross_mass"], slope["spatial"]["scale"]
  ):  # fmt: skip
    assert np.isfinite(leaf).all() and abs(leaf).max() > 0


def test_ears_are_mmaudios_alone(tmp_path):
  with pytest.raises(UserError, match="--ears is for mmaudio"):
    convert.run("vae", tmp_path / "any", tmp_path / "out", ears=2)
