"""Errors that a user can act on: one line to print and the exit code to leave with."""

import errno

DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_OF_MACHINE = DISK_TROUBLE | {
  errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip


class UserError(Exception):
  """A mistake in the input: one line saying what is wrong, in which file or flag, what to do.

  Attributes:
    exit_code: what the process returns to the shell.
  """

  exit_code = 2

  def __init__(self, message: str, exit_code: int | None = None):
    super().__init__(" ".join(str(message).split()))
    if exit_code is not None:
      self.exit_code = exit_code


def first_line(error: Exception) -> str:
  """Returns why an error of a library was raised; its name if it does not say."""
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def one_line(error: Exception, memory: str = "") -> str | None:
  """Returns what a user can do about an error of the system or the device; None for others.

  Args:
    error: that no code has foreseen.
    memory: what to try where memory is short, to be appended.
  """
  if isinstance(error, MemoryError):
    return f"out of memory{memory}"
  if _device_is_full(error):
    return f"out of memory on the device{memory} ({first_line(error)[:200]})"
  if isinstance(error, OSError) and error.strerror:
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}"
  return None


def _device_is_full(error: BaseException) -> bool:
  return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)  # JAX's.


def raise_of_machine(error: Exception) -> None:
  """Raises an error again that says nothing about the clip that was at hand.

  Such as weights, memory, a disk or a mount: a build ends, and goes on when that is mended. `io`
  tells what libav calls an input/output error: UnreachableError, if it is no damage.
  """
  if isinstance(error, OSError) and error.errno in _OF_MACHINE:
    raise UnreachableError(one_line(error) or str(error)) from error
  others = MemoryError | MissingAssetError | DamagedAssetError | UnreachableError
  if isinstance(error, others) or _device_is_full(error):
    raise error


class MissingAssetError(UserError):
  """Weights or data that the chosen settings need are not on this machine."""

  exit_code = 3


class DamagedAssetError(UserError):
  """A file of a model folder or data set is not the one that was written; no fault of an input."""


class UnreachableError(UserError):
  """A file is gone, or the system cannot read it, whatever is in it."""
