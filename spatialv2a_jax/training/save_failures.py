"""How a save in the background says why it failed.

Where there are several processes, Orbax tells nobody before all of them have done their part.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


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
