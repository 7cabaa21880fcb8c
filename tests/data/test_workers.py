"""Processes that work for another one end with it."""

import subprocess
import sys

from tests.runner import ROOT

PARENT = """
import multiprocessing, os, signal, time
from data import workers

def work(pipe):
  workers.end_with_parent()
  pipe.send("begun")
  time.sleep(10)
  print("still here", flush=True)

here, there = multiprocessing.Pipe()
multiprocessing.get_context("fork").Process(target=work, args=(there,)).start()
print(here.recv(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_with_a_parent_that_is_killed():
  """It holds what that one holds open, such as this pipe; else it would wait for work forever."""
  command = [sys.executable, "-c", PARENT]
  done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
  assert done.stdout == "begun\n"
