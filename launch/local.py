"""Rehearses a run of several processes on the CPU of this machine, and starts them again on demand.

python -m launch.local [--processes N] [--devices M] [--restarts R] -- --config ... --workdir DIR

  --processes N   processes of the run, each as a host of a cluster would be (default 2)
  --devices M     CPU devices that each of them pretends to have (default 1)
  --restarts R    how often the run may be started again (default 0)

What follows `--` goes to `launch.train`. Lines of process I begin with [I]. SIGTERM and SIGINT go
on to all processes, which save and leave.

The first process that leaves for a reason says what happens: 42 (interrupted and saved), 43 (hung,
or another one is gone) and death by a signal (a lost machine) start all of them again, any other
code ends the run with it.
A run that is out of restarts, or was told to stop here, leaves with the code it last had.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from spatialv2a_jax.cli import number

AGAIN = (42, 43)
GRACE = 60.0  # Seconds that the others have to follow the first process that leaves.
_DRAIN_SECONDS = 5.0  # For the last lines; a process left behind may hold the pipe open for ever.


class Job:
  """The processes of one attempt.

  Attributes:
    processes: by their number.
  """

  def __init__(self, commands: Sequence[Sequence[str]], environment: dict[str, str]):
    """Starts one process per command."""
    self.processes = [
      subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
      )
      for command in commands
    ]
    self._readers = [
      threading.Thread(target=self._read, args=pair, daemon=True)
      for pair in enumerate(self.processes)
    ]
    for reader in self._readers:
      reader.start()

  @staticmethod
  def _read(number, process):
    for line in process.stdout:
      _say(f"[{number}] {line}")

  def stop(self) -> None:
    """Asks all processes to save and leave."""
    self._send(signal.SIGTERM)

  def _send(self, number):
    for process in self.processes:
      if process.poll() is None:
        process.send_signal(number)

  def wait(self, grace: float = GRACE) -> int:
    """Waits for all of them and returns the code of the first that left with one other than 0."""
    first, since = 0, None
    while any(process.poll() is None for process in self.processes):
      codes = [process.poll() for process in self.processes]
      if since is None and any(codes):
        first, since = next(code for code in codes if code), time.monotonic()
      if since is not None and time.monotonic() - since > grace:
        self._send(signal.SIGKILL)
      time.sleep(0.05)
    for reader in self._readers:
      reader.join(_DRAIN_SECONDS)
    return first or next(
      (process.returncode for process in self.processes if process.returncode), 0
    )


def _say(text: str) -> None:
  """Prints text; the run goes on if nobody reads it any more."""
  try:
    print(text, end="", flush=True)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(
  commands: Callable[[], Sequence[Sequence[str]]],
  environment: dict[str, str],
  restarts: int = 0,
  grace: float = GRACE,
) -> int:
  """Runs a job until it is finished, and returns its exit code.

  Args:
    commands: returns one command per process; called for every attempt.
    environment: of all processes.
    restarts: how often the job may be started again.
    grace: seconds between the first process that leaves and the end of the others.
  """
  job: Job | None = None
  told = early = False

  def stop(*_: object) -> None:
    nonlocal told, early
    told = True
    if job is None:
      early = True  # They must hear of it once, and only once.
    else:
      job.stop()

  handlers = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    while True:
      job = Job(commands(), environment)
      if early:
        job.stop()
      code = job.wait(grace)
      job = None
      code = 128 - code if code < 0 else code  # As a shell tells of a death by a signal.
      if told or restarts == 0 or not (code in AGAIN or code > 128):
        return code
      restarts -= 1
      _say(f"launch.local: left with {code}; starting again, {restarts} restarts left\n")
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for process in job.processes if job else ():
      process.kill()


def train_commands(processes: int, arguments: Sequence[str]) -> list[list[str]]:
  """Returns the commands of the processes of a training run, which meet at a free port."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  start = [sys.executable, "-m", "launch.train", *arguments]
  join = ["--distributed", f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
  return [[*start, *join, f"--process_id={number}"] for number in range(processes)]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code."""
  parser = argparse.ArgumentParser(
    prog="launch.local",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--processes", type=number(int, 1, 64), default=2, metavar="N")
  parser.add_argument("--devices", type=number(int, 1, 64), default=1, metavar="M")
  parser.add_argument("--restarts", type=number(int, 0), default=0, metavar="R")
  parser.add_argument("train", nargs="+", metavar="--config ... --workdir DIR")
  args = parser.parse_args(argv)
  forced = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
  environment = os.environ | forced | {"PYTHONUNBUFFERED": "1"}
  return run(lambda: train_commands(args.processes, args.train), environment, args.restarts)


if __name__ == "__main__":
  sys.exit(main())
