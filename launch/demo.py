"""From nothing to scored binaural sound: `make demo`, or `python -m launch.demo --out DIR`.

Every stage is a command of this project, printed before it runs, and can be run again by hand. A
stage whose results are there does nothing, so a second run, or one after an interruption, goes on.

Axes: e ear (0 left, 1 right), p audio sample, w window.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from spatialv2a_jax import generator, io, logbook, model_folder, windows
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import alignment, analysis, evaluate

SECONDS = 4.0
TRAIN_SEED, HELDOUT_SEED = 1, 2  # Of the scenes: nothing held out was ever trained on.


class Stages:
  """Runs commands, prints them, and keeps the time each took."""

  def __init__(self):
    self.began = time.monotonic()
    self.took: list[tuple[str, float]] = []
    # Halves the time XLA:CPU compiles; these small programs do not run slower for it. Large pages
    # take a tenth off a training step, where the C library is glibc.
    defaults = {
      "XLA_FLAGS": "--xla_backend_optimization_level=1",
      "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    self.env = defaults | dict(os.environ)

  def run(self, name: str, *command: object) -> None:
    """Runs one command of this project; raises UserError if it fails."""
    words = [str(word) for word in command]
    print(f"\n[{time.monotonic() - self.began:4.0f} s] {name}\n  $ {' '.join(words)}", flush=True)
    start = time.monotonic()
    module, *rest = words
    code = subprocess.run([sys.executable, "-m", module, *rest], env=self.env).returncode
    self.took.append((name, time.monotonic() - start))
    if code:
      raise UserError(f"the stage {name!r} ended with exit code {code}", code)

  def __str__(self) -> str:
    rows = [*self.took, ("all", time.monotonic() - self.began)]
    return "\n".join(f"  {seconds:6.0f} s  {name}" for name, seconds in rows)


def make_ceiling(model_dir: pathlib.Path, media: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the true sound of every clip after its way through VAE and waveform reconstruction.

  The delay between the ears is taken from the picture, as for a generated clip.
  """
  out.mkdir(parents=True, exist_ok=True)
  paths = [path for path in io.list_media(media) if not (out / f"{path.stem}.wav").is_file()]
  if not paths:
    return
  model = generator.Generator(model_dir)
  rate = model.audio.sample_rate
  settings = generator.Settings()
  with logbook.Progress(len(paths), "true sound through the codec", "clip") as progress:
    for path in paths:
      seconds = io.probe(path).duration_s
      clip_windows = model.windows(path, seconds, settings)
      audio_ep = io.read_audio(path.with_suffix(".wav"), rate)
      firsts = [window.first for window in clip_windows]
      z_etc = windows.cross_fade(firsts, [model.encode(audio_ep, first) for first in firsts])
      clip = model.clip(clip_windows, z_etc, seconds, settings.phase)
      io.write_audio(out / f"{path.stem}.wav", clip.audio_ep, rate)
      progress.advance()


def mirror_agreement(generated: pathlib.Path, mirrored: pathlib.Path) -> dict[str, float | None]:
  """Returns Pearson's r between the level differences of clips and of their mirror images.

  It is None where it is undefined, as of clips in which nothing is loud enough.
  """
  plain, flipped = [], []
  for path in sorted(generated.glob("*.wav")):
    other = mirrored / f"{path.stem}_m.wav"
    heard = [
      alignment.listen(analysis.analyse(io.read_audio(p, analysis.RATE))) for p in (path, other)
    ]
    both_w = heard[0].active_w & heard[1].active_w
    plain.append(heard[0].ild_db_w[both_w])
    flipped.append(heard[1].ild_db_w[both_w])
  pair = np.stack([np.concatenate(plain), np.concatenate(flipped)])
  defined = pair.shape[1] > 2 and (np.ptp(pair, axis=1) > 0).all()
  r = float(np.corrcoef(pair)[0, 1]) if defined else None
  return {"ild_pearson_r": r, "windows": pair.shape[1]}


def claim(out: pathlib.Path, sizes: Mapping[str, object]) -> None:
  """Notes in a folder how large the demo in it is; UserError if it holds one of another size."""
  note = out / "demo.json"
  if not note.exists() and not (out / "checkpoint").exists():
    with io.atomic_path(note) as temporary:
      pathlib.Path(temporary).write_text(json.dumps(sizes))
  if not note.exists() or json.loads(note.read_text()) != sizes:
    raise UserError(f"{out} holds a demo of another size; delete it or choose another --out")


