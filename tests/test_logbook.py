"""Logs: rows survive a resume exactly once, bars and lines, spectrograms show the louder ear."""

import io as text
import json
import os
import time
import tracemalloc

import numpy as np
import pytest

from spatialv2a_jax import logbook


def rows(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resume_rewrites_from_its_step_and_reads_like_one_run(tmp_path):
  with logbook.Logbook(tmp_path) as book:
    for step in range(0, 50, 10):
      book.scalars(step, {"loss": step, "loss/left": np.float32(0.5)})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 50, "lo')  # Killed in the middle of a line.
  with logbook.Logbook(tmp_path, step=30) as book:
    for step in range(30, 70, 10):
      book.scalars(step, {"loss": step})
  assert [row["step"] for row in rows(tmp_path)] == list(range(0, 70, 10))
  assert rows(tmp_path)[0] == {"step": 0, "loss": 0.0, "loss/left": 0.5}
  assert logbook.read_metrics(tmp_path) == rows(tmp_path)


def test_a_fresh_start_drops_the_old_run(tmp_path):
  for _ in range(2):
    with logbook.Logbook(tmp_path) as book:
      book.scalars(0, {"loss": 1})
  assert len(rows(tmp_path)) == 1


def test_not_a_number_stays_json(tmp_path):
  with logbook.Logbook(tmp_path) as book:
    book.scalars(1, {"loss": float("nan")})
  assert rows(tmp_path) == [{"step": 1, "loss": None}]


def test_only_the_writer_touches_the_disk(tmp_path):
  with logbook.Logbook(tmp_path, writer=False) as book:
    book.scalars(0, {"loss": 1})
    book.audio(0, "clip", np.zeros((2, 100)), 16000)
  assert not list(tmp_path.iterdir())


def test_tensorboard_holds_scalars_players_and_pictures(tmp_path):
  sound = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 4000)).astype("f")
  with logbook.Logbook(tmp_path) as book:
    book.scalars(3, {"loss/left": 1.5})
    book.audio(3, "clip", sound, 16000)
  (events,) = tmp_path.glob("events.*")
  raw = events.read_bytes()
  for part in (b"loss/left", b"audio/wav", b"clip/spectrogram", b"\x89PNG"):
    assert part in raw
  head = raw.index(b"RIFF")
  assert int.from_bytes(raw[head + 22 : head + 24], "little") == 2  # Channels of the player.


def test_events_are_on_their_way_to_the_disk_at_once(tmp_path):
  """A kill would take what a buffer holds."""
  book = logbook.Logbook(tmp_path)
  book.scalars(3, {"loss/left": 1.5})
  (events,) = tmp_path.glob("events.*")
  end = time.monotonic() + 20
  while b"loss/left" not in events.read_bytes() and time.monotonic() < end:
    time.sleep(0.05)
  assert b"loss/left" in events.read_bytes()
  book.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
def test_events_that_cannot_be_written_end_with_a_line_and_the_record_goes_on(tmp_path, capfd):
  """The thread that writes them would die, and the run wait for it."""
  with logbook.Logbook(tmp_path) as book:
    for link in [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]:
      if os.path.exists(link) and "events.out" in os.readlink(link):
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, int(os.path.basename(link)))
        os.close(full)
    for step in range(100):
      book.scalars(step, {f"loss/{i}": 1.0 for i in range(20)})
  told = capfd.readouterr().err.splitlines()
  assert len(told) == 1 and "ends here (No space left on device)" in told[0]
  assert len(rows(tmp_path)) == 100


def test_plain_lines_tell_rate_and_time_left(monkeypatch):
  clock = iter(np.arange(0, 1e4, 1.0))
  monkeypatch.setattr(logbook.time, "monotonic", lambda: next(clock))
  out = text.StringIO()
  with logbook.Progress(20, "training", file=out, start=5) as progress:
    for _ in range(15):
      progress.advance(loss=0.25)
  lines = out.getvalue().splitlines()
  assert 2 <= len(lines) < 15 and lines[0].startswith("training: ")
  assert "loss 0.25" in lines[0] and "step/s" in lines[0] and "s left" in lines[0]
  assert lines[-1].startswith("training: 20/20") and "done in" in lines[-1]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_said_stands_on_a_line_of_its_own(monkeypatch, terminal):
  out = text.StringIO()
  monkeypatch.setattr(out, "isatty", lambda: terminal)
  monkeypatch.setenv("TERM", "xterm")
  with logbook.Progress(2, "generating", file=out) as progress:
    progress.say("compiling [the sampler]")
    progress.advance()
  assert "compiling [the sampler]\n" in out.getvalue().replace("\r", "")
  assert ("\x1b[" in out.getvalue()) == terminal  # Bars are for terminals.


@pytest.mark.parametrize("louder", [0, 1])
def test_spectrogram_shows_pitch_height_and_the_louder_ear(louder):
  rate = 16000
  tone = np.sin(2 * np.pi * 6000 * np.arange(rate) / rate)
  sound = np.stack([tone, tone])
  sound[1 - louder] *= 0.1
  picture = logbook.spectrogram_image(sound, rate, height=80, width=100).astype(int)
  assert picture.shape == (248, 100, 3) and picture.min() >= 0
  panels = [picture[0:80], picture[84:164]]
  row = [int(panel.sum((1, 2)).argmax()) for panel in panels]
  assert all(abs(r - 20) <= 2 for r in row)  # 6 kHz of 8 kHz: a quarter from the top.
  assert panels[louder][row[0]].sum() > panels[1 - louder][row[0]].sum()
  red, _, blue = picture[168 + row[louder], 50]
  assert (blue > red) == (louder == 0)  # Blue is left.


def test_the_spectrogram_of_long_sound_takes_no_more_than_its_columns():
  rate, seconds = 16_000, 120
  time = np.arange(rate * seconds) / rate
  tone = (0.3 * np.sin(2 * np.pi * 2_000 * time)).astype(np.float32)
  long_ep = np.stack([tone, np.where(time < 60, tone, 0)]).astype(np.float32)
  tracemalloc.start()
  image = logbook.spectrogram_image(long_ep, rate)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 60e6  # All spectra would be 250 MB.
  short = logbook.spectrogram_image(long_ep[:, : 2 * rate], rate)
  rows = [int(picture[:96].sum(axis=(1, 2)).argmax()) for picture in (image, short)]
  assert rows[0] == rows[1] and abs(rows[0] - 96 * 3 // 4) <= 1  # A quarter up.
  side = image[-96:][rows[0]].astype(int)  # White while both ears sound, then blue: left alone.
  assert side[100].min() > 230 and side[400][0] < 100 < side[400][2]


def test_spectrogram_of_silence_is_calm():
  picture = logbook.spectrogram_image(np.zeros((2, 1600)), 16000)
  assert np.ptp(picture[-40:], axis=(0, 1)).max() == 0
