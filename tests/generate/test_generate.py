"""Files in, sound out: repeatability, every setting, restarts, and faults of single files."""

import base64
import dataclasses
import io as memory
import json
import os

import av
import jax
import numpy as np
import pytest
from PIL import Image

import spatialv2a_jax
from spatialv2a_jax import generate, generator, io
from spatialv2a_jax.model_folder import load_model
from tests import tiny


def sound(folder, stem="left", suffix="wav"):
  return io.read_audio(folder / f"{stem}.{suffix}", tiny.RATE)  # AAC is stored at 48 kHz.


def about(folder, stem="left"):
  return json.loads((folder / f"{stem}.json").read_text())


def names(folder):
  return sorted(os.listdir(folder))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(films, reference, make):
  again, other = make(films / "left.mp4"), make(films / "left.mp4", out="other", seed=1)
  for suffix in ("wav", "mp4"):
    assert (again / f"left.{suffix}").read_bytes() == (reference / f"left.{suffix}").read_bytes()
  assert np.abs(sound(other) - sound(reference)).max() > 0.01


def test_one_call_from_python_makes_the_same_sound(films, reference, model):
  clip = model.generate(films / "left.mp4", tiny.BASE)
  np.testing.assert_array_equal(clip.audio_ep, sound(reference))
  assert about(reference)["descriptors"] == np.round(clip.descriptors_vk.astype(float), 4).tolist()
  strip = Image.open(memory.BytesIO(base64.b64decode(about(reference)["heat"]["png"])))
  np.testing.assert_array_equal(np.asarray(strip), np.concatenate(clip.heat_vyx, axis=1))


def test_the_video_keeps_its_picture_and_carries_the_sound_of_the_wav(films, reference):
  before, after = io.probe(films / "left.mp4"), io.probe(reference / "left.mp4")
  assert abs(after.duration_s - before.duration_s) <= 1 / 25
  shown, kept = (io.read_video(folder / "left.mp4", 25) for folder in (films, reference))
  np.testing.assert_array_equal(shown, kept)
  left, right = wav = sound(reference)
  assert wav.shape == (2, 20_480) and np.abs(wav).max() < 1
  assert np.abs(left - right).max() > 0.01  # Both ears differ, and stay apart.
  close = sound(reference, suffix="mp4")
  assert close.shape == wav.shape and np.square(close - wav).sum() < 0.02 * np.square(wav).sum()


def test_the_licence_of_the_weights_is_told_and_kept(films, make, model, monkeypatch, capsys):
  config = model.weights.model("flow").config
  monkeypatch.setitem(config, "flow_source", {"licence": "CC-BY-NC-4.0", "file": "x.pth"})
  out = make(films, video=False)
  assert capsys.readouterr().err.count("licence of the weights (flow): CC-BY-NC-4.0\n") == 1
  assert about(out)["licences"] == {"flow": "CC-BY-NC-4.0"}  # Of the VAE, nobody said one.


@pytest.mark.parametrize("codec, error", [("aac", 0.02), ("flac", 2**-22), ("alac", 2**-22)])
def test_the_sound_of_the_video_is_stored_as_chosen(films, make, monkeypatch, codec, error):
  ears = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 20_480)).astype(np.float32)
  clip = generator.Clip(ears, np.zeros((10, 5), np.float32), np.zeros((10, 12, 20), np.uint8))
  monkeypatch.setattr(generator.Generator, "sound", lambda *_: clip)
  out = make(films / "left.mp4", video_sound=codec)
  assert about(out)["settings"]["video_sound"] == codec
  with av.open(str(out / "left.mp4")) as container:
    assert container.streams.audio[0].codec_context.name == codec
  assert np.sqrt(np.square(sound(out, suffix="mp4") - ears).mean()) < error
  np.testing.assert_array_equal(sound(out), ears)


