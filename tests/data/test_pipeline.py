import collections
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from data import captions, layout, pipeline, shards, tf_example, tfrecord
from spatialv2a_jax import schema
from spatialv2a_jax.errors import UserError
from tests.loader_shards import CLIPS, SHAPES, build, damage, numbers, record, stream, text

ROOT = pathlib.Path(pipeline.__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[pathlib.Path]:
  return build(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def paths(built, tmp_path) -> list[pathlib.Path]:
  """A copy that a test may damage."""
  shutil.copytree(built[0].parent, tmp_path / "shards")
  return shards.paths(tmp_path / "shards")


def assert_equal(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name])


def test_batches_keep_the_contract(built):
  batch = next(pipeline.loader(built, batch_size=4, seed=0, shapes=SHAPES))
  schema.check_batch(batch, SHAPES)
  assert batch.keys() == {"id_b", "weight_b", *schema.AXES.values()}
  np.testing.assert_array_equal(batch["weight_b"], 1)
  for name in schema.AXES.values():
    for row, n in zip(batch[name], numbers(batch), strict=True):
      number = n % 5 if name == "text_bwf" else n
      np.testing.assert_array_equal(np.floor(row), np.full_like(row, number))
  np.testing.assert_array_equal(batch["mean_betc"][:, 1] - batch["mean_betc"][:, 0], 0.5)


def test_audio_records(built):
  batch = next(pipeline.loader(built, batch_size=4, seed=0, kind="audio"))
  assert batch.keys() == {"id_b", "weight_b", "audio_bep"}
  assert batch["audio_bep"].dtype == np.int16
  batch = schema.widen(batch)
  expected_b = np.array(numbers(batch), np.float32) / 128
  np.testing.assert_array_equal(batch["audio_bep"][:, 0, 3], expected_b)
  np.testing.assert_array_equal(batch["audio_bep"][:, 1, 3], -expected_b)


def test_each_epoch_holds_each_clip_once_in_a_new_order(built):
  seen = stream(built, 33)  # 132 = 6 epochs of 22.
  epochs = [seen[i : i + CLIPS] for i in range(0, len(seen), CLIPS)]
  assert all(sorted(epoch) == list(range(CLIPS)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 6


def test_order_depends_on_the_seed_and_nothing_else(built):
  assert stream(built, 6) == stream(built, 6)
  assert stream(built, 6) != stream(built, 6, seed=8)
  assert stream(built, 12) == stream(built, 6, batch_size=8)


@pytest.mark.parametrize("ends", [(0, 4, 8), (0, 2, 4, 6, 8), (0, 2, 6, 8)])
def test_hosts_share_the_rows_of_each_global_batch(built, ends):
  whole = list(itertools.islice(pipeline.loader(built, batch_size=8, seed=1, mirror=True), 7))
  parts = [
    itertools.islice(pipeline.loader(built, batch_size=8, seed=1, mirror=True, rows=rows), 7)
    for rows in itertools.pairwise(ends)
  ]
  joined = [
    {name: np.concatenate([part[name] for part in row]) for name in row[0]}
    for row in zip(*parts, strict=True)
  ]
  assert_equal(whole, joined)


def test_an_epoch_survives_a_change_of_hosts(built):
  seen, step = collections.Counter(), 0
  for ends, until in (((0, 4), 2), ((0, 1, 2, 3, 4), 5), ((0, 1, 4), 11)):
    for rows in itertools.pairwise(ends):
      batches = pipeline.loader(built, batch_size=4, seed=3, start_step=step, rows=rows)
      for batch in itertools.islice(batches, until - step):
        seen.update(numbers(batch))
    step = until
  assert seen == {n: 2 for n in range(CLIPS)}  # 11 steps of 4 are two epochs.


def test_resume_from_the_state_alone(built):
  batches = pipeline.loader(built, batch_size=4, seed=5, mirror=True)
  assert batches.state() == {"step": 0}
  list(itertools.islice(batches, 4))
  state = json.loads(json.dumps(batches.state()))
  rest = list(itertools.islice(batches, 4))
  again = pipeline.loader(built, batch_size=4, seed=5, mirror=True, start_step=state["step"])
  assert again.state() == state == {"step": 4}
  assert_equal(rest, list(itertools.islice(again, 4)))


@pytest.mark.parametrize(
  ("ends", "epochs"),
  [((0, 16), 1), ((0, 8, 16), 1), (range(0, 17, 2), 1), ((0, 8, 16), 2), ((0, 4, 12, 16), 1)],
)
def test_evaluation_pads_the_last_batch_with_weight_zero(built, ends, epochs):
  rows = []
  for first, last in itertools.pairwise(ends):
    part = {"rows": (first, last), "epochs": epochs}
    batches = list(pipeline.loader(built, batch_size=16, seed=None, **part))
    assert len(batches) == -(-epochs * CLIPS // 16)
    assert all(len(batch["id_b"]) == last - first for batch in batches)
    rows += [
      (step * 16 + first + row, n, weight)
      for step, batch in enumerate(batches)
      for row, (n, weight) in enumerate(zip(numbers(batch), batch["weight_b"], strict=True))
    ]
  counted = [n for _, n, weight in sorted(rows) if weight == 1]
  assert collections.Counter(counted) == {n: epochs for n in range(CLIPS)}
  assert all(weight == (position < epochs * CLIPS) for position, _, weight in rows)
  source = tfrecord.TFRecordSource(built)  # Without a seed: the order of the shards.
  stored = [bytes(tf_example.decode(source[i])["id"]).decode() for i in range(CLIPS)]
  assert [f"clip{n}" for n in counted] == stored * epochs


def test_any_step_may_be_the_first(built):
  assert len(stream(built, 1, start_step=10**9)) == 4  # At once.
  assert list(pipeline.loader(built, batch_size=4, seed=0, epochs=1, start_step=6)) == []
  assert len(list(pipeline.loader(built, batch_size=4, seed=0, epochs=1, start_step=5))) == 1


def test_batches_of_one(built):
  assert sorted(stream(built, CLIPS, batch_size=1)) == list(range(CLIPS))
  assert len(list(pipeline.loader(built, batch_size=1, seed=0, epochs=1))) == CLIPS


def test_one_clip_is_enough(tmp_path):
  shards.build([shards.Item("clip0", 0)], record, tmp_path, shards=2, config={})
  captions.build(["caption 0"], text, tmp_path, config={}, storage="float32")
  batch = next(pipeline.loader(shards.paths(tmp_path), batch_size=3, seed=0))
  assert numbers(batch) == [0, 0, 0]


@pytest.mark.parametrize("mirror", [False, True])
def test_the_other_side_of_each_clip_is_read_if_asked_for(built, mirror):
  both = SHAPES | {field: SHAPES[field.removesuffix("_mirror")] for field in schema.MIRROR_AXES}
  options: dict[str, Any] = {"batch_size": 11, "seed": 3, "epochs": 2, "mirror": mirror}
  plain = list(pipeline.loader(built, **options))
  batches = list(pipeline.loader(built, **options, shapes=both))
  assert_equal([{n: x for n, x in b.items() if "_mirror" not in n} for b in batches], plain)
  seen = set()
  for batch in batches:
    schema.check_batch(batch, both)
    for row, n in enumerate(numbers(batch)):
      flip = bool(batch["clip_bvf"][row, 0, 0] >= 100)
      seen.add(flip)
      assert np.all(batch["clip_mirror_bvf"][row] == n + 100 * (not flip))
      assert np.all(batch["sync_mirror_bsf"][row] == n + 100 * (not flip))
      np.testing.assert_array_equal(batch["spatial_mirror_bvk"][row], -batch["spatial_bvk"][row])
  assert seen == ({False, True} if mirror else {False})


def test_mirroring_mirrors_everything_of_half_of_the_clips(built):
  options: dict[str, Any] = {"batch_size": 11, "seed": 2, "epochs": 8}
  plain = list(pipeline.loader(built, **options))
  mirrored = list(pipeline.loader(built, **options, mirror=True))
  sound = list(pipeline.loader(built, **options, mirror=True, kind="audio"))
  coins = collections.defaultdict(list)
  for a, b, heard in zip(plain, mirrored, sound, strict=True):
    assert numbers(a) == numbers(b) == numbers(heard)
    for row, n in enumerate(numbers(a)):
      flip = bool(b["clip_bvf"][row, 0, 0] >= 100)
      coins[n].append(flip)
      assert np.all(b["clip_bvf"][row] == n + 100 * flip)
      assert np.all(b["sync_bsf"][row] == n + 100 * flip)
      for name in ("mean_betc", "std_betc"):
        np.testing.assert_array_equal(b[name][row], a[name][row][:: -1 if flip else 1])
      np.testing.assert_array_equal(b["spatial_bvk"][row], a["spatial_bvk"][row] * (1 - 2 * flip))
      np.testing.assert_array_equal(b["text_bwf"][row], a["text_bwf"][row])
      left, right = schema.widen(heard)["audio_bep"][row, :, 0]
      assert left == -right == (-1 if flip else 1) * n / 128
  assert 0.35 < np.mean(list(coins.values())) < 0.65
  # The coin is thrown anew each epoch, and by clip.
  assert sum(len(set(flips)) == 2 for flips in coins.values()) > CLIPS / 2
  assert len({tuple(flips) for flips in coins.values()}) > CLIPS / 2


def test_another_seed_throws_other_coins(built):
  """For the same clip in the same epoch: which clips a batch holds is another matter."""
  coins = []
  for seed in (2, 3):
    batches = pipeline.loader(built, batch_size=CLIPS, seed=seed, epochs=8, mirror=True)
    flips = {
      (epoch, n): bool(clip[0, 0] >= 100)
      for epoch, batch in enumerate(batches)
      for n, clip in zip(numbers(batch), batch["clip_bvf"], strict=True)
    }
    coins.append(flips)
  assert coins[0].keys() == coins[1].keys() and len(coins[0]) == 8 * CLIPS
  assert 0.35 < np.mean([coins[0][place] != coins[1][place] for place in coins[0]]) < 0.65


def edit_features(folder: pathlib.Path, edit) -> None:
  fields = layout.read_features(folder)
  edit(fields)
  layout.write_features(folder, fields)


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda fields: fields.pop("sync"), "field sync is missing"),
    (lambda fields: fields.pop("id"), "field id is missing"),
    (lambda fields: fields.pop("clip_mirror"), "field clip_mirror is missing, which mirror needs"),
    (
      lambda fields: fields.update(mean=tf_example.Tensor("float32", (2, 5, 3))),
      r"field mean is \[2, 5, 3\], this run needs \[2, 4, 3\]",
    ),
  ],
)
def test_wrong_layouts_are_named_before_the_first_step(paths, edit, message):
  edit_features(paths[0].parent, edit)
  with pytest.raises(UserError, match=f"{paths[0].name}: {message}"):
    pipeline.loader(paths, batch_size=4, seed=0, shapes=SHAPES, mirror=True)


def test_folders_of_different_layout_do_not_mix(built, paths):
  edit_features(paths[0].parent, lambda f: f.update(sync=tf_example.Tensor("float16", (7, 2))))
  with pytest.raises(UserError, match=rf"{paths[0].parent}.*field sync is \[7, 2\]"):
    pipeline.loader([*built, *paths], batch_size=4, seed=0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_records_that_contradict_their_layout_are_named(paths, workers):
  raw = tfrecord.TFRecordSource(paths[:1])
  fields = {
    name: np.frombuffer(value, np.uint8) for name, value in tf_example.decode(raw[0]).items()
  }
  for change, message in (
    ({"sync": fields["sync"][:-2]}, "record 1, field sync: 22 bytes"),
    ({"sync": None}, "record 1 has no field sync"),
    ({"id": None}, "record 1 cannot be read"),
  ):
    wrong = {name: v for name, v in {**fields, **change}.items() if v is not None}
    tfrecord.write(paths[0], [raw[0], tf_example.encode(wrong)])
    with pytest.raises(UserError, match=f"{paths[0].name}: {message}"):
      next(pipeline.loader(paths[:1], batch_size=2, seed=None, workers=workers))
    tfrecord.write(paths[0], [raw[0]])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"rows": (2, 5)}, "rows 2 to 5 are none of a batch of batch_size 4"),
    ({"rows": (2, 2)}, "rows 2 to 2"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"seed": None, "mirror": True}, "mirror needs a seed"),
  ],
)
def test_bad_arguments(built, options, message):
  with pytest.raises(UserError, match=message):
    pipeline.loader(built, **{"batch_size": 4, "seed": 0, **options})


