"""PseudoBinaural's three networks -> `models.mono2binaural`, running statistics included.

Upstream saves each network by itself: `visual_SUFFIX.pth`, `audio_SUFFIX.pth` and, with APNet or
AssoConv, `fusion_SUFFIX.pth`. Together their keys begin with `visual.`, `audio.`, `apnet.` and
`assoconv.`. Where their training begins, torchvision's ResNet-18 with ImageNet weights, is a source
of its own.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatialv2a_jax.convert import files
from spatialv2a_jax.convert.engine import (
  STATS,
  Leaf,
  Outputs,
  Source,
  State,
  Table,
  arranged,
  copy,
  count,
  linear,
  norm,
  under,
)
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import mono2binaural, resnet

_COMPANIONS = ("visual", "fusion")
_VISUAL, _AUDIO = "visual.feature_extraction", "audio.audionet"
_NORMED = "audio.audionet_convlayer1.1.weight"  # There with batch norm only.


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads one file of all networks, or `audio_SUFFIX.pth` and its companions beside it.

  Raises:
    MissingAssetError: no such file, or no visual network beside it.
    UserError: not an audio network, or a fusion network of neither kind.
  """
  path = pathlib.Path(path)
  state = files.read(path)
  if any(key.startswith("visual.") for key in state):
    return state
  if not path.name.startswith("audio"):
    raise UserError(f"{path}: give audio_SUFFIX.pth; visual_ and fusion_SUFFIX.pth lie beside it")
  joined = {f"audio.{key}": value for key, value in state.items()}
  visual, *fusion = _companions(path)
  joined |= {f"visual.{key}": value for key, value in files.read(visual).items()}
  for file in fusion:
    state = files.read(file)
    head = "apnet" if any(key.startswith("fusion1.") for key in state) else "assoconv"
    joined |= {f"{head}.{key}": value for key, value in state.items()}
  return joined


