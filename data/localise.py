"""Where the picture of a clip says that it sounds: by its motion, by a track, or by a network.

Axes: v frame at 8 fps, n frame at 25 fps, y image row, x image column, k descriptor, c colour.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from spatialv2a_jax import io, localizers, schema
from spatialv2a_jax.errors import MissingAssetError, UserError

NETWORKS = ("clipseg", "acl")  # The second holds the shift that ACL has learned, and may be absent.

Seen = dict[str, list[float]]


class Locator(Protocol):
  """Looks at clips.

  Attributes:
    identity: plain values that determine what it finds, "localizer" among them.
    prompted: whether the caption matters.
  """

  identity: Mapping[str, Any]
  prompted: bool

  def load(self) -> None:
    """Loads what all clips share, unless it is there."""
    ...

  def read(self, path: str, seconds: float) -> Any:
    """Decodes what `look` wants of a video; may be called in threads.

    The video has `seconds` or a little less: its last frame is then held.

    Raises:
      UserError: a damaged file.
    """
    ...

  def look(self, frames: Any, seconds: float, caption: str) -> Seen:
    """Returns where one clip sounds.

    Returns:
      "azimuth_deg", a number per frame at 8 fps, left positive, to 0.01 degrees, and "located", 1
      where something was found; azimuth is 0 elsewhere.
    """
    ...


class Plain:
  """`motion` and `track:FILE`, which take no weights and no JAX."""

  prompted: bool = False

  def __init__(self, name: str):
    """Reads the track, if there is one.

    Raises:
      UserError: no such localizer or file.
    """
    self._name = name
    self._track = localizers.track_of(name)
    self.identity: Mapping[str, Any] = {"localizer": name}
    if self._track:  # Where the file lies makes no difference, what it says does.
      path = name.partition(":")[2]
      self.identity = {"localizer": "track", "track": io.file_hash(path)}

  def load(self) -> None:
    """Nothing is left to load."""

  def read(self, path: str, seconds: float) -> np.ndarray:
    """Returns frames [n, y, x, c] at 25 fps, small."""
    return _frames(path, io.View(schema.SYNC_FPS, localizers.FRAME_SIZE, quick=True), seconds)

  def look(self, frames: np.ndarray, seconds: float, caption: str = "") -> Seen:
    """Returns where one clip sounds; whatever is said about it."""
    del caption
    count = schema.whole_frames(seconds, schema.CLIP_FPS)
    if self._track:
      heat_vyx = self._track.heat(count)
    else:
      motion_nyx = localizers.residual_motion(frames.astype(np.float32) / 255)
      heat_vyx = localizers.motion_heat(motion_nyx, count)
    first_v, end_v, seen_v = localizers.box(heat_vyx)
    return _seen((first_v + end_v) / heat_vyx.shape[2] - 1, seen_v)


class Acl:
  """CLIPSeg under ACL's calibration, prompted with each clip's caption, as `generate` does it."""

  prompted: bool = True

  def __init__(self, parts: str):
    """Checks that the weights are there; `load` puts them on the devices.

    Args:
      parts: model folder with CLIPSeg and, for the shift that it has learned, ACL.

    Raises:
      MissingAssetError: no such folder, or no CLIPSeg in it.
    """
    if not parts:
      raise MissingAssetError(
        "--localizer acl takes trained networks: give --parts DIR, a model folder that "
        "`spatialv2a convert clipseg` and `spatialv2a convert acl` have filled"
      )
    from spatialv2a_jax import model_folder, weights  # JAX, which other localizers do without.

    self._model = model_folder.open_model(pathlib.Path(parts))
    if NETWORKS[0] not in self._model.params:
      raise weights.missing(NETWORKS[0], parts)
    have = [name for name in NETWORKS if name in self._model.params]
    digests = {name: self._model.sha256[name] for name in have}
    self.identity: Mapping[str, Any] = {"localizer": "acl", "localizer_weights": digests}
    self._encoders: Any = None

  def load(self) -> None:
    """Builds the networks on all devices of this process, unless they are there.

    Raises:
      UserError: weights of other sizes, or devices that another process holds.
    """
    if self._encoders is not None:
      return
    import jax

    from spatialv2a_jax import encoders, features, weights

    try:
      devices = jax.local_devices()
    except RuntimeError as error:
      text = " ".join(str(error).split())[:200]
      raise UserError(f"--localizer acl: JAX finds no device ({text}); try --jobs 1") from None
    self._encoders = encoders.Encoders(
      features.Config(encoder="random", localizer="acl"),
      weights.Weights([self._model]),
      devices=devices,
    )

  def read(self, path: str, seconds: float) -> np.ndarray:
    """Returns frames [v, y, x, c] at 8 fps as CLIPSeg sees them."""
    self.load()
    (view,) = self._encoders.stages()[-1].views.values()
    return _frames(path, view, seconds)

  def look(self, frames: np.ndarray, seconds: float, caption: str) -> Seen:
    """Returns where one clip sounds; without a caption, what the whole picture is about."""
    self.load()
    stage = self._encoders.stages(caption)[-1]
    (name,) = stage.views
    spatial_vk = stage.encode({name: frames}, seconds, 0.0)["spatial_vk"].astype(np.float64)
    return _seen(spatial_vk[:, 0], spatial_vk[:, 1] > 0)  # S_h, and whether S_area is nothing.


def load(name: str, parts: str = "") -> Locator:
  """Returns the locator of a name.

  Args:
    name: "motion", "track:FILE" or "acl".
    parts: model folder of the networks that "acl" takes.

  Raises:
    MissingAssetError: no weights.
    UserError: another name, or a bad file.
  """
  if name == "acl":
    return Acl(parts)
  if name.startswith("acl:"):
    raise UserError(f"--localizer {name}: the labels are the prompts of a build; give acl alone")
  return Plain(name)


def _frames(path: str, view: io.View, seconds: float) -> np.ndarray:
  frames = io.read_views(path, {"view": view}, duration=seconds, threads=1)["view"]
  wanted = schema.whole_frames(seconds, int(view.fps))
  held = np.repeat(frames[-1:], max(0, wanted - len(frames)), axis=0)
  return np.concatenate([frames, held])[:wanted]


def _seen(centre_v: np.ndarray, located_v: np.ndarray) -> Seen:
  azimuth_v = np.where(located_v, -0.5 * schema.HFOV_DEG * centre_v, 0.0)
  return {
    "azimuth_deg": (np.round(azimuth_v, 2) + 0.0).tolist(),
    "located": located_v.astype(int).tolist(),
  }
