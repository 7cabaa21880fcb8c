"""The command line of what takes a config: the file, and single values of it."""

import functools
import pathlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from spatialv2a_jax.errors import UserError, first_line

_CONFIGS = pathlib.Path(ml_collections.__file__).parent


def parse(argv: Sequence[str], values: flags.FlagValues) -> dict[str, Any] | None:
  """Reads a command line into `values` and returns the resolved config, None without --config.

  Args:
    argv: the command line, program name first.
    values: with the other flags defined.

  Raises:
    UserError: one line for any mistake in it.
  """
  return _read(argv, values, functools.partial(config_flags.DEFINE_config_file, "config"))


def replaced(config: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
  """Returns a config in which words as `--config.KEY=VALUE` have replaced values.

  Raises:
    UserError: one line for any mistake in them.
  """
  whole = ml_collections.ConfigDict(dict(config)).lock()
  define = functools.partial(config_flags.DEFINE_config_dict, "config", whole)
  return _read(["config", *words], flags.FlagValues(), define) or {}


def _read(
  argv: Sequence[str], values: flags.FlagValues, define: Callable[..., Any]
) -> dict[str, Any] | None:
  try:
    define(flag_values=values, sys_argv=list(argv))  # Looks up keys, if it has the config.
    rest = values(list(argv))[1:]
    config = values["config"].value
    resolved = None if config is None else config.to_dict()
  except (flags.Error, OSError) as error:
    # A config file that raises is quoted with its traceback; the last line is the message.
    lines = [line.strip() for line in str(error).strip().splitlines()]
    raise UserError("--config: " + lines[-1].removeprefix("ValueError: ")) from error
  except UserError:
    raise
  except Exception as error:
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, AttributeError | KeyError) and _CONFIGS in pathlib.Path(raised_in).parents:
      # Of the config, which knows its nearest key.
      inner = error.args[0] if isinstance(error.args[0], KeyError) else error
      raise UserError(f"the config has no key {inner.args[0]}") from error
    raise UserError(f"--config: {type(error).__name__}: {first_line(error)}") from error
  if rest:
    raise UserError(f"unexpected argument {rest[0]!r}")
  return resolved
