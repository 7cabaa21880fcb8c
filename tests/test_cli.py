"""The command line: what users type, and one line for each mistake."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tomllib

import numpy as np
import pytest

import spatialv2a_jax
from data import shards
from launch import data as data_command
from launch import train
from spatialv2a_jax import (
  cli,
  compile_cache,
  convert,
  doctor,
  flow,
  generate,
  generator,
  io,
  report,
  schema,
  spatialize,
)
from spatialv2a_jax.metrics import evaluate
from spatialv2a_jax.training import averages
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
  monkeypatch.setattr(compile_cache, "keep", lambda: None)


@pytest.fixture(scope="module")
def media(tmp_path_factory, model_folder):
  """Good and bad files of every kind."""
  folder = tmp_path_factory.mktemp("media")
  tiny.film(folder / "good.mp4", side=0.1)
  (folder / "empty.mp4").touch()
  (folder / "text.mp4").write_text("not a video " * 99)
  (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:3000])
  io.write_audio(folder / "tone.wav", np.full((2, 1600), 0.1, np.float32), 16_000)
  io.write_audio(folder / "silent.wav", np.zeros((2, 0), np.float32), 16_000)
  (folder / "nothing").mkdir()
  (folder / "file").touch()
  (folder / "bad.csv").write_text("time,angle\n0,1\n")
  (folder / "track.csv").write_text("time_s,azimuth_deg\n0,30\n")

  shutil.copytree(model_folder, folder / "torn")
  weights = folder / "torn" / "vae.safetensors"
  weights.write_bytes(weights.read_bytes()[:-100])
  shutil.copytree(model_folder, folder / "lacking")
  (folder / "lacking" / "flow.safetensors").unlink()
  shutil.copytree(model_folder, folder / "garbled")
  (folder / "garbled" / "config.json").write_text("{")
  return folder


GENERATE = "generate {0}/good.mp4 --checkpoint {model} --out {out} "
SPATIALIZED = "spatialize a.wav --out o --track t --hrtf sofa:f --format flac --video-sound flac"
SPATIALIZE = "spatialize {0}/tone.wav --track {0}/track.csv --out {out} "


@pytest.mark.parametrize(
  "command, code, message",
  [
    ("generate {0}/absent.mp4 --checkpoint {model} --out {out}", 2, "no such file"),
    ("generate {0}/empty.mp4 --checkpoint {model} --out {out}", 2, "is empty"),
    ("generate {0}/text.mp4 --checkpoint {model} --out {out}", 2, "not a media file"),
    ("generate {0}/cut.mp4 --checkpoint {model} --out {out}", 2, "damaged"),
    ("generate {0}/tone.wav --checkpoint {model} --out {out}", 2, "no video stream"),
    ("generate {0}/silent.wav --checkpoint {model} --out {out}", 2, "silent.wav"),
    ("generate {0}/nothing --checkpoint {model} --out {out}", 2, "no media files"),
    ("generate {0}/good.mp4 --checkpoint {model} --out {0}/file", 2, "choose another --out"),
    ("generate {0}/good.mp4 --checkpoint {model} --out {0}/file/x", 2, "choose another --out"),
    ("generate {0}/good.mp4 --checkpoint {0}/absent --out {out}", 3, "no model folder"),
    ("generate {0}/good.mp4 --checkpoint {0}/nothing --out {out}", 3, "no config.json"),
    ("generate {0}/good.mp4 --checkpoint {0}/lacking --out {out}", 3, "lacks flow.safetensors"),
    ("generate {0}/good.mp4 --checkpoint {0}/torn --out {out}", 2, "vae.safetensors is damaged"),
    ("generate {0}/good.mp4 --checkpoint {0}/garbled --out {out}", 2, "config.json is no JSON"),
    ("generate {0}/good.mp4 --out {out}", 2, "required: --checkpoint"),
    (GENERATE + "--localizer sonar", 2, "'sonar' is none of: acl, acl:FILE, motion, track:FILE"),
    (GENERATE + "--localizer track:{0}/absent.csv", 2, "no such track file"),
    (GENERATE + "--localizer track:{0}/bad.csv", 2, "needs numbers in time_s and azimuth_deg"),
    (GENERATE + "--steps -3", 2, "--steps: '-3' is not a whole number of at least 1"),
    (GENERATE + "--steps 2.5", 2, "not a whole number"),
    (GENERATE + "--steps many", 2, "not a whole number"),
    (GENERATE + "--seed -1", 2, "at least 0 and at most 4294967295"),
    (GENERATE + "--seed 99999999999999999999", 2, "at most 4294967295"),
    (GENERATE + "--duration 0", 2, "'0' is not a number above 0"),
    (GENERATE + "--duration nan", 2, "not a number above 0"),
    (GENERATE + "--guidance inf", 2, "'inf' is not a number of at least 0"),
    (GENERATE + "--phase random", 2, "invalid choice: 'random'"),
    (GENERATE + "--format mp3", 2, "invalid choice: 'mp3'"),
    (GENERATE + "--stepps 3", 2, "unrecognized arguments: --stepps 3"),
    (GENERATE + "--step 3", 2, "unrecognized arguments: --step 3"),  # No abbreviations.
    ("spatialize {0}/tone.wav --out {out}", 2, "give --track FILE"),
    ("spatialize {0}/silent.wav --track {0}/track.csv --out {out}", 2, "zero samples"),
    ("spatialize {0}/good.mp4 --out {out}", 2, "no sound to place"),
    (SPATIALIZE + "--video-sound mp3", 2, "invalid choice: 'mp3'"),
    ("convert vae x --check y", 2, "--check converts the weights of its own file, without FILE"),
    ("convert vae --check y --out {out}", 2, "without --out"),
    ("convert vae --check y --ears 2", 2, "without --ears"),
    ("convert mmaudio x --out {out} --ears 3", 2, "of at least 1 and at most 2"),
    ("average {0} --out {out} --width 0.3", 2, "is not a number above 0 and at most 0.28"),
    ("convert vae x --out {out} --tolerance 0.1", 2, "--tolerance is for --check FILE"),
    (SPATIALIZE + "--hrtf kemar", 2, "'kemar' is none of: sphere, sofa:FILE"),
    (SPATIALIZE + "--hrtf sofa:{0}/text.mp4", 2, "not a SOFA file"),
    ("evaluate --pred {0} --ref {0} --out {out}/x.json --baseline x", 2, "write it as NAME=DIR"),
    ("evaluate --pred {0} --ref {0} --out {out}/x.json --embedding x", 2, "as NAME=FILE.npz"),
    ("evaluate --pred {0}/absent --ref {0} --out {out}/x.json", 2, "absent"),
    ("report {0}/absent --out {out}/x.html", 2, "absent"),
    ("convert mmaudio {0}/absent.pth --out {out}", 3, "absent.pth"),
    ("convert mmaudio --out {out}", 2, "give FILE and --out DIR"),
    ("convert {0} x --out {out}", 2, "no source"),
    ("fly", 2, "invalid choice: 'fly'"),
    ("", 2, "required: command"),
  ],
)
def test_a_mistake_is_one_line(
  media, model_folder, tmp_path, monkeypatch, capsys, command, code, message
):
  monkeypatch.chdir(tmp_path)
  before = sorted(media.rglob("*"))
  out = tmp_path / "out"
  argv = command.format(media, model=model_folder, out=out).split()
  assert cli.main(argv) == code
  captured = capsys.readouterr()
  assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
  assert captured.err.startswith("spatialv2a ") or "see spatialv2a" in captured.err
  assert not out.exists() or not list(out.iterdir())
  assert sorted(media.rglob("*")) == before


def test_a_real_process_says_one_line_and_its_exit_code(media, model_folder, tmp_path):
  def run(*argv):
    command = [sys.executable, "-m", "spatialv2a_jax.cli", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

  options = ["--checkpoint", model_folder, "--out", tmp_path / "out"]
  missing = run("generate", media / "absent.mp4", *options)
  assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and not missing.stdout
  assert run("generate", media / "good.mp4", "--steps", "0", *options).returncode == 2
  assert run("--version").stdout.strip() == spatialv2a_jax.__version__


def test_flags_reach_the_settings(monkeypatch):
  seen = []
  monkeypatch.setattr(generate, "run", lambda *a, **k: seen.append((a, k)) or 4)
  defaults = "generate a.mp4 dir --checkpoint m --out o".split()
  assert cli.main(defaults) == 4
  unset = {"parts": None, "dtype": None, "feature_cache": None}
  assert seen.pop() == ((["a.mp4", "dir"], "m", "o", generator.Settings()), unset)
  flags = (
    "--prompt dog --negative music --seed 3 --steps 9 --guidance 7 --spatial-guidance 0 --localizer"
    " track:t.csv --phase independent --duration 2.5 --format flac --no-video --low-memory"
    " --video-sound alac"
    " --solver ab2 --parts p --dtype bfloat16 --feature-cache c"
  )
  assert cli.main([*defaults, *flags.split()]) == 4
  (*_, settings), options = seen.pop()
  expected = generator.Settings(
    prompt="dog", negative="music", seed=3, steps=9, guidance=7.0, spatial_guidance=0.0,
    localizer="track:t.csv", phase="independent", duration=2.5, format="flac", video=False,
    low_memory=True, method="ab2", video_sound="alac",
  )  # fmt: skip
  assert settings == expected
  assert options == {"parts": "p", "dtype": "bfloat16", "feature_cache": "c"}
  changed = [f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != f.default]
  assert {*changed} == {f.name for f in dataclasses.fields(settings)}  # All have a flag.


def test_the_other_commands_pass_on_what_was_typed(monkeypatch, capsys):
  seen = {}
  for name, module in (("spatialize", spatialize), ("evaluate", evaluate), ("convert", convert)):
    monkeypatch.setattr(module, "run", lambda *a, name=name, **k: seen.update({name: (a, k)}) or 0)
  monkeypatch.setattr(convert, "check", lambda *a: seen.update(check=a) or 1)
  monkeypatch.setattr(convert, "export", lambda *a: seen.update(export=a) or 0)
  monkeypatch.setattr(averages, "write_model", lambda *a: seen.update(average=a))
  monkeypatch.setattr(report, "write_report", lambda *a, **k: seen.update(report=(a, k)) or {})
  monkeypatch.setattr(doctor, "run", lambda: 1)
  assert cli.main(SPATIALIZED.split()) == 0
  assert seen["spatialize"] == (
    (["a.wav"], "o"),
    {"track": "t", "hrtf": "sofa:f", "format": "flac", "video_sound": "flac", "checkpoint": None},
  )
  line = (
    "evaluate --pred p --ref r --truth t --out o --baseline a=b --baseline c=d --jobs 3"
    " --embedding vgg=e.npz"
  )
  assert cli.main(line.split()) == 0
  assert seen["evaluate"] == (
    ("p", "r", "t", "o"),
    {"baselines": {"a": "b", "c": "d"}, "embedded": {"vgg": "e.npz"}, "jobs": 3},
  )
  assert cli.main("convert vae f.pth --out o".split()) == 0
  assert seen["convert"] == (("vae", "f.pth", "o"), {"ears": 1})
  assert cli.main("convert vae --check g --tolerance 0.01".split()) == 1
  assert seen["check"] == ("vae", "g", 0.01)
  assert cli.main("export vae m --out f".split()) == 0
  assert cli.main("average run --out o --width 0.1 --step 7".split()) == 0
  assert cli.main("report d --out p --ref r --truth t --scores s".split()) == 0
  assert seen["export"] == ("vae", "m", "f") and seen["average"] == ("run", "o", 0.1, 7)
  assert seen["report"] == (("d", "p"), {"ref": "r", "truth": "t", "scores": "s"})
  assert cli.main(["doctor"]) == 1


def test_warnings_are_one_line(monkeypatch, capsys):
  import warnings

  monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
  monkeypatch.setattr(doctor, "run", lambda: warnings.warn("clipped", stacklevel=2) or 0)
  with warnings.catch_warnings():
    warnings.simplefilter("always")
    assert cli.main(["doctor"]) == 0
  assert capsys.readouterr().err == "warning: clipped\n"


@pytest.mark.parametrize(
  "error, message",
  [
    (PermissionError(errno.EACCES, "Permission denied", "x/config.json"), "x/config.json: Perm"),
    (MemoryError(), "out of memory; try --low-memory, --dtype bfloat16"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile"), "on the device; try --low-memory"),
  ],
)
def test_errors_of_the_system_and_the_device_are_one_line(monkeypatch, capsys, error, message):
  def failing(*_, **__):
    raise error

  monkeypatch.setattr(generate, "run", failing)
  assert cli.main("generate a.mp4 --checkpoint m --out o".split()) == 2
  line = capsys.readouterr().err
  assert message in line and line.count("\n") == 1 and line.startswith("spatialv2a generate: ")
  monkeypatch.setattr(data_command.hrtf, "load", failing)
  assert data_command.main(["scenes", "--out", "o", "--clips", "1"]) == 2
  line = capsys.readouterr().err
  assert line.count("\n") == 1 and line.startswith("launch.data scenes: ")


def test_errors_of_the_program_keep_their_traceback(monkeypatch):
  def failing():
    raise RuntimeError("a mistake in the code")

  monkeypatch.setattr(doctor, "run", failing)
  with pytest.raises(RuntimeError, match="mistake"):
    cli.main(["doctor"])


def test_an_interrupt_is_one_line(monkeypatch, capsys):
  def interrupted():
    raise KeyboardInterrupt

  monkeypatch.setattr(doctor, "run", interrupted)
  assert cli.main(["doctor"]) == 130
  assert capsys.readouterr().err == "spatialv2a doctor: interrupted\n"


def test_help_names_every_command_and_source(capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(["--help"])
  assert caught.value.code == 0
  text = capsys.readouterr().out
  for command in ("doctor", "generate", "spatialize", "evaluate", "convert", "report"):
    assert command in text


def test_the_console_script_is_this_function():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert project["scripts"] == {"spatialv2a": "spatialv2a_jax.cli:main"}


def test_a_film_is_generated_and_reported(media, model_folder, tmp_path, monkeypatch, model):
  """All the way, as a user would."""
  monkeypatch.setattr(generate, "Generator", lambda *_, **__: model)
  out = tmp_path / "out"
  options = ["--checkpoint", model_folder, "--out", out, "--steps", tiny.STEPS, "--prompt", "a dog"]
  assert cli.main(list(map(str, ["generate", media / "good.mp4", *options]))) == 0
  assert json.loads((out / "good.json").read_text())["prompt"] == "a dog"
  assert cli.main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
  assert "good" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_training_on_a_torn_shard_is_one_line(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(train.compile_cache, "keep", lambda: None)
  shapes = schema.feature_shapes(
    0.64, schema.AUDIO["16k"], clip_dim=64, sync_dim=64, text_len=8, text_dim=32
  )

  def record(item):
    batch = schema.synthetic_batch(shapes, 1, seed=item.payload)
    return {field: batch[schema.AXES[field]][0] for field in shapes}

  folder = tmp_path / "shards"
  shards.build([shards.Item(f"clip{i}", i) for i in range(4)], record, folder, shards=1, config={})
  (shard,) = shards.paths(folder)
  capsys.readouterr()
  shard.write_bytes(shard.read_bytes()[:-100])
  options = ["--config", f"{ROOT}/configs/tiny.py:smoke", "--workdir", tmp_path / "run"]
  options += [f"--config.data.path={folder}", "--config.data.mirror=False"]
  assert train.main(["launch.train", *map(str, options)]) == 2
  error = capsys.readouterr().err
  size = shard.stat().st_size
  told = f"{shard}: the shard is cut short, {size} of {size + 100} bytes; restore it"
  assert error.count("\n") == 1 and told in error
  assert not list(tmp_path.glob("run/**/*.safetensors"))


def test_the_solvers_offered_are_those_there_are():
  assert tuple(flow.SOLVERS) == cli.SOLVERS


def test_a_signal_leaves_nothing_half_written(tmp_path):
  code = f"""
import os, signal
from spatialv2a_jax import cli, doctor, io
def run():
  with io.atomic_path({str(tmp_path / "x.wav")!r}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGTERM)
doctor.run = run
cli.main()
"""
  done = subprocess.run([sys.executable, "-c", code, "doctor"], cwd=ROOT, check=False)
  assert done.returncode == 128 + signal.SIGTERM and not list(tmp_path.iterdir())


def test_devices_that_are_not_there_are_one_line(tmp_path):
  for command in ("doctor", "generate"):
    more = ["x.mp4", "--checkpoint", tmp_path, "--out", tmp_path] if command == "generate" else []
    argv = [sys.executable, "-m", "spatialv2a_jax.cli", command, *map(str, more)]
    env = {**os.environ, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "set JAX_PLATFORMS=cpu" in done.stdout + done.stderr
    assert done.returncode == (1 if command == "doctor" else 2)
