"""What became of clips, and what each stage cost."""

import pathlib

import pytest

from data import catalogue, findings, funnel, layout

CLIPS = [catalogue.Clip(name, "", "train", f"/v/{name}.mp4", f"{name}.mp4", "1") for name in "abcd"]


def run(folder: pathlib.Path, config: dict[str, int]) -> tuple[findings.Findings, findings.Clock]:
  """A stage that fails at one clip and takes a while at each."""

  def work(job: findings.Job) -> dict[str, int]:
    if job.clip.id == "b":
      raise ValueError(f"{job.clip.path} is\nodd")
    return {"sum": sum(range(20_000))}

  clock = findings.Clock()
  jobs = [findings.Job(clip, "train-00000-of-00001", {}, {}) for clip in CLIPS]
  return findings.Run(folder, clock).stage("probe", jobs, config, work), clock


def test_what_a_stage_found_is_kept_with_what_it_cost(tmp_path):
  found, clock = run(tmp_path, {"x": 1})
  assert found["b"] == {"drop": ["failed", "ValueError: b.mp4 is odd"]}
  assert clock.clips["probe"] == 4 and clock.seconds["probe"] > 0
  again, later = run(tmp_path, {"x": 1})
  assert again == found and (later.seconds, later.clips) == (clock.seconds, clock.clips)


def test_every_clip_has_a_reason_to_be_gone_or_waits():
  known = catalogue.Catalogue(tuple(CLIPS), ("gone",), ("again.mp4",), {"train": 5})
  found = funnel.count(known, {"a"}, {"b": "short: 1 s", "c": "ValueError: odd"})
  assert found["clips"]["b"] == {
    "reason": "short", "stage": "probe or filter", "detail": "1 s", "video": "b.mp4",
  }  # fmt: skip
  assert found["clips"]["c"]["reason"] == "failed"
  assert found["clips"]["c"]["detail"] == "ValueError: odd"
  counts = {name: found[name] for name in ("listed", "missing", "duplicates", "files", "kept")}
  assert counts == {"listed": 5, "missing": 1, "duplicates": 1, "files": 4, "kept": 1}
  assert (found["waiting"], found["failures"]) == (1, 1)
  lines = funnel.table({**found, "spatializer": {"sphere": 1}}).splitlines()
  number = {line.split()[0]: int(line.split()[1]) for line in lines if "passed over" not in line}
  drops = number["short"] + number["failed"] + number["waiting"]
  assert number["files"] + drops == number["kept"] and number["listed"] + number["missing"] == 4


def test_speed_is_clips_by_all_seconds_of_one_core(tmp_path):
  one = {
    "clips": {"probe": 40, "encode": 20},
    "seconds": {"probe": 2.0, "encode": 8.0},
  }  # Of a slice.
  found = funnel.throughput([one, one])
  assert found["stages"]["probe"] == {
    "clips": 80, "core_seconds": 4.0, "clips_per_core_second": 20.0,
  }  # fmt: skip
  assert found["bottleneck"] == "encode" and found["clips_per_core_second"] == 4
  assert found["core_hours_for_199000_clips"] == pytest.approx(199_000 / 4 / 3600)
  layout.write_json(tmp_path / "throughput.json", found)
  assert funnel.speed(tmp_path) == (
    "clips per second and core: 4 (encode 2.5, probe 20); bottleneck: encode; 14 core hours for"
    " 199,000 such clips"
  )
  layout.write_json(tmp_path / "throughput.json", funnel.throughput([]))
  assert funnel.speed(tmp_path) == "no clip was processed"
