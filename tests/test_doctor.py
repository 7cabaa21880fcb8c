"""The checks of the machine: all pass here, each can fail, and says how to mend it."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from spatialv2a_jax import compile_cache, doctor


def failing(capsys):
  """Names of the checks that fail, and what is printed."""
  code = doctor.run()
  lines = capsys.readouterr().out.splitlines()
  bad = [line.split()[1] for line in lines if line.startswith("FAIL")]
  assert code == int(bool(bad)) and len(lines) == len(doctor.CHECKS)
  return bad, lines


@pytest.fixture(autouse=True)
def sound_machine(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setattr(doctor, "FREE_GIB", 0.0)


def test_all_is_well_here(capsys, tmp_path):
  bad, lines = failing(capsys)
  assert not bad and all(line.startswith("ok") for line in lines)
  assert "8 x cpu (cpu)" in lines[2] and f"{tmp_path}/cache is writable" in lines[4]


def test_an_old_interpreter(monkeypatch, capsys):
  monkeypatch.setattr(sys, "version_info", (3, 10, 0))
  bad, lines = failing(capsys)
  assert bad == ["python"] and "->  use Python 3.11" in lines[0]


def test_a_missing_package(monkeypatch, capsys):
  version = importlib.metadata.version

  def lacking(name):
    if name == "optax":
      raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(importlib.metadata, "version", lacking)
  bad, lines = failing(capsys)
  assert bad == ["packages"] and "missing: optax" in lines[1] and "pip install" in lines[1]


def test_a_broken_driver(monkeypatch, capsys):
  def broken():
    raise RuntimeError("no CUDA\nand more")

  monkeypatch.setattr(jax, "devices", broken)
  bad, lines = failing(capsys)
  assert bad == ["devices"] and "no device: no CUDA  ->" in lines[2]


@pytest.mark.parametrize(
  "chosen, mend", [("cpu", "unset JAX_PLATFORMS=cpu"), ("", "jax[cuda12]==")]
)
def test_a_gpu_that_jax_does_not_see(monkeypatch, capsys, chosen, mend):
  monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
  monkeypatch.setenv("JAX_PLATFORMS", chosen)
  bad, lines = failing(capsys)
  assert not bad and "does not use" in lines[2] and mend in lines[2]


def test_a_missing_codec(monkeypatch, capsys):
  import av

  def absent(name, mode):
    if name == "libx264":
      raise ValueError(name)

  monkeypatch.setattr(av, "Codec", absent)
  bad, lines = failing(capsys)
  assert bad == ["codecs"] and "missing: libx264" in lines[3]


def test_a_cache_that_cannot_be_written(monkeypatch, capsys, tmp_path):
  (tmp_path / "file").touch()
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
  bad, lines = failing(capsys)
  assert bad == ["cache"] and "set JAX_COMPILATION_CACHE_DIR" in lines[4]


def test_a_full_disk(monkeypatch, capsys):
  monkeypatch.setattr(doctor, "FREE_GIB", 2.0)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 2**30))
  bad, lines = failing(capsys)
  assert bad == ["disk"] and "1.0 GiB free here  ->  free 2 GiB" in lines[5]


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
  before = jax.config.values["jax_compilation_cache_dir"]
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  try:
    compile_cache.keep()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  assert compile_cache.folder() == pathlib.Path.home() / ".cache/spatialv2a_jax/xla"


def test_even_programs_that_compile_in_no_time_are_kept(tmp_path):
  program = (
    "import jax; from spatialv2a_jax import compile_cache; compile_cache.keep();"
    "jax.jit(lambda x: x + 1)(1.0); print(compile_cache.found())"
  )
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
  environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
  found = [
    int(subprocess.check_output([sys.executable, "-c", program], env=environment)) for _ in range(2)
  ]
  assert found[0] == 0 and found[1] > 0
