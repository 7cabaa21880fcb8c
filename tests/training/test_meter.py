"""Rates and means of a run."""

import jax
import numpy as np
import pytest

from launch import targets
from spatialv2a_jax.training import meter


def test_utilisation_is_unknown_where_the_peak_is():
  assert np.isnan(meter.mfu(1e9, 10.0))


def test_utilisation_is_a_share_of_the_published_peak(monkeypatch):
  monkeypatch.setitem(meter.PEAK_FLOPS, jax.devices()[0].device_kind, 1e10)
  assert meter.mfu(2e9, 10.0) == pytest.approx(2e10 / (1e10 * jax.device_count()))


@pytest.mark.parametrize(
  "kind, chip",
  [
    ("TPU v5e", "v5e"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA H200", "h200"),
  ],
)
def test_a_run_and_its_estimate_know_the_same_peak(kind, chip):
  assert meter.peak_flops(kind) == targets.CHIPS[chip].peak_flops


def test_peaks_of_other_names():
  assert meter.peak_flops("NVIDIA H200 MIG 1g.18gb") is None  # A part of one.
  assert meter.peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
  assert meter.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
  assert meter.peak_flops("NVIDIA H100 PCIe") == 756e12
  assert meter.peak_flops("NVIDIA H100 NVL") == meter.peak_flops("NVIDIA H200 NVL") == 835e12
  assert meter.peak_flops("NVIDIA B200") == 2250e12 and meter.peak_flops("NVIDIA GB200") == 2500e12
  assert meter.peak_flops("TPU v9") is None and meter.peak_flops("cpu") is None


def test_means_go_on_from_a_checkpoint_as_if_nothing_had_happened():
  whole, first = meter.Meter(), meter.Meter()
  values = [{"loss": x} for x in (0.1, 0.7, 1e-9, 3.3)]
  for one in values:
    whole.add(one)
  for one in values[:2]:
    first.add(one)
  second = meter.Meter(**first.state())
  for one in values[2:]:
    second.add(one)
  assert second.means() == whole.means()


def test_memory_of_the_host_is_that_of_this_process():
  before = meter.memory()["memory/host_peak_gib"]
  block = np.ones(2**27, np.uint8)
  assert meter.memory()["memory/host_peak_gib"] >= before > 0.01
  assert block[-1] == 1 and np.isnan(meter.memory()["memory/device_gib"])  # CPU devices.


@pytest.mark.parametrize(
  "seconds, text", [(5.4, "5 s"), (65, "1 min 5 s"), (3600 * 5 + 61, "5 h 1 min")]
)
def test_a_duration_reads_well(seconds, text):
  assert meter.duration(seconds) == text
