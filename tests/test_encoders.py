"""Trained encoders behind one interface: groups, devices, precision, sampling, missing parts."""

import dataclasses
import json
import math
import shutil
from fractions import Fraction

import jax
import numpy as np
import pytest

from spatialv2a_jax import encoders, features, io, model_folder, schema
from spatialv2a_jax.encoders import Encoders
from spatialv2a_jax.errors import DamagedAssetError, MissingAssetError, UserError
from spatialv2a_jax.models import clip, flow_net, localizer, synchformer
from spatialv2a_jax.weights import Weights
from tests import tiny, tiny_mmaudio
from tests.tiny_mmaudio import SECONDS, open_encoders, read

pytest.importorskip("ftfy", reason="the tokenizer is in the extra `encoders`")

NAMES = ("clip_vf", "sync_sf", "spatial_vk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  names = ("clip", "synchformer", "clipseg")
  return tiny_mmaudio.save(tmp_path_factory.mktemp("encoders") / "parts", names)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  at = tmp_path_factory.mktemp("films")
  return [
    tiny.film(at / f"{i}.mp4", 1.2, seed=i, side=i / 7, size=(72 + 8 * i, 128)) for i in range(7)
  ]


@pytest.fixture(scope="module")
def plain(folder):
  return open_encoders(folder)


@pytest.fixture(scope="module")
def alone(plain, films):
  return [read(plain, film) for film in films]


def test_features_have_the_shapes_of_the_schema(plain, alone):
  shapes = schema.feature_shapes(
    SECONDS, schema.AUDIO["16k"], clip_dim=16, sync_dim=24, text_len=77, text_dim=16
  )
  for name, want in (("clip_vf", "clip"), ("sync_sf", "sync"), ("spatial_vk", "spatial")):
    assert alone[0][name].shape == shapes[want] and alone[0][name].dtype == np.float32
  assert alone[0]["heat_vyx"].shape == (7, 12, 20) and alone[0]["heat_vyx"].dtype == np.uint8
  text = plain.text("a dog barks")
  assert text.shape == shapes["text"]
  np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(alone[0]["clip_vf"], axis=1), 1, atol=1e-5)


def close(got, want):
  """Features within 1e-5; places too, but for pixels on the edge of the mask that may flip."""
  for name in ("clip_vf", "sync_sf"):
    np.testing.assert_allclose(got[name], want[name], atol=1e-5)
  assert np.abs(got["heat_vyx"].astype(int) - want["heat_vyx"].astype(int)).max() <= 1
  assert np.median(np.abs(got["spatial_vk"] - want["spatial_vk"])) < 1e-5


@pytest.mark.slow
def test_a_batch_of_seven_gives_what_each_clip_gives_alone(folder, plain, films, alone):
  """Also: the networks get frames that io samples and resizes as MMAudio does."""
  params = model_folder.load_model(folder).params
  views = {
    "clip": io.View(8, size=(28, 28)),
    "sync": io.View(25, short_side=32, crop=32),
    "place": io.View(8, size=(96, 96)),
  }
  frames = [io.read_views(film, views, duration=SECONDS) for film in films]
  look, follow, place = (np.stack([f[name] for f in frames]) for name in views)
  look, place = (x[:, :7].reshape(-1, *x.shape[2:]) for x in (look, place))
  ids_bw = plain._ids(localizer.prompts("a dog"), "clipseg")
  _, text, _, find = encoders.read_place(tiny_mmaudio.CLIPSEG)
  e_of = text(params["clipseg"], ids_bw)
  spatial_vk, heat_vyx = find(params["clipseg"], place, e_of, localizer.SHIFT)
  read_sync = jax.jit(synchformer.build(tiny_mmaudio.SYNC).encode)
  together = {
    "clip_vf": encoders.read_image(tiny_mmaudio.CLIP)(params["clip"]["image"], look),
    "sync_sf": read_sync(params["synchformer"], follow),
    "spatial_vk": spatial_vk,
    "heat_vyx": heat_vyx,
  }
  want = {name: np.stack([one[name] for one in alone]) for name in together}
  close({name: np.reshape(x, want[name].shape) for name, x in together.items()}, want)
  assert np.abs(alone[0]["clip_vf"] - alone[6]["clip_vf"]).max() > 1e-3


