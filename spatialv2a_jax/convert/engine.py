"""A foreign state dict -> our parameters, by a table with one recipe per leaf of ours. Strict.

Whatever does not match on either side (a key that nobody takes, a key that is missing, a shape
that does not fit) is one error that lists all of it: a checkpoint converts completely or not.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from spatialv2a_jax.errors import UserError

State = Mapping[str, np.ndarray]
Outputs = dict[str, Callable[[], Any]]


class Leaf(NamedTuple):
  """The recipe of one of our leaves.

  Attributes:
    keys: foreign keys that it takes.
    layout: their arrays, float32, in that order -> our array.
  """

  keys: tuple[str, ...]
  layout: Callable[..., np.ndarray]


Table = dict[str, Leaf]  # By our path, "block/kernel".


@dataclasses.dataclass(frozen=True)
class Source:
  """One kind of foreign checkpoint.

  Attributes:
    network: what our model folder calls it, as in `NETWORK.safetensors`.
    upstream: where the weights come from.
    licence: of the weights, for the record.
    configure: state dict -> sizes; raises KeyError for a key that it needs.
    table: (state dict, sizes) -> recipes.
    init: sizes -> the network's `init`, for the shapes that must come out.
    outputs: (sizes, parameters, inputs by name) -> outputs by upstream's name, computed on demand.
    ignore: patterns of whole foreign keys that carry nothing we need.
    wrapper: key under which files may hold the state dict.
    about: sizes -> entries of `config.json` beside the sizes.
  """

  network: str
  upstream: str
  licence: str
  configure: Callable[[State], Any]
  table: Callable[[State, Any], Table]
  init: Callable[[Any], Callable[..., Any]]
  outputs: Callable[[Any, Any, State], Outputs]
  ignore: tuple[str, ...] = ()
  wrapper: str = ""
  about: Callable[[Any], dict[str, Any]] = lambda config: {}


def convert(source: Source, state: Mapping[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
  """Returns the sizes and the parameters, float32, of a foreign checkpoint.

  Args:
    source: what the file should be.
    state: its content.
    name: how messages call it.

  Raises:
    UserError: if anything on either side has no counterpart or another shape.
  """
  if source.wrapper in state and isinstance(state[source.wrapper], Mapping):
    state = state[source.wrapper]
  skip = re.compile("|".join(source.ignore) or r"(?!)")
  arrays: dict[str, np.ndarray] = {
    k: v for k, v in state.items() if isinstance(v, np.ndarray) and not skip.fullmatch(k)
  }
  alien = [k for k, v in state.items() if not isinstance(v, np.ndarray) and not skip.fullmatch(k)]
  try:
    config = source.configure(arrays)
    table = source.table(arrays, config)
    shapes = nn.unbox(jax.eval_shape(source.init(config), jax.random.key(0)))
  except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
    reason = f"lacks {error}" if isinstance(error, KeyError) else f"has unknown sizes ({error})"
    have = ", ".join(sorted(state)[:3])
    raise UserError(
      f"{name} holds no {source.upstream} weights: it {reason}; its keys begin with: {have or '-'}"
    ) from error

  wanted: dict[str, Any] = {**traverse_util.flatten_dict(shapes, sep="/")}
  used = {key for leaf in table.values() for key in leaf.keys}
  problems = {
    "missing in the file": used - set(arrays),
    "unknown in the file": (set(arrays) | set(alien)) - used,
    "without a recipe": set(wanted) - set(table),
    "without a parameter": set(table) - set(wanted),
    "of another shape": set(),
  }
  params = {}
  for path, leaf in table.items():
    if path not in wanted or not all(key in arrays for key in leaf.keys):
      continue
    shape = tuple(wanted[path].shape)
    parts = [np.asarray(arrays[key], np.float32) for key in leaf.keys]
    try:
      params[path] = np.asarray(leaf.layout(*parts), np.float32, order="C")
    except (ValueError, IndexError, TypeError):
      problems["of another shape"].add(f"{', '.join(leaf.keys)} (for {path} {shape})")
      continue
    if params[path].shape != shape:
      problems["of another shape"].add(f"{', '.join(leaf.keys)} (for {path} {shape})")
  told = [f"{kind}: {', '.join(sorted(keys))}" for kind, keys in problems.items() if keys]
  if told:
    raise UserError(f"{name} does not fit {source.upstream}; " + "; ".join(told))
  return config, traverse_util.unflatten_dict(params, sep="/")


def copy(key: str, layout: Callable[..., np.ndarray] = np.asarray) -> Leaf:
  """Returns the recipe of a leaf that is one foreign array."""
  return Leaf((key,), layout)


def under(prefix: str, table: Table) -> Table:
  """Returns the table with all of our paths below `prefix`."""
  return {f"{prefix}/{path}": leaf for path, leaf in table.items()}


def transposed(weight: np.ndarray) -> np.ndarray:
  """Returns a linear or convolution weight (out, in, *taps) as (*taps, in, out)."""
  return weight.transpose(*range(2, weight.ndim), 1, 0)


def linear(name: str, *, bias: bool = True) -> Table:
  """Returns kernel and bias of PyTorch's Linear or Conv (no transposed one)."""
  table = {"kernel": copy(f"{name}.weight", transposed)}
  return table | ({"bias": copy(f"{name}.bias")} if bias else {})


