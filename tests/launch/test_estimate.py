"""The estimate against closed forms, and against what a step really takes on this machine."""

import dataclasses
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from launch import estimate, hlo, targets
from launch import train as launcher
from launch.targets import GIB
from spatialv2a_jax import sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.training import recipe

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "collectives.json"
ARGUMENTS = ["launch.estimate", "--config=configs/tiny.py:smoke", "--topology=cpu:8"]


def report(**changes):
  memory = {"temporaries": 4 * GIB, "peak": 8 * GIB, "available": 15.75 * GIB}
  base = {
    "topology": "v5e:4x4",
    "chip": "v5e",
    "chips": 16,
    "mesh": {"data": 16, "fsdp": 1, "tensor": 1},
    "batch_size": 512,
    "accumulate": 1,
    "steps": 300_000,
    "parameters": {"ears": 3_000_000, "total": 3_000_000},
    "state_bytes": {"params": 2 * GIB, "opt": 1 * GIB, "averages": 1 * GIB},
    "memory": memory,
    "fits": True,
  }
  return base | changes


def replace_step(monkeypatch, step):
  """Makes the estimate that of another program, which takes less time to compile."""
  real = estimate.program
  replaced = lambda *given: dataclasses.replace(real(*given), step=step)  # noqa: E731
  monkeypatch.setattr(estimate, "program", replaced)


class Doubling:
  """A step that takes so many KiB and gives as many."""

  def __init__(self, kib):
    self.shape = jax.ShapeDtypeStruct((kib, 256), "float32")

  def lower(self, *_):
    return jax.jit(lambda x: 2 * x).lower(self.shape)


def config_of(*overrides):
  config = estimate.command.parse([*ARGUMENTS[:2], *overrides], estimate.flags.FlagValues())
  assert config is not None
  return config


@pytest.mark.parametrize(
  "text, chip, count, parts",
  [
    ("v5e:16x16", "v5e", 256, 1),
    ("v6e:4x16x16", "v6e", 1024, 4),
    ("v5p:4x4x4", "v5p", 64, 1),
    ("v5p:2x8x8x8", "v5p", 1024, 2),
    ("h200:8", "h200", 8, 1),
    ("h200:2x8", "h200", 16, 2),
    ("cpu:8", "cpu", 8, 1),
  ],
)
def test_topologies_are_named(text, chip, count, parts):
  target = targets.parse(text)
  assert (target.chip.name, target.count, target.parts) == (chip, count, parts)


@pytest.mark.parametrize(
  "text",
  ["v5e", "v9:4x4", "v5e:4", "v5p:4x4", "cpu:2x2", "v5e:0x4", "v5e:4x", "v5e:32x32", "h200:16"],
)
def test_other_topologies_are_refused(text):
  with pytest.raises(UserError, match="--topology") as refused:
    targets.parse(text)
  for advised in re.findall("as in (.*)", str(refused.value)):
    targets.parse(advised)


def test_a_missing_compiler_is_named(monkeypatch, capsys):
  monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
  assert estimate.main([*ARGUMENTS[:2], "--topology=v5e:4x4"]) == 3
  message = capsys.readouterr().err
  assert message.count("\n") == 1 and "pip install 'spatialv2a_jax[estimate]'" in message


