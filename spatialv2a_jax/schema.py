"""The contract of a batch: names, axes, rates, and lengths from seconds.

On its way to the devices a batch keeps the 16 or 8 bits in which records hold most of it; `widen`
is the first thing that happens there.

Axes: b clip, e ear (0 left, 1 right), t latent frame, c latent channel, v video frame at 8 fps,
s synchronisation token, w text token, f feature, k spatial descriptor, p audio sample.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import ml_dtypes  # noqa: F401  (makes numpy know "bfloat16")
import numpy as np

from spatialv2a_jax import microscaling

CLIP_FPS = 8  # Frames per second of the semantic features and of the spatial descriptors.
SYNC_FPS = 25  # Frames per second of the frames that the synchronisation features see.
SEGMENT_FRAMES, SEGMENT_STRIDE, SEGMENT_TOKENS = 16, 8, 8
MIN_SECONDS = SEGMENT_FRAMES / SYNC_FPS
DESCRIPTORS = ("S_h", "S_area", "S_var", "S_LR", "S_shape")
HFOV_DEG = 120.0  # Azimuth = (0.5 - u) * HFOV_DEG for image column u in 0..1 (linear law).
# Windows of the mono-to-binaural network: 0.63 s, normalised to an RMS of left + right; what is
# fainter than the last number is amplified no further.
PAIR_RATE, PAIR_SAMPLES, PAIR_LEVEL, PAIR_FAINTEST = 16_000, 10_080, 0.1, 1e-4


@dataclasses.dataclass(frozen=True)
class AudioSpec:
  """Audio rates of one model family (MMAudio's two front ends).

  Attributes:
    name: "16k" or "44k".
    sample_rate: samples per second.
    hop: samples per mel frame; one latent frame spans two.
    n_fft: window and transform length in samples.
    n_mels: mel bins.
    fmin: lowest mel edge, Hz.
    fmax: highest mel edge, Hz.
    log: base of the log-mel, "log10" or "ln".
    latent_channels: channels of the VAE latent.
  """

  name: str
  sample_rate: int
  hop: int
  n_fft: int
  n_mels: int
  fmin: float
  fmax: float
  log: str
  latent_channels: int

  @property
  def latent_rate(self) -> float:
    """Latent frames per second."""
    return self.sample_rate / (2 * self.hop)


AUDIO: Mapping[str, AudioSpec] = {
  "16k": AudioSpec("16k", 16_000, 256, 1024, 80, 0.0, 8_000.0, "log10", 20),
  "44k": AudioSpec("44k", 44_100, 512, 2048, 128, 0.0, 22_050.0, "ln", 40),
}


def audio_of(n_mels: int, hop: int | None = None) -> str:
  """Returns the name of the audio with such mels; ValueError if there is none."""
  for name, audio in AUDIO.items():
    if audio.n_mels == n_mels and hop in (None, audio.hop):
      return name
  every = "" if hop is None else f" every {hop} samples"
  raise ValueError(f"{n_mels} mel bins{every} are those of no sound in use here")


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Sequence lengths of a clip: latent frames, audio samples, 8 fps frames, sync tokens."""

  latent: int
  samples: int
  clip: int
  sync: int


def lengths(seconds: float, audio: AudioSpec) -> Lengths:
  """Returns the sequence lengths of a clip, by MMAudio's rules.

  Args:
    seconds: duration; at least 0.64 s, the length of one synchronisation segment.
    audio: rates of the audio.

  Raises:
    ValueError: if the clip is shorter than one segment.
  """
  exact = _exact(seconds)
  latent = math.ceil(exact * audio.sample_rate / audio.hop / 2)
  segments = math.floor((exact * SYNC_FPS - SEGMENT_FRAMES) / SEGMENT_STRIDE) + 1
  if segments < 1:
    raise ValueError(f"{seconds} s is shorter than one segment of {MIN_SECONDS} s")
  return Lengths(
    latent=latent,
    samples=latent * audio.hop * 2,
    clip=math.floor(exact * CLIP_FPS),
    sync=segments * SEGMENT_TOKENS,
  )


def clip_id(name: str) -> int:
  """Returns the 32-bit number from which a clip's random keys derive."""
  return int.from_bytes(hashlib.md5(name.encode()).digest()[:4], "little")


def whole_frames(seconds: float, fps: int) -> int:
  """Returns how many frames of rate `fps` begin within `seconds`, without rounding errors."""
  return math.floor(_exact(seconds) * fps)


def _exact(seconds: float) -> Fraction:
  """Returns the decimal number meant: 8.04 s are 201 frames at 25 fps, but 8.04 * 25 < 201."""
  return Fraction(seconds).limit_denominator(10**6)


def feature_shapes(
  seconds: float,
  audio: AudioSpec,
  *,
  clip_dim: int,
  sync_dim: int,
  text_len: int,
  text_dim: int,
  mirror: bool = False,
) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each field of one training example, without the batch axis.

  With `mirror`, the fields of `MIRROR_AXES` are among them.
  """
  n = lengths(seconds, audio)
  shapes = {
    "mean": (2, n.latent, audio.latent_channels),
    "std": (2, n.latent, audio.latent_channels),
    "clip": (n.clip, clip_dim),
    "sync": (n.sync, sync_dim),
    "text": (text_len, text_dim),
    "spatial": (n.clip, len(DESCRIPTORS)),
  }
  more = MIRROR_AXES if mirror else ()
  return shapes | {field: shapes[field.removesuffix("_mirror")] for field in more}


AXES = {
  "mean": "mean_betc",
  "std": "std_betc",
  "clip": "clip_bvf",
  "sync": "sync_bsf",
  "text": "text_bwf",
  "spatial": "spatial_bvk",
}
# The same condition with left and right exchanged in the picture; only the mirror loss needs it.
MIRROR_AXES = {
  "clip_mirror": "clip_mirror_bvf",
  "sync_mirror": "sync_mirror_bsf",
  "spatial_mirror": "spatial_mirror_bvk",
}
_NAMES = AXES | MIRROR_AXES
# Records hold these in 16 bits, unless encoded otherwise; the other fields need all of 32.
NARROW = {
  "std_betc": "bfloat16",
  "clip_bvf": "bfloat16",
  "sync_bsf": "bfloat16",
  "text_bwf": "bfloat16",
  "clip_mirror_bvf": "bfloat16",
  "sync_mirror_bsf": "bfloat16",
  "audio_bep": "int16",
}
SHORT = ("bfloat16", "float16", "int16", "int8")  # Of what becomes float32 on the devices.
_FLOATS = ("float32", "bfloat16", "float16")
STORAGES = (*_FLOATS, microscaling.NAME)  # Of features; the last is int8 in records and batches.


def stored(x: np.ndarray, storage: str) -> np.ndarray:
  """Returns features as records hold them.

  Args:
    x: of any float type.
    storage: one of `STORAGES`.

  Raises:
    ValueError: MXINT8 is to hold NaN or infinite values.
  """
  return microscaling.pack(x) if storage == microscaling.NAME else x.astype(storage)


def as_float32(x: Any) -> Any:
  """Returns a stored array, of numpy or JAX, in float32; int16 sound becomes -1..1."""
  if x.dtype == np.int16:
    return x * np.float32(1 / 32768)
  if x.dtype == np.int8:
    return microscaling.unpack(x)
  return x if x.dtype == np.float32 else x.astype(np.float32)


def shape_of(x: Any) -> tuple[int, ...]:
  """Returns the shape that a stored array, or one so described, has in float32."""
  if x.dtype == "int8":
    return (*x.shape[:-1], microscaling.width(x.shape[-1]))
  return tuple(x.shape)


def widen(batch: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a batch as networks and losses take it: what has fewer bits becomes float32, exactly.

  Works on arrays of numpy and of JAX: half the bytes go to the device if it is called there.
  """
  return {name: as_float32(x) if x.dtype.name in SHORT else x for name, x in batch.items()}


def narrow(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns a batch of numpy in float32 rounded to the types that records hold (`NARROW`)."""

  def one(name, x):
    if NARROW.get(name) == "int16":
      x = np.clip(np.rint(x * 32768), -32768, 32767)
    return x.astype(NARROW.get(name, x.dtype))

  return {name: one(name, x) for name, x in batch.items()}


def check_batch(batch: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Raises ValueError naming the field if a batch breaks the contract.

  Args:
    batch: `id_b` (uint32), `weight_b` (float32, 0 marks padding) and the fields of `shapes`, in
      float32 or as stored.
    shapes: from `feature_shapes`.
  """
  wanted = {"id_b": (), "weight_b": ()} | {_NAMES[field]: shapes[field] for field in shapes}
  for name, shape in wanted.items():
    if name not in batch:
      raise ValueError(f"field {name} is missing, the batch has {sorted(batch)}")
    rows = len(batch["id_b"])
    if (found := shape_of(batch[name])) != (rows, *shape):
      raise ValueError(f"field {name} has shape {found}, expected {(rows, *shape)}")
  if np.dtype(batch["id_b"].dtype) != np.uint32:
    raise ValueError(f"field id_b has dtype {batch['id_b'].dtype}, expected uint32")
  for name in wanted.keys() - {"id_b"}:
    if (dtype := str(batch[name].dtype)) not in (*_FLOATS, "int8"):
      raise ValueError(f"field {name} has dtype {dtype}, expected {', '.join(_FLOATS)} or int8")


def synthetic_batch(
  shapes: Mapping[str, tuple[int, ...]], rows: int, *, seed: int
) -> dict[str, np.ndarray]:
  """Returns a batch of noise in float32, for tests, estimates and smoke runs."""
  rng = np.random.default_rng(seed)
  batch: dict[str, np.ndarray] = {
    _NAMES[field]: rng.standard_normal((rows, *shape), np.float32)
    for field, shape in shapes.items()
  }
  batch["std_betc"] = np.full_like(batch["std_betc"], 0.1)
  batch["id_b"] = rng.integers(0, 2**32, rows, dtype=np.uint32)
  batch["weight_b"] = np.ones(rows, np.float32)
  return batch
