"""Errors that a user can act on: one line to print and the exit code to leave with."""


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


class MissingAssetError(UserError):
  """Weights or data that the chosen settings need are not on this machine."""

  exit_code = 3


class DamagedAssetError(UserError):
  """A file of a model folder is not the one that was written; no fault of the other inputs."""
