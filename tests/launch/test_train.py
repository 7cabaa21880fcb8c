import dataclasses
import json
import pathlib
import re
import shutil
import time
import types
from typing import Any

import jax
import numpy as np
import pytest

from launch import export, flow_task, tasks, train
from spatialv2a_jax import cli, model_folder, schema, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import flow_net
from spatialv2a_jax.training import checkpoint, guard, optim, train_step, watchdog
from tests import processes

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = [
  ("tiny", "demo", "smoke"),
  ("vae_tiny", "demo", "smoke"),
  ("small_16k", "paper", "mmaudio", "smoke"),
  ("small_44k", "full", "smoke"),
  ("medium_44k", "full", "smoke"),
  ("large_44k", "full", "v2", "smoke"),
]
VARIANTS = [(name, variant) for name, *variants in CONFIGS for variant in variants]


def parse(*arguments, workdir="runs/none"):
  return train.parse(["launch.train", *arguments, f"--workdir={workdir}"])[0]


def config_of(name, variant, **options):
  return parse(
    f"--config={ROOT}/configs/{name}.py:{variant}",
    *(f"--config.{key}={value}" for key, value in options.items()),
  )


def one_device():
  return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_every_config_builds_its_model_and_optimizer(name, variant):
  config = config_of(name, variant, **{"data.path": "synthetic", "data.batch_size": 2})
  rules = sharding.Rules(**config["rules"])
  task = tasks.build(config, one_device(), rules)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  optimizer = optim.adamw(optim.from_mapping(config["optim"]), shapes)
  names = optim.names(shapes)
  assert any(name.startswith("frozen/") for name in names)
  moments = optim.names(jax.eval_shape(optimizer.tx.init, shapes))
  assert not any("frozen/" in name.removeprefix("inner_states/frozen") for name in moments)
  optim.Ema(**config["ema"])
  batch = next(task.batches(0))
  assert len(batch["weight_b"]) == 2
  # What the file says of its cost is what it builds.
  before = f"{variant}: " if f"({variant}: " in _doc(name) else ""
  stated = re.search(before + "([0-9,.]+) M parameters", _doc(name))
  assert (stated is None) == (name in ("tiny", "vae_tiny"))
  if stated and variant != "smoke":
    count = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    assert float(stated[1].replace(",", "")) == round(count, 1)


def _doc(name):
  return " ".join((ROOT / "configs" / f"{name}.py").read_text().split())


@pytest.mark.parametrize(
  "name, variant, ours",
  [
    ("small_44k", "full", (448, 7, 4, 8, False)),
    ("medium_44k", "full", (896, 14, 4, 8, False)),
    ("large_44k", "full", (896, 14, 7, 14, False)),
    ("large_44k", "v2", (896, 14, 7, 14, True)),
  ],
)
def test_the_44k_family_has_the_shapes_of_mmaudio(name, variant, ours):
  """Else its converted weights could not start both ears."""
  sizes = flow_task.sizes_of(config_of(name, variant))
  assert (sizes.width, sizes.heads, sizes.joint_depth, sizes.ear_depth, sizes.v2) == ours
  assert (sizes.latent_channels, sizes.ears, sizes.dtype) == (40, 2, "bfloat16")
  assert (sizes.remat, sizes.activations) == ("convolutions", "bfloat16")


def test_a_place_of_shards_is_a_folder_or_a_split_of_it(tmp_path, monkeypatch):
  """Colons in the names of folders, as of those named by the time, do not count."""
  folder, odd, absent = (tmp_path / "10:30" / name for name in ("clips", "clips:test", "absent"))
  folder.mkdir(parents=True)
  assert tasks.place_of(f"{folder}:test") == (folder, "test")
  assert tasks.place_of(f"{folder}:") == tasks.place_of(str(folder)) == (folder, "train")
  assert tasks.place_of(str(absent)) == (absent, "train")
  odd.mkdir()
  assert tasks.place_of(str(odd)) == (odd, "train")
  taken = []
  monkeypatch.setattr(tasks.shards, "paths", lambda *place: taken.append(place) or [])
  monkeypatch.setattr(tasks.pipeline, "loader", lambda *_, **__: iter(()))
  config = config_of("tiny", "smoke", **{"data.path": f"{folder}:val"})
  tasks.build(config, one_device(), sharding.Rules()).batches(0)
  assert taken == [(folder, "val")]


