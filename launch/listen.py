"""Sound for the log of a run: a few held-out clips, generated and decoded.

Axes: b clip, e ear (0 left, 1 right), t latent frame, c latent channel, p sample.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax import flow, schema
from spatialv2a_jax.codec import Codec
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.logbook import Logbook
from spatialv2a_jax.models.flow_net import FlowNet

COND = ("clip_bvf", "sync_bsf", "text_bwf", "spatial_bvk")


@dataclasses.dataclass
class Listener:
  """Writes generated sound, and once the sound it is compared with, into the logbook.

  Attributes:
    net: the flow network.
    codec: decodes its latents.
    vae: parameters of the codec.
    audio: rates of the sound.
    settings: "clips" to listen to (0: none), "steps" and "guidance" of the sampler.
    correlation: of the ears' noise, as in training.
  """

  net: FlowNet
  codec: Codec
  vae: Any
  audio: schema.AudioSpec
  settings: Mapping[str, Any]
  correlation: float = 0.0
  heard: bool = False

  def __post_init__(self):
    for name, least in {"clips": 0, "steps": 1}.items():
      if self.settings[name] < least:
        raise UserError(f"config.listen.{name}={self.settings[name]} is less than {least}")

  def __call__(
    self, params: Any, stats: Any, batch: Mapping[str, np.ndarray], step: int, book: Logbook
  ) -> None:
    """Generates the first clips of a batch, with the same noise at each call."""
    # What fills up the last batch has no weight and is at its end.
    clips = min(self.settings["clips"], np.count_nonzero(batch["weight_b"]))
    if not clips:
      return
    rows = schema.widen({name: batch[name][:clips] for name in (*COND, "mean_betc", "id_b")})
    z_betc = jax.device_get(self._sample(params, stats, rows))
    truth_betc = rows["mean_betc"]
    for i in range(clips):
      name = f"clip/{int(rows['id_b'][i])}"
      made_ep = self.codec.waveform(self.vae, z_betc[i])
      book.audio(step, f"{name}/generated", made_ep, self.audio.sample_rate)
      if not self.heard:
        through_ep = self.codec.waveform(self.vae, truth_betc[i])
        book.audio(step, f"{name}/truth through the codec", through_ep, self.audio.sample_rate)
    self.heard = True

  @functools.cached_property
  def _sample(self):
    @jax.jit
    def sample(params, stats, rows):
      _, ears, frames, channels = rows["mean_betc"].shape
      velocity = flow.guided(
        self.net,
        params,
        stats,
        {name: rows[name] for name in COND},
        latent_len=frames,
        guidance=self.settings["guidance"],
      )
      key = jax.random.key(0, impl="threefry2x32")
      keys_b = flow.clip_keys(key, jnp.asarray(rows["id_b"]))
      noise_betc = jax.vmap(
        lambda key: flow.ear_noise(key, frames, channels, ears=ears, correlation=self.correlation)
      )(keys_b)
      x_betc = flow.sample(velocity, noise_betc, steps=self.settings["steps"])
      return self.net.unnormalize(params, x_betc)

    return sample
