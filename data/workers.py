"""Processes that work for another one."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
  """Ends this process once its parent is killed; it would wait for work forever."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
  multiprocessing.connection.wait([sentinel])
  os._exit(1)
