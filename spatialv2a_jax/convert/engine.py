"""A foreign state dict <-> our parameters, by a table with one recipe per leaf of ours. Strict.

Whatever does not match on either side (a key that nobody takes, a key that is missing, a shape
that does not fit) is one error that lists all of it: a checkpoint converts completely or not.
`export` reads the same table backwards.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from spatialv2a_jax.convert import files
from spatialv2a_jax.errors import UserError

STATS = "stats"  # Above the paths of running statistics, which a model folder keeps apart.
State = Mapping[str, np.ndarray]
Outputs = dict[str, Callable[[], Any]]
WEIGHT = "o i ... -> ... i o"  # Linear and convolution weights: PyTorch's -> ours.


class Leaf(NamedTuple):
  """The recipe of one of our leaves.

  Attributes:
    keys: foreign keys that it takes.
    layout: their arrays, float32, in that order -> our array.
    inverse: our array -> their arrays; None if there is no way back.
    exact: whether there and back is the same, bit for bit; else it only means the same.
  """

  keys: tuple[str, ...]
  layout: Callable[..., np.ndarray]
  inverse: Callable[[np.ndarray], Sequence[np.ndarray]] | None = None
  exact: bool = True


Table = dict[str, Leaf]  # By our path, "block/kernel".


@dataclasses.dataclass(frozen=True)
class Source:
  """One kind of foreign checkpoint.

  Attributes:
    network: what our model folder calls it, as in `NETWORK.safetensors`.
    upstream: where the weights come from.
    licence: of the weights, for the record.
    sizes: type of the sizes, a dataclass.
    configure: state dict -> sizes; raises KeyError for a key that it needs.
    table: (state dict, sizes) -> recipes.
    build: sizes -> the network, whose `init` (and `init_stats`) give the shapes that must come out.
    outputs: (sizes, parameters, inputs by name) -> outputs by upstream's name, computed on demand.
    ignore: patterns of whole foreign keys that carry nothing we need.
    wrapper: key under which files may hold the state dict.
    refine: (sizes, what the file holds beside the wrapped state dict) -> sizes.
    about: sizes -> entries of `config.json` beside the sizes; ValueError if nothing here is for
      networks of these sizes.
    note: what one must know to load an exported file upstream.
    stats: whether upstream's state dict holds running statistics; their paths begin with STATS.
    read: path -> content, where upstream spreads a network over several files.
    beside: path -> the other ones of these files.
  """

  network: str
  upstream: str
  licence: str
  sizes: Callable[..., Any]
  configure: Callable[[State], Any]
  table: Callable[[State, Any], Table]
  build: Callable[[Any], Any]
  outputs: Callable[[Any, Any, State], Outputs]
  ignore: tuple[str, ...] = ()
  wrapper: str = ""
  refine: Callable[[Any, Mapping[str, Any]], Any] = lambda config, beside: config
  about: Callable[[Any], dict[str, Any]] = lambda config: {}
  note: str = ""
  stats: bool = False
  read: Callable[[Any], dict[str, Any]] = files.read
  beside: Callable[[Any], list[pathlib.Path]] = lambda path: []


def convert(source: Source, state: Mapping[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
  """Returns the sizes and the parameters, float32, of a foreign checkpoint.

  Args:
    source: what the file should be.
    state: its content.
    name: how messages call it.

  Raises:
    UserError: if anything on either side has no counterpart or another shape, or is not finite.
  """
  beside: Mapping[str, Any] = {}
  if source.wrapper in state and isinstance(state[source.wrapper], Mapping):
    state, beside = state[source.wrapper], state
  flat: dict[Any, Any] = traverse_util.flatten_dict(dict(state))
  state = {".".join(map(str, path)): value for path, value in flat.items()}  # Some are numbers.
  skip = re.compile("|".join(source.ignore) or r"(?!)")
  arrays: dict[str, np.ndarray] = {
    k: v for k, v in state.items() if isinstance(v, np.ndarray) and not skip.fullmatch(k)
  }
  alien = [k for k, v in state.items() if not isinstance(v, np.ndarray) and not skip.fullmatch(k)]
  try:
    config = source.refine(source.configure(arrays), beside)
    table = source.table(arrays, config)
    net = source.build(config)
    shapes = nn.unbox(jax.eval_shape(net.init, jax.random.key(0)))
    if source.stats:
      shapes[STATS] = jax.eval_shape(net.init_stats)
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
    "not finite": set(),
  }
  params = {}
  for path, leaf in table.items():
    if path not in wanted or not all(key in arrays for key in leaf.keys):
      continue
    shape = tuple(wanted[path].shape)
    parts = [np.asarray(arrays[key], np.float32) for key in leaf.keys]
    try:
      params[path] = np.asarray(leaf.layout(*parts), np.float32, order="C")
    except (ValueError, IndexError, TypeError, einops.EinopsError):
      problems["of another shape"].add(f"{', '.join(leaf.keys)} (for {path} {shape})")
      continue
    if params[path].shape != shape:
      problems["of another shape"].add(f"{', '.join(leaf.keys)} (for {path} {shape})")
    elif not np.isfinite(params[path]).all():  # Such as statistics that were never gathered.
      problems["not finite"].add(", ".join(leaf.keys))
  told = [f"{kind}: {', '.join(sorted(keys))}" for kind, keys in problems.items() if keys]
  if told:
    raise UserError(f"{name} does not fit {source.upstream}; " + "; ".join(told))
  return config, traverse_util.unflatten_dict(params, sep="/")


class _Whole(dict):
  """Stands for a state dict that has every key, as a new model of upstream's would."""

  def __contains__(self, key: object) -> bool:
    return True