def test_the_order_of_clips_does_not_matter(plain, films, alone):
  for film, one in [*zip(films, alone, strict=True)][::-3]:
    again = read(plain, film)
    for name in NAMES:
      np.testing.assert_array_equal(one[name], again[name])


@pytest.mark.parametrize("count", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_clip_gives_the_same_bits_alone_and_among_others(folder, plain, films, alone, count):
  """On one device and on eight."""
  spread = plain if count == 1 else open_encoders(folder, devices=jax.devices()[:count])
  clips = []
  for film in films:
    stages = spread.stages("a dog")
    views = {name: view for stage in stages for name, view in stage.views.items()}
    frames = io.read_views(film, views, duration=SECONDS)
    clips.append((stages, {n: x[: 24 if n == "sync" else 7] for n, x in frames.items()}))
  for got, want in zip(spread.encode(clips, SECONDS), alone, strict=True):
    for name in (*NAMES, "heat_vyx"):
      np.testing.assert_array_equal(got[name], want[name], strict=True)
  params = spread.weights.take("clip", "image", spread._whole)
  assert all(len(leaf.devices()) == count for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_bfloat16_halves_the_weights_and_stays_close(folder, films, alone):
  half = open_encoders(folder, dtype="bfloat16", localizer="motion")
  got = read(half, films[1])

  def size(encoders, name):
    return sum(x.nbytes for x in jax.tree.leaves(encoders.weights.take(name)))

  assert size(half, "synchformer") < 0.55 * size(open_encoders(folder), "synchformer")
  for name in ("clip_vf", "sync_sf"):
    error = np.abs(got[name] - alone[1][name]).max()
    assert 1e-5 < error < 0.02 * np.abs(alone[1][name]).max()


def test_the_prompt_decides_what_is_looked_for(plain, films, alone):
  other = read(plain, films[0], "a train")
  assert np.abs(other["spatial_vk"] - alone[0]["spatial_vk"]).max() > 1e-4
  for name in ("clip_vf", "sync_sf"):
    np.testing.assert_array_equal(other[name], alone[0][name])
  without = read(plain, films[0], "")  # The picture as a whole is then what is looked for.
  assert np.abs(without["spatial_vk"] - alone[0]["spatial_vk"]).max() > 1e-4
  np.testing.assert_array_equal(without["spatial_vk"], read(plain, films[0], " ,")["spatial_vk"])


def test_synonyms_are_one_sound_of_their_mean_embedding(plain, monkeypatch):
  told = []

  def run(what, function, params, x, e_of, shift):
    told.append(e_of)
    return [(np.zeros((7, 5)), np.zeros((7, 12, 20)))]

  monkeypatch.setattr(plain, "_run", run)
  for prompt in ("dog", "cat", "dog, cat"):
    plain.stages(prompt)[-1].encode({"place": np.zeros((7, 96, 96, 3), np.uint8)}, SECONDS, 0.0)
  dog, cat, both = told
  assert both.shape == dog.shape == (1, tiny_mmaudio.CLIPSEG.dim) and abs(dog - cat).max() > 1e-3
  np.testing.assert_allclose(both, (dog + cat) / 2, atol=1e-5)


@pytest.mark.parametrize("encoder", ["mmaudio", "random"])
def test_the_start_of_a_window_places_its_track(plain, tmp_path, encoder):
  path = tmp_path / "track.json"
  path.write_text(json.dumps({"time_s": [0, 10], "azimuth_deg": [50, -50]}))
  config = dataclasses.replace(plain.config, encoder=encoder, localizer=f"track:{path}")
  stage = Encoders(config, plain.weights).stages()[-1]
  frames = {"frames": np.zeros((24, 48, 80, 3), np.uint8)}
  early, late = (stage.encode(frames, SECONDS, start)["spatial_vk"][:, 0] for start in (0.0, 9.0))
  assert (early < -0.5).all() and (late > 0.5).all()


def test_acls_own_shift_is_used_where_its_weights_are(plain, folder, films, alone, tmp_path):
  mask = {"slope": np.float32(4), "bias": np.float32(8)}
  model_folder.save_model(tmp_path / "acl", {"acl": {"mask": mask}}, {}, {})
  models = [model_folder.open_model(at) for at in (folder, tmp_path / "acl")]
  calibrated = Encoders(plain.config, Weights(models))
  assert calibrated.networks == [*plain.networks, "acl"]
  heat = read(calibrated, films[0])["heat_vyx"].astype(int)
  assert (heat >= alone[0]["heat_vyx"]).all() and (heat > alone[0]["heat_vyx"] + 5).any()


def test_only_one_network_is_held_when_asked(folder, films):
  encoders = open_encoders(folder, single=True)
  before = sum(x.nbytes for x in jax.live_arrays())
  sizes, held = {}, {}
  for stage in encoders.stages("a dog"):
    encoders.read(films[0], [stage], SECONDS)
    held[stage.network] = sum(x.nbytes for x in jax.live_arrays()) - before
    params = encoders.weights.model(stage.network).params[stage.network]
    part = params["image"] if stage.network == "clip" else params
    sizes[stage.network] = sum(x.nbytes for x in jax.tree.leaves(part))
  encoders.text("a dog")
  text = model_folder.open_model(folder).params["clip"]["text"]
  assert list(sizes) == ["clip", "synchformer", "clipseg"]
  for network, size in sizes.items():
    assert size <= held[network] < size + 50_000  # And a few results.
  after = sum(x.nbytes for x in jax.live_arrays()) - before
  assert after < sum(x.nbytes for x in jax.tree.leaves(text)) + 50_000
  encoders.weights.drop()
  assert sum(x.nbytes for x in jax.live_arrays()) - before < 50_000


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "25", "30", "60", "12"])
def test_eight_seconds_give_all_frames_at_any_rate(tmp_path, monkeypatch, folder, rate):
  """MMAudio's own reader gets 199 of 200 frames from such files and shortens the clip."""
  count = int(8 * Fraction(rate))  # As files of 8 s have it; 23.976 gives 191 frames, 7.97 s.
  pictures = np.zeros((count, 32, 32, 3), np.uint8)
  pictures[:, :, :, 0] = np.linspace(0, 255, count).astype(np.uint8)[:, None, None]
  io.write_video(tmp_path / "x.mp4", pictures, Fraction(rate))
  seen = {}

  def keep(name):
    def run(what, function, params, x, *rest):
      (seen[name],) = x
      return [np.zeros((len(seen[name]), 8, 4), np.float32)]

    return run

  encoders_ = open_encoders(folder, localizer="motion")
  for stage in encoders_.stages()[:2]:
    monkeypatch.setattr(encoders_, "_run", keep(stage.network))
    encoders_.read(tmp_path / "x.mp4", [stage], 8.0)
  assert seen["clip"].shape == (64, 28, 28, 3) and seen["synchformer"].shape[:2] == (24, 16)
  want = np.linspace(0, 255, count)
  for name, fps, got in (
    ("clip", 8, seen["clip"][:, 14, 14, 0]),
    ("sync", 25, seen["synchformer"][:, :8, 14, 14, 0].ravel()),
  ):
    at = [min(math.ceil(Fraction(k, fps) * Fraction(rate)), count - 1) for k in range(len(got))]
    error = np.abs(got.astype(float) - want[at])
    assert error.max() < 6, name  # The codec's; a frame further would be 2 to 5 more.
    assert error.mean() < 2