def test_the_mirror_loss_is_a_switch():
  options = {"loss.mirror_weight": 1.0, "data.batch_size": 2}
  task = tasks.build(config_of("tiny", "smoke", **options), one_device(), sharding.Rules())
  batch, params = next(task.batches(0)), jax.eval_shape(task.init, jax.random.key(0))
  assert set(schema.MIRROR_AXES.values()) < set(batch)
  params = sharding.unboxed(params)
  _, (metrics, _) = jax.eval_shape(task.loss, params, task.stats, batch, jax.random.key(0))
  assert "loss/mirror" in metrics


@pytest.mark.parametrize(("mirror", "kept"), [(False, 2.5), (True, 0.0)])
def test_the_loader_mirrors_and_keeps_if_the_config_says_so(tmp_path, monkeypatch, mirror, kept):
  taken = []
  monkeypatch.setattr(tasks.shards, "paths", lambda *_: [])
  monkeypatch.setattr(tasks.pipeline, "loader", lambda *_, **more: taken.append(more) or iter(()))
  options = {"path": tmp_path, "mirror": mirror, "cache_gb": kept, "workers": 2}
  options = {f"data.{name}": value for name, value in options.items()}
  task = tasks.build(config_of("tiny", "smoke", **options), one_device(), sharding.Rules())
  task.batches(3, 5)
  expected = {"mirror": mirror, "cache_gb": kept, "workers": 2, "start_step": 3, "offset": 5}
  assert [{name: more[name] for name in expected} for more in taken] == [expected]


def test_values_of_the_command_line_replace_those_of_the_file():
  config = config_of("tiny", "demo", **{"optim.lr": "3e-4", "steps": 7, "rules.width": ""})
  assert config["optim"]["lr"] == 3e-4 and config["steps"] == 7
  assert config["rules"]["width"] == ""
  assert config["optim"]["steps"] == 7  # The schedule ends with the run.
  fields = [field.name for field in dataclasses.fields(sharding.Rules)]
  for name in ("tiny", "vae_tiny", "small_16k", "large_44k", "mono2binaural"):
    given = {f"rules.{field}": "data" for field in fields}
    config = config_of(name, "smoke", **given | {"rules.zero": "data+fsdp"})
    assert config["rules"] == dict.fromkeys(fields, "data") | {"zero": "data+fsdp"}


@pytest.mark.parametrize(
  "name, variant", [*VARIANTS, *(("mono2binaural", x) for x in ("tiny", "smoke", "paper"))]
)
def test_every_config_has_the_switches_of_a_run(name, variant):
  switches = {"deterministic": "true", "guard.cap": 2, "limits.data": 5, "every.profile": "(3, 4)"}
  switches |= {"ema.sigma_rel": 0.07, "ema.beside": "(0.2,)", "every.average": 3, "ema.decay": 0.9}
  config = config_of(name, variant, **switches, **{"limits.restore": 6})
  assert optim.Ema(**config["ema"]).widths == (0.07, 0.2)
  assert train.train.Every(**config["every"]).average == 3
  assert config["limits"].keys() == watchdog.LIMITS.keys()
  assert len(optim.from_mapping(config["optim"]).freeze)
  assert config["deterministic"] is True and config["guard"]["cap"] == 2
  assert config["limits"]["data"] == 5 and config["every"]["profile"] == (3, 4)
  guard.Config(**config["guard"])


