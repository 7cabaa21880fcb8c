"""Where a given sound comes from: BEATs, ACL and CLIPSeg behind the localizers' interface."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from spatialv2a_jax import encoders, features, io, model_folder, tokenizer
from spatialv2a_jax.encoders import Encoders
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.models import acl, beats, spatial
from spatialv2a_jax.weights import Weights
from tests import tiny_mmaudio

pytest.importorskip("ftfy", reason="the tokenizer is in the extra `encoders`")

RATE = 16_000
SIDE = tiny_mmaudio.CLIPSEG.grid * tiny_mmaudio.CLIPSEG.patch
BEATS = beats.Config(
  embed=8, width=8, layers=4, heads=2, ffn=8, taps=8, groups=2, buckets=16, max_distance=40
)
ACL = acl.Config(inputs=8, width=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = {"beats": (beats, BEATS), "acl": (acl, ACL)}
  params = {name: tiny_mmaudio.shaken(*network, 9) for name, network in made.items()}
  params["acl"]["mask"] = {"slope": np.float32(10), "bias": np.float32(14)}
  config = {name: dataclasses.asdict(sizes) for name, (_, sizes) in made.items()}
  folder = tiny_mmaudio.save(tmp_path_factory.mktemp("sound") / "parts", ("clipseg",))
  model_folder.save_model(folder, params, {}, config)
  return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
  """A low tone of 1 s and a high one of 11 s, in stereo."""
  at, out = tmp_path_factory.mktemp("sounds"), []
  for seconds, hertz in ((1, 200), (11, 3000)):
    tone_p = 0.3 * np.sin(2 * np.pi * hertz * np.arange(seconds * RATE) / RATE)
    out.append(at / f"{hertz}.wav")
    io.write_audio(out[-1], np.stack([tone_p, 0 * tone_p]).astype(np.float32), RATE)
  return out


def open_encoders(folder, localizer, **options):
  config = features.Config(localizer=localizer, **options)
  return Encoders(config, Weights([model_folder.open_model(folder)], single=True))


def frames_of(count=2):
  rng = np.random.default_rng(0)
  return {"place": rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)}


def test_the_word_of_a_sound_goes_into_the_prompt(folder, sounds, monkeypatch):
  params = model_folder.load_model(folder).params
  ids = tokenizer.Tokenizer(tiny_mmaudio.MERGES)
  told = []

  def sound(_, word_bd, ids_w):
    told.append((word_bd, ids_w))
    return word_bd[:, : tiny_mmaudio.CLIPSEG.dim]

  def place(_, x_vyxc, e_of, shift):
    jax.debug.callback(lambda *given: told.append(given), e_of, shift)
    return jnp.zeros((len(x_vyxc), 5)), jnp.zeros((len(x_vyxc), 12, 20))

  monkeypatch.setattr(encoders, "read_place", lambda *_: (None, None, sound, place))
  identities = []
  for path in sounds:
    audio_p = io.read_audio(path, RATE, mono=True)[0]
    whole_1p = np.zeros((1, 10 * RATE), np.float32)
    whole_1p[0, : len(audio_p)] = audio_p[: 10 * RATE]
    heard = jax.jit(beats.build(BEATS).encode)(params["beats"], whole_1p)
    want_1d = jax.jit(acl.build(ACL).word)(params["acl"], heard)

    chosen = open_encoders(folder, f"acl:{path}")
    assert set(chosen.networks) == {"clipseg", "acl", "beats"}
    (stage,) = (s for s in chosen.stages("not heeded") if s.network == "clipseg")
    stage.encode(frames_of(), 0.25, 0.0)
    jax.effects_barrier()
    (word_1d, ids_w), (e_of, shift) = told[-2:]
    np.testing.assert_allclose(word_1d, want_1d, atol=1e-5)
    assert list(ids_w) == [ids.start, *ids.encode("A photo of"), ids.end]
    np.testing.assert_array_equal(e_of, word_1d[:, : tiny_mmaudio.CLIPSEG.dim])
    assert shift == pytest.approx(1.4)
    identities.append(stage.identity["sound"])
  assert abs(told[0][0] - told[2][0]).max() > 1e-3  # Another sound is another word,
  assert identities[0] != identities[1]  # which the cache knows.


def test_whatever_decides_the_place_is_in_what_the_cache_knows_it_by(folder, sounds, tmp_path):
  params = model_folder.load_model(folder).params["acl"]
  others = {
    "mask": params | {"mask": {"slope": np.float32(10), "bias": np.float32(15)}},
    "words": params | {"into": jax.tree.map(lambda x: x + 1, params["into"])},
  }
  for name, changed in others.items():
    shutil.copytree(folder, tmp_path / name)
    model_folder.save_model(tmp_path / name, {"acl": changed}, {}, {})

  def identity(at, localizer, **options):
    stages = open_encoders(at, localizer, **options).stages("")
    (stage,) = (s for s in stages if s.network == "clipseg")
    return json.dumps(stage.identity, sort_keys=True)

  by_sound = f"acl:{sounds[0]}"
  known = [
    identity(folder, "acl"), identity(folder, "acl", mirror_tta=True),
    identity(tmp_path / "mask", "acl"), identity(folder, by_sound),
    identity(tmp_path / "words", by_sound),
  ]  # fmt: skip
  assert len(set(known)) == len(known)


def test_bfloat16_is_near(folder, sounds):
  """BEATs' convolution of positions takes kernels of its input's kind."""
  words = []
  for dtype in ("float32", "bfloat16"):
    weights = Weights([model_folder.open_model(folder)], dtype=dtype, single=True)
    chosen = Encoders(features.Config(localizer=f"acl:{sounds[0]}"), weights)
    (stage,) = (s for s in chosen.stages("") if s.network == "clipseg")
    words.append(stage.encode(frames_of(), 0.25, 0.0)["spatial_vk"])
  np.testing.assert_allclose(*words, atol=0.05)


def test_mistakes_are_one_line(folder, sounds, tmp_path):
  with pytest.raises(UserError, match="none.wav: no such file; --localizer acl:FILE"):
    open_encoders(folder, "acl:none.wav")
  bare = tiny_mmaudio.save(tmp_path / "bare", ("clipseg",))
  with pytest.raises(MissingAssetError, match="weights of: beats.*spatialv2a convert beats FILE"):
    open_encoders(bare, f"acl:{sounds[0]}")
  narrow = dataclasses.replace(ACL, width=12)
  params = {"acl": tiny_mmaudio.shaken(acl, narrow, 9)}
  model_folder.save_model(tmp_path / "narrow", params, {}, {"acl": {**vars(narrow)}})
  models = [model_folder.open_model(at) for at in (tmp_path / "narrow", folder)]
  with pytest.raises(
    UserError, match="of .*narrow takes 8 features and gives 12, BEATs and CLIPSeg have 8 and 16"
  ):
    Encoders(features.Config(localizer=f"acl:{sounds[0]}"), Weights(models))  # The first has it.


@pytest.mark.slow
def test_mirrored_pictures_give_the_mirrored_condition(folder):
  """From frames to C_s, by a network whose learned positions are not symmetric."""
  frames, signs = frames_of(), np.array(spatial.MIRROR_SIGNS, np.float32)[None]
  mirrored = {"place": np.ascontiguousarray(frames["place"][:, :, ::-1])}

  def describe(x, **options):
    chosen = open_encoders(folder, "acl", **options)
    (stage,) = (s for s in chosen.stages("a dog") if s.network == "clipseg")
    return stage.encode(x, 0.25, 0.0)["spatial_vk"]

  seen, other = (describe(x, mirror_tta=True) for x in (frames, mirrored))
  np.testing.assert_allclose(other, seen * signs, atol=5e-6)
  assert abs(seen[:, 3]).max() > 1e-3
  assert abs(describe(mirrored) - describe(frames) * signs).max() > 1e-4  # By itself it is not.

  net, stats = (
    spatial.SpatialCondition(width=8, ffn=12),
    {"mean": np.zeros(8), "var": np.full(8, 1e-6)},
  )
  none_b, options = np.zeros(1, bool), {"latent_len": 5, "train": False}
  weights = nn.unbox(net.init(jax.random.key(0), seen[None], stats, none_b, ~none_b, **options))

  def condition(d_vk):
    return np.asarray(net.apply(weights, d_vk[None], stats, none_b, ~none_b, **options)[0])

  np.testing.assert_allclose(condition(other), condition(seen * signs), atol=1e-5)
  assert abs(condition(other) - condition(seen)).max() > 1e-4
