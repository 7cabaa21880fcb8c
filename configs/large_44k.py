r"""Two-ear flow model on 8 s clips at 44.1 kHz, as wide as `medium_44k` and nearly twice as deep.

7 joint blocks and 14 blocks per ear, so that both ears can start as MMAudio's large_44k (variant
`full`) or large_44k_v2 (variant `v2`, whose activations and time embedding differ):
`spatialv2a convert mmaudio FILE --ears 2 --out DIR`, then `--config.init_from=DIR`
and `--config.loss.ear_correlation=1`: with noise of their own, the ears would not begin alike.

Run:      python -m launch.train --config configs/large_44k.py --workdir runs/large_44k \
            --config.data.path=SHARDS --config.vae=MODEL_FOLDER
Smoke:    python -m launch.train --config configs/large_44k.py:smoke --workdir runs/smoke
Cost:     300,000 steps of 512 clips, 1,476.6 M parameters (v2: 1,477.1 M parameters); the smoke
          variant less than a minute on a CPU, without data.
Expected: nobody has published this size with two ears; the smoke variant only shows that
          everything runs.
"""

import ml_collections

from configs import medium_44k


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  """Returns the config of a variant: full, v2 or smoke."""
  if variant not in ("full", "v2", "smoke"):
    raise ValueError(f"unknown variant {variant!r}, have: full, v2, smoke")
  c = medium_44k.get_config("smoke" if variant == "smoke" else "full").unlock()
  c.update(model=dict(v2=variant != "full"))  # Of the two, the smoke variant runs the newer.
  if variant != "smoke":
    c.update(model=dict(joint_depth=7, ear_depth=14))
  return c.lock()
