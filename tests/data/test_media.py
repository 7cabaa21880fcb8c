"""What encoding takes its clips from: a finished build, with its splits."""

import os
import pathlib

import numpy as np
import pytest

from data import catalogue, encode, media, shards, tf_example, tfrecord
from spatialv2a_jax.errors import UserError

RATE, SAMPLES = 16_000, 320


class Encoder:
  """Sees nothing but where the video lies."""

  def read(self, video: pathlib.Path, caption: str) -> float:
    return float(video.stem.removeprefix("clip"))

  def encode(self, clips):
    return [{"clip_vf": np.full((2, 2), n)} for n in clips]

  def text(self, caption: str) -> np.ndarray:
    return np.full((1, 1), len(caption))


@pytest.fixture
def raw(tmp_path) -> pathlib.Path:
  def record(item: shards.Item) -> shards.Record:
    return {
      "audio": np.full((2, SAMPLES), item.payload, np.int16),
      "caption": f"number {item.payload}",
      "video": f"deep/clip{item.payload}.mp4",
      "label": f"label {item.payload}",
      "aes": np.full(4, np.nan, np.float32),
      "azimuth": np.zeros(3, np.float32),
    }

  items = [shards.Item(f"c{n}", n, "", "test" if n % 3 else "train") for n in range(9)]
  counts = {"train": 2, "test": 4}
  config = {"audio": "16k"}
  shards.build(items, record, tmp_path / "raw", shards=counts, config=config, unknown=["aes"])
  return tmp_path / "raw"


def test_splits_come_through_both_steps(raw, tmp_path):
  items, counts = media.records(raw, tmp_path, RATE), {"train": 2, "test": 4}
  encode.encode_features(
    items, tmp_path / "clips", Encoder(), samples=SAMPLES, sample_rate=RATE, shard_count=counts,
    config={}, batch=2,
  )  # fmt: skip

  def codec(audio_bep):
    mean_betc = np.zeros((len(audio_bep), 2, 1, 1)) + audio_bep[:, :, :1, None] * 32768
    return mean_betc, mean_betc

  encode.encode_latents(tmp_path / "clips", tmp_path / "latents", codec, config={})
  for split, numbers in {"train": [0, 3, 6], "test": [1, 2, 4, 5, 7, 8]}.items():
    paths = shards.paths(tmp_path / "latents", split)
    assert len(paths) == counts[split]
    source = tfrecord.TFRecordSource(paths)
    found = {}
    for i in range(len(source)):
      fields = tf_example.decode(source[i])
      mean = np.frombuffer(fields["mean"], np.float32)
      seen = np.frombuffer(fields["clip"], "u2")
      assert len(set(mean)) == len(set(seen)) == 1
      assert bytes(fields["caption"]).decode() == f"number {int(mean[0])}"
      assert bytes(fields["label"]).decode() == f"label {int(mean[0])}"
      assert np.isnan(np.frombuffer(fields["aes"], np.float32)).all()
      assert "azimuth" not in fields and "audio" not in fields
      found[bytes(fields["id"]).decode()] = int(mean[0])
    assert found == {f"c{n}": n for n in numbers}


def test_builds_that_do_not_fit(raw, tmp_path):
  with pytest.raises(UserError, match="16k models, the config wants 44100 Hz"):
    media.records(raw, tmp_path, 44_100)
  with pytest.raises(UserError, match="no such folder"):
    media.records(raw, tmp_path / "no", RATE)
  with pytest.raises(UserError, match=f"no shards in {tmp_path}; it has {tmp_path}/raw"):
    media.records(tmp_path, tmp_path, RATE)


@pytest.mark.parametrize("suffix", [".mp4", ".wav", ".json"])
def test_a_stamp_changes_with_each_file_of_a_clip(tmp_path, suffix):
  stamps = []
  for time_ns in (1, 1, 2):
    for end in (".mp4", ".wav", ".json"):
      path = tmp_path / f"a{end}"
      path.write_bytes(b"1")
      os.utime(path, ns=(time_ns if end == suffix else 1,) * 2)
    stamps.append(media.files(tmp_path)[0].stamp)
  assert stamps[0] == stamps[1] != stamps[2]


def test_a_stamp_changes_with_the_shard_that_has_the_record(raw, tmp_path):
  before = {item.id: item.stamp for item in media.records(raw, tmp_path, RATE)}

  def record(item: shards.Item) -> shards.Record:
    return {"audio": np.ones((2, SAMPLES), np.int16), "video": "a.mp4"}

  items = [shards.Item(f"c{n}", n, "", "test" if n % 3 else "train") for n in range(9)]
  shards.build(items, record, raw, shards={"train": 2, "test": 4}, config={"audio": "16k", "x": 1})
  after = {item.id: item.stamp for item in media.records(raw, tmp_path, RATE)}
  assert all(after[name] != stamp for name, stamp in before.items())


def test_names_and_captions_that_are_no_text(tmp_path):
  (tmp_path / "a.mp4").write_bytes(b"1")
  (tmp_path / "a.json").write_text('{"caption": ["a", "dog"]}')
  (item,) = media.files(tmp_path)
  with pytest.raises(ValueError, match="a.json: the caption is no text"):
    assert item.payload.caption
  assert not list(media.captions([item]))
  os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.mp4", os.O_CREAT))
  for read in (media.files, lambda folder: catalogue.read(folder, None)):
    with pytest.raises(UserError, match=r"caf\\udce9.mp4' is not UTF-8; rename the file"):
      read(tmp_path)
