import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from data import layout, shards, tf_example, tfrecord
from spatialv2a_jax.errors import MissingAssetError, UnreachableError, UserError

ITEMS = [shards.Item(f"clip{i}", i) for i in range(20)]


@dataclasses.dataclass
class Maker:
  """Counts calls; clips listed in `broken` fail."""

  broken: tuple[int, ...] = ()
  error: Exception = dataclasses.field(default_factory=lambda: ValueError("no\nsound"))
  calls: int = 0

  def __call__(self, item: shards.Item) -> shards.Record:
    self.calls += 1
    if item.payload in self.broken:
      raise self.error
    return {"x": np.full((2, 3), item.payload, np.float16), "caption": f"clip {item.payload}"}


# What a user's script looks like; workers import it, so `Maker` must live in it.
TWO_WORKERS = """
import sys
import numpy as np
from data import shards

def make(item):
  if item.payload == 3:
    raise ValueError("no sound")
  return {"x": np.full((2, 3), item.payload, np.float16), "caption": f"clip {item.payload}"}

if __name__ == "__main__":
  items = [shards.Item(f"clip{i}", i) for i in range(20)]
  shards.build(items, make, sys.argv[1], shards=3, config={"a": 1}, jobs=2)
"""
ROOT = pathlib.Path(shards.__file__).parents[1]


def build(out: pathlib.Path, maker: Maker | None = None, items=ITEMS, **options):
  options = {"shards": 3, "config": {"a": 1}, **options}
  return shards.build(items, maker or Maker(), out, **options)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def ids(folder: pathlib.Path) -> list[str]:
  source = tfrecord.TFRecordSource(shards.paths(folder))
  return [bytes(tf_example.decode(source[i])["id"]).decode() for i in range(len(source))]


def test_each_clip_once_where_its_hash_says(tmp_path):
  stats = build(tmp_path)
  assert stats == {"clips_in": 20, "clips_out": 20, "bad": {}, "complete": True}
  assert sorted(ids(tmp_path)) == sorted(item.id for item in ITEMS)
  source = tfrecord.TFRecordSource(shards.paths(tmp_path))
  for i, name in enumerate(ids(tmp_path)):
    shard = int(hashlib.md5(name.encode()).hexdigest(), 16) % 3
    assert source.locate(i)[0].endswith(f"-{shard:05d}-of-00003")


def test_same_bytes_for_any_workers_order_and_parts(tmp_path):
  build(tmp_path / "one", Maker((3,)))
  build(tmp_path / "reversed", Maker((3,)), items=ITEMS[::-1])
  script = tmp_path / "two.py"
  script.write_text(TWO_WORKERS)
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  subprocess.run(
    [sys.executable, script, tmp_path / "two"],
    check=True,
    env={**os.environ, "PYTHONPATH": path},
    timeout=60,
  )
  first = build(tmp_path / "parts", Maker((3,)), part=(1, 2))
  assert not first["complete"] and not (tmp_path / "parts" / "manifest.json").exists()
  assert build(tmp_path / "parts", Maker((3,)), part=(0, 2))["complete"]
  one = contents(tmp_path / "one")
  assert len(one) == 3 * 3 + 4
  for other in ("reversed", "two", "parts"):
    assert contents(tmp_path / other) == one


def test_manifest_holds_the_checksum_of_each_shard(tmp_path):
  build(tmp_path)
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  assert manifest["config"] == {"a": 1} and manifest["records"] == 20
  for shard in manifest["shards"]:
    blob = (tmp_path / shard["file"]).read_bytes()
    assert shard["sha256"] == hashlib.sha256(blob).hexdigest() and shard["bytes"] == len(blob)


def test_rerun_makes_only_what_is_missing(tmp_path):
  build(tmp_path)
  before = contents(tmp_path)
  again = Maker()
  build(tmp_path, again)
  assert again.calls == 0
  lost = shards.paths(tmp_path)[1]
  records = len(tfrecord.read_index(lost))
  lost.unlink()
  build(tmp_path, again)
  assert again.calls == records and contents(tmp_path) == before


def test_a_shard_that_was_cut_short_is_made_again(tmp_path):
  build(tmp_path)
  before, cut = contents(tmp_path), shards.paths(tmp_path)[1]
  os.truncate(cut, cut.stat().st_size - 1)
  again = Maker()
  build(tmp_path, again)
  assert again.calls == json.loads(shards.sidecar(cut).read_text())["records"]
  assert contents(tmp_path) == before


