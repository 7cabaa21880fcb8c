"""Runs of the tiny model on films of one window."""

import dataclasses

import pytest

from spatialv2a_jax import generate
from tests import tiny


@pytest.fixture(autouse=True)
def loaded(monkeypatch, model, model_folder):
  """The tiny model is compiled once for all runs."""
  load = {model_folder: model}
  monkeypatch.setattr(generate, "Generator", lambda path, **_: load[path])


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  """Videos of one window, with something that moves on the left and on the right."""
  folder = tmp_path_factory.mktemp("films")
  for i, name in enumerate(("left", "right")):
    tiny.film(folder / f"{name}.mp4", side=float(i), seed=i, sound=True)
  return folder


@pytest.fixture
def make(model_folder, tmp_path):
  """Runs `generate` with changed settings into tmp_path/out (or `out`); returns that folder."""

  def run(*inputs, out="out", code=0, **changes):
    out = tmp_path / out
    settings = dataclasses.replace(tiny.BASE, **changes)
    assert generate.run(list(inputs), model_folder, out, settings) == code
    return out

  return run


@pytest.fixture(scope="module")
def reference(films, model, model_folder, tmp_path_factory):
  """What the base settings make of left.mp4."""
  out = tmp_path_factory.mktemp("reference")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(generate, "Generator", lambda *_, **__: model)
    assert generate.run([films / "left.mp4"], model_folder, out, tiny.BASE) == 0
  return out
