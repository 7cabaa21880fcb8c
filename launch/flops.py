"""Counts the work of a function in matrix products, from its trace: nothing is compiled."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


def count(function: Callable[..., Any], *arguments: Any) -> int:
  """Returns the FLOPs of all matrix products and convolutions of one call.

  A multiplication and its addition are two; loops count as often as they run, padding counts.

  Args:
    function: pure.
    arguments: arrays or their shapes.
  """
  return _count(function, arguments, 0)


def count_gradient(function: Callable[..., Any], *arguments: Any) -> int:
  """Returns those of one call and of its gradient by the first argument.

  For each operand that depends on it, a product has one of the same size in the backward pass: the
  gradient of what a network is given is not among them, nor is what is computed a second time.
  """
  return _count(function, arguments, len(jax.tree.leaves(arguments[0])))


def _count(function: Callable[..., Any], arguments: tuple[Any, ...], differentiated: int) -> int:
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  return _walk(jaxpr, [i < differentiated for i in range(len(jaxpr.invars))])[0]


def _walk(jaxpr: core.Jaxpr, needed: Sequence[bool]) -> tuple[int, list[bool]]:
  """Returns the work, and which of the outputs need a gradient if these inputs do."""
  known = dict(zip(jaxpr.invars, needed, strict=True))

  def needs(variables: Sequence[Any]) -> list[bool]:
    return [not isinstance(x, core.Literal) and known.get(x, False) for x in variables]

  total = 0
  for equation in jaxpr.eqns:
    work, out = _equation(equation, needs(equation.invars))
    total += work
    known.update(zip(equation.outvars, out, strict=True))
  return total, needs(jaxpr.outvars)


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape


def _is_real(variable: Any) -> bool:
  return jnp.issubdtype(variable.aval.dtype, np.inexact)


def _equation(equation: core.JaxprEqn, needed: list[bool]) -> tuple[int, list[bool]]:
  name, parameters = equation.primitive.name, equation.params
  through = any(needed) and name != "stop_gradient"
  out = [through and _is_real(x) for x in equation.outvars]
  if name == "dot_general":
    (contracted, _), _ = parameters["dimension_numbers"]
    lhs = _shape(equation.invars[0])
    work = 2 * math.prod(_shape(equation.outvars[0])) * math.prod(lhs[n] for n in contracted)
    return work * (1 + sum(needed)), out
  if name == "conv_general_dilated":
    kernel = _shape(equation.invars[1])
    features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
    work = 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // features
    return work * (1 + sum(needed)), out
  if name == "cond":
    found = [_walk(_open(branch), needed[1:]) for branch in parameters["branches"]]
    return max(work for work, _ in found), [
      any(x) for x in zip(*(x for _, x in found), strict=True)
    ]
  if name == "scan":
    return _scan(equation, needed)
  inner = [_open(value) for value in parameters.values()]
  found = [
    _walk(x, needed if len(x.invars) == len(needed) else [through] * len(x.invars))
    for x in inner
    if isinstance(x, core.Jaxpr)
  ]
  if len(found) == 1 and len(found[0][1]) == len(out):
    return found[0]
  return sum(work for work, _ in found), out


def _open(value: Any) -> Any:
  """Returns the jaxpr of a closed one, which loops and branches have until jax 0.11."""
  return getattr(value, "jaxpr", value)


def _scan(equation: core.JaxprEqn, needed: list[bool]) -> tuple[int, list[bool]]:
  body = _open(equation.params["jaxpr"])

  def whole(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Returns how many are the same in a turn; the others are cut into turns."""
    return sum(_shape(a) == _shape(b) for a, b in zip(outside, inside, strict=True))

  carry = whole(equation.outvars, body.outvars)
  constants = whole(equation.invars, body.invars) - carry
  while True:  # What one turn hands to the next needs a gradient in all of them.
    work, out = _walk(body, needed)
    first = [a or b for a, b in zip(needed[constants : constants + carry], out, strict=False)]
    if first == needed[constants : constants + carry]:
      return equation.params["length"] * work, out
    needed = [*needed[:constants], *first, *needed[constants + carry :]]