@pytest.mark.parametrize(
  "arguments, message",
  [
    (ARGUMENTS[:2], "--topology"),
    ([*ARGUMENTS[:2], "--topology=v5e:banana"], "v5e:16x16"),
    ([*ARGUMENTS[:2], "--topology=h200:16"], "a host of h200 has at most 8 chips"),
    ([*ARGUMENTS[:2], "--topology=v5e:32x32"], "as in v5e:4x16x16"),
    ([*ARGUMENTS, "--config.mesh.data=3"], "does not fit 8 device"),
    ([*ARGUMENTS, "--out=/proc/nowhere/x.json"], "cannot write to /proc/nowhere"),
    ([*ARGUMENTS, "--layout=/proc/nowhere/x.txt"], "cannot write to /proc/nowhere"),
    ([*ARGUMENTS, "--config.data.batch_size=12"], "multiple of 8"),
    ([*ARGUMENTS, "--config.accumulate=3"], "does not divide by accumulate 3 x"),
  ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
  assert estimate.main(arguments) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_memory_that_runs_out_is_a_verdict(monkeypatch):
  text = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (107.34G) exceeds available HBM (15.75G). HLO module: jit_step."
  )

  class Step:
    def lower(self, *_):
      return self

    def compile(self):
      raise jax.errors.JaxRuntimeError(text)

  replace_step(monkeypatch, Step())
  found = estimate.estimate(config_of(), targets.parse("cpu:8"))
  assert not found["fits"] and found["memory"]["peak"] == pytest.approx(107.34 * GIB)
  assert "DOES NOT FIT" in estimate.show(found)


@pytest.mark.parametrize("memory, code, verdict", [(7, 1, "DOES NOT FIT: 114 %"), (9, 0, "fits")])
def test_the_exit_code_says_whether_it_fits(memory, code, verdict, monkeypatch, capsys):
  chip = dataclasses.replace(targets.CHIPS["cpu"], memory=memory * 2**20)
  monkeypatch.setitem(targets.CHIPS, "cpu", chip)
  replace_step(monkeypatch, Doubling(4096))
  assert estimate.main(ARGUMENTS) == code
  assert f"verdict      {verdict}" in capsys.readouterr().out


def test_the_peak_holds_what_goes_in_what_comes_out_and_what_lies_between():
  def step(kept, donated):
    between = jnp.tanh(kept.T @ kept)
    return donated + kept[0, 0], between @ kept[0, :, None]

  shapes = [jax.ShapeDtypeStruct((1024, n), "float32") for n in (2048, 1024)]
  found = estimate.memory_of(jax.jit(step, donate_argnums=1).lower(*shapes).compile())
  mib, new = 2**20, 4 * 2048
  assert (found["arguments"], found["donated"]) == (12 * mib, 4 * mib)
  assert found["outputs"] == pytest.approx(4 * mib + new, abs=64)  # And where each of them lies.
  assert 16 * mib <= found["temporaries"] < 17 * mib
  whole = 12 * mib + found["temporaries"] + new
  assert whole <= found["peak"] - found["code"] <= whole + 64


def test_days_and_the_bytes_of_every_average_are_in_the_estimate(monkeypatch):
  replace_step(monkeypatch, Doubling(2))
  config = config_of("--config.ema.sigma_rel=0.1", "--config.ema.beside=(0.05, 0.2)")
  found = estimate.estimate(config | {"steps": 10**12}, targets.parse("cpu:8"))
  assert found["days"] == pytest.approx(10**12 * found["seconds"] / (24 * 60 * 60))
  state, held = estimate.program(config, jax.devices()).state, found["state_bytes"]
  parts = [state.params, state.opt, state.ema, *state.beside, *state.means]
  assert sum(held.values()) == sum(map(sharding.bytes_per_device, parts))
  assert held["averages"] >= 3 * held["params"] > 0


def test_advice_names_what_to_change():
  full = {"temporaries": 30 * GIB, "peak": 40 * GIB, "available": 15.75 * GIB}
  for remat, told in (("convolutions", True), ("full", False)):
    lines = estimate.advice(report(memory=full, remat=remat, fits=False))
    assert told == any("remat=full" in line for line in lines)
  assert not any("remat" in line for line in estimate.advice(report(memory=full, fits=False)))
  lines = estimate.advice(report(memory=full, fits=False))
  assert any("--config.accumulate=4" in line for line in lines)
  state = {"params": 5 * GIB, "opt": 10 * GIB, "averages": 5 * GIB}
  lines = estimate.advice(report(memory=full, state_bytes=state, fits=False))
  assert "--config.mesh.data=-1 --config.mesh.fsdp=8" in lines[0]
  split = {"mesh": {"data": 2, "fsdp": 8, "tensor": 1}, "state_bytes": {"params": 10 * GIB}}
  assert "more chips" in estimate.advice(report(memory=full, **split))[0]
  lines = estimate.advice(report(memory=full, **split, chips=64, batch_size=6 * 16))
  assert "--config.mesh.fsdp=32" in lines[0]
  assert any("--config.accumulate=6" in line for line in lines)  # 5.2 parts or more.
  assert "fewer chips" in estimate.advice(report(batch_size=32))[0]
  assert not estimate.advice(report())
  assert "rules.zero leaves 80 %" in estimate.advice(report(zero_whole=0.8))[0]


def test_what_zero_leaves_whole_is_counted():
  mesh = sharding.make_mesh(8, 1, 1)

  def leaf(size, *spec):
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct((size,), "float32", sharding=place)

  leaves = [leaf(24, "data"), leaf(8)]
  assert sharding.zero_whole(leaves, mesh, "data") == pytest.approx(0.25)
  assert sharding.zero_whole(leaves, mesh, "") == 0


def test_time_and_rate_follow_from_cycles():
  line = 'c = bf16[64,128]{1,0} convolution(%p1, %k), dim_labels=bf_io->bf, backend_config={"'
  text = f"""HloModule m

ENTRY %main (p1: bf16[64,256], k: bf16[256,128]) -> bf16[64,128] {{
  %p1 = bf16[64,256]{{1,0}} parameter(0)
  %k = bf16[256,128]{{1,0}} parameter(1)
  ROOT %{line}estimated_cycles":"1500000"}}
}}
"""
  module, target = hlo.parse(text), targets.parse("v5e:4x4")
  flops = estimate.work(module, target, 512, 1e10)["flops"]
  assert flops["compiled_per_chip"] == 2 * 64 * 128 * 256
  times = estimate.times(module, target, 512, flops["model_per_chip"])
  assert times["seconds"] == pytest.approx(1e-3)
  assert times["mfu"] == pytest.approx(1e10 * 512 / 16 / 1e-3 / 197e12)
  assert times["clips_per_s"] == pytest.approx(512_000)


def test_times_are_of_all_cycles_whoever_spends_them():
  module = hlo.parse("""HloModule m

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, backend_config={"estimated_cycles":"300"}
  ROOT %t = f32[8,8]{1,0} tanh(%d), backend_config={"estimated_cycles":"1200"}
}
""")  # noqa: E501
  found = estimate.times(module, targets.parse("v5e:4x4"), 512, None)
  assert found["seconds"] == pytest.approx(1500 / 1.5e9) and found["matrix_share"] == 0.2


@pytest.mark.parametrize(
  "topology, far",
  [("h200:2x8", True), ("v5e:2x2x4", True), ("h200:8", False), ("v5e:4x4", False)],
)
def test_what_goes_between_hosts_or_slices_is_charged_to_the_network(topology, far):
  module = hlo.parse("""HloModule m

ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  ROOT %r = f32[256]{0} all-reduce(%x), channel_id=1, replica_groups={}
}
""")
  target = targets.parse(topology)
  found = estimate.work(module, target, 512, None)
  assert list(found["collectives"]) == ["all-reduce by network" if far else "all-reduce"]
  seconds = 2 * 1024 / target.chip.interconnect + far * 2 * 1024 / (8 * target.chip.network)
  assert found["collective_seconds"] == pytest.approx(seconds)


def test_of_a_gpus_memory_a_program_gets_three_quarters():
  size = re.search(r"device_memory_size: (\d+)", targets._H200)
  assert size and targets.CHIPS["h200"].memory == pytest.approx(0.75 * int(size[1]), rel=0.01)


@pytest.mark.parametrize("name", ["vae_tiny", "mono2binaural:tiny"])
def test_every_kind_of_network_has_its_estimate(name, monkeypatch, tmp_path, capsys):
  """Also of one whose work is not counted; compiled is another program, for time's sake."""

  replace_step(monkeypatch, Doubling(2))
  out = tmp_path / "out.json"
  path, _, variant = name.partition(":")
  config = f"--config=configs/{path}.py" + (f":{variant}" if variant else "")
  size = "--config.data.batch_size=8"
  assert estimate.main(["launch.estimate", config, "--topology=cpu:8", f"--out={out}", size]) == 0
  found = json.loads(out.read_text())
  assert found["flops"]["model_per_clip"] is found["mfu"] is None
  assert "MFU unknown" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=lambda mesh: "x".join(map(str, mesh)))