def test_no_records(tmp_path):
  with pytest.raises(UserError, match="no records"):
    pipeline.loader([], batch_size=4, seed=0)
  tfrecord.write(tmp_path / "empty", [])
  with pytest.raises(UserError, match="no records in .*empty"):
    pipeline.loader([tmp_path / "empty"], batch_size=4, seed=0)


WORKERS = """
import hashlib, itertools, json, sys
from data import pipeline

if __name__ == "__main__":
  workers, start, *paths = sys.argv[1:]
  batches = pipeline.loader(
    paths, batch_size=4, seed=7, mirror=True, workers=int(workers), start_step=int(start)
  )
  for batch in itertools.islice(batches, 8):
    arrays = [name.encode() + batch[name].tobytes() for name in sorted(batch)]
    print(hashlib.sha256(b"".join(arrays)).hexdigest())
  print(json.dumps([batches.state(), sorted(batches.bad.values())]))
  batches.close()
"""


def run_script(script: pathlib.Path, code: str, *arguments) -> list[str]:
  script.write_text(code)
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  return subprocess.run(
    [sys.executable, script, *map(str, arguments)],
    env={**os.environ, "PYTHONPATH": path},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    timeout=120,
  ).stdout.splitlines()


@pytest.mark.parametrize(
  "workers", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_worker_processes_change_no_batch(paths, tmp_path, workers):
  """A script as a user writes it, absl flags unparsed; with a damaged record on the way."""
  damage(paths[0], 1)
  batches = pipeline.loader(paths, batch_size=4, seed=7, mirror=True, start_step=3)
  expected = []
  for batch in itertools.islice(batches, 8):
    arrays = [name.encode() + batch[name].tobytes() for name in sorted(batch)]
    expected.append(hashlib.sha256(b"".join(arrays)).hexdigest())
  expected.append(json.dumps([batches.state(), sorted(batches.bad.values())]))
  assert batches.bad
  assert run_script(tmp_path / "script.py", WORKERS, workers, 3, *paths) == expected


def test_a_batch_of_another_size_goes_on_where_the_last_one_ended(paths):
  """No clip comes twice or is left out, and epochs are those of the clips that were passed."""
  options = {"seed": 7, "mirror": True}
  whole = pipeline.loader(paths, batch_size=1, **options)
  expected = list(itertools.islice(whole, 3 * CLIPS))
  first = pipeline.loader(paths, batch_size=5, **options)
  got = list(itertools.islice(first, 3))
  index, offset = divmod(15, 4)
  second = pipeline.loader(paths, batch_size=4, start_step=index, offset=offset, **options)
  got += itertools.islice(second, 12)
  rows = [{name: array[i] for name, array in b.items()} for b in got for i in range(len(b["id_b"]))]
  assert_equal(rows, [{name: array[0] for name, array in b.items()} for b in expected[: len(rows)]])
  last = pipeline.loader(paths, batch_size=4, seed=7, epochs=1, start_step=index, offset=offset)
  assert sum(int(batch["weight_b"].sum()) for batch in last) == CLIPS - 15


KILLED = """
import multiprocessing, os, signal, sys
from data import pipeline

if __name__ == "__main__":
  batches = pipeline.loader(sys.argv[1:], batch_size=4, seed=7, workers=2)
  next(batches)
  print(*(child.pid for child in multiprocessing.active_children()), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed(paths, tmp_path):
  """They hold what it holds open, such as the pipe that a launcher reads to its end."""
  script = tmp_path / "script.py"
  script.write_text(KILLED)
  with subprocess.Popen(
    [sys.executable, script, *paths],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout is not None
    workers = process.stdout.readline().split()
    timer = threading.Timer(20, lambda: [os.kill(int(pid), signal.SIGKILL) for pid in workers])
    timer.start()
    rest = process.stdout.read()  # Until nobody holds it open.
    assert len(workers) == 2 and not rest and timer.is_alive()
    timer.cancel()


IMPORTS = """
import sys
from data import encode, shards, tfrecord
assert "jax" not in sys.modules
from data import pipeline  # Grain itself imports jax.tree_util.
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
print("fine")
"""


def test_workers_touch_no_device(tmp_path):
  assert run_script(tmp_path / "script.py", IMPORTS) == ["fine"]
