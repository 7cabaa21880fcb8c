"""Guided sampling from fixed noise, against MMAudio's rule in NumPy float64."""

import jax
import numpy as np
import pytest

from spatialv2a_jax.convert import engine, mmaudio, relative_error
from tests.models import reference

DEPTH = {"heads": 2, "joint_depth": 2, "ear_depth": 1}
ROWS, FRAMES, GUIDANCE, STEPS = 2, 9, 4.5, 4


@pytest.mark.slow
@pytest.mark.parametrize("negative", [False, True])
def test_four_euler_steps_are_upstreams(negative):
  sizes = {"width": 32, "channels": 4, "dims": (6, 5, 7), "text_len": 3}
  state = reference.random_state(0, v2=False, **sizes, **DEPTH)
  rng = np.random.default_rng(1)
  shapes = {"x0": (FRAMES, 4), "latent": (FRAMES, 4), "clip_f": (5, 6), "sync_f": (8, 5),
            "text_f": (3, 7), "negative_text_f": (3, 7)}  # fmt: skip
  inputs = {name: rng.normal(size=(ROWS, *shape)).astype("f4") for name, shape in shapes.items()}

  net = reference.Reference(state, v2=False, **DEPTH)
  empty = {
    name: np.broadcast_to(state[f"empty_{name}_feat"], (ROWS, *shapes[key]))
    for name, key in (("clip", "clip_f"), ("sync", "sync_f"), ("string", "text_f"))
  }
  real = net.condition(inputs["clip_f"], inputs["sync_f"], inputs["text_f"], FRAMES)
  words = inputs["negative_text_f"] if negative else empty["string"]
  null = net.condition(empty["clip"], empty["sync"], words, FRAMES)
  x = inputs["x0"].astype(np.float64)
  for i in range(STEPS):
    t = np.full(ROWS, i / STEPS)
    x = x + (GUIDANCE * net.flow(x, t, real) + (1 - GUIDANCE) * net.flow(x, t, null)) / STEPS

  config, params = engine.convert(mmaudio.SOURCE, state, "state")
  with jax.default_matmul_precision("highest"):
    outputs = mmaudio.outputs(config, params, inputs)
    got = np.asarray(outputs["sample_negative" if negative else "sample"]())
  assert relative_error(got, x) < 1e-5
