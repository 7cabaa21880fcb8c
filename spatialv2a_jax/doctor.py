"""Checks of the machine, each with a line that says how to mend it."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable

import spatialv2a_jax
from spatialv2a_jax import compile_cache

Check = tuple[bool, str, str]  # ok, what was found, how to mend it

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "av", "soundfile")
FREE_GIB = 2.0


def python() -> Check:
  """The interpreter is one the project is tested on."""
  found = f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
  return sys.version_info >= (3, 11), found, "use Python 3.11 or 3.12"


def packages() -> Check:
  """Every package of the core install is there."""
  found, missing = [f"spatialv2a_jax {spatialv2a_jax.__version__}"], []
  for name in PACKAGES:
    try:
      found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      missing.append(name)
  text = ", ".join(found) + (f"; missing: {', '.join(missing)}" if missing else "")
  return not missing, text, "in a checkout: pip install -e ."


def devices() -> Check:
  """JAX starts and sees a device."""
  import jax

  try:
    seen = jax.devices()
  except (RuntimeError, AssertionError) as error:  # The second of a plugin that is not there.
    return False, f"no device: {error}".splitlines()[0], "set JAX_PLATFORMS=cpu, or mend the driver"
  found = f"{len(seen)} x {seen[0].device_kind} ({jax.default_backend()})"
  if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
    chosen = os.environ.get("JAX_PLATFORMS")
    mend = (
      f"unset JAX_PLATFORMS={chosen}" if chosen else f'pip install "jax[cuda12]=={jax.__version__}"'
    )
    found += f"; there is an NVIDIA driver that JAX does not use: {mend}"
  return True, found, ""


def codecs() -> Check:
  """PyAV can read and write what the commands read and write."""
  import av

  wanted = {"h264": "r", "libx264": "w", "aac": "w", "flac": "w"}
  missing = []
  for name, mode in wanted.items():
    try:
      av.Codec(name, mode)  # type: ignore[arg-type]
    except ValueError:
      missing.append(name)
  text = "h264, AAC and FLAC in and out" + (f"; missing: {', '.join(missing)}" * bool(missing))
  return not missing, text, "pip install --upgrade av"


def cache() -> Check:
  """Compiled programs can be kept from one run to the next."""
  folder = compile_cache.folder()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    return (
      False,
      f"{folder}: {error.strerror}",
      "set JAX_COMPILATION_CACHE_DIR to a writable folder",
    )
  return True, f"{folder} is writable", ""


def disk() -> Check:
  """There is room in the working folder."""
  free = shutil.disk_usage(pathlib.Path.cwd()).free / 2**30
  return free >= FREE_GIB, f"{free:.1f} GiB free here", f"free {FREE_GIB:g} GiB, or work elsewhere"


CHECKS: dict[str, Callable[[], Check]] = {
  "python": python,
  "packages": packages,
  "devices": devices,
  "codecs": codecs,
  "cache": cache,
  "disk": disk,
}


def run() -> int:
  """Prints one line per check; returns 0 if all pass, 1 otherwise."""
  failed = 0
  for name, check in CHECKS.items():
    ok, found, mend = check()
    failed += not ok
    print(f"{'ok  ' if ok else 'FAIL'} {name:9} {found}" + ("" if ok else f"  ->  {mend}"))
  return int(failed > 0)
