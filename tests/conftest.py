"""Eight CPU devices for every test, set before anything touches a JAX backend."""

import os
import pathlib

from tests import NO_FUSION_EMITTERS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling dominates, and takes a fraction of the time without fusion emitters and optimisation.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  + NO_FUSION_EMITTERS,
)
# The tests compile some thousand programs, many of them in several places and in every run.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache/programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("NPROC", "16")  # XLA:CPU collectives need a thread per forced device.

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption("--all", action="store_true", help="also run tests marked slow or browser")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Leaves slow and browser tests to `--all`, unless a marker expression asks for them."""
  if config.getoption("--all") or config.getoption("-m"):
    return
  keep, drop = [], []
  for item in items:
    wanted = not ({"slow", "browser"} & {mark.name for mark in item.iter_markers()})
    (keep if wanted else drop).append(item)
  config.hook.pytest_deselected(items=drop)
  items[:] = keep


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
  """A folder with a tiny untrained model."""
  from tests import tiny  # Slow to import, and most tests need none of it.

  return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def model(model_folder):
  """That model, loaded once, so that it compiles once."""
  from spatialv2a_jax import generator

  return generator.Generator(model_folder)
