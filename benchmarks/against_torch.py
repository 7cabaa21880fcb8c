# pyright: reportMissingImports=false
"""Times the full-size networks against the same networks in PyTorch, on the CPU.

Run: python -m benchmarks.against_torch [--repeats 5] [--rows NAME ...]   (extra: `bench`)

`small_16k` in float32 on a clip of 8 s, its VAE's decoder and BigVGAN at 16 kHz, all with the same
random weights in both frameworks; the outputs are compared before anything is timed. The two
frameworks take turns within a row, so that a drift of the machine meets both alike. PyTorch runs
as users run it: eager, with its fused attention, and as many threads as there are cores.

XLA allocates the scratch memory of a program anew at each call. Where the system takes freed pages
back while the other framework works, a training step of JAX spends a third of its time on getting
them again. `make bench` sets GLIBC_TUNABLES so that both keep what they have freed, in huge pages.
"""

import argparse
import gc
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
import optax
import torch

from benchmarks import torch_codec, torch_flow
from configs import small_16k
from spatialv2a_jax import flow, schema
from spatialv2a_jax.models import flow_net, vae, vocoder

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # The same work in JAX and in PyTorch.

AUDIO = schema.AUDIO["16k"]
STEPS, GUIDANCE = 25, 4.5
LR = 1e-4


def random_like(shapes: Any, seed: int, scale: float = 0.02) -> Any:
  """Returns normal parameters in the place of shapes; norms' scales and masses stay at one."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    name = path[-1].key
    value = rng.standard_normal(x.shape, np.float32) * np.float32(scale)
    if name == "cross_mass":  # One: attention over all tokens at once.
      return np.ones(x.shape, np.float32)
    return value + 1 if name in ("scale", "latent_std", "data_std") else value

  return jax.tree_util.tree_map_with_path(draw, shapes)


class Flow:
  """The velocity network in both frameworks, and inputs for it."""

  def __init__(self):
    config: dict[str, Any] = small_16k.get_config().to_dict()
    sizes = {n: config["features"][n] for n in ("clip_dim", "sync_dim", "text_len", "text_dim")}
    model = config["model"] | {
      "dtype": "float32",
      "activations": "float32",
      "remat": "",
      "gemm": True,
    }
    self.config = flow_net.Config(latent_channels=AUDIO.latent_channels, **model, **sizes)
    self.net = flow_net.build(self.config)
    shapes = nn.unbox(jax.eval_shape(self.net.init, jax.random.key(0)))
    self.params = random_like(shapes, 0)
    self.stats = self.net.init_stats()
    self.peer = torch_flow.FlowNet(self.config, self.params)
    self.params = jax.device_put(self.params)
    batch = schema.synthetic_batch(
      schema.feature_shapes(config["seconds"], AUDIO, **sizes), 1, seed=0
    )
    names = ("clip_bvf", "sync_bsf", "text_bwf", "spatial_bvk")
    self.cond: Any = {name: np.asarray(batch[name]) for name in names}
    self.frames = schema.lengths(config["seconds"], AUDIO).latent
    shape = (2, 1, 2, self.frames, AUDIO.latent_channels)
    self.x_betc, self.target_betc = np.random.default_rng(1).standard_normal(shape, np.float32)
    self.keep = {n: np.zeros(1, bool) for n in ("video", "text", "spatial")}

  def forward(self) -> Pair:
    """One evaluation of the velocity."""
    t_b = np.full(1, 0.3, np.float32)
    options = {"latent_len": self.frames, "train": False}
    prepared, _ = self.net.condition(self.params, self.stats, self.cond, self.keep, **options)
    velocity = jax.jit(self.net.velocity)
    with torch.no_grad():
      theirs = self.peer.condition(_tensors(self.cond), self.frames)
    x, t = _tensors({"x": self.x_betc, "t": t_b}).values()

    @torch.no_grad()
    def peer():
      return self.peer(x, t, theirs)

    return lambda: velocity(self.params, self.x_betc, t_b, prepared), peer

  def sampling(self) -> Pair:
    """All of `flow.sample` with guidance: two evaluations a step, as one batch."""

    @jax.jit
    def ours(params, x_betc):
      options = {"latent_len": self.frames, "guidance": GUIDANCE}
      velocity = flow.guided(self.net, params, self.stats, self.cond, **options)
      return flow.sample(velocity, x_betc, steps=STEPS)

    @torch.no_grad()
    def peer():
      empty = jax.tree.map(np.zeros_like, self.cond)  # The null features are the parameters':
      for name, vector in (("clip_bvf", "null_clip"), ("sync_bsf", "null_sync")):
        empty[name] += np.asarray(self.params["condition"][vector])
      empty["text_bwf"] += np.asarray(self.params["frozen"]["null_text"])
      both = {n: np.concatenate([self.cond[n], empty[n]]) for n in self.cond}
      prepared = self.peer.condition(_tensors(both), self.frames)
      prepared["spatial_btd"][1] = torch.tensor(np.asarray(self.params["spatial"]["null"]))
      x = torch.from_numpy(self.x_betc)
      for i in range(STEPS):
        full, null = self.peer(x.repeat(2, 1, 1, 1), torch.full((2,), i / STEPS), prepared).chunk(2)
        x = x + (GUIDANCE * full + (1 - GUIDANCE) * null) / STEPS
      return x

    return lambda: ours(self.params, self.x_betc), peer

  def training(self) -> Pair:
    """Loss, gradient and AdamW's update of one clip; returns the loss."""
    t_b, optimizer = np.full(1, 0.3, np.float32), optax.adamw(LR, weight_decay=1e-6)

    def loss(params):
      options = {"latent_len": self.frames, "train": True}
      prepared, _ = self.net.condition(params, self.stats, self.cond, self.keep, **options)
      error = self.net.velocity(params, self.x_betc, t_b, prepared) - self.target_betc
      return jnp.square(error).mean(axis=(0, 2, 3)).sum()

    def step(params, state):
      value, gradient = jax.value_and_grad(loss)(params)
      updates, state = optimizer.update(gradient, state, params)
      return value, optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    state = optimizer.init(self.params)

    def ours():
      nonlocal state
      value, self.params, state = step(self.params, state)
      return value

    theirs = torch.optim.AdamW(self.peer.parameters(), lr=LR, weight_decay=1e-6, fused=True)
    cond, given = _tensors(self.cond), _tensors({"x": self.x_betc, "t": t_b, "y": self.target_betc})

    def peer():
      theirs.zero_grad(set_to_none=True)
      prepared = self.peer.condition(cond, self.frames, train=True)
      error = self.peer(given["x"], given["t"], prepared) - given["y"]
      value = error.square().mean(dim=(0, 2, 3)).sum()
      value.backward()
      theirs.step()
      return value.detach()

    return ours, peer


