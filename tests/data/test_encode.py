import concurrent.futures
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import av
import numpy as np
import pytest
import soundfile

from data import captions, layout, pipeline, shards, tf_example
from data import encode as stage
from data import media as sources
from spatialv2a_jax import schema
from spatialv2a_jax.errors import MissingAssetError, UserError

RATE, SAMPLES = 16_000, 8_000
SHAPES = {
  "mean": (2, 4, 3),
  "std": (2, 4, 3),
  "clip": (5, 2),
  "sync": (6, 2),
  "text": (3, 2),
  "spatial": (5, 5),
}
CONFIG = {"encoder": "fake"}


def sound(n: int, samples: int = SAMPLES) -> np.ndarray:
  """Left and right differ, and both are exact in 16 bits."""
  return np.stack([np.full(samples, n / 64), np.full(samples, -n / 128)]).astype(np.float32)


def write_clip(folder: pathlib.Path, n: int, audio_ep: np.ndarray) -> None:
  """A clip as the scene maker leaves it; the fake encoder does not look into the video."""
  (folder / f"clip{n}.mp4").write_bytes(bytes([n]))
  soundfile.write(folder / f"clip{n}.wav", audio_ep.T, RATE, subtype="FLOAT")
  (folder / f"clip{n}.json").write_text(json.dumps({"id": f"clip{n}", "caption": f"number {n}"}))


@pytest.fixture
def media(tmp_path: pathlib.Path) -> pathlib.Path:
  folder = tmp_path / "media"
  folder.mkdir()
  for n in range(6):
    write_clip(folder, n, sound(n, SAMPLES + 100))
  return folder


def encode(path: pathlib.Path) -> dict[str, np.ndarray]:
  n = float(path.stem.removeprefix("clip"))
  return {
    "clip_vf": np.full((5, 2), n),
    "sync_sf": np.full((6, 2), n),
    "spatial_vk": np.full((5, 5), n + 1 / 3),
    "heat_vyx": np.zeros((5, 9, 9)),
  }


@dataclasses.dataclass
class Encoder:
  """Looks at file names only; remembers the sizes of batches and the texts."""

  one: Callable[[pathlib.Path], dict[str, np.ndarray]] = encode
  batches: list[int] = dataclasses.field(default_factory=list)
  texts: list[str] = dataclasses.field(default_factory=list)

  def read(self, video: pathlib.Path, caption: str) -> pathlib.Path:
    del caption
    return video

  def encode(self, clips: Sequence[pathlib.Path]) -> list[dict[str, np.ndarray]]:
    self.batches.append(len(clips))
    return [self.one(path) for path in clips]

  def text(self, caption: str) -> np.ndarray:
    self.texts.append(caption)
    return np.full((3, 2), float(caption.removeprefix("number ") or 0))


