"""The numbers of the configs: the paper's, and MMAudio's where it is silent."""

import numpy as np
import pytest

from launch import flow_task, tasks
from spatialv2a_jax.training import optim
from tests.launch.test_train import VARIANTS, config_of


def test_the_paper_config_has_its_numbers():
  config = config_of("small_16k", "paper")
  sizes = flow_task.sizes_of(config)
  assert (sizes.width, sizes.heads, sizes.joint_depth, sizes.ear_depth) == (448, 7, 6, 12)
  assert (sizes.latent_channels, config["steps"]) == (20, 300_000)


@pytest.mark.parametrize(
  "name, variant",
  [(name, variant) for name, variant in VARIANTS if "_1" in name or "_4" in name],
)
def test_the_recipe_is_that_of_mmaudio(name, variant):
  """The paper is silent on it; smoke variants only shorten it and compute in float32."""
  config = config_of(name, variant)
  numbers = tasks.optimizer_of(config)
  assert (numbers.lr, numbers.betas, numbers.eps) == (1e-4, (0.9, 0.95), 1e-6)
  assert (numbers.weight_decay, numbers.clip, numbers.gamma) == (1e-6, 1.0, 0.1)
  assert numbers.freeze == (("frozen/.*", True), (".*", False))
  assert numbers.lr_scale == numbers.decay_scale == ((".*", 1.0),)
  assert config["ema"] == {"decay": 0.9999, "sigma_rel": 0.05, "beside": (0.1,)}
  assert config["seed"] == 14_159_265
  drops = [config["loss"][f"drop_{what}"] for what in ("video", "text", "spatial")]
  assert drops == [0.1, 0.1, 0.1]
  if variant == "smoke":
    return
  assert (numbers.warmup, numbers.decay, numbers.milestones) == (1000, "step", (240_000, 270_000))
  assert (config["steps"], config["data"]["batch_size"], config["accumulate"]) == (300_000, 512, 1)
  assert config["model"]["dtype"] == config["model"]["activations"] == "bfloat16"
  assert config["every"]["average"] == 5_000 and config["seconds"] == 8.0
  rate = optim.schedule(numbers)
  rates = [float(rate(step)) for step in (0, 1_000, 240_999, 241_000, 271_000)]
  np.testing.assert_allclose(rates, [1e-4 / 1001, 1e-4, 1e-4, 1e-5, 1e-6], rtol=1e-5)


@pytest.mark.parametrize(
  "sigma_rel, beside, widths",
  [("0", "(0.05, 0.1)", (0, 0.05, 0.1)), ("0.05", "(0.1, 0.0)", (0.05, 0.1, 0)), ("0", "()", (0,))],
)
def test_any_average_can_be_chosen_on_the_command_line(sigma_rel, beside, widths):
  options = {"ema.sigma_rel": sigma_rel, "ema.beside": beside}
  assert optim.Ema(**config_of("small_16k", "paper", **options)["ema"]).widths == widths


def test_the_schedule_of_the_paper_may_be_a_cosine_of_the_run():
  config = config_of("small_16k", "paper", **{"optim.decay": "cosine", "steps": 2_000})
  rate = optim.schedule(tasks.optimizer_of(config))
  rates = [float(rate(step)) for step in (1_000, 1_500, 2_000)]
  np.testing.assert_allclose(rates, [1e-4, 5e-5, 0], rtol=1e-5, atol=1e-12)
