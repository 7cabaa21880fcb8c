r"""Two-ear flow model on 8 s clips at 44.1 kHz, twice as wide as `small_44k`.

4 joint blocks and 8 blocks per ear, so that both ears can start as MMAudio's medium_44k:
`spatialv2a convert mmaudio FILE --ears 2 --out DIR`, then `--config.init_from=DIR`
and `--config.loss.ear_correlation=1`: with noise of their own, the ears would not begin alike.

Run:      python -m launch.train --config configs/medium_44k.py --workdir runs/medium_44k \
            --config.data.path=SHARDS --config.vae=MODEL_FOLDER
Smoke:    python -m launch.train --config configs/medium_44k.py:smoke --workdir runs/smoke
Cost:     300,000 steps of 512 clips, 886.6 M parameters; the smoke variant less than a minute on
          a CPU, without data.
Expected: nobody has published this size with two ears; the smoke variant only shows that
          everything runs.
"""

import ml_collections

from configs import small_44k


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  """Returns the config of a variant: full or smoke."""
  c = small_44k.get_config(variant).unlock()
  c.update(model=dict(heads=14, width=112 if variant == "smoke" else 896))
  return c.lock()
