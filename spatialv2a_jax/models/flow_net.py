"""The velocity network: joint blocks, a branch per ear, a final layer per ear.

One code path holds the two-ear network of SpatialV2A (arXiv 2601.15017) and, with `ears=1` and
`spatial=False`, MMAudio v1 and v2. Weights of repeated blocks are stacked on a leading `layers`
axis, those of the branches on a leading `ear` axis before it.

Axis letters: b batch, e ear (0 left, 1 right), t latent frame, c latent channel, v video frame,
s synchronisation token, w text token, f feature of an encoder, k spatial descriptor, d width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spatialv2a_jax.models import attention, layers, spatial
from spatialv2a_jax.models.blocks import EarBlock, FinalLayer, JointBlock
from spatialv2a_jax.models.conditioning import SYNC_SEGMENT, Condition, Project, TimeEmbedding
from spatialv2a_jax.models.layers import Constrain
from spatialv2a_jax.models.remat import POLICIES

Params = dict[str, Any]
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the network.

  Attributes:
    width: d; MMAudio's small models have 448, the others 896.
    heads: attention heads; divides the width.
    joint_depth: joint blocks, at least 1; the last ends the visual and text streams.
    ear_depth: blocks of each ear's branch, at least 1.
    latent_channels: c, 20 (16 kHz) or 40 (44.1 kHz).
    clip_dim: features of a CLIP frame.
    sync_dim: features of a Synchformer token.
    text_dim, text_len: features of a text token, and how many there are.
    ears: 2, or 1 for mono MMAudio.
    v2: MMAudio v2's activations and time embedding.
    spatial: has the spatial condition C_s.
    ffn: hidden width of the blocks' MLPs; None is MMAudio's rule.
    unroll: unrolls the blocks instead of scanning them; None does so on the CPU, where convolution
      gradients inside a scan are about 30 times slower.
    remat: what the backward pass recomputes of each block: nothing ("" or False), all but the
      results of products, convolutions and attention ("products"), dense products as well
      ("convolutions"), or everything ("full" or True).
    dtype: of the matmuls.
    activations: dtype of what flows between blocks, the residual streams and the conditions;
      MMAudio's own training has bfloat16 there, as its matmuls. Norms and softmax stay float32.
    gemm: the blocks convolve by matrix products instead of convolutions.
    attention: of the blocks: "xla"; "auto" and "cudnn" are cuDNN's where `is_fused` says so.
  """

  width: int = 448
  heads: int = 7
  joint_depth: int = 6
  ear_depth: int = 12
  latent_channels: int = 20
  clip_dim: int = 1024
  sync_dim: int = 768
  text_dim: int = 1024
  text_len: int = 77
  ears: int = 2
  v2: bool = False
  spatial: bool = True
  ffn: int | None = None
  unroll: bool | None = None
  remat: bool | Literal["", "products", "convolutions", "full"] = False
  dtype: str = "float32"
  activations: str = "float32"
  gemm: bool = False
  attention: Literal["auto", "xla", "cudnn"] = "auto"

  def __post_init__(self):
    if self.dtype not in _DTYPES or self.activations not in (self.dtype, "float32"):
      raise ValueError(f"no dtype={self.dtype} with activations={self.activations}: {_DTYPES}")
    sizes = (self.width, self.heads, self.joint_depth, self.ear_depth, self.ffn)
    if min(size for size in sizes if size is not None) < 1:
      raise ValueError("width, heads, ffn, joint_depth and ear_depth must be at least 1")
    if self.ears not in (1, 2):
      raise ValueError(f"ears must be 1 or 2, got {self.ears}")
    if self.width % (2 * self.heads):
      raise ValueError(f"width {self.width} is not {self.heads} heads of an even width")
    if self.remat not in (False, True, "", *POLICIES):
      raise ValueError(f"remat {self.remat!r} is unknown, have: {list(POLICIES)}")
    if self.attention not in ("auto", "xla", "cudnn"):
      raise ValueError(f"attention {self.attention!r} is unknown, have: auto, xla, cudnn")


