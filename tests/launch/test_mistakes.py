"""Mistakes on the command line and in configs of a training."""

import dataclasses

import numpy as np
import pytest

from data import layout
from launch import flow_task, tasks, train
from spatialv2a_jax import features, model_folder, sharding
from spatialv2a_jax.errors import UserError
from tests.launch.test_train import ROOT, config_of, one_device, parse

TINY = ("--config={0}/configs/tiny.py:smoke",)
FAULTY = {  # Files of configs.
  "syntax.py": "def get_config(:",
  "module.py": "import nowhere",
  "name.py": "import ml_collections\nget_config = lambda: ml_collections.ConfigDct()",
  "key.py": "def get_config():\n  return {}['a']",
}


def test_a_working_directory_in_a_bucket_is_refused():
  """It would be a folder of that name here."""
  with pytest.raises(UserError, match="--workdir gs://bucket/run is no folder: mount the bucket"):
    parse(f"--config={ROOT}/configs/tiny.py:smoke", workdir="gs://bucket/run")


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config={0}/configs/tiny.py:huge"], "unknown variant 'huge', have: demo, quick, smoke"),
    (["--config={0}/configs/none.py"], "No such file"),
    (["--config={1}/syntax.py"], "--config: SyntaxError: "),
    (["--config={1}/module.py"], "--config: ModuleNotFoundError: No module named 'nowhere'"),
    (["--config={1}/name.py"], "--config: AttributeError: module 'ml_collections' has no attr"),
    (["--config={1}/key.py"], "--config: KeyError: 'a'"),
    (["--config={0}/configs/tiny.py", "--config.model.widht=4"], '"width" instead of "widht"'),
    (["--config={0}/configs/tiny.py", "--config.steps=many"], "config.steps=many"),
    (["--confi={0}/configs/tiny.py"], "Did you mean: config"),
    (["--config={0}/configs/tiny.py", "twice"], "unexpected argument 'twice'"),
    (
      [*TINY, "--config.rules.width=tensor"],
      "kernel: axes (None, 'ffn', 'width') would use mesh axis tensor",
    ),
    ([*TINY, "--config.rules.act_width=fsdp"], "act_batch=data+fsdp, act_width=fsdp"),
    ([*TINY, "--config.rules.zero=data+fdsp"], "names no mesh axis 'fdsp'"),
    ([], "give --config"),
    (["--verify=d", "--config.optim.lr=1"], "only values of another place may be given: config.m"),
    (["--verify=d", "--config.data.path=p"], "and --workdir; only values of another place"),
  ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, tmp_path, arguments, message):
  for name, text in FAULTY.items():
    (tmp_path / name).write_text(text)
  given = (a.format(ROOT, tmp_path) for a in arguments)
  argv = ["launch.train", *given, f"--workdir={tmp_path / 'run'}"]
  assert train.main(argv) == 2
  captured = capsys.readouterr()
  assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
  assert not (tmp_path / "run").exists()


def test_a_folder_may_have_the_name_of_a_flag():
  argv = ["launch.train", TINY[0].format(ROOT), "--workdir", "verify"]
  assert train.parse(argv)[0]["kind"] == "flow"


@pytest.mark.parametrize(
  "options, message",
  [
    ({"model.width": 65}, "config.model: width 65"),
    ({"kind": "flaw"}, "config.kind='flaw' is unknown, have: flow, vae"),
    ({"audio": "48k"}, "config.audio='48k' is unknown"),
    ({"data.path": "/nowhere"}, "no shards in /nowhere"),
    ({"seconds": 0.5}, "config.seconds: 0.5 s is shorter than one segment"),
    ({"model.dtype": "bf16"}, "config.model: no dtype=bf16"),
    ({"model.heads": 0}, "heads, ffn, joint_depth and ear_depth must be at least 1"),
    ({"model.ffn": -4}, "must be at least 1"),
    ({"data.batch_size": 0}, "config.data.batch_size=0 is less than 1"),
    ({"data.statistics": 0}, "config.data.statistics=0 is less than 1"),
    ({"data.eval_batches": -1}, "config.data.eval_batches=-1 is less than 1"),
    ({"seed": 2**32}, "config.seed=4294967296 is not in 0"),
    ({"loss.mirror_weight": float("nan")}, "mirror_weight=nan is not 0 or more"),
    ({"data.path": ""}, "config.data.path is empty"),
    ({"vae": "/nowhere"}, "no model folder /nowhere"),
  ],
)
def test_a_mistake_in_a_config_is_one_line(options, message):
  config = config_of("tiny", "smoke", **options)
  with pytest.raises(UserError, match=message):
    tasks.build(config, one_device(), sharding.Rules()).batches(0)