@pytest.mark.parametrize("change", ["config", "stamp", "clips"])
def test_rerun_after_a_change(tmp_path, change):
  build(tmp_path)
  maker, items, config = Maker(), list(ITEMS), {"a": 1}
  if change == "config":
    config = {"a": 2}
  elif change == "stamp":
    items[4] = items[4]._replace(stamp="edited")
  else:
    items = items[:-1]
  build(tmp_path, maker, items, config=config)
  if change == "config":
    assert maker.calls == 20
  else:
    assert 0 < maker.calls < 20
  assert sorted(ids(tmp_path)) == sorted(item.id for item in items)


def test_an_interrupted_build_goes_on(tmp_path):
  def interrupted(item: shards.Item) -> shards.Record:
    if len(list(tmp_path.glob("*.tfrecord-*.json"))) == 1:
      raise KeyboardInterrupt  # Somewhere in the second shard.
    return Maker()(item)

  with pytest.raises(KeyboardInterrupt):
    shards.build(ITEMS, interrupted, tmp_path, shards=3, config={"a": 1})
  (first,) = tmp_path.glob("*.json")
  assert sorted(contents(tmp_path)) == [
    first.stem,
    f"{first.stem}.index",
    first.name,
  ]
  rest = Maker()
  build(tmp_path, rest)
  assert rest.calls == 20 - json.loads(first.read_text())["records"]
  build(tmp_path / "fresh")
  assert contents(tmp_path) == contents(tmp_path / "fresh")


def test_another_cut_leaves_no_shard_of_the_one_before(tmp_path):
  """Nor of another data set in the same folder does it take any."""
  build(tmp_path)
  others = [f"{name}-train.tfrecord-00000-of-00001" for name in ("other", f"{shards.NAME}-more")]
  others.append(f"{shards.NAME}-train.tfrecord-00000-of-00003.bak")
  for name in others:
    (tmp_path / name).touch()
  build(tmp_path, shards=2)
  for name in others:
    (tmp_path / name).unlink()
  build(tmp_path / "fresh", shards=2)
  assert contents(tmp_path) == contents(tmp_path / "fresh")


def test_bad_clips_are_counted_and_named(tmp_path):
  stats = build(tmp_path, Maker((3, 7)))
  assert stats["clips_in"] == 20 and stats["clips_out"] == 18
  assert stats["bad"] == {"clip3": "ValueError: no sound", "clip7": "ValueError: no sound"}
  assert json.loads((tmp_path / "stats.json").read_text()) == stats
  assert not {"clip3", "clip7"} & set(ids(tmp_path))


def test_too_many_bad_clips_end_the_build(tmp_path):
  with pytest.raises(UserError, match="more than 5 bad clips.*no sound"):
    build(tmp_path, Maker(tuple(range(6))))
  assert not (tmp_path / "manifest.json").exists()
  assert build(tmp_path, Maker(tuple(range(6))), max_bad=0.5)["clips_out"] == 14


def test_one_bad_clip_in_a_hundred_is_put_up_with(tmp_path):
  items = [shards.Item(f"clip{i}", i) for i in range(600)]
  assert build(tmp_path / "a", Maker(tuple(range(6))), items)["clips_out"] == 594
  with pytest.raises(UserError, match="more than 6 bad clips"):
    build(tmp_path / "b", Maker(tuple(range(7))), items)


def test_nothing_usable_is_an_error(tmp_path):
  with pytest.raises(UserError, match="not one clip could be used.*no sound"):
    build(tmp_path, Maker((0, 1)), items=ITEMS[:2])


def test_missing_weights_are_not_the_clips_fault(tmp_path):
  with pytest.raises(MissingAssetError):
    build(tmp_path, Maker((0,), error=MissingAssetError("no weights")))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_make_a_bad_clip(tmp_path, value):
  def maker(item: shards.Item) -> shards.Record:
    return {"x": np.array([value if item.payload == 2 else 1.0], np.float32)}

  stats = shards.build(ITEMS, maker, tmp_path, shards=2, config={})
  assert stats["bad"] == {"clip2": "field x holds NaN or infinity"}


def test_shapes_must_agree_within_and_between_shards(tmp_path):
  def maker(item: shards.Item) -> shards.Record:
    return {"x": np.zeros(4 if item.payload == 2 else 3, np.float32)}

  bad = shards.build(ITEMS, maker, tmp_path / "in", shards=1, config={})["bad"]
  # The first clip of a shard sets the layout; which one that is, the hash decides.
  assert set(bad) == {"clip2"}
  alone = {int(hashlib.md5(i.id.encode()).hexdigest(), 16) % 9: i for i in ITEMS[:4]}
  assert len(alone) == 4
  with pytest.raises(UserError, match="differ in x"):
    shards.build(ITEMS[:4], maker, tmp_path / "between", shards=9, config={})


