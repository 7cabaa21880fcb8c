"""The watchdog's clock, without a run around it."""

import time

from spatialv2a_jax import goodput
from spatialv2a_jax.training import cluster, watchdog


def test_what_came_before_it_is_no_hang(tmp_path, monkeypatch):
  """Waiting for the other hosts has a limit of its own, and may take an hour."""
  left = []
  monkeypatch.setattr(cluster, "leave", left.append)
  ledger = goodput.Ledger(began=time.time() - 100)
  with watchdog.Watchdog(ledger, tmp_path, {"init": 1.0}):
    time.sleep(0.6)
  assert not left and ledger.seconds()["init"] > 100
  with watchdog.Watchdog(ledger, tmp_path, {"init": 0.2}):
    time.sleep(0.6)
  assert left and "hung start" in (tmp_path / "stacks" / "process-0.txt").read_text()
