"""Compiled programs kept on disk, so that a second run starts at once."""

import os
import pathlib

_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_found = 0


def folder() -> pathlib.Path:
  """Returns JAX_COMPILATION_CACHE_DIR, or the project's folder in the user's cache."""
  chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/spatialv2a_jax/xla")
  return pathlib.Path(chosen).expanduser()


def keep() -> None:
  """Makes JAX keep compiled programs; JAX_ENABLE_COMPILATION_CACHE=false turns that off."""
  import jax

  jax.config.update("jax_compilation_cache_dir", str(folder()))
  if _LEAST not in os.environ:  # By default, what took less than a second is compiled every time.
    jax.config.update(_LEAST.lower(), 0.0)
  jax.monitoring.register_event_listener(_count)


def found() -> int:
  """Returns how many programs were read from disk since `keep`, instead of being compiled."""
  return _found


def _count(event: str, **_: object) -> None:
  global _found
  _found += event == "/jax/compilation_cache/cache_hits"
