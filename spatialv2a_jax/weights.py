"""Networks of model folders on the device: put there when used, and deleted again when asked.

A checkpoint need not hold every network: what it lacks is looked for in the folders after it, so
that several checkpoints share one copy of CLIP.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import ml_dtypes

from spatialv2a_jax import sharding
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.model_folder import Model

# Source of `spatialv2a convert` and the file that it wants, of each network that is not trained
# here. The vocoder and the VAE depend on the sample rate.
SOURCES = {
  "clip": ("clip", "open_clip_pytorch_model.bin of huggingface.co/apple/DFN5B-CLIP-ViT-H-14-378"),
  "synchformer": ("synchformer", "synchformer_state_dict.pth of MMAudio's release"),
  "clipseg": ("clipseg", "model.safetensors of huggingface.co/CIDAS/clipseg-rd64-refined"),
  "beats": ("beats", "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt of BEATs' release"),
  "acl": ("acl", "Param_best.pth of ACL-SSL's release"),
  "flow": ("mmaudio", "mmaudio_small_16k.pth or another network of MMAudio's release"),
  "vae 16k": ("vae", "v1-16.pth of MMAudio's release"),
  "vae 44k": ("vae", "v1-44.pth of MMAudio's release"),
  "vocoder 16k": ("bigvgan", "best_netG.pt of MMAudio's release"),
  "vocoder 44k": (
    "bigvgan_v2",
    "bigvgan_generator.pt of huggingface.co/nvidia/bigvgan_v2_44khz_128band_512x",
  ),
}
Sizes = TypeVar("Sizes")
EXACT = ("vae", "vocoder")  # Always float32, see `codec.exactly`.


def missing(name: str, folder: Any, audio: str = "16k") -> MissingAssetError:
  """Returns the error that says how to get a network into `folder`."""
  source, file = SOURCES.get(name) or SOURCES[f"{name} {audio}"]
  return MissingAssetError(
    f"{folder} holds no weights of: {name}; download {file}, then: "
    f"spatialv2a convert {source} FILE --out {folder} (or name a folder that has it with --parts)"
  )


class Weights:
  """The networks of a checkpoint and of folders that complete it.

  Attributes:
    models: the folders, the checkpoint first; the first that has a network gives it.
    dtype: "float32" or "bfloat16", of the matmuls; None is what each config says.
    single: holds one network (or tower of one) at a time, and deletes it before the next.
  """

  def __init__(self, models: Sequence[Model], *, dtype: str | None = None, single: bool = False):
    self.models, self.dtype, self.single = tuple(models), dtype, single
    self._held: dict[tuple[str, str], Any] = {}
    self._verified: set[str] = set()

  def __contains__(self, name: str) -> bool:
    return any(name in model.params for model in self.models)

  def model(self, name: str, audio: str = "16k") -> Model:
    """Returns the folder that gives a network; MissingAssetError if none does."""
    for model in self.models:
      if name in model.params:
        return model
    raise missing(name, self.models[0].folder, audio)

  def config(self, name: str, audio: str = "16k") -> dict[str, Any]:
    """Returns a network's sizes, with the dtypes that it computes in if it has some."""
    model = self.model(name, audio)
    if not isinstance(model.config.get(name), dict):
      raise UserError(f"{model.folder}/config.json describes no model of this version: no {name}")
    config = dict(model.config[name])
    if name not in EXACT:
      config["dtype"] = self.dtype or config.get("dtype", "float32")
      if config["dtype"] == "float32" and "activations" in config:
        config["activations"] = "float32"
    return config

  def sizes(self, name: str, kind: Callable[..., Sizes]) -> Sizes:
    """Returns a network's sizes as its own Config; UserError if they are of another version."""
    try:
      return kind(**self.config(name))
    except (TypeError, ValueError) as error:
      where = f"{self.model(name).folder}/config.json"
      raise UserError(f"{where} describes no {name} of this version: {error}") from None

  def licence(self, name: str) -> str | None:
    """Returns the licence of a network's weights, if the folder that gives it says one."""
    return self.model(name).config.get(f"{name}_source", {}).get("licence")

  def sha256(self, name: str) -> str:
    """Returns the digest of a network's file."""
    return self.model(name).sha256[name]

  def check(self, name: str, init: Callable[[jax.Array], Any], stats: Any = None) -> None:
    """UserError if a network's arrays are not those that its `init` makes."""
    model = self.model(name)
    params = sharding.unboxed(jax.eval_shape(init, jax.random.key(0)))
    found = model.params[name], model.stats[name]
    if _shapes((params, stats or {})) != _shapes(found):
      raise UserError(f"{model.folder}/{name}.safetensors has other shapes than config.json says")

  def stats(self, name: str) -> Any:
    """Returns a network's running statistics, which are small."""
    return self.model(name).stats[name]

  def take(self, name: str, part: str = "", placement: Any = None) -> Any:
    """Returns the parameters of a network, or of one part of it, on the device.

    Args:
      name: of the network.
      part: the key of a part of its parameters, such as one of two towers.
      placement: device or sharding; the default device if None.

    Raises:
      DamagedAssetError: the file is not the one that was saved.
    """
    if (name, part) not in self._held:
      if self.single:
        self.drop()
      model = self.model(name)
      if name not in self._verified:
        model.verify(name)
        self._verified.add(name)
      tree = model.params[name][part] if part else model.params[name]
      shapes = placed_shapes(tree, name, self.config(name).get("dtype", "float32"))
      self._held[name, part] = jax.tree.map(
        lambda leaf, to: jax.device_put(leaf.astype(to.dtype, copy=False), placement), tree, shapes
      )
    return self._held[name, part]

  def drop(self) -> None:
    """Deletes what is on the device."""
    for tree in self._held.values():
      for leaf in jax.tree.leaves(tree):
        leaf.delete()
    self._held.clear()


def placed_shapes(params: Any, network: str, dtype: str) -> Any:
  """Returns the shapes of a network's parameters as `take` would put them on the device."""

  def placed(path, leaf):
    half = dtype == "bfloat16" and network not in EXACT and _rounded(path)
    return jax.ShapeDtypeStruct(leaf.shape, ml_dtypes.bfloat16 if half else leaf.dtype)

  return jax.tree_util.tree_map_with_path(placed, params)


def _rounded(path: tuple[Any, ...]) -> bool:
  """Whether the network itself would round a leaf before a product: no result changes then."""
  names = [getattr(key, "key", "") for key in path]
  # CLIPSeg's small decoder and the positions of BEATs' tokens stay exact.
  return names[-1] == "kernel" and names[0] not in ("decoder", "positions")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
