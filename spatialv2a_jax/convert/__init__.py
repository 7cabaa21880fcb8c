"""Foreign checkpoints <-> model folders: one table for each kind, one strict engine for all.

`run` converts a downloaded file, `check` compares a converted network with upstream's numbers, and
`export` writes a network of a model folder with upstream's names and layouts.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from spatialv2a_jax import io, model_folder, tokenizer
from spatialv2a_jax.convert import (
  acl,
  beats,
  bigvgan,
  clip,
  clipseg,
  engine,
  files,
  mmaudio,
  mono2binaural,
  synchformer,
  vae,
)
from spatialv2a_jax.errors import MissingAssetError, UserError

SOURCES: dict[str, engine.Source] = {
  "mmaudio": mmaudio.SOURCE,
  "clip": clip.SOURCE,
  "synchformer": synchformer.SOURCE,
  "clipseg": clipseg.SOURCE,
  "acl": acl.SOURCE,
  "beats": beats.SOURCE,
  "bigvgan": bigvgan.V1,
  "bigvgan_v2": bigvgan.V2,
  "vae": vae.SOURCE,
  "mono2binaural": mono2binaural.SOURCE,
  "resnet18": mono2binaural.RESNET,
}
TOLERANCE = 1e-4
Path = str | pathlib.Path


def run(source: str, file: Path, out: Path, *, ears: int = 1) -> int:
  """Converts a checkpoint into (a part of) a model folder, which may hold others already.

  `config.json` gets the sizes under the network's name, and under NETWORK_source where the
  weights came from: file name, SHA-256, upstream and licence.

  Args:
    source: one of SOURCES.
    file: safetensors, or PyTorch's .pth, .pt or .bin.
    out: model folder; made if missing.
    ears: 2 makes a two-ear network of a mono MMAudio checkpoint; its first output is dual mono.

  Returns:
    The exit code 0.

  Raises:
    MissingAssetError: no such file.
    UserError: the file is not what `source` says, completely; `out` is for other sound or cannot
      be written.
  """
  chosen = _source(source)
  if ears != 1 and source != "mmaudio":
    raise UserError(f"--ears is for mmaudio, {source} has none")
  state = chosen.read(file)
  io.check_writable(out)  # Before minutes of work.
  config, params = engine.convert(chosen, state, str(file))
  stats: dict[str, Any] = params.pop(engine.STATS, {})
  if ears == 2:
    config, params, stats = mmaudio.two_ears(config, params, jax.random.key(0, impl="threefry2x32"))
  name = chosen.network
  origin: dict[str, Any] = {
    "file": pathlib.Path(file).name,
    "sha256": io.file_hash(file),
    "upstream": chosen.upstream,
    "licence": chosen.licence,
  }
  if others := chosen.beside(file):
    origin["beside"] = {path.name: io.file_hash(path) for path in others}
  if source == "mmaudio":
    origin["variant"] = mmaudio.variant(config)
  try:
    more = chosen.about(config)
  except ValueError as error:
    raise UserError(f"{file}: {error}") from None
  about = {name: dataclasses.asdict(config), f"{name}_source": origin, **more}
  _check_rate(out, about, file)
  model_folder.save_model(out, {name: params}, {name: stats}, about)
  count = sum(x.size for x in jax.tree.leaves(params))
  print(f"{out}/{name}.safetensors: {count:,} parameters from {file}")
  print(f"licence of the weights: {chosen.licence}")
  if name in ("clip", "clipseg") and not tokenizer.keep(out):
    print("its texts need CLIP's merges: pip install --no-deps open_clip_torch")
  return 0


def check(
  source: str,
  golden: Path,
  tolerance: float = TOLERANCE,
  report: Callable[[str], None] = print,
) -> int:
  """Converts the weights in a golden file, runs the network and compares its outputs.

  Args:
    source: one of SOURCES.
    golden: safetensors with `param/<foreign key>`, `in/<name>` and `out/<name>`; the metadata
      `params_from` may name a file beside it that holds the parameters.
    tolerance: of the norm of the error relative to that of the output.
    report: takes one line per output.

  Returns:
    0 if every output is within the tolerance, else 1.

  Raises:
    UserError: the file is no golden file, lacks an input, or has outputs nobody computes.
  """
  chosen, golden = _source(source), pathlib.Path(golden)
  arrays, metadata = _golden(golden)
  weights = arrays
  if "params_from" in metadata:
    weights, _ = _golden(golden.parent / pathlib.PurePath(metadata["params_from"]).name)
  config, params = engine.convert(chosen, _part(weights, "param/"), str(golden))
  want = _part(arrays, "out/")
  if not want:
    raise UserError(f"{golden} holds no out/NAME, so there is nothing to compare")
  failed = False
  with jax.default_matmul_precision("highest"):
    try:
      outputs = chosen.outputs(config, params, _part(arrays, "in/"))
      if alien := sorted(set(want) - set(outputs)):
        raise UserError(f"{golden}: {source} computes no {', '.join(alien)}")
      for name, expected in want.items():
        error = relative_error(np.asarray(outputs[name]()), expected)
        good = error <= tolerance
        failed |= not good
        report(f"{name:28s} {error:.2e}  {'ok' if good else f'above {tolerance:g}'}")
    except KeyError as error:
      raise UserError(f"{golden} lacks the input in/{error.args[0]}") from None
  return int(failed)


def export(source: str, folder: Path, out: Path) -> int:
  """Writes a network of a model folder as upstream names and lays out its state dict.

  What was folded when it was converted (weight norm, EDM2's normalisation, resized positions) is
  taken apart again so that upstream computes the same; the metadata `rebuilt` lists those tensors.
  All others come back bit for bit.

  Args:
    source: one of SOURCES.
    folder: a model folder with that network.
    out: safetensors file to write.

  Returns:
    The exit code 0.

  Raises:
    MissingAssetError: no such folder.
    UserError: the folder lacks the network, or it is one that upstream does not have.
  """
  chosen = _source(source)
  model = model_folder.load_model(folder)
  name = chosen.network
  if name not in model.params:
    raise UserError(f"{folder} has no network {name!r}, only {', '.join(sorted(model.params))}")
  about = model.config.get(name, {})
  try:
    config = chosen.sizes(**{k: tuple(v) if isinstance(v, list) else v for k, v in about.items()})
  except (TypeError, ValueError) as error:
    raise UserError(f"{folder}/config.json describes no {name} of this version: {error}") from None
  params = model.params[name] | ({engine.STATS: model.stats[name]} if chosen.stats else {})
  state, rebuilt = engine.export(chosen, config, params, f"{folder}/{name}")
  origin = model.config.get(f"{name}_source", {})
  licence = origin.get("licence", "that of its training") if isinstance(origin, dict) else ""
  metadata = {
    "format": "pt",
    "upstream": chosen.upstream,
    "licence": licence,
    "rebuilt": json.dumps(rebuilt),
    "note": chosen.note,
  }
  with io.atomic_path(out) as temporary:
    save_file(state, temporary, metadata)
  print(f"{out}: {len(state)} tensors, of which {len(rebuilt)} were folded and are rebuilt")
  if chosen.note:
    print(f"to load it: {chosen.note}")
  return 0


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
  """Returns |got - want| / |want|; infinite for another shape or a value that is not finite."""
  if got.shape != want.shape or not np.isfinite(got).all():
    return float("inf")
  difference = np.linalg.norm(got.astype(np.float64) - want)
  return float(difference / max(np.linalg.norm(want.astype(np.float64)), sys.float_info.min))


def _source(name: str) -> engine.Source:
  if name not in SOURCES:
    raise UserError(f"no source {name!r}, have: {', '.join(SOURCES)}")
  return SOURCES[name]


def _check_rate(out: Path, about: dict[str, Any], file: Path) -> None:
  """UserError if a model folder has networks for sound of another rate: one would replace them."""
  if "audio" not in about or not (pathlib.Path(out) / "config.json").is_file():
    return
  have = model_folder.open_model(out).config.get("audio", about["audio"])
  if have != about["audio"]:
    raise UserError(
      f"{out} holds networks for {have} sound and {file} is one for {about['audio']} sound; "
      "give --out another folder"
    )


def _golden(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  if not path.is_file():
    raise MissingAssetError(f"no such file: {path}")
  return files.read_safetensors(path)


def _part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
