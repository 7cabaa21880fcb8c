"""Converted networks from film to sound: CLIP, Synchformer, CLIPSeg, MMAudio, VAE, BigVGAN."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from spatialv2a_jax import (
  cli,
  encoders,
  feature_cache,
  generate,
  generator,
  io,
  model_folder,
  tokenizer,
)
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.generator import Settings
from spatialv2a_jax.weights import Weights
from tests import tiny, tiny_mmaudio

pytest.importorskip("ftfy", reason="the tokenizer is in the extra `encoders`")

SETTINGS = Settings(prompt="a dog, barking", steps=2)
ALL = {"flow", "vae", "vocoder", "clip", "synchformer", "clipseg"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_mmaudio.save(tmp_path_factory.mktemp("mmaudio") / "net")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
  path = tmp_path_factory.mktemp("film") / "x.mp4"
  return tiny.film(path, tiny_mmaudio.SECONDS, side=0.2, size=(96, 128))


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
  cache = feature_cache.Cache(tmp_path_factory.mktemp("cache"))
  return generator.Generator(folder, cache=cache)


@pytest.fixture
def make(model, folder, film, tmp_path, monkeypatch):
  """Runs `generate` with the model that is compiled already."""

  def run(out="out", settings=SETTINGS, single=False, films=None):
    monkeypatch.setattr(generate, "Generator", lambda *_, **__: model)
    model.weights.drop()
    model.weights.single = single
    settings = dataclasses.replace(settings, low_memory=single)
    assert generate.run(films or [film], folder, tmp_path / out, settings) == 0
    return tmp_path / out

  return run


@pytest.fixture(scope="module")
def reference(model, folder, film, tmp_path_factory):
  """What the first run makes, and what it says meanwhile."""
  out, said = tmp_path_factory.mktemp("reference"), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(generate, "Generator", lambda *_, **__: model)
    patch.setattr(generate.logbook.Progress, "say", lambda self, line: said.append(line))
    assert generate.run([film], folder, out, SETTINGS) == 0
  return out, said


def same_bytes(one, other):
  for suffix in ("wav", "mp4"):
    assert (one / f"x.{suffix}").read_bytes() == (other / f"x.{suffix}").read_bytes()


@pytest.mark.slow
def test_a_film_gets_sound_from_all_six_networks(reference, folder):
  out, said = reference
  wav = io.read_audio(out / "x.wav")
  assert wav.shape == (2, 15_360) and np.isfinite(wav).all() and np.abs(wav).max() > 1e-3
  assert np.abs(wav[0] - wav[1]).max() > 1e-4
  about = json.loads((out / "x.json").read_text())
  assert about["weights_sha256"] == model_folder.open_model(folder).sha256
  assert set(about["weights_sha256"]) == ALL
  assert about["localizer"] == "acl" and about["ears"] == 2 and about["dtype"] == "float32"
  assert about["settings"]["guidance"] == 4.5 and np.shape(about["descriptors"]) == (7, 5)
  for part in ("CLIP's image tower", "Synchformer", "CLIPSeg", "sampler", "decoder", "vocoder"):
    assert sum(line.startswith("compiling") and part in line for line in said) == 1, part


@pytest.mark.slow
def test_a_second_run_finds_the_features_and_makes_the_same_bytes(reference, make, monkeypatch):
  def never(*_):
    raise AssertionError("encoded again")

  monkeypatch.setattr(encoders.Encoders, "_run", never)
  same_bytes(make(), reference[0])


@pytest.mark.slow
def test_low_memory_holds_one_network_and_makes_the_same_bytes(reference, make, model, monkeypatch):
  """Without the cache, so that every network has its turn."""
  monkeypatch.setattr(model.encoders(), "cache", None)
  model.encoders()._texts.clear()
  model.weights.drop()
  before = sum(x.nbytes for x in jax.live_arrays())
  take, largest = Weights.take, {}

  def measured(self, name, part="", placement=None):
    params = take(self, name, part, placement)
    mine = sum(x.nbytes for x in jax.tree.leaves(params))
    others = sum(x.nbytes for x in jax.live_arrays()) - before - mine
    largest[name, part] = max(others, largest.get((name, part), 0))
    return params

  monkeypatch.setattr(Weights, "take", measured)
  same_bytes(make(single=True), reference[0])
  assert {name for name, _ in largest} == ALL and ("clip", "text") in largest
  assert max(largest.values()) < 200_000  # Features and noise, no other network.
  assert sum(x.nbytes for x in jax.live_arrays()) - before < 200_000  # Nothing stays.
  make("all")
  assert max(largest.values()) > 1_000_000  # The same count where all networks stay.


@pytest.mark.slow
def test_low_memory_takes_several_films_through_each_network(make, model, film, tmp_path):
  films = [film] + [tiny.film(tmp_path / "f" / f"{i}.mp4", 0.9, seed=i) for i in range(2)]
  model.encoders()._texts.clear()
  taken = []
  take = Weights.take
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(model.encoders(), "cache", None)
    patch.setattr(
      Weights, "take", lambda self, name, *a, **k: taken.append(name) or take(self, name, *a, **k)
    )
    out = make(films=films, single=True)
  turns = [name for i, name in enumerate(taken) if i == 0 or taken[i - 1] != name]
  assert turns == ["clip", "synchformer", "clipseg", "clip", "flow", "vae", "vocoder"]
  assert len(list(out.glob("*.wav"))) == 3


def test_parts_of_another_folder_complete_a_checkpoint(folder, tmp_path, model):
  net = tiny_mmaudio.save(tmp_path / "net", ("flow", "vae"))
  with pytest.raises(MissingAssetError, match="spatialv2a convert bigvgan FILE --out .*--parts"):
    generator.Generator(net)
  rest = tiny_mmaudio.save(tmp_path / "rest", ALL - {"flow", "vae"})
  whole = generator.Generator(net, parts=rest)
  assert whole.sha256() == model.sha256()
  assert whole.weights.model("clip").folder == rest


def test_what_needs_no_network_is_not_asked_for(tmp_path, capsys, film):
  net = tiny_mmaudio.save(tmp_path / "net", ALL - {"clipseg"})
  bare = generator.Generator(net)
  assert set(bare.sha256("motion")) == ALL - {"clipseg"} and bare.licences("motion") == {}
  command = ["generate", film, "--checkpoint", net, "--out", tmp_path / "out"]
  assert cli.main(list(map(str, command))) == 3
  line = capsys.readouterr().err
  assert "spatialv2a convert clipseg FILE --out" in line and line.count("\n") == 1
  assert not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("option", ["--prompt", "--negative"])
def test_a_missing_tokenizer_is_told_before_anything_is_encoded(
  tmp_path, capsys, film, monkeypatch, option
):
  def absent():
    raise MissingAssetError("CLIP's merges file is missing")

  def never(*_, **__):
    raise AssertionError("encoded")

  net = tiny_mmaudio.save(tmp_path / "net", ALL - {"clipseg"})
  (net / tokenizer.FILE).unlink()
  encoders._tokenizer.cache_clear()
  monkeypatch.setattr(tokenizer, "find_merges", absent)
  monkeypatch.setattr(encoders.Encoders, "read", never)
  command = ["generate", film, "--checkpoint", net, "--out", tmp_path / "out", option, "a dog"]
  assert cli.main([*map(str, command), "--localizer", "motion"]) == 3
  line = capsys.readouterr().err
  assert "merges" in line and line.count("\n") == 1


@pytest.mark.parametrize(
  "flags", ["--spatial-guidance 3", "--phase independent", "--localizer acl"]
)
def test_what_one_ear_cannot_use_is_refused(tmp_path, capsys, film, flags):
  net = tiny_mmaudio.save(tmp_path / "net", ears=1)
  command = ["generate", film, "--checkpoint", net, "--out", tmp_path / "out", *flags.split()]
  assert cli.main(list(map(str, command))) == 2
  line = capsys.readouterr().err
  assert "changes nothing: this network has one ear" in line and line.count("\n") == 1
  assert flags.split()[0] in line


def test_motion_is_what_one_ear_shows_anyway():
  generate.refuse_ears(dataclasses.replace(SETTINGS, localizer="motion"))
  with pytest.raises(UserError, match="--localizer track:x changes nothing"):
    generate.refuse_ears(dataclasses.replace(SETTINGS, localizer="track:x"))


def test_parts_for_other_sound_are_refused(tmp_path, folder):
  net = tiny_mmaudio.save(tmp_path / "net", ALL)
  about = json.loads((net / "config.json").read_text())
  about["vocoder"]["n_mels"] = 128
  (net / "config.json").write_text(json.dumps(about))
  with pytest.raises(MissingAssetError, match="vocoder for other sound .*convert bigvgan FILE"):
    generator.Generator(net)
  about["vocoder"] |= {"n_mels": 80, "rates": [4, *about["vocoder"]["rates"][1:]]}
  (net / "config.json").write_text(json.dumps(about))
  with pytest.raises(MissingAssetError, match="80 mel bins every 64 samples, 16k sound has"):
    generator.Generator(net)
  about["audio"] = "44k"
  (net / "config.json").write_text(json.dumps(about))
  with pytest.raises(UserError, match="says 44k sound, its flow network makes other latents"):
    generator.Generator(net)


@pytest.mark.slow
@pytest.mark.parametrize(
  "ears, dtype, options", [(1, "float32", ()), (2, "bfloat16", ("--low-memory",))]
)
def test_the_command_runs_in_either_precision(tmp_path, film, capsys, ears, dtype, options):
  net = tiny_mmaudio.save(tmp_path / "net", ears=ears)
  command = [
    "generate", film, "--checkpoint", net, "--out", tmp_path / "out", "--prompt", "a dog",
    "--steps", 2, "--feature-cache", tmp_path / "cache", "--dtype", dtype, *options,
  ]  # fmt: skip
  assert cli.main(list(map(str, command))) == 0
  assert ("one ear" in capsys.readouterr().err) == (ears == 1)
  wav = io.read_audio(tmp_path / "out" / "x.wav")
  assert wav.shape == (2, 15_360) and np.isfinite(wav).all() and np.abs(wav).max() > 1e-3
  assert (wav[0] == wav[1]).all() == (ears == 1)
  about = json.loads((tmp_path / "out" / "x.json").read_text())
  assert about["ears"] == ears and about["dtype"] == dtype
  assert about["localizer"] == ("acl" if ears == 2 else "motion")
