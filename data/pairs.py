"""Binaural pairs mixed on the fly out of mono clips, as PseudoBinaural does (CVPR 2021).

One to three clips are put at drawn places: their sound is rendered there and added, their pictures
are joined. The publication pastes cut-out objects on a canvas; here a whole picture is
shifted round until its source is at the drawn column, and several share the canvas in upright
strips with a soft seam, so that objects keep their surroundings and need not be cut out.

A pair is a function of (seed, epoch, clip id): neither the number of hosts nor of workers nor the
step at which a run resumes changes it.

Axes: b pair, e ear (0 left, 1 right), p audio sample, n picture, y row, x column, c colour,
i source of a pair.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data import pipeline, rows, sources, tfrecord
from spatialv2a_jax import schema
from spatialv2a_jax.spatial import hrtf
from spatialv2a_jax.spatial import spatializer as ways

COUNTS, SHARES = (1, 2, 3), (0.4, 0.5, 0.1)  # Sources of a pair.
EDGE, APART = 0.03, 0.15  # Of columns: from the sides of the picture, and from each other.
SPREAD_DB = 6.0  # Levels of sources differ by up to twice as much.
CONTEXT = 512  # Samples before and after a window, so that filters ring in it from its beginning.
SEAM = 0.04  # Width of a seam, of columns.
THREADS = 4  # Decoding and filtering, most of the work, leave the interpreter to others.
LIGHT = 0.3  # Brightness and saturation vary by up to this share.

_Place = Callable[[np.ndarray, float], np.ndarray]


class Source(NamedTuple):
  """One clip at one moment."""

  mono_p: np.ndarray  # The window, with CONTEXT on both sides.
  image_yxc: np.ndarray
  column: float


def draw_columns(rng: np.random.Generator, count: int) -> np.ndarray:
  """Returns rising columns of the picture, 0 left to 1 right, apart from each other."""
  free = 1 - 2 * EDGE - (count - 1) * APART
  return EDGE + np.sort(rng.uniform(0, free, count)) + APART * np.arange(count)


def canvas(found: Sequence[Source], column_i: np.ndarray) -> np.ndarray:
  """Joins pictures so that the sources are at rising columns, float32 [y, x, 3] in 0..255."""
  width = found[0].image_yxc.shape[1]
  place_x = (np.arange(width) + 0.5) / width
  out_yxc = np.zeros(found[0].image_yxc.shape, np.float32)
  for i, (source, column) in enumerate(zip(found, column_i, strict=True)):
    shift = round((column - source.column) * width)
    moved_yxc = np.roll(source.image_yxc, shift, axis=1).astype(np.float32)
    weight_x = np.ones(width)
    if i:
      seam = (column_i[i - 1] + column) / 2
      weight_x = np.clip((place_x - seam) / SEAM + 0.5, 0, 1)
    weight_1x1 = weight_x[None, :, None].astype(np.float32)
    out_yxc = out_yxc * (1 - weight_1x1) + moved_yxc * weight_1x1
  return out_yxc


def relit(rng: np.random.Generator, image_yxc: np.ndarray) -> np.ndarray:
  """Varies brightness and saturation of a picture, uint8."""
  light, colour = rng.uniform(1 - LIGHT, 1 + LIGHT, 2)
  grey_yx1 = image_yxc.mean(2, keepdims=True)
  changed_yxc = light * (grey_yx1 + colour * (image_yxc - grey_yx1))
  return np.clip(np.rint(changed_yxc), 0, 255).astype(np.uint8)


def mix(
  rng: np.random.Generator, found: Sequence[Source], column_i: np.ndarray, place: _Place
) -> np.ndarray:
  """Renders sources at the columns of a picture of the default field of view.

  Returns:
    float32 [2, 10080] whose sum left + right has an RMS of `schema.PAIR_LEVEL`.
  """
  total_ep = np.zeros((2, schema.PAIR_SAMPLES + 2 * CONTEXT), np.float32)
  azimuth_i = hrtf.pixel_to_azimuth(column_i, schema.HFOV_DEG)
  for source, azimuth in zip(found, azimuth_i, strict=True):
    gain = 10 ** (rng.uniform(-SPREAD_DB, SPREAD_DB) / 20)
    total_ep += place(_normal(source.mono_p) * np.float32(gain), float(azimuth))
  window_ep = total_ep[:, CONTEXT:-CONTEXT]
  return window_ep * np.float32(schema.PAIR_LEVEL / _level(window_ep.sum(0)))


def _level(x_p: np.ndarray) -> float:
  return max(schema.PAIR_FAINTEST, float(np.sqrt(np.square(x_p, dtype=np.float64).mean())))


def _normal(mono_p: np.ndarray) -> np.ndarray:
  return mono_p * np.float32(schema.PAIR_LEVEL / _level(mono_p))


def cut(rng: np.random.Generator, fields: dict[str, np.ndarray]) -> Source:
  """Takes a drawn moment of a clip, mirrored or not."""
  column_n = fields["column"]
  n = int(rng.choice(np.flatnonzero(column_n >= 0)))
  size = schema.PAIR_SAMPLES + 2 * CONTEXT
  start = round((n + 0.5) / sources.FPS * schema.PAIR_RATE) - size // 2
  mono_p = fields["mono"]
  # Near its ends the window moves inwards; the picture stays that of the sound's place, nearly.
  start = min(max(start, -CONTEXT), max(len(mono_p) - size + CONTEXT, -CONTEXT))
  padded_p = np.pad(mono_p, (size, size))[start + size : start + 2 * size]
  image_yxc = sources.unpack(fields["jpeg"], fields["ends"], n)
  column = float(column_n[n])
  if rng.random() < 0.5:
    image_yxc, column = image_yxc[:, ::-1], 1 - column
  return Source(schema.as_float32(padded_p), image_yxc, column)


@dataclasses.dataclass(frozen=True)
class Rows(rows.Rows):
  """Reads records of `sources` and mixes a pair for each row.

  Attributes:
    spatializer: as for `spatializer.load`.
  """

  spatializer: str = "sphere"

  def parse(
    self,
    place: tfrecord.Place,
    clip: str,
    raw: Mapping[str, memoryview],
    epoch: int,
    fields: Mapping[str, str],
  ) -> dict[str, Any]:
    """Returns `id_b`, `audio_bep` [2, 10080] and `image_byxc` of one pair."""
    del fields  # A pair takes all.
    rng = np.random.default_rng([self.seed, epoch, schema.clip_id(clip)])
    found = [cut(rng, self._fields(place, raw))]
    others = rng.integers(len(self.source), size=rng.choice(COUNTS, p=SHARES) - 1)
    for other in self.source.find(others.tolist()):
      try:
        payload = self.source[other.index]
      except tfrecord.CorruptRecordError:  # Reported when its own turn comes.
        continue
      found.append(cut(rng, self._fields(other, self.decode(other, payload))))
    found = [found[i] for i in rng.permutation(len(found))]
    column_i = draw_columns(rng, len(found))
    way = ways.load(self.spatializer, schema.PAIR_RATE)
    return {
      "id_b": np.uint32(schema.clip_id(clip)),
      "audio_bep": mix(rng, found, column_i, way),
      "image_byxc": relit(rng, canvas(found, column_i)),
    }

  def _fields(self, place: tfrecord.Place, raw: Mapping[str, memoryview]) -> dict[str, Any]:
    layout = self.layouts[self.folder(place)]
    return {name: self.value(place, raw, layout, name) for name in self.fields}


def loader(
  paths: Sequence[str | pathlib.Path], spatializer: str, **options: Any
) -> pipeline.Loader:
  """Returns an iterator over batches of pairs; `options` as of `pipeline.loader`.

  Args:
    paths: shards that `sources.build` made.
    spatializer: how sources are placed, as for `spatializer.load`.
    **options: `batch_size`, `seed`, `start_step` and others.

  Raises:
    UserError: as `pipeline.loader`, or a bad spatializer.
  """
  ways.load(spatializer, schema.PAIR_RATE)  # Refused before workers start.
  reader = functools.partial(Rows, spatializer=spatializer)
  return pipeline.loader(paths, kind="pairs", reader=reader, threads=THREADS, **options)
