"""Replaying a run: agreement is bit for bit, and a change of one bit is found."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import sharding
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.training import checkpoint, optim, replay, train, train_step
from tests import processes, runner
from tests.training import test_train_step as toy

OPTIONS: dict = {"steps": 11, "log": 2, "checkpoint": 3, "keep": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of which every checkpoint stays, and whose fourth update was left out."""
  folder = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:
    once(patch)
    runner.main(runner.Options(str(folder), **OPTIONS))
  return folder


def once(patch):
  """Makes only the batch of index 3 bad."""
  before = runner.toy.toy_batch

  def bad(index, rows=8):
    batch = before(index, rows)
    return batch | {"x_bw": batch["x_bw"] * np.float32(np.nan if index == 3 else 1)}

  patch.setattr(runner.toy, "toy_batch", bad)


def verify(folder, monkeypatch, *, shape=(1, 1, 1), **span):
  once(monkeypatch)
  told = []
  options = runner.Options(str(folder), shape=shape, **OPTIONS)
  return runner.verify(options, told.append, **span), "\n".join(told)


@pytest.mark.parametrize("span", [{}, {"start": 3}, {"start": 0, "steps": 11}])
def test_a_run_repeats_from_any_checkpoint(finished, monkeypatch, span):
  before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
  agreed, told = verify(finished, monkeypatch, **span)
  assert agreed and "the run repeats bit for bit" in told
  assert "arrays of the checkpoint are equal, bit for bit" in told
  assert ("step 4: left out" in told) == ("start" in span)
  assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_a_run_that_was_made_longer_repeats_across_its_first_end(tmp_path):
  """Its last step was logged off the rhythm of the log, which began anew after it."""
  options = {"workdir": str(tmp_path), "log": 2, "checkpoint": 3, "keep": 1}
  for steps in (5, 9):
    runner.main(runner.Options(steps=steps, **options))
  told = []
  again = runner.Options(steps=9, **options)
  assert runner.verify(again, told.append, start=3, steps=6), "\n".join(told)
  assert sum(line.startswith("step 5: ") for line in told) >= 1


def test_other_rules_sum_up_in_another_order():
  run = {"config": {"rules": {"zero": "data"}}, "versions": train.versions()}
  mesh = sharding.make_mesh(8, 1, 1)
  run["machine"] = train.machine(mesh)
  for zero, same in (("data", True), ("", False)):
    assert replay._same(run, mesh, {"rules": {"zero": zero}}, lambda _: None) == same


