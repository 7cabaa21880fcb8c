"""What instructions of accelerators cost, which no compiler for a CPU makes."""

import pytest

from launch import hlo, hlo_cost


def program(*lines, called=()):
  """Reads instructions, and those of a computation %called."""
  other = ["%called () -> f32[] {", *called, "}"] if called else []
  return hlo.parse("\n".join(["HloModule m", *other, "ENTRY %main () -> f32[] {", *lines, "}"]))


def test_an_asynchronous_gather_counts_what_comes_out():
  """Its result holds what goes in as well, and what the chip needs besides."""
  shape = "((bf16[16,8], f32[2]), (bf16[128,8]{1,0}, f32[16]{0}), u32[], u32[])"
  module = program(
    "%x = bf16[16,8]{1,0} parameter(0)",
    "%y = f32[2]{0} parameter(1)",
    f"%s = {shape} all-gather-start(%x, %y), replica_groups=[1,8]<=[8], dimensions={{0}}",
    "ROOT %d = (bf16[128,8]{1,0}, f32[16]{0}) all-gather-done(%s)",
  )
  expected = hlo_cost.Collective("all-gather", 0, 1, 128 * 8 * 2 + 16 * 4)
  assert hlo_cost.collectives(module) == {"all-gather": expected}


@pytest.mark.parametrize("near, name", [(None, "reduce-scatter"), (4, "reduce-scatter by network")])
def test_an_all_reduce_of_which_each_keeps_a_part_is_a_reduce_scatter(near, name):
  module = program(
    "%x = f32[256]{0} parameter(0)",
    "ROOT %all-reduce-scatter.1 = f32[32]{0} fusion(%x), kind=kCustom, calls=%called",
    called=(
      "%p = f32[256]{0} parameter(0)",
      "%zero = s32[] constant(0)",
      "%r = f32[256]{0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8]",
      "ROOT %s = f32[32]{0} dynamic-slice(%r, %zero), dynamic_slice_sizes={32}",
    ),
  )
  found = hlo_cost.collectives(module, near)
  assert found == {name: hlo_cost.Collective("reduce-scatter", near or 0, 1, 1024)}
  far = 1024 / (near * 1e2) if near else 0
  seconds = hlo_cost.collective_seconds(found.values(), 1e3, 1e2)
  assert seconds == pytest.approx(1024 / 1e3 + far)  # Once, and not there and back.


@pytest.mark.parametrize("target, products", [("Softmax", 2), ("SoftmaxBackward", 5)])
def test_fused_attention_is_two_products_and_five_backward(target, products):
  module = program(
    "%q = bf16[2,128,4,64]{3,1,2,0} parameter(0)",
    "%k = bf16[2,96,4,64]{3,1,2,0} parameter(1)",
    "ROOT %a = (bf16[2,128,4,64]{3,1,2,0}, u8[512]{0}) custom-call(%q, %k, %k), "
    f'custom_call_target="__cudnn$fmha{target}"',
  )
  assert hlo_cost.flops(module) == products * 2 * (2 * 4) * 128 * 96 * 64


@pytest.mark.parametrize(
  "target, operands, result",
  [
    ("Forward", "%x, %k", "[2,10,12,5]"),
    ("BiasActivationForward", "%x, %k", "[2,10,12,5]"),
    ("BackwardInput", "%y, %k", "[2,10,12,7]"),
    ("BackwardFilter", "%x, %y", "[5,3,3,7]"),
  ],
)
def test_a_convolution_of_cudnn_costs_the_same_in_every_direction(target, operands, result):
  module = program(
    "%x = bf16[2,10,12,7]{3,2,1,0} parameter(0)",
    "%k = bf16[5,3,3,7]{3,2,1,0} parameter(1)",
    "%y = bf16[2,10,12,5]{3,2,1,0} parameter(2)",
    f"ROOT %c = (bf16{result}{{3,2,1,0}}, u8[64]{{0}}) custom-call({operands}), "
    "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, "
    f'custom_call_target="__cudnn$conv{target}"',
  )
  assert hlo_cost.flops(module) == 2 * (2 * 10 * 12) * 5 * (3 * 3 * 7)


def test_cycles_of_a_fusion_are_those_of_what_it_holds():
  cycles = 'backend_config={"estimated_cycles":"%d"}'
  module = program(
    "%x = f32[8,8]{1,0} parameter(0)",
    f"%f = f32[8,8]{{1,0}} fusion(%x), kind=kOutput, calls=%called, {cycles % 700}",
    f"ROOT %t = f32[8,8]{{1,0}} tanh(%f), {cycles % 40}",
    called=(
      "%p = f32[8,8]{1,0} parameter(0)",
      f"ROOT %d = f32[8,8]{{1,0}} dot(%p, %p), lhs_contracting_dims={{1}}, {cycles % 600}",
    ),
  )
  assert hlo_cost.cycles(module) == {"matrix": 700, "other": 40}
  assert sum(n for _, n in hlo_cost.cycles_by_scope(module)) == 740


@pytest.mark.parametrize(
  "instruction, talks",
  [
    ("token[] outfeed(%x, %t)", True),
    ("((f32[8]{0}), token[]) infeed(%t)", True),
    ('f32[8]{0} custom-call(%x), custom_call_target="MoveToHost"', True),
    ('f32[8]{0} custom-call(%x), custom_call_target="MoveToDevice"', True),
    ('f32[8]{0} custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"', True),
    ("(f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true", True),
    ("(f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=1", False),
    ('f32[8]{0} custom-call(%x), custom_call_target="TopK"', False),
  ],
)
def test_what_talks_to_the_host_is_named(instruction, talks):
  module = program("%x = f32[8]{0} parameter(0)", "%t = token[] after-all()", f"%i = {instruction}")
  assert hlo_cost.host_transfers(module) == (["i"] if talks else [])
