"""The reader of compiled programs, on programs whose cost is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import scaling
from launch import hlo, hlo_cost, roofline, targets
from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError


def compiled(function, *shapes, **kwargs):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  text = jax.jit(function, **kwargs).lower(*arguments).compile().as_text()
  return hlo.parse(text or "")


def chain(x, weights):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_scanned_product_counts_once_per_turn():
  module = compiled(chain, (16, 32), (5, 32, 32))
  assert hlo_cost.flops(module) == 5 * 2 * 16 * 32 * 32
  assert not hlo.unknown_loops(module)


def test_its_gradient_costs_twice_as_much_again():
  module = compiled(jax.grad(lambda w, x: chain(x, w).sum()), (5, 32, 32), (16, 32))
  assert hlo_cost.flops(module) == 5 * 3 * 2 * 16 * 32 * 32


def test_loops_in_loops_multiply():
  def nested(x, weights):
    return jax.lax.scan(lambda x, _: (chain(x, weights), None), x, None, length=3)[0]

  assert hlo_cost.flops(compiled(nested, (8, 16), (4, 16, 16))) == 3 * 4 * 2 * 8 * 16 * 16


def convolution(x, kernel, **options):
  numbers = ("NWC", "WIO", "NWC")
  defaults = {"window_strides": (1,), "padding": "SAME", "dimension_numbers": numbers}
  return jax.lax.conv_general_dilated(x, kernel, **defaults | options)


@pytest.mark.parametrize(
  "options, pairs",
  [
    ({}, 3 * 20 - 2),  # The outer taps miss at both ends.
    ({"window_strides": (2,)}, 3 * 10 - 1),
    ({"rhs_dilation": (2,)}, 3 * 20 - 4),
    ({"lhs_dilation": (2,), "padding": [(1, 1)]}, 58),
  ],
)
def test_a_convolution_counts_what_exists(options, pairs):
  module = compiled(lambda x, k: convolution(x, k, **options), (2, 20, 8), (3, 8, 16))
  assert hlo_cost.flops(module) == 2 * 2 * pairs * 8 * 16


def test_batched_products():
  module = compiled(lambda q, k: jnp.einsum("bthk,bshk->bhts", q, k), (2, 7, 3, 8), (2, 9, 3, 8))
  assert hlo_cost.flops(module) == 2 * 2 * 3 * 7 * 9 * 8


def test_the_reduction_of_a_gradient_has_its_bytes():
  mesh = sharding.make_mesh(8, 1, 1)
  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
  gradient = jax.grad(lambda w, x: chain(x, w).sum())
  module = compiled(
    gradient, (5, 32, 32), (16, 32), in_shardings=(whole, rows), out_shardings=whole
  )
  found = hlo_cost.collectives(module)
  assert set(found) == {"all-reduce"}
  # Inside the loop, and so five times a fifth.
  assert found["all-reduce"].bytes == 5 * 32 * 32 * 4
  assert found["all-reduce"].count in (1, 5)


def test_a_gather_counts_what_comes_out():
  mesh = sharding.make_mesh(1, 8, 1)
  split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
  module = compiled(lambda x: 2 * x, (16, 32), in_shardings=split, out_shardings=whole)
  found = hlo_cost.collectives(module)
  assert (found["all-gather"].count, found["all-gather"].bytes) == (1, 16 * 32 * 4)


def test_donated_bytes_and_callbacks_are_seen():
  kept = compiled(lambda a, b: (a + b[0], b * 2), (8, 8), (4, 8, 8), donate_argnums=1)
  assert hlo_cost.aliased_bytes(kept) == 4 * 8 * 8 * 4
  assert not hlo_cost.host_transfers(kept)

  def talkative(x):
    jax.debug.callback(lambda x: None, x.sum())
    return 2 * x

  assert hlo_cost.host_transfers(compiled(talkative, (8,)))


# As the TPU compiler prints it: no trip count, a product written as a convolution, cycles.
TPU = """\
HloModule jit_f, is_scheduled=true, input_output_alias={ {}: (0, {}, may-alias) }