def codec(audio_bep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  assert audio_bep.shape[1:] == (2, SAMPLES) and audio_bep.dtype == np.float32
  mean_betc = np.zeros((len(audio_bep), 2, 4, 3)) + audio_bep[:, :, :1, None]
  return mean_betc, np.full_like(mean_betc, 0.1)


def features(folder: pathlib.Path, out: pathlib.Path, encoder: Encoder | None = None, **options):
  options = {"samples": SAMPLES, "sample_rate": RATE, "shard_count": 2, "config": CONFIG, **options}
  return stage.encode_features(sources.files(folder), out, encoder or Encoder(), **options)


@pytest.mark.parametrize("audio", ["int16", "float32"])
@pytest.mark.parametrize("storage", schema.STORAGES)
def test_from_media_to_batches(media, tmp_path, storage, audio):
  clips, latents = tmp_path / "clips", tmp_path / "latents"
  assert features(media, clips, storage=storage, audio=audio)["clips_out"] == 6
  assert stage.encode_latents(clips, latents, codec, config={"vae": 1})["clips_out"] == 6
  fields = layout.read_features(latents)
  short = "int8" if storage == "mxint8" else storage
  assert {fields[name].dtype for name in ("clip", "sync")} == {short}
  text = captions.Table(latents).tensor
  assert text.dtype == short and schema.shape_of(text) == (3, 2)
  assert {fields[name].dtype for name in ("mean", "spatial")} == {"float32"}
  assert fields["std"].dtype == "bfloat16"
  assert not {"audio", "heat", "text"} & fields.keys()
  (batch,) = pipeline.loader(shards.paths(latents), batch_size=6, seed=0, epochs=1, shapes=SHAPES)
  (heard,) = pipeline.loader(
    shards.paths(clips),
    batch_size=6,
    seed=0,
    epochs=1,
    kind="audio",
    shapes={"audio": (2, SAMPLES)},
  )
  np.testing.assert_array_equal(batch["id_b"], heard["id_b"])
  schema.check_batch(batch, SHAPES)
  assert batch["clip_bvf"].dtype == short and heard["audio_bep"].dtype == audio
  if (storage, audio) == ("bfloat16", "int16"):  # The defaults, which `schema.narrow` knows.
    for stored in (batch, heard):
      known = schema.narrow(schema.widen(stored))
      assert {name: x.dtype for name, x in known.items()} == {n: x.dtype for n, x in stored.items()}
  batch, heard = schema.widen(batch), schema.widen(heard)
  assert sorted(batch["clip_bvf"][:, 0, 0]) == [0, 1, 2, 3, 4, 5]
  for row, n in enumerate(batch["clip_bvf"][:, 0, 0].tolist()):
    np.testing.assert_array_equal(heard["audio_bep"][row], sound(n))
    np.testing.assert_array_equal(batch["mean_betc"][row, :, 0, 0], [n / 64, -n / 128])
    np.testing.assert_array_equal(batch["spatial_bvk"][row], np.float32(n + 1 / 3))
    assert np.all(batch["sync_bsf"][row] == n) and np.all(batch["text_bwf"][row] == n)


def test_mirrored_features_are_stored(media, tmp_path):
  def both(path: pathlib.Path) -> dict[str, np.ndarray]:
    plain = encode(path)
    return {**plain, "clip_mirror_vf": -plain["clip_vf"], "sync_mirror_sf": -plain["sync_sf"]}

  features(media, tmp_path / "clips", Encoder(both))
  fields = layout.read_features(tmp_path / "clips")
  assert fields["clip_mirror"] == fields["clip"] == tf_example.Tensor("bfloat16", (5, 2))


def test_sound_beyond_full_scale_clips_in_16_bits(media, tmp_path):
  write_clip(media, 6, np.stack([np.full(SAMPLES, 1.11), np.full(SAMPLES, -1.11)]))
  features(media, tmp_path / "clips")
  batches = pipeline.loader(
    shards.paths(tmp_path / "clips"), batch_size=7, seed=0, epochs=1, kind="audio"
  )
  audio_bep = schema.widen(next(batches))["audio_bep"]
  assert audio_bep.max() == np.float32(32767 / 32768) and audio_bep.min() == -1


def test_what_is_wrong_with_a_clip_is_said(media, tmp_path):
  write_clip(media, 6, sound(6, SAMPLES - 1))
  write_clip(media, 7, sound(7)[:1])
  write_clip(media, 8, sound(8))
  (media / "clip8.json").write_text("{")
  write_clip(media, 9, sound(9))
  (media / "clip9.wav").write_bytes(b"RIFF no sound")
  bad = features(media, tmp_path / "clips")["bad"]
  assert set(bad) == {"clip6", "clip7", "clip8", "clip9"}
  assert bad["clip6"] == "sound has 7999 samples, fewer than 8000"
  assert bad["clip7"] == "sound has 1 channels, not 2"


def test_sound_a_little_short_ends_in_zeros(media, tmp_path):
  write_clip(media, 6, sound(6, SAMPLES - 9))
  write_clip(media, 7, sound(7, SAMPLES - 11))
  stats = features(media, tmp_path / "clips", least_samples=SAMPLES - 10)
  assert stats["bad"] == {"clip7": "sound has 7989 samples, fewer than 7990"}
  batches = pipeline.loader(
    shards.paths(tmp_path / "clips"), batch_size=7, seed=0, epochs=1, kind="audio"
  )
  (row,) = [
    audio_ep for audio_ep in schema.widen(next(batches))["audio_bep"] if audio_ep[0, 0] == 6 / 64
  ]
  assert np.all(row[:, :-9] == sound(6, SAMPLES - 9)) and np.all(row[:, -9:] == 0)


def test_sound_within_the_video(tmp_path):
  media = tmp_path / "media"
  media.mkdir()
  with av.open(str(media / "clip3.mp4"), "w") as container:
    stream = container.add_stream("alac", rate=RATE)
    assert isinstance(stream, av.AudioStream)
    stream.layout = "stereo"
    frame = av.AudioFrame.from_ndarray(
      (sound(3, 3 * 4096) * 32768).astype(np.int16), format="s16p", layout="stereo"
    )
    frame.sample_rate = RATE
    container.mux([*stream.encode(frame), *stream.encode(None)])

  encoder = Encoder()
  features(media, tmp_path / "clips", encoder)
  assert encoder.texts == [""]  # No caption beside it.
  batches = pipeline.loader(
    shards.paths(tmp_path / "clips"), batch_size=1, seed=0, epochs=1, kind="audio"
  )
  np.testing.assert_allclose(schema.widen(next(batches))["audio_bep"][0], sound(3), atol=2e-5)


def test_a_text_is_encoded_once_however_many_clips_have_it(media, tmp_path):
  for n in range(6):
    (media / f"clip{n}.json").write_text(json.dumps({"caption": f"number {n % 2}"}))
  encoder = Encoder()
  features(media, tmp_path / "clips", encoder)
  assert sorted(encoder.texts) == ["", "number 0", "number 1"]  # And that of no text.
  stage.encode_latents(tmp_path / "clips", tmp_path / "latents", codec, config={})
  for folder in ("clips", "latents"):
    table = captions.Table(tmp_path / folder)
    np.testing.assert_array_equal(table["number 1"].astype(np.float32), 1)


def test_batches_change_no_byte_and_a_bad_clip_costs_no_other(media, tmp_path):
  write_clip(media, 6, sound(6)[:1])  # Cannot be read.

  def no_clip_4(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.stem == "clip4":
      raise ValueError("a black picture")
    return encode(path)

  contents = []
  for batch in (1, 2, 8):
    encoder, clips = Encoder(no_clip_4), tmp_path / f"clips{batch}"
    stats = features(media, clips, encoder, batch=batch, shard_count=1)
    assert stats["bad"] == {
      "clip4": "ValueError: a black picture",
      "clip6": "sound has 1 channels, not 2",
    }
    assert max(encoder.batches) == min(batch, 6)
    latents = tmp_path / f"latents{batch}"
    assert stage.encode_latents(clips, latents, codec, config={}, batch=batch)["clips_out"] == 5
    folders = (clips, latents)
    contents.append([path.read_bytes() for f in folders for path in shards.paths(f)])
  assert contents[0] == contents[1] == contents[2]


def test_an_edited_caption_remakes_its_shard_and_latents(media, tmp_path):
  clips, latents = tmp_path / "clips", tmp_path / "latents"
  calls: list[str] = []

  def counted(path: pathlib.Path) -> dict[str, np.ndarray]:
    calls.append(path.stem)
    return encode(path)

  def count_codec(audio_bep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    calls.append("codec")
    return codec(audio_bep)

  def run() -> list[str]:
    calls.clear()
    features(media, clips, Encoder(counted))
    stage.encode_latents(clips, latents, count_codec, config={})
    return sorted(calls)

  everything = run()
  assert len(everything) == 12
  assert run() == []
  (media / "clip2.json").write_text(json.dumps({"caption": "number 40"}))
  some = run()
  assert "clip2" in some and 0 < len(some) < 12
  assert some.count("codec") == len(some) / 2  # The same clips again, and no others.


def test_a_table_of_texts_may_be_copied_by_several_at_once(tmp_path):
  """As slices do that end together; files of an earlier table go."""
  text, names = tmp_path / "clips" / "text", [f"shard{n}" for n in range(20)] + ["manifest.json"]
  target = tmp_path / "latents" / "text"
  for folder, file in [(text, name) for name in names] + [(target, "old")]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(file)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    copies = [pool.submit(captions.copy, text.parent, target.parent) for _ in range(24)]
    for copy in copies:
      copy.result()
  assert {path.name: path.read_text() for path in target.iterdir()} == {n: n for n in names}


def test_a_damaged_record_ends_the_next_stage_until_its_shard_is_restored(media, tmp_path):
  features(media, tmp_path / "clips")
  path = shards.paths(tmp_path / "clips")[0]
  whole = path.read_bytes()
  blob = bytearray(whole)
  blob[200] ^= 1
  path.write_bytes(blob)
  with pytest.raises(UserError, match=f"{path.name}: record 0 is damaged .*restore the shard"):
    stage.encode_latents(tmp_path / "clips", tmp_path / "latents", codec, config={})
  path.write_bytes(whole)
  stats = stage.encode_latents(tmp_path / "clips", tmp_path / "latents", codec, config={})
  assert stats["clips_out"] == 6 and not stats["bad"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sound_that_is_not_finite_makes_a_bad_clip(media, tmp_path, value):
  """Neither can be told from silence or full scale in 16 bits."""
  audio_ep = sound(2, SAMPLES + 100)
  audio_ep[0, 7] = value
  write_clip(media, 2, audio_ep)
  stats = features(media, tmp_path / "clips")
  assert stats["bad"] == {"clip2": "its sound holds NaN or infinite samples"}


def test_stage_two_wants_stage_one_finished(media, tmp_path):
  features(media, tmp_path / "clips", part=(0, 2))
  with pytest.raises(UserError, match="manifest.json.*finish"):
    stage.encode_latents(tmp_path / "clips", tmp_path / "latents", codec, config={})


def test_missing_weights_end_the_stage(media, tmp_path):
  def encode_without_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    raise MissingAssetError("no weights")

  with pytest.raises(MissingAssetError):
    features(media, tmp_path / "clips", Encoder(encode_without_weights))


def test_a_folder_without_videos(tmp_path):
  with pytest.raises(UserError, match="holds no media files"):
    features(tmp_path, tmp_path / "clips")
