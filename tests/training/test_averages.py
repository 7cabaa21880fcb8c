import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import export
from spatialv2a_jax import cli, model_folder, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import averages, checkpoint, optim, train, train_step
from tests.training.test_train import fit
from tests.training.test_train_step import RULES, SGD, toy_init, toy_loss

WIDTHS = (0.05, 0.1)


def run_average(sigma_rel, values_sx):
  """Averages every step of a path in float64; returns the average after each update."""
  ema, average, out = optim.Ema(sigma_rel=sigma_rel), None, []
  take_s = np.asarray(ema.take(np.arange(1, len(values_sx) + 1)), np.float64)
  for value, take in zip(values_sx, take_s, strict=True):
    average = value if average is None else average + take * (value - average)
    out.append(average)
  return np.stack(out)


@pytest.mark.parametrize("updates", [1, 2, 40, 90])
def test_the_closed_form_is_the_average_step_by_step(updates):
  by_step = run_average(0.1, np.eye(90))[updates - 1]
  closed = averages.weighting(0.1, updates, np.arange(1, 91))
  np.testing.assert_allclose(closed, by_step, atol=1e-6)
  assert closed.sum() == pytest.approx(1) and (closed[updates:] == 0).all()


def test_late_in_a_long_run_the_average_still_has_its_width():
  total = 300_000
  step_s = np.arange(1, total + 1)
  keep = 1 - np.asarray(optim.Ema(sigma_rel=0.05).take(step_s), np.float64)
  weight = (1 - keep) * np.append(np.cumprod(keep[::-1])[::-1][1:], 1.0)
  closed = averages.weighting(0.05, total, step_s)
  assert np.linalg.norm(weight - closed) < 1e-5 * np.linalg.norm(closed)


def test_other_widths_of_a_random_walk_are_mixed_from_few_snapshots():
  total, every = 3000, 100
  path_sx = np.random.default_rng(0).standard_normal((total, 64)).cumsum(0)
  tracked = {width: run_average(width, path_sx) for width in WIDTHS}
  snapshots = [(w, n) for n in range(every, total + 1, every) for w in WIDTHS]
  saved = np.stack([tracked[w][n - 1] for w, n in snapshots])
  bounds = [(0.05, 3000, 1e-6), (0.07, 3000, 2e-3), (0.03, 3000, 0.03)]
  for width, step, bound in [*bounds, (0.15, 3000, 4e-3), (0.2, 2000, 0.02)]:
    mixture = averages.mix(snapshots, width, step)
    wanted = run_average(width, path_sx)[step - 1]
    around = np.abs(path_sx[step - 1] - wanted).mean()  # How far an average is from the end.
    error = np.abs(mixture.share_i @ saved - wanted).mean() / around
    assert error < bound, (width, step, error)
    assert mixture.error < bound and mixture.share_i.sum() == pytest.approx(1, abs=1e-9)