def norm(name: str) -> Table:
  """Returns scale and offset of PyTorch's LayerNorm."""
  return {"scale": copy(f"{name}.weight"), "bias": copy(f"{name}.bias")}


def stack(tables: Sequence[Table]) -> Table:
  """Returns one table whose leaves stack those of equal tables on a new leading axis."""

  def merge(leaves):
    counts = [len(leaf.keys) for leaf in leaves]
    starts = np.cumsum([0, *counts])[:-1]

    def layout(*arrays):
      parts = zip(leaves, starts, counts, strict=True)
      return np.stack([leaf.layout(*arrays[at : at + n]) for leaf, at, n in parts])

    return Leaf(tuple(key for leaf in leaves for key in leaf.keys), layout)

  if len({frozenset(table) for table in tables}) != 1:
    raise ValueError("blocks that are stacked differ in their parts")
  return {path: merge([table[path] for table in tables]) for path in tables[0]}


def count(state: State, pattern: str) -> int:
  """Returns how many numbers the one group of `pattern` takes at the beginning of keys."""
  found = (re.match(pattern, key) for key in state)
  return len({match[1] for match in found if match})


def weight_norm(state: State, name: str) -> Leaf:
  """Returns the weight of a layer, with its weight norm (if any, in either spelling) folded.

  w = g v / |v|, the norm over all axes but the first, also for transposed convolutions.
  """

  def fold(g, v):
    size = np.sqrt(np.square(v, dtype=np.float64).sum(tuple(range(1, v.ndim)), keepdims=True))
    return (g * (v / size)).astype(np.float32)

  for g, v in (
    (f"{name}.weight_g", f"{name}.weight_v"),
    (f"{name}.parametrizations.weight.original0", f"{name}.parametrizations.weight.original1"),
  ):
    if g in state or v in state:
      return Leaf((g, v), fold)
  return copy(f"{name}.weight")


def then(leaf: Leaf, layout: Callable[[np.ndarray], np.ndarray]) -> Leaf:
  """Returns the recipe with one more step."""
  return Leaf(leaf.keys, lambda *arrays: layout(leaf.layout(*arrays)))


def fused_attention(
  name: str,
  heads: int,
  *,
  qkv: tuple[str, str] = ("in_proj_weight", "in_proj_bias"),
  out: str = "out_proj",
) -> Table:
  """Returns the recipes of a self-attention whose rows are all queries, then keys, then values."""

  def split(x):  # (3 * d, in) or (3 * d,).
    return x.T.reshape(*x.shape[1:], 3, heads, -1)

  return {
    "qkv/kernel": copy(f"{name}.{qkv[0]}", split),
    "qkv/bias": copy(f"{name}.{qkv[1]}", split),
    "out/kernel": copy(f"{name}.{out}.weight", lambda x: x.T.reshape(heads, -1, len(x))),
    "out/bias": copy(f"{name}.{out}.bias"),
  }
