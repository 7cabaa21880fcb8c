r"""Two-ear flow model on 8 s clips at 16 kHz, as in the paper (arXiv 2601.15017).

6 joint blocks and 12 blocks per ear at MMAudio-S's width; the paper is silent on width, learning
rate and batch, which are MMAudio's (github.com/hkchengrex/MMAudio).

Run:      python -m launch.train --config configs/small_16k.py --workdir runs/small_16k \
            --config.data.path=SHARDS --config.vae=MODEL_FOLDER
Mono:     the variant `mmaudio` has MMAudio-S's 4 joint and 8 further blocks, so that both ears
          start as that network: `spatialv2a convert mmaudio FILE --ears 2 --out DIR`, then
          --config configs/small_16k.py:mmaudio --config.init_from=DIR
Smoke:    python -m launch.train --config configs/small_16k.py:smoke --workdir runs/smoke
Cost:     300,000 steps of 512 clips, 321.9 M parameters (mmaudio: 223.5 M parameters); the smoke
          variant less than a minute on a CPU, without data.
Expected: the paper reports IACC, ILD and ITD of its samples near those of its training set
          (0.93, 3.08, 1.70); the smoke variant only shows that everything runs.
"""

import ml_collections


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
  """Returns the config of a variant: paper, mmaudio or smoke."""
  c = ml_collections.ConfigDict()
  c.kind = "flow"
  c.seed = 14_159_265
  c.steps = 300_000
  c.audio = "16k"
  c.seconds = 8.0

  # Passed as they are to `flow_net.Config`, `features.Config` and `flow.LossConfig`.
  c.model = dict(
    width=448, heads=7, joint_depth=6, ear_depth=12, remat="convolutions",
    dtype="bfloat16", activations="bfloat16", gemm=False, attention="auto",
  )  # fmt: skip
  c.features = dict(
    encoder="mmaudio",
    seed=0,
    clip_dim=1024,
    sync_dim=768,
    text_dim=1024,
    text_len=77,
    localizer="acl",
    mirror_tta=False,  # True doubles the cost of `acl`, and mirrored video is mirrored exactly.
  )
  c.loss = dict(
    drop_video=0.1,
    drop_text=0.1,
    drop_spatial=0.1,
    ear_correlation=0.0,
    difference_weight=0.0,
    mirror_weight=0.0,
  )

  # Global numbers, whatever the number of hosts and devices.
  c.data = dict(
    path="",
    eval="",
    eval_batches=8,
    batch_size=512,
    mirror=False,
    workers=0,
    cache_gb=0.0,  # GiB of a process for clips that were read once: VGGSound takes 60 in mxint8.
    statistics=8,
  )
  c.vae = ""  # Model folder of the codec: decodes what is generated, and joins the exported model.
  c.init_from = ""  # Model folder to start from, such as converted MMAudio weights.
  c.listen = dict(clips=4, steps=25, guidance=4.5)

  c.optim = dict(
    lr=1e-4,
    warmup=1_000,
    decay="step",
    milestones=(240_000, 270_000),  # Counted after the warm-up: steps 241,000 and 271,000.
    gamma=0.1,
    steps=c.get_oneway_ref("steps"),  # Of "cosine", which needs no milestones,
    final=0.0,  # and the share of the rate at which it ends.
    betas=(0.9, 0.95),
    eps=1e-6,  # MMAudio's in bfloat16; float32 would allow 1e-8.
    weight_decay=1e-6,
    clip=1.0,
    # Tables over parameter names ("ears/audio/qkv/kernel"); the first regex that fits decides.
    freeze=(("frozen/.*", True), (".*", False)),
    lr_scale=((".*", 1.0),),
    decay_scale=((".*", 1.0),),
  )
  # Any other width than these two: `spatialv2a average`. 0 is the plain average, of `decay`, in
  # place of one or beside them, such as `beside=(0.1, 0.0)`.
  c.ema = dict(decay=0.9999, sigma_rel=0.05, beside=(0.1,))
  c.accumulate = 1

  # `-1` takes what is left; `rules` are fields of `sharding.Rules`: the mesh axes that
  # split each kind of axis ("": none, "data+fsdp": both).
  # `zero`: optimiser and averages split over these mesh axes (ZeRO-1).
  # 7 heads split over 1 or 7 devices only: prefer `fsdp`.
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.rules = dict(
    act_batch="data+fsdp", act_time="", act_width="", ear="", layers="", width="fsdp",
    heads="tensor", head_dim="", ffn="tensor", mod="", latent="", vocab="", zero="data",
  )  # fmt: skip
  c.every = dict(log=50, eval=5_000, checkpoint=1_000, keep=50_000, average=5_000, profile=(0, 0))

  # Updates that are not finite, or spike, are left out; more than `cap` of them stop the run.
  c.guard = dict(sigma=6.0, window=128, warmup=64, cap=10)
  c.deterministic = False  # True: two runs on GPUs are equal bit for bit, at some cost in speed.
  # Seconds after which what does not move ends with exit code 43; 0: never.
  c.limits = dict(
    init=3600.0, data=1800.0, step=1800.0, compile=7200.0, eval=7200.0, save=3600.0, restore=3600.0
  )

  if variant == "smoke":
    c.steps = 4
    c.seconds = 0.64
    c.model.update(width=56, joint_depth=2, ear_depth=2, remat="")
    c.model.update(dtype="float32", activations="float32")
    c.features.update(
      encoder="random", clip_dim=16, sync_dim=16, text_dim=16, text_len=4, localizer="motion"
    )
    c.data.update(path="synthetic", eval="synthetic", eval_batches=1, batch_size=8, statistics=1)
    c.optim.update(warmup=1, milestones=(2, 3))
    c.every.update(log=1, eval=0, checkpoint=2, keep=0, average=2)
  elif variant == "mmaudio":
    c.model.update(joint_depth=4, ear_depth=8)
    c.loss.update(ear_correlation=1.0)  # Ears with noise of their own would not be dual mono.
  elif variant != "paper":
    raise ValueError(f"unknown variant {variant!r}, have: paper, mmaudio, smoke")
  return c.lock()
