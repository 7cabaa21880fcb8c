"""The launcher on real processes; what they run is as small as can be."""

import concurrent.futures
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from launch import local, train
from spatialv2a_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
COUNT = """
import pathlib, sys, time
number, file = int(sys.argv[1]), pathlib.Path(sys.argv[2])
attempt = len(file.read_text()) if file.exists() else 0
"""


def script(code, file, processes=2):
  """Commands of processes that know their `number` and how many attempts process 0 had."""
  text = COUNT + code
  return lambda: [[sys.executable, "-c", text, str(i), str(file)] for i in range(processes)]


def attempts(file):
  return len(file.read_text())


MARK = """
if number == 0:
  time.sleep(0.3)  # The others have read it.
  file.write_text("x" * (attempt + 1))
"""


@pytest.mark.parametrize("codes", [(42, 43, 0), (43, 42, 0)])
def test_a_run_that_asks_for_it_is_started_again_and_finishes(tmp_path, codes, capfd):
  file = tmp_path / "attempts"
  code = f"{MARK}\nprint('hello'); sys.exit({codes}[attempt])"
  assert local.run(script(code, file), dict(os.environ), restarts=5) == 0
  assert attempts(file) == 3
  out = capfd.readouterr().out
  assert out.count("[0] hello") == out.count("[1] hello") == 3
  assert f"left with {codes[0]}; starting again, 4 restarts left" in out


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_mistake_ends_the_run_with_its_code(tmp_path, code):
  file = tmp_path / "attempts"
  assert local.run(script(f"{MARK}\nsys.exit({code})", file), dict(os.environ), restarts=5) == code
  assert attempts(file) == 1


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(tmp_path):
  """As with `| head`: what the processes print is still taken from them, or they would wait."""
  lines = f"for i in range(20_000): print('x' * 50)\n{MARK}\nsys.exit(0 if attempt else 42)"
  commands = script(lines, tmp_path / "file", 1)()
  run = f"local.run(lambda: {commands!r}, {{**os.environ}}, restarts=3)"
  code = f"import os\nfrom launch import local\n{run}"
  pipe = '"$0" -c "$1" | head -2; exit ${PIPESTATUS[0]}'
  reader = ["bash", "-c", pipe, sys.executable, code]
  done = subprocess.run(reader, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
  assert done.returncode == 0 and not done.stderr
  assert done.stdout.count("[0] ") == 2 and attempts(tmp_path / "file") == 2


def test_restarts_end(tmp_path):
  file = tmp_path / "attempts"
  assert local.run(script(f"{MARK}\nsys.exit(42)", file), dict(os.environ), restarts=2) == 42
  assert attempts(file) == 3


def test_a_killed_process_takes_the_others_with_it_and_all_start_again(tmp_path):
  file = tmp_path / "attempts"
  code = f"""{MARK}
if attempt == 0 and number == 1:
  time.sleep(1)
  import os, signal
  os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0:
  time.sleep(600)
"""
  began = time.monotonic()
  assert local.run(script(code, file), dict(os.environ), restarts=1, grace=0.5) == 0
  assert attempts(file) == 2 and time.monotonic() - began < 30


def test_the_first_to_leave_says_why(tmp_path):
  """What the others do once they have lost it is no reason of their own."""
  code = "time.sleep(0.2 + 1.5 * number); sys.exit(1 if number else 43)"
  assert local.run(script(code, tmp_path / "none"), dict(os.environ)) == 43


def test_a_process_left_behind_does_not_keep_the_run(tmp_path, monkeypatch, capfd):
  """It holds the pipe open. Neither do bytes that are no text, such as those of a crash."""
  monkeypatch.setattr(local, "_DRAIN_SECONDS", 0.5)
  code = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
file.write_text(str(child.pid))
sys.stdout.buffer.write(bytes([255]) + b" last words\\n")
sys.stdout.flush()
sys.exit(3)
"""
  file = tmp_path / "child"
  began = time.monotonic()
  try:
    assert local.run(script(code, file, 1), dict(os.environ)) == 3
    assert time.monotonic() - began < 20
    assert "last words" in capfd.readouterr().out
  finally:
    os.kill(int(file.read_text()), signal.SIGKILL)


def test_told_to_stop_it_tells_every_process_and_does_not_start_again(tmp_path):
  code = """
import signal
def leave(*_):
  file.with_name(f"told-{number}").write_text("")
  sys.exit(42)
signal.signal(signal.SIGTERM, leave)
file.with_name(f"ready-{number}").write_text("")
time.sleep(600)
"""
  text = (
    "import os, sys; from launch import local\n"
    f"commands = lambda: [[sys.executable, '-c', {COUNT + code!r}, str(i), {str(tmp_path / 'a')!r}]"
    " for i in range(2)]\n"
    "sys.exit(local.run(commands, dict(os.environ), restarts=9))"
  )
  with subprocess.Popen([sys.executable, "-c", text], cwd=ROOT) as process:
    while len(list(tmp_path.glob("ready-*"))) < 2:
      time.sleep(0.05)
      assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 42
  assert len(list(tmp_path.glob("told-*"))) == 2


def test_told_to_stop_while_it_starts_them_it_tells_them_and_does_not_start_again(tmp_path):
  file = tmp_path / "attempts"

  def commands():
    os.kill(os.getpid(), signal.SIGTERM)
    file.write_text(file.read_text() + "x" if file.exists() else "x")
    return script("time.sleep(600)", file)()

  assert local.run(commands, dict(os.environ), restarts=9) == 128 + signal.SIGTERM
  assert attempts(file) == 1


def test_processes_of_a_run_meet_at_one_port():
  first, second = local.train_commands(2, ["--config=c", "--workdir=w"])
  assert first[1:5] == ["-m", "launch.train", "--config=c", "--workdir=w"]
  assert first[:-1] == second[:-1] and "--num_processes=2" in first
  assert (first[-1], second[-1]) == ("--process_id=0", "--process_id=1")


@pytest.mark.parametrize(
  "steps, code, message",
  [(4, 1, "process 1 on .* has configuration '"), (3, 2, "this is where JAX starts")],
)
def test_processes_of_different_configs_do_not_begin(
  tmp_path, monkeypatch, capsys, steps, code, message
):
  """Threads here: JAX knows of one process until they have met."""

  def initialize(*_, **__):
    raise UserError("this is where JAX starts")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  config = [f"--config={ROOT}/configs/tiny.py:smoke", f"--workdir={tmp_path}", "--join_timeout=30"]
  commands = local.train_commands(2, [*config, "--config.steps=3"])
  commands[1].append(f"--config.steps={steps}")
  with concurrent.futures.ThreadPoolExecutor() as pool:
    assert list(pool.map(lambda command: train.main(command[2:]), commands)) == [code, code]
  assert len(re.findall(message, capsys.readouterr().err)) == 2


@pytest.mark.slow
def test_two_processes_train_a_config_and_leave_its_model(tmp_path):
  argv = ["--processes=2", "--", f"--config={ROOT}/configs/vae_tiny.py:smoke", "--config.steps=2"]
  done = subprocess.run(
    [sys.executable, "-m", "launch.local", *argv, f"--workdir={tmp_path}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  assert "mesh data=2" in done.stdout and "finished: step 2" in done.stdout
  assert (tmp_path / "model" / "vae.safetensors").is_file()
