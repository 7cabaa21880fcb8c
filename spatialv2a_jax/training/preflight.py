"""The processes of a job find each other before JAX's own start, or say who is missing.

Process 0 listens where JAX's coordinator will; each of the others tells it who it is, keeps the
connection open, and waits for its answer. One that dies meanwhile closes it.
"""

import contextlib
import errno
import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax._src.clusters import ClusterEnv

from spatialv2a_jax.errors import UserError

EXIT_CODE = 43  # A process hangs, is gone, or did not come: start all of them again.
_ANSWER_SECONDS = 5.0  # For one line of a process that lives.
_DETECT_SECONDS = 30.0  # Beyond the limit, for a detection that does not keep it.
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, socket.herror)
# What JAX's detection says where the cluster has no answer yet.
_NOT_YET = ("Failed to recognize coordinator", "failed for 6 tries", "Retry failed")


class Limit:
  """A time by which all processes must be there.

  Attributes:
    seconds: from its making to the end.
  """

  def __init__(self, seconds: float):
    """Begins to count."""
    self.seconds = seconds
    self._end = time.monotonic() + seconds

  @property
  def left(self) -> float:
    """Seconds until the end; 0 from then on."""
    return max(self._end - time.monotonic(), 0.0)

  @property
  def over(self) -> bool:
    """Whether the end is reached."""
    return self.left == 0