def decoding() -> Pair:
  """The VAE's decoder on the latents of both ears."""
  config = vae.Config(n_mels=80, latent_channels=AUDIO.latent_channels, width=384, folded=True)
  net = vae.build(config)
  params = torch_codec.folded(random_like(nn.unbox(jax.eval_shape(net.init, jax.random.key(0))), 0))
  peer = torch_codec.VaeDecoder(params)
  frames = schema.lengths(8.0, AUDIO).latent
  z_btc = np.random.default_rng(1).standard_normal((2, frames, AUDIO.latent_channels), np.float32)
  decode, params = jax.jit(net.decode), jax.device_put(params)
  return lambda: decode(params, z_btc), torch.no_grad()(lambda: peer(torch.from_numpy(z_btc)))


def vocoding() -> Pair:
  """BigVGAN at 16 kHz on 8 s of one ear."""
  config = vocoder.V1_16K
  net = vocoder.build(config)
  params = random_like(nn.unbox(jax.eval_shape(net.init, jax.random.key(0))), 0)
  peer = torch_codec.BigVGAN(config, params)
  frames = 2 * schema.lengths(8.0, AUDIO).latent
  mel_bmn = np.random.default_rng(1).standard_normal((1, config.n_mels, frames), np.float32)
  run, params = jax.jit(net.waveform), jax.device_put(params)
  return lambda: run(params, mel_bmn), torch.no_grad()(lambda: peer(torch.from_numpy(mel_bmn)))


ROWS: dict[str, Callable[[], Pair]] = {
  "forward": lambda: Flow().forward(),
  "training step": lambda: Flow().training(),
  f"{STEPS} guided steps": lambda: Flow().sampling(),
  "VAE decoder, both ears": decoding,
  "BigVGAN, one ear": vocoding,
}


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
  return {name: torch.from_numpy(np.asarray(x)) for name, x in arrays.items()}


def measure(pair: Pair, repeats: int) -> tuple[list[float], list[float], float]:
  """Returns the seconds of both, taken in turns, and the relative difference of their results."""
  ours, peer = pair
  ours_first = np.asarray(jax.block_until_ready(ours()))  # Compiles.
  peer_first = np.asarray(peer())
  jax.block_until_ready(ours())  # Takes the memory that later rounds find.
  peer()
  difference = np.linalg.norm(ours_first - peer_first) / np.linalg.norm(peer_first)
  seconds: tuple[list[float], list[float]] = ([], [])
  for _ in range(repeats):
    for run, times in zip((ours, peer), seconds, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(run())
      times.append(time.perf_counter() - start)
  return *seconds, float(difference)


def main() -> None:
  """Prints the table, a row as soon as it is measured."""
  arguments = argparse.ArgumentParser(description="Times JAX against PyTorch.")
  arguments.add_argument("--repeats", type=int, default=5)
  arguments.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
  given = arguments.parse_args()
  print(
    f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}; "
    f"jax {jax.__version__}, torch {torch.__version__}; medians of {given.repeats}; "
    f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}"
  )
  print("| row | JAX s | PyTorch s | PyTorch / JAX | range of the ratio | difference |")
  print("|---|--:|--:|--:|--:|--:|", flush=True)
  for name in given.rows:
    ours, peer, difference = measure(ROWS[name](), given.repeats)
    ratios = sorted(b / a for a, b in zip(ours, peer, strict=True))
    middle = statistics.median(ours), statistics.median(peer)
    print(
      f"| {name} | {middle[0]:.3f} | {middle[1]:.3f} | {middle[1] / middle[0]:.2f} "
      f"| {ratios[0]:.2f} .. {ratios[-1]:.2f} | {difference:.1e} |",
      flush=True,
    )
    gc.collect()
    jax.clear_caches()


if __name__ == "__main__":
  main()
