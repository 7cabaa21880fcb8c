"""What each policy keeps of the blocks for the backward pass."""

import functools
import re

import jax
import jax.ad_checkpoint
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from spatialv2a_jax.models import remat as policies
from tests.models import test_flow_net as toy

ORDER = ("full", "convolutions", "products", "")  # From least to most memory.
LOOPS = [
  pytest.param({"joint_depth": 1, "ear_depth": 1, "unroll": True}, id="unrolled"),
  pytest.param(
    {"joint_depth": 2, "ear_depth": 2, "unroll": False}, id="scanned", marks=pytest.mark.slow
  ),
]


def loss_of(remat, options):
  net = toy.two_ears(remat=remat, **options)

  def loss(params, x_betc):
    return (toy.run(net, params, x_betc, toy.COND, toy.mask()) ** 2).mean()

  arguments = toy.two_ear_params(**options), toy.normal(4, toy.CLIPS, 2, toy.FRAMES, 4)
  return loss, arguments


@pytest.mark.parametrize("options", LOOPS)
def test_each_policy_keeps_more_than_the_one_before(options, capsys):
  kept = {}
  for remat in ORDER:
    loss, arguments = loss_of(remat, options)
    jax.ad_checkpoint.print_saved_residuals(loss, *arguments)
    lines = [x for x in capsys.readouterr().out.splitlines() if "from the argument" not in x]
    shapes = re.findall(r"^f32\[([\d,]*)\]", "\n".join(lines), re.MULTILINE)
    kept[remat] = sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)
  assert kept["full"] > 0  # What flows between blocks.
  sizes = list(kept.values())
  assert all(a < 0.95 * b for a, b in zip(sizes, sizes[1:], strict=False)), kept


@functools.cache
def plain_gradients(**options):
  loss, arguments = loss_of("", options)
  return jax.jit(jax.grad(loss))(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("options", LOOPS)
@pytest.mark.parametrize("remat", ORDER[:-1])
def test_the_policy_changes_no_gradient(remat, options):
  loss, arguments = loss_of(remat, options)
  grads, expected = jax.jit(jax.grad(loss))(*arguments), plain_gradients(**options)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(b).max()) + 1e-12)


@pytest.mark.parametrize("name", ["convolutions", "products"])
def test_what_cudnns_attention_returns_is_kept(name):
  policy = policies.POLICIES[name]
  assert policy(cudnn._dot_product_attention_fwd_p_wrapper)
  assert not policy(cudnn._dot_product_attention_bwd_p_wrapper)
