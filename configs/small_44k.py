r"""Two-ear flow model on 8 s clips at 44.1 kHz: the recipe of `small_16k` at MMAudio-S's depth.

4 joint blocks and 8 blocks per ear, so that both ears can start as MMAudio's small_44k:
`spatialv2a convert mmaudio FILE --ears 2 --out DIR`, then `--config.init_from=DIR`
and `--config.loss.ear_correlation=1`: with noise of their own, the ears would not begin alike.

Run:      python -m launch.train --config configs/small_44k.py --workdir runs/small_44k \
            --config.data.path=SHARDS --config.vae=MODEL_FOLDER
Smoke:    python -m launch.train --config configs/small_44k.py:smoke --workdir runs/smoke
Cost:     300,000 steps of 512 clips, 223.7 M parameters; the smoke variant less than a minute on
          a CPU, without data.
Expected: nobody has published this size with two ears; the smoke variant only shows that
          everything runs.
"""

import ml_collections

from configs import small_16k


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  """Returns the config of a variant: full or smoke."""
  if variant not in ("full", "smoke"):
    raise ValueError(f"unknown variant {variant!r}, have: full, smoke")
  c = small_16k.get_config("paper" if variant == "full" else variant).unlock()
  joint, ear = (1, 1) if variant == "smoke" else (4, 8)
  c.update(audio="44k", model=dict(joint_depth=joint, ear_depth=ear))
  return c.lock()
