"""Builder of tensorflow-datasets: copies finished shards to its own folders and file formats.

A folder of shards can be read as it is, with `tfds.builder_from_directory`. `tfds build` is for who
wants them in tensorflow-datasets' catalogue (`tfds.load("binaural_vggsound/raw")`), or as
`--file_format=array_record` or `parquet`. It needs TensorFlow only to read TFRecord back.

Axes: e ear (0 left, 1 right), p audio sample, v 8 fps frame, s sync token, w text token, f feature,
k descriptor, t latent frame, c latent channel.
"""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters, writer

_ROOT = str(pathlib.Path(__file__).resolve().parents[2])
if _ROOT not in sys.path:  # `tfds build` imports this file by its path.
  sys.path.insert(0, _ROOT)

from data import layout, shards, tf_example, tfrecord  # noqa: E402
from spatialv2a_jax import schema  # noqa: E402

FOLDERS = {"raw": "raw", "features_16k": "latents", "text": "latents/text"}


def _tensor(dtype: Any, *shape: int | None) -> tfds.features.Tensor:
  return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")


def _fields(config: str) -> dict[str, Any]:
  """Returns the fields of a record; only the length of a clip is free."""
  wide = ml_dtypes.bfloat16
  if config == "text":
    return {"id": tfds.features.Text(), "text": _tensor(wide, 77, 1024)}
  texts = ("id", "caption", "label", "video", "layout", "spatializer", "hrtf")
  numbers = ("correlation", "agreement", "silence", "gain_db")
  fields: dict[str, Any] = {
    **{name: tfds.features.Text() for name in texts},
    **{name: _tensor(np.float32) for name in numbers},
    "aes": _tensor(np.float32, 4),
    "cues": _tensor(np.float32, 10),
    "source_channels": _tensor(np.int32),
    "schema_version": _tensor(np.int32),
  }
  if config == "raw":
    return fields | {
      "audio": _tensor(np.int16, 2, None),
      "azimuth": _tensor(np.float32, None),
      "located": _tensor(np.uint8, None),
    }
  return fields | {
    "clip": _tensor(wide, None, 1024),
    "sync": _tensor(wide, None, 768),
    "spatial": _tensor(np.float32, None, 5),
    "mean": _tensor(np.float32, 2, None, 20),
    "std": _tensor(wide, 2, None, 20),
  }


class Builder(tfds.core.GeneratorBasedBuilder):
  """BinauralVGGSound: the records of a finished build."""

  VERSION = tfds.core.Version(layout.VERSION)
  MANUAL_DOWNLOAD_INSTRUCTIONS = """
  BUILD is the folder that `python -m launch.data vggsound --out BUILD` has written (config "raw"),
  and to which `python -m launch.data encode --raw BUILD/raw --out BUILD` has added the features of
  the 16 kHz models (configs "features_16k" and "text").
  """
  BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
    tfds.core.BuilderConfig(name="raw", description="Sound at two ears, int16, left first."),
    tfds.core.BuilderConfig(
      name="features_16k",
      description="CLIP, Synchformer and spatial features, VAE posterior of both ears.",
    ),
    tfds.core.BuilderConfig(name="text", description="CLIP text features by caption, the id."),
  ]

  @property
  def _config(self) -> str:
    return str(getattr(self.builder_config, "name", ""))

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description="VGGSound's videos with binaural sound (SpatialV2A, arXiv 2601.15017).",
      features=tfds.features.FeaturesDict(_fields(self._config)),
      disable_shuffling=False,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    folder = pathlib.Path(dl_manager.manual_dir) / FOLDERS[self._config]
    return {split: self._generate_examples(folder, split) for split in shards.splits(folder)}

  def _generate_examples(
    self, folder: pathlib.Path, split: str
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    stored, fields = layout.read_features(folder), _fields(self._config)
    source = tfrecord.TFRecordSource(shards.paths(folder, split))
    for place in range(len(source)):
      raw = tf_example.decode(source[place])
      values = {name: tf_example.value_of(raw[name], stored[name]) for name in fields}
      arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
      for name, value in arrays.items():
        plain = schema.as_float32(value) if value.dtype == np.int8 else value  # MXINT8.
        values[name] = plain.astype(fields[name].np_dtype)
      yield str(values["id"]), values

  def _example_writer(self) -> writer.ExampleWriter:
    return _Writer(self.info.file_format or file_adapters.FileFormat.TFRECORD)


class _Writer(writer.ExampleWriter):
  """Writes TFRecord without TensorFlow, byte for byte the same; other formats as usual."""

  def write(self, path, examples):
    if self.file_format is not file_adapters.FileFormat.TFRECORD:
      return super().write(path, examples)
    with open(path, "wb") as file:
      file.writelines(tfrecord.frame(example) for _, example in examples)
    return None