def test_what_was_tracked_comes_back_alone():
  snapshots = [(w, n) for n in (100, 200, 300) for w in WIDTHS]
  mixture = averages.mix(snapshots, 0.1, 300)
  np.testing.assert_allclose(mixture.share_i, np.eye(6)[-1], atol=1e-9)
  assert mixture.error < 1e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run of the toy model, its parameters and its statistics after every step."""
  workdir, path = tmp_path_factory.mktemp("run"), []

  def record(state, step, book, leave):
    path.append(jax.device_get(state.params | {"stats": state.stats}))
    return {}

  def init(key):  # A tenth is none in half precision.
    params = toy_init(key)
    return params | {"null": jax.tree.map(lambda x: 0.1 * x, params["null"])}

  table = [["null/.*", True], [".*", False]]
  shapes = jax.eval_shape(toy_init, jax.random.key(0))
  state = fit(
    workdir,
    steps=12,
    config={"kind": "toy", "optim": {"lr": 0.01, "freeze": table}},
    optimizer=optim.adamw(optim.from_mapping({"lr": 0.01, "freeze": table, "warmup": 2}), shapes),
    every=train.Every(log=12, eval=1, checkpoint=6, average=4),
    evaluate=record,
    init=init,
    ema=optim.Ema(sigma_rel=0.1, beside=(0.2,)),
  )
  params, stats = jax.device_get(state.averages()[0])
  other = {"other": {"x": np.ones(2, "f4")}}
  model_folder.save_model(workdir / "model", {"toy": params, **other}, {"toy": stats}, {"a": 1})
  return workdir, path, state


def test_a_run_tracks_every_width(run):
  _, path, state = run
  for width, (params, stats) in zip((0.1, 0.2), state.averages(), strict=True):
    wanted = run_average(width, np.stack([p["up"]["kernel"] for p in path]))[-1]
    np.testing.assert_allclose(params["up"]["kernel"], wanted, atol=1e-6)
    wanted = run_average(width, np.stack([p["stats"]["mean"] for p in path]))[-1]
    np.testing.assert_allclose(stats["mean"], wanted, atol=1e-6)


def test_the_command_writes_a_model_of_another_width(run, tmp_path, capsys):
  workdir, path, _ = run
  out = tmp_path / "wide"
  assert cli.main(["average", str(workdir), "--width", "0.18", "--out", str(out)]) == 0
  assert "width 0.18 at step 12 from 3 snapshots of 0.1, 0.2" in capsys.readouterr().out
  model = model_folder.load_model(out)
  assert set(model.params) == {"toy", "other"}
  about = model.config["toy_average"]
  assert about["sigma_rel"] == 0.18 and about["step"] == 12 and about["error"] < 0.02
  wanted = run_average(0.18, np.stack([p["up"]["kernel"] for p in path]))[-1]
  off = np.abs(model.params["toy"]["up"]["kernel"] - wanted).max()
  moved = np.abs(path[0]["up"]["kernel"] - path[-1]["up"]["kernel"]).max()
  assert off < 0.02 * moved, (off, moved)
  np.testing.assert_array_equal(model.params["toy"]["null"]["text"], path[0]["null"]["text"])


def test_an_earlier_end_uses_only_what_was_there(run, tmp_path):
  workdir, path, _ = run
  averages.write_model(workdir, tmp_path / "early", 0.1, step=8)
  early = model_folder.load_model(tmp_path / "early")
  kernel = early.params["toy"]["down"]["kernel"]
  wanted = run_average(0.1, np.stack([p["down"]["kernel"] for p in path[:8]]))[-1]
  np.testing.assert_allclose(kernel, wanted, rtol=2**-10, atol=1e-6)  # Stored in half precision.
  wanted = run_average(0.1, np.stack([p["stats"]["mean"] for p in path[:8]]))[-1]
  np.testing.assert_allclose(early.stats["toy"]["mean"], wanted, atol=1e-6)


@pytest.mark.parametrize("broken", ["_METADATA", "manifest.ocdbt", "d"])
def test_a_damaged_snapshot_is_one_line_and_the_others_are_mixed_without_it(
  run, tmp_path, capsys, broken
):
  shutil.copytree(run[0], tmp_path / "run")
  (snapshot,) = tmp_path.glob("run/averages/8")
  for path in [x for x in snapshot.rglob(broken) if x.is_file()] or snapshot.rglob(f"{broken}/*"):
    path.write_bytes(
      path.read_bytes()[: path.stat().st_size // 2]
    ) if broken == "d" else path.unlink()
  argv = ["average", str(tmp_path / "run"), "--width", "0.15", "--out", str(tmp_path / "out")]
  assert cli.main(argv) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and f"cannot read the snapshot {snapshot}" in error
  shutil.rmtree(snapshot)
  assert cli.main(argv) == 0


def test_an_average_of_a_run_is_not_written_into_it(run, capsys):
  argv = ["average", str(run[0]), "--width", "0.15", "--out", str(run[0])]
  assert cli.main(argv) == 2 and "is the working directory of a run" in capsys.readouterr().err
  assert "toy_average" not in json.loads((run[0] / "config.json").read_text())


def test_a_checkpoint_comes_after_all_earlier_averages(tmp_path, monkeypatch):
  """A run that goes on from it does none of them again."""
  made, open_, save = [], averages.Snapshots.__init__, checkpoint.Checkpoints.save
  under_way = []

  def opened(self, *arguments):
    open_(self, *arguments)
    made.append(self)

  def saved(self, *arguments):
    under_way.append(made[-1]._saving)
    save(self, *arguments)

  monkeypatch.setattr(averages.Snapshots, "__init__", opened)
  monkeypatch.setattr(averages.Snapshots, "check", lambda self: None)  # It may find them finished.
  monkeypatch.setattr(checkpoint.Checkpoints, "save", saved)
  every = train.Every(log=4, checkpoint=2, average=1)
  fit(tmp_path, steps=4, every=every, ema=optim.Ema(sigma_rel=0.1))
  assert under_way == [False, False]


def test_a_run_resumed_from_an_older_state_forgets_later_snapshots(run, tmp_path):
  _, _, state = run
  with averages.Snapshots(tmp_path, (0.1, 0.2)) as first:
    for step in (2, 4, 6):
      first.save(step, state.averages())
    first.wait()
  with averages.Snapshots(tmp_path, (0.1, 0.2), start=5):
    pass
  assert sorted(path.name for path in (tmp_path / averages.FOLDER).iterdir()) == ["2", "4"]


def test_also_one_that_takes_none(tmp_path):
  ema, kept = optim.Ema(sigma_rel=0.1), train.Every(log=1, checkpoint=2, average=2)
  fit(tmp_path, steps=4, ema=ema, every=kept)
  shutil.rmtree(tmp_path / checkpoint.FOLDER / "4")
  fit(tmp_path, steps=3, ema=ema, every=train.Every(log=1, checkpoint=2))
  assert sorted(path.name for path in (tmp_path / averages.FOLDER).iterdir()) == ["2"]


def test_a_snapshot_that_a_kill_has_cost_is_taken_again(tmp_path):
  """The checkpoint of the same step was on disk before it."""
  ema, every = optim.Ema(sigma_rel=0.1), train.Every(log=1, checkpoint=2, average=2)

  def steps():
    return sorted(int(path.name) for path in (tmp_path / averages.FOLDER).iterdir())

  for end, after in ((4, [2, 4]), (4, [2, 4]), (6, [2, 4, 6])):
    shutil.rmtree(tmp_path / averages.FOLDER / "4", ignore_errors=True)
    fit(tmp_path, steps=end, ema=ema, every=every)
    assert steps() == after


def test_a_snapshot_that_cannot_be_written_is_noticed_at_the_next_step(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(averages.Snapshots, "check", lambda self: seen.append(1))
  fit(tmp_path / "run", steps=4)
  assert len(seen) == 4

  monkeypatch.undo()
  with pytest.raises(UserError, match="the first"), averages.Snapshots(tmp_path, (0.1,)) as book:

    def fail():
      raise OSError("cannot close")

    monkeypatch.setattr(book._manager, "close", fail)
    raise UserError("the first")


def test_mistakes_are_one_line(run, tmp_path, capsys):
  workdir, _, _ = run
  for argv, code, words in (
    (["--width", "0.3"], 2, "at most 0.28"),
    (["--width", "0.02"], 2, "would be 35 % off, and off by 0.4 % of rounding"),
    (["--width", "0.1", "--step", "1"], 3, "no snapshot of step 1, have: [4, 8, 12]"),
  ):
    assert cli.main(["average", str(workdir), "--out", str(tmp_path / "x"), *argv]) == code
    assert words in capsys.readouterr().err
  (tmp_path / "bare").mkdir()
  model_folder.save_model(tmp_path / "bare" / "model", {}, {}, {})
  argv = ["average", str(tmp_path / "bare"), "--out", str(tmp_path / "x"), "--width", "0.1"]
  assert cli.main(argv) == 3 and "has no averages/" in capsys.readouterr().err
  assert not (tmp_path / "x").exists()
  with pytest.raises(UserError, match="set ema.sigma_rel or ema.beside"):
    fit(tmp_path / "plain", every=train.Every(average=2))
  with pytest.raises(UserError, match="tracks a width twice"):
    optim.Ema(sigma_rel=0.1, beside=(0.1,))
  with pytest.raises(UserError, match="tracks a width twice"):
    optim.Ema(beside=(0.0,))


def test_shares_that_cancel_each_other_and_leave_the_rounding_are_refused(
  run, tmp_path, monkeypatch
):
  snapshots = [(w, n) for n in range(100, 2001, 100) for w in (0.1, 0.2)]
  mixture = averages.mix(snapshots, 0.03, 2000)
  assert mixture.error < averages.WORST and np.abs(mixture.share_i).sum() > 60
  monkeypatch.setattr(averages, "mix", lambda *_: mixture)
  with pytest.raises(UserError, match="would be 5.7 % off, and off by 3.3 % of rounding"):
    averages.write_model(run[0], tmp_path / "out", 0.15)
  assert not (tmp_path / "out").exists()


def test_what_half_precision_cannot_hold_is_refused(run, tmp_path):
  workdir, _, state = run
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / averages.FOLDER / "12")
  (params, stats), other = state.averages()
  huge = jax.tree.map(lambda x: 1e5 * jnp.ones_like(x), params)
  with averages.Snapshots(tmp_path / "run", (0.1, 0.2), start=12) as snapshots:
    snapshots.save(12, [(huge, stats), other])
  with pytest.raises(UserError, match="averages: .* is too large for half precision"):
    averages.write_model(tmp_path / "run", tmp_path / "out", 0.15)
  assert not (tmp_path / "out").exists()


def test_a_change_of_the_tracked_widths_is_told_before_anything_is_lost(tmp_path):
  fit(tmp_path, steps=2, ema=optim.Ema(sigma_rel=0.1))
  with pytest.raises(UserError, match="0 averages besides the first, not 1"):
    fit(tmp_path, steps=4, ema=optim.Ema(sigma_rel=0.1, beside=(0.2,)))
  with pytest.raises(UserError, match=r"averages are of widths \[0.1\], not \[0.2\]"):
    fit(tmp_path, steps=4, ema=optim.Ema(sigma_rel=0.2))
  assert json.loads((tmp_path / "config.json").read_text()) and not list(tmp_path.glob("damaged*"))


def test_a_state_made_without_the_averages_is_refused():
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  _, _, layout = train_step.init_state(
    toy_init, {"mean": np.zeros(8, "f4")}, SGD, jax.random.key(0), mesh, RULES
  )
  options = {"key": jax.random.key(0), "mesh": mesh, "rules": RULES, "layout": layout}
  with pytest.raises(ValueError, match="give `init_state` the same ema"):
    train_step.make_train_step(
      toy_loss, SGD, ema=optim.Ema(sigma_rel=0.1, beside=(0.2,)), **options
    )


def test_plain_and_power_function_averages_are_kept_in_one_run(tmp_path, monkeypatch):
  """Either may be the first, each is what it would be alone, and either can be exported."""
  runs = {
    "both": optim.Ema(decay=0.9, sigma_rel=0.1, beside=(0.2, 0.0)),
    "turned": optim.Ema(decay=0.9, sigma_rel=0.0, beside=(0.1,)),
    "plain": optim.Ema(decay=0.9),
  }
  states = {}
  for name, ema in runs.items():
    every = train.Every(log=4, checkpoint=4, average=0 if name == "plain" else 4)
    config = {"ema": {"decay": 0.9, "sigma_rel": ema.sigma_rel, "beside": ema.beside}, "model": {}}
    states[name] = fit(tmp_path / name, steps=4, ema=ema, every=every, config=config)
  for a, b in (
    (states["both"].beside[1], states["plain"].ema),
    (states["turned"].ema, states["plain"].ema),
    (states["turned"].beside[0], states["both"].ema),
  ):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b)
  assert len(states["plain"].beside) == 0  # No memory for what nobody asked for.
  with averages.Snapshots(tmp_path / "both", runs["both"].widths, start=4) as snapshots:
    assert set(averages._tracked(snapshots._manager, 4)) == {"0.1", "0.2"}

  out = []
  build = types.SimpleNamespace(export=lambda path, *average: out.append(average))
  monkeypatch.setattr(export.tasks, "build", lambda *_: build)
  for average in (None, 0.1, 0.2, 0.0):
    export.export(tmp_path / "both", tmp_path / "x", average=average)
  both = states["both"].averages()
  for got, wanted in zip(out, (both[0], *both), strict=True):
    jax.tree.map(np.testing.assert_array_equal, got, jax.device_get(wanted))
  with pytest.raises(UserError, match="tracks no average 0.3, have: 0.1, 0.2, 0 .0 is the plain"):
    export.export(tmp_path / "both", tmp_path / "x", average=0.3)