def test_the_length_of_a_run_is_that_of_the_run_alone():
  """`optim.steps` follows it, unless it is given, and never the other way."""
  assert config_of("tiny", "smoke", steps=70)["optim"]["steps"] == 70
  config = config_of("tiny", "smoke", **{"optim.steps": 50})
  assert config["steps"] == config_of("tiny", "smoke")["steps"] and config["optim"]["steps"] == 50


def test_a_run_that_ends_in_its_warm_up_says_so():
  for decay in ("constant", "step"):
    (line,) = optim.Config(lr=1e-4, warmup=1000, decay=decay).remarks(500)
    assert line.startswith("the learning rate does not reach optim.lr=0.0001: the run has 500")


def test_a_run_is_replayed_in_another_place(tmp_path):
  config = config_of("tiny", "smoke")
  about = tmp_path / "checkpoints" / "3" / "run" / "metadata"
  about.parent.mkdir(parents=True)
  about.write_text(json.dumps({"config": config}))
  more = ["--config.mesh.data=1", "--config.data.path=/there"]
  (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp" / "run").mkdir(parents=True)
  got = train.parse(["launch.train", f"--verify={tmp_path}", *more, "--steps=2"])
  assert got.config["mesh"]["data"] == 1 and got.config["data"]["path"] == "/there"
  assert got.config["optim"] == json.loads(json.dumps(config["optim"])) and got.steps == 2
  with pytest.raises(UserError, match="config.mesh.data=many"):
    train.parse(["launch.train", f"--verify={tmp_path}", "--config.mesh.data=many"])


def test_a_stop_is_heeded_while_the_evaluation_is_compiled(monkeypatch):
  class Stop:
    due = staticmethod(lambda: True)

    def poll(self):
      raise AssertionError("a point was passed twice")

  class Step:
    def lower(self, *_):
      time.sleep(5)

  config = config_of("tiny", "smoke", **{"data.batch_size": 2})
  task = tasks.build(config, one_device(), sharding.Rules())
  monkeypatch.setattr(train_step, "make_eval_step", lambda *_, **__: Step())
  state = train_step.State({}, {}, {}, {}, {}, {}, means=({},))
  began = time.monotonic()
  assert task.evaluate is not None and task.evaluate(state, 1, None, Stop()) is None
  assert time.monotonic() - began < 3


def test_the_evaluation_is_compiled_in_a_stage_of_its_own(monkeypatch, tmp_path):
  class Step:
    def lower(self, *_):
      time.sleep(0.3)
      return self

    def compile(self):
      return lambda *_: {"loss": 1.0, "clips": 2.0}

  class Stop:
    due = poll = staticmethod(lambda: False)

  class FittedError(Exception):
    pass

  def fit(*_, evaluate, ledger, **__):
    ledger.enter("eval")
    for _ in range(2):
      evaluate(train_step.State({}, {}, {}, {}, {}, {}, means=({},)), 1, None, Stop())
    assert ledger.phase == "eval" and ledger.seconds()["compile"] >= 0.3
    raise FittedError

  monkeypatch.setattr(train_step, "make_eval_step", lambda *_, **__: Step())
  monkeypatch.setattr(train.train, "fit", fit)
  config = config_of("tiny", "smoke")
  with pytest.raises(FittedError):
    train.run(train.Arguments(config, str(tmp_path / "run")))


@pytest.mark.parametrize("name, count", [("tiny", 4), ("vae_tiny", 1)])
def test_a_loss_takes_a_batch_as_records_hold_it(name, count):
  config = config_of(name, "smoke", **{"data.path": "synthetic", "data.batch_size": 2})
  task = tasks.build(config, one_device(), sharding.Rules())
  batch = next(task.batches(0))
  row = task.row()
  assert {k: x.dtype for k, x in batch.items()} == {k: x.dtype for k, x in row.items()}
  assert sum(x.dtype.itemsize == 2 for x in batch.values()) == count
  shapes, rng = jax.eval_shape(task.init, jax.random.key(0)), np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.uniform(0.01, 0.1, x.shape).astype(x.dtype), sharding.unboxed(shapes)
  )
  loss = jax.jit(lambda batch: task.loss(params, task.stats, batch, jax.random.key(1))[0])
  assert np.isfinite(loss(batch))
  np.testing.assert_allclose(loss(batch), loss(schema.widen(batch)), rtol=1e-6)
  if name == "tiny":
    features = ("clip_bvf", "sync_bsf", "text_bwf")
    short = batch | {name: schema.stored(batch[name], "mxint8") for name in features}
    np.testing.assert_allclose(loss(short), loss(schema.widen(short)), rtol=1e-6)


