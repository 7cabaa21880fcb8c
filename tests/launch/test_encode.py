import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from data import captions, layout, pipeline, shards, tf_example, tfrecord
from launch import data as launch_data
from launch import flow_task, tasks
from spatialv2a_jax import codec, features, io, model_folder, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import spatial

AUDIO = schema.AUDIO["16k"]
SECONDS = 0.64  # Of the smoke variant.
CONFIG = f"{pathlib.Path(__file__).parents[2] / 'configs' / 'tiny.py'}:smoke"

# What is kept in 16 bits: not what would be heard, nor what is small.
STORED = {
  "clip": "bfloat16", "sync": "bfloat16", "clip_mirror": "bfloat16", "sync_mirror": "bfloat16",
  "spatial": "float32", "spatial_mirror": "float32", "mean": "float32", "std": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> pathlib.Path:
  """Three videos of a moving block with stereo sound, and one that is too short."""
  folder = tmp_path_factory.mktemp("media")
  rng = np.random.default_rng(0)
  for n, count in enumerate((20, 20, 20, 8)):
    frames = np.full((count, 96, 160, 3), 90, np.uint8)
    for i in range(count):
      frames[i, 30:50, 10 + 5 * i + 8 * n : 30 + 5 * i + 8 * n] = 230
    sound_ep = rng.uniform(-0.5, 0.5, (2, count * 640)).astype(np.float32)
    io.write_video(folder / f"clip{n}.mp4", iter(frames), 25, sound_ep, AUDIO.sample_rate)
    (folder / f"clip{n}.json").write_text(json.dumps({"caption": f"block {n % 2}"}))
  return folder


def encode(media: pathlib.Path, out: pathlib.Path, *options: object) -> int:
  arguments = ["--media", media, "--out", out, "--config", CONFIG, "--shards", 2, "--jobs", 1]
  return launch_data.main(["encode", *map(str, [*arguments, *options])])


def encode_on_one_device(media: pathlib.Path, out: pathlib.Path, *options: object) -> int:
  """The same in a process that sees one device."""
  root = pathlib.Path(__file__).parents[2]
  arguments = ["--media", media, "--out", out, "--shards", 2, "--jobs", 1, *options]
  environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(root)}
  command = [sys.executable, "-m", "launch.data", "encode", *map(str, arguments)]
  return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode


def tiny_vae(folder: pathlib.Path) -> pathlib.Path:
  net = codec.build({"width": 8}, AUDIO)
  params = {"vae": nn.unbox(jax.jit(net.init)(jax.random.key(0)))}
  model_folder.save_model(folder, params, {}, {"audio": "16k", "vae": {"width": 8}})
  return folder


def shapes() -> dict[str, tuple[int, ...]]:
  sizes: Any = {"clip_dim": 64, "sync_dim": 64, "text_dim": 32, "text_len": 8}
  return schema.feature_shapes(SECONDS, AUDIO, **sizes)


def only_batch(folder: pathlib.Path, **options) -> dict[str, np.ndarray]:
  (batch,) = pipeline.loader(
    shards.paths(folder), batch_size=3, seed=0, epochs=1, mirror=True, **options
  )
  return batch


def records(folder: pathlib.Path) -> list[dict[str, np.ndarray | str]]:
  fields, found = layout.read_features(folder), []
  source = tfrecord.TFRecordSource(shards.paths(folder))
  for place in range(len(source)):
    raw = tf_example.decode(source[place])
    found.append({name: tf_example.value_of(raw[name], fields[name]) for name in raw})
  return found