def test_the_estimate_is_of_the_step_that_trains(mesh, tmp_path, monkeypatch):
  """What `launch.train` hands to the compiler, with its state and its first batch."""

  class HandedError(Exception):
    pass

  def make(*arguments, **options):
    step = real(*arguments, **options)

    class Step:
      def lower(self, state, batch):
        raise HandedError(step.lower(state, batch).as_text(debug_info=False))

    return Step()

  real = recipe.make_train_step
  sizes = dict(zip(sharding.MESH_AXES, mesh, strict=True))
  arguments = launcher.parse(
    [
      "launch.train",
      "--config=configs/tiny.py:smoke",
      f"--workdir={tmp_path}",
      "--config.rules.zero=data",
      *(f"--config.mesh.{name}={size}" for name, size in sizes.items()),
    ]
  )
  with monkeypatch.context() as patch:
    patch.setattr(recipe, "make_train_step", make)
    with pytest.raises(HandedError) as handed:
      launcher.run(arguments)
  found = estimate.program(arguments.config, jax.devices())
  assert found.step.lower(found.state, found.batch).as_text(debug_info=False) == str(handed.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8x1x1", "8x1x1 zero=data", "2x4x1", "2x2x2"])
def test_the_compiler_does_what_is_expected(name, tmp_path, capfd):
  """Collectives, donation, host transfers and the size of the state of a real step."""
  out, layout = tmp_path / "out.json", tmp_path / "layout.txt"
  shape, _, zero = name.partition(" zero=")
  sizes = zip(sharding.MESH_AXES, shape.split("x"), strict=True)
  overrides = [f"--config.mesh.{axis}={size}" for axis, size in sizes]
  overrides += [f"--config.rules.zero={zero}"]
  jax.config.update("jax_enable_compilation_cache", False)  # What is read back warns of nothing.
  try:
    assert estimate.main([*ARGUMENTS, *overrides, f"--out={out}", f"--layout={layout}"]) == 0
  finally:
    jax.config.update("jax_enable_compilation_cache", True)
  shown, found = capfd.readouterr(), json.loads(out.read_text())
  assert "verdict      fits" in shown.out
  assert "Involuntary full rematerialization" not in shown.err

  state = estimate.program(config_of(*overrides), jax.devices()).state
  count = sum(x.size for x in jax.tree.leaves(state.params))
  assert found["parameters"]["total"] == count
  assert len(layout.read_text().splitlines()) == len(jax.tree.leaves(state))
  assert not found["host_transfers"] and not found["unknown_loops"]
  held = sharding.bytes_per_device(state)
  assert found["memory"]["donated"] >= 0.999 * held
  assert found["memory"]["arguments"] >= held

  golden = json.loads(GOLDEN.read_text())
  if os.environ.get("UPDATE_GOLDEN"):
    GOLDEN.write_text(json.dumps(golden | {name: found["collectives"]}, indent=2) + "\n")
  else:
    assert found["collectives"] == golden[name]
  kinds = set(found["collectives"])
  assert ("collective-permute" in kinds) == (name == "2x2x2")  # Weights that a ring multiplies.
  if name == "8x1x1":
    # The gradient is reduced once (for weights that both ears use, once for each) in a few
    # combined reductions, and no parameter is gathered.
    assert kinds == {"all-reduce"}
    assert 4 * count < found["collectives"]["all-reduce"]["bytes"] < 1.35 * 4 * count
    assert found["collectives"]["all-reduce"]["count"] < 10
  if zero:
    # Besides, each parameter whose moments are split is gathered once.
    split = [
      p.size
      for p, m in zip(*(jax.tree.leaves(x) for x in (state.params, state.ema)), strict=True)
      if m.sharding.spec != p.sharding.spec
    ]
    assert found["collectives"]["all-gather"]["bytes"] == 4 * sum(split)
