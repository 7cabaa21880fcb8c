"""Model folders as `spatialv2a convert` leaves them, with tiny networks of random weights."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import numpy as np

from spatialv2a_jax import features, model_folder, sharding, tokenizer
from spatialv2a_jax.convert import mmaudio
from spatialv2a_jax.encoders import Encoders
from spatialv2a_jax.models import clip, flow_net, localizer, synchformer, vae, vocoder
from spatialv2a_jax.weights import Weights

MERGES = pathlib.Path(__file__).parent / "golden" / "clip_merges.txt.gz"
SECONDS = 0.96  # Two segments; 7 frames at 8 fps, 24 at 25.

CLIP = clip.Config(
  grid=2, image_width=32, image_layers=2, image_heads=2, text_width=16, text_layers=2,
  text_heads=2, dim=16,
)  # fmt: skip
SYNC = synchformer.Config(size=32, width=24, layers=2, heads=2)
CLIPSEG = localizer.Config(
  grid=3, patch=32, image_width=16, image_layers=11, image_heads=2, text_width=16, text_layers=2,
  text_heads=2, dim=12, reduced=8, decoder_heads=2, decoder_ffn=16,
)  # fmt: skip
FLOW = flow_net.Config(
  width=32, heads=1, joint_depth=2, ear_depth=1, latent_channels=20, ffn=64, clip_dim=16,
  sync_dim=24, text_dim=16,
)  # fmt: skip
VAE = vae.Config(80, 20, 4)
VOCODER = vocoder.Config(
  width=8, rates=(16, 16), kernels=(32, 32), block_kernels=(3,), dilations=(1,)
)


@functools.cache
def _shapes(network, config):
  """Tracing takes long, and many tests save the same networks."""
  return sharding.unboxed(jax.eval_shape(network.build(config).init, jax.random.key(0)))


def shaken(network, config, seed):
  """Random parameters for a module of `models` and its config, of which none is zero."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    name = path[-1].key
    if name in ("scale", "data_std", "latent_std"):
      return rng.uniform(0.5, 1.5, x.shape).astype("f4")
    size = 0.1 if x.ndim < 2 else max(1, x.size / x.shape[-1]) ** -0.5
    if name in ("tokens", "positions"):
      size = 1.0
    return (size * rng.standard_normal(x.shape)).astype("f4")

  return jax.tree_util.tree_map_with_path(leaf, _shapes(network, config))


def networks(ears=2):
  """Config and parameters by the name of each network."""
  flow_config = dataclasses.replace(FLOW, ears=ears, spatial=ears == 2)
  made = {
    "flow": (flow_net, flow_config),
    "vae": (vae, VAE),
    "vocoder": (vocoder, VOCODER),
    "clip": (clip, CLIP),
    "synchformer": (synchformer, SYNC),
    "clipseg": (localizer, CLIPSEG),
  }
  out = {name: (x[1], shaken(*x, i)) for i, (name, x) in enumerate(made.items())}
  out["vae"][1]["frozen"] = {
    "data_mean": np.full(80, -2, "f4"),
    "data_std": np.full(80, 0.5, "f4"),
  }
  # Its heat maps shall differ from place to place, about one half under ACL's shift.
  decoder = out["clipseg"][1]["decoder"]
  out["clipseg"][1]["decoder"] = jax.tree.map(lambda x: x * (4 if x.ndim > 1 else 1), decoder)
  out["clipseg"][1]["decoder"]["enlarge_1"]["bias"][:] = -localizer.SHIFT
  return out


def save(folder: pathlib.Path, names=None, ears: int = 2) -> pathlib.Path:
  """Writes a model folder with all networks, or those named."""
  made = networks(ears)
  chosen = {name: made[name] for name in names or made}
  config = {name: dataclasses.asdict(made[name][0]) for name in chosen}
  if "flow" in chosen:
    config |= mmaudio.about(made["flow"][0]) | {"seconds": SECONDS}
  stats = jax.tree.map(np.asarray, flow_net.build(made["flow"][0]).init_stats())
  params = {name: made[name][1] for name in chosen}
  model_folder.save_model(folder, params, {"flow": stats}, config)
  shutil.copy(MERGES, folder / tokenizer.FILE)
  return folder


def open_encoders(folder, *, dtype=None, single=False, localizer="acl", **options):
  weights = Weights([model_folder.open_model(folder)], dtype=dtype, single=single)
  config = features.Config("mmaudio", 0, 16, 24, 16, 77, localizer)
  return Encoders(config, weights, **options)


def read(encoders, film, prompt="a dog", **options):
  return encoders.read(film, encoders.stages(prompt), SECONDS, **options)
