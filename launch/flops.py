"""Counts the work of a function in matrix products, from its trace: nothing is compiled."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable[..., Any], *arguments: Any) -> int:
  """Returns the FLOPs of all matrix products and convolutions of one call.

  A multiplication and its addition are two; loops count as often as they run, padding counts.

  Args:
    function: pure.
    arguments: arrays or their shapes.
  """
  return _jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr(jaxpr: core.Jaxpr) -> int:
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape


def _equation(equation: core.JaxprEqn) -> int:
  name, parameters = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = parameters["dimension_numbers"]
    lhs = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(lhs[n] for n in contracted)
  if name == "conv_general_dilated":
    kernel = _shape(equation.invars[1])
    features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // features
  if name == "cond":
    return max(_jaxpr(branch.jaxpr) for branch in parameters["branches"])
  turns = parameters["length"] if name == "scan" else 1
  inner = [getattr(value, "jaxpr", value) for value in parameters.values()]
  return turns * sum(_jaxpr(value) for value in inner if isinstance(value, core.Jaxpr))