def test_the_sidecar_says_what_was_done(films, reference, model_folder):
  got = about(reference)
  weights = load_model(model_folder).sha256
  assert set(weights) == {"flow", "vae"}
  expected = {
    "version": spatialv2a_jax.__version__, "checkpoint": "tiny", "weights_sha256": weights,
    "input": "left.mp4", "input_sha256": io.file_hash(films / "left.mp4"), "seed": 0,
    "settings": dataclasses.asdict(tiny.BASE) | {"low_memory": None, "guidance": 2.0}, "prompt": "",
    "localizer": "motion", "track_sha256": None, "duration_s": 1.28, "sample_rate": 16_000,
  }  # fmt: skip
  assert {name: got[name] for name in expected} == expected
  assert got["wall_s"] > 0 and got["peak_memory_mb"] > 50 and got["jax"] and got["device"]
  np.testing.assert_allclose(got["rtf"], got["wall_s"] / 1.28, atol=2e-3)
  assert np.shape(got["descriptors"]) == (10, 5) and got["heat"]["frames"] == 10
  assert np.mean(got["descriptors"], axis=0)[0] < -0.5  # On the left.
  assert set(got["spatial"]) == {"ild_clip_db", "itd_xc_clip_us", "iacc_clip"}
  left, right = sound(reference)
  ild = 10 * np.log10(left.var() / right.var())
  np.testing.assert_allclose(got["spatial"]["ild_clip_db"], ild, atol=2e-3)


def test_the_sidecar_knows_the_sound_that_is_looked_for(films, model, monkeypatch, tmp_path):
  monkeypatch.setattr(generator.Generator, "sha256", lambda *_: {})
  job, heard = generate.Job(films / "left.mp4", 1.28, "", [], 0.0), tmp_path / "bark.wav"
  digests = []
  for content in (b"bark", b"meow"):
    heard.write_bytes(content)
    chosen = dataclasses.replace(tiny.BASE, localizer=f"acl:{heard}")
    digests.append(generate.sidecar(model, job, chosen)["sound_sha256"])
    assert digests[-1] == io.file_hash(heard)
  assert digests[0] != digests[1]
  by_words = dataclasses.replace(tiny.BASE, localizer="acl")
  assert generate.sidecar(model, job, by_words)["sound_sha256"] is None


@pytest.mark.parametrize(
  "change",
  [
    {"prompt": "a dog"},
    {"negative": "music"},
    {"guidance": 5.0},
    {"spatial_guidance": 9.0},
    {"steps": 3},
    {"phase": "independent"},
  ],
)
def test_every_setting_changes_the_sound(films, reference, make, change):
  changed = sound(make(films / "left.mp4", video=False, **change))
  assert np.abs(changed - sound(reference)).max() > 1e-3


def test_a_blank_prompt_is_none(films, reference, make):
  np.testing.assert_array_equal(sound(make(films / "left.mp4", prompt=" ")), sound(reference))


def test_a_track_places_the_sound(films, make, tmp_path):
  delays = {}
  for name, azimuth in (("left", 50), ("right", -50)):
    track = tmp_path / f"{name}.json"
    track.write_text(json.dumps({"time_s": [0], "azimuth_deg": [azimuth]}))
    out = make(films / "left.mp4", out=name, localizer=f"track:{track}", video=False)
    delays[name] = about(out)["spatial"]["itd_xc_clip_us"]
    assert np.sign(np.mean(about(out)["descriptors"], axis=0)[0]) == -np.sign(azimuth)
  assert 200 < delays["left"] < 800 and -800 < delays["right"] < -200


def test_duration_format_and_no_video(films, make):
  out = make(films / "left.mp4", duration=0.5)
  assert sound(out).shape == (2, 8000)
  # A few more frames stay in, for the codec.
  assert 0.5 <= io.probe(out / "left.mp4").duration_s < 0.7 and about(out)["duration_s"] == 0.5
  out = make(films / "left.mp4", out="flac", format="flac", video=False)
  assert names(out) == ["left.flac", "left.json"]
  wav = sound(make(films / "left.mp4", out="wav", video=False))
  assert np.abs(sound(out, suffix="flac") - wav).max() <= 2**-23


def test_a_mirrored_video_runs_and_moves_to_the_other_side(films, make, tmp_path):
  frames = io.read_video(films / "left.mp4", 25)[:, :, ::-1]
  (tmp_path / "mirrored").mkdir()
  io.write_video(tmp_path / "mirrored" / "left.mp4", frames, 25)
  out = make(tmp_path / "mirrored" / "left.mp4")
  assert np.mean(about(out)["descriptors"], axis=0)[0] > 0.5
  assert sound(out).shape == (2, 20_480)


