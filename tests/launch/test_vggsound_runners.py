"""The same shards whoever makes them: one process, several, Beam, or a build that is killed."""

import hashlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data import shards
from launch import data as command
from tests.data import clips

ROOT = pathlib.Path(shards.__file__).parents[1]
CLIPS = 12


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("videos")
  for n in range(CLIPS):
    clips.write(folder / f"clip{n}.mp4", 0.8 if n == 3 else 1.0, seed=n, column=0.1 + 0.07 * n)
  (folder / "broken.mp4").write_bytes(b"no video")
  return folder


def arguments(videos: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
  given = ["--videos", str(videos), "--out", str(out), "--seconds", "1", "--clips-per-shard", "2"]
  return ["vggsound", *given, *more]


@pytest.fixture(scope="module")
def alone(videos, tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("alone") / "out"
  assert command.main(arguments(videos, out, "--jobs", "1")) == 0
  return out


def start(*args: str) -> subprocess.Popen:
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  return subprocess.Popen(
    [sys.executable, "-m", "launch.data", *args],
    env={**os.environ, "PYTHONPATH": path},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def contents(out: pathlib.Path) -> dict[str, str | None]:
  """Every file below `out`, with the hash of those that hold no timings."""
  timed = ("summary.json", "throughput.json", "probe.json", "filter.json", "localise.json")
  return {
    str(path.relative_to(out)): None
    if path.name in timed
    else hashlib.sha256(path.read_bytes()).hexdigest()
    for path in out.rglob("*")
    if path.is_file()
  }


def test_beam_writes_the_same_bytes(videos, alone, tmp_path):
  pytest.importorskip("apache_beam", reason="needs the extra beam")
  out = tmp_path / "out"
  assert command.main(arguments(videos, out, "--beam", "DirectRunner")) == 0
  assert contents(out) == contents(alone)


def test_beam_loads_what_slices_share_once_per_worker():
  beam = pytest.importorskip("data.beam", reason="needs the extra beam")
  calls = []

  class Make:
    def setup(self):
      calls.append("setup")

  step = beam.MakeShard(Make())
  assert not calls
  step.setup()
  assert calls == ["setup"]


@pytest.mark.slow
def test_four_processes_write_the_same_bytes(videos, alone, tmp_path):
  process = start(*arguments(videos, tmp_path / "out", "--jobs", "4"))
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  assert contents(tmp_path / "out") == contents(alone)


@pytest.mark.slow
def test_ten_kills_leave_the_same_bytes_and_nothing_else(videos, alone, tmp_path):
  """SIGKILL to the build alone and to all its processes, at moments of its work drawn by lot."""
  draw, out = random.Random(7), tmp_path / "out"
  kills = leftovers = 0
  while kills < 10:
    began = time.time()
    process = start(*arguments(videos, out, "--jobs", str(1 + kills % 2)))
    while process.poll() is None and not _written_since(out, began):
      time.sleep(0.005)  # Importing takes most of the time, and kills there prove little.
    try:
      assert process.wait(timeout=draw.uniform(0, 0.6)) == 0
      assert contents(out) == contents(alone)
      shutil.rmtree(out)  # It was faster than the lot; the next one starts anew.
    except subprocess.TimeoutExpired:
      kills += 1
      if kills % 3:
        os.killpg(process.pid, signal.SIGKILL)
      else:
        process.kill()
      process.wait()  # Not for its pipes: orphans would hold them.
      deadline = time.monotonic() + 20
      while _members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)  # Workers notice that their parent is gone.
      assert not _members(process.pid)
      leftovers += sum(path.name.startswith(".") for path in out.rglob("*"))
  assert leftovers  # Else the lot was kind, and nothing was put to the test.
  process = start(*arguments(videos, out, "--jobs", "2"))
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  assert contents(out) == contents(alone)


@pytest.mark.slow
def test_idle_workers_end_with_a_killed_parent(videos, tmp_path):
  """Two slices for two workers: who is done first has nobody left to wait for."""
  out = tmp_path / "out"
  process = start(*arguments(videos, out, "--jobs", "2", "--clips-per-shard", "7"))
  deadline = time.monotonic() + 60
  while not list(out.glob("raw/*.tfrecord-?????-of-00002.json")) and time.monotonic() < deadline:
    time.sleep(0.005)
  assert len(_members(process.pid)) >= 3
  process.kill()
  process.wait()
  deadline = time.monotonic() + 20
  while _members(process.pid) and time.monotonic() < deadline:
    time.sleep(0.05)
  left = _members(process.pid)
  for pid in left:
    os.kill(pid, signal.SIGKILL)
  assert not left


def _written_since(folder: pathlib.Path, began: float) -> bool:
  for path in folder.rglob("*"):
    try:
      if path.is_file() and path.stat().st_mtime > began:
        return True
    except FileNotFoundError:
      continue
  return False


def _members(group: int) -> list[int]:
  """Processes of a group, as Linux lists them."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      state, _, member = path.read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
      continue
    if int(member) == group and state != "Z":
      found.append(int(path.parent.name))
  return found
