"""Scores of what an embedder of the user's choice made of the sound, read from a file.

No embedder is part of this project: most hear one channel, are in another framework and have a
licence of their own. One `.npz` holds what one of them says: `pred` and `ref` [n, d], features of
predictions and references (not necessarily as many), and if it classifies, `pred_logits` and
`ref_logits` [n, k], the same clips in the same order.

Axes: n clip, d feature, k class.
"""

import os
import zipfile
from typing import Any

import numpy as np

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import distribution

SPLITS = 10  # Of the inception score.


def score(path: str | os.PathLike) -> dict[str, Any]:
  """Returns Frechet distance, KL divergence and inception score by name, and what they are of.

  Numbers are None where the file has nothing to tell them by.

  Raises:
    UserError: the file cannot be read, lacks `pred` and `ref`, or its arrays do not go together.
  """
  digest = io.file_hash(path)
  try:
    with np.load(path) as arrays:
      held = {name: arrays[name] for name in arrays.files}
  except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f"{path} is no .npz of plain arrays: {error}") from None
  for name in ("pred", "ref"):
    if name not in held:
      raise UserError(f"{path} lacks the array {name!r}: features [clips, width]")
  logits = [held.get(f"{name}_logits") for name in ("pred", "ref")]
  if (logits[0] is None) != (logits[1] is None):
    raise UserError(f"{path} has pred_logits or ref_logits; give both or neither")
  divergence, inception = None, None
  try:
    distance = distribution.frechet_distance(held["pred"], held["ref"])
    if logits[0] is not None and logits[1] is not None:
      divergence = distribution.kl_divergence(logits[0], logits[1])
      if len(logits[0]) >= SPLITS:
        inception = distribution.inception_score(logits[0], SPLITS)
  except (ValueError, TypeError) as error:
    raise UserError(f"{path}: {error}") from None
  return {
    "frechet_distance": distance,
    "kl_divergence": divergence,
    "inception_score": None if inception is None else inception[0],
    "inception_score_std": None if inception is None else inception[1],
    "clips": {"pred": len(held["pred"]), "ref": len(held["ref"])},
    "sha256": digest,
  }


def line(name: str, found: dict[str, Any]) -> str:
  """Returns one line about the scores of one embedder."""
  numbers = ("frechet_distance", "kl_divergence", "inception_score")
  told = " ".join(f"{key} {found[key]:.4g}" for key in numbers if found[key] is not None)
  return f"embedding {name}: {told} ({found['clips']['pred']}, {found['clips']['ref']} clips)"