def test_a_stop_is_heeded_while_sound_is_made(monkeypatch):
  """In every process, though one alone makes it."""

  class Stop:
    passed = 0
    due = staticmethod(lambda: True)

    def poll(self):
      self.passed += 1
      return self.passed > 1  # The batch passes the first point, the sound the second.

  def evaluate(*_):
    return {"loss": 1.0, "clips": 2.0}

  config = config_of("tiny", "smoke", **{"data.batch_size": 2})
  hook: Any = tasks.build(config, one_device(), sharding.Rules()).evaluate
  hook = dataclasses.replace(hook, step=evaluate, listener=lambda *_: time.sleep(5))
  state = train_step.State({}, {}, {}, {}, {}, {}, means=({},))
  for rank in (0, 1):
    monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
    began, leave = time.monotonic(), Stop()
    assert hook(state, 1, None, leave) is None and leave.passed == 2
    assert time.monotonic() - began < 3


def test_an_exported_model_says_where_its_weights_come_from_and_runs_anywhere(tmp_path):
  """The licence of converted weights stays with them, also in a run that began with them."""
  licence = {"licence": "CC-BY-NC-4.0"}
  vae = {"audio": "16k", "vae": {"width": 8}, "vae_source": licence}
  model_folder.save_model(tmp_path / "vae", {"vae": {"x": np.ones(1, "f4")}}, {}, vae)
  start = {"flow_source": licence, "flow": {}}
  model_folder.save_model(tmp_path / "start", {"flow": {"x": np.ones(1, "f4")}}, {}, start)
  paths = {"vae": str(tmp_path / "vae"), "init_from": str(tmp_path / "start")}
  config = config_of("small_16k", "smoke", **paths, **{"model.attention": "xla"})
  for gone in (False, True):
    task = tasks.build(config, one_device(), sharding.Rules())
    task.export(tmp_path / "out", {"y": np.ones(1, "f4")}, {})
    about = model_folder.load_model(tmp_path / "out").config
    assert about["vae_source"] == licence and about["flow"]["attention"] == "auto"
    assert about["flow_source"] == ({} if gone else licence) | {"init_from": paths["init_from"]}
    shutil.rmtree(tmp_path / "start", ignore_errors=True)


def test_what_is_evaluated_is_the_average_with_its_own_statistics(monkeypatch):
  seen = []

  def evaluate(params, stats, batch):
    del batch
    seen.append((params, stats))
    return {"loss": 1.0, "clips": 2.0}

  config = config_of("tiny", "smoke", **{"data.batch_size": 2})
  hook: Any = tasks.build(config, one_device(), sharding.Rules()).evaluate
  hook = dataclasses.replace(hook, step=evaluate, listener=lambda *a: seen.append(a[:2]))
  state = train_step.State(0, "params", "ema", {}, "newest", {}, ("other",), ("its own", "another"))
  stop = types.SimpleNamespace(due=lambda: False, poll=lambda: False)
  hook(state, 1, None, stop)
  assert seen and set(seen) == {("ema", "its own")}


