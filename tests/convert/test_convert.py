"""`check` and `run` as the command line uses them, on encoders with upstream's names."""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from spatialv2a_jax import cli, convert, model_folder
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.models import clip, localizer, synchformer
from tests.models import encoder_reference, encoder_states

IDS = np.array([[57, 3, 17, 59, 0, 0, 0, 0, 0], [57, 4, 4, 8, 1, 9, 30, 2, 59]])


def test_model_folders_are_read_and_written_without_orbax():
  code = (
    "import sys, spatialv2a_jax.convert, spatialv2a_jax.binauralizer, spatialv2a_jax.generate;"
    "print([name for name in sys.modules if name.startswith('orbax')])"
  )
  got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert got.stdout.strip() == "[]", got.stderr


def write(path, state, inputs, outputs, **metadata):
  arrays = {f"param/{k}": x for k, x in state.items()}
  arrays |= {f"in/{k}": np.ascontiguousarray(x) for k, x in inputs.items()}
  arrays |= {f"out/{k}": np.asarray(x, np.float32) for k, x in outputs.items()}
  save_file(arrays, path, metadata=metadata or None)
  return path


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
  """A golden file of CLIP's texts, from the definition."""
  state = encoder_states.clip(layers=1)
  both = [encoder_reference.clip_text(state, ids, heads=2, layers=1) for ids in IDS]
  hidden, pooled = map(np.stack, zip(*both, strict=True))
  outputs = {
    "text_hidden": hidden,
    "text_features": encoder_reference.unit(hidden),
    "text_pooled": encoder_reference.unit(pooled),
    "text_pooled_unnormalized": pooled,
  }
  path = tmp_path_factory.mktemp("golden") / "clip.safetensors"
  return write(path, state, {"text": IDS}, outputs), state, outputs


