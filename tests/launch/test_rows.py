"""Which rows of a batch a process reads, where processes have different numbers of devices."""

import collections
import itertools
import json
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from data import captions, shards
from launch import tasks
from spatialv2a_jax import schema, sharding
from tests import loader_shards, runner

DEVICES = (2, 4, 2)  # Of three processes.
ENDS = (0, 2, 6, 8)  # Of their rows of a batch of 8.
EPOCH = 11  # Steps of 8 that are four epochs of 22 clips.
SETTINGS = {
  "data": {"batch_size": 8, "mirror": True, "workers": 0, "eval": ""},
  "seed": 3,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("shards")
  loader_shards.build(folder)
  data: dict = SETTINGS["data"]
  return SETTINGS | {"data": data | {"path": str(folder)}}


def source(config, mesh):
  return tasks.Source(config, mesh, sharding.Rules(), "features", loader_shards.SHAPES)


def test_uneven_processes_read_every_clip_once(config, monkeypatch):
  read = source(config, sharding.make_mesh(8, 1, 1))
  whole = list(itertools.islice(read(0), EPOCH))
  seen = collections.Counter()
  for rows in itertools.pairwise(ENDS):
    monkeypatch.setattr(sharding, "local_rows", lambda *_, rows=rows: rows)
    for all_rows, part in zip(whole, itertools.islice(read(0), EPOCH), strict=True):
      seen.update(loader_shards.numbers(part))
      for name, value in part.items():
        np.testing.assert_array_equal(value, all_rows[name][slice(*rows)])
  assert seen == {n: 4 for n in range(loader_shards.CLIPS)}


@pytest.mark.parametrize("seed", [3, 4])
def test_the_order_of_clips_is_that_of_the_seed_of_the_config(config, seed):
  folder = pathlib.Path(config["data"]["path"])
  read = source(config | {"seed": seed}, sharding.make_mesh(8, 1, 1))
  order = loader_shards.stream(
    shards.paths(folder), 2, batch_size=8, seed=seed, mirror=True, shapes=loader_shards.SHAPES
  )
  for batches in (read(0), read.whole()):
    taken = itertools.islice(batches, 2)
    assert sum(map(loader_shards.numbers, taken), []) == order


def test_other_texts_are_other_data(config, tmp_path):
  """Those of the clips to train on, and those of the clips held out."""
  mesh, folder = sharding.make_mesh(8, 1, 1), tmp_path / "copy"
  shutil.copytree(config["data"]["path"], folder)
  config = config | {"data": config["data"] | {"eval": str(folder)}}
  same = source(config, mesh).digests()
  assert same["path"] == same["eval"] and same["path_text"] == same["eval_text"]
  assert len(same) == 4 and len(set(same.values())) == 2
  shutil.rmtree(folder / captions.FOLDER)
  named = [f"caption {n}" for n in range(5)]
  captions.build(named, lambda x: 1 + loader_shards.text(x), folder, config={}, storage="bfloat16")
  other = source(config, mesh).digests()
  assert {name for name in same if other[name] != same[name]} == {"eval_text"}


PROCESS = """
import itertools, json, sys
import jax, numpy as np
from spatialv2a_jax import sharding
from spatialv2a_jax.training import cluster
from tests.launch import test_rows
where, index, config = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
cluster.start(where, 3, index)
mesh, rules = sharding.make_mesh(-1, 1, 1), sharding.Rules()
read = test_rows.source(config, mesh)(0)
local = list(itertools.islice(read, test_rows.EPOCH))
lies = [
  [shard.data.item(), shard.index[0].start or 0]
  for shard in sharding.global_batch(local[0], mesh, rules, 8)["id_b"].addressable_shards
]
rows = sharding.local_rows(mesh, rules, 8)
print(json.dumps({"rows": rows, "ids": [x["id_b"].tolist() for x in local], "lies": lies}))
cluster.meet()
"""


@pytest.mark.slow
def test_three_processes_load_the_rows_that_their_devices_hold(config):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    where = f"localhost:{probe.getsockname()[1]}"
  started = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, where, str(index), json.dumps(config)],
      cwd=runner.ROOT,
      env=runner.environment(devices),
      stdout=subprocess.PIPE,
      text=True,
    )
    for index, devices in enumerate(DEVICES)
  ]
  told = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]
  assert [tuple(x["rows"]) for x in told] == list(itertools.pairwise(ENDS))
  whole = itertools.islice(source(config, sharding.make_mesh(8, 1, 1))(0), EPOCH)
  ids = [batch["id_b"].tolist() for batch in whole]
  assert [sum(parts, []) for parts in zip(*(x["ids"] for x in told), strict=True)] == ids
  lies = sorted((row, clip) for x in told for clip, row in x["lies"])
  assert lies == list(enumerate(ids[0]))
  assert collections.Counter(sum(ids, [])) == {schema.clip_id(f"clip{n}"): 4 for n in range(22)}
