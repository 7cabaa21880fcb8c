"""CIPIC's folder of WAV files as PseudoBinaural ships it -> one SOFA file.

Axes: d direction, e ear (0 left, 1 right), t tap.

A file `[neg]AZaz{left,right}.wav` is stored transposed: 200 channels (taps) of 50 frames
(elevations). Angles are interaural-polar: AZ is measured from the median plane, + to the right; the
elevation turns about the axis of the ears, 0 front, 90 above, 180 behind.
"""

import pathlib
import re

import h5py
import numpy as np
import soundfile

RATE, TAPS = 44_100, 200
ELEVATIONS_DEG = -45 + 5.625 * np.arange(50)


def directions(lateral_deg):
  """Unit vectors (front, left, up) [50, 3] of a file's elevations."""
  lateral, turn = np.radians(lateral_deg), np.radians(ELEVATIONS_DEG)
  right = np.full(turn.shape, np.sin(lateral))
  return np.stack([np.cos(lateral) * np.cos(turn), -right, np.cos(lateral) * np.sin(turn)], axis=1)


def to_sofa(folder, path):
  """Writes the SimpleFreeFieldHRIR file and returns its path."""
  response_det, direction_d3 = [], []
  for left in sorted(pathlib.Path(folder).glob("*azleft.wav")):
    match = re.fullmatch(r"(neg)?(\d+)azleft\.wav", left.name)
    if not match:  # Resource forks of another system lie between them.
      continue
    pair = [soundfile.read(p)[0] for p in (left, left.with_name(f"{left.stem[:-4]}right.wav"))]
    response_det.append(np.stack(pair, axis=1))
    direction_d3.append(directions(float(match[2]) * (-1 if match[1] else 1)))
  x, y, z = np.concatenate(direction_d3).T
  position_d3 = np.stack(
    [np.degrees(np.arctan2(y, x)), np.degrees(np.arcsin(np.clip(z, -1, 1))), np.ones_like(x)], 1
  )
  with h5py.File(path, "w") as file:
    file.attrs["Conventions"] = "SOFA"
    file.attrs["SOFAConventions"] = "SimpleFreeFieldHRIR"
    file["Data.IR"] = np.concatenate(response_det)
    file["Data.SamplingRate"] = [float(RATE)]
    file["SourcePosition"] = position_d3
    file["SourcePosition"].attrs["Type"] = "spherical"
  return path


def write_like(folder, head):
  """Writes a folder in CIPIC's layout with the responses of `head`, at 44.1 kHz."""
  folder.mkdir()
  for lateral in (-80, -65, -45, -30, -15, 0, 15, 30, 45, 65, 80):
    x, y, z = directions(lateral).T
    azimuth, elevation = np.degrees(np.arctan2(y, x)), np.degrees(np.arcsin(np.clip(z, -1, 1)))
    pairs = zip(azimuth, elevation, strict=True)
    start = head.lead - 40
    heard = np.stack([head.ir(a, e)[:, start : start + TAPS] for a, e in pairs])  # [50, 2, t].
    name = f"{'neg' if lateral < 0 else ''}{abs(lateral)}az"
    for ear, side in enumerate(("left", "right")):
      soundfile.write(folder / f"{name}{side}.wav", heard[:, ear] / 4, RATE, "PCM_16")
  return folder
