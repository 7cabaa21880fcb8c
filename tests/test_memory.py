"""The memory table: upstream's parameter counts, and what a compiled function takes."""

import jax
import jax.numpy as jnp
import pytest

from spatialv2a_jax import cli, memory, sharding

COUNTS = {
  "CLIP ViT-H/14, image tower": 632_682_240,
  "Synchformer": 121_850_112,
  "CLIPSeg": 150_968_930,  # With positions for 22 x 22 patches instead of 14 x 14.
  "MMAudio small_16k": 157_283_644,
  "MMAudio small_44k": 157_409_144,
  "MMAudio medium_44k": 621_805_944,
  "MMAudio large_44k": 1_030_002_168,
  "MMAudio large_44k_v2": 1_030_575_608,
  "BigVGAN 16k": 112_199_473,
  "BigVGAN 44k": 122_152_752,
}


@pytest.mark.slow
def test_networks_have_upstreams_sizes():
  works = memory.works("float32")
  assert works.keys() > COUNTS.keys()
  for name, count in COUNTS.items():
    work = works[name]
    params = sharding.unboxed(jax.eval_shape(work.init, jax.random.key(0)))
    leaves = jax.tree.leaves(params[work.part] if work.part else params)
    assert sum(x.size for x in leaves) == count, name


def test_peak_is_arguments_results_and_temporaries():
  x, w = memory.shape(64, 128), memory.shape(128, 256)
  assert memory.peak_bytes(lambda x, w: x @ w, x, w) >= 4 * (64 * 128 + 128 * 256 + 64 * 256)
  wide = memory.peak_bytes(lambda x: jnp.sort(jnp.tile(x, (100, 1)), axis=0)[0], x)
  assert wide >= 4 * 100 * 64 * 128


def test_the_table_has_a_line_for_each_network(monkeypatch, capsys):
  def works(dtype):
    def init(key):
      return {"a": {"kernel": jax.random.normal(key, (256, 256)), "bias": jnp.zeros(256)}}

    def apply(params, x):
      return x @ params["a"]["kernel"].astype(dtype) + params["a"]["bias"][None]

    x = memory.shape(8, 256)
    return {
      "one": memory.Work("clip", init, apply, (x,)),
      "exact": memory.Work("vocoder", init, apply, (x,)),
    }

  monkeypatch.setattr(memory, "works", works)
  one, exact = memory.rows()
  assert one.count == exact.count == 256 * 257
  assert one.params == {"float32": 4 * 256 * 257, "bfloat16": 2 * 256 * 256 + 4 * 256}
  assert one.peak["float32"] >= one.params["float32"] + 2 * 4 * 8 * 256
  assert exact.params.keys() == {"float32"}  # Decoders stay exact.
  assert cli.main(["doctor", "--memory"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 4 and lines[2].startswith("| one | 65,792 | 0.00 / 0.00 GiB |")


@pytest.mark.slow
def test_a_full_size_network_is_compiled_without_its_weights():
  work = memory.works("bfloat16")["Synchformer"]
  params = jax.eval_shape(lambda key: sharding.unboxed(work.init(key)), jax.random.key(0))
  held = sum(x.nbytes for x in jax.live_arrays())
  assert memory.peak_bytes(work.function, params, *work.inputs) > 121_850_112 * 4
  assert sum(x.nbytes for x in jax.live_arrays()) - held < 1_000_000
