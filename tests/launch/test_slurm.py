"""The batch script on a SLURM of this machine: two nodes that are two daemons."""

import json
import os
import pathlib
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests import processes, runner

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not shutil.which("slurmctld"), reason="SLURM is not installed"),
]

# Their names are addresses as well: a task finds the host of process 0 by that of its node.
NODES = (socket.gethostname(), "localhost")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/control
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/control.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1
KillWait=30
MpiDefault=none
PartitionName=all Nodes=ALL Default=YES
"""


class Slurm:
  """The daemons of a cluster with all their files in one folder.

  Attributes:
    environment: in which SLURM's commands speak to them.
  """

  def __init__(self, folder: pathlib.Path):
    """Writes their files."""
    self.folder = folder
    for name in ("munge", "control"):
      (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge" / "key").chmod(0o600)
    self._user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname()
    # Tasks meet at a port of their job's number, and another cluster may run at the same time.
    text = CONF.format(
      folder=folder,
      host=host,
      user=self._user,
      port=processes.free_port(),
      first=1 + secrets.randbelow(4000),
    )
    for name in NODES:
      cpus, port = os.cpu_count(), processes.free_port()
      text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus}\n"
    (folder / "slurm.conf").write_text(text)
    self.environment = runner.environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
    self._daemons: list[subprocess.Popen] = []

  def start(self) -> None:
    """Starts them and waits until the nodes are ready."""
    kinds = ("socket", "key-file", "pid-file", "log-file", "seed-file")
    files = (f"--{kind}={self.folder / 'munge' / kind.partition('-')[0]}" for kind in kinds)
    self._start("munged", "--foreground", "--force", *files)  # Folders of tests are not public.
    self.until((self.folder / "munge" / "socket").exists, "munged")
    self._start("slurmctld", "-D")
    for name in NODES:
      self._start("slurmd", "-D", "-N", name)
    self.until(lambda: self.ask("sinfo", "-hN", "-o%T").split() == ["idle"] * 2, "two idle nodes")

  def _start(self, *command: str) -> None:
    with open(self.folder / f"daemon-{len(self._daemons)}.log", "w", encoding="utf-8") as log:
      started = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
    self._daemons.append(started)

  def until(self, done: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
      logs = "\n".join(p.read_text()[-3000:] for p in sorted(self.folder.glob("*.log")))
      alive = all(daemon.poll() is None for daemon in self._daemons)
      assert alive and time.monotonic() < end, f"waited in vain for {what}\n{logs}"
      time.sleep(0.2)

  def ask(self, *command: str) -> str:
    """Returns what a command of SLURM prints; nothing if it fails."""
    done = subprocess.run(
      command, env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()

  def close(self) -> None:
    """Ends all jobs and daemons."""
    try:
      self.ask("scancel", f"--user={self._user}")
      self.until(lambda: not self.ask("squeue", "-h"), "the end of the jobs")
    finally:
      for daemon in reversed(self._daemons):
        daemon.terminate()
        daemon.wait(timeout=30)


class Submitted:
  """A job of the batch script, one task on each node."""

  def __init__(self, slurm: Slurm, folder: pathlib.Path, *arguments: str, **options):
    """Submits it; `options` are those of the toy run that takes the trainer's place, if any."""
    self._slurm, self.folder = slurm, folder
    python = folder / "python"
    command = f'{sys.executable} "$@"'
    if options:
      fixed = {"workdir": str(folder / "run"), "join": {"timeout": 60}, "shape": (2, 1, 1)}
      options = {**fixed, **options}
      command = f"{sys.executable} -m tests.runner '{json.dumps(options)}'"
    python.write_text(f"#!/bin/bash\ntaskset -cp $$\nexec {command}\n")
    python.chmod(0o755)
    done = subprocess.run(
      ["sbatch", "--nodes=2", runner.ROOT / "launch" / "slurm.sbatch", *arguments],
      env=slurm.environment | {"PYTHON": str(python)},
      cwd=folder,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    self.number = done.stdout.split()[-1]

  @property
  def log(self) -> str:
    """What the script and the tasks of all attempts have printed."""
    path = self.folder / f"spatialv2a-{self.number}.log"
    return path.read_text() if path.exists() else ""

  def field(self, name: str) -> str:
    """Returns one of the values that SLURM shows of the job."""
    shown = self._slurm.ask("scontrol", "show", "job", self.number)
    return next((w[len(name) + 1 :] for w in shown.split() if w.startswith(f"{name}=")), "")

  def wait(self, *states: str, seconds: float = 450) -> None:
    """Waits until SLURM says one of these of the job."""
    end = time.monotonic() + seconds
    while self.field("JobState") not in states:
      assert time.monotonic() < end, self.field("JobState") + self.log
      time.sleep(0.2)

  def see(self, text: str, seconds: float = 300) -> None:
    """Waits for the text in the log, as long as the job has not ended."""
    end = time.monotonic() + seconds
    while True:
      state, log = self.field("JobState"), self.log
      if text in log:
        return
      lives = state not in ENDED and "left with" not in log
      assert lives and time.monotonic() < end, state + log
      time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
  cluster = Slurm(tmp_path_factory.mktemp("slurm"))
  try:
    cluster.start()
    yield cluster
  finally:
    cluster.close()


def test_two_tasks_find_each_other_and_train(slurm, tmp_path):
  config = f"--config={runner.ROOT}/configs/vae_tiny.py:smoke"
  job = Submitted(slurm, tmp_path, config, "--config.steps=2", f"--workdir={tmp_path / 'run'}")
  job.wait("COMPLETED", "FAILED")
  assert job.field("ExitCode") == "0:0", job.log
  assert "2 processes, 2 x cpu" in job.log and "finished: step 2" in job.log
  assert (tmp_path / "run" / "model" / "vae.safetensors").is_file()
  assert not list(tmp_path.glob(".spatialv2a-*"))
  last = os.cpu_count() - 1  # Each task may use its node's CPUs, which both nodes share here.
  assert job.log.count(f"affinity list: 0-{last}" if last > 1 else "affinity list: 0,1") == 2


@pytest.mark.parametrize("batch", [[], ["--batch"]])
def test_a_signal_makes_it_save_and_it_goes_on_from_there(slurm, tmp_path, batch):
  job = Submitted(slurm, tmp_path, steps=20, pause=0.5, checkpoint=1000)
  job.see("step 2")
  slurm.ask("scancel", "--signal=TERM", *batch, job.number)
  job.see("left with 42: back into the queue, restart 1")
  job.wait("PENDING")
  # Else in two minutes; in the second in which a job was killed, SLURM does not start it again.
  slurm.ask("scontrol", "update", f"JobId={job.number}", "StartTime=now+5")
  job.wait("COMPLETED", "FAILED")
  assert job.field("ExitCode") == "0:0" and job.field("Restarts") == "1", job.log
  assert "resumed at step" in job.log and "finished: step 20" in job.log


def test_a_time_limit_that_nears_is_such_a_signal(slurm, tmp_path):
  """The script asks for 300 s; SLURM sends it up to a minute early."""
  job = Submitted(slurm, tmp_path, steps=10_000, pause=0.2, checkpoint=10_000)
  slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=7")
  job.see("stopped at step")
  job.see("left with 42: back into the queue")
  slurm.ask("scancel", job.number)
  job.wait("CANCELLED")


def test_a_fault_ends_it(slurm, tmp_path):
  guard = {"sigma": 0.0, "cap": 0}
  job = Submitted(slurm, tmp_path, fault="nan", at=2, guard=guard)
  job.wait("COMPLETED", "FAILED")
  assert job.field("ExitCode") == "1:0" and job.field("Restarts") == "0", job.log
  assert "left with 1 after 0 restarts" in job.log


def test_a_killed_task_starts_all_again(slurm, tmp_path):
  job = Submitted(slurm, tmp_path, fault="SIGKILL", at=2, rank=1)
  job.see("left with 137: back into the queue")
  slurm.ask("scancel", job.number)
  job.wait("CANCELLED")


def test_cancelled_it_saves_and_does_not_come_back(slurm, tmp_path):
  job = Submitted(slurm, tmp_path, steps=10_000, pause=0.2, checkpoint=10_000)
  job.see("step 2")
  slurm.ask("scancel", job.number)
  job.wait("CANCELLED")
  slurm.until(lambda: not slurm.ask("squeue", "-h", "-j", job.number), "its end")
  time.sleep(3)
  assert job.field("JobState") == "CANCELLED" and job.field("Restarts") == "0"
  assert "back into the queue" not in job.log
  assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
