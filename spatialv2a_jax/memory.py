"""What each full-size network takes of memory: compiled from shapes, without any weights.

Axes: b row (clip, window or frame), y row, x column, c colour or channel, z frame of a segment,
w text token, o sound, e ear, t latent frame, m mel bin, n mel frame.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from spatialv2a_jax import codec, flow, groups, phase, schema, sharding, weights
from spatialv2a_jax.models import clip, flow_net, localizer, synchformer, vocoder

SECONDS = 8.0
DTYPES = ("float32", "bfloat16")
FLOWS = {  # Sizes beside the defaults, which are the paper's two-ear network.
  "two ears, small_16k": {},
  "MMAudio small_16k": dict(ears=1, spatial=False, joint_depth=4, ear_depth=8),
  "MMAudio small_44k": dict(
    ears=1, spatial=False, joint_depth=4, ear_depth=8, latent_channels=40
  ),
  "MMAudio medium_44k": dict(
    ears=1, spatial=False, joint_depth=4, ear_depth=8, latent_channels=40, width=896, heads=14
  ),
  "MMAudio large_44k": dict(
    ears=1, spatial=False, joint_depth=7, ear_depth=14, latent_channels=40, width=896, heads=14
  ),
  "MMAudio large_44k_v2": dict(
    ears=1, spatial=False, joint_depth=7, ear_depth=14, latent_channels=40, width=896, heads=14,
    v2=True,
  ),
}  # fmt: skip


class Work(NamedTuple):
  """One network at work.

  Attributes:
    network: its name in a model folder.
    init: key -> its parameters.
    function: of parameters and inputs.
    inputs: their shapes.
    part: of the parameters, where only one is needed.
  """

  network: str
  init: Callable[[jax.Array], Any]
  function: Callable[..., Any]
  inputs: tuple[Any, ...]
  part: str = ""


class Row(NamedTuple):
  """Bytes of one network: parameters as they are held, and the most that exists at once."""

  name: str
  count: int
  params: dict[str, int]
  peak: dict[str, int]


def shape(*sizes: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
  """Returns the shape of one input."""
  return jax.ShapeDtypeStruct(sizes, dtype)


def works(dtype: str) -> dict[str, Work]:
  """Returns every full-size network with what it is given for one clip of 8 s at a time."""
  look, follow = clip.Config(dtype=dtype), synchformer.Config(dtype=dtype)
  place = localizer.Config(dtype=dtype)
  eye, sync, where = clip.build(look), synchformer.build(follow), localizer.build(place)
  ids_bw = shape(1, look.text_len, dtype=np.int32)
  frames_byxc = shape(groups.SIZE, *clip.frame_size(look), 3, dtype=np.uint8)
  segments = shape(groups.SIZE, synchformer.FRAMES, follow.size, follow.size, 3, dtype=np.uint8)
  places = shape(groups.SIZE, *localizer.FRAME_SIZE, 3, dtype=np.uint8)
  rows = {
    "CLIP ViT-H/14, image tower": Work(
      "clip", eye.init, lambda p, x: eye.image({"image": p}, x), (frames_byxc,), "image"
    ),
    "CLIP ViT-H/14, text tower": Work(
      "clip", eye.init, lambda p, x: eye.text({"text": p}, x), (ids_bw,), "text"
    ),
    "Synchformer": Work("synchformer", sync.init, sync.encode, (segments,)),
    "CLIPSeg": Work("clipseg", where.init, where.heat, (places, shape(1, place.dim))),
  }
  for name, sizes in FLOWS.items():
    rows[name] = _flow(flow_net.Config(**sizes, unroll=False, dtype=dtype))
  for name, audio in schema.AUDIO.items():
    sound = codec.build({"width": 384 if name == "16k" else 512, "folded": True}, audio)
    frames = schema.lengths(SECONDS, audio).latent
    latents = shape(1, 2, frames, audio.latent_channels)
    rows[f"VAE {name}, decoder"] = Work("vae", sound.init, sound.decode, (latents,))
    voice = vocoder.build(vocoder.V1_16K if name == "16k" else vocoder.V2_44K)
    mels = shape(1, audio.n_mels, phase.piece_frames(2 * frames, audio))
    rows[f"BigVGAN {name}"] = Work("vocoder", voice.init, voice.waveform, (mels,))
  return rows


def _flow(config: flow_net.Config) -> Work:
  """One guided step of the sampler, conditions included."""
  net = flow_net.build(config)
  audio = next(a for a in schema.AUDIO.values() if a.latent_channels == config.latent_channels)
  n = schema.lengths(SECONDS, audio)
  cond = {
    "clip_bvf": shape(1, n.clip, config.clip_dim),
    "sync_bsf": shape(1, n.sync, config.sync_dim),
    "text_bwf": shape(1, config.text_len, config.text_dim),
    "spatial_bvk": shape(1, n.clip, len(schema.DESCRIPTORS)),
  }

  def step(params, x_betc, t_b, cond):
    velocity = flow.guided(net, params, net.init_stats(), cond, latent_len=n.latent, guidance=4.5)
    return x_betc + velocity(x_betc, t_b)

  x_betc = shape(1, config.ears, n.latent, config.latent_channels)
  return Work("flow", net.init, step, (x_betc, shape(1), cond))


def rows() -> Iterator[Row]:
  """Compiles each network in both precisions and yields what it takes."""
  tables = {dtype: works(dtype) for dtype in DTYPES}
  for name, work in tables["float32"].items():
    params, peak = {}, {}
    whole = sharding.unboxed(jax.eval_shape(work.init, jax.random.key(0)))
    held = whole[work.part] if work.part else whole
    for dtype in DTYPES:
      work = tables[dtype][name]
      if dtype == "bfloat16" and work.network in weights.EXACT:
        continue
      shapes = weights.placed_shapes(held, work.network, dtype)
      params[dtype] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
      peak[dtype] = peak_bytes(work.function, shapes, *work.inputs)
    yield Row(name, sum(x.size for x in jax.tree.leaves(held)), params, peak)


def peak_bytes(function: Callable[..., Any], *args: Any) -> int:
  """Returns arguments, results and temporaries of a compiled function together."""
  used = jax.jit(function).lower(*args).compile().memory_analysis()
  if used is None:
    return 0
  sizes = used.argument_size_in_bytes, used.output_size_in_bytes, used.temp_size_in_bytes
  return sum(sizes) - used.alias_size_in_bytes


def table() -> Iterator[str]:
  """Yields the lines of a Markdown table, each as soon as it is known."""
  yield "| network, 8 s | parameters | weights fp32 / bf16 | peak fp32 / bf16 |"
  yield "|---|---|---|---|"
  for row in rows():
    cells = [
      " / ".join(f"{sizes[d] / 2**30:.2f}" if d in sizes else "-" for d in DTYPES) + " GiB"
      for sizes in (row.params, row.peak)
    ]
    yield f"| {row.name} | {row.count:,} | {' | '.join(cells)} |"