@contextlib.contextmanager
def ends_within(seconds: float, what: str) -> Iterator[None]:
  """Ends this process with `EXIT_CODE`, and the stacks of all threads, if the body lasts longer."""

  def end():
    print(f"\n{what}: {seconds:g} s", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    sys.stderr.flush()
    os._exit(EXIT_CODE)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def detect(
  coordinator: str | None, count: int | None, index: int | None, limit: Limit
) -> tuple[str, int, int]:
  """Completes what was not given from the environment of the cluster.

  Args:
    coordinator: HOST:PORT of process 0.
    count: of processes.
    index: of this process.
    limit: for an environment that does not answer yet.

  Raises:
    UserError: it did not (exit code 43), or something is missing, wrong or impossible (2).
  """
  given = (coordinator, count, index)
  if None in given:
    detection = ClusterEnv.auto_detect_unset_distributed_params
    try:
      with ends_within(
        limit.seconds + _DETECT_SECONDS, "the cluster does not say which process this is"
      ):
        given = detection(*given, None, None, max(1, round(limit.left)))[:3]
    except Exception as error:  # Each kind of cluster raises its own.
      code = EXIT_CODE if _passes(error) else 2
      raise UserError(f"--distributed: {error}", exit_code=code) from error
  coordinator, count, index = given
  if coordinator is None or count is None or index is None:
    raise UserError(
      "--distributed: no cluster (SLURM, TPU, GKE, Open MPI) was found; give --coordinator "
      "HOST:PORT, --num_processes and --process_id"
    )
  if not 0 <= index < count:
    raise UserError(f"--process_id {index} is not in 0..{count - 1} (--num_processes {count})")
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT")
  return coordinator, count, index


def _passes(error: BaseException | None) -> bool:
  """Returns whether an error of the detection may be gone at the next start."""
  while error is not None:
    if isinstance(error, _NETWORK) or any(sign in str(error) for sign in _NOT_YET):
      return True
    error = error.__cause__ or error.__context__
  return False


def meet(coordinator: str, count: int, index: int, about: Mapping[str, str], limit: Limit) -> None:
  """Waits until all processes are there and belong together.

  Args:
    coordinator: HOST:PORT at which process 0 listens.
    count: of processes.
    index: of this process.
    about: must be the same in all processes, by name.
    limit: of the wait.

  Raises:
    UserError: naming the processes that are missing at the end of the limit (exit code 43), the one
      that runs something else (1), or two that cannot both be meant (2).
  """
  host, _, port = coordinator.rpartition(":")
  me = {"index": index, "count": count, "host": socket.gethostname(), "about": dict(about)}
  me["token"] = secrets.token_hex(8)  # Tells a process that comes back from another in its place.
  if index == 0:
    _receive(int(port), me, limit)
  else:
    _report((host, int(port)), me, limit)


class _Member(NamedTuple):
  """A process that is there.

  Attributes:
    hello: what it said.
    connection: to it.
    lines: the same, as text.
  """

  hello: dict[str, Any]
  connection: socket.socket
  lines: Any

  def write(self, message: Mapping[str, Any]) -> None:
    self.lines.write(json.dumps(message) + "\n")
    self.lines.flush()

  def gone(self) -> bool:
    """Whether it has closed its end, as the death of a process does."""
    self.connection.setblocking(False)
    try:
      return not self.connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
      return False
    except OSError:
      return True
    finally:
      self.connection.settimeout(_ANSWER_SECONDS)

  def answers(self) -> bool:
    """Whether it is alive: that of a host that lost its power has closed nothing."""
    try:
      self.write({"ask": True})
      return bool(self.lines.readline())
    except OSError:
      return False


class _Guests:
  """The processes that process 0 has seen and not lost again.

  Attributes:
    fault: why the job cannot begin, if it cannot.
    code: exit code of the fault.
    lost: numbers of those that were there once and went.
  """

  def __init__(self, server: socket.socket, me: Mapping[str, Any]):
    self._server, self._me = server, me
    self._members: dict[int, _Member] = {}
    self._ready = selectors.DefaultSelector()
    self._ready.register(server, selectors.EVENT_READ)
    self.fault, self.code = "", 1
    self.lost: set[int] = set()

  def missing(self) -> list[int]:
    """Returns who is not there, after a look whether the others still are."""
    for index in [i for i, member in self._members.items() if member.gone()]:
      self._drop(index)
      self.lost.add(index)
    return sorted(set(range(1, self._me["count"])) - set(self._members))

  def wait(self, seconds: float) -> None:
    """Waits until somebody comes or goes, or until the time is over."""
    if any(key.fileobj is self._server for key, _ in self._ready.select(seconds)):
      connection, _ = self._server.accept()
      try:
        self._admit(connection)
      except (OSError, ValueError, KeyError, TypeError):
        connection.close()  # Nobody of ours.

  def _admit(self, connection: socket.socket) -> None:
    connection.settimeout(_ANSWER_SECONDS)
    lines = connection.makefile("rw")
    member = _Member(json.loads(lines.readline()), connection, lines)
    index, host = member.hello["index"], member.hello["host"]
    self.fault = _compare(self._me, member.hello)
    if (old := self._members.get(index)) is not None:
      again = old.hello["token"] == member.hello["token"]
      if not again and not old.gone() and old.answers():
        self.fault, self.code = (
          f"two processes say that they are process {index}, on {old.hello['host']} and on {host}",
          2,
        )
        member.write({"fault": self.fault, "code": self.code})
        return
      self._drop(index)  # It was started again, or its connection was lost.
    self._members[index] = member
    self._ready.register(connection, selectors.EVENT_READ)

  def _drop(self, index: int) -> None:
    member = self._members.pop(index)
    self._ready.unregister(member.connection)
    with contextlib.suppress(OSError):
      member.lines.close()
    member.connection.close()

  def tell(self) -> None:
    """Answers all that are there, and ends."""
    for member in self._members.values():
      with contextlib.suppress(OSError):
        member.write({"fault": self.fault, "code": self.code})
    for index in list(self._members):
      self._drop(index)
    self._ready.close()


def _receive(port: int, me: Mapping[str, Any], limit: Limit) -> None:
  """Process 0 waits for all others and tells them how it went."""
  with _listen(port, limit) as server:
    guests = _Guests(server, me)
    while (missing := guests.missing()) and not guests.fault:
      if limit.over:
        some = [f"{i} (was there, is gone)" if i in guests.lost else str(i) for i in missing[:20]]
        guests.code = EXIT_CODE
        guests.fault = (
          f"{len(missing)} of {me['count']} processes did not come within {limit.seconds:g} s: "
          f"{', '.join(some)}{', ...' if len(missing) > 20 else ''}; look at their hosts and logs, "
          "then start all of them again"
        )
      else:
        guests.wait(limit.left)
    guests.tell()
  if guests.fault:
    raise UserError(guests.fault, exit_code=guests.code)


def _listen(port: int, limit: Limit) -> socket.socket:
  """Returns a socket that listens, as soon as the process of an earlier attempt has left it."""
  while True:
    try:
      return socket.create_server(("", port), family=socket.AF_INET, backlog=1024)
    except OSError as error:
      busy = error.errno == errno.EADDRINUSE
      if not busy or limit.over:
        code = EXIT_CODE if busy else 2
        text = f"--coordinator: cannot listen at port {port}: {error}"
        raise UserError(text, exit_code=code) from error
    time.sleep(0.2)


def _compare(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  """Returns why a process cannot join, or nothing."""
  who = f"process {other['index']} on {other['host']}"
  if other["count"] != mine["count"]:
    return f"{who} expects {other['count']} processes, process 0 expects {mine['count']}"
  for name, value in mine["about"].items():
    if other["about"].get(name) != value:
      return f"{who} has {name} {other['about'].get(name)!r}, process 0 has {value!r}"
  return ""


def _report(address: tuple[str, int], me: Mapping[str, Any], limit: Limit) -> None:
  """Another process tells process 0 that it is there, and waits for the answer."""
  where, reached = f"{address[0]}:{address[1]}", False
  while True:
    try:
      with socket.create_connection(address, timeout=max(limit.left, 0.01)) as connection:
        reached = True
        lines = connection.makefile("rw")
        _say(lines, me)
        while True:  # Process 0 may have begun to wait later.
          connection.settimeout(limit.left + _ANSWER_SECONDS)
          told = json.loads(lines.readline() or "null")
          if told is None:
            raise ConnectionError("the connection was closed")
          if "ask" not in told:
            break
          _say(lines, {"here": me["index"]})
        if told["fault"]:
          raise UserError(told["fault"], exit_code=told["code"])
        return
    except (OSError, ValueError) as error:
      problem = error
    if limit.over:
      if reached:
        raise UserError(
          f"process 0 at {where} is there, but did not find all processes within "
          f"{limit.seconds:g} s; its log says which are missing",
          exit_code=EXIT_CODE,
        )
      raise UserError(
        f"process 0 was not found at {where} within {limit.seconds:g} s ({problem}): is it "
        "running, and may this host reach that port?",
        exit_code=EXIT_CODE,
      )
    time.sleep(0.2)


def _say(lines: Any, message: Mapping[str, Any]) -> None:
  lines.write(json.dumps(message) + "\n")
  lines.flush()
