"""Draws are functions of the seed, the step and the clip, and of nothing around them."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from spatialv2a_jax.training import recipe
from tests import runner
from tests.training import test_train_step as toy
from tests.training.test_train import fit, lines

NOISE = """
import sys
import jax, numpy as np
from spatialv2a_jax import flow, sampler
from spatialv2a_jax.training import recipe
jax.config.update("jax_num_cpu_devices", 1)
order = np.array([3, 1, 0, 2])

@jax.jit
def draw(key, id_b):
  one = lambda key: flow.ear_noise(key, 3, 2, ears=2, correlation=0.0)
  return jax.vmap(one)(flow.clip_keys(jax.random.fold_in(key, 5), id_b))

for key in (recipe._stream(7, "train"), sampler.clip_key(7, "0123456789abcdef")):
  whole = draw(key, np.arange(4, dtype=np.uint32))
  np.testing.assert_array_equal(draw(key, order.astype(np.uint32)), whole[order])
  np.testing.assert_array_equal(draw(key, np.array([2], np.uint32))[0], whole[2])
  sys.stdout.write(np.asarray(whole).tobytes().hex() + "\\n")
"""


def made(**options):
  mesh, stats = toy.one_device(), {"mean": np.zeros(8, np.float32)}
  given = {"loss": toy.toy_loss, "init": toy.toy_init, "optimizer": toy.SGD, "mesh": mesh}
  return recipe.Recipe(**{"batches": iter, "batch_size": 8, "stats": stats, **given, **options})


def test_noise_ignores_the_generator_that_the_environment_chooses():
  """Of "rbg", what a clip draws depends on the clips beside it."""
  started = [
    subprocess.Popen(
      [sys.executable, "-c", NOISE],
      env={**runner.environment(), **more},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for more in ({}, {"JAX_DEFAULT_PRNG_IMPL": "rbg"})
  ]
  out = [process.communicate(timeout=300) for process in started]
  assert [process.returncode for process in started] == [0, 0], out
  assert out[0][0] == out[1][0] and len(set(out[0][0].split())) == 2


def test_another_seed_is_other_noise(tmp_path):
  """Of the same parameters and clips."""
  losses = []
  for name, seed in (("a", 0), ("b", 1), ("c", 0)):
    init = lambda key: toy.toy_init(jax.random.key(5))  # noqa: E731
    fit(tmp_path / name, steps=1, seed=seed, init=init)
    losses.append(lines(tmp_path / name)[0]["loss"])
  assert losses[0] == losses[2] and not np.isclose(losses[0], losses[1], rtol=1e-6)


def test_another_seed_is_other_parameters():
  first, second, again = (made(seed=seed).state()[0]().params for seed in (0, 1, 0))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  for layer in ("up", "down"):
    assert (first[layer]["kernel"] != second[layer]["kernel"]).all()


def test_parameters_and_steps_have_keys_of_their_own(monkeypatch):
  """Of one key, the noise of the first steps would be that of the parameters."""
  keys = []
  monkeypatch.setattr(recipe, "init_state", lambda *given: keys.append(given[3]))
  monkeypatch.setattr(recipe, "make_train_step", lambda *_, key, **__: keys.append(key))
  for seed in (0, 1):
    one = made(seed=seed)
    one.state()
    one.step(None)
  assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(keys) == 4


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_loss_gets_the_parts_of_a_batch_that_its_recipe_says(accumulate):
  shapes = set()

  def loss(params, stats, batch, key):
    shapes.add(batch["x_bw"].shape)
    return toy.toy_loss(params, stats, batch, key)

  one = made(accumulate=accumulate, loss=loss)
  _, abstract, layout = one.state()
  jax.eval_shape(one.step(layout), abstract, toy.toy_batch(0))
  assert shapes == {(8 // accumulate, 8)}
