"""Times the parts of the embedded default: training step, sampling, decoding, waveform.

Run: python -m benchmarks.step [--repeats 7]
Parts are timed in turn, round after round, so that a drift of the machine meets all of them alike.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import tiny, vae_tiny
from spatialv2a_jax import codec, flow, schema
from spatialv2a_jax.models import flow_net

CLIPS = 16


def parts() -> dict[str, tuple[Callable[[], Any], int]]:
  """Returns each part as a function of nothing, and how many clips it works on."""
  config: dict[str, Any] = tiny.get_config().to_dict()
  audio = schema.AUDIO["16k"]
  sizes = {n: config["features"][n] for n in ("clip_dim", "sync_dim", "text_len", "text_dim")}
  shapes = schema.feature_shapes(config["seconds"], audio, **sizes)
  batch = jax.device_put(schema.synthetic_batch(shapes, CLIPS, seed=0))
  model = flow_net.Config(latent_channels=audio.latent_channels, **config["model"], **sizes)
  net = flow_net.build(model)
  params, stats = nn.unbox(net.init(jax.random.key(0))), net.init_stats()
  loss_config = flow.LossConfig(**config["loss"])

  def loss(params, key):
    return flow.loss(params, stats, batch, key, net=net, config=loss_config)

  train = jax.jit(jax.value_and_grad(loss, has_aux=True))
  frames = schema.lengths(config["seconds"], audio).latent
  cond = {name: batch[name][:1] for name in ("clip_bvf", "sync_bsf", "text_bwf", "spatial_bvk")}

  @jax.jit
  def sample(params, x_betc):
    velocity = flow.guided(net, params, stats, cond, latent_len=frames, guidance=2.0)
    return flow.sample(velocity, x_betc, steps=25)

  vae_config: dict[str, Any] = vae_tiny.get_config().to_dict()
  sound = codec.build(vae_config["model"], audio)
  vae = nn.unbox(sound.init(jax.random.key(0)))
  z_betc = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, frames, 20), np.float32))
  decode = jax.jit(sound.decode)
  return {
    "loss and gradient": (lambda: train(params, jax.random.key(1)), CLIPS),
    "25 steps of guided sampling": (lambda: sample(params, z_betc), 1),
    "VAE decode, both ears": (lambda: decode(vae, z_betc), 1),
    "VAE decode and shared-phase waveform": (lambda: sound.waveform(vae, z_betc[0]), 1),
  }


def main() -> None:
  """Prints the table."""
  arguments = argparse.ArgumentParser(description="Times the parts of the embedded default.")
  arguments.add_argument("--repeats", type=int, default=7)
  repeats = arguments.parse_args().repeats
  work = parts()
  for run, _ in work.values():
    jax.block_until_ready(run())  # Compiles.
  times: dict[str, list[float]] = {name: [] for name in work}
  for _ in range(repeats):
    for name, (run, _) in work.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  device = jax.devices()[0]
  print(
    f"{device.device_kind} ({platform.machine()}, {os.cpu_count()} cores), jax {jax.__version__}"
  )
  print(f"{'part':38} {'median ms':>10} {'min':>8} {'max':>8} {'4 s clips/s':>12}")
  for name, (_, clips) in work.items():
    seconds = times[name]
    middle = statistics.median(seconds)
    row = f"{1e3 * middle:10.1f} {1e3 * min(seconds):8.1f} {1e3 * max(seconds):8.1f}"
    print(f"{name:38} {row} {clips / middle:12.1f}")


if __name__ == "__main__":
  main()