class FlowNet(NamedTuple):
  """A network as pure functions.

  Attributes:
    init: key -> parameters, boxed with the logical names of their axes.
    init_stats: () -> running statistics of the spatial condition's BatchNorm, unboxed.
    condition: (params, stats, cond, drop, *, latent_len, train) -> (prepared, new stats).
      The part that depends on neither time nor latents. `cond` holds clip_bvf, sync_bsf, text_bwf,
      spatial_bvk and optionally weight_b (0 leaves a clip out of the statistics); `drop` holds
      boolean masks [b] "video" (clip and sync), "text" and "spatial" of what the learned null
      features (frozen ones for text) replace.
    velocity: (params, x_betc, t_b, prepared) -> v_betc, float32.
    trace: as `velocity`, but unrolled; returns (v_betc, intermediate values by name).
    normalize: (params, x_betc) -> latents of zero mean and unit variance.
    unnormalize: inverts `normalize`.
  """

  init: Callable[..., Params]
  init_stats: Callable[[], dict[str, Any]]
  condition: Callable[..., tuple[dict[str, jax.Array], dict[str, Any]]]
  velocity: Callable[..., jax.Array]
  trace: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
  normalize: Callable[..., jax.Array]
  unnormalize: Callable[..., jax.Array]


def normalize(params: Params, x_betc: jax.Array) -> jax.Array:
  """Returns latents normalised with the frozen statistics of the training set."""
  mean, std = params["frozen"]["latent_mean"], params["frozen"]["latent_std"]
  return (x_betc - _channel(mean, x_betc)) / _channel(std, x_betc)


def unnormalize(params: Params, x_betc: jax.Array) -> jax.Array:
  """Inverts `normalize`."""
  mean, std = params["frozen"]["latent_mean"], params["frozen"]["latent_std"]
  return x_betc * _channel(std, x_betc) + _channel(mean, x_betc)


def _channel(value_c: jax.Array, like: jax.Array) -> jax.Array:
  return value_c.reshape((1,) * (like.ndim - 1) + (-1,))


def stacked(init: Callable, key: jax.Array, size: int, axis: str) -> Params:
  """Returns `size` draws of `init` on a new leading axis of that logical name."""
  params = jax.vmap(init)(jax.random.split(key, size))
  return nn.meta.add_axis(params, 0, {nn.PARTITION_NAME: axis})


def repeat(block: Callable, params: Params, x: Any, *, unroll: bool) -> tuple[Any, list[Any]]:
  """Applies `block(params, x) -> x` once per entry of the parameters' leading axis.

  Returns:
    The last output, and when unrolled the list of all.
  """
  if not unroll:
    return jax.lax.scan(lambda x, p: (block(p, x), None), x, params)[0], []
  outputs = [x]
  for p in unstack(params):
    outputs.append(block(p, outputs[-1]))
  return outputs[-1], outputs[1:]


def per_ear(branch: Callable, params: Params, x_betd: jax.Array) -> Any:
  """Applies `branch(params, x_btd)` to each ear with its own parameters; outputs stack on e.

  One ear after the other: batched over weights, their convolutions become grouped ones, whose
  gradient XLA's partitioner gets wrong when the channels are split over a mesh (jax 0.10).
  """
  ears = zip(unstack(params), jnp.unstack(x_betd, axis=1), strict=True)
  outputs = [branch(p, x) for p, x in ears]
  return jax.tree.map(lambda *ears: jnp.stack(ears, axis=1), *outputs)


def in_turn(block: Callable, params: Params, x_betd: jax.Array) -> jax.Array:
  """Applies the blocks of the left ear, then those of the right one, in a single loop.

  Two loops would do the same and be compiled twice.
  """
  depth = jax.tree.leaves(params)[0].shape[1]
  blocks = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), params)

  def turn(ears, xs):
    p, exchange = xs
    now, other = (jnp.where(exchange, b, a) for a, b in (ears, ears[::-1]))
    return (block(p, now), other), None

  ears = x_betd[:, 0], x_betd[:, 1]
  (right, left), _ = jax.lax.scan(turn, ears, (blocks, jnp.arange(2 * depth) == depth))
  return jnp.stack([left, right], axis=1)


def lower(params: Params, dtype: str) -> Params:
  """Returns parameters with kernels and biases in the type that the blocks multiply in.

  Before a loop over blocks, since it stacks gradients in the type of what it loops over. Products
  give them no more bits; in float32 a TPU writes twice as much, and copies all of it once more.
  """

  def one(path, x):
    return x.astype(dtype) if path[-1].key in ("kernel", "bias") else x

  return jax.tree_util.tree_map_with_path(one, params)


def unstack(params: Params) -> list[Params]:
  """Returns one tree per entry of the leading axis."""
  leaves, tree = jax.tree.flatten(params)
  return [tree.unflatten(part) for part in zip(*map(jnp.unstack, leaves), strict=True)]