def test_check_prints_a_line_per_output_and_returns_0(golden, capsys):
  path, _, outputs = golden
  assert cli.main(["convert", "clip", "--check", str(path)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert sorted(line.split()[0] for line in lines) == sorted(outputs)
  assert all(float(line.split()[1]) < 1e-5 and line.endswith("ok") for line in lines)


def test_an_output_past_the_tolerance_is_told_and_returns_1(golden, tmp_path, capsys):
  path, state, outputs = golden
  wrong = outputs | {"text_pooled": outputs["text_pooled"] * 1.01}
  path = write(tmp_path / "wrong.safetensors", state, {"text": IDS}, wrong)
  assert cli.main(["convert", "clip", "--check", str(path)]) == 1
  lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
  assert float(lines["text_pooled"].split()[1]) == pytest.approx(0.01 / 1.01, rel=1e-3)
  assert "above 0.0001" in lines["text_pooled"] and lines["text_hidden"].endswith("ok")
  assert cli.main(["convert", "clip", "--check", str(path), "--tolerance", "0.02"]) == 0


def test_parameters_may_lie_in_another_file(golden, tmp_path):
  path, _, outputs = golden
  (tmp_path / "clip.safetensors").write_bytes(path.read_bytes())
  only = {"text_hidden": outputs["text_hidden"]}
  other = write(tmp_path / "b.safetensors", {}, {"text": IDS}, only, params_from="clip.safetensors")
  assert convert.check("clip", other) == 0


def test_golden_files_that_cannot_be_checked_are_one_line(golden, tmp_path):
  path, state, outputs = golden
  cases = {
    "computes no text_hideous": ({"text": IDS}, {"text_hideous": np.ones(3)}),
    "lacks the input in/text": ({}, {"text_hidden": outputs["text_hidden"]}),
    "nothing to compare": ({"text": IDS}, {}),
  }
  for message, (inputs, want) in cases.items():
    with pytest.raises(UserError, match=message):
      convert.check("clip", write(tmp_path / "x.safetensors", state, inputs, want))
  with pytest.raises(MissingAssetError, match="no such file"):
    convert.check("clip", tmp_path / "none")
  with pytest.raises(UserError, match="no source 'clap', have: mmaudio, clip"):
    convert.check("clap", path)
  with pytest.raises(UserError, match="holds no Synchformer.* weights: it lacks"):
    convert.check("synchformer", path)


def test_other_shapes_and_bad_values_are_infinitely_wrong():
  one = np.ones(3)
  assert convert.relative_error(np.ones(2), one) == float("inf")
  assert convert.relative_error(one * np.nan, one) == float("inf")
  assert convert.relative_error(one, one) == 0


def test_videos_come_in_upstreams_layout(tmp_path):
  rng = np.random.default_rng(3)
  state = encoder_states.synchformer(layers=1)
  video = rng.integers(0, 256, (1, 16, 3, 32, 32), np.uint8)
  tokens = encoder_reference.synchformer(state, video[0], heads=2, layers=1)[None]
  outputs = {"sync_f": tokens, "features": tokens[:, None]}
  path = write(tmp_path / "s.safetensors", state, {"video": video}, outputs)
  assert convert.check("synchformer", path, 1e-5) == 0


@pytest.mark.slow
def test_pictures_come_in_upstreams_layout_with_a_text_each(tmp_path):
  rng = np.random.default_rng(3)
  state = encoder_states.clipseg()
  image = rng.integers(0, 256, (1, 3, 352, 352), np.uint8)
  end, e = encoder_reference.clipseg_text(state, IDS[1], heads=1, layers=2)
  pooled, hidden = encoder_reference.clipseg_image(state, image[0], heads=1, layers=11)
  given = rng.normal(size=(1, 20)).astype(np.float32)
  outputs = {
    "text_pooled": end[None],
    "conditional_embeddings": e[None],
    "image_embeds": pooled[None],
    "logits": encoder_reference.clipseg_logits(state, hidden, e)[None],
    "logits_given_embedding": encoder_reference.clipseg_logits(state, hidden, given[0])[None],
  }
  inputs = {"image": image, "input_ids": IDS[1:], "conditional_embeddings": given}
  path = write(tmp_path / "c.safetensors", state, inputs, outputs)
  assert convert.check("clipseg", path, 1e-5) == 0


def test_one_folder_takes_several_networks_and_rebuilds_them(tmp_path, capsys):
  states = {
    "clip": (encoder_states.clip(layers=1), clip),
    "synchformer": (encoder_states.synchformer(layers=1), synchformer),
    "clipseg": (encoder_states.clipseg(), localizer),
  }
  out = tmp_path / "model"
  for source, (state, _) in states.items():
    save_file(state, tmp_path / f"{source}.safetensors")
    file = str(tmp_path / f"{source}.safetensors")
    assert cli.main(["convert", source, file, "--out", str(out)]) == 0
    assert convert.SOURCES[source].licence in capsys.readouterr().out
  model = model_folder.load_model(out)
  about = json.loads((out / "config.json").read_text())
  for name, (_, module) in states.items():
    assert about[f"{name}_source"]["licence"] == convert.SOURCES[name].licence
    config = module.Config(**model.config[name])
    assert config == convert.engine.convert(convert.SOURCES[name], states[name][0], name)[0]
    want = nn.unbox(jax.eval_shape(module.build(config).init, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, model.params[name]) == jax.tree.map(jnp.shape, want)


def test_a_folder_that_cannot_be_written_is_said_before_the_work_starts(
  tmp_path, monkeypatch, capsys
):
  file, out = tmp_path / "acl.safetensors", tmp_path / "file" / "out"
  save_file({"x": np.zeros(1, np.float32)}, file)
  (tmp_path / "file").touch()
  monkeypatch.setattr(convert.engine, "convert", lambda *_: pytest.fail("converted before"))
  assert cli.main(["convert", "acl", str(file), "--out", str(out)]) == 2
  assert f"cannot write to {out}" in capsys.readouterr().err


def test_the_command_needs_a_file_and_a_folder(tmp_path, capsys):
  file, out = str(tmp_path / "none.pth"), str(tmp_path / "o")
  assert cli.main(["convert", "clip", file, "--out", out]) == 3
  assert cli.main(["convert", "clip"]) == 2
  error = capsys.readouterr().err
  assert "no such file" in error and not (tmp_path / "o").exists()
