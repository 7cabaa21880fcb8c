"""The watchdog's clock, without a run around it."""

import signal
import time

import pytest

from spatialv2a_jax import goodput
from spatialv2a_jax.errors import UserError
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


def test_no_alarm_outlives_it(tmp_path):
  """It would end a process that does something else by then."""
  ledger, off = goodput.Ledger(), (0.0, 0.0)
  with watchdog.Watchdog(ledger, tmp_path, {"step": 100.0, "eval": 0.0}):
    ledger.enter("step")
    assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] <= 130
    ledger.enter("eval")
    assert signal.getitimer(signal.ITIMER_REAL) == off
    ledger.enter("step")
  after = signal.getitimer(signal.ITIMER_REAL)
  ledger.enter("step")
  later = signal.getitimer(signal.ITIMER_REAL)
  signal.setitimer(signal.ITIMER_REAL, 0)
  assert after == later == off


def test_every_phase_that_can_hang_has_a_limit_and_no_other_can_be_given_one(tmp_path):
  assert watchdog.LIMITS.keys() == watchdog.NAMES.keys() <= set(goodput.PHASES)
  assert min(watchdog.LIMITS.values()) > 0
  with pytest.raises(UserError, match=r"limits has no \['stepp'\], have: \['compile', 'data'"):
    watchdog.Watchdog(goodput.Ledger(), tmp_path, {"step": 9.0, "stepp": 9.0})
