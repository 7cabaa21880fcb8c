"""A model small enough to run in every test, and films to run it on."""

import pathlib
from typing import Any

import jax
import numpy as np

from spatialv2a_jax import binauralizer, codec, features, io, model_folder, schema, sharding
from spatialv2a_jax.generator import Settings
from spatialv2a_jax.models import flow_net, mono2binaural

SECONDS = 1.28  # Of the model's window.
RATE = 16_000
STEPS = 2
BASE = Settings(steps=STEPS)


def save_model(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
  """Writes a model folder with random weights, of which none is zero, so that all have effects."""
  encoders = features.Config(clip_dim=16, sync_dim=16, text_dim=8, text_len=4)
  sizes: dict[str, Any] = dict(
    width=32, heads=1, joint_depth=1, ear_depth=1, latent_channels=20, ffn=64,
    clip_dim=16, sync_dim=16, text_dim=8, text_len=4,
  )  # fmt: skip
  net = flow_net.build(flow_net.Config(**sizes))
  sound = codec.build({"width": 4}, schema.AUDIO["16k"])
  rng = np.random.default_rng(seed)

  def shaken(shapes):
    return jax.tree.map(
      lambda x: (
        (rng.standard_normal(x.shape) / max(1, x.size / x.shape[-1]) ** 0.5).astype("f4")
        if x.ndim
        else np.float32(0.1)
      ),
      sharding.unboxed(shapes),
    )

  flow = shaken(jax.eval_shape(net.init, jax.random.key(0)))
  flow["frozen"]["latent_std"] = np.ones(20, np.float32)
  vae = shaken(jax.eval_shape(sound.init, jax.random.key(0)))
  vae["frozen"] = {"data_mean": np.full(80, -3, "f4"), "data_std": np.full(80, 0.5, "f4")}
  stats = jax.tree.map(np.asarray, net.init_stats())
  config = {
    "audio": "16k",
    "seconds": SECONDS,
    "ear_correlation": 0.5,
    "features": {**vars(encoders)},
    "flow": sizes,
    "vae": {"width": 4},
  }
  model_folder.save_model(folder, {"flow": flow, "vae": vae}, {"flow": stats}, config)
  return folder


def save_mono2binaural(folder: pathlib.Path) -> pathlib.Path:
  """Writes a model folder with a random mono-to-binaural network for pictures of 32 x 64."""
  sizes = mono2binaural.Config(width=2, planes=2, rows=32, columns=64)
  net = mono2binaural.build(sizes)
  shapes = sharding.unboxed(jax.eval_shape(net.init, jax.random.key(0)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (rng.standard_normal(x.shape) / max(1, x.size / x.shape[-1]) ** 0.5).astype("f4"),
    shapes,
  )
  stats = jax.tree.map(np.asarray, net.init_stats())
  name = binauralizer.NETWORK
  model_folder.save_model(folder, {name: params}, {name: stats}, {name: {**vars(sizes)}})
  return folder


def film(
  path: pathlib.Path, seconds: float = SECONDS, *, seed: int = 0, side: float | None = None,
  fps: int = 25, sound: bool = False, size: tuple[int, int] = (48, 80), still: bool = False,
) -> pathlib.Path:  # fmt: skip
  """Writes a video of a bright square that moves on a textured background.

  Args:
    path: of the MP4.
    seconds: length.
    seed: of the background and of the sound.
    side: image column (0 left, 1 right) about which it trembles; None: it crosses the picture.
    fps: frames per second.
    sound: adds mono-like noise.
    size: rows and columns.
    still: nothing moves.
  """
  rng = np.random.default_rng(seed)
  rows, columns = size
  picture = rng.integers(60, 120, (rows, columns, 3), np.uint8)
  count = max(1, round(seconds * fps))

  def frames():
    for i in range(count):
      u = i / count if side is None else side + 0.02 * (-1) ** i
      at = 0 if still else int(u * (columns - 10))
      shown = picture.copy()
      shown[rows // 3 : rows // 3 + 10, at : at + 10] = 255
      yield shown

  noise = rng.uniform(-0.3, 0.3, (1, round(count / fps * RATE))).astype(np.float32)
  io.write_video(path, frames(), fps, np.repeat(noise, 2, 0) if sound else None, RATE)
  return path