def test_a_video_that_is_too_short_holds_its_last_frame(plain, tmp_path):
  film = tiny.film(tmp_path / "x.mp4", 0.4)
  stage = encoders.Stage("", features.views(), {}, lambda frames, *_: dict(frames))
  seen = plain.read(film, [stage], SECONDS)["frames"]
  assert len(seen) == 24 and abs(seen[9].astype(int) - seen[0]).max() > 50
  np.testing.assert_array_equal(seen[10:], np.repeat(seen[9:10], 14, axis=0))


def test_frames_are_squashed_for_clip_and_cropped_for_synchformer(folder):
  look, follow, place = open_encoders(folder).stages("x")
  assert look.views == {"clip": io.View(8, size=(28, 28))}
  assert follow.views == {"sync": io.View(25, short_side=32, crop=32)}
  assert place.views == {"place": io.View(8, size=(96, 96))}
  full = clip.Config()
  assert clip.frame_size(full) == (384, 384)  # 378 would be other pixels.


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "synchformer", "clipseg"])
def test_a_missing_network_says_the_command_that_makes_it(folder, tmp_path, name):
  about = json.loads((folder / "config.json").read_text())
  shutil.copytree(folder, tmp_path / "m")
  del about["sha256"][name]
  (tmp_path / "m" / "config.json").write_text(json.dumps(about))
  with pytest.raises(MissingAssetError, match=f"spatialv2a convert {name} FILE --out") as caught:
    open_encoders(tmp_path / "m")
  assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
  parts = [model_folder.open_model(tmp_path / "m"), model_folder.open_model(folder)]
  Encoders(features.Config("mmaudio", 0, 16, 24, 16, 77, "acl"), Weights(parts))


