"""Where every array of a run lies, per config and mesh: golden files to be read in diffs.

UPDATE_GOLDEN=1 python -m pytest tests/test_layouts.py writes them anew.
"""

import os
import pathlib

import jax
import pytest

from configs import small_16k, tiny
from launch import estimate
from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "layouts"
CONFIGS = {"small_16k": small_16k, "tiny": tiny}


def state(name, mesh, **rules):
  config = CONFIGS[name].get_config().to_dict()
  config["mesh"] = dict(zip(sharding.MESH_AXES, mesh, strict=True))
  config["rules"] |= rules
  return estimate.program(config, jax.devices()).state


@pytest.mark.parametrize(
  "name, mesh",
  [("small_16k", (8, 1, 1)), ("small_16k", (1, 8, 1)), ("tiny", (8, 1, 1)), ("tiny", (2, 2, 2))],
)
def test_every_array_lies_where_it_did(name, mesh):
  found = "\n".join(sharding.table(state(name, mesh))) + "\n"
  path = GOLDEN / f"{name}_{'x'.join(map(str, mesh))}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(found)
  assert found == path.read_text(), f"{path.name}: read the diff, then UPDATE_GOLDEN=1"


def test_zero_splits_what_it_says_it_does():
  whole = state("small_16k", (8, 1, 1), zero=None)
  split = state("small_16k", (8, 1, 1))
  for part in ("opt", "ema"):
    sizes = [sharding.bytes_per_device(getattr(s, part)) for s in (whole, split)]
    assert sizes[1] < 1.02 * sizes[0] / 8
  assert sharding.bytes_per_device(split.params) == sharding.bytes_per_device(whole.params)


def test_a_large_model_that_fsdp_leaves_whole_is_refused():
  with pytest.raises(UserError, match="mesh axis fsdp=8 leaves 100 % of the parameters whole"):
    state("small_16k", (1, 8, 1), width=None)


def test_heads_that_do_not_divide_are_named():
  with pytest.raises(UserError, match=r"out/kernel: axis heads of size 7 .* 2 devices"):
    state("small_16k", (4, 1, 2))