def export(
  source: Source, config: Any, params: Mapping[str, Any], name: str
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Returns the foreign state dict of our parameters, and which of its keys are not exact.

  Args:
    source: whose layout it takes.
    config: sizes.
    params: our parameters.
    name: how messages call them.

  Raises:
    UserError: if a parameter has no counterpart, or no way back.
  """
  table = source.table(_Whole(), config)
  ours: dict[str, Any] = {**traverse_util.flatten_dict(dict(params), sep="/")}
  problems = {
    "has no": set(table) - set(ours),
    "has parameters unknown to it": set(ours) - set(table),
    "has no way back of": {path for path, leaf in table.items() if leaf.inverse is None},
  }
  told = [f"{kind}: {', '.join(sorted(paths))}" for kind, paths in problems.items() if paths]
  if told:
    raise UserError(f"{name} does not fit {source.upstream}; it " + "; it ".join(told))
  state, rebuilt = {}, []
  for path, leaf in table.items():
    assert leaf.inverse is not None
    parts = leaf.inverse(np.asarray(ours[path], np.float32))
    state |= {k: np.array(x, order="C") for k, x in zip(leaf.keys, parts, strict=True)}
    rebuilt += [] if leaf.exact else leaf.keys
  return state, sorted(rebuilt)


def arranged(keys: str | tuple[str, ...], pattern: str, **sizes: int) -> Leaf:
  """Returns the recipe of a leaf that holds the elements of foreign arrays in another order.

  Args:
    keys: one key, or several of arrays of one shape, which then have a leading axis in `pattern`.
    pattern: of `einops.rearrange`, from theirs to ours.
    **sizes: lengths of axes that the foreign shapes do not show.
  """
  theirs, ours = pattern.split("->")
  names = (keys,) if isinstance(keys, str) else keys

  def layout(*arrays):
    return einops.rearrange(arrays[0] if isinstance(keys, str) else list(arrays), pattern, **sizes)

  def inverse(array):
    parts = einops.rearrange(array, f"{ours} -> {theirs}", **sizes)
    return (parts,) if isinstance(keys, str) else tuple(parts)

  return Leaf(names, layout, inverse)


def copy(key: str) -> Leaf:
  """Returns the recipe of a leaf that is one foreign array as it is."""
  return arranged(key, "... -> ...")


def under(prefix: str, table: Table) -> Table:
  """Returns the table with all of our paths below `prefix`."""
  return {f"{prefix}/{path}": leaf for path, leaf in table.items()}


def linear(name: str, *, bias: bool = True) -> Table:
  """Returns kernel and bias of PyTorch's Linear or Conv (no transposed one)."""
  table = {"kernel": arranged(f"{name}.weight", WEIGHT)}
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

    def inverse(array):
      return [part for leaf, x in zip(leaves, array, strict=True) for part in leaf.inverse(x)]

    keys = tuple(key for leaf in leaves for key in leaf.keys)
    back = all(leaf.inverse for leaf in leaves)
    return Leaf(keys, layout, inverse if back else None, all(leaf.exact for leaf in leaves))

  if len({frozenset(table) for table in tables}) != 1:
    raise ValueError("blocks that are stacked differ in their parts")
  return {path: merge([table[path] for table in tables]) for path in tables[0]}


def count(state: State, pattern: str) -> int:
  """Returns how many numbers the one group of `pattern` takes at the beginning of keys."""
  found = (re.match(pattern, key) for key in state)
  return len({match[1] for match in found if match})


def weight_norm(state: State, name: str, axis: int = 0) -> Leaf:
  """Returns the weight of a layer, with its weight norm (if any, in either spelling) folded.

  w = g v / |v|, the norm over all axes but one; that is the first for transposed convolutions too.
  The way back takes the weight as its own direction.
  """

  def size(v):
    over = tuple(i for i in range(v.ndim) if i != axis)
    return np.sqrt(np.square(v, dtype=np.float64).sum(over, keepdims=True))

  def fold(g, v):
    return (g * (v / size(v))).astype(np.float32)

  def unfold(w):
    return size(w).astype(np.float32), w

  for g, v in (
    (f"{name}.weight_g", f"{name}.weight_v"),
    (f"{name}.parametrizations.weight.original0", f"{name}.parametrizations.weight.original1"),
  ):
    if g in state or v in state:
      return Leaf((g, v), fold, unfold, exact=False)
  return copy(f"{name}.weight")


def then(leaf: Leaf, pattern: str) -> Leaf:
  """Returns the recipe with one more step, a pattern of `einops.rearrange`."""
  more, back = arranged("", pattern), leaf.inverse

  def layout(*arrays):
    return more.layout(leaf.layout(*arrays))

  def inverse(array):
    assert back is not None and more.inverse is not None
    return back(*more.inverse(array))

  return Leaf(leaf.keys, layout, None if back is None else inverse, leaf.exact)


def fused_attention(
  name: str,
  heads: int,
  *,
  qkv: tuple[str, str] = ("in_proj_weight", "in_proj_bias"),
  out: str = "out_proj",
) -> Table:
  """Returns the recipes of a self-attention whose rows are all queries, then keys, then values."""

  return {
    "qkv/kernel": arranged(f"{name}.{qkv[0]}", "(j h k) i -> i j h k", j=3, h=heads),
    "qkv/bias": arranged(f"{name}.{qkv[1]}", "(j h k) -> j h k", j=3, h=heads),
    **attention_output(f"{name}.{out}", heads),
  }


def separate_attention(name: str, heads: int, parts: Sequence[str], out: str) -> Table:
  """Returns the recipes of a self-attention with a layer each for queries, keys and values."""
  weights, biases = (tuple(f"{name}.{p}.{kind}" for p in parts) for kind in ("weight", "bias"))
  return {
    "qkv/kernel": arranged(weights, "j (h k) i -> i j h k", h=heads),
    "qkv/bias": arranged(biases, "j (h k) -> j h k", h=heads),
    **attention_output(f"{name}.{out}", heads),
  }


def attention_output(name: str, heads: int) -> Table:
  """Returns the recipes of the projection after a self-attention."""
  kernel = arranged(f"{name}.weight", "o (h k) -> h k o", h=heads)
  return {"out/kernel": kernel, "out/bias": copy(f"{name}.bias")}
