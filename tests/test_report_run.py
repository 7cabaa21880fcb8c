"""The page of a training run: what it reads, and what it does with runs that left less."""

import itertools
import json

import numpy as np
import pytest
from tensorboardX import event_file_writer

from spatialv2a_jax import cli, goodput, logbook, report_run
from spatialv2a_jax.errors import UserError
from tests.test_report import payload


def write_run(folder, steps=200):
  """A working directory as training leaves it, with a spike, evaluations and sound."""
  spent = dict.fromkeys(goodput.PHASES, 0.0) | {"init": 5.0, "compile": 20.0}
  with logbook.Logbook(folder) as book:
    for step in range(10, steps + 1, 10):
      spent["step"] += 9.0
      spent["data"] += 1.0
      total = sum(spent.values())
      book.scalars(
        step,
        {
          "loss": 2 + 100 / step,
          "loss/left": 1 + 50 / step,
          "loss/right": 1 + 50 / step,
          "grad_norm": 1.0,
          "lr": 1e-4 * min(1, step / 50),
          "clips_per_s": 16.0,
          "tokens_per_s": 8000.0,
          "data_wait": 0.1,
          "mfu": float("nan"),
          "param_norm": 10 + step / 100,
          "skipped": float(step > 100),
          "bad_records": 0.0,
          "goodput": spent["step"] / total,
          "goodput/wall_s": total,
          **{f"goodput/{name}_s": value for name, value in spent.items()},
        },
      )
      if step % 100 == 0:
        book.scalars(step, {"eval/loss": 2.5 - (step == 100), "eval/loss/left": 1.2})
        tone = 0.1 * np.sin(np.arange(8000) * step / 100).astype("f4")
        book.audio(step, "clip 0/generated", np.stack([tone, 0.5 * tone]), 16000)
    for name in ("clip 0/truth", "clip 1/truth"):  # Of clip 1 nothing new was made.
      book.audio(100, name, np.zeros((2, 8000), "f4") + 0.1, 16000)
  (folder / "config.json").write_text(json.dumps({"steps": 400, "kind": "flow"}))
  for name in ("100", "200", "300.orbax-checkpoint-tmp"):
    (folder / "checkpoints" / name).mkdir(parents=True)
  (folder / "faults").mkdir()
  about = {"step": 101, "reason": "loss nan: not finite", "clips": [1]}
  (folder / "faults" / "step-00000101.json").write_text(json.dumps(about))
  return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp("run"))


def test_the_page_shows_what_the_run_left(run, tmp_path):
  assert cli.main(["report", str(run), "--out", str(tmp_path / "run.html")]) == 0
  got = payload(tmp_path / "run.html")["run"]
  titles = [figure["title"] for figure in got["figures"]]
  assert titles[:3] == [
    "Loss, both ears and each ear",
    "Held-out loss of the averaged weights",
    "Gradient norm",
  ]
  assert "Tokens per second" in titles
  assert "Share of the devices' peak FLOP/s" not in titles  # Unknown here: nothing to draw.
  assert got["figures"][1]["series"]["eval/loss"] == {"x": [100, 200], "y": [1.5, 2.5]}
  assert [figure["title"] for figure in got["more"]] == ["bad records", "param norm", "skipped"]
  facts = got["summary"]
  assert facts["Step"] == "200 of 400, not finished"
  assert facts["Held-out loss"] == "2.5; best 1.5 at step 100"
  assert facts["Goodput"] == "80.0 % of 3.8 min" and facts["Updates left out"] == "1"
  assert facts["Checkpoints"] == "2, the newest of step 200"
  assert got["checkpoints"] == [100, 200]
  assert got["skipped"] == [{"step": 101, "reason": "loss nan: not finite"}]


def test_the_time_of_all_phases_is_that_of_the_newest_ledger(run):
  got = report_run.read(run)
  assert got is not None
  phases = {one["phase"]: one["seconds"] for one in got["goodput"]}
  assert phases == {"init": 5.0, "compile": 20.0, "step": 180.0, "data": 20.0}


def test_sound_is_that_of_the_newest_evaluation_and_its_truth(run):
  got = report_run.read(run)
  assert got is not None
  sounds = {one["name"]: one for one in got["sounds"]}
  assert {name: one["step"] for name, one in sounds.items()} == {
    "clip 0, generated": 200,
    "clip 0, truth": 100,
  }
  made = sounds["clip 0, generated"]
  assert made["audio"].startswith("data:audio/wav;base64,UklGR")  # RIFF
  assert made["spectrogram"].startswith("data:image/png;base64,")


def test_what_a_run_wrote_before_it_was_resumed_at_an_earlier_step_is_void(tmp_path, monkeypatch):
  """In the report as in TensorBoard, which reads the same mark."""
  tone = np.zeros((2, 8000), "f4") + 0.1
  clock = itertools.count(1_000_000)
  monkeypatch.setattr(event_file_writer.time, "time", lambda: next(clock))  # Names the files.
  for first, steps in ((1, (50, 100, 150)), (101, (120,))):  # Killed, resumed at step 100.
    with logbook.Logbook(tmp_path, first) as book:
      for step in steps:
        book.scalars(step, {"loss": 1.0})
        book.audio(step, "clip", tone, 16000)
  paths = sorted(tmp_path.glob("events.out.tfevents.*"))
  begins = [step for path in paths for step, _, kind, _ in report_run._events(path)
            if kind == report_run._BEGIN]  # fmt: skip
  assert len(paths) == 2 and begins == [1, 101]
  got = report_run.read(tmp_path)
  assert got is not None and [one["step"] for one in got["sounds"]] == [120]
  before = report_run._sounds(tmp_path)
  with logbook.Logbook(tmp_path, 101):  # Killed again, before it had evaluated.
    pass
  (first,) = report_run._sounds(tmp_path)
  assert first["step"] == 100
  with logbook.Logbook(tmp_path, 101) as book:  # The evaluation of step 100 is done again.
    book.audio(100, "clip", 2 * tone, 16000)
  (again,) = report_run._sounds(tmp_path)
  assert again["step"] == 100 and again["audio"] not in (first["audio"], before[0]["audio"])
  with logbook.Logbook(tmp_path, 50):  # All attempts before it wrote theirs from there on.
    pass
  assert report_run._sounds(tmp_path) == []