def beside(path: str | pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that `read` joins to one; none to one of all networks."""
  whole = any(key.startswith("visual.") for key in files.read(path))
  return [] if whole else _companions(pathlib.Path(path))


def _companions(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the visual network's file and, if it is there, the fusion network's."""
  visual, fusion = (path.with_name(x + path.name.removeprefix("audio")) for x in _COMPANIONS)
  return [visual, *([fusion] if fusion.is_file() else [])]


def configure(state: State) -> mono2binaural.Config:
  """Returns the sizes; the picture's are those that fit the U-Net, twice as wide as high."""
  width = state[f"{_AUDIO}_convlayer1.0.weight"].shape[0]
  seen = state[f"{_AUDIO}_upconvlayer1.0.weight"].shape[0] - 8 * width
  rows = round((seen / mono2binaural.SQUEEZED / 2) ** 0.5)
  return mono2binaural.Config(
    width=width,
    planes=state[f"{_VISUAL}.0.weight"].shape[0],
    rows=resnet.STRIDE * rows,
    columns=resnet.STRIDE * 2 * rows,
    norm="batch" if _NORMED in state else "instance",
    **{head: count(state, rf"({head})\.") > 0 for head in mono2binaural.HEADS},
  )


def table(state: State, config: mono2binaural.Config) -> Table:
  """Returns the recipes."""
  del state
  visual = _resnet(f"{_VISUAL}.0", f"{_VISUAL}.1", lambda stage: f"{_VISUAL}.{4 + stage}")
  recipes = under("visual", visual) | under("audio", _unet(config.norm))
  if config.apnet:
    recipes |= under("apnet", _head("apnet", 4, config.norm))
  if config.assoconv:
    recipes |= under("assoconv", _head("assoconv", 1, config.norm))
  return _apart(recipes)


def _apart(recipes: Table) -> Table:
  """Returns the recipes with those of running statistics below STATS."""
  stats = {path: leaf for path, leaf in recipes.items() if path.endswith(("/mean", "/var"))}
  plain = {path: leaf for path, leaf in recipes.items() if path not in stats}
  return plain | under(STATS, stats)


def _batch_norm(key: str) -> Table:
  moving = {"mean": copy(f"{key}.running_mean"), "var": copy(f"{key}.running_var")}
  return norm(key) | moving


def _resnet(stem: str, stem_norm: str, name: Callable[[int], str]) -> Table:
  recipes = under("stem", linear(stem, bias=False))
  recipes |= under("stem_norm", _batch_norm(stem_norm))
  for stage in range(resnet.STAGES):
    for i in range(resnet.BLOCKS):
      key, block = f"{name(stage)}.{i}", {}
      for part in ("1", "2"):
        block |= under(f"conv{part}", linear(f"{key}.conv{part}", bias=False))
        block |= under(f"norm{part}", _batch_norm(f"{key}.bn{part}"))
      if stage and not i:
        block |= under("skip", linear(f"{key}.downsample.0", bias=False))
        block |= under("skip_norm", _batch_norm(f"{key}.downsample.1"))
      recipes |= under(f"stage{stage}_block{i}", block)
  return recipes


def _unet(kind: str) -> Table:
  recipes = under("squeeze", linear("audio.conv1x1.0"))
  recipes |= under("squeeze_norm", _batch_norm("audio.conv1x1.1"))
  for level in range(len(mono2binaural.ENCODER)):
    key = f"{_AUDIO}_convlayer{level + 1}"
    recipes |= under(f"down{level}", linear(f"{key}.0")) | _norm(f"down{level}", f"{key}.1", kind)
  for level in range(len(mono2binaural.DECODER)):
    key = f"{_AUDIO}_upconvlayer{level + 1}"
    recipes |= under(f"up{level}", _up(f"{key}.0")) | _norm(f"up{level}", f"{key}.1", kind)
  return recipes | under("out", _up(f"{_AUDIO}_upconvlayer5.0"))


def _head(name: str, levels: int, kind: str) -> Table:
  recipes = under("left", _up(f"{name}.lastconv_left.0"))
  recipes |= under("right", _up(f"{name}.lastconv_right.0"))
  for level in range(levels):
    key = f"{name}.fusion{level + 1 if levels > 1 else ''}.channel_mapping_conv_w"
    kernel = arranged(f"{key}.weight", "d i 1 -> i d")
    recipes |= under(f"fuse{level}", {"kernel": kernel, "bias": copy(f"{key}.bias")})
  for level in range(levels - 1):
    key = f"{name}.fusion_upconv{level + 1}"
    recipes |= under(f"up{level}", _up(f"{key}.0")) | _norm(f"up{level}", f"{key}.1", kind)
  return recipes


def _norm(name: str, key: str, kind: str) -> Table:
  return under(f"{name}_norm/batch", _batch_norm(key)) if kind == "batch" else {}


def _up(key: str) -> Table:
  """Returns the recipes of a transposed convolution, which `mono2binaural.Up` turns round."""

  def turn(weight_iokk: np.ndarray) -> np.ndarray:
    return weight_iokk.transpose(2, 3, 0, 1)[::-1, ::-1]

  def back(kernel_kkio: np.ndarray) -> tuple[np.ndarray]:
    return (kernel_kkio[::-1, ::-1].transpose(2, 3, 0, 1),)

  return {"kernel": Leaf((f"{key}.weight",), turn, back), "bias": copy(f"{key}.bias")}


def outputs(config: mono2binaural.Config, params: Any, inputs: State) -> Outputs:
  """Returns the predictions by upstream's names, channels before bins and rows."""
  net = mono2binaural.build(config)
  done: dict[str, Any] = {}

  def prediction(name: str) -> Any:
    if not done:
      weights = {key: part for key, part in params.items() if key != STATS}
      mix, image = (jnp.asarray(np.moveaxis(inputs[n], 1, -1)) for n in ("audio_mix", "image"))
      done.update(jax.jit(net.apply)(weights, params[STATS], mix, image)[0])
    return jnp.moveaxis(done[name], -1, 1)

  names = {
    "visual_features": "features",
    "mask_prediction": "mask",
    "binaural_spectrogram": "difference",
    **{f"{h}_{side}": f"{h}_{side}" for h in config.heads for side in ("left", "right")},
  }
  known: Outputs = {ours: (lambda name=name: prediction(name)) for ours, name in names.items()}
  return known | {"audio_gt": lambda: inputs["audio_diff"][:, :, : mono2binaural.BINS - 1]}


SOURCE = Source(
  network="mono2binaural",
  upstream="PseudoBinaural (github.com/SheldonTsui/PseudoBinaural_CVPR2021)",
  licence="none stated upstream: ask its authors; ResNet-18 began with ImageNet weights",
  sizes=mono2binaural.Config,
  configure=configure,
  table=table,
  build=mono2binaural.build,
  outputs=outputs,
  ignore=(r".*\.num_batches_tracked", r".*\.channel_mapping_conv_b\.(weight|bias)"),
  note="the content of visual_, audio_ and fusion_SUFFIX.pth, whose keys lack the first word here; "
  "without the layers that upstream never uses (channel_mapping_conv_b): load with strict=False",
  stats=True,
  read=read,
  beside=beside,
)


def _resnet_outputs(config: resnet.Config, params: Any, inputs: State) -> Outputs:
  """Returns the features [b, d, y, x] of `image`."""
  net = resnet.build(config)
  weights = {key: part for key, part in params.items() if key != STATS}

  def features() -> Any:
    image = jnp.asarray(np.moveaxis(inputs["image"], 1, -1))
    return jnp.moveaxis(jax.jit(net.apply)(weights, params[STATS], image), -1, 1)

  return {"features": features}


RESNET = Source(
  network="resnet18",
  upstream="torchvision's ResNet-18 (github.com/pytorch/vision)",
  licence="BSD-3-Clause; trained on ImageNet, whose terms are for research",
  sizes=resnet.Config,
  configure=lambda state: resnet.Config(state["conv1.weight"].shape[0]),
  table=lambda state, config: _apart(_resnet("conv1", "bn1", lambda stage: f"layer{stage + 1}")),
  build=resnet.build,
  outputs=_resnet_outputs,
  ignore=(r".*\.num_batches_tracked", r"fc\.(weight|bias)"),
  note="without the last layer, fc: load with strict=False",
  stats=True,
)
