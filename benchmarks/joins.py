"""What is left of a window's latents where two windows of a long clip meet, by way of joining.

Run: python -m benchmarks.joins --checkpoint MODEL_FOLDER VIDEO VIDEO...
Videos are joined two by two and cut to 1.38 windows, which takes two windows. In what these share,
the standard deviation of the joined latents and of their change from frame to frame is given
relative to those of the windows themselves: less is duller, and less eventful, sound. The numbers
are in RESULTS.md.

Axes: e ear (0 left, 1 right), t latent frame, c latent channel.
"""

import argparse
import pathlib

import jax
import numpy as np

from spatialv2a_jax import io, schema, windows
from spatialv2a_jax.generator import OVERLAP_SECONDS, Generator, Settings
from spatialv2a_jax.sampler import clip_key

LENGTH = 1.38  # Of a clip, in windows.
WAYS = ("apart, faded over all", "apart, faded over 1 s", "together, faded over 1 s")


def film(model: Generator, paths: list[pathlib.Path]) -> io.Frames:
  """Returns the frames of several videos, one after the other, of two windows."""
  frames = np.concatenate([io.read_video(path, schema.SYNC_FPS, (48, 80)) for path in paths])
  return io.Frames(frames[: round(LENGTH * model.seconds * schema.SYNC_FPS)], schema.SYNC_FPS)


def spread(z_etc: np.ndarray) -> np.ndarray:
  """Returns the variance over time of latents, and that of their change from frame to frame."""
  return np.array([z_etc.var(axis=1).mean(), np.square(np.diff(z_etc, axis=1)).mean()])


def compare(model: Generator, source: io.Frames, settings: Settings) -> dict[str, np.ndarray]:
  """Returns both numbers in all that is shared, then in its middle second, of each way."""
  pieces = model.windows(source, source.seconds, settings, source.sha256)
  firsts, key = [piece.first for piece in pieces], clip_key(settings.seed, source.sha256)
  apart = list(model.sample(pieces, [key] * 2, settings, 2))
  fade = round(OVERLAP_SECONDS * model.audio.latent_rate)
  joined = (
    windows.cross_fade(firsts, apart),
    windows.cross_fade(firsts, apart, fade),
    model.latents(pieces, key, settings),
  )
  begin, count = firsts[1], model.frames - firsts[1]
  middle = slice((count - fade) // 2, (count + fade) // 2)
  found = {}
  for way, z_etc in zip(WAYS, joined, strict=True):
    shared = z_etc[:, begin : begin + count], apart[0][:, begin:], apart[1][:, :count]
    numbers = []
    for part in (slice(None), middle):
      own, first, second = (spread(x[:, part]) for x in shared)
      numbers.append(np.sqrt(own / ((first + second) / 2)))
    found[way] = np.concatenate(numbers)
  return found


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description="Joins of windows of long clips.")
  parser.add_argument("--checkpoint", required=True, metavar="DIR")
  parser.add_argument("videos", nargs="+", metavar="VIDEO")
  args = parser.parse_args()
  model, paths = Generator(args.checkpoint), list(map(pathlib.Path, args.videos))
  pairs = [paths[i : i + 2] for i in range(0, len(paths) - 1, 2)]
  rows = [compare(model, film(model, pair), Settings()) for pair in pairs]
  print(f"{len(rows)} clips on {jax.devices()[0].device_kind}\n")
  print("| windows are sampled | std, all shared | change | std, middle second | change |")
  print("|---|---|---|---|---|")
  for way in WAYS:
    values = np.stack([row[way] for row in rows])
    error = values.std(axis=0) / len(rows) ** 0.5
    cells = (f"{m:.3f} ± {e:.3f}" for m, e in zip(values.mean(axis=0), error, strict=True))
    print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
  main()