def test_an_event_file_cut_short_is_read_as_far_as_it_goes(run, tmp_path):
  (events,) = run.glob("events.out.tfevents.*")
  whole = list(report_run._events(events))
  short = tmp_path / "short"
  short.write_bytes(events.read_bytes()[:-100])
  assert list(report_run._events(short)) == whole[:-1]


def test_a_run_of_an_older_version_is_drawn_as_far_as_it_goes(tmp_path):
  rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None, "lr": 1.0}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  got = report_run.read(tmp_path)
  assert got is not None and [figure["title"] for figure in got["figures"]] == [
    "Loss, both ears and each ear"
  ]
  assert got["summary"] == {"Step": "3", "Loss": "2"}
  assert not any(got[name] for name in ("more", "goodput", "checkpoints", "skipped", "sounds"))
  assert report_run.read(tmp_path / "absent") is None
  (tmp_path / "config.json").write_text('{"clip": Infinity}')  # What no browser would parse.
  assert report_run.read(tmp_path)["config"] == {"clip": "Infinity"}
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="cannot read .*config.json"):
    report_run.read(tmp_path)


def test_facts_are_those_of_the_whole_run(tmp_path):
  speed, held_out = (1.0, 2.0, 3.0, 50.0, 100.0), (2.0, 3.0, 1.5, 4.0, 2.5)
  rows = [
    {"step": 1000 * (i + 1), "loss": 5.0 - i, "eval/loss": held_out[i], "lr": 0.1,
     "clips_per_s": speed[i], "tokens_per_s": 1e3 * speed[i], "skipped": float(i),
     "bad_records": 2.0 * i, "goodput": 0.1 * i, "goodput/wall_s": 9000.0 * i}
    for i in range(5)
  ]  # fmt: skip
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for folder, names in (("checkpoints", (900, 1000)), ("averages", (900, 1000, 10_000))):
    for name in names:
      (tmp_path / folder / str(name)).mkdir(parents=True)
  (tmp_path / "faults").mkdir()
  for step in (30, 7):
    (tmp_path / "faults" / f"step-{step:08d}.json").write_text(json.dumps({"step": step}))
  got = report_run.read(tmp_path)
  assert got is not None and got["summary"] == {
    "Step": "5,000",
    "Loss": "1",
    "Held-out loss": "2.5; best 1.5 at step 3,000",
    "Speed": "3 clips/s in the median, 3,000 tokens/s",
    "Goodput": "40.0 % of 10.0 h",
    "Updates left out": "4",
    "Damaged records": "8",
    "Checkpoints": "2, the newest of step 1,000",
    "Snapshots of averages": "3, up to step 10,000",
  }
  assert [one["step"] for one in got["skipped"]] == [7, 30]
  begins = {figure["title"]: figure["zero"] for figure in got["figures"]}
  assert begins["Learning rate"] and begins["Clips per second"]
  assert not begins["Loss, both ears and each ear"]  # Its small changes are what one looks for.


def test_a_curve_of_too_many_points_is_drawn_by_means(monkeypatch):
  monkeypatch.setattr(report_run, "POINTS", 2)
  rows = [{"step": step, "loss": step**2} for step in range(1, 6)]
  assert report_run._series(rows, "loss") == {"x": [3, 5], "y": [4.66667, 20.5]}


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.4, "0 s"), (119, "119 s"), (120, "2.0 min"), (7199, "120.0 min"),
    (7200, "2.0 h"), (172_799, "48.0 h"), (172_800, "2.0 days"),
  ],
)  # fmt: skip
def test_a_duration_has_the_unit_of_which_there_are_two(seconds, text):
  assert report_run._duration(seconds) == text


def test_a_run_that_goes_on_beyond_its_end_is_not_finished(tmp_path):
  write_run(tmp_path)
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text("{}")
  facts = report_run.read(tmp_path)["summary"]
  assert facts["Step"] == "200 of 400, not finished"
  (tmp_path / "config.json").write_text(json.dumps({"steps": 200}))
  assert report_run.read(tmp_path)["summary"]["Step"] == "200 of 200, finished"


def test_bytes_that_a_disk_garbled_cost_their_lines_alone(tmp_path):
  write_run(tmp_path)
  whole = report_run.read(tmp_path)
  with open(tmp_path / "metrics.jsonl", "ab") as file:
    file.write(b'{"step": 1\xff\xfe\n')
  (events,) = tmp_path.glob("events*")
  head = events.read_bytes()
  for damage in (b"\x05" + bytes(7) + b"crc." + b"\xff" * 9, b"\xff" * 40):
    events.write_bytes(head + damage)
    found = report_run.read(tmp_path)
    assert found["figures"] == whole["figures"] and found["sounds"] == whole["sounds"]
  assert len(logbook.read_metrics(tmp_path)) == 22
