"""Several processes as one job: they find each other or say who is missing, and share messages.

Messages go through the key-value store of JAX's coordination service, which needs no device: it
works while a collective hangs, and it times out.
"""

import contextlib
import itertools
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax._src import distributed  # The store has no public name; Orbax takes it from here as well.

import spatialv2a_jax
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import preflight

EXIT_CODE = preflight.EXIT_CODE
_numbers = itertools.count()  # Processes ask in the same order.
_DEVICES_SECONDS = 60.0  # At least, until those of all processes are known.
_WEEK_MS = 7 * 86_400_000
_END = ""  # Value that ends a `Watch` without a message.
# Of JAX: what a process alone meets with as well, and would meet with again.
_OWN = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
# JAX's fast path raises ValueError for what a collective meets with, and so does TensorStore for
# damaged files.
_LOST = ("Gloo ", "NCCL", "UNAVAILABLE:", "DEADLINE_EXCEEDED:", "ABORTED:", "CANCELLED:")


def client() -> Any:
  """Returns the client of the coordination service; None where there is one process alone."""
  return distributed.global_state.client if jax.distributed.is_initialized() else None


def place() -> tuple[int, int]:
  """Returns the number of this process and how many there are; starts no device."""
  state = distributed.global_state
  return state.process_id or 0, state.num_processes or 1


def start(
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
  *,
  timeout: float = 300.0,
  about: Mapping[str, str] | None = None,
  say: Callable[[str], None] = print,
) -> None:
  """Joins the processes of a job, once all of them are there and belong together.

  JAX's own start ends a process that waits in vain without a word on who is missing. So the
  processes meet before it, at the same port. Devices that do not come end the process with 43 and
  the stacks of all threads, after `timeout` or a minute.

  Args:
    coordinator: HOST:PORT at which process 0 listens; None: as the cluster's environment says
      (SLURM, TPU, GKE, Open MPI), and likewise the two that follow.
    count: number of processes.
    index: of this process.
    timeout: seconds to find the others and to wait for them.
    about: must be the same in all processes, such as a digest of the configuration, by name.
    say: prints a line.

  Raises:
    UserError: naming the processes that are missing after `timeout` (exit code 43), the one that
      runs something else (1), or two that have the same number; or if the environment does not say
      what was left out.
  """
  limit = preflight.Limit(timeout)
  coordinator, count, index = preflight.detect(coordinator, count, index, limit)
  where = f"process {index} of {count} on {socket.gethostname()}"
  say(f"{where}: waiting up to {timeout:g} s for the others")
  about = {"spatialv2a_jax": spatialv2a_jax.__version__, "jax": jax.__version__, **(about or {})}
  preflight.meet(coordinator, count, index, about, limit)
  # Else a signal before `preemption.StopSignal` is set up would be taken, and nobody told.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    coordinator, count, index, initialization_timeout=max(10, round(timeout))
  )
  try:
    with preflight.ends_within(max(timeout, _DEVICES_SECONDS), f"{where} waited for the devices"):
      devices = jax.devices()
  except RuntimeError as error:  # A process that joined but has no devices, or a broken driver.
    lines = [line for line in str(error).splitlines() if line.strip()]
    gone = any(sign in str(error) for sign in ("DEADLINE_EXCEEDED", "UNAVAILABLE"))
    code = EXIT_CODE if gone else 1
    raise UserError(f"the devices cannot be joined: {lines[0]}", exit_code=code) from error
  if index == 0:
    say(f"{count} processes, {len(devices)} x {devices[0].device_kind}")


def see_same(folder: str | os.PathLike, seconds: float = 20.0) -> None:
  """Makes a folder, and sure that all processes see what process 0 writes there.

  Waits first until all have come here: one may have read for long before.

  Raises:
    UserError: naming those that do not after `seconds`, or if the folder cannot be made.
  """
  store, rank = client(), jax.process_index()
  folder = pathlib.Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
  if store is None or jax.process_count() == 1:
    return
  meet()
  prefix, wait = f"same/{next(_numbers)}", round(1000 * (seconds + 60))
  if rank == 0:
    path = folder / f".seen-{secrets.token_hex(8)}"
    path.touch()
    store.key_value_set(f"{prefix}/name", path.name)
  path = folder / store.blocking_key_value_get(f"{prefix}/name", wait)
  deadline = time.monotonic() + seconds
  while path.name not in os.listdir(folder) and time.monotonic() < deadline:
    time.sleep(0.2)
  seen = path.name in os.listdir(folder)
  store.key_value_set(f"{prefix}/{rank}", "yes" if seen else socket.gethostname())
  if rank == 0:
    said = {
      i: store.blocking_key_value_get(f"{prefix}/{i}", wait) for i in range(1, jax.process_count())
    }
    path.unlink()
    blind = [f"{i} on {host}" for i, host in said.items() if host != "yes"]
    some = ", ".join(blind[:20]) + (", ..." if len(blind) > 20 else "")
    store.key_value_set(f"{prefix}/blind", some)
  if some := store.blocking_key_value_get(f"{prefix}/blind", wait):
    raise UserError(
      f"{folder} must lie on a disk that all processes share; these do not see what process 0 "
      f"writes there: {some}"
    )


