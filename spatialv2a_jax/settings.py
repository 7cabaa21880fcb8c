"""What a user can choose of generated sound."""

import dataclasses

from spatialv2a_jax import io
from spatialv2a_jax import phase as phases


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a user can choose; every field goes into the sidecar.

  Attributes:
    prompt: what sounds; empty leaves it to the picture.
    negative: what should not sound.
    seed: of the noise, together with the file's content.
    steps: steps of the solver.
    method: solver, one of `flow.SOLVERS`.
    guidance: classifier-free guidance of all conditions; None is the checkpoint's own, or 2.
    spatial_guidance: that of the spatial condition; None follows `guidance`.
    localizer: replaces the checkpoint's: "motion", "track:FILE", "acl" or "acl:FILE".
    phase: "shared" keeps the interaural phase, "independent" reconstructs each ear by itself.
    duration: seconds to generate at most; None is all of the video.
    format: "wav" (float32) or "flac" (24 bit).
    video: whether to write the video with its new sound.
    video_sound: how that video stores it: "aac" (320 kb/s, plays everywhere), "flac" (lossless; in
      browsers) or "alac" (lossless; on Apple's devices).
    low_memory: one window and one network at a time, instead of several.
  """

  prompt: str = ""
  negative: str = ""
  seed: int = 0
  steps: int = 25
  method: str = "euler"
  guidance: float | None = None
  spatial_guidance: float | None = None
  localizer: str | None = None
  phase: phases.Phase = "shared"
  duration: float | None = None
  format: str = "wav"
  video: bool = True
  video_sound: io.SoundCodec = "aac"
  low_memory: bool = False