@pytest.mark.parametrize("storage", ["bfloat16", "mxint8"])
def test_clips_fit_the_config_they_were_made_for(media, tmp_path, capsys, storage):
  assert encode(media, tmp_path, "--mirror", "--storage", storage) == 0
  assert "3 of 4 clips" in capsys.readouterr().out
  stats = json.loads((tmp_path / "clips" / "stats.json").read_text())
  assert list(stats["bad"]) == ["clip3"]
  fields = layout.read_features(tmp_path / "clips")
  fields["text"] = captions.Table(tmp_path / "clips").tensor
  wanted = {name: shape for name, shape in shapes().items() if name not in ("mean", "std")}
  assert {name: schema.shape_of(fields[name]) for name in wanted} == wanted
  short = {name for name, field in fields.items() if field.dtype in ("bfloat16", "int8")}
  assert short == {"clip", "sync", "text", "clip_mirror", "sync_mirror"}
  assert (fields["text"].dtype == "int8") == (storage == "mxint8")
  samples = schema.lengths(SECONDS, AUDIO).samples
  heard = only_batch(tmp_path / "clips", kind="audio", shapes={"audio": (2, samples)})
  assert heard["audio_bep"].shape == (3, 2, samples)


def test_machines_that_share_a_folder_write_the_same_bytes(media, tmp_path, capsys):
  assert encode(media, tmp_path / "one") == 0
  assert encode(media, tmp_path / "two", "--slice", "1/2") == 0
  assert "not complete: run the other slices" in capsys.readouterr().out
  assert not (tmp_path / "two" / "clips" / "manifest.json").exists()
  assert encode(media, tmp_path / "two", "--slice", "0/2") == 0
  one, two = ({p.relative_to(tmp_path / n): p.read_bytes() for p in files(tmp_path / n)}
              for n in ("one", "two"))  # fmt: skip
  assert one == two and len(one) > 8


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in folder.rglob("*") if path.is_file()]


def test_training_drops_to_the_text_features_of_no_text(tmp_path):
  config = features.Config("mmaudio", text_len=3, text_dim=2)

  def build(texts):
    item, clips = shards.Item("a", None), tmp_path / str(len(texts))
    record = {"caption": "a dog", "mean": np.zeros(1, np.float32)}
    shards.build([item], lambda _: record, clips, shards=1, config={})
    text = lambda words: np.full((3, 2), 1.0 + len(words))  # noqa: E731
    captions.build(texts, text, clips, config={}, storage="float32")
    return str(clips)

  for split in ("", ":train"):
    found = flow_task.null_text(build(["", "a dog"]) + split, config)
    np.testing.assert_array_equal(found, np.ones((3, 2)))
  with pytest.raises(UserError, match="it has no caption ''; encode the clips again"):
    flow_task.null_text(build(["a dog"]), config)
  assert not flow_task.null_text(tasks.SYNTHETIC, config).any()
  assert not flow_task.null_text(str(tmp_path / "nowhere"), features.Config()).any()


@pytest.mark.slow
def test_latents_are_those_of_the_sound(media, tmp_path):
  folder = tiny_vae(tmp_path / "vae")
  assert encode(media, tmp_path, "--vae", folder, "--mirror") == 0
  for turn in ("1/2", "0/2", "0/2", "1/2"):  # Latents want all the sound: a second turn.
    given = ["--vae", folder, "--mirror", "--slice", turn]
    assert encode(media, tmp_path / "parts", *given) == 0
  for name in ("clips", "latents"):
    parts = {p.name: p.read_bytes() for p in files(tmp_path / "parts" / name)}
    assert parts == {p.name: p.read_bytes() for p in files(tmp_path / name)}
  batch = only_batch(tmp_path / "latents", shapes=shapes())
  schema.check_batch(batch, shapes())
  heard = only_batch(tmp_path / "clips", kind="audio")
  audio_bep = schema.as_float32(heard["audio_bep"])
  params = model_folder.load_model(folder).params["vae"]
  mean_betc, std_betc = jax.jit(codec.build({"width": 8}, AUDIO).encode)(params, audio_bep)
  np.testing.assert_allclose(batch["mean_betc"], mean_betc, atol=1e-4)
  np.testing.assert_allclose(batch["std_betc"], std_betc, rtol=2**-8)  # Stored as bfloat16.


