"""Work in a thread of its own, so that the main thread can heed signals while it waits."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.05  # A signal is noticed this soon,
_TICK_SECONDS = 0.002  # and this soon that a step has ended: it decides whose time it is.

_given_up: list[threading.Thread] = []


class GivenUpError(Exception):
  """The wait was given up because the run is to stop."""


def run(work: Callable[[], T], leave: Callable[[], bool]) -> T:
  """Returns `work()`, done in another thread.

  Args:
    work: may take long; it is left alone if the wait is given up.
    leave: asked again and again while waiting.

  Raises:
    GivenUpError: once `leave()` says so.
    BaseException: what `work` raised.
  """
  return _Task(work).result(leave)


def abandoned() -> bool:
  """Returns whether work that was given up still runs: the interpreter must not be taken down."""
  return any(thread.is_alive() for thread in _given_up)


class Feed(Generic[T]):
  """An iterator that is advanced in another thread, one item at a time and only when asked."""

  def __init__(self, items: Iterator[T]):
    """Wraps `items`; nothing is read before the first `next`."""
    self._items = items
    self._task: _Task[T] | None = None

  def wait(self, enough: Callable[[], bool]) -> None:
    """Asks for the next item, unless `enough()`, and returns once it is there or `enough()`."""
    if not enough():
      self._ask().wait(enough)

  def next(self, leave: Callable[[], bool]) -> T:
    """Returns the next item.

    Raises:
      GivenUpError: once `leave()` says so; the item is not lost, the next call returns it.
      StopIteration: at the end.
    """
    item = self._ask().result(leave)
    self._task = None
    return item

  def _ask(self) -> "_Task[T]":
    if self._task is None:
      self._task = _Task(lambda: next(self._items))
    return self._task


class _Task(Generic[T]):
  def __init__(self, work: Callable[[], T]):
    self._out: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    self._done = threading.Event()
    # A daemon: a read that hangs must not keep the process from leaving.
    self._thread = threading.Thread(target=self._run, args=(work,), name="work", daemon=True)
    self._thread.start()

  def _run(self, work: Callable[[], T]) -> None:
    try:
      self._out.put((work(), None))
    except BaseException as error:
      self._out.put((None, error))
    self._done.set()

  def wait(self, enough: Callable[[], bool]) -> None:
    while not enough() and not self._done.wait(_TICK_SECONDS):
      pass

  def result(self, leave: Callable[[], bool]) -> T:
    while True:
      try:
        value, error = self._out.get(timeout=_POLL_SECONDS)
        break
      except queue.Empty:
        if leave():
          _given_up.append(self._thread)
          raise GivenUpError from None
    if error is not None:
      raise error
    return value