def build(
  config: Config,
  constrain: Constrain = layers.unconstrained,
  *,
  sealed: bool = False,
  device: Any = None,
) -> FlowNet:
  """Returns the network of `config`.

  Args:
    config: its sizes.
    constrain: pins activations to their logical axes.
    sealed: compiles what one ear has of a block apart (`layers.sealed`): on the CPU, two ears with
      the weights of a mono network then compute what it does, to the bit.
    device: one of those it is for, by which `unroll` and `attention` are chosen that the config
      leaves open; None is the first of this machine.
  """
  c = config
  size = {"width": c.width, "ffn": c.ffn or layers.hidden_width(c.width), "dtype": c.dtype}
  inputs = {"clip_dim": c.clip_dim, "sync_dim": c.sync_dim, "v2": c.v2}
  condition_net = Condition(**inputs, **size)
  spatial_net = spatial.SpatialCondition(**size)
  time_net = TimeEmbedding(width=c.width, v2=c.v2, dtype=c.dtype)
  audio_net = Project(source="latent", first_taps=7, taps=7, v2=c.v2, **size)
  block = {"heads": c.heads, "constrain": constrain, "gemm": c.gemm, **size}
  device = jax.devices()[0] if device is None else device
  unrolled = device.platform == "cpu" if c.unroll is None else c.unroll
  fused = attention.is_fused(c.attention, device, c.dtype, c.width // c.heads)
  block["attention"] = "cudnn" if fused else "xla"
  joint_net = JointBlock(ears=c.ears, sealed=sealed, **block)
  joint_last_net = JointBlock(ears=c.ears, last=True, sealed=sealed, **block)
  ear_net = EarBlock(**block)
  final_net = FinalLayer(width=c.width, channels=c.latent_channels, dtype=c.dtype)

  seal = layers.sealed if sealed else lambda function: function

  def init(key: jax.Array) -> Params:
    d, frames = c.width, 4
    x_betd = jnp.zeros((1, c.ears, frames, d))
    g_b1d, c_btd = jnp.zeros((1, 1, d)), jnp.zeros((1, frames, d))
    tokens = x_betd, jnp.zeros((1, 1, 2, d)), jnp.zeros((1, 1, c.text_len, d))
    cond = {
      "clip_bvf": jnp.zeros((1, 2, c.clip_dim)),
      "sync_bsf": jnp.zeros((1, SYNC_SEGMENT, c.sync_dim)),
      "text_bwf": jnp.zeros((1, c.text_len, c.text_dim)),
    }
    drop_b = jnp.zeros(1, bool)
    drop = {"video": drop_b, "text": drop_b}

    def make(net, *args, **kwargs):
      return lambda key: net.init(key, *args, **kwargs)["params"]

    # Vectorised over keys, which cuDNN's attention is not made for.
    joint, joint_last, ear_block = (
      net.clone(attention="xla") for net in (joint_net, joint_last_net, ear_net)
    )
    joint_args = tokens, c_btd[:, None], g_b1d[:, None]
    ear = make(ear_block, x_betd[:, 0], c_btd)
    final = make(final_net, x_betd[:, 0], g_b1d)
    makers = {
      "frozen": lambda _: {
        "latent_mean": layers.logical(jnp.zeros, "latent")((c.latent_channels,)),
        "latent_std": layers.logical(jnp.ones, "latent")((c.latent_channels,)),
        "null_text": layers.logical(jnp.zeros, None, None)((c.text_len, c.text_dim)),
      },
      "condition": make(condition_net, cond, drop, cond["text_bwf"][0], frames),
      "time": make(time_net, jnp.zeros(1)),
      "audio": make(audio_net, jnp.zeros((1, c.ears, frames, c.latent_channels))),
      "joint": lambda key: stacked(make(joint, *joint_args), key, c.joint_depth - 1, "layers"),
      "joint_last": make(joint_last, *joint_args),
      "ears": lambda key: stacked(
        lambda key: stacked(ear, key, c.ear_depth, "layers"), key, c.ears, "ear"
      ),
      "final": lambda key: stacked(final, key, c.ears, "ear"),
    }
    if c.joint_depth == 1:
      del makers["joint"]
    if c.ears == 2:
      embedding = layers.logical(jnp.zeros, "ear", "width")
      makers["ear_embedding"] = lambda _: embedding((2, d))
    if c.spatial:
      makers["spatial"] = make(
        spatial_net,
        jnp.zeros((1, 2, len(spatial.DESCRIPTORS))),
        init_stats()["spatial"],
        drop_b,
        ~drop_b,
        latent_len=frames,
        train=False,
      )
    keys = jax.random.split(key, len(makers))
    return {name: make(k) for (name, make), k in zip(makers.items(), keys, strict=True)}

  def init_stats() -> dict[str, Any]:
    if not c.spatial:
      return {}
    return {"spatial": {"mean": jnp.zeros(c.width), "var": jnp.ones(c.width)}}

  def condition(
    params: Params,
    stats: dict[str, Any],
    cond: Mapping[str, jax.Array],
    drop: Mapping[str, jax.Array],
    *,
    latent_len: int,
    train: bool,
  ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    null_text_wf = jax.lax.stop_gradient(params["frozen"]["null_text"])
    variables = {"params": params["condition"]}
    prepare = seal(lambda *args: condition_net.apply(*args, latent_len))
    prepared = prepare(variables, dict(cond), drop, null_text_wf)
    assert isinstance(prepared, dict)
    if c.spatial:
      keep_b = ~drop["spatial"]
      if "weight_b" in cond:
        keep_b &= cond["weight_b"] > 0
      spatial_btd, new = spatial_net.apply(
        {"params": params["spatial"]},
        cond["spatial_bvk"],
        stats["spatial"],
        drop["spatial"],
        keep_b,
        latent_len=latent_len,
        train=train,
      )
      return prepared | {"spatial_btd": spatial_btd}, {"spatial": new}
    return prepared, stats

  def run(params, x_betc, t_b, prepared, unroll):
    def plain(net):
      return lambda p, *args: net.apply({"params": p}, *args)

    def apply(net, looped=False):
      call = plain(net)
      if not c.remat:
        return call
      # In a loop, nothing can undo the recomputation that a barrier would have to protect.
      policy = POLICIES["full" if c.remat is True else c.remat]
      return jax.checkpoint(call, policy=policy, prevent_cse=unroll or not looped)

    repeated = {name: params[name] for name in ("joint", "ears") if name in params}
    if not unroll:
      repeated = lower(repeated, c.dtype)
    kind = jnp.dtype(c.activations)
    time_bd = seal(plain(time_net))(params["time"], t_b)
    g_b1d = (time_bd + prepared["global_bd"]).astype(jnp.float32)[:, None]
    c_btd = g_b1d + prepared["sync_btd"]
    if c.spatial:
      c_btd += prepared["spatial_btd"]
    # Every block modulates by them: activated once, not once per block.
    silu = seal(nn.silu)
    g_b1d, c_btd = silu(g_b1d).astype(kind), silu(c_btd).astype(kind)

    def project(x):
      return jnp.asarray(seal(plain(audio_net))(params["audio"], x), jnp.float32)

    # Apart as in the joint blocks, for the rounding of a row can depend on the rows beside it.
    ears = jnp.split(x_betc, c.ears, axis=1) if unroll else [x_betc]
    x_betd = jnp.concatenate([project(x) for x in ears], axis=1)
    mids = {"time": time_bd, "audio": x_betd}
    if c.ears == 2:
      x_betd += params["ear_embedding"][None, :, None]
    x_betd = x_betd.astype(kind)
    x_betd = constrain(x_betd, "act_batch", "ear", "act_time", "act_width")

    tokens = x_betd, *(prepared[n].astype(kind)[:, None] for n in ("clip_bvd", "text_bwd"))
    if c.joint_depth > 1:
      joint = apply(joint_net, looped=True)
      tokens, mids["joint"] = repeat(
        lambda p, x: joint(p, x, c_btd[:, None], g_b1d[:, None]),
        repeated["joint"],
        tokens,
        unroll=unroll,
      )
    x_betd = apply(joint_last_net)(params["joint_last"], tokens, c_btd[:, None], g_b1d[:, None])[0]
    mids["joint_last"] = x_betd

    ear_block, final = seal(apply(ear_net, looped=True)), seal(apply(final_net))

    def one(p, x_btd):
      return ear_block(p, x_btd, c_btd)

    if unroll or c.ears == 1:
      x_betd, mids["ears"] = per_ear(
        lambda p, x_btd: repeat(one, p, x_btd, unroll=unroll), repeated["ears"], x_betd
      )
    else:
      x_betd = in_turn(one, repeated["ears"], x_betd)
    return per_ear(lambda p, x_btd: final(p, x_btd, g_b1d), params["final"], x_betd), mids

  def velocity(params, x_betc, t_b, prepared):
    return run(params, x_betc, t_b, prepared, unrolled)[0]

  def trace(params, x_betc, t_b, prepared):
    return run(params, x_betc, t_b, prepared, True)

  return FlowNet(init, init_stats, condition, velocity, trace, normalize, unnormalize)