def agree(what: str, value: str) -> None:
  """Makes sure that all processes have the same of something.

  Args:
    what: a word for it.
    value: what this process has.

  Raises:
    UserError: process 0 has another value.
  """
  if (store := client()) is None:
    return
  key = f"agree/{next(_numbers)}"
  if jax.process_index() == 0:
    store.key_value_set(key, value)
  if (first := store.blocking_key_value_get(key, _WEEK_MS)) != value:
    raise UserError(
      f"process {jax.process_index()} on {socket.gethostname()} has other {what} than process 0: "
      f"{value}, there {first}"
    )


def union(name: str, numbers: Iterable[int]) -> set[int]:
  """Returns, in process 0, the numbers that any process has told last; elsewhere its own.

  Nobody waits: what another process tells at the same time may come a call later.
  """
  told = _told(f"union/{name}", json.dumps(sorted(set(numbers))))
  return set(itertools.chain(*map(json.loads, told)))


def most(name: str, value: float) -> float:
  """Returns, in process 0, the most that any process has told last, as `union`."""
  return max(float(told) for told in _told(f"most/{name}", str(value)))


def _told(folder: str, value: str) -> list[str]:
  """Returns, in process 0, what each process has told last; elsewhere `value` alone."""
  store = client()
  if store is None:
    return [value]
  store.key_value_set(f"{folder}/{jax.process_index()}", value, allow_overwrite=True)
  if jax.process_index():
    return [value]
  return [told for _, told in store.key_value_dir_get(f"{folder}/")]


def meet() -> None:
  """Waits until all processes of the job have come here, for as long as the watchdog lets it.

  Raises:
    jax.errors.JaxRuntimeError: another process is gone.
  """
  if (store := client()) is not None:
    store.wait_at_barrier(f"meet/{next(_numbers)}", _WEEK_MS)


class Watch:
  """Waits for a message of any process and hands it to a function, in a thread of its own."""

  def __init__(self, key: str, then: Callable[[str], None]):
    """Begins to wait for a value of `key`; does nothing where there is one process alone."""
    self.key, self.then, self.store = key, then, client()
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._wait, name=f"watch {key}", daemon=True)
    if self.store is not None:
      self._thread.start()

  def _wait(self):
    while not self._closed.is_set():
      try:
        value = self.store.blocking_key_value_get(self.key, 20_000)
      except RuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
          continue
        return  # The service is gone, and with it the job.
      if value != _END and not self._closed.is_set():
        self.then(value)
      return

  def tell(self, value: str) -> None:
    """Sends the message to every process."""
    if self.store is not None:
      self.store.key_value_set(self.key, value, allow_overwrite=True)

  def close(self, value: str = _END) -> None:
    """Ends the wait, in all processes: the job is over; the others may be told why."""
    if self.store is None or self._closed.is_set():
      return
    self._closed.set()
    try:
      if self._thread.is_alive():
        self.tell(value)
        self._thread.join(timeout=5)
    except RuntimeError:
      pass  # The service is gone already.


def lost(error: BaseException | None) -> bool:
  """Returns whether an error tells that another process of the job is gone."""
  while error is not None:
    told = str(error)
    if (isinstance(error, jax.errors.JaxRuntimeError) and not told.startswith(_OWN)) or (
      isinstance(error, ValueError) and any(sign in told for sign in _LOST)
    ):
      return client() is not None and distributed.global_state.num_processes > 1
    error = error.__cause__ or error.__context__
  return False


def part(seconds: float = 3.0) -> None:
  """Waits a moment for the other processes to end as well, so that each can say why."""
  store = client()
  end = time.monotonic() + seconds
  with contextlib.suppress(RuntimeError):  # They have not heard of a fault, or are gone.
    store.key_value_set(f"ended/{jax.process_index()}", "", allow_overwrite=True)
    for rank in range(jax.process_count()):
      left = max(10, round(1000 * (end - time.monotonic())))
      store.blocking_key_value_get(f"ended/{rank}", left)
    if jax.process_index() == 0:
      time.sleep(0.3)  # It serves the store: the others end with it.


def leave(code: int) -> None:
  """Ends this process now, without waiting for its threads or for the other processes."""
  os._exit(code)