def test_shards_of_another_codec_or_other_features_are_refused(tmp_path):
  folder, shards_at = tmp_path / "vae", tmp_path / "latents"
  about = {"audio": "16k", "vae": {"width": 8}}
  saved = model_folder.save_model(folder, {"vae": {"x": np.ones(1, "f4")}}, {}, about)
  config = config_of("tiny", "smoke", vae=str(folder))
  encoders = features.Config(**config["features"])

  def build(key="path", **made):
    data = config["data"] | {key: str(shards_at)}
    layout.write_json(shards_at / "manifest.json", {"config": made, "shards": []})
    return flow_task._check_encoded({**config, "data": data}, encoders, saved.sha256["vae"])

  same = {"vae": saved.sha256["vae"], "features": encoders.identity()}
  for key in ("path", "eval"):
    build(key, **same)
    build(key)  # Not said: shards of others.
    with pytest.raises(
      UserError, match=f"is not the VAE that config.data.{key}=.*begins with 0123"
    ):
      build(key, vae="0123456789abcdef")
    other = dataclasses.replace(encoders, seed=7).identity()
    with pytest.raises(UserError, match="config.features: seed=0, but .* was encoded with 7"):
      build(key, features=other)


def test_a_codec_of_another_audio_is_one_line(tmp_path):
  network, about = {"vae": {"x": np.ones(1)}}, {"audio": "44k"}
  model_folder.save_model(tmp_path / "vae", network, {}, about)
  config = config_of("tiny", "smoke", vae=str(tmp_path / "vae"))
  with pytest.raises(UserError, match="describes no model of this version: it lacks 'vae'"):
    tasks.build(config, one_device(), sharding.Rules())
  model_folder.save_model(tmp_path / "vae", network, {}, about | {"vae": {"width": 8}})
  with pytest.raises(UserError, match="vae is for audio '44k', this run has '16k'"):
    tasks.build(config, one_device(), sharding.Rules())


@pytest.mark.parametrize(
  "section, key, value, message",
  [
    ("every", "log", 0, "every.log=0 is less than 1"),
    ("every", "checkpoint", 0, "every.checkpoint=0 is less than 1"),
    ("every", "profile", (3,), "every.profile=(3,) is not (first step, last step)"),
    ("every", "profile", (30, 10), "every.profile=(30, 10) is not (first step, last step), from"),
    ("every", "profile", (0, 4), "every.profile=(0, 4) is not"),
    ("every", "profile", (-3, -1), "every.profile=(-3, -1) is not"),
    ("every", "lag", 1, "config.every: "),
    ("mesh", "dta", 1, "config.mesh: "),
    ("rules", "widht", "fsdp", "config.rules: "),
    (
      "rules",
      "zero",
      "data+fdsp",
      "rule zero='data+fdsp' names no mesh axis 'fdsp', have: data, f",
    ),
    ("ema", "decai", 0.9, "config.ema: "),
    ("loss", "drop_video", 10, "config.loss: drop_video=10 is not in 0..1"),
    ("loss", "difference_weight", -1.0, "config.loss: difference_weight=-1.0 is not 0 or more"),
    ("data", "eval", "/nowhere", "no shards in /nowhere"),
    ("optim", "clip", -1.0, "config.optim: clip=-1.0 is not 0 or more"),
    ("optim", "lrr", 1.0, "optim has no ['lrr'], have: "),
    ("guard", "kap", 3, "config.guard: "),
    (None, "accumulate", 0, "does not divide by accumulate 0"),
  ],
)
def test_a_mistake_in_a_config_is_told_before_anything_runs(tmp_path, section, key, value, message):
  config = config_of("tiny", "smoke")
  config["mesh"] = {"data": -1}
  (config if section is None else config[section])[key] = value
  with pytest.raises(UserError) as stop:
    train.run(train.Arguments(config, str(tmp_path / "run")))
  assert message in str(stop.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "word, message",
  [
    ("--config.mesh.dta=2", """no key 'dta' Did you mean "data" instead of "dta"?"""),
    ("--config.mesh.data=two", "config.mesh.data=two"),
    ("--config.data.workers", "config.data.workers"),
  ],
)
def test_a_mistake_in_the_place_of_a_replay_is_one_line(monkeypatch, capsys, word, message):
  """Not the exit code of a replay that differs."""
  monkeypatch.setattr(train.replay, "settings", lambda *_: config_of("tiny", "smoke"))
  assert train.main(["launch.train", "--verify=run", word]) == 2
  told = capsys.readouterr().err
  assert message in told and told.count("\n") == 1 and told.startswith("launch.train: ")
