"""What became of every clip, and what each stage cost: the reports of a build."""

import collections
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from data import catalogue, filters, findings, layout, shards
from spatialv2a_jax import io

ALL_OF_VGGSOUND = 199_000
_FILES = ("coverage.json", "funnel.json", "funnel.txt", "throughput.json")


def write(
  out: pathlib.Path, known: catalogue.Catalogue, jobs: Sequence[shards.Job], whole: bool = True
) -> dict[str, Any]:
  """Writes the four reports of a build, of as many slices as are done.

  What an earlier build left (of another cut, other settings, other files) is none of this one.

  Args:
    out: folder of the build.
    known: list and folder.
    jobs: the shards of the build.
    whole: nobody else works on the build: what killed runs left of the reports is removed.

  Returns:
    The content of `funnel.json`.
  """
  if whole:
    for name in _FILES:
      io.remove_leftovers(out / name)
  done = [(job, info) for job in jobs if (info := shards.finished(job))]
  infos = [info for _, info in done]
  names = {item.payload.slice_name for job, _ in done for item in job.items}
  made = {name for info in infos for name in info.get("ids", ())}
  bad = {name: why for info in infos for name, why in info.get("bad", {}).items()}
  summaries = [layout.read_json(out / "slices" / name / "summary.json") for name in sorted(names)]
  funnel = count(known, made, bad)
  for field in ("spatializer", "layout"):
    counts = sum((collections.Counter(one.get(field)) for one in summaries), collections.Counter())
    funnel[field] = dict(sorted(counts.items()))
  layout.write_json(out / "coverage.json", known.coverage())
  layout.write_json(out / "funnel.json", funnel)
  with io.atomic_path(out / "funnel.txt") as temporary:
    pathlib.Path(temporary).write_text(table(funnel) + "\n")
  layout.write_json(out / "throughput.json", throughput(summaries))
  return funnel


def count(known: catalogue.Catalogue, made: set[str], bad: Mapping[str, str]) -> dict[str, Any]:
  """Returns how many clips were kept, and which were dropped for which reason.

  Args:
    known: list and folder.
    made: ids of the records.
    bad: "reason: detail" of each dropped clip.
  """
  drops, files = {}, {clip.id: clip.name for clip in known.clips}
  for name, why in sorted(bad.items()):
    reason, _, detail = why.partition(": ")
    reason, detail = (reason, detail) if reason in filters.REASONS else ("failed", why)
    drops[name] = {"reason": reason, "stage": filters.REASONS[reason][0], "detail": detail}
    drops[name]["video"] = files.get(name)
  reasons = {reason: 0 for reason in filters.REASONS}
  for drop in drops.values():
    reasons[drop["reason"]] += 1
  failures = sum(reasons[reason] for reason in filters.FAILURES)
  return {
    "listed": sum(known.sizes.values()),
    "missing": len(known.missing),
    "duplicates": len(known.duplicates),
    "files": len(known.clips),
    "kept": len(made),
    "dropped": reasons,
    "waiting": len(known.clips) - len(made) - len(drops),
    "failures": failures,
    "clips": drops,
  }


def table(funnel: Mapping[str, Any]) -> str:
  """Returns the funnel as text: from listed to kept, every reason with its number."""
  rows = [
    ("listed", funnel["listed"], ""),
    ("  missing", -funnel["missing"], "in the list, not in the folder"),
    ("files", funnel["files"], ""),
  ]
  if funnel.get("duplicates"):
    rows.insert(2, ("  passed over", funnel["duplicates"], "files of an id that another file has"))
  for reason, (stage, text) in filters.REASONS.items():
    if funnel["dropped"][reason]:
      rows.append((f"  {reason}", -funnel["dropped"][reason], f"{text} ({stage})"))
  if funnel["waiting"]:
    rows.append(("  waiting", -funnel["waiting"], "in slices that are not done"))
  rows.append(("kept", funnel["kept"], ""))
  for name, number in funnel["spatializer"].items():
    share = number / max(1, funnel["kept"])
    rows.append((f"  {name}", number, f"{share:.0%} of them"))
  width = max(len(f"{number:,}") for _, number, _ in rows)
  return "\n".join(f"{name:<12} {number:>{width},}  {text}".rstrip() for name, number, text in rows)


def throughput(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns of each stage clips per second of one core, the slowest, and hours for VGGSound.

  Args:
    summaries: "seconds" and "clips" by stage, of each slice.
  """
  table = {}
  for stage in findings.STAGES:
    clips = sum(one.get("clips", {}).get(stage, 0) for one in summaries)
    seconds = sum(one.get("seconds", {}).get(stage, 0.0) for one in summaries)
    rate = clips / seconds if seconds else None
    table[stage] = {"clips": clips, "core_seconds": seconds, "clips_per_core_second": rate}
  total = sum(row["core_seconds"] for row in table.values())
  clips = max(row["clips"] for row in table.values())
  slowest = max(findings.STAGES, key=lambda stage: table[stage]["core_seconds"])
  return {
    "stages": table,
    "bottleneck": slowest if total else None,
    "clips_per_core_second": clips / total if total else None,
    "core_hours_for_199000_clips": ALL_OF_VGGSOUND * total / clips / 3600 if clips else None,
  }


def speed(out: pathlib.Path) -> str:
  """Returns one line on the speed of a build."""
  found = layout.read_json(out / "throughput.json")
  if not found.get("bottleneck"):
    return "no clip was processed"
  per_stage = ", ".join(
    f"{stage} {row['clips_per_core_second']:.3g}"
    for stage, row in found["stages"].items()
    if row["clips_per_core_second"]
  )
  return (
    f"clips per second and core: {found['clips_per_core_second']:.3g} ({per_stage}); bottleneck:"
    f" {found['bottleneck']}; {found['core_hours_for_199000_clips']:.0f} core hours for"
    f" {ALL_OF_VGGSOUND:,} such clips"
  )


def tidy(out: pathlib.Path, work: Sequence[shards.Item]) -> None:
  """Removes slices of an earlier cut of a build that is complete again.

  Args:
    out: folder of the build, on which nobody else works.
    work: the clips of the build.
  """
  names = {item.payload.slice_name for item in work}
  for folder in (out / "slices").glob("*-of-*"):
    if folder.name not in names:
      shutil.rmtree(folder)
