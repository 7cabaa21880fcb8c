"""Generating from arrays: places in a batch, windows, joins, and folders that hold no model."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from spatialv2a_jax import generator, io, schema, tensors, windows
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.generator import Generator, Window
from spatialv2a_jax.model_folder import load_model, save_model
from tests import tiny

SETTINGS = tiny.BASE
FULL_SCALE = 1.0


def window_of(model, number, first=0):
  """A window whose features are noise."""
  rng = np.random.default_rng(number)
  n = schema.lengths(model.seconds, model.audio)
  sizes = {"clip_vf": (n.clip, 16), "sync_sf": (n.sync, 16), "spatial_vk": (n.clip, 5)}
  features = {name: rng.standard_normal(size).astype("f4") for name, size in sizes.items()}
  features["heat_vyx"] = np.zeros((n.clip, 12, 20), np.uint8)
  return Window(first, features)


def test_a_clip_ignores_its_place_in_the_batch(model):
  all_8 = [window_of(model, i) for i in range(8)]
  keys = list(jax.random.split(jax.random.key(3), 8))
  alone = model.sample(all_8[5:6], keys[5:6], SETTINGS, rows=1)[0]
  together = model.sample(all_8, keys, SETTINGS, rows=8)
  backwards = model.sample(all_8[::-1], keys[::-1], SETTINGS, rows=8)[::-1]
  padded = model.sample(all_8[5:7], keys[5:7], SETTINGS, rows=8)
  sound = [
    model.clip(all_8[5:6], x, model.seconds, "shared").audio_ep
    for x in (alone, together[5], backwards[5], padded[0])
  ]
  assert np.abs(sound[0]).max() > 0.01
  for other in sound[1:]:
    assert np.abs(other - sound[0]).max() < 1e-4 * FULL_SCALE
  assert np.abs(together[4] - alone).max() > 0.1


@pytest.mark.slow
def test_a_long_clip_ignores_how_many_windows_run_at_once(model, monkeypatch):
  firsts = model.firsts(2.5)
  pieces = [window_of(model, i, first) for i, first in enumerate(firsts)]
  assert len(pieces) == 3
  shares = []
  together = model.latents(pieces, jax.random.key(5), SETTINGS, shares.append)
  assert together.shape == (2, firsts[-1] + model.frames, 20)
  assert len(shares) == tiny.STEPS and sum(shares) == pytest.approx(1)
  single = model.latents(
    pieces, jax.random.key(5), dataclasses.replace(SETTINGS, low_memory=True), shares.append
  )
  assert np.abs(together - single).max() < 1e-4 and len(shares) == tiny.STEPS * 4
  # Where it has no neighbour, the first step of a window is that of the window alone.
  once = dataclasses.replace(SETTINGS, steps=1)
  clip = model.latents(pieces, jax.random.key(5), once)
  (alone,) = model.sample(pieces[:1], [jax.random.key(5)], once, rows=1)
  np.testing.assert_allclose(clip[:, :10], alone[:, :10], atol=1e-4)
  assert np.abs(clip[:, 25 : model.frames] - alone[:, 25:]).max() > 0.01


def test_noise_is_the_clips_own_and_goes_on_from_window_to_window(model):
  key = jax.random.key(1)
  first, second = np.asarray(model.noise(key, 0)), np.asarray(model.noise(key, 13))
  assert first.shape == (2, model.frames, 20)
  np.testing.assert_array_equal(first[:, 13:], second[:, :-13])
  correlation = np.corrcoef(first[0].ravel(), first[1].ravel())[0, 1]
  assert abs(correlation - model.correlation) < 0.1


@pytest.mark.parametrize("seconds", [0.05, 0.5, 1.28, 1.3, 2.0, 3.0, 60.0])
def test_windows_cover_the_clip_and_overlap(model, seconds):
  firsts = model.firsts(seconds)
  total = int(np.ceil(seconds * model.audio.latent_rate))
  alone = seconds <= model.seconds + generator.SLACK_SECONDS
  assert firsts[0] == 0 and firsts[-1] + model.frames == (model.frames if alone else total)
  steps = np.diff(firsts)
  assert (steps > 0).all() and (steps <= model.frames // 2 + 1).all()
  assert (len(firsts) == 1) == alone


def test_windows_of_a_trained_model_overlap_by_a_second(model, monkeypatch):
  monkeypatch.setattr(model, "frames", 250)
  assert model.firsts(8.0) == model.firsts(8.008) == model.firsts(8.04) == [0]  # Film at 29.97.
  firsts = model.firsts(30.0)
  assert (np.diff(firsts) <= 250 - 31).all() and len(firsts) == 5


def test_a_cross_fade_keeps_what_agrees_and_is_smooth():
  rng = np.random.default_rng(0)
  whole = rng.standard_normal((2, 50, 3)).astype(np.float32)
  firsts = [0, 13, 26, 30]
  pieces = [whole[:, at : at + 20] for at in firsts]
  np.testing.assert_allclose(generator.cross_fade(firsts, pieces), whole, atol=1e-6)
  np.testing.assert_array_equal(generator.cross_fade([0], pieces[:1]), pieces[0])
  steps = generator.cross_fade([0, 10], [np.zeros((1, 20, 1)), np.ones((1, 20, 1))])[0, :, 0]
  assert not steps[:10].any() and (steps[20:] == 1).all()
  assert (np.diff(steps) >= 0).all() and np.diff(steps).max() < 0.15


@pytest.mark.parametrize("firsts, fade", [([0, 3], 4), ([0, 16], 4), ([0, 10, 20], 10), ([0], 4)])
def test_windows_own_what_is_theirs_and_share_the_middle_of_the_overlap(firsts, fade):
  length, total = 20, np.zeros(firsts[-1] + 20)
  share_wn = windows.shares(firsts, length, fade)
  for first, share_n in zip(firsts, share_wn, strict=True):
    total[first : first + length] += share_n
    assert ((share_n > 0) & (share_n < 1)).sum() <= 2 * fade
  np.testing.assert_allclose(total, 1, atol=1e-6)
  for w, (a, b) in enumerate(zip(firsts[:-1], firsts[1:], strict=True)):
    middle = (b + a + length) // 2
    assert (share_wn[w, middle - a + (fade + 1) // 2 :] == 0).all()
    assert (share_wn[w + 1, : middle - b - fade // 2] == 0).all()


def test_joined_windows_of_the_same_latents_sound_as_one(model):
  """The decoder sees a window at a time, so that memory does not grow with the clip."""
  rng = np.random.default_rng(0)
  firsts = model.firsts(3.0)
  z_etc = rng.standard_normal((2, firsts[-1] + model.frames, 20)).astype(np.float32)
  mels = model.mels(firsts, z_etc)
  assert mels.shape == (2, 80, 2 * z_etc.shape[1])
  single = model.mels([0], z_etc[:, : model.frames])
  edge = 2 * firsts[1]  # Up to where the second window begins; the last one alone has the end.
  np.testing.assert_allclose(mels[..., :edge], single[..., :edge], atol=1e-4)
  last = model.mels([0], z_etc[:, firsts[-1] :])
  edge = 2 * (firsts[-2] + model.frames)
  np.testing.assert_allclose(mels[..., edge:], last[..., edge - 2 * firsts[-1] :], atol=1e-4)


def test_sound_has_the_length_of_the_clip_to_the_sample(model):
  z_etc = np.random.default_rng(0).standard_normal((2, model.frames, 20)).astype(np.float32)
  for seconds in (0.04, 0.333, 1.28, 1.34):  # The last one is in the slack, where nothing is mute.
    clip = model.clip([window_of(model, 0)], z_etc, seconds, "shared")
    assert np.abs(clip.audio_ep[:, -400:]).max() > 1e-3
    assert clip.audio_ep.shape == (2, round(16000 * seconds)) and clip.audio_ep.dtype == np.float32
    assert len(clip.descriptors_vk) == len(clip.heat_vyx) == max(1, int(8 * seconds))


def test_descriptors_of_joined_windows_come_from_the_latest(model):
  both = [window_of(model, i, first) for i, first in enumerate((0, 20))]
  for i, window in enumerate(both):
    window.features["spatial_vk"][:] = i + np.arange(10)[:, None] / 100
  z_etc = np.zeros((2, model.frames + 20, 20), np.float32)
  shown = model.clip(both, z_etc, 1.92, "shared").descriptors_vk[:, 0]
  # The second window begins after 0.64 s: the first frame whose middle lies in it is the sixth.
  np.testing.assert_allclose(shown[:5], np.arange(5) / 100, atol=1e-6)
  np.testing.assert_allclose(shown[5:], 1 + np.arange(10) / 100, atol=1e-6)


def test_azimuths_are_those_of_frames_in_which_something_is_seen():
  audio = schema.AUDIO["16k"]
  descriptors = np.zeros((8, 5), np.float32)
  time_v = (np.arange(8) + 0.5) / 8
  assert generator.azimuths(descriptors, time_v, 62, audio) is None
  descriptors[2:6, 1] = 0.1
  descriptors[2:6, 0] = [-1, -0.5, 0.5, 1]
  azimuth_n = generator.azimuths(descriptors, time_v, 62, audio)
  assert azimuth_n is not None
  assert azimuth_n[0] == 60 and azimuth_n[-1] == -60 and (np.diff(azimuth_n) <= 0).all()
  assert abs(azimuth_n[30]) < 8


def test_true_sound_has_latents_of_the_same_shape(model):
  audio_ep = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 30_000)).astype(np.float32)
  assert model.encode(audio_ep, 0).shape == (2, model.frames, 20)
  short = model.encode(audio_ep, 20)  # Silence fills up what is missing.
  assert short.shape == (2, model.frames, 20) and np.isfinite(short).all()
  rest_ep = audio_ep[:, 20 * 2 * model.audio.hop :]
  np.testing.assert_array_equal(short, model.encode(rest_ep, 0))


def test_one_call_makes_the_sound_of_a_file_or_of_frames_in_memory(model, tmp_path):
  """What `generate` writes of the same file, see there."""
  path = tiny.film(tmp_path / "x.mp4", 0.8, side=0.1)
  by_file = model.generate(path, SETTINGS)
  frames = io.Frames(io.read_video(path, 25), 25)
  by_frames, again = model.generate(frames, SETTINGS), model.generate(frames, SETTINGS)
  np.testing.assert_array_equal(by_frames.audio_ep, again.audio_ep)
  assert by_frames.audio_ep.shape == by_file.audio_ep.shape == (2, 12_800)
  # They show the same and have noise of their own.
  np.testing.assert_allclose(by_frames.descriptors_vk, by_file.descriptors_vk, atol=1e-6)
  assert np.abs(by_frames.audio_ep - by_file.audio_ep).max() > 0.01
  cut = dataclasses.replace(SETTINGS, duration=0.4)
  assert model.generate(frames, cut).audio_ep.shape == (2, 6_400)
  assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("most, seconds", [(None, 1.28), (0.5, 0.5), (9.0, 1.28)])
def test_a_video_gets_sound_for_its_length_or_for_less(most, seconds):
  assert windows.length(io.Frames(np.zeros((32, 4, 4, 3), np.uint8), 25), most) == seconds


def test_a_short_video_holds_its_last_frame(model, tmp_path):
  path = tiny.film(tmp_path / "x.mp4", 0.4, side=0.1)
  (window,) = model.windows(path, 0.4, SETTINGS)
  spatial_vk, clip_vf = window.features["spatial_vk"], window.features["clip_vf"]
  assert len(spatial_vk) == 10 and (spatial_vk[:, 0] < 0).all()
  np.testing.assert_allclose(clip_vf[4:], np.repeat(clip_vf[4:5], 6, axis=0), atol=1e-6)
  assert np.abs(clip_vf[3] - clip_vf[4]).max() > 1e-3


def test_a_window_sees_what_the_film_shows_from_there_on(model, tmp_path):
  path = tiny.film(tmp_path / "x.mp4", 2.56)
  pixels = io.read_video(path, 25)

  def alike(window, at, count):
    (alone,) = model.windows(io.Frames(pixels[at : at + count], 25), count / 25, SETTINGS)
    assert window.features.keys() == alone.features.keys()
    for name, x in window.features.items():
      np.testing.assert_array_equal(x, alone.features[name], name)

  whole = model.windows(path, 2.56, SETTINGS)
  assert [window.first for window in whole] == [0, 20, 40]
  for window, at in zip(whole, (0, 16, 32), strict=True):
    alike(window, at, 32)
  alike(*model.windows(path, 0.64, SETTINGS), 0, 16)  # What comes later shall not be heard.


def test_a_track_goes_on_from_window_to_window(model, tmp_path):
  track = tmp_path / "track.csv"
  track.write_text("time_s,azimuth_deg\n0,40\n2.56,-40\n")
  settings = dataclasses.replace(SETTINGS, localizer=f"track:{track}")
  for window in model.windows(tiny.film(tmp_path / "x.mp4", 2.56), 2.56, settings):
    time_v = window.first / model.audio.latent_rate + (np.arange(10) + 0.5) / 8
    azimuth_v = np.interp(time_v, [0, 2.56], [40, -40])
    np.testing.assert_allclose(window.features["spatial_vk"][:, 0], -azimuth_v / 60, atol=0.04)


# --- folders that hold no usable model ------------------------------------------------------------


def edited(folder, tmp_path, **entries):
  copy = tmp_path / "edited"
  shutil.copytree(folder, copy)
  about = json.loads((copy / "config.json").read_text())
  about = {k: v for k, v in (about | entries).items() if v is not None}
  (copy / "config.json").write_text(json.dumps(about))
  return copy


@pytest.mark.parametrize(
  "entries",
  [
    {"audio": None},
    {"audio": "48k"},
    {"seconds": 0.1},
    {"seconds": "long"},
    {"features": {"colour": 1}},
    {"flow": None},
    {"flow": {"width": 33, "heads": 2}},
    {"vae": {"depth": 3}},
  ],
)
def test_a_config_of_another_kind_is_one_line(model_folder, tmp_path, entries):
  with pytest.raises(UserError, match="config.json describes no model") as caught:
    Generator(edited(model_folder, tmp_path, **entries))
  assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("name, sizes", [("vae", {"width": 8}), ("flow", {"clip_dim": 17})])
def test_weights_that_do_not_fit_the_config_are_refused(model_folder, tmp_path, name, sizes):
  about = json.loads((model_folder / "config.json").read_text())
  folder = edited(model_folder, tmp_path, **{name: about[name] | sizes})
  with pytest.raises(UserError, match=f"{name}.safetensors has other shapes"):
    Generator(folder)


def test_a_folder_with_half_a_model_is_a_missing_asset(model_folder, tmp_path):
  held = load_model(model_folder)
  save_model(tmp_path / "half", {"vae": held.params["vae"]}, {}, held.config)
  with pytest.raises(MissingAssetError, match="holds no weights of: flow"):
    Generator(tmp_path / "half")
  # Converted encoders say nothing of the sound; the network that does is the one to be named.
  save_model(tmp_path / "parts", {"clip": {"x": np.zeros(1)}}, {}, {})
  with pytest.raises(MissingAssetError, match="weights of: flow.*spatialv2a convert mmaudio"):
    Generator(tmp_path / "parts")


def test_the_codec_is_not_rounded_by_matrix_units(model):
  """They make products in bfloat16 unless the program says otherwise."""
  z_etc = np.zeros((2, model.frames, model.audio.latent_channels), np.float32)
  text = model._decode.lower(model.weights.take("vae"), z_etc).as_text()
  assert "convolution" in text and "HIGHEST" in text and "DEFAULT" not in text


def test_a_network_that_joins_a_folder_during_another_s_writing_stays(tmp_path, monkeypatch):
  """Two conversions at once; the first to begin wrote the config it had read then."""
  write, folder = tensors.write, tmp_path / "model"

  def slow(path, arrays):
    if "big" in str(path):
      save_model(folder, {"small": {"x": np.zeros(1)}}, {}, {"small": {"sizes": 1}})
    return write(path, arrays)

  monkeypatch.setattr(tensors, "write", slow)
  save_model(folder, {"big": {"x": np.ones(1)}}, {}, {"big": {"sizes": 2}})
  both = load_model(folder)
  assert set(both.params) == {"big", "small"} and both.config["small"] == {"sizes": 1}


def test_what_was_said_of_a_network_goes_when_it_is_replaced(tmp_path):
  first = {"flow": {"width": 1}, "flow_source": {"licence": "theirs"}, "vae_source": 3, "audio": 0}
  save_model(tmp_path, {"flow": {"x": np.zeros(1)}}, {}, first)
  save_model(tmp_path, {"flow": {"x": np.ones(1)}}, {}, {"flow": {"width": 2}})
  assert load_model(tmp_path).config == {"flow": {"width": 2}, "vae_source": 3, "audio": 0}


def test_a_model_folder_changes_as_a_whole_its_config_last(tmp_path, monkeypatch):
  def save(value):
    save_model(tmp_path, {"a": {"x": value}, "b": {"x": value}}, {}, {})

  def held():
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def full(path, arrays):
    if path.name.startswith(".b."):
      raise OSError(errno.ENOSPC, "No space left on device")
    return write(path, arrays)

  save(np.zeros(3))
  before, write, replace, named = held(), tensors.write, os.replace, []
  with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
    patch.setattr(tensors, "write", full)
    save(np.ones(3))
  assert held() == before
  monkeypatch.setattr(
    os, "replace", lambda at, to: named.append(pathlib.Path(to).name) or replace(at, to)
  )
  save(np.ones(3))
  assert sorted(named[:2]) == ["a.safetensors", "b.safetensors"] and named[2:] == ["config.json"]
