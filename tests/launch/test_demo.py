"""Where a demo goes, and what it takes for its own."""

import json
import pathlib

import numpy as np
import pytest

from launch import demo
from spatialv2a_jax import io, model_folder
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import evaluate
from tests.data import clips


@pytest.fixture
def stages(monkeypatch) -> list[str]:
  """Names of the stages that begin; each ends the demo, as a failure would."""
  begun: list[str] = []

  def stop(self, name, *command):
    begun.append(name)
    raise UserError("stopped", 5)

  monkeypatch.setattr(demo.Stages, "run", stop)
  return begun


@pytest.mark.parametrize("finished", [False, True])
def test_a_smoke_run_is_not_taken_for_the_demo(tmp_path, stages, capsys, finished):
  small, large = ["--out", str(tmp_path), "--smoke"], ["--out", str(tmp_path)]
  assert demo.main(small) == 5
  if finished:
    (tmp_path / "checkpoint").mkdir()
  assert demo.main(large) == 2 and len(stages) == 1
  assert f"{tmp_path} holds a demo of another size" in capsys.readouterr().err
  assert demo.main(small) == 5 and len(stages) == 2


def test_a_checkpoint_of_unknown_size_is_not_taken_for_done(tmp_path, stages):
  (tmp_path / "checkpoint").mkdir()
  assert demo.main(["--out", str(tmp_path)]) == 2 and not stages


def test_both_have_folders_of_their_own(tmp_path, stages, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert demo.main(["--smoke"]) == demo.main([]) == 5
  assert sorted(pathlib.Path("demo_out").rglob("demo.json")) == [
    pathlib.Path("demo_out/demo.json"), pathlib.Path("demo_out/smoke/demo.json"),
  ]  # fmt: skip


def test_nothing_held_out_is_trained_on_and_mirrored_scenes_are_those_held_out(
  tmp_path, monkeypatch
):
  ran: dict[str, list[str]] = {}
  monkeypatch.setattr(
    demo.Stages, "run", lambda self, name, *command: ran.update({name: list(map(str, command))})
  )
  monkeypatch.setattr(demo, "publish", lambda source, target: target.mkdir())
  monkeypatch.setattr(demo, "make_ceiling", lambda *_: None)
  monkeypatch.setattr(demo, "mirror_agreement", lambda *_: None)
  monkeypatch.setattr(evaluate, "run", lambda *_, **__: {})
  assert demo.main(["--out", str(tmp_path), "--smoke"]) == 0
  made = {name: ran[f"scenes: {name}"] for name in ("train", "heldout", "mirrored")}
  seeds = {name: words[words.index("--seed") + 1] for name, words in made.items()}
  assert seeds["train"] != seeds["heldout"] == seeds["mirrored"]
  assert [name for name, words in made.items() if "--mirror" in words] == ["mirrored"]
  for name in ("train the VAE", "train the flow network"):
    given = dict(word.split("=") for word in ran[name] if "=" in word)
    assert "train" in given["--config.data.path"] and "heldout" not in given["--config.data.path"]
    assert "heldout" in given.get("--config.data.eval", "heldout")
  assert json.loads((tmp_path / "scores.json").read_text()) == {"mirror": None}
  ran.clear()  # What is trained is not trained again.
  assert demo.main(["--out", str(tmp_path), "--smoke"]) == 0
  assert list(ran) == ["generate held-out scenes", "generate their mirror images", "report"]


def test_a_mirror_image_sounds_from_the_other_side(tmp_path):
  for n in range(2):
    fade_p = np.linspace(0.05, 1, 2 * clips.RATE)
    ears = np.stack([fade_p * clips.noise(2, n), fade_p[::-1] * clips.noise(2, n + 9)])
    for name, shown in (("plain/{}", ears), ("swapped/{}_m", ears[::-1]), ("same/{}_m", ears)):
      path = tmp_path / f"{name.format(n)}.wav"
      path.parent.mkdir(exist_ok=True)
      io.write_audio(path, shown.astype("f"), clips.RATE)
  swapped, same = (
    demo.mirror_agreement(tmp_path / "plain", tmp_path / name) for name in ("swapped", "same")
  )
  assert swapped["ild_pearson_r"] == pytest.approx(-1) and swapped["windows"] > 10
  assert same["ild_pearson_r"] == pytest.approx(1)


def test_a_half_copied_model_is_none(tmp_path, monkeypatch):
  source, target = tmp_path / "model", tmp_path / "demo" / "checkpoint"
  target.parent.mkdir()
  model_folder.save_model(source, {"vae": {"x": np.zeros(1, "f4")}}, {}, {})

  def torn(source, copy):
    copy.mkdir()
    (copy / "config.json").touch()
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(demo.shutil, "copytree", torn)
    with pytest.raises(KeyboardInterrupt):
      demo.publish(source, target)
  assert not target.exists()
  demo.publish(source, target)
  assert list(target.parent.iterdir()) == [target]
  assert model_folder.load_model(target).params == model_folder.load_model(source).params
