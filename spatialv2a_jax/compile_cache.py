"""Compiled programs kept on disk, so that a second run starts at once."""

import os
import pathlib


def folder() -> pathlib.Path:
  """Returns JAX_COMPILATION_CACHE_DIR, or the project's folder in the user's cache."""
  chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/spatialv2a_jax/xla")
  return pathlib.Path(chosen).expanduser()


def keep() -> None:
  """Makes JAX keep compiled programs; JAX_ENABLE_COMPILATION_CACHE=false turns that off."""
  import jax

  jax.config.update("jax_compilation_cache_dir", str(folder()))
