"""Where a given sound comes from: BEATs, ACL and CLIPSeg behind the localizers' interface."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import checkpoint, features, io, tokenizer
from spatialv2a_jax.encoders import Encoders
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.models import acl, beats, localizer, spatial
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
  made = {"beats": (BEATS, beats.build(BEATS).init), "acl": (ACL, acl.build(ACL).init)}
  params = {name: tiny_mmaudio.shaken(init, 9) for name, (_, init) in made.items()}
  params["acl"]["mask"] = {"slope": np.float32(10), "bias": np.float32(14)}
  config = {name: dataclasses.asdict(sizes) for name, (sizes, _) in made.items()}
  folder = tiny_mmaudio.save(tmp_path_factory.mktemp("sound") / "parts", ("clipseg",))
  checkpoint.save_model(folder, params, {}, config)
  return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
  """A low tone of 1 s and a high one of 11 s, in stereo."""
  at, out = tmp_path_factory.mktemp("sounds"), []
  for seconds, hertz in ((1, 200), (11, 3000)):
    tone_p = 0.3 * np.sin(2 * np.pi * hertz * np.arange(seconds * RATE) / RATE)
    out.append(at / f"{hertz}.wav")
    io.write_audio(out[-1], np.stack([tone_p, tone_p]).astype(np.float32), RATE)
  return out


def open_encoders(folder, localizer, **options):
  config = features.Config(localizer=localizer, **options)
  return Encoders(config, Weights([checkpoint.open_model(folder)], single=True))


def frames_of(count=2):
  rng = np.random.default_rng(0)
  return {"place": rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)}


def test_maps_are_those_of_the_embedding_of_the_sound(folder, sounds):
  params = checkpoint.load_model(folder).params
  net, ids = localizer.build(tiny_mmaudio.CLIPSEG), tokenizer.Tokenizer(tiny_mmaudio.MERGES)
  prompt_w = np.array([ids.start, *ids.encode("A photo of"), ids.end])
  found = []
  for path in sounds:
    audio_p = io.read_audio(path, RATE, mono=True)[0]
    whole_1p = np.zeros((1, 10 * RATE), np.float32)
    whole_1p[0, : len(audio_p)] = audio_p[: 10 * RATE]
    heard = jax.jit(beats.build(BEATS).encode)(params["beats"], whole_1p)
    word_bd = acl.build(ACL).word(params["acl"], heard)
    e_of = net.sound(params["clipseg"], word_bd, jnp.asarray(prompt_w))
    heat = jax.jit(net.heat)(params["clipseg"], frames_of()["place"], e_of, 1.4)
    want_bvk, valid_bv = spatial.descriptors(heat[None])
    assert valid_bv.all()

    encoders = open_encoders(folder, f"acl:{path}")
    assert set(encoders.networks) == {"clipseg", "acl", "beats"}
    (stage,) = (s for s in encoders.stages() if s.network == "clipseg")
    got = stage.encode(frames_of(), 0.25, 0.0)["spatial_vk"]
    np.testing.assert_allclose(got, want_bvk[0], atol=1e-5)
    found.append((got, stage.identity["sound"]))
  assert abs(found[0][0] - found[1][0]).max() > 1e-3  # Another sound, another place,
  assert found[0][1] != found[1][1]  # which the cache knows.


def test_mistakes_are_one_line(folder, sounds, tmp_path):
  with pytest.raises(UserError, match="none.wav: no such file; --localizer acl:FILE"):
    open_encoders(folder, "acl:none.wav")
  bare = tiny_mmaudio.save(tmp_path / "bare", ("clipseg",))
  with pytest.raises(MissingAssetError, match="weights of: beats.*spatialv2a convert beats FILE"):
    open_encoders(bare, f"acl:{sounds[0]}")


@pytest.mark.slow
def test_mirrored_twice_is_exactly_mirrored(folder):
  encoders = open_encoders(folder, "acl", mirror_tta=True)
  (stage,) = (s for s in encoders.stages("a dog") if s.network == "clipseg")
  frames = frames_of()
  mirrored = {"place": np.ascontiguousarray(frames["place"][:, :, ::-1])}
  seen, other = (stage.encode(x, 0.25, 0.0)["spatial_vk"] for x in (frames, mirrored))
  np.testing.assert_allclose(other, seen * np.array(spatial.MIRROR_SIGNS)[None], atol=1e-5)
  assert abs(seen[:, 0]).max() > 1e-3
