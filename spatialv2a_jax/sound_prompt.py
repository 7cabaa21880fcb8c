"""The sound of a file as what `acl` looks for: BEATs hears it, ACL's projector makes a word of it.

Axes: b sound, p sample, i token, d width of a word, f feature.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import acl, beats, localizer
from spatialv2a_jax.weights import Weights

NETWORKS = ("acl", "beats")


class SoundPrompt:
  """A file's first 10 s, in the place of a word in the prompt.

  Attributes:
    path: of the file.
  """

  def __init__(self, path: str, weights: Weights, clipseg: localizer.Config):
    """Checks what it needs; the file is read and the networks run when asked for the word.

    Raises:
      MissingAssetError: a network is nowhere.
      UserError: no such file, or networks that do not fit together.
    """
    self.path, self._weights, self._word = path, weights, None
    if not pathlib.Path(path).is_file():
      raise UserError(f"{path}: no such file; --localizer acl:FILE is prompted by its sound")
    self._hears = weights.sizes("beats", beats.Config)
    self._speaks = weights.sizes("acl", acl.Config)
    weights.check("beats", beats.build(self._hears).init)
    weights.check("acl", acl.build(self._speaks).init)
    have, want = (self._hears.dim, clipseg.text_width), (self._speaks.inputs, self._speaks.width)
    if have != want:
      raise UserError(
        f"ACL's projector of {weights.model('acl').folder} takes {want[0]} features and gives "
        f"{want[1]}, BEATs and CLIPSeg have {have[0]} and {have[1]}"
      )

  def identity(self) -> list[str]:
    """Returns what determines the word."""
    return [io.file_hash(self.path), *(self._weights.sha256(name) for name in NETWORKS)]

  def word(self, placement: Any) -> np.ndarray:
    """Returns the word [1, d]; the networks are put at `placement` the first time.

    Raises:
      UserError: the file has no sound that can be read.
    """
    if self._word is None:
      count = round(acl.SECONDS * beats.SAMPLE_RATE)
      heard = {"mono": True, "duration": acl.SECONDS}
      audio_p = io.read_audio(self.path, beats.SAMPLE_RATE, **heard)[0, :count]
      audio_1p = np.pad(audio_p, (0, count - len(audio_p)))[None]
      hear, speak = _programs(self._hears, self._speaks)
      features_1if = np.asarray(hear(self._weights.take("beats", placement=placement), audio_1p))
      word_1d = speak(self._weights.take("acl", placement=placement), features_1if)
      self._word = np.asarray(word_1d)
    return self._word


@functools.cache
def _programs(
  hears: beats.Config, speaks: acl.Config
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
  """Returns (BEATs' parameters, audio_bp) -> features, (ACL's parameters, features) -> word_bd."""
  return jax.jit(beats.build(hears).encode), jax.jit(acl.build(speaks).word)