def test_mirrored_features_are_those_of_the_mirrored_picture(media, tmp_path):
  from launch.encode import Features

  encoder = Features(SECONDS, features.Config(), mirror=True)
  (got,) = encoder.encode([encoder.read(media / "clip0.mp4", "")])
  frames = io.read_views(media / "clip0.mp4", features.views(), duration=SECONDS)["frames"]
  mirrored = features.encode(frames[:, :, ::-1], SECONDS, features.Config())
  np.testing.assert_array_equal(got["clip_mirror_vf"], mirrored["clip_vf"])
  np.testing.assert_array_equal(got["sync_mirror_sf"], mirrored["sync_sf"])
  np.testing.assert_array_equal(got["spatial_mirror_vk"], mirrored["spatial_vk"])
  signs_1k = np.asarray(spatial.MIRROR_SIGNS)[None]
  np.testing.assert_allclose(got["spatial_mirror_vk"], got["spatial_vk"] * signs_1k, atol=1e-4)


def test_a_track_is_mirrored_with_the_picture_and_known_by_what_it_says(media, tmp_path):
  from launch.encode import Features

  track = tmp_path / "track.csv"
  track.write_text("time_s,azimuth_deg\n0,-30\n1,-30\n")
  config = features.Config(localizer=f"track:{track}")
  encoder = Features(SECONDS, config, mirror=True)
  (got,) = encoder.encode([encoder.read(media / "clip0.mp4", "")])
  np.testing.assert_array_equal(got["spatial_mirror_vk"], got["spatial_vk"] * spatial.MIRROR_SIGNS)
  assert got["spatial_vk"][0, 0] > 0.4  # S_h: the right.
  moved = tmp_path / "moved.csv"
  moved.write_bytes(track.read_bytes())
  assert config.identity() == features.Config(localizer=f"track:{moved}").identity()
  moved.write_text("time_s,azimuth_deg\n0,30\n1,30\n")
  assert config.identity() != features.Config(localizer=f"track:{moved}").identity()


def test_the_last_picture_of_a_trimmed_film_is_held_not_that_of_a_short_one(media, tmp_path):
  from launch.encode import Features

  encoder = Features(0.84, features.Config(), mirror=False)  # The films have 0.8 s.
  _, frames = encoder.read(media / "clip0.mp4", "")
  assert len(frames["frames"]) == 21
  np.testing.assert_array_equal(frames["frames"][-1], frames["frames"][-2])
  with pytest.raises(shards.BadClipError, match="20 frames at 25 fps, not 23"):
    Features(0.92, features.Config(), mirror=False).read(media / "clip0.mp4", "")


