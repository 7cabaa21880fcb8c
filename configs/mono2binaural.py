r"""Mono-to-binaural network on pairs mixed on the fly out of mono clips, as PseudoBinaural.

Sources:  python -m launch.data sources --media VIDEOS --out SOURCES --rows 96 --columns 160
Run:      python -m launch.train --config configs/mono2binaural.py --workdir runs/mono2binaural \
            --config.data.path=SOURCES
Full:     the variant `paper`, on pictures of 224 x 448 (`--rows 224 --columns 448`), begins with
          ImageNet's ResNet-18: spatialv2a convert resnet18 resnet18-f37072fd.pth --out RESNET,
          then --config.init_from=RESNET
Smoke:    python -m launch.train --config configs/mono2binaural.py:smoke --workdir runs/smoke
Apply:    spatialv2a spatialize VIDEO --checkpoint runs/mono2binaural/model --out DIR
Cost:     the variant `tiny` is 6,400 pairs; one CPU core does about 45 a second.
Expected: the louder ear of held-out scenes is on the side of the source
          in over 85 % of windows, at 0.6 of dual mono's distance of spectrograms.
"""

import ml_collections


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
  """Returns the config of a variant: tiny, smoke (no data) or paper (PseudoBinaural's sizes)."""
  c = ml_collections.ConfigDict()
  c.kind = "mono2binaural"
  c.seed = 0
  c.steps = 400
  c.audio = "16k"

  # Passed as they are to `mono2binaural.Config` and `binauralizer.LossConfig`.
  c.model = dict(
    width=8,
    planes=8,
    rows=96,
    columns=160,
    norm="batch",
    apnet=True,
    assoconv=False,
  )
  c.loss = dict(power=1)

  # `spatializer`: sphere, sofa:FILE, or the paper's way (paper, paper:sofa:FILE).
  c.data = dict(
    path="",
    eval="",
    eval_batches=4,
    batch_size=16,
    spatializer="sphere",
    mirror=False,
    workers=0,
  )
  c.init_from = ""  # Model folder to start from: PseudoBinaural's weights, or a ResNet-18.

  scale: tuple = ((".*", 1.0),)
  c.optim = dict(
    lr=2e-3,
    warmup=50,
    decay="cosine",
    steps=c.get_oneway_ref("steps"),
    final=0.05,
    betas=(0.9, 0.99),
    weight_decay=1e-4,
    clip=1.0,
    lr_scale=scale,
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
  c.every = dict(log=25, eval=0, checkpoint=500, keep=0, average=0, profile=(0, 0))

  # Updates that are not finite are left out; more than `cap` of them stop the run.
  c.guard = dict(sigma=0.0, window=128, warmup=64, cap=10)
  c.deterministic = False  # True: two runs on GPUs are equal bit for bit, at some cost in speed.
  # Seconds after which what does not move ends with exit code 43; 0: never.
  c.limits = dict(
    init=3600.0, data=1800.0, step=1800.0, compile=7200.0, eval=7200.0, save=3600.0, restore=3600.0
  )

  if variant == "smoke":
    c.steps = 6
    c.model.update(width=2, planes=2, rows=32, columns=64)
    c.data.update(path="synthetic", eval="synthetic", eval_batches=1, batch_size=8)
    c.optim.update(warmup=1)
    c.every.update(log=1, checkpoint=3)
  elif variant == "paper":
    scale = (("visual/.*", 0.05), ("audio/.*", 0.5), (".*", 1.0))
    # As PseudoBinaural's scripts, but for a decoupled weight decay and no steps in the rate.
    c.steps = 50_000
    c.model.update(width=64, planes=64, rows=224, columns=448, norm="instance")
    c.data.update(batch_size=192, spatializer="paper", workers=8)
    c.optim.update(
      lr=1e-3,
      betas=(0.9, 0.999),
      weight_decay=5e-4,
      lr_scale=scale,
    )
    c.ema.update(decay=0.999)
    c.every.update(log=50, checkpoint=1_000)
  elif variant != "tiny":
    raise ValueError(f"unknown variant {variant!r}, have: tiny, smoke, paper")
  return c.lock()