%body (p: (s32[], bf16[64,128], bf16[7,128,128])) -> (s32[], bf16[64,128], bf16[7,128,128]) {
  %p = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[7,128,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w = bf16[7,128,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %x, %i), kind=kOutput, calls=%product, metadata={op_name="jit(f)/jvp()/while/body/block/dot_general"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %out = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[7,128,128]{2,1,0:T(8,128)(2,1)}) tuple(%next, %y, %w)
}

%product (p0: bf16[7,128,128], p1: bf16[64,128], p2: s32[]) -> bf16[64,128] {
  %p0 = bf16[7,128,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,128,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p2, %zero, %zero), dynamic_slice_sizes={1,128,128}
  %k = bf16[128,128]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %c = bf16[64,128]{1,0:T(8,128)(2,1)} convolution(%p1, %k), dim_labels=bf_io->bf
}

%test (p: (s32[], bf16[64,128], bf16[7,128,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[7,128,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[64,128], b: bf16[7,128,128]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[7,128,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[]{:T(128)} constant(START)
  %s = s32[]{:T(128)} copy(%start)
  %t = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[7,128,128]{2,1,0:T(8,128)(2,1)}) tuple(%s, %a, %b)
  %loop = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[7,128,128]{2,1,0:T(8,128)(2,1)}) while(%t), condition=%test, body=%body
  ROOT %r = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize("start, turns", [(0, 7), (2, 5)])
def test_a_tpu_loop_is_read_from_its_counter(start, turns):
  module = hlo.parse(TPU.replace("START", str(start)))
  assert hlo_cost.flops(module) == turns * 2 * 64 * 128 * 128
  assert hlo_cost.cycles(module) == {"matrix": turns * 100, "other": 0}
  assert hlo_cost.cycles_by_scope(module) == [("forward block", turns * 100)]
  assert hlo_cost.aliased_bytes(module) == 64 * 128 * 2
  # The loop reads one layer's weights a turn, not all seven.
  moved = turns * (2 * 64 * 128 + 128 * 128) * 2
  assert roofline.seconds(module, 1e30, 1.0) == pytest.approx(moved, rel=0.01)
  assert not hlo.unknown_loops(module)


# As the GPU compiler prints it: a fusion that reads parts of what it gets, and writes into another.
GPU = """\
HloModule jit_f

%fused (p0: bf16[24,2,8,16], p1: s32[], p2: bf16[64,96], p3: bf16[24,64,16], p4: f32[64,16]) -> (bf16[8,16], bf16[24,64,16]) {
  %p0 = bf16[24,2,8,16]{3,2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[64,96]{1,0} parameter(2)
  %p3 = bf16[24,64,16]{2,1,0} parameter(3)
  %p4 = f32[64,16]{1,0} parameter(4)
  %turned = bf16[24,2,8,16]{3,2,1,0} bitcast(%p0)
  %layer = bf16[1,2,8,16]{3,2,1,0} dynamic-slice(%turned, %p1, %p1, %p1, %p1), dynamic_slice_sizes={1,2,8,16}
  %half = bf16[1,1,8,16]{3,2,1,0} slice(%layer), slice={[0:1], [0:1], [0:8], [0:16]}
  %kernel = bf16[8,16]{1,0} bitcast(%half)
  %wide = f32[64,96]{1,0} convert(%p2)
  %first = f32[64,16]{1,0} slice(%wide), slice={[0:64], [0:16]}
  %last = f32[64,16]{1,0} slice(%wide), slice={[0:64], [80:96]}
  %sum = f32[64,16]{1,0} add(%first, %last)
  %more = f32[64,16]{1,0} multiply(%sum, %p4)
  %low = bf16[64,16]{1,0} convert(%more)
  %one = bf16[1,64,16]{2,1,0} bitcast(%low)
  %stack = bf16[24,64,16]{2,1,0} bitcast(%p3)
  %written = bf16[24,64,16]{2,1,0} dynamic-update-slice(%stack, %one, %p1, %p1, %p1)
  %view = bf16[24,64,16]{2,1,0} bitcast(%written)
  ROOT %out = (bf16[8,16]{1,0}, bf16[24,64,16]{2,1,0}) tuple(%kernel, %view)
}

ENTRY %main (a: bf16[24,2,8,16], b: s32[], c: bf16[64,96], d: bf16[24,64,16], e: f32[64,16]) -> f32[64,64] {
  %a = bf16[24,2,8,16]{3,2,1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = bf16[64,96]{1,0} parameter(2)
  %d = bf16[24,64,16]{2,1,0} parameter(3)
  %e = f32[64,16]{1,0} parameter(4)
  %f = (bf16[8,16]{1,0}, bf16[24,64,16]{2,1,0}) fusion(%a, %b, %c, %d, %e), kind=kLoop, calls=%fused
  %g = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%e, %e), custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}
  ROOT %h = f32[64,64]{1,0} get-tuple-element(%g), index=0
}
"""  # noqa: E501


def test_a_kernel_moves_what_it_needs():
  module = hlo.parse(GPU)
  fusion, product = roofline.kernels(module)
  half, columns, factor, row = 8 * 16 * 2, 2 * 64 * 16 * 2, 64 * 16 * 4, 64 * 16 * 2
  moved = 2 * half + columns + factor + row
  assert roofline.traffic(module, fusion) == pytest.approx(moved, abs=8)  # And the index.
  scratch_apart = 2 * 64 * 16 * 4 + 64 * 64 * 4
  assert roofline.traffic(module, product) == scratch_apart
  assert roofline.flops(module, product) == 2 * 64 * 64 * 16


def test_a_loop_that_tells_nothing_is_named():
  text = TPU.replace("direction=LT", "direction=NE")
  assert hlo.unknown_loops(hlo.parse(text.replace("START", "0"))) == ["loop"]


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule nothing")


BRANCHES = """\
HloModule m

%long (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}, backend_config={"estimated_cycles":"1000"}
}

%short (b: f32[8,8]) -> f32[8,8] {
  ROOT %b = f32[8,8]{1,0} parameter(0)
}

ENTRY %main (p: pred[], x: f32[8,8]) -> f32[8,8] {
  %p = pred[] parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%p, %x, %x), BRANCHED
}
"""  # noqa: E501


@pytest.mark.parametrize(
  "branched",
  [
    "true_computation=%long, false_computation=%short",
    "true_computation=%short, false_computation=%long",
    "branch_computations={%short, %long, %short}",
    "branch_computations={%long, %long}",
  ],
)
def test_a_conditional_takes_one_branch(branched):
  module = hlo.parse(BRANCHES.replace("BRANCHED", branched))
  assert hlo_cost.flops(module) == 2 * 8 * 8 * 8
  assert hlo_cost.cycles(module) == {"matrix": 1000, "other": 0}
  assert hlo_cost.optional_cycles(module) == (1000 if "short" in branched else 0)


REDUCTION = """\
HloModule m, num_partitions=16

ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  ROOT %r = f32[256]{0} all-reduce(%x), channel_id=1, GROUPS, use_global_device_ids=true
}
"""


@pytest.mark.parametrize(
  "groups, far",
  [
    ("replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}", False),
    ("replica_groups={{0,8},{1,9}}", True),
    ("replica_groups=[2,8]<=[16]", False),
    ("replica_groups=[8,2]<=[2,8]T(1,0)", True),
    ("replica_groups=[1,16]<=[16]", True),
    ("replica_groups={}", True),
    ("replica_groups=mesh['a'=16] {'a'}", True),
    ("replica_groups=mesh['a'=2,'b'=8] {'b'}", False),
    ("replica_groups=mesh['a'=2,'b'=8] {'a'}", True),
    ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b','c'}", False),
    ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}", False),
    ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", True),
  ],
)
def test_what_leaves_a_slice_goes_by_the_network(groups, far):
  module = hlo.parse(REDUCTION.replace("GROUPS", groups))
  (near,) = hlo_cost.collectives(module).values()
  (found,) = hlo_cost.collectives(module, 8).values()
  assert (near.sharers, found.sharers) == (0, 8 if far else 0)
  assert hlo_cost.collective_seconds([near], 1e3, 1e2) == pytest.approx(2 * 1024 / 1e3)
  more = 2 * 1024 / (8 * 1e2) if far else 0
  assert hlo_cost.collective_seconds([found], 1e3, 1e2) == pytest.approx(2 * 1024 / 1e3 + more)


def test_what_slices_of_a_tpu_exchange_is_a_chips_part():
  line = (
    "%s = (f32[16]{0}, u32[], token[]) send(%part, %t), channel_id=2, is_host_transfer=true, "
    'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
  )
  module = hlo.parse(f"""HloModule m

ENTRY %main (part: f32[16]) -> f32[16] {{
  %t = token[] after-all()
  {line}
  ROOT %part = f32[16]{{0}} parameter(0)
}}
""")
  (found,) = hlo_cost.collectives(module, 8).items()
  assert found == ("all-reduce by network", hlo_cost.Collective("all-reduce", 1, 1, 64))
  assert hlo_cost.collective_seconds([found[1]], 1e3, 1e2) == pytest.approx(2 * 64 / 1e2)
  assert not hlo_cost.host_transfers(module)


def test_sizes_of_types():
  printed = "(f32[2,3]{1,0}, pred[5], bf16[4], /*index=3*/s32[], f8e4m3fn[8], u4[3], token[])"
  sizes = [hlo.size(leaf) for leaf in hlo.leaves(printed)]
  np.testing.assert_array_equal(sizes, [24, 5, 8, 4, 8, 2, 0])


@pytest.mark.parametrize(
  "groups", ["replica_groups=mesh['a'=16] {'a':(1)4}", "replica_groups=whatever(3)"]
)
def test_groups_that_cannot_be_read_are_no_guess(groups):
  module = hlo.parse(REDUCTION.replace("GROUPS", groups))
  with pytest.raises(UserError, match="replica_groups|parts of axes"):
    hlo_cost.collectives(module, 8)


def test_the_network_of_a_zero_1_run_on_gpus_is_in_its_rates():
  """There the gradient is a reduce-scatter, on TPUs an all-reduce."""
  report = {"chip": "h200", "chips": 8, "batch_size": 512, "seconds": 0.1}
  alone = {
    kind: [
      scaling.rates({**report, "collectives": {kind: {"count": 1, "bytes": 1e9}}}, chips)[2]
      for chips in (8, 64)
    ]
    for kind in ("all-reduce", "reduce-scatter")
  }
  for near, far in alone.values():  # Each chip sends and gets an eighth of it by the network.
    assert far - near == pytest.approx(1e3 * 2 * 1e9 / 8 / targets.CHIPS["h200"].network)
