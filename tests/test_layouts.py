"""Where every array of a run lies, per config and mesh: golden files to be read in diffs.

UPDATE_GOLDEN=1 python -m pytest tests/test_layouts.py writes them anew.
"""

import functools
import importlib
import os
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from launch import estimate, tasks
from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "layouts"
CONFIGS = sorted(
  path.stem
  for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
  if path.stem != "__init__"
)
FLOWS = ["small_16k", "small_44k", "medium_44k", "large_44k"]
CASES = [
  *((name, mesh, "") for name in CONFIGS for mesh in ((8, 1, 1), (1, 8, 1))),
  ("tiny", (2, 2, 2), ""),
  ("small_16k", (2, 4, 1), ""),
  ("small_16k", (1, 8, 1), "fsdp"),
  ("large_44k", (2, 4, 1), ""),
  ("large_44k", (2, 2, 2), ""),
]


def file_of(name, mesh, zero):
  return GOLDEN / f"{name}_{'x'.join(map(str, mesh))}{zero and f'_zero_{zero}'}.txt"


@functools.cache
def shapes(name):
  """Those of the parameters, which depend on no mesh."""
  config = config_of(name)
  init = tasks.build(config, tasks.mesh_of(config), sharding.Rules()).init
  return jax.eval_shape(init, jax.random.key(0))


def config_of(name):
  return importlib.import_module(f"configs.{name}").get_config().to_dict()


@functools.cache
def state(name, mesh, **rules):
  """What a run of the config holds; its parameters are looked up, which are slow to trace."""
  config = config_of(name)
  config["mesh"] = dict(zip(sharding.MESH_AXES, mesh, strict=True))
  config["rules"] |= rules

  build, known = tasks.build, shapes(name)

  def zeros(_):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), known)

  with mock.patch.object(tasks, "build", lambda *args: build(*args)._replace(init=zeros)):
    return estimate.program(config, jax.devices()).state


def folded(state):
  """The lines of `sharding.table`, under headings that name the parts of the state they hold for.

  Moments and averages of a parameter stand in its line where they lie as it does.
  """
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  params = {sharding.parameter_name(path) for path, _ in leaves}
  parts: dict[str, list[str]] = {}
  for line in sharding.table(state):
    path, rest = line.split(" ", 1)
    steps = path.split("/")
    tails = ["/".join(steps[i:]) for i in range(1, len(steps))]
    name = next((tail for tail in tails if tail in params), "")
    parts.setdefault(f"{name} {rest}", []).append(path.removesuffix(name).rstrip("/"))
  sections: dict[str, list[str]] = {}
  for line, holders in parts.items():
    sections.setdefault(", ".join(holders), []).append(line.strip())
  return "".join(f"{holders}:\n  " + "\n  ".join(x) + "\n" for holders, x in sections.items())


@pytest.mark.parametrize("name, mesh, zero", CASES)
def test_every_array_lies_where_it_did(name, mesh, zero):
  found = folded(state(name, mesh, **{"zero": zero} if zero else {}))
  path = file_of(name, mesh, zero)
  if os.environ.get("UPDATE_GOLDEN"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(found)
  assert found == path.read_text(), f"{path.name}: read the diff, then UPDATE_GOLDEN=1"


def test_every_config_has_its_layouts_and_every_layout_its_config():
  assert set(FLOWS) < set(CONFIGS) and {case[0] for case in CASES} == set(CONFIGS)
  assert {path.name for path in GOLDEN.iterdir()} == {file_of(*case).name for case in CASES}


def test_a_line_stands_for_every_array_that_lies_so():
  held = state("small_16k", (8, 1, 1))
  count = 0
  for line in folded(held).splitlines():
    if not line.startswith("  "):
      holders = line.count(", ") + 1
    else:
      count += holders
  assert count == len(jax.tree.leaves(held))


@pytest.mark.parametrize("name", FLOWS)
def test_fsdp_splits_all_but_two_percent_of_every_flow_model(name):
  params = jax.tree.leaves(state(name, (1, 8, 1)).params)
  size = [x.size * x.dtype.itemsize for x in params]
  whole = [n for n, x in zip(size, params, strict=True) if x.sharding.is_fully_replicated]
  assert sum(size) > 2**26 and sum(whole) <= 0.02 * sum(size)


def test_zero_splits_what_it_says_it_does():
  whole = state("small_16k", (8, 1, 1), zero=None)
  split = state("small_16k", (8, 1, 1))
  for part in ("opt", "ema"):
    sizes = [sharding.bytes_per_device(getattr(s, part)) for s in (whole, split)]
    assert sizes[1] < 1.02 * sizes[0] / 8
  assert sharding.bytes_per_device(split.params) == sharding.bytes_per_device(whole.params)


def test_zero_splits_over_several_mesh_axes():
  split = state("small_16k", (2, 4, 1), width="", zero="data+fsdp")
  for part, parts in (("opt", 8), ("params", 1)):
    held = getattr(split, part)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    assert sharding.bytes_per_device(held) == pytest.approx(total / parts, rel=0.02)


def test_a_large_model_that_fsdp_leaves_whole_is_refused():
  with pytest.raises(UserError, match="mesh axis fsdp=8 leaves 100.0 % of the parameters whole"):
    state("small_16k", (1, 8, 1), width=None)


def test_heads_that_do_not_divide_are_named():
  with pytest.raises(UserError, match=r"out/kernel: axis heads of size 7 .* 2 devices"):
    state("small_16k", (4, 1, 2))


def test_axes_that_clash_are_named():
  with pytest.raises(UserError, match=r"kernel: axes .* would use mesh axis tensor twice"):
    state("small_16k", (8, 1, 1), width="tensor")
