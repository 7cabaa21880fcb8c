"""The builder of tensorflow-datasets, without TensorFlow; skipped where it is not installed."""

import importlib
import pathlib
from typing import Any

import numpy as np
import pytest

from data import captions, layout, shards, tf_example, tfrecord
from launch import data as command
from spatialv2a_jax import microscaling
from tests.data import clips

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("importlib_resources")  # Which tensorflow-datasets forgets to ask for.

NAME = "binaural_vggsound"
FRAMES, LATENTS, SAMPLES = 3, 4, 320
COMMON = {
  "aes": np.full(4, np.nan, np.float32),
  "cues": np.arange(10, dtype=np.float32),
  "source_channels": np.array(2, np.int32),
  "schema_version": np.array(1, np.int32),
  **{
    name: np.array(0.5, np.float32) for name in ("correlation", "agreement", "silence", "gain_db")
  },
}
TEXTS = ("label", "video", "layout", "spatializer", "hrtf")


def common(n: int) -> dict[str, np.ndarray | str]:
  texts = {name: f"{name} {n}" for name in TEXTS}
  return {"caption": f"caption {n % 2}", **COMMON, **texts}


def raw(item: shards.Item) -> shards.Record:
  audio_ep = np.array([[item.payload], [-item.payload]], np.int16).repeat(SAMPLES, axis=1)
  return {
    **common(item.payload),
    "audio": audio_ep,
    "azimuth": np.zeros(FRAMES, np.float32),
    "located": np.ones(FRAMES, np.uint8),
  }


def latent(item: shards.Item) -> shards.Record:
  n = item.payload
  return {
    **common(n),
    "clip": np.full((FRAMES, 1024), n, "float16"),  # Other storages than the builder's.
    "sync": microscaling.pack(np.full((8, 768), n, np.float32)),
    "spatial": np.full((FRAMES, 5), n, np.float32),
    "mean": np.full((2, LATENTS, 20), n, np.float32),
    "std": np.full((2, LATENTS, 20), n, "bfloat16"),
    "clip_mirror": np.full((FRAMES, 1024), -n, "bfloat16"),
  }


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> pathlib.Path:
  """The folder of a finished build of five clips, two of them to test on."""
  folder = tmp_path_factory.mktemp("build")
  items = [shards.Item(f"clip{n}", n, split="test" if n < 2 else "train") for n in range(5)]
  shards.build(items, raw, folder / "raw", shards=2, config={}, unknown=["aes"], name=NAME)
  shards.build(items, latent, folder / "latents", shards=2, config={}, unknown=["aes"], name=NAME)
  captions.build(
    [f"caption {n}" for n in range(2)],
    lambda caption: np.full((77, 1024), float(caption[-1])),
    folder / "latents",
    config={},
    storage="bfloat16",
    name=NAME,
  )
  return folder


def prepare(build: pathlib.Path, out: pathlib.Path, config: str, **options):
  module = importlib.import_module(f"data.{NAME}.{NAME}_dataset_builder")
  builder = module.Builder(config=config, data_dir=str(out), **options)
  download = tfds.download.DownloadConfig(manual_dir=str(build))
  builder.download_and_prepare(download_config=download)
  return builder


def examples(folder: pathlib.Path, split: str) -> dict[str, dict[str, Any]]:
  """Reads what tensorflow-datasets has written, knowing nothing but the folder."""
  info = tfds.builder_from_directory(str(folder)).info
  found = {}
  for path in info.splits[split].filepaths:
    source = tfrecord.TFRecordSource([str(path)])
    for place in range(len(source)):
      example = info.features.deserialize_example_np(source[place])
      found[example["id"].decode()] = example
  return found


@pytest.mark.parametrize("config", ["raw", "features_16k", "text"])
def test_prepared_records_are_those_of_the_shards(build, tmp_path, config):
  builder = prepare(build, tmp_path, config)
  folder = pathlib.Path(str(builder.data_dir))
  assert folder == tmp_path / NAME / config / "1.0.0"
  if config == "text":
    found = examples(folder, "train")
    assert {name: float(e["text"][76, 1023]) for name, e in found.items()} == {
      "caption 0": 0,
      "caption 1": 1,
    }
    return
  made = raw if config == "raw" else latent
  for split, numbers in (("test", range(2)), ("train", range(2, 5))):
    found = examples(folder, split)
    assert found.keys() == {f"clip{n}" for n in numbers}
    for n in numbers:
      for field, value in made(shards.Item("", n)).items():
        if field == "clip_mirror":
          assert field not in found[f"clip{n}"]
        elif isinstance(value, str):
          assert found[f"clip{n}"][field].decode() == value
        else:
          wide = microscaling.unpack(value) if field == "sync" else value.astype(np.float32)
          np.testing.assert_array_equal(found[f"clip{n}"][field].astype(np.float32), wide)


def test_every_field_of_a_real_build_goes_through(tmp_path):
  (tmp_path / "videos").mkdir()
  clips.write(tmp_path / "videos" / "a.mp4", column=0.2)
  out = tmp_path / "out"
  options = ["--videos", tmp_path / "videos", "--out", out, "--seconds", 1, "--jobs", 1]
  assert command.main(["vggsound", *map(str, options)]) == 0
  builder = prepare(out, tmp_path / "tfds", "raw")
  example = examples(pathlib.Path(str(builder.data_dir)), "train")["a"]
  fields = layout.read_features(out / "raw")
  raw = tf_example.decode(tfrecord.TFRecordSource(shards.paths(out / "raw"))[0])
  assert example.keys() == fields.keys()
  for name in fields:
    stored = tf_example.value_of(raw[name], fields[name])
    if isinstance(stored, str):
      assert example[name].decode() == stored
    else:
      np.testing.assert_array_equal(example[name], stored)
      assert example[name].dtype == stored.dtype


def test_other_file_formats(build, tmp_path):
  builder = prepare(build, tmp_path, "raw", file_format="array_record")
  source: Any = builder.as_data_source(split="train")
  assert {example["id"].decode() for example in source} == {"clip2", "clip3", "clip4"}


def test_what_is_missing_is_said(build, tmp_path):
  with pytest.raises(Exception, match="no shards in .*latents"):
    prepare(build / "raw", tmp_path, "features_16k")
