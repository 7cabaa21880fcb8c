"""How a save in the background says why it failed.

Where there are several processes, Orbax tells nobody before all of them have done their part.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

_POLL_SECONDS = 0.02
_THREAD = "save_finalize"  # Orbax's name of the thread that finishes a save.


class Future:
  """Notes why its work failed, for its own process."""

  def __init__(self, future: Any, failures: list[BaseException]):
    self._future, self._failures = future, failures

  def result(self, timeout: float | None = None) -> Any:
    """Waits for the work, as Orbax asks."""
    with noting(self._failures):
      return self._future.result(timeout=timeout)


@contextlib.contextmanager
def noting(failures: list[BaseException]) -> Iterator[None]:
  """Context whose error is appended to `failures`, and raised on."""
  try:
    yield
  except BaseException as error:
    failures.append(error)
    raise


def noted(handler: Any, failures: list[BaseException]) -> Any:
  """Returns a handler of Orbax which notes why a part of a save failed."""
  save, finalize = handler.async_save, handler.finalize

  async def async_save(*arguments: Any, **more: Any) -> list[Future]:
    return [Future(x, failures) for x in await save(*arguments, **more) or ()]

  def noting_finalize(*arguments: Any, **more: Any) -> None:
    with noting(failures):
      finalize(*arguments, **more)

  handler.async_save, handler.finalize = async_save, noting_finalize
  return handler


def running(manager: Any) -> bool:
  """Returns whether a save of a manager is under way.

  Orbax says so for ever where the thread that finishes it has died, as at a barrier.
  """
  alive = any(thread.name == _THREAD for thread in threading.enumerate())
  return alive and manager.is_saving_in_progress()


def wait(manager: Any, failures: Sequence[BaseException]) -> None:
  """Blocks until a save of a manager is on disk.

  Args:
    manager: of Orbax.
    failures: of its saves, from `noted`.

  Raises:
    the first of `failures`, or what Orbax has met with.
  """
  while running(manager) and not failures:
    time.sleep(_POLL_SECONDS)
  if failures:
    raise failures[0]
  manager.wait_until_finished()


def reason(error: BaseException) -> str:
  """Returns the line that says why a save failed, from the chain of exceptions."""
  chain = []
  one: BaseException | None = error
  while one is not None and one not in chain:
    chain.append(one)
    one = one.__cause__ or one.__context__
  lines = [line.strip() for one in chain for line in str(one).splitlines() if line.strip()]
  signs = ("No space left", "File too large", "Errno", "ermission")
  line = next((line for line in lines if any(s in line for s in signs)), next(iter(lines), ""))
  # TensorStore names the file and its temporary folders first, and the cause last.
  return line.rpartition('": ')[2].partition(" [")[0][:200]