def run(out: pathlib.Path, *, train: int, heldout: int, variant: str) -> None:
  """Runs all stages.

  Args:
    out: folder of everything that is made.
    train: scenes to train on.
    heldout: scenes to generate and score.
    variant: of the configs.
  """
  claim(out, {"train": train, "heldout": heldout, "variant": variant})
  stages = Stages()
  at = {name: out / "scenes" / name for name in ("train", "heldout", "mirrored")}
  shards, runs, model = out / "shards", out / "runs", out / "checkpoint"
  suffix = f":{variant}" if variant else ""
  config, vae_config = f"configs/tiny.py{suffix}", f"configs/vae_tiny.py{suffix}"

  if not model.is_dir():
    for name, seed, count, extra in (
      ("train", TRAIN_SEED, train, ()),
      ("heldout", HELDOUT_SEED, heldout, ()),
      ("mirrored", HELDOUT_SEED, heldout, ("--mirror",)),
    ):
      arguments = ("--clips", count, "--seconds", SECONDS, "--seed", seed, *extra)
      stages.run(f"scenes: {name}", "launch.data", "scenes", "--out", at[name], *arguments)
    encode = ("launch.data", "encode", "--config", config, "--media")
    train_shards = (*encode, at["train"], "--out", shards / "train", "--mirror")
    stages.run("features and sound to shards", *train_shards)
    stages.run(
      "train the VAE", "launch.train", "--config", vae_config, "--workdir", runs / "vae",
      f"--config.data.path={shards / 'train' / 'clips'}",
    )  # fmt: skip
    vae = runs / "vae" / "model"
    stages.run("latents to shards", *train_shards, "--vae", vae)
    stages.run(
      "held-out clips to shards", *encode, at["heldout"], "--out", shards / "heldout", "--vae", vae
    )
    stages.run(
      "train the flow network", "launch.train", "--config", config, "--workdir", runs / "flow",
      f"--config.data.path={shards / 'train' / 'latents'}",
      f"--config.data.eval={shards / 'heldout' / 'latents'}", f"--config.vae={vae}",
    )  # fmt: skip
    publish(runs / "flow" / "model", model)

  command = ("spatialv2a_jax.cli", "generate")
  generated, mirrored, ceiling = out / "generated", out / "mirrored", out / "ceiling"
  options = ("--checkpoint", model, "--out")
  stages.run("generate held-out scenes", *command, at["heldout"], *options, generated)
  stages.run(
    "generate their mirror images", *command, at["mirrored"], *options, mirrored, "--no-video"
  )
  make_ceiling(model, at["heldout"], ceiling)
  print(f"\n[{time.monotonic() - stages.began:4.0f} s] scores", flush=True)
  scores = out / "scores.json"
  result = evaluate.run(
    generated, at["heldout"], at["heldout"], scores, baselines={"ceiling": ceiling}, jobs=2
  )
  result["mirror"] = mirror_agreement(generated, mirrored)
  print(f"level difference against that of the mirrored video: {result['mirror']}")
  with io.atomic_path(scores) as temporary:
    pathlib.Path(temporary).write_text(json.dumps(result, indent=1, allow_nan=False))
  stages.run(
    "report", "spatialv2a_jax.cli", "report", out, "--out", out / "report.html",
    "--ref", at["heldout"], "--truth", at["heldout"],
  )  # fmt: skip
  print(f"\n{stages}\n\nopen {out / 'report.html'} and listen with headphones")


def publish(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a model folder, which is there completely or not at all."""
  model_folder.load_model(source)
  temporary = target.with_name(f".{target.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  shutil.copytree(source, temporary)
  temporary.rename(target)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m launch.demo", description="From nothing to scored sound.", allow_abbrev=False
  )
  parser.add_argument(
    "--out", type=pathlib.Path, metavar="DIR", help="default: demo_out, with --smoke demo_out/smoke"
  )
  parser.add_argument(
    "--smoke", action="store_true", help="a few scenes and steps: checks the path, not the sound"
  )
  args = parser.parse_args(argv)
  sizes = (
    {"train": 16, "heldout": 3, "variant": "quick"}
    if args.smoke
    else {"train": 640, "heldout": 64, "variant": ""}
  )
  try:
    run(args.out or pathlib.Path("demo_out", *["smoke"] * args.smoke), **sizes)
  except UserError as error:
    print(f"launch.demo: {error}", file=sys.stderr)
    return error.exit_code
  except KeyboardInterrupt:
    print("launch.demo: interrupted; run it again to go on", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
