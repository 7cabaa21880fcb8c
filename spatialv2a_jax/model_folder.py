"""Model folders: `NAME.safetensors` for each network and one `config.json`.

They hold what generation needs, of a run or converted, and are read without Orbax.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from spatialv2a_jax import tensors
from spatialv2a_jax.errors import DamagedAssetError, MissingAssetError, UserError, first_line
from spatialv2a_jax.io import atomic_path, check_writable

CHECKPOINTS = "checkpoints"  # Folder inside a working directory, beside its model folder.
Path = str | pathlib.Path


@dataclasses.dataclass(frozen=True)
class Model:
  """What a model folder holds; arrays that were read are memory maps.

  Attributes:
    params: parameters of each network, by its name.
    stats: running statistics of each network, by its name.
    config: what rebuilds the networks; one object, of which each network reads its part.
    sha256: digest of each weights file, by the name of its network.
    folder: where it was read from or written to.
  """

  params: dict[str, Any]
  stats: dict[str, Any]
  config: dict[str, Any]
  sha256: dict[str, str] = dataclasses.field(default_factory=dict)
  folder: pathlib.Path = pathlib.Path()

  def verify(self, name: str) -> None:
    """Reads a network's file through; DamagedAssetError if it is not the one that was saved."""
    file = self.folder / f"{name}.safetensors"
    if tensors.digest(file) != self.sha256[name]:
      raise DamagedAssetError(
        f"{file} is damaged: its SHA-256 is not that in config.json; copy or write it again"
      )


def save_model(
  folder: Path, params: Mapping[str, Any], stats: Mapping[str, Any], config: Mapping[str, Any]
) -> Model:
  """Writes a model folder; networks already there and not named stay, with all said of them.

  Args:
    folder: made if missing.
    params: parameters of each network, by its name ("flow", "vae").
    stats: running statistics of each network; may lack some.
    config: JSON-able entries; those that begin with NAME_ are of the network NAME.

  Returns:
    The weights as written and their digests.

  Raises:
    UserError: the folder cannot be written, or is that of a run.
  """
  folder = pathlib.Path(folder)
  check_writable(folder)
  if (folder / CHECKPOINTS).is_dir():
    raise UserError(f"{folder} is the working directory of a run; choose another output")
  digests, old = {}, tuple(f"{name}_" for name in params)
  # All files take their names at the end, one right after the other, config.json last.
  with contextlib.ExitStack() as whole:
    described = whole.enter_context(atomic_path(folder / "config.json"))
    for name, tree in params.items():
      flat = traverse_util.flatten_dict({"params": tree, "stats": stats.get(name, {})}, sep="/")
      temporary = whole.enter_context(atomic_path(folder / f"{name}.safetensors"))
      digests[name] = tensors.write(temporary, flat)
    # Only now: meanwhile another process may have added a network.
    about = _read_config(folder) if (folder / "config.json").exists() else {}
    digests = {**about.pop("sha256", {}), **digests}
    # What was said of networks that are replaced goes.
    about = {name: x for name, x in about.items() if not name.startswith(old)} | dict(config)
    text = json.dumps({**about, "sha256": digests}, indent=2, sort_keys=True)
    described.write_text(text + "\n")
  return Model(dict(params), dict(stats), dict(about), digests, folder)


def load_model(folder: Path) -> Model:
  """Reads a model folder, or that of a finished run (WORKDIR/model), and verifies every file.

  Raises:
    MissingAssetError: if there is no such folder, or a file of it is missing.
    UserError: if a file is damaged.
  """
  model = open_model(folder)
  for name in model.params:
    model.verify(name)
  return model


def open_model(folder: Path) -> Model:
  """Maps the files of a model folder without reading their arrays; see `Model.verify`.

  Raises:
    MissingAssetError: if there is no such folder, or a file of it is missing.
    UserError: if a file is no safetensors file.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise MissingAssetError(f"no model folder {folder}")
  if not (folder / "config.json").is_file() or (folder / CHECKPOINTS).is_dir():
    if not (folder / "model" / "config.json").is_file():
      run = f"; {folder} is a run that has not finished" if (folder / CHECKPOINTS).is_dir() else ""
      raise MissingAssetError(f"{folder} is no model folder: it has no config.json{run}")
    folder = folder / "model"
  about = _read_config(folder)
  digests = dict(about.pop("sha256", {}))
  params, stats = {}, {}
  for name in digests:
    file = folder / f"{name}.safetensors"
    if not file.is_file():
      raise MissingAssetError(f"model folder {folder} lacks {file.name}")
    try:
      arrays, _ = tensors.read(file)
    except (ValueError, OSError) as error:
      raise UserError(f"{file} is damaged: {first_line(error)}; copy it again") from error
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    params[name], stats[name] = tree.get("params", {}), tree.get("stats", {})
  return Model(params, stats, about, digests, folder)


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
  try:
    return dict(json.loads((folder / "config.json").read_text()))
  except (ValueError, TypeError) as error:
    raise UserError(f"{folder}/config.json is no JSON object: {first_line(error)}") from error
