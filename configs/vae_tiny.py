r"""Tiny mel VAE on the sound of both ears at 16 kHz: the codec of the embedded default.

Run:      python -m launch.train --config configs/vae_tiny.py --workdir runs/vae_tiny \
            --config.data.path=SHARDS
Smoke:    python -m launch.train --config configs/vae_tiny.py:smoke --workdir runs/vae_smoke
Cost:     2,000 steps of 8 excerpts, about a minute on 2 CPU cores; the smoke variant less, without
          any data.
Expected: `ild_db`, the error of the level difference between the ears, at about 1 dB.
"""

import ml_collections


def get_config(variant: str = "demo") -> ml_collections.ConfigDict:
  """Returns the config of a variant: demo, quick (a check of the path) or smoke (no data)."""
  c = ml_collections.ConfigDict()
  c.kind = "vae"
  c.seed = 0
  c.steps = 2_000
  c.audio = "16k"
  c.seconds = 4.0

  # Passed as they are to `vae.Config` and `codec.LossConfig`.
  c.model = dict(width=32)
  c.loss = dict(square=1.0, beta=1e-4, slope=0.5, interaural=0.5, level=0.5, excerpt=32)

  c.data = dict(
    path="",
    eval="",
    eval_batches=4,
    batch_size=8,
    mirror=False,
    workers=0,
    cache_gb=0.0,
    statistics=16,
  )
  c.init_from = ""

  c.optim = dict(
    lr=1e-2,
    warmup=50,
    decay="cosine",
    steps=c.get_oneway_ref("steps"),
    final=0.05,
    betas=(0.9, 0.95),
    weight_decay=0.0,
    clip=1.0,
    freeze=(("frozen/.*", True), (".*", False)),
  )
  c.ema = dict(decay=0.99, sigma_rel=0.0, beside=())
  c.accumulate = 1

  # `-1` takes what is left; `rules` are fields of `sharding.Rules`: the mesh axes that
  # split each kind of axis ("": none, "data+fsdp": both).
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.rules = dict(
    act_batch="data+fsdp", act_time="", act_width="", ear="", layers="", width="fsdp",
    heads="tensor", head_dim="", ffn="tensor", mod="", latent="", vocab="", zero="",
  )  # fmt: skip
  c.every = dict(log=100, eval=0, checkpoint=1_000, keep=0, average=0, profile=(0, 0))

  # Updates that are not finite are left out; more than `cap` of them stop the run. Few clips a step
  # make noisy losses: `sigma` 0 lets spikes pass.
  c.guard = dict(sigma=0.0, window=128, warmup=64, cap=10)
  c.deterministic = False  # True: two runs on GPUs are equal bit for bit, at some cost in speed.
  # Seconds after which what does not move ends with exit code 43; 0: never.
  c.limits = dict(
    init=3600.0, data=1800.0, step=1800.0, compile=7200.0, eval=7200.0, save=3600.0, restore=3600.0
  )

  if variant == "smoke":
    c.steps = 4
    c.seconds = 0.64
    c.model.update(width=8)
    c.data.update(path="synthetic", eval="synthetic", eval_batches=1, statistics=1)
    c.optim.update(warmup=1)
    c.every.update(log=1, checkpoint=2)
  elif variant == "quick":
    c.steps = 30
    c.model.update(width=16)
    c.data.update(statistics=1)
    c.optim.update(warmup=5)
    c.every.update(log=10, checkpoint=30)
  elif variant != "demo":
    raise ValueError(f"unknown variant {variant!r}, have: demo, quick, smoke")
  return c.lock()
