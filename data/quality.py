"""Audiobox Aesthetics: scores of sound without a reference, by Meta's package and local weights.

The package (`pip install audiobox_aesthetics requests`) brings PyTorch; without it, or without
weights, clips have no scores and the quality filter is off.
"""

import pathlib
from typing import Any

import numpy as np

from data import filters
from spatialv2a_jax import io
from spatialv2a_jax.errors import MissingAssetError


class Aesthetics:
  """Scores the sound of clips; the network is loaded in each process when it is first needed."""

  def __init__(self, checkpoint: str | pathlib.Path):
    """Checks that package and weights are there.

    Args:
      checkpoint: the `checkpoint.pt` that Meta publishes.

    Raises:
      MissingAssetError: no such file (the package would fetch one from the network), or no package.
    """
    self.checkpoint = str(checkpoint)
    if not pathlib.Path(checkpoint).is_file():
      raise MissingAssetError(f"--quality-weights {checkpoint}: no such file")
    _package()
    self.identity = io.file_hash(checkpoint)
    self._predictor: Any = None

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_predictor": None}

  def load(self) -> None:
    """Loads the network, unless it is."""
    if self._predictor is None:
      import torch  # pyright: ignore[reportMissingImports]

      torch.set_num_threads(1)  # The processes of a build share the cores, and sums keep order.
      self._predictor = _package().initialize_predictor(ckpt=self.checkpoint)

  def __call__(self, mono_p: np.ndarray, sample_rate: int) -> dict[str, float]:
    """Returns the score of each axis (CE, CU, PC, PQ) of one channel of sound."""
    import torch  # pyright: ignore[reportMissingImports]

    self.load()
    sound = torch.from_numpy(np.ascontiguousarray(mono_p, np.float32))[None]
    (scores,) = self._predictor.forward([{"path": sound, "sample_rate": sample_rate}])
    return {axis: float(scores[axis]) for axis in filters.AXES}


def _package() -> Any:
  try:
    from audiobox_aesthetics import infer  # pyright: ignore[reportMissingImports]
  except (ImportError, OSError) as error:  # The latter from libraries that do not match.
    raise MissingAssetError(
      f"--quality-weights needs the package audiobox_aesthetics ({error}); install"
      " spatialv2a_jax[aesthetics], or give --quality-scores"
    ) from None
  return infer
