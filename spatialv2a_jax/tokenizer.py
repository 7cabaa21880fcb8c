"""CLIP's byte-pair tokenizer: text -> 77 ids, equal to open_clip's `SimpleTokenizer`.

Needs the packages of the extra `encoders` (ftfy and regex) and CLIP's list of merges, which
open_clip_torch carries; that package is looked into, not imported.

Axes: b text, w token.
"""

import functools
import gzip
import html
import importlib.metadata
import itertools
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np

from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.io import atomic_path

LENGTH = 77
_MERGES = 49_152 - 256 - 2
_START, _END = "<start_of_text>", "<end_of_text>"
FILE = "bpe_simple_vocab_16e6.txt.gz"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def find_merges() -> pathlib.Path:
  """Returns the merges file inside an installed open_clip_torch, without importing that.

  Raises:
    MissingAssetError: if it is not installed.
  """
  try:
    package = importlib.metadata.distribution("open_clip_torch")
    path = pathlib.Path(str(package.locate_file(f"open_clip/{FILE}")))
    if path.is_file():
      return path
  except importlib.metadata.PackageNotFoundError:
    pass
  raise MissingAssetError(
    f"CLIP's merges file {FILE} is missing; give its path, or install it with: "
    "pip install --no-deps open_clip_torch"
  )


def keep(folder: str | pathlib.Path) -> bool:
  """Copies the merges file, if one is found, into a model folder; returns whether it did."""
  try:
    merges = find_merges()
  except MissingAssetError:
    return False
  with atomic_path(pathlib.Path(folder) / FILE) as temporary:
    shutil.copyfile(merges, temporary)
  return True


class Tokenizer:
  """Texts -> ids. Start 49406, end 49407, padded with 0, which is also the id of "!"."""

  def __init__(self, merges: str | pathlib.Path | None = None):
    """Reads the merges.

    Args:
      merges: path of `bpe_simple_vocab_16e6.txt.gz`; None looks into open_clip_torch.

    Raises:
      MissingAssetError: no merges file, or a package is missing.
      UserError: the file is something else.
    """
    try:
      import ftfy
      import regex
    except ImportError as error:
      raise MissingAssetError(
        f"CLIP's tokenizer needs the package {error.name}; "
        'install it from a checkout with: pip install -e ".[encoders]"'
      ) from None
    path = find_merges() if merges is None else pathlib.Path(merges)
    if not path.is_file():
      raise MissingAssetError(f"no such merges file: {path}; take {FILE} from open_clip_torch")
    pairs = _read(path)
    letters = _letters()
    symbols = list(letters.values())
    names = [*symbols, *(f"{s}</w>" for s in symbols), *map("".join, pairs), _START, _END]
    self._fix = ftfy.fix_text
    self._letters = letters
    self._rank = {pair: i for i, pair in enumerate(pairs) if pair}
    self._id = {name: i for i, name in enumerate(names) if name}
    self._words = regex.compile(f"{_START}|{_END}|{_WORDS}", regex.IGNORECASE)
    self.start, self.end = self._id[_START], self._id[_END]
    self._parts = functools.lru_cache(maxsize=65_536)(self._split)

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Returns int32 [b, 77]; what does not fit is cut, and the last id is then the end."""
    ids_bw = np.zeros((len(texts), LENGTH), np.int32)
    for row, text in zip(ids_bw, texts, strict=True):
      ids = [self.start, *self.encode(text), self.end][:LENGTH]
      row[: len(ids)] = ids
      if len(ids) == LENGTH:
        row[-1] = self.end
    return ids_bw

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without start and end."""
    text = html.unescape(html.unescape(self._fix(text)))
    text = " ".join(text.split()).lower()
    ids = []
    for word in self._words.findall(text):
      letters = "".join(self._letters[byte] for byte in word.encode())
      ids += (self._id[part] for part in self._parts(letters))
    return ids

  def _split(self, word: str) -> list[str]:
    """Returns the parts of a word: the pair of lowest rank is merged until none is known."""
    if word in (_START, _END):
      return [word]
    parts = [*word[:-1], f"{word[-1]}</w>"]
    while True:
      known = [pair for pair in itertools.pairwise(parts) if pair in self._rank]
      if not known:
        return parts
      best = min(known, key=self._rank.__getitem__)
      merged, i = [], 0
      while i < len(parts):
        hit = tuple(parts[i : i + 2]) == best
        merged.append("".join(best) if hit else parts[i])
        i += 2 if hit else 1
      parts = merged


def _read(path: pathlib.Path) -> list[tuple[str, ...]]:
  """Returns the merges in the order of their ids; an empty line is an id that is never used."""
  try:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
  except (OSError, EOFError, UnicodeDecodeError) as error:
    raise UserError(f"{path} is no merges file: {error}") from None
  pairs = [tuple(line.split()) for line in text.split("\n")[1 : _MERGES + 1]]
  if len(pairs) < _MERGES or any(len(pair) not in (0, 2) for pair in pairs):
    raise UserError(f"{path} is no merges file of CLIP: it needs {_MERGES} lines of two parts")
  return pairs


@functools.cache
def _letters() -> dict[int, str]:
  """Returns a printable letter for every byte: itself where it is one, else from U+0100 on."""
  own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  rest = [byte for byte in range(256) if byte not in own]
  return {**{b: chr(b) for b in own}, **{b: chr(256 + i) for i, b in enumerate(rest)}}