def test_latent_statistics_are_those_of_samples_of_the_posterior():
  rng = np.random.default_rng(0)
  mean = 2 + 3 * rng.standard_normal((400, 2, 25, 3))
  batch = {"mean_betc": mean.astype("f4"), "std_betc": np.full(mean.shape, 4.0, "f4")}
  mean_c, std_c = flow_task.latent_statistics(iter([batch, batch]))
  np.testing.assert_allclose(mean_c, 2, atol=0.1)
  np.testing.assert_allclose(std_c, 5, atol=0.1)  # 3 between clips, 4 within: a 3-4-5 triangle.


@pytest.mark.slow
def test_flops_are_about_six_per_weight_and_token():
  config = config_of("tiny", "demo", **{"data.path": "synthetic"})
  sizes = flow_task.sizes_of(config)
  flops = tasks.build(config, one_device(), sharding.Rules()).flops()
  assert flops is not None
  deeper = config_of("tiny", "demo", **{"data.path": "synthetic", "model.ear_depth": 4})
  extra = (tasks.build(deeper, one_device(), sharding.Rules()).flops() or 0) - flops
  # Two more blocks for each ear: their dense weights, met by every latent frame of that ear.
  frames = schema.lengths(config["seconds"], schema.AUDIO["16k"]).latent
  shapes = jax.eval_shape(flow_net.build(sizes).init, jax.random.key(0))["ears"]
  per_ear = sum(x.size for x in jax.tree.leaves(shapes)) / sizes.ears
  attention = 2 * sizes.ear_depth * 2 * 6 * frames * frames * sizes.width
  assert 0.8 < extra / (sizes.ears * 6 * per_ear * frames + attention) < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_16k", "large_44k"])  # The demo trains the others.
def test_the_smoke_variant_trains_and_leaves_a_model_folder(tmp_path, capsys, name):
  argv = ["launch.train", f"--config={ROOT}/configs/{name}.py:smoke", f"--workdir={tmp_path}"]
  # As most would run it; for eight devices, compiling and saving take several times as long.
  processes.finish(*processes.members(argv[1:], 0, devices=1, programs=tmp_path / "programs"))
  model = model_folder.load_model(tmp_path)
  kind = json.loads((tmp_path / "config.json").read_text())["kind"]
  assert set(model.params) == {kind} and model.config["audio"] in schema.AUDIO
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
  (judged,) = (row for row in rows if "eval/loss" in row)
  assert judged["step"] == 4 and 0 < judged["eval/loss"] < np.inf
  ears = judged["eval/loss/left"] + judged["eval/loss/right"]  # Which is the paper's objective.
  np.testing.assert_allclose(judged["eval/loss"], ears, rtol=1e-6)
  capsys.readouterr()
  assert train.main(argv) == 0
  assert "this run is finished" in capsys.readouterr().out
  out = tmp_path / "early"
  assert export.main([f"--run={tmp_path}", f"--out={out}", "--step=2"]) == 0
  early = model_folder.load_model(out)
  assert early.config == model.config
  for folder, step, other in ((early, 2, 4), (model, 4, 2)):
    whole = folder.params[kind], folder.stats[kind]
    places = (0, step), (None, step), (0, other)
    average, trained, elsewhere = (checkpoint.load_params(tmp_path, *at)[:2] for at in places)
    jax.tree.map(np.testing.assert_array_equal, whole, average)
    for parts in (*zip(whole, trained, strict=True), *zip(whole, elsewhere, strict=True)):
      assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, *parts)))
  assert export.main([f"--run={tmp_path}", f"--out={out}", "--step=1"]) == 3
  if name == "small_16k":  # It keeps snapshots of its averages.
    assert cli.main(["average", str(tmp_path), "--width=0.07", f"--out={tmp_path / 'wide'}"]) == 0
    wide = model_folder.load_model(tmp_path / "wide")
    assert wide.config["flow"] == model.config["flow"] and wide.config["flow_average"]["step"] == 4
    frozen, other = (folder.params["flow"]["frozen"]["latent_std"] for folder in (model, wide))
    np.testing.assert_array_equal(frozen, other)
