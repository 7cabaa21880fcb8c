import errno
import os
import pathlib
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import sharding
from spatialv2a_jax.errors import MissingAssetError, UserError
from spatialv2a_jax.training import checkpoint, optim, train_step
from tests.training import test_train_step as toy

RUN = {"kind": "toy", "examples": 8, "config": {"model": {"width": 8}}}
FROZEN = optim.Config(freeze=(("null/.*", True), (".*", False)))


def state_on(*shape, devices=None):
  mesh = sharding.make_mesh(*shape, devices=devices)
  optimizer = optim.adamw(FROZEN, jax.eval_shape(toy.toy_init, jax.random.key(0)))
  create, abstract, _ = train_step.init_state(
    toy.toy_init, {"mean": jnp.arange(8.0)}, optimizer, jax.random.key(0), mesh, toy.RULES
  )
  return create, abstract


def saved(folder, steps=(1,)):
  create, abstract = state_on(2, 2, 2)
  state = create()
  manager = checkpoint.Checkpoints(folder)
  for step in steps:
    manager.save(step, state.replace(step=state.step + step), RUN)  # pyright: ignore
  manager.close()
  return state, abstract


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (1, 1, 1)])
def test_a_checkpoint_restores_on_any_mesh_with_the_same_bits(tmp_path, shape):
  state, _ = saved(tmp_path)
  _, abstract = state_on(*shape, devices=jax.devices()[: int(np.prod(shape))])
  found = checkpoint.Checkpoints(tmp_path).restore(abstract)
  assert found
  restored, run = found
  assert run["examples"] == 8 and run["config"] == RUN["config"] and run["time"] > 0
  expected = state.replace(step=state.step + 1)  # pyright: ignore
  assert jax.tree.structure(restored) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, restored, expected)
  same = jax.tree.map(lambda x, a: x.sharding == a.sharding, restored, abstract)
  assert all(jax.tree.leaves(same))


def test_a_save_compiles_nothing(tmp_path):
  """What many devices hold would by default be cut into slices, a program per shape and device."""
  create, _ = state_on(8, 1, 1)
  compiled = []

  def listen(event, duration_secs, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(duration_secs)

  state = create()
  # Of a shape that no other test has, whose programs this process could have already.
  whole = jax.device_put(np.zeros((8, 977), np.float32), state.stats["mean"].sharding)
  state = state.replace(stats={"mean": whole})  # pyright: ignore
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with checkpoint.Checkpoints(tmp_path) as manager:
      manager.save(1, state, RUN)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert not compiled


def test_parameters_load_alone_as_numpy(tmp_path):
  state, _ = saved(tmp_path)
  for folder in (tmp_path, tmp_path / "checkpoints"):
    params, stats, config = checkpoint.load_params(folder, None)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    np.testing.assert_array_equal(stats["mean"], np.arange(8))
    assert config == RUN["config"]
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))


def test_only_the_newest_and_the_milestones_stay(tmp_path):
  create, _ = state_on(8, 1, 1)
  manager = checkpoint.Checkpoints(tmp_path, keep=2, keep_every=3)
  for step in range(1, 6):
    manager.save(step, create(), RUN)
  manager.close()
  steps = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
  assert steps == {3, 4, 5}


def test_a_save_cut_short_is_invisible(tmp_path):
  _, abstract = saved(tmp_path, steps=(1,))
  torn = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
  (torn / "state").mkdir(parents=True)
  found = checkpoint.Checkpoints(tmp_path).restore(abstract)
  assert found and int(found[0].step) == 1


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path):
  _, abstract = saved(tmp_path, steps=(1, 2))
  files = [p for p in (tmp_path / "checkpoints" / "2" / "state").rglob("*") if p.is_file()]
  for file in files:
    file.write_bytes(b"")
  with pytest.raises(UserError, match="cannot read checkpoint .*/2"):
    checkpoint.load_params(tmp_path)
  told = []
  manager = checkpoint.Checkpoints(tmp_path)
  found = manager.restore(abstract, warn=told.append)
  assert found and int(found[0].step) == 1 and manager.latest() == 1
  assert len(told) == 1 and "checkpoint 2 is damaged" in told[0] and "\n" not in told[0]
  assert len(list(tmp_path.glob("damaged-2-*"))) == 1