def test_a_video_longer_than_the_window_is_made_whole(model, make, tmp_path, capsys):
  path = tiny.film(tmp_path / "long.mp4", 3.0)
  out = make(path)
  wav = sound(out, "long")
  assert wav.shape == (2, 48_000) and len(about(out, "long")["descriptors"]) == 24
  level = np.sqrt(np.square(wav).reshape(2, 24, -1).mean(axis=(0, 2)))
  assert level.min() > 0.05 * level.max()  # No silence and no gap anywhere.
  jumps = np.abs(np.diff(wav, axis=1))
  for first in model.firsts(3.0)[1:]:  # A latent frame is 512 samples; no click where one begins.
    here = jumps[:, 512 * first - 256 : 512 * first + 256]
    assert here.max() < 12 * np.sqrt(np.square(jumps).mean())
  assert abs(io.probe(out / "long.mp4").duration_s - 3.0) <= 1 / 25
  windows = list(model.windows(path, 3.0, tiny.BASE))
  assert len(windows) == 4 and [w.first for w in windows] == model.firsts(3.0)
  assert "generating: 4/4" in capsys.readouterr().err  # Of its windows, not of one file.


@pytest.mark.parametrize("seconds", [0.04, 0.4])
def test_a_video_shorter_than_the_window_runs(make, tmp_path, seconds):
  out = make(tiny.film(tmp_path / "short.mp4", seconds, side=0.0))
  assert sound(out, "short").shape == (2, round(16_000 * seconds))
  assert abs(io.probe(out / "short.mp4").duration_s - seconds) <= 1 / 25
  assert about(out, "short")["spatial"]["ild_clip_db"] is not None


def test_a_silent_video_in_which_nothing_moves_runs(make, tmp_path):
  out = make(tiny.film(tmp_path / "still.mp4", still=True))
  assert not np.any(about(out, "still")["descriptors"]) and np.abs(sound(out, "still")).max() > 0.01


def test_a_turned_video_is_seen_upright(make, tmp_path):
  """Its display matrix decides what is left: stored at the top, shown on the left."""
  path = tmp_path / "turned.mp4"
  with av.open(str(path), "w") as output:
    stream = output.add_stream("libx264", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 96, "yuv420p"
    stream.set_display_rotation(90)
    for i in range(32):
      stored = np.full((96, 64, 3), 90, np.uint8)
      stored[4 + 3 * (i % 2) : 20 + 3 * (i % 2), 24:40] = 250
      output.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
    output.mux(stream.encode(None))
  shown = io.read_video(path, 25)[0].mean(axis=(0, 2))
  side = np.sign(shown[48:].mean() - shown[:48].mean())
  out = make(path)
  assert np.sign(np.mean(about(out, "turned")["descriptors"], axis=0)[0]) == side
  assert io.probe(out / "turned.mp4").rotation == io.probe(path).rotation != 0


def test_each_file_has_noise_of_its_own(films, make, monkeypatch):
  keys = []
  run = generator.Generator.sample
  monkeypatch.setattr(generator.Generator, "sample", lambda *a: keys.extend(a[2]) or run(*a))
  make(films, low_memory=True, video=False)
  make(films / "right.mp4", out="again", video=False)
  left, right, again = (jax.random.key_data(key).tolist() for key in keys)
  assert left != right and right == again


def test_low_memory_and_batches_give_the_same(films, reference, make, capsys):
  batch, single = make(films), make(films, out="single", low_memory=True)
  assert (
    names(batch)
    == names(single)
    == sorted(f"{stem}.{suffix}" for stem in ("left", "right") for suffix in ("json", "mp4", "wav"))
  )
  for stem in ("left", "right"):
    assert np.abs(sound(batch, stem) - sound(single, stem)).max() < 1e-4
  assert np.abs(sound(batch) - sound(reference)).max() < 1e-4
  assert "2 of 2 files are in" in capsys.readouterr().out
