"""Where pictures say that they sound: by motion, by a track, by CLIPSeg under ACL's calibration."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from data import layout, localise, shards, stages, tf_example, tfrecord
from launch import data as command
from spatialv2a_jax import features, io, model_folder, tokenizer
from spatialv2a_jax.encoders import Encoders
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import localizer
from spatialv2a_jax.weights import Weights
from tests.data import clips

LABELS = {"a": "a dog", "b": "a bell", "c": "a dog", "d": "rain, wind", "e": ""}


def locate(path: pathlib.Path, name: str = "motion") -> localise.Seen:
  locator = localise.load(name)
  return locator.look(locator.read(str(path), 1.0), 1.0, "a dog")


@pytest.mark.parametrize(("column", "degrees"), [(0.2, 36), (0.5, 0), (0.8, -36)])
def test_motion_says_where(tmp_path, column, degrees):
  found = locate(clips.write(tmp_path / "a.mp4", column=column))
  assert len(found["azimuth_deg"]) == len(found["located"]) == 8 and all(found["located"])
  assert np.mean(found["azimuth_deg"]) == pytest.approx(degrees, abs=3)


def test_a_video_a_little_short_holds_its_last_frame(tmp_path):
  found = locate(clips.write(tmp_path / "a.mp4", 0.96))
  assert len(found["azimuth_deg"]) == 8


def test_a_track_says_where_whatever_moves(tmp_path):
  (tmp_path / "track.csv").write_text("time_s,azimuth_deg\n0,30\n")
  found = locate(clips.write(tmp_path / "a.mp4", column=0.8), f"track:{tmp_path / 'track.csv'}")
  assert np.mean(found["azimuth_deg"]) == pytest.approx(30, abs=1) and all(found["located"])


def test_what_a_track_says_is_its_identity_not_where_it_lies(tmp_path):
  for name, degrees in (("a.csv", 30), ("b.csv", 30), ("c.csv", 31)):
    (tmp_path / name).write_text(f"time_s,azimuth_deg\n0,{degrees}\n")
  a, b, c = (localise.load(f"track:{tmp_path / n}").identity for n in ("a.csv", "b.csv", "c.csv"))
  assert a == b != c


@pytest.mark.parametrize("name", ["moon", "track:", "acl:dog.wav"])
def test_other_names_are_refused(name):
  with pytest.raises(UserError, match=name):
    localise.load(name)


# --- acl, through the command ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("videos")
  for n, name in enumerate(LABELS):
    clips.write(folder / f"{name}.mp4", seed=n, column=0.2 + 0.15 * n)
  (folder / "broken.mp4").write_bytes(b"no video")
  write_labels(folder / "labels.csv", LABELS)
  return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> pathlib.Path:
  """CLIPSeg, tiny, whose maps depend on patches and on the prompt: by chance they hardly would."""
  pytest.importorskip("ftfy", reason="the tokenizer is in the extra `encoders`")
  from tests import tiny_mmaudio

  folder = tmp_path_factory.mktemp("parts")
  config, params = tiny_mmaudio.networks()["clipseg"]
  decoder, net = params["decoder"], localizer.build(config)
  for name in ("film_times", "film_plus"):
    decoder[name]["kernel"] *= 40
  for name in ("enlarge_0", "enlarge_1"):  # Every pixel of a patch alike.
    kernel = decoder[name]["kernel"]
    decoder[name]["kernel"] = 8 * kernel.mean((1, 2), keepdims=True) + 0 * kernel
    decoder[name]["bias"] *= 0
  side = config.grid * config.patch
  seen = io.read_video(clips.write(folder / "a.mp4", column=0.3), 8, (side, side))
  logits = jax.jit(lambda p, x: net.logits(p, x, net.image(p, x[:1])))(params, seen)
  decoder["enlarge_1"]["bias"] -= np.quantile(logits, 0.7) + localizer.SHIFT
  model_folder.save_model(folder, {"clipseg": params}, {}, {"clipseg": dataclasses.asdict(config)})
  shutil.copy(tiny_mmaudio.MERGES, folder / tokenizer.FILE)
  return folder


def write_labels(path: pathlib.Path, labels: dict[str, str]) -> None:
  lines = [f'{name},"{label}"' for name, label in (labels | {"broken": "x"}).items()]
  path.write_text("\n".join(["id,label", *lines]))


def arguments(videos: pathlib.Path, out: pathlib.Path, *more: object) -> list[str]:
  given = ["--videos", videos, "--labels", videos / "labels.csv", "--out", out, "--seconds", 1]
  given += ["--clips-per-shard", 2, "--jobs", 1, "--localizer", "acl", *more]
  return ["vggsound", *map(str, given)]


def build(videos: pathlib.Path, out: pathlib.Path, parts: pathlib.Path, *more: object) -> None:
  localise_anew()
  assert command.main(arguments(videos, out, "--parts", parts, *more)) == 0


def localise_anew() -> None:
  """Forgets the networks of this process, as a new one would know none."""
  stages._locator.cache_clear()


def tracks(out: pathlib.Path) -> dict[str, np.ndarray]:
  fields = layout.read_features(out / "raw")
  source = tfrecord.TFRecordSource(shards.paths(out / "raw"))
  records = (tf_example.decode(source[i]) for i in range(len(source)))
  value = functools.partial(tf_example.value_of)
  return {
    str(value(raw["id"], fields["id"])): np.asarray(value(raw["azimuth"], fields["azimuth"]))
    for raw in records
  }


def contents(out: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in (out / "raw").iterdir()}


@pytest.mark.slow
def test_a_build_by_acl(videos, parts, tmp_path, monkeypatch, capsys):
  """As the network places each frame; its weights are read once; a second run looks at nothing."""
  loaded, out = [], tmp_path / "out"
  verify = model_folder.Model.verify
  monkeypatch.setattr(
    model_folder.Model, "verify", lambda self, name: loaded.append(name) or verify(self, name)
  )
  build(videos, out, parts)
  assert loaded == ["clipseg"]  # For three slices and three texts.
  funnel = json.loads((out / "funnel.json").read_text())
  assert funnel["kept"] == 5 and funnel["clips"]["broken"]["reason"] == "unreadable"
  found: dict[str, dict[str, list[float]]] = {}
  for path in out.glob("slices/*/localise.json"):
    found |= json.loads(path.read_text())["found"]
  weights = Weights([model_folder.open_model(parts)])
  encoders = Encoders(features.Config(encoder="random", localizer="acl"), weights)
  for name, label in LABELS.items():
    stage = encoders.stages(label)[-1]
    assert stage.network == "clipseg"
    spatial_vk = encoders.read(videos / f"{name}.mp4", [stage], 1.0)["spatial_vk"]
    np.testing.assert_allclose(found[name]["azimuth_deg"], -60 * spatial_vk[:, 0], atol=0.006)
    np.testing.assert_array_equal(found[name]["located"], spatial_vk[:, 1] > 0)
  assert any(track.max() > 10 for track in tracks(out).values())
  manifest = json.loads((out / "raw" / "manifest.json").read_text())
  assert set(manifest["config"]["localizer_weights"]) == {"clipseg"}
  assert "parts" not in manifest["config"]  # Where weights lie makes no difference.

  before, read = contents(out), len(loaded)
  monkeypatch.setattr(localise.Acl, "look", lambda *_: pytest.fail("looked again"))
  localise_anew()
  build(videos, out, parts)
  assert contents(out) == before and len(loaded) == read
  assert command.main(["audit", str(out), "--videos", str(videos), "--clips", "2"]) in (0, 1)
  assert "<canvas" in (out / "audit.html").read_text()


@pytest.mark.slow
def test_another_label_is_looked_for_anew(videos, parts, tmp_path):
  build(videos, tmp_path / "out", parts)
  before = tracks(tmp_path / "out")
  write_labels(tmp_path / "labels.csv", LABELS | {"b": "a dog"})
  build(videos, tmp_path / "out", parts, "--labels", tmp_path / "labels.csv")
  after = tracks(tmp_path / "out")
  assert [name for name in LABELS if not np.array_equal(before[name], after[name])] == ["b"]


@pytest.mark.slow
def test_processes_and_beam_write_the_same_bytes(videos, parts, tmp_path):
  build(videos, tmp_path / "one", parts)
  build(videos, tmp_path / "two", parts, "--jobs", 2)
  assert contents(tmp_path / "two") == contents(tmp_path / "one")
  pytest.importorskip("apache_beam", reason="the rest needs the extra beam")
  build(videos, tmp_path / "beam", parts, "--beam", "DirectRunner")
  assert contents(tmp_path / "beam") == contents(tmp_path / "one")


@pytest.mark.parametrize(
  ("more", "code", "why"),
  [
    ([], 3, "--localizer acl takes trained networks: give --parts DIR"),
    (["--parts", "nowhere"], 3, "no model folder nowhere"),
    (["--parts", "clip_only"], 3, "holds no weights of: clipseg"),
    (["--parts", "clip_only", "--localizer", "motion"], 2, "--parts needs --features or"),
    (["--localizer", "acl:dog.wav"], 2, "the labels are the prompts"),
  ],
)
def test_mistakes_are_said_before_the_work_starts(
  videos, tmp_path, capsys, monkeypatch, more, code, why
):
  monkeypatch.chdir(tmp_path)
  model_folder.save_model("clip_only", {"clip": {"x": np.zeros(1, "f4")}}, {}, {})
  assert command.main(arguments(videos, tmp_path / "out", *more)) == code
  error = capsys.readouterr().err
  assert why in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_devices_that_another_process_holds_are_said(parts, monkeypatch):
  def held() -> str:
    raise RuntimeError("TPU is in use")

  monkeypatch.setattr(jax, "local_devices", held)
  with pytest.raises(UserError, match="TPU is in use.*--jobs 1"):
    localise.Acl(str(parts)).load()


def test_what_all_slices_share_is_loaded_in_setup(parts, tmp_path):
  """Which Beam calls once per worker."""
  localise_anew()
  settings = stages.Settings(localizer="acl", parts=str(parts))
  stages.Slice(tmp_path, settings).setup()
  locator = stages._locator("acl", str(parts))
  assert isinstance(locator, localise.Acl) and locator._encoders is not None


@pytest.mark.slow
def test_damaged_weights_end_the_build_and_drop_no_clip(videos, parts, tmp_path, capsys):
  folder = model_folder.open_model(parts).folder
  bad = tmp_path / "bad"
  bad.mkdir()
  for path in folder.iterdir():
    blob = bytearray(path.read_bytes())
    if path.name == "clipseg.safetensors":
      blob[-100] ^= 1
    (bad / path.name).write_bytes(blob)
  localise_anew()
  assert command.main(arguments(videos, tmp_path / "out", "--parts", bad)) == 2
  assert "clipseg.safetensors is damaged" in capsys.readouterr().err
  funnel = json.loads((tmp_path / "out" / "funnel.json").read_text())
  assert funnel["dropped"]["unreadable"] == 0 and funnel["dropped"]["failed"] == 0