def test_damaged_weights_are_not_the_fault_of_a_film(folder, films, tmp_path):
  shutil.copytree(folder, tmp_path / "m")
  file = tmp_path / "m" / "synchformer.safetensors"
  raw = bytearray(file.read_bytes())
  raw[-1] ^= 1
  file.write_bytes(raw)
  damaged = open_encoders(tmp_path / "m", localizer="motion")
  with pytest.raises(DamagedAssetError, match="synchformer.safetensors is damaged"):
    read(damaged, films[0])


def test_weights_of_other_sizes_are_refused(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "m")
  about = json.loads((tmp_path / "m" / "config.json").read_text())
  about["clip"]["image_layers"] = 3
  (tmp_path / "m" / "config.json").write_text(json.dumps(about))
  with pytest.raises(UserError, match="clip.safetensors has other shapes"):
    open_encoders(tmp_path / "m")
  about["clip"]["colour"] = 3
  (tmp_path / "m" / "config.json").write_text(json.dumps(about))
  with pytest.raises(UserError, match="config.json describes no clip of this version: .*colour"):
    open_encoders(tmp_path / "m")
  with pytest.raises(UserError, match=r"give features of \(16, 24, 16, 77\), the flow network"):
    Encoders(features.Config("mmaudio"), Weights([model_folder.open_model(folder)]))


def test_an_unknown_encoder_is_refused(folder):
  weights = Weights([model_folder.open_model(folder)])
  with pytest.raises(UserError, match="unknown encoder 'clap', have: mmaudio, random"):
    Encoders(dataclasses.replace(features.Config(), encoder="clap"), weights)
  with pytest.raises(
    UserError, match="unknown localizer 'bat', have: acl, acl:FILE, motion, track:FILE"
  ):
    Encoders(features.Config(localizer="bat"), weights)


@pytest.mark.parametrize("dtype, activations", [("float32", "float32"), (None, "bfloat16")])
def test_a_network_in_float32_has_no_narrower_activations(tmp_path, dtype, activations):
  """Configs of training say bfloat16 for both."""
  config = {"flow": {"dtype": "bfloat16", "activations": "bfloat16", "width": 64, "heads": 2}}
  model = model_folder.save_model(tmp_path, {"flow": {"x": np.ones(1, "f4")}}, {}, config)
  sizes = Weights([model], dtype=dtype).sizes("flow", flow_net.Config)
  assert (sizes.dtype, sizes.activations) == (dtype or "bfloat16", activations)
