"""A build is fit for release unless something is wrong, and then it says what."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest

from data import audit, audit_page, layout, shards, stages, tf_example, tfrecord
from launch import data as command
from spatialv2a_jax import io, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import alignment, stats
from tests.data import clips

COLUMNS = (0.15, 0.3, 0.5, 0.7, 0.85)


def build(videos: pathlib.Path, out: pathlib.Path, *options: str) -> pathlib.Path:
  arguments = ["vggsound", "--videos", videos, "--out", out, "--seconds", 1, "--jobs", 1, *options]
  assert command.main([str(argument) for argument in arguments]) == 0
  return out


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("videos")
  for n, column in enumerate(COLUMNS):
    # As most sounds, stronger in the bass: the sum of both ears combs white noise.
    bass_p = np.convolve(clips.noise(1, n, level=0.3), np.ones(16) / 16, "same").astype("f")
    clips.write(folder / f"clip{n}.mp4", audio_ep=np.stack([bass_p, bass_p]), column=column)
  return folder


@pytest.fixture(scope="module")
def made(videos, tmp_path_factory) -> pathlib.Path:
  return build(videos, tmp_path_factory.mktemp("build") / "out")


@pytest.fixture
def copy(made, tmp_path) -> pathlib.Path:
  return shutil.copytree(made, tmp_path / "copy")


def edit(folder: pathlib.Path, change) -> pathlib.Path:
  """Rewrites the records of a build; the manifest agrees with them."""
  fields = layout.read_features(folder / "raw")
  manifest = json.loads((folder / "raw" / "manifest.json").read_text())
  for shard in manifest["shards"]:
    source = tfrecord.TFRecordSource([folder / "raw" / shard["file"]])
    records = []
    for place in range(len(source)):
      raw = tf_example.decode(source[place])
      record = {name: tf_example.value_of(raw[name], fields[name]) for name in raw}
      records.append(tf_example.encode({**record, **change(record)}))
    shard["sha256"] = tfrecord.write(folder / "raw" / shard["file"], records)
  layout.write_json(folder / "raw" / "manifest.json", manifest)
  return folder


def swapped(record):
  audio_ep = np.ascontiguousarray(record["audio"][::-1])
  return {"audio": audio_ep, "cues": np.array(stages.cues(audio_ep / 32768, 16_000), np.float32)}


def judged(folder: pathlib.Path, **options) -> dict[str, bool | None]:
  found = audit.Build(folder)
  known = found.clips()
  options = {"videos": None, "twin": None, **options}
  checks = audit.checks(found, known, audit.sample(known, 0, 100), **options)
  return {check.name: check.passed for check in checks}


def named(checks: dict[str, bool | None], part: str) -> bool | None:
  (passed,) = [passed for name, passed in checks.items() if part in name]
  return passed


def test_a_good_build_is_fit(made, videos, tmp_path, capsys):
  twin = build(videos, tmp_path / "twin")
  arguments = [made, "--videos", videos, "--twin", twin, "--out", tmp_path / "page.html"]
  assert command.main(["audit", *map(str, arguments)]) == 0
  lines = capsys.readouterr().out
  assert "skipped  filtering raises the mean scores" in lines
  told = json.loads((tmp_path / "page.json").read_text())
  assert told["fit"] and all(check["passed"] in (True, None) for check in told["checks"])
  assert [check["name"] for check in told["checks"] if check["passed"] is None] == [
    "filtering raises the mean scores, by less than 0.1"
  ]
  rows = {row["name"]: row for row in told["statistics"]}
  assert rows["CE"]["mean"] is None and rows["CE"]["undefined"] == 5
  assert rows["iacc_clip"]["published"] == 0.93 and 0.3 < rows["iacc_clip"]["mean"] < 1
  page = (tmp_path / "page.html").read_text()
  assert page.count("<video") == 5 and "clip3" in page and 'src="http' not in page


def test_swapped_ears_are_caught(copy, capsys):
  """Levels are as balanced as before; only the picture can tell."""
  assert command.main(["audit", str(edit(copy, swapped)), "--clips", "0"]) == 1
  errors = capsys.readouterr().err
  assert "not fit for release: the side that is heard" in errors
  assert "not fit for release: with the ears swapped" in errors
  assert errors.count("not fit") == 2


def test_a_damaged_shard_and_another_twin_are_caught(copy, made):
  assert named(judged(copy, twin=made), "second build") is True
  edited = edit(copy, swapped)
  assert named(judged(edited, twin=made), "second build") is False
  assert named(judged(edited), "checksums of the manifest") is True
  manifest = edited / "raw" / "manifest.json"
  manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0'))
  assert named(judged(edited), "checksums of the manifest") is False


def test_a_twin_of_other_settings_is_none(copy, made):
  manifest = copy / "raw" / "manifest.json"
  content = layout.read_json(manifest)
  layout.write_json(manifest, {**content, "config": {**content["config"], "localizer": "acl"}})
  assert named(judged(copy, twin=made), "second build") is False


def test_sound_that_is_not_the_sources_is_caught(copy, videos):
  def other(record):
    noise_p = clips.noise(1, seed=99)[: record["audio"].shape[1]]
    return {"audio": np.stack([noise_p * 20_000, noise_p * 19_000]).astype(np.int16)}

  assert named(judged(copy, videos=videos), "correlates with the source") is True
  assert named(judged(edit(copy, other), videos=videos), "correlates with the source") is False


def test_videos_that_are_gone_are_left_out_and_counted(copy, videos, tmp_path):
  """One that was removed ended the audit without a result."""
  fewer, found = tmp_path / "videos", audit.Build(copy)
  shutil.copytree(videos, fewer)
  known = found.clips()
  (fewer / found.record(known.places[0])["video"]).unlink()

  def middle():
    checks = audit.checks(found, known, range(len(known.ids)), videos=fewer, twin=None)
    return next(check for check in checks if "correlates with the source" in check.name)

  assert middle().passed and "; 1 videos are gone" in middle().found
  shutil.rmtree(fewer)
  fewer.mkdir()
  assert middle().passed is None


@pytest.mark.parametrize(
  ("poor", "passed"),
  [({"PQ": 3.9, "PC": 9.0}, True), ({"PQ": 2.0}, False), ({"PQ": 3.9, "CE": 6.0}, False)],
)
def test_filtering_by_scores_raises_them_a_little(copy, videos, tmp_path, poor, passed):
  """A list scores all five clips at 4.2; one is poor, and dropped for its PQ."""
  rows = [{"id": f"clip{n}", "CE": 4.2, "CU": 4.2, "PC": 1.0, "PQ": 4.2} for n in range(5)]
  rows[2] |= poor
  lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
  (tmp_path / "scores.csv").write_text("\n".join(lines))
  build(videos, copy, "--quality-scores", str(tmp_path / "scores.csv"))
  assert named(judged(copy), "raises the mean scores") is passed


def test_pictures_are_those_of_the_records_not_of_the_names(tmp_path):
  """Ids differ from names of files, and two folders have files of one name."""
  for n, folder in enumerate(("a", "b")):
    clips.write(tmp_path / "v" / folder / "x_7.mp4", audio_ep=None, seed=n)
  clips.write(tmp_path / "v" / "b" / "y_7.mp4", audio_ep=np.zeros((2, clips.RATE), np.float32))
  (tmp_path / "list.csv").write_text("x,7,dog,train\ny,7,cat,train\n")
  out = build(tmp_path / "v", tmp_path / "out", "--labels", str(tmp_path / "list.csv"))
  funnel = json.loads((out / "funnel.json").read_text())
  assert funnel["duplicates"] == 1 and "passed over" in (out / "funnel.txt").read_text()
  assert funnel["clips"]["y_000007"]["video"] == "b/y_7.mp4"
  command.main(["audit", str(out), "--videos", str(tmp_path / "v")])
  page = (out / "audit.html").read_text()
  assert page.count("<video") == 2 and "x_000007" in page and "y_000007" in page
  assert command.main(["audit", str(out), "--videos", str(tmp_path / "nowhere")]) == 2


def test_a_card_shows_as_much_as_the_build_looked_at(tmp_path, made):
  """Of a dropped video without sound, all of it was put into the page."""
  mute = clips.write(tmp_path / "mute.mp4", 4, sound=False)
  found, drop = audit.Build(made), {"reason": "no_sound", "stage": "probe", "detail": "none"}
  card = audit_page._dropped("mute", drop, found, mute, "motion")
  assert f'data-frames="{schema.CLIP_FPS}"' in card
  record = found.record(found.clips().places[0])
  track = "track:somewhere.csv"
  assert "<canvas" in audit_page._kept(record, found, mute, track)
  never = record | {"located": np.zeros_like(record["located"])}
  assert "<canvas" not in audit_page._kept(never, found, mute, track)


@pytest.fixture(scope="module")
def corpus(made) -> audit.Clips:
  """A balanced corpus of 200 clips."""
  rng = np.random.default_rng(0)
  cues_nk = np.ones((200, len(stages.CUES)), np.float32)
  cues_nk[:, stages.CUES.index("ild_clip_db")] = rng.normal(0, 0.5, 200)
  cues_nk[:, stages.CUES.index("itd_phat_frame_us")] = 300
  flags_n = np.zeros(200, bool)
  return audit.Clips(
    [f"clip{n}" for n in range(200)], [("train", n) for n in range(200)], cues_nk,
    np.full((200, 4), np.nan, np.float32), np.full(200, 32767), flags_n, flags_n,
  )  # fmt: skip


def with_cue(corpus: audit.Clips, name: str, value, rows: Any = slice(None)) -> audit.Clips:
  cues_nk = corpus.cues_nk.copy()
  cues_nk[rows, stages.CUES.index(name)] += value
  return dataclasses.replace(corpus, cues_nk=cues_nk)


@pytest.mark.parametrize(
  ("check", "fault"),
  [
    (audit._sides, lambda c: with_cue(c, "side_energy_ratio", 0.009**2 - 1, rows=7)),
    (audit._delays, lambda c: with_cue(c, "itd_phat_frame_us", 501, rows=slice(3))),
    (audit._delays, lambda c: with_cue(c, "itd_phat_frame_us", -1101, rows=slice(3))),
    (audit._levels, lambda c: with_cue(c, "ild_clip_db", np.nan, rows=7)),
    (audit._levels, lambda c: dataclasses.replace(c, peak_n=np.full(200, 32768))),
  ],
)
def test_one_fault_fails_one_check(corpus, check, fault):
  assert check(corpus).passed is True
  assert check(fault(corpus)).passed is False


def test_what_is_just_within_the_limits_passes(corpus):
  assert audit._sides(with_cue(corpus, "side_energy_ratio", 0.011**2 - 1)).passed
  assert audit._delays(with_cue(corpus, "itd_phat_frame_us", 501, rows=slice(2))).passed


@pytest.mark.parametrize("bias_db", [0.9, -0.9])
def test_bias_fails_the_balance(corpus, bias_db):
  mean, side = audit._balance(corpus)
  assert mean.passed and side.passed
  mean, side = audit._balance(with_cue(corpus, "ild_clip_db", bias_db))
  assert mean.passed is False and side.passed is False


def test_statistics_are_of_what_is_known(corpus):
  value_n = np.where(np.arange(200) <= 100, np.arange(200.0) ** 2, np.nan)
  rows = audit.statistics(with_cue(corpus, "isd_l1", value_n - 1))
  (row,) = [row for row in rows if row["name"] == "isd_l1"]
  assert (row["low"], row["median"], row["high"]) == (25, 2500, 9025)
  assert row["mean"] == pytest.approx(3350) and row["undefined"] == 99


def test_a_sample_is_drawn_by_seed_and_has_each_clip_once(corpus):
  drawn = [audit.sample(corpus, seed, 50) for seed in (0, 0, 1)]
  assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 50
  assert audit.sample(corpus, 1, 500) == list(range(200))


def test_the_command_hears_and_shows_as_many_as_it_is_told_drawn_by_seed(
  made, tmp_path, monkeypatch
):
  asked, shown, sample = [], set(), audit.sample
  monkeypatch.setattr(audit, "sample", lambda *given: asked.append(given[1:]) or sample(*given))
  for seed in range(4):
    page = tmp_path / f"{seed}.html"
    options = ["--sample=2", "--clips=1", f"--seed={seed}", f"--out={page}"]
    command.main(["audit", str(made), *options])
    (clip,) = re.findall("<h3>(clip.)", page.read_text())
    shown.add(clip)
  assert asked == [(seed, 2) for seed in range(4)] and len(shown) > 1


def test_only_what_is_in_the_middle_comes_from_straight_ahead(made):
  known = audit.Build(made).clips()
  assert [known.ids[n] for n in np.flatnonzero(known.frontal_n)] == ["clip2"]
  assert known.direct_n.all()


def test_most_sources_must_be_kept(tmp_path):
  assert audit._middle([0.2, 0.95, 0.95, math.nan], tmp_path).passed is True
  assert audit._middle([0.95, 0.2, 0.2, math.nan], tmp_path).passed is False


@pytest.mark.parametrize(("channels", "kind"), [((1, 1), "dual_mono"), ((1, -1), "antiphase")])
def test_a_source_is_known_again_a_little_early_or_late(made, tmp_path, channels, kind):
  found, source_p = audit.Build(made), clips.noise(1)
  io.write_audio(tmp_path / "a.wav", np.outer(channels, source_p).astype("f"), clips.RATE)

  def kept(shift: int) -> float:
    audio_ep = np.roll(source_p * 32_000, shift)[None].repeat(2, 0)
    record = {"audio": audio_ep.astype(np.int16), "video": "a.wav", "layout": kind}
    return audit._kept_of_source(found, record, tmp_path)

  assert min(kept(shift) for shift in (-75, 0, 75)) > 0.98
  assert max(kept(shift) for shift in (-100, 100)) < 0.1


def test_sound_of_another_rate_is_heard_at_16_khz(made):
  found = audit.Build(made)
  time_p = np.arange(found.rate) / found.rate
  tone_p, octave_p = (9000 * np.sin(2 * np.pi * hertz * time_p) for hertz in (500, 1000))
  found.rate *= 2  # The same samples are half as long and an octave up.
  heard_ep = 32768 * found.sound({"audio": np.outer([1, 0.5], tone_p).astype(np.int16)})
  wanted_ep = np.outer([1, 0.5], octave_p[: len(octave_p) // 2])
  np.testing.assert_allclose(heard_ep[:, 500:-500], wanted_ep[:, 500:-500], atol=50)


def test_mono_is_right_straight_ahead(corpus):
  mono = with_cue(corpus, "side_energy_ratio", -1)
  assert audit._sides(mono).passed is False
  ahead = dataclasses.replace(mono, frontal_n=np.ones(200, bool))
  assert audit._sides(ahead).passed is True


@pytest.mark.parametrize(("kept", "passed"), [(188, True), (150, False), (200, False)])
def test_the_share_of_kept_clips(kept, passed):
  funnel = {"files": 210, "kept": kept, "dropped": {"unlisted": 10}}
  assert audit._kept(funnel).passed is passed


def test_what_cannot_be_audited_is_said(tmp_path, made):
  with pytest.raises(UserError, match="no shards in"):
    audit.Build(tmp_path)
  shards.build([shards.Item("a", 0)], lambda _: {"x": np.zeros(2)}, tmp_path / "raw", shards=1,
               config={})  # fmt: skip
  with pytest.raises(UserError, match="have no .*audio.*vggsound"):
    audit.Build(tmp_path)
  assert command.main(["audit", str(made), "--sample", "-1"]) == 2


def test_a_frame_tells_where_things_are_in_its_middle():
  """Between 1/8 s too early and 1/8 s too late the sound follows a quick track best in time."""
  seconds, time_p = 4, np.arange(4 * clips.RATE) / clips.RATE
  middle_v = (np.arange(8 * seconds) + 0.5) / 8
  azimuth_v = 60 * np.sin(2 * np.pi * 0.9 * middle_v)
  noise_p = clips.noise(seconds)

  def followed(late_s: float) -> float:
    level_p = 10 ** (np.interp(time_p - late_s, middle_v, azimuth_v) / 20 / 20)
    moments = audit._followed(np.stack([noise_p * level_p, noise_p / level_p]), azimuth_v)
    metric = alignment.METRICS["azimuth_pearson_r"]
    return float(stats.pooled(metric, [moments], np.ones((1, 1)))[0])

  early, right, late = (followed(late_s) for late_s in (-0.125, 0, 0.125))
  assert right > 0.999 and abs(early - late) < 0.05 < right - max(early, late)
  plot = audit_page._plot(np.zeros((2, clips.RATE), np.float32), azimuth_v[:8])
  assert 'points="6.25,' in plot and " 93.75," in plot


def test_left_is_at_the_top_of_the_plot():
  noise_p = clips.noise(1)
  plot = audit_page._plot(np.stack([noise_p, 0.3 * noise_p]), np.full(8, 45.0))
  heights = [float(height) for height in re.findall(r'cy="([-.\d]+)"', plot)]
  assert ' 93.75,9.00"' in plot and heights and max(heights) < 18


def test_labels_and_reasons_are_no_markup():
  card = audit_page._card("<a>", "<b>dog</b>", "", {"detail": "<i>"})
  assert not re.search("<[abi]>", card) and "&lt;b&gt;dog" in card