@pytest.mark.slow
def test_trained_networks_fill_the_shards(media, tmp_path, capsys, monkeypatch):
  """CLIP, its texts, Synchformer, CLIPSeg and the VAE, tiny, on eight devices and on one.

  As `generate` would encode the same clips; mirrored pictures too; each network is read once.
  """
  pytest.importorskip("ftfy", reason="the tokenizer is in the extra `encoders`")
  from launch.encode import Features, open_encoders
  from tests import tiny_mmaudio

  parts = tiny_mmaudio.save(tmp_path / "parts", ("clip", "synchformer", "clipseg"))
  vae = tiny_vae(tmp_path / "vae")
  config = tmp_path / "config.py"
  config.write_text(
    "import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict(dict(audio='16k',"
    f" seconds={SECONDS}, features=dict(encoder='mmaudio', clip_dim=16, sync_dim=24, text_dim=16,"
    " text_len=77, localizer='acl')))\n"
  )
  loaded = []
  verify = model_folder.Model.verify
  monkeypatch.setattr(
    model_folder.Model, "verify", lambda self, name: loaded.append(name) or verify(self, name)
  )
  options = ["--config", config, "--parts", parts, "--vae", vae, "--mirror"]
  assert encode(media, tmp_path, *options, "--batch", 3) == 0
  assert sorted(loaded) == ["clip", "clipseg", "synchformer", "vae"]  # Once each.
  assert capsys.readouterr().out.count("3 of 4 clips") == 1
  encoder = Features(SECONDS, features.Config("mmaudio", 0, 16, 24, 16, 77, "acl"), True, parts)
  alone = open_encoders(encoder.config, parts)
  assert alone._whole.device_set == set(jax.local_devices())

  fields, table = layout.read_features(tmp_path / "latents"), captions.Table(tmp_path / "latents")
  wanted = schema.feature_shapes(SECONDS, AUDIO, clip_dim=16, sync_dim=24, text_len=77, text_dim=16)
  assert table.tensor == tf_example.Tensor("bfloat16", wanted["text"])
  for name, dtype in STORED.items():
    assert fields[name] == tf_example.Tensor(dtype, wanted[name.removesuffix("_mirror")])
  assert "text" not in fields and "audio" not in fields
  (shard,) = shards.paths(tmp_path / "latents" / "text")
  texts = json.loads(shards.sidecar(shard).read_text())["ids"]
  assert sorted(texts) == ["", "block 0", "block 1"]  # Of four clips, and of no text.

  assert encode_on_one_device(media, tmp_path / "one", *options, "--batch", 1) == 0
  for kind in ("clips", "latents"):
    for one, other in zip(records(tmp_path / kind), records(tmp_path / "one" / kind), strict=True):
      assert one["id"] == other["id"] and one.keys() == other.keys()
      for name in STORED.keys() & one.keys():
        a, b = (np.asarray(x[name], np.float32) for x in (one, other))
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=2**-7)  # One step of bfloat16.
  plain, other = encoder.encode(
    [encoder.read(media / "clip0.mp4", caption) for caption in ("block 0", "a cat")]
  )
  # Training drops to what the encoder says of no text, not to zeros.
  null_wf = flow_task.null_text(str(tmp_path / "clips"), encoder.config)
  stored_wf = encoder.text("").astype("bfloat16").astype(np.float32)
  np.testing.assert_array_equal(null_wf, stored_wf)
  assert np.linalg.norm(null_wf, axis=1).min() > 0.9
  generated = alone.read(media / "clip0.mp4", alone.stages("block 0"), SECONDS)
  for name in ("clip_vf", "sync_sf", "spatial_vk"):
    np.testing.assert_array_equal(plain[name], generated[name])
  assert np.abs(other["spatial_vk"] - plain["spatial_vk"]).max() > 1e-5  # The caption's place.
  assert np.abs(plain["clip_mirror_vf"] - plain["clip_vf"]).max() > 1e-4


@pytest.mark.parametrize(
  ("options", "code", "line"),
  [
    (["--config", "nowhere.py"], 2, "nowhere.py: no such file"),
    (["--config", CONFIG.replace("tiny.py:smoke", "vae_tiny.py")], 2, "it has no features"),
    (["--config", CONFIG.replace(":smoke", ":huge")], 2, "unknown variant 'huge'"),
    (["--vae", "nowhere"], 3, "nowhere"),
    (["--parts", "nowhere"], 3, "nowhere"),
    (["--config", CONFIG.replace("tiny.py:smoke", "small_16k.py")], 3, "give --parts DIR"),
    (["--jobs", 0], 2, "--jobs 0"),
    (["--max-bad", "nan"], 2, "--max-bad nan: give a share"),
    (["--videos", "nowhere"], 2, "--raw BUILD/raw and --videos DIR go together"),
    (["--max-bad", 0, "--media", "nowhere"], 2, "no such file or folder"),
  ],
)
def test_mistakes_are_one_line(media, tmp_path, capsys, options, code, line):
  assert encode(media, tmp_path / "out", *options) == code
  error = capsys.readouterr().err
  assert line in error and error.count("\n") == 1
  assert not (tmp_path / "out" / "clips" / "manifest.json").exists()
