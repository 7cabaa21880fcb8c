"""Text features, stored once per distinct caption: a data set `text/` beside the shards of clips.

A record's `id` is the caption. Readers join it to the `caption` of a clip. What `data.encode` makes
holds no text at all as well, as the caption NONE: training puts its features where it drops a text.

Axes: w text token, f feature.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from data import layout, shards, tf_example, tfrecord
from spatialv2a_jax import io, schema
from spatialv2a_jax.errors import UserError

FOLDER, FIELD = "text", "text"
NONE = ""
PER_SHARD = 4096  # Captions; about 650 MB in 16 bits, with the text encoder of CLIP ViT-H.
KEPT = 512  # Captions in the memory of a process, 80 MB of such; VGGSound has 309.


def build(
  captions: Iterable[str],
  encode: Callable[[str], np.ndarray],
  clips: str | pathlib.Path,
  *,
  config: Mapping[str, Any],
  storage: str,
  name: str = shards.NAME,
  part: tuple[int, int] = (0, 1),
) -> None:
  """Encodes each distinct caption once.

  Args:
    captions: of all clips, repeated as they come.
    encode: caption -> `text_wf`.
    clips: folder of the clips' shards.
    config: what `encode` depends on.
    storage: of the features, one of `schema.STORAGES`.
    name: of the data set.
    part: (i, n): this one of n calls that share the work.

  Raises:
    UserError: a caption that cannot be encoded, and as `shards.build`.
  """
  distinct = sorted(set(captions))
  stats = shards.build(
    [shards.Item(caption, caption) for caption in distinct],
    _Text(encode, storage),
    pathlib.Path(clips) / FOLDER,
    shards=-(-len(distinct) // PER_SHARD),
    config={**config, "stage": "text", "storage": storage},
    name=f"{name}_{FOLDER}",
    description="Text features of the captions of the data set in the folder above.",
    part=part,
  )
  for caption, why in stats["bad"].items():  # No clip of it could be read.
    raise UserError(f"caption {caption!r} cannot be encoded: {why}")


def copy(clips: str | pathlib.Path, out: str | pathlib.Path) -> None:
  """Copies the table of one folder of clips to another of the same clips.

  File by file and each in one go: other parts of the work may be at it, too.
  """
  source, target = (pathlib.Path(folder) / FOLDER for folder in (clips, out))
  target.mkdir(parents=True, exist_ok=True)
  names = {path.name for path in source.iterdir() if not path.name.startswith(".")}
  for name in sorted(names):
    with io.atomic_path(target / name) as temporary:
      shutil.copyfile(source / name, temporary)
  for path in target.iterdir():
    if path.name not in names and not path.name.startswith("."):
      path.unlink(missing_ok=True)  # Of an earlier cut.


class Table:
  """Random access to the text features of captions, of which the last ones stay in memory.

  Picklable; threads may share it.
  """

  def __init__(self, clips: str | pathlib.Path):
    """Reads which captions there are.

    Raises:
      UserError: the folder of clips has no finished table, or it is damaged.
    """
    self.folder = pathlib.Path(clips) / FOLDER
    paths = shards.paths(self.folder)
    self.tensor = layout.read_features(self.folder)[FIELD]
    self._source = tfrecord.TFRecordSource(paths)
    self._place: dict[str, int] = {}
    for path in map(shards.sidecar, paths):
      try:
        ids = json.loads(path.read_text())["ids"]
      except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot read it ({error}); encode the clips again") from error
      self._place |= {caption: len(self._place) + i for i, caption in enumerate(ids)}
    if len(self._place) != len(self._source):
      raise UserError(f"{self.folder}: its captions are not those of its records; encode again")

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name != "_kept"}

  def __getitem__(self, caption: str) -> np.ndarray:
    """Returns `text_wf` as stored, read-only; UserError if it is not there or damaged."""
    return self._kept(caption)

  @functools.cached_property
  def _kept(self):
    # Not of a method: a cycle would keep features and files of each evaluation for long.
    parts = self.folder, self._place, self._source, self.tensor
    return functools.lru_cache(KEPT)(functools.partial(_read, *parts))


def _read(
  folder: pathlib.Path,
  places: Mapping[str, int],
  source: tfrecord.TFRecordSource,
  tensor: tf_example.Tensor,
  caption: str,
) -> np.ndarray:
  """Returns the features of a caption of a table."""
  if caption not in places:
    raise UserError(f"{folder}: it has no caption {caption!r}; encode the clips again")
  try:
    raw = tf_example.decode(source[places[caption]])
  except tfrecord.CorruptRecordError as error:
    raise UserError(str(error)) from error  # No neighbour can stand in for it.
  return np.asarray(tf_example.value_of(raw[FIELD], tensor))


@dataclasses.dataclass(frozen=True)
class _Text:
  encode: Callable[[str], np.ndarray]
  storage: str

  def __call__(self, item: shards.Item) -> shards.Record:
    return {FIELD: schema.stored(self.encode(item.payload), self.storage)}