def test_fields_must_agree(tmp_path):
  def maker(item: shards.Item) -> shards.Record:
    more = {} if item.payload == 2 else {"y": np.zeros(1, np.float32)}
    return {"x": np.zeros(3, np.float32), **more}

  bad = shards.build(ITEMS, maker, tmp_path, shards=1, config={})["bad"]
  assert bad == {"clip2": "without ['y']"}


def test_nan_may_stand_for_an_unknown_value(tmp_path):
  def maker(item: shards.Item) -> shards.Record:
    return {"score": np.array([np.nan, item.payload], np.float32)}

  stats = shards.build(ITEMS, maker, tmp_path, shards=2, config={}, unknown=["score"])
  assert not stats["bad"] and stats["clips_out"] == 20


def test_splits_share_a_folder(tmp_path):
  items = [item._replace(split="test" if item.payload < 6 else "train") for item in ITEMS]
  build(tmp_path, items=items, shards={"train": 3, "test": 2}, name="mine", description="Clips.")
  assert len(shards.paths(tmp_path)) == 3 and len(shards.paths(tmp_path, "test")) == 2
  assert sorted(ids(tmp_path)) == sorted(f"clip{i}" for i in range(6, 20))
  test = tfrecord.TFRecordSource(shards.paths(tmp_path, "test"))
  assert len(test) == 6 and all("/mine-test.tfrecord-0000" in path for path in test.paths)
  with pytest.raises(UserError, match="no split 'val', only test, train"):
    shards.paths(tmp_path, "val")


def test_a_folder_that_cannot_be_written_is_said_before_the_work_starts(tmp_path):
  (tmp_path / "file").touch()
  maker = Maker()
  with pytest.raises(UserError, match="cannot write to .*file/out: .*choose another --out"):
    build(tmp_path / "file" / "out", maker)
  assert not maker.calls


def test_a_folder_may_have_a_colon_in_its_name(tmp_path):
  """As folders named by the time have."""
  folder = tmp_path / "2026-11-23T10:30" / "raw"
  items = [item._replace(split="test" if item.payload < 6 else "train") for item in ITEMS]
  build(folder, items=items, shards={"train": 3, "test": 2})
  assert len(shards.paths(folder)) == 3 and len(shards.paths(folder, "test")) == 2


def test_makers_of_batches_get_the_clips_of_a_shard(tmp_path):
  """And what they yield in a clip's place is why it is bad."""

  def make(items: Sequence[shards.Item]) -> Iterator[shards.Record | Exception]:
    for item in items:
      yield ValueError("odd") if item.payload % 2 else {"n": np.full(2, item.payload)}

  stats = shards.build(ITEMS, make, tmp_path, shards=3, config={}, batched=True, max_bad=0.6)
  assert stats["bad"] == {f"clip{i}": "ValueError: odd" for i in range(1, 20, 2)}
  assert sorted(ids(tmp_path)) == sorted(f"clip{i}" for i in range(0, 20, 2))


def test_duplicate_ids_are_refused(tmp_path):
  with pytest.raises(UserError, match="'clip1' occurs twice"):
    build(tmp_path, items=[*ITEMS, ITEMS[1]])


def test_a_shard_without_its_own_sidecar_is_unfinished(tmp_path, monkeypatch):
  build(tmp_path, config={"a": 1})
  with monkeypatch.context() as patch:
    patch.setattr(layout, "write_json", lambda path, content: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):  # The new shard is in place, its sidecar is not.
      build(tmp_path, config={"a": 2})
  again = Maker()
  build(tmp_path, again, config={"a": 1})
  assert again.calls > 0


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EIO, "Input/output error"),
    MemoryError(),
    RuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    UnreachableError("no such file: clip9.mp4"),
    tfrecord.CorruptRecordError("clips/x", 9, "checksum"),
  ],
  ids=lambda error: type(error).__name__,
)
def test_a_fault_of_the_machine_costs_no_clip(tmp_path, error):
  """A clip that is left out is so for good: nobody looks at it again."""
  with pytest.raises(UnreachableError if isinstance(error, OSError) else type(error)):
    build(tmp_path / "a", Maker(broken=(9,), error=error), max_bad=1.0)
  build(tmp_path / "a")
  build(tmp_path / "b")
  assert contents(tmp_path / "a") == contents(tmp_path / "b") and len(ids(tmp_path / "a")) == 20


def test_half_of_another_build_is_none(tmp_path):
  """Its shards have the names and sizes of those that they replace."""
  build(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    build(tmp_path, Maker(broken=(9,), error=KeyboardInterrupt()), config={"a": 2})
  with pytest.raises(UserError, match="finish building"):
    shards.paths(tmp_path)
  build(tmp_path, config={"a": 2})
  assert layout.read_json(tmp_path / "manifest.json")["config"] == {"a": 2}
