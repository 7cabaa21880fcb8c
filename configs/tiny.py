r"""Tiny two-ear flow model on 4 s procedural scenes at 16 kHz: the embedded default.

Run:      python -m launch.train --config configs/tiny.py --workdir runs/tiny \
            --config.data.path=SHARDS --config.vae=runs/vae_tiny/model
Smoke:    python -m launch.train --config configs/tiny.py:smoke --workdir runs/smoke
Cost:     1,000 steps of 16 clips, about 4 minutes on 2 CPU cores; the smoke variant less than one,
          without any data.
Expected: on held-out scenes the louder ear is on the side of the source in over 90 % of windows.
"""

import ml_collections


def get_config(variant: str = "demo") -> ml_collections.ConfigDict:
  """Returns the config of a variant: demo, quick (a check of the path) or smoke (no data)."""
  c = ml_collections.ConfigDict()
  c.kind = "flow"
  c.seed = 0
  c.steps = 1_000
  c.audio = "16k"
  c.seconds = 4.0

  # Passed as they are to `flow_net.Config`, `features.Config` and `flow.LossConfig`.
  c.model = dict(width=64, heads=2, joint_depth=2, ear_depth=2, ffn=128, remat="", dtype="float32")
  c.features = dict(
    encoder="random",
    seed=0,
    clip_dim=64,
    sync_dim=64,
    text_dim=32,
    text_len=8,
    localizer="motion",
  )
  c.loss = dict(
    drop_video=0.1,
    drop_text=0.5,  # Clips are generated from the picture alone more often than not.
    drop_spatial=0.1,
    ear_correlation=1.0,
    difference_weight=10.0,
    mirror_weight=0.0,
  )

  # Global numbers, whatever the number of hosts and devices.
  c.data = dict(
    path="",
    eval="",
    eval_batches=4,
    batch_size=16,
    mirror=True,
    workers=0,
    cache_gb=0.0,
    statistics=16,
  )
  c.vae = ""  # Model folder of the codec: decodes what is generated, and joins the exported model.
  c.init_from = ""  # Model folder to start from.
  c.listen = dict(clips=2, steps=25, guidance=2.0)

  c.optim = dict(
    lr=1e-3,
    warmup=100,
    decay="cosine",
    steps=c.get_oneway_ref("steps"),
    final=0.05,
    betas=(0.9, 0.95),
    weight_decay=1e-6,
    clip=1.0,
    freeze=(("frozen/.*", True), (".*", False)),
  )
  c.ema = dict(decay=0.995, sigma_rel=0.0, beside=())
  c.accumulate = 1

  # `-1` takes what is left; `rules` are fields of `sharding.Rules`: the mesh axes that
  # split each kind of axis ("": none, "data+fsdp": both).
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.rules = dict(
    act_batch="data+fsdp", act_time="", act_width="", ear="", layers="", width="fsdp",
    heads="tensor", head_dim="", ffn="tensor", mod="", latent="", vocab="", zero="",
  )  # fmt: skip
  c.every = dict(log=25, eval=0, checkpoint=500, keep=0, average=0, profile=(0, 0))

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
    c.model.update(width=32, joint_depth=1, ear_depth=1)
    c.data.update(path="synthetic", eval="synthetic", eval_batches=1, batch_size=8, statistics=1)
    c.optim.update(warmup=1)
    c.every.update(log=1, checkpoint=2)
  elif variant == "quick":
    c.steps = 20
    c.model.update(width=32, joint_depth=1, ear_depth=1, ffn=64)
    c.data.update(batch_size=8, statistics=1)
    c.optim.update(warmup=5)
    c.every.update(log=5, checkpoint=10)
  elif variant != "demo":
    raise ValueError(f"unknown variant {variant!r}, have: demo, quick, smoke")
  return c.lock()