def test_a_checkpoint_whose_settings_are_torn_is_set_aside_too(tmp_path):
  _, abstract = saved(tmp_path, steps=(1, 2))
  (tmp_path / "checkpoints" / "2" / "run" / "metadata").write_text('{"kind": "to')
  told = []
  found = checkpoint.Checkpoints(tmp_path).restore(abstract, "toy", warn=told.append)
  assert found and int(found[0].step) == 1 and "checkpoint 2 is damaged" in told[0]


def test_a_checkpoint_without_a_word_on_its_arrays_is_damaged_and_of_no_other_model(tmp_path):
  _, abstract = saved(tmp_path, steps=(1, 2))
  (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").unlink()
  with pytest.raises(UserError, match="cannot read checkpoint .*/2: what describes its arrays is"):
    checkpoint.Checkpoints(tmp_path, read_only=True).read(2, abstract)
  told = []
  found = checkpoint.Checkpoints(tmp_path).restore(abstract, "toy", warn=told.append)
  assert found and int(found[0].step) == 1 and "checkpoint 2 is damaged" in told[0]


def test_a_checkpoint_that_another_process_sets_aside_meanwhile_is_of_no_other_model(
  tmp_path, monkeypatch
):
  _, abstract = saved(tmp_path, steps=(1, 2))
  folder, late = tmp_path / "checkpoints" / "2", checkpoint.Checkpoints(tmp_path)
  describe = checkpoint._metadata

  def metadata(manager, step):
    (folder / "state" / "_METADATA").unlink()  # Moved between the list of items and their reading.
    try:
      return describe(manager, step)
    finally:
      folder.rename(tmp_path / "damaged-2-0")
      monkeypatch.setattr(jax, "process_count", lambda: 2)

  monkeypatch.setattr(checkpoint, "_metadata", metadata)
  with pytest.raises(UserError, match="2 is damaged and was set aside by another pro") as stop:
    late.restore(abstract, "toy")
  assert stop.value.exit_code == 43


def test_several_processes_set_aside_one_checkpoint_and_no_more_before_the_next(
  tmp_path, monkeypatch
):
  """What fails again on the checkpoint before is no damage of a checkpoint."""
  _, abstract = saved(tmp_path, steps=(1, 2, 3))
  folder = tmp_path / "checkpoints"
  for step in (2, 3):
    (folder / str(step) / "run" / "metadata").write_text("{")

  def restore(manager):
    with monkeypatch.context() as several:
      several.setattr(jax, "process_count", lambda: 2)
      manager.restore(abstract, "toy")

  early, late = checkpoint.Checkpoints(tmp_path), checkpoint.Checkpoints(tmp_path)
  with pytest.raises(UserError, match="3 is damaged, set aside as .*go on from step 2") as stop:
    restore(early)
  assert stop.value.exit_code == 43 and len(list(tmp_path.glob("damaged-3-*"))) == 1
  with pytest.raises(UserError, match="3 is damaged and was set aside by another pr") as stop:
    restore(late)
  assert stop.value.exit_code == 43
  with pytest.raises(UserError, match="/2: .*; move it away, and the run goes on from step 1"):
    restore(checkpoint.Checkpoints(tmp_path))
  assert (folder / "2").is_dir()


def test_a_step_whose_checkpoint_was_set_aside_before_may_be_damaged_again(tmp_path, monkeypatch):
  _, abstract = saved(tmp_path, steps=(1, 2))
  (tmp_path / "damaged-2-1").mkdir()
  (tmp_path / "checkpoints" / "2" / "run" / "metadata").write_text("{")
  manager = checkpoint.Checkpoints(tmp_path)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(checkpoint.time, "time", lambda: 1.0)  # In the same second.
  with pytest.raises(UserError, match="2 is damaged, set aside as .*go on from step 1"):
    manager.restore(abstract, "toy")
  assert len(list(tmp_path.glob("damaged-2-*"))) == 2


@pytest.mark.parametrize(
  "error, full",
  [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
    (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), True),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
    (ValueError('RESOURCE_EXHAUSTED: Error writing "state/d/0": out of room'), True),
    (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
    (ValueError("INTERNAL: no idea"), False),
  ],
)
def test_a_full_disk_is_called_one(tmp_path, error, full):
  with checkpoint.Checkpoints(tmp_path) as manager:
    with pytest.raises(UserError, match="the checkpoint of step 3 in .* mend it") as stop:
      with manager._loud(3):
        raise error
  assert str(stop.value).startswith("the disk is full: ") == full and stop.value.exit_code == 1


def test_a_save_under_way_is_not_yet_good(tmp_path, monkeypatch):
  """The step goes on before the folder is complete, and the folder appears as a whole."""
  create, _ = state_on(8, 1, 1)
  go, rename = threading.Event(), os.rename

  def wait(old, new):
    if pathlib.Path(new) == tmp_path / "checkpoints" / "1":
      assert go.wait(60)
    rename(old, new)

  monkeypatch.setattr(os, "rename", wait)
  with checkpoint.Checkpoints(tmp_path) as manager:
    assert manager.good() is None
    threading.Timer(30, go.set).start()  # Else a save that waits would do so for ever.
    manager.save(1, create(), RUN)
    manager.check()
    assert manager.latest() == 1 and manager.good() is None and not go.is_set()
    assert not (tmp_path / "checkpoints" / "1").exists()
    go.set()
    manager.wait()
    assert manager.good() == 1 and (tmp_path / "checkpoints" / "1" / "state").is_dir()


def test_a_save_whose_last_barrier_fails_is_told(tmp_path, monkeypatch):
  """Orbax says for ever after that it is under way."""
  create, _ = state_on(8, 1, 1)
  manager = checkpoint.Checkpoints(tmp_path)
  tracker, told = manager._manager._save_progress_tracker, []
  begin = tracker.set

  def fail(value):
    if not value:
      raise TimeoutError("the barrier timed out")
    begin(value)

  def wait():
    with pytest.raises(UserError) as stop:
      manager.wait()
    told.append(str(stop.value))

  monkeypatch.setattr(tracker, "set", fail)
  manager.save(1, create(), RUN)
  thread = threading.Thread(target=wait, daemon=True)
  thread.start()
  thread.join(timeout=60)
  assert len(told) == 1 and "checkpoint of step 1" in told[0] and "the barrier timed out" in told[0]


def test_another_model_is_refused_by_name(tmp_path):
  saved(tmp_path)
  _, abstract = state_on(8, 1, 1)
  params = {**abstract.params, "up": {"kernel": jax.ShapeDtypeStruct((9, 16), jnp.float32)}}
  with pytest.raises(UserError, match="up/(bias|kernel) has shape .* use another --workdir"):
    checkpoint.Checkpoints(tmp_path).restore(abstract.replace(params=params))
  assert (tmp_path / "checkpoints" / "1").is_dir()


def test_another_optimiser_is_refused_by_name_and_nothing_is_moved(tmp_path):
  """A good checkpoint that does not fit is no damaged one."""
  _, abstract = saved(tmp_path, steps=(1, 2))
  mesh, shapes = sharding.make_mesh(2, 2, 2), jax.eval_shape(toy.toy_init, jax.random.key(0))
  adam = optim.adamw(optim.Config(), shapes)
  before = sorted(tmp_path.rglob("*"))
  for optimizer, name in (
    (toy.SGD, "opt/inner_states/trained/inner_state/1/count has shape () there, none here"),
    (adam, "opt/inner_states/trained/inner_state/1/mu/null/text has shape none there, (8,) here"),
  ):
    _, other, _ = train_step.init_state(
      toy.toy_init, {"mean": jnp.arange(8.0)}, optimizer, jax.random.key(0), mesh, toy.RULES
    )
    with pytest.raises(UserError, match=re.escape(name)) as stop:
      checkpoint.Checkpoints(tmp_path).restore(other)
    assert stop.value.exit_code == 2 and "leave optim (such as optim.freeze)" in str(stop.value)
  stats = {"mean": jax.ShapeDtypeStruct((9,), jnp.float32)}
  with pytest.raises(UserError, match="another model: stats/mean has shape"):
    checkpoint.Checkpoints(tmp_path).restore(abstract.replace(stats=stats))
  assert sorted(tmp_path.rglob("*")) == before
  assert checkpoint.Checkpoints(tmp_path).restore(abstract)


def test_the_age_is_that_of_the_last_save_that_is_complete(tmp_path, monkeypatch):
  """Also while they run back to back, and a new one begins before anybody asked for the last."""
  create, _ = state_on(8, 1, 1)
  now = 1000.0
  monkeypatch.setattr(checkpoint.time, "time", lambda: now)
  with checkpoint.Checkpoints(tmp_path) as manager:
    manager.save(1, create(), RUN)
    now += 10
    manager.save(2, create(), RUN)
    assert manager.good() in (1, 2)
    now += 20
    manager.save(3, create(), RUN)
    assert manager.good() in (2, 3)
    manager.wait()
    assert manager.good() == 3 and manager.age() == 0
    now += 7
    assert manager.age() == 7
    manager.save(4, create(), RUN)
    manager.wait()
    assert manager.age() == 0


def test_missing_checkpoints_are_one_line(tmp_path):
  with pytest.raises(MissingAssetError, match="no such folder"):
    checkpoint.load_params(tmp_path / "nowhere")
  with pytest.raises(MissingAssetError, match="no complete checkpoint"):
    checkpoint.load_params(tmp_path)
  assert list(tmp_path.iterdir()) == []
  saved(tmp_path)
  with pytest.raises(MissingAssetError, match="no checkpoint of step 7"):
    checkpoint.load_params(tmp_path, step=7)


def test_a_checkpoint_of_an_earlier_version_is_neither_damaged_nor_another_model(
  tmp_path, monkeypatch
):
  """It has no averages of running statistics, and nobody moves it."""
  _, abstract = saved(tmp_path)
  read = checkpoint._metadata
  earlier = lambda *a: {k: v for k, v in read(*a).items() if k != "means"}  # noqa: E731
  monkeypatch.setattr(checkpoint, "_metadata", earlier)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="was saved by an earlier version"):
      checkpoints.restore(abstract)
  with pytest.raises(UserError, match="it was saved by an earlier version"):
    checkpoint.load_params(tmp_path)
  assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_model_without_statistics_comes_back_as_it_was(tmp_path):
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  optimizer = optim.adamw(FROZEN, jax.eval_shape(toy.toy_init, jax.random.key(0)))
  create, abstract, _ = train_step.init_state(
    toy.toy_init, {}, optimizer, jax.random.key(0), mesh, toy.RULES
  )
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state := create(), RUN)
  found = checkpoint.Checkpoints(tmp_path).restore(abstract)
  assert found and found[0].means == ({},)
  jax.tree.map(np.testing.assert_array_equal, found[0], state)
  assert checkpoint.load_params(tmp_path)[1] == {}


def test_when_nothing_is_readable_nothing_is_moved(tmp_path):
  _, abstract = saved(tmp_path)
  for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with pytest.raises(UserError, match="cannot read checkpoint .*/1"):
    checkpoint.Checkpoints(tmp_path).restore(abstract)
  assert (tmp_path / "checkpoints" / "1").is_dir()