def test_a_change_of_one_bit_is_found(finished, monkeypatch, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  for row in rows:
    if row["step"] == 10 and "loss" in row:
      row["grad_norm"] = float(np.nextafter(row["grad_norm"], 9))
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  agreed, told = verify(folder, monkeypatch)
  assert not agreed and "other: grad_norm" in told and "does NOT repeat" in told


def test_a_change_in_a_checkpoint_is_found(finished, monkeypatch, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  optimizer = optim.adamw(
    optim.Config(lr=1e-2, warmup=2), jax.eval_shape(toy.toy_init, jax.random.key(0))
  )
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  _, abstract, _ = train_step.init_state(
    toy.toy_init, {"mean": np.zeros(8, "f4")}, optimizer, jax.random.key(0), mesh, toy.RULES
  )
  with checkpoint.Checkpoints(folder) as checkpoints:
    about = checkpoints.run(11)
    state = checkpoints.read(11, abstract)
    ema = state.ema["up"]["kernel"]
    state.ema["up"]["kernel"] = ema.at[0, 0].set(np.nextafter(np.float32(ema[0, 0]), np.float32(9)))
    shutil.rmtree(folder / "checkpoints" / "11")
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save(11, state, about)
  agreed, told = verify(folder, monkeypatch)
  assert not agreed and "most of all ema/up/kernel in 1 values" in told


def test_on_another_mesh_losses_agree_closely(finished, monkeypatch):
  agreed, told = verify(finished, monkeypatch, shape=(2, 2, 2))
  assert agreed and "differs from the run: run.machine.axes.data 1 -> 2" in told
  assert "the run repeats to 1e-05 times the root of the steps (float32, another mach" in told


@pytest.mark.parametrize(
  "off, dtype, agrees",
  [(2e-5, "float32", True), (2e-4, "float32", False),
   (1e-3, "bfloat16", True), (2e-2, "bfloat16", False)],
)  # fmt: skip
def test_elsewhere_losses_may_differ_by_the_rounding_of_their_type(
  finished, monkeypatch, tmp_path, off, dtype, agrees
):
  """The line of step 10 is the fourth after the checkpoint: twice the tolerance of one step."""
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  for row in rows:
    if row["step"] == 10 and "loss" in row:
      row["loss"] *= 1 + off
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  once(monkeypatch)
  monkeypatch.setattr(replay, "_same", lambda *_: False)
  recipe = runner.made_of(runner.Options(str(folder), **OPTIONS))
  span = {"start": 6, "steps": 5, "dtype": dtype}
  assert replay.verify(folder, recipe, say=lambda _: None, **span) == agrees


def test_the_machine_of_the_steps_counts_and_not_that_of_the_checkpoint_before(
  finished, monkeypatch, tmp_path
):
  """It may have been saved by a process on another machine, with another configuration."""
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  for step, threads, rate in ((3, 7, 1), (6, None, 2), (9, 5, 3)):
    path = folder / "checkpoints" / str(step) / "run" / "metadata"
    about = json.loads(path.read_text())
    about["config"] = {"rate": rate}
    about["machine"]["threads"] = threads or about["machine"]["threads"]
    path.write_text(json.dumps(about))
  assert replay.settings(folder, 3) == replay.settings(folder, 4) == {"rate": 2}
  agreed, told = verify(folder, monkeypatch, start=3, config={"rate": 2.5})
  assert agreed and "the run repeats bit for bit" in told
  assert "differs from the run: config.rate 2 -> 2.5" in told
  agreed, told = verify(folder, monkeypatch, start=6, steps=3)
  assert agreed and "machine.threads 5 -> " in told and "another machine or mesh" in told
  agreed, told = verify(folder, monkeypatch, start=3, steps=6)  # Of which the first three repeat.
  assert agreed and "machine.threads 5 -> " in told and "another machine or mesh" in told


def test_flags_of_the_compiler_are_part_of_the_machine(monkeypatch):
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  before, before_flags = train.machine(mesh), os.environ.get("XLA_FLAGS", "")
  names = ("axes", "device", "processes", "runtime", "threads", "threefry_partitionable")
  assert before.keys() == {*names, "xla_flags"} and before["device"] == "cpu"
  monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp/x {before_flags}")
  assert train.machine(mesh) == before
  with jax.threefry_partitionable(not before["threefry_partitionable"]):
    assert train.machine(mesh) != before
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
  assert train.machine(mesh) != before
  monkeypatch.setenv("XLA_FLAGS", before_flags)
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
  assert train.machine(mesh) != before
  wanted = {
    "spatialv2a_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "grain",
  }
  assert wanted <= train.versions().keys()


def test_another_commit_is_told_and_must_give_the_same_bits(finished, monkeypatch):
  """Another library, which may compute otherwise, need not."""
  versions = train.versions()
  monkeypatch.setattr(train, "versions", lambda: {**versions, "commit": "0123"})
  agreed, told = verify(finished, monkeypatch)
  assert agreed and "the run repeats bit for bit" in told
  assert "differs from the run: run.versions.commit " in told and "-> '0123'" in told
  monkeypatch.setattr(train, "versions", lambda: {**versions, "optax": "9"})
  agreed, told = verify(finished, monkeypatch)
  assert agreed and "times the root of the steps" in told
  assert f"differs from the run: run.versions.optax {versions['optax']!r} -> '9'" in told


def test_a_copy_of_a_checkout_names_its_commit(tmp_path, monkeypatch):
  """`launch/tpu_vm.sh` sends one."""
  (tmp_path / "COMMIT").write_text("0123abcd\n")
  monkeypatch.setattr(train, "__file__", str(tmp_path / "package" / "training" / "train.py"))
  train.versions.cache_clear()
  assert train.versions()["commit"] == "0123abcd"
  train.versions.cache_clear()


def test_a_checkout_names_its_commit():
  root = pathlib.Path(train.__file__).parents[2]
  if not (root / ".git").exists():
    pytest.skip("no checkout")
  head = subprocess.run(
    ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
  )
  assert train.versions()["commit"].removesuffix("-dirty") == head.stdout.strip()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_are_compared_by_their_bits(dtype):
  kind = {"float32": np.uint32, "bfloat16": np.uint16}[dtype]
  shift = 0 if dtype == "float32" else 16
  nan, other = (np.array([x >> shift], kind).view(dtype) for x in (0x7FC00000, 0x7FC10000))
  zero, minus, one = (np.array([x], dtype) for x in (0.0, -0.0, 1.0))
  for same in (nan, zero, one):
    assert replay._unequal(jnp.asarray(same), jnp.asarray(same)) == 0
  for a, b in ((nan, other), (zero, minus), (one, nan)):
    assert replay._unequal(jnp.asarray(a), jnp.asarray(b)) == 1
  assert replay._unequal(jnp.array([1, 2, 3]), jnp.array([1, 3, 2])) == 2


def test_numbers_that_are_not_finite_are_near_nothing_but_themselves():
  inf, nan = float("inf"), float("nan")
  for same in (1.5, -0.0, inf, -inf, nan, None):
    assert replay._distance(same, same) == 0
  assert replay._distance(nan, None) == 0  # Which is what the log makes of it.
  for a in (1.5, inf, -inf, nan):
    for b in {1.5, inf, -inf, nan} - {a}:
      assert replay._distance(a, b) == inf
  assert replay._distance(1.01, 1.0) == pytest.approx(0.01)


@pytest.mark.parametrize("bound", [0.0, 1e-5])
def test_an_update_that_the_run_left_out_has_to_be_left_out_again(bound):
  report, told = {"loss": 9.0, "grad_norm": 2.0}, []
  for good in (False, True):
    got = report | {"good": float(good)}
    assert replay._compare_report(4, got, report, bound, told.append) == (not good)
  got = {"loss": 9.0, "grad_norm": 2.1, "good": 0.0}
  assert replay._compare_report(4, got, report, bound, told.append) == (bound > 0)


def test_a_row_without_a_number_of_the_replay_is_no_agreement(finished, monkeypatch, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n')
  once(monkeypatch)
  monkeypatch.setattr(replay.Meter, "means", lambda self: {})
  assert not verify(folder, monkeypatch)[0]


DETERMINISTIC = """
import sys
from launch import train
print(train.main(["launch.train", "--verify", sys.argv[1], *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_the_config_of_a_run_is_read_before_devices_start(finished, tmp_path):
  """Flags for them are still to be set, and processes to meet."""
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  for path in folder.glob("checkpoints/*/run/metadata"):
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"config": {"deterministic": True, "every": {"lag": 1}}}))
  join = [f"--coordinator=localhost:{processes.free_port()}", "--num_processes=1", "--process_id=0"]
  done = subprocess.run(
    [sys.executable, "-c", DETERMINISTIC, folder, *join],
    env=runner.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.endswith("\n2\n") and "1 processes, 1 x cpu" in done.stdout
  assert "config.every: " in done.stderr and "Traceback" not in done.stderr


def test_a_replay_begins_before_a_checkpoint_that_is_gone(finished, monkeypatch):
  """The reports of updates that were left out name one that may be kept no longer."""
  agreed, told = verify(finished, monkeypatch, start=5, steps=1)
  assert agreed and "has no checkpoint of step 5 any more: from step 3" in told
  assert "replaying steps 4 to 6 of" in told


def test_what_cannot_be_replayed_is_one_line(finished, monkeypatch, tmp_path):
  with pytest.raises(UserError, match="has no checkpoint of step 12, only"):
    verify(finished, monkeypatch, start=12)
  with pytest.raises(UserError, match="nothing was logged or saved after step 11"):
    verify(finished, monkeypatch, start=11)
  with pytest.raises(UserError, match="no line of the log and no checkpoint between steps 11 and"):
    verify(finished, monkeypatch, start=11, steps=1)
  with pytest.raises(MissingAssetError, match="no complete checkpoint"):
    replay.settings(tmp_path)
  with pytest.raises(MissingAssetError, match="no such run"):
    replay.settings(tmp_path / "none")
  torn = tmp_path / "checkpoints" / "3" / "run" / "metadata"
  torn.parent.mkdir(parents=True)
  torn.write_text("{")
  with pytest.raises(UserError, match="3/run/metadata cannot be read"):
    replay.settings(tmp_path)
