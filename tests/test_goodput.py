"""The ledger: every second in one phase, through any number of attempts."""

import subprocess
import sys
import time

import pytest

from spatialv2a_jax import goodput


@pytest.fixture
def clock(monkeypatch):
  """Both clocks, moved by hand."""
  now = [1000.0]
  monkeypatch.setattr(goodput.time, "time", lambda: 1e9 + now[0])
  monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])

  def pass_by(seconds):
    now[0] += seconds

  return pass_by


def phases(ledger):
  row = ledger.row()
  assert sum(ledger.seconds().values()) == pytest.approx(row["goodput/wall_s"])
  return {name: round(x, 6) for name, x in ledger.seconds().items() if x}


def test_every_second_belongs_to_one_phase(clock):
  ledger = goodput.Ledger(began=1e9 + 990)
  clock(5)
  ledger.enter("step")
  clock(60)
  with ledger.during("save"):
    clock(2)
    with ledger.during("data"):
      clock(1)
    clock(2)
  clock(20)
  assert phases(ledger) == {"init": 15, "step": 80, "save": 4, "data": 1}
  assert ledger.row()["goodput"] == pytest.approx(0.8)


def attempt(clock, saved=None, rows=(), *, after, down=0):
  """An attempt that saves after 100 s of steps and is killed `after` seconds later."""
  clock(down)
  ledger = goodput.Ledger()
  ledger.resume(saved, rows)
  rows = [*rows, ledger.row()]
  clock(10)
  ledger.enter("step")
  clock(100)
  saved = ledger.state()
  clock(after)
  return saved, [*rows, ledger.row()]


def test_steps_after_the_checkpoint_are_lost_and_the_pause_is_down(clock):
  saved, rows = attempt(clock, after=7)
  clock(3)  # Not logged any more: nobody knows when it died.
  saved, rows = attempt(clock, saved, rows, after=5, down=40)
  clock(30)
  ledger = goodput.Ledger()
  ledger.resume(saved, rows)
  assert phases(ledger) == {"init": 20, "step": 200, "lost": 12, "down": 73}
  assert ledger.row()["goodput/attempts"] == 3


def test_an_evaluation_of_the_checkpoint_counts_where_it_is_kept(clock):
  """It comes after the save, and the next attempt finds it in the record."""
  saved, _ = attempt(clock, after=0)
  ledger = goodput.Ledger()
  ledger.resume(saved, [])
  ledger.enter("step")
  with ledger.during("eval"):
    clock(20)
    with ledger.during("data"):
      clock(30)
  row = {"step": 10, **ledger.row()}
  clock(7)
  rows = [row, {"step": 11, **ledger.row()}]
  for kept, expected in (([row], {"eval": 20, "data": 30, "lost": 7}), ([], {"lost": 57})):
    ledger = goodput.Ledger()
    ledger.resume(saved, rows, kept)
    assert phases(ledger) == {"init": 10, "step": 100, **expected}


def test_a_run_that_never_saved_lost_all_its_steps(clock):
  _, rows = attempt(clock, after=7)
  ledger = goodput.Ledger()
  ledger.resume(None, rows)
  assert phases(ledger) == {"init": 10, "lost": 107}


def test_a_record_older_than_the_checkpoint_loses_nothing(clock):
  saved, rows = attempt(clock, after=0)
  ledger = goodput.Ledger()
  ledger.resume(saved, rows[:1])
  assert phases(ledger) == {"init": 10, "step": 100}


def test_the_start_of_a_process_is_known_before_it_imports_anything():
  before = time.time()
  code = "import time; t = time.time(); time.sleep(0.5);"
  code += "from spatialv2a_jax import goodput as g; print(t, g.process_began())"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  first_line, began = map(float, out.stdout.split())
  assert before - 0.1 < began < first_line + 0.1
