"""Procedural scenes: determinism, mirror, and agreement of picture, sound and truth."""

import collections
import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from data import scene_plan, scene_sounds, scene_visuals, scenes
from launch import data as command
from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from tests.spatial.test_hrtf import sphere_set, write_sofa

SMALL = {"size": (48, 80), "seconds": 2.0}
RATE = 16_000


def digests(folder):
  return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def run(out, *flags):
  common = ["scenes", "--out", str(out), "--seconds", "1", "--size", "32x48", "--seed", "9"]
  return command.main([*common, *map(str, flags)])


@pytest.fixture(scope="module")
def many():
  """Clips of one source for every class, and a random lot."""
  one = {"seconds": 3.0, "size": (64, 106)}
  alone = {c: [scenes.make(5, i, classes=(c,), **one) for i in range(3)] for c in scenes.CLASSES}
  return alone, [scenes.make(6, i, **SMALL) for i in range(40)]


def test_bytes_do_not_depend_on_range_jobs_or_time(tmp_path):
  a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
  assert run(a, "--clips", 3, "--jobs", 1) == 0
  assert run(b, "--clips", 3, "--jobs", 2) == 0
  assert run(c, "--clips", 1, "--start", 2, "--jobs", 1) == 0
  assert len(digests(a)) == 9 and digests(a) == digests(b)
  assert digests(c).items() <= digests(a).items()


def test_other_seed_or_index_is_another_clip():
  clips = [scenes.make(s, i, **SMALL) for s, i in ((0, 0), (0, 1), (1, 0))]
  assert len({c.audio.tobytes() for c in clips}) == len({c.frames.tobytes() for c in clips}) == 3


def test_complete_clips_are_kept_and_torn_ones_made_again(tmp_path, capsys):
  assert run(tmp_path, "--clips", 2, "--jobs", 1) == 0
  before = digests(tmp_path)
  kept = (tmp_path / "scene_9_000000.mp4").stat().st_mtime_ns
  (tmp_path / "scene_9_000001.json").unlink()
  (tmp_path / ".scene_9_000001.0123abcd.mp4").touch()  # As a kill leaves it.
  assert run(tmp_path, "--clips", 2, "--jobs", 1) == 0
  assert digests(tmp_path) == before
  assert (tmp_path / "scene_9_000000.mp4").stat().st_mtime_ns == kept
  head = write_sofa(tmp_path.parent / "head.sofa", *sphere_set())
  for change in (
    ("--sample-rate", 8000), ("--seconds", 2), ("--size", "32x64"), ("--hrtf", f"sofa:{head}")
  ):  # fmt: skip
    assert run(tmp_path, "--clips", 2, *change) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
  "flags",
  [
    ("--clips", 0),
    ("--clips", 1, "--jobs", 0),
    ("--clips", 1, "--seed", -1),
    ("--clips", 1, "--start", -1),
    ("--clips", 2, "--start", 2**32 - 1),
    ("--clips", 1, "--seconds", 0),
    ("--clips", 1, "--seconds", "nan"),
    ("--clips", 1, "--seconds", 1.01),
    ("--clips", 1, "--size", "33x48"),
    ("--clips", 1, "--sample-rate", 16001),
    ("--clips", 1, "--hrtf", "sofa:missing.sofa"),
    ("--clips", 1, "--hrtf", "cube"),
  ],
)
def test_bad_values_are_one_line_and_leave_nothing(tmp_path, capsys, flags):
  assert run(tmp_path / "out", *flags) == 2
  assert len(capsys.readouterr().err.strip().splitlines()) == 1
  assert not (tmp_path / "out").exists()


def test_workers_do_not_import_jax():
  code = "import sys, data.scenes, launch.data; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_mirror_flips_everything_and_twice_is_identity(tmp_path):
  turned = 0
  for index in range(12):
    plain = scenes.make(6, index, **SMALL)
    other = scenes.make(6, index, mirror=True, **SMALL)
    assert np.array_equal(other.audio, plain.audio[::-1])
    assert np.array_equal(other.frames, plain.frames[:, :, ::-1])
    assert other.truth["id"] == plain.truth["id"] + "_m"
    yaw, other_yaw = (np.array(clip.truth["camera"]["yaw_deg"]) for clip in (plain, other))
    np.testing.assert_array_equal(other_yaw, -yaw)
    turned += yaw.any()
    for a, b in zip(plain.truth["sources"], other.truth["sources"], strict=True):
      assert a["azimuth_deg"] == [-x for x in b["azimuth_deg"]]
      np.testing.assert_allclose(np.add(a["pixel_x"], b["pixel_x"]), 1, atol=2e-6)
      assert a["level_db"] == b["level_db"] and a["onsets_s"] == b["onsets_s"]
    for a, b in zip(plain.truth["azimuth_deg"], other.truth["azimuth_deg"], strict=True):
      assert a is b is None or a == -b
    assert scenes.mirror_truth(other.truth) == plain.truth
  assert turned
  assert run(tmp_path, "--clips", 1, "--mirror") == 0
  left, right = io.read_audio(tmp_path / "scene_9_000000_m.wav")
  plain = scenes.make(9, 0, 1.0, size=(32, 48))
  assert np.array_equal(np.stack([right, left]), plain.audio)


def test_files_hold_what_was_made(tmp_path):
  scene = scenes.make(6, 3, 1.0)
  scenes.write(scene, tmp_path)
  stem = tmp_path / scene.truth["id"]
  assert np.array_equal(io.read_audio(f"{stem}.wav"), scene.audio)
  np.testing.assert_allclose(io.read_audio(f"{stem}.mp4"), scene.audio, atol=2**-23)
  info = io.probe(f"{stem}.mp4")
  assert (info.fps, info.height, info.width, info.audio_rate) == (25, 96, 160, RATE)
  seen = io.read_video(f"{stem}.mp4", 25)
  assert seen.shape == scene.frames.shape
  assert np.abs(seen.astype(float) - scene.frames).mean() < 6
  assert json.loads((tmp_path / f"{scene.truth['id']}.json").read_text()) == scene.truth


def test_truth_schema(many):
  for scene in many[1]:
    truth, frames = scene.truth, len(scene.frames)
    assert frames == 50 and scene.audio.shape == (2, 2 * RATE) and scene.audio.dtype == np.float32
    assert truth["fps"] == 25 and truth["size"] == [48, 80] and truth["hrtf"] == "sphere"
    assert truth["camera"]["hfov_deg"] == 120 and truth["camera"]["law"] == "linear"
    assert len(truth["camera"]["yaw_deg"]) == len(truth["azimuth_deg"]) == frames
    assert 1 <= len(truth["sources"]) == len(truth["labels"]) <= 3
    for label, source in zip(truth["labels"], truth["sources"], strict=True):
      assert source["class"] == label and source["caption"] in truth["caption"]
      for track in ("azimuth_deg", "distance_m", "level_db", "visible", "pixel_x"):
        assert len(source[track]) == frames
      column = np.array(source["pixel_x"])
      np.testing.assert_allclose((0.5 - column) * 120, source["azimuth_deg"], atol=1e-3)
      assert source["visible"] == [0 <= u <= 1 for u in column]
      assert 0.7 <= min(source["distance_m"]) and max(source["distance_m"]) <= 4
      assert all(np.isclose(o * 25, round(o * 25)) for o in source["onsets_s"])
      assert source["onsets_s"] == sorted(set(source["onsets_s"]))
    level = np.array([source["level_db"] for source in truth["sources"]])
    silent = (level == -120).all(0)
    assert [a is None for a in truth["azimuth_deg"]] == silent.tolist()
    azimuth = np.array([source["azimuth_deg"] for source in truth["sources"]])
    power = np.where(level > -120, 10 ** (level / 10), 0)[:, ~silent]
    expected = (power * azimuth[:, ~silent]).sum(0) / power.sum(0)
    found = [a for a in truth["azimuth_deg"] if a is not None]
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_variety_and_bounds(many):
  clips = many[1]
  peak = max(np.abs(c.audio).max() for c in clips)
  assert all(np.isfinite(c.audio).all() for c in clips) and 0.1 < peak < 1
  counts = collections.Counter(len(c.truth["sources"]) for c in clips)
  assert counts[1] > counts[2] > 0
  assert len({label for c in clips for label in c.truth["labels"]}) >= 8
  azimuth = np.concatenate([s["azimuth_deg"] for c in clips for s in c.truth["sources"]])
  assert np.abs(azimuth).max() < 90 and (azimuth > 30).mean() > 0.1 < (azimuth < -30).mean()
  assert (np.abs(azimuth) > 60).any()
  assert any(np.ptp(c.truth["camera"]["yaw_deg"]) > 5 for c in clips)


def test_classes_sound_different():
  """Mean spectra of any two classes correlate less than those of two sources of one class."""
  rate, spectra = RATE, {}
  for kind in scene_plan.KINDS:
    event = scene_plan.Event(0, kind.length[1], 1.0, 0)
    for trial in range(2):
      rng = np.random.default_rng(trial)
      wave = scene_sounds.synthesise(kind, [event], rng, rate, 2 * rate)
      assert np.isfinite(wave).all() and np.abs(wave).max() == pytest.approx(kind.peak, rel=0.01)
      assert np.abs(wave[: rate // 100]).max() > 0.2 * kind.peak  # the attack comes at once
      level = np.abs(np.fft.rfft(wave[: kind.length[1] * rate // 25], 2 * rate))
      bands = np.add.reduceat(level, np.geomspace(80, rate, 24).astype(int))
      spectra[kind.name, trial] = np.log(bands + 1e-2)
  table = np.corrcoef([spectra[k.name, 0] for k in scene_plan.KINDS])
  assert (table - 2 * np.eye(len(table))).max() < 0.97


def test_sound_begins_at_the_onset(many):
  """Energy at either ear rises within 10 ms of every onset that is not buried in a tail."""
  for name, clips in many[0].items():
    checked = 0
    for scene in clips:
      envelope = np.abs(scene.audio).max(0)
      for onset in scene.truth["sources"][0]["onsets_s"]:
        at = round(onset * RATE)
        before = envelope[at - 160 : at - 16].max()
        after = envelope[at - 16 : at + 1600]
        if after.max() > 12 * before:
          late = np.argmax(after > max(4 * before, 0.1 * after.max())) - 16
          assert -16 <= late < 160, (name, onset, late)
          checked += 1
    assert checked, name


def test_picture_changes_most_at_the_onset(many):
  """At the source's place the onset frame differs from the one before more than usual."""
  for name, clips in many[0].items():
    at_onset, elsewhere = [], []
    for scene in clips:
      source = scene.truth["sources"][0]
      if np.ptp(scene.truth["camera"]["yaw_deg"]):
        continue
      width = scene.frames.shape[2]
      change = np.abs(np.diff(scene.frames.astype(np.int16), axis=0)).sum(-1)
      onsets = {round(o * 25) for o in source["onsets_s"]}
      silent = {f for f, level in enumerate(source["level_db"]) if level == -120}
      for frame in range(1, len(scene.frames)):
        if not source["visible"][frame]:
          continue
        reach = int(0.2 * width / source["distance_m"][frame])
        x = round(source["pixel_x"][frame] * width)
        amount = change[frame - 1, :, max(x - reach, 0) : x + reach].sum() / reach**2
        if frame in onsets:
          at_onset.append(amount)
        elif {frame - 1, frame} <= silent:
          elsewhere.append(amount)
    assert np.median(at_onset) > 2 * np.median(elsewhere), name
    if name != "ball":  # the one that flies between its sounds
      assert np.percentile(at_onset, 20) > np.percentile(elsewhere, 75), name


def test_still_where_silent(many):
  """No fast motion of silent sources."""
  for scene in many[1]:
    yaw = np.array(scene.truth["camera"]["yaw_deg"])
    for source in scene.truth["sources"]:
      speed = np.abs(np.diff(np.array(source["azimuth_deg"]) + yaw)) * 25
      level = np.array(source["level_db"])
      quiet = np.convolve(level > -120, np.ones(49), "same") == 0  # A second from any sound.
      assert speed.max() < 60
      assert not quiet.any() or speed[quiet[:-1]].max(initial=0) < 1e-2


def test_left_is_louder_on_the_left_and_leads(many):
  for clips in many[0].values():
    for scene in clips:
      azimuth = np.array([np.nan if a is None else a for a in scene.truth["azimuth_deg"]])
      power = np.square(scene.audio).reshape(2, len(azimuth), -1).sum(2)
      for side, (near, far) in ((azimuth > 20, power), (azimuth < -20, power[::-1])):
        if side.sum() > 5:
          assert near[side].sum() > far[side].sum()


def test_plans_keep_their_bounds():
  several = 0
  for seed in range(300):
    plan = scene_plan.draw(np.random.SeedSequence(seed), 50 if seed % 2 else 200)
    several += len(plan.sources) > 1
    assert np.abs(np.diff(plan.yaw_f)).max() * 25 < 12
    firsts = np.sort([source.azimuth_f[0] for source in plan.sources])
    assert np.diff(firsts).min(initial=90) > 25
    for source in plan.sources:
      assert np.abs(np.diff(source.azimuth_f + plan.yaw_f)).max() * 25 <= 40 + 1e-6
      assert source.distance_f.min() >= scene_plan.NEAR_BY_COUNT_M[len(plan.sources)] - 1e-9
      assert all(a.frame + a.length <= b.frame for a, b in itertools.pairwise(source.events))
  assert several > 100  # Four of ten, but for those whose turn does not come.


def source_of(kind, distance, frame=5):
  """Strikes once, at 20 degrees."""
  return scene_plan.Source(
    kind=next(k for k in scene_plan.KINDS if k.name == kind),
    events=(scene_plan.Event(frame, 5, 1.0, 0),),
    azimuth_f=np.full(50, 20.0),
    distance_f=np.full(50, distance),
    height=0.5,
    seed=np.random.SeedSequence(1),
  )


def drawn(*sources):
  plan = scene_plan.Plan(np.zeros(50), sources)
  return scene_visuals.draw(plan, np.random.default_rng(0), 50, (96, 160))


def test_what_is_near_hides_what_is_far():
  near, far = source_of("fan", 1.0), source_of("ball", 3.0)
  alone = drawn(near)
  assert not np.array_equal(drawn(far), drawn())
  for both in (drawn(near, far), drawn(far, near)):
    np.testing.assert_array_equal(both, alone)


@pytest.mark.parametrize("kind", scene_plan.CLASSES)
def test_before_its_sound_an_object_is_still_to_the_pixel(kind):
  frames = drawn(source_of(kind, 0.8, frame=40))
  assert np.ptp(frames[:36], axis=0).max() == 0 < np.ptp(frames[36:], axis=0).max()


def rendered(distance):
  """Energy before and after the end of one sound, for a source at a distance."""
  plan = scene_plan.Plan(np.zeros(50), (source_of("woodblock", distance),))
  audio, level, _ = scenes._sound(plan, np.random.default_rng(0), scenes.Settings(seconds=2.0))
  direct, tail = audio[:, 5 * 640 : 5 * 640 + 100], audio[:, 10 * 640 : 12 * 640]
  sides = [10 * np.log10(np.divide(*np.square(part).sum(1))) for part in (direct, tail)]
  assert sides[0] > 2 and abs(sides[1]) < 5  # The tail does not tell where its source is.
  return np.square(direct).sum(), np.square(tail).sum(), level[0].max()


def test_what_goes_away_gets_fainter_and_smaller():
  away = np.linspace(0.8, 3.2, 50)
  direct, there = rendered(away)[0], rendered(away[5])[0]
  assert abs(10 * np.log10(direct / there)) < 0.2
  empty = drawn()
  first, last = (drawn(source_of("fan", away))[[0, 49]] != empty[[0, 49]]).any(-1).sum((1, 2))
  assert first > 8 * last > 0


@pytest.mark.parametrize("kind", scene_plan.KINDS, ids=lambda kind: kind.name)
def test_a_sound_has_the_strength_the_length_and_the_tone_of_its_event(kind):
  frames, waves = kind.length[1], []
  for rate, tone in ((44_100, 0), (RATE, 0), (RATE, kind.tones - 1)):
    event, rng = scene_plan.Event(5, frames, 0.5, tone), np.random.default_rng(0)
    waves.append(scene_sounds.synthesise(kind, [event], rng, rate, 3 * rate))
    heard = np.flatnonzero(waves[-1]) * 25 / rate
    assert 5 <= heard[0] < 5.05 and 4.95 + frames < heard[-1] < 5 + frames
    assert abs(waves[-1][int(heard[-1] * rate / 25)]) < 1e-3 * kind.peak  # It does not click.
    assert np.abs(waves[-1]).max() == pytest.approx(0.5 * kind.peak, rel=0.01)
  assert (kind.tones > 1) != np.array_equal(waves[1], waves[2])


def test_distance_lowers_level_and_direct_to_reverberant_ratio():
  direct, tail, level = np.array([rendered(d) for d in (0.8, 1.6, 3.2)]).T
  np.testing.assert_allclose(np.diff(10 * np.log10(direct)), -6.02, atol=0.1)
  np.testing.assert_allclose(np.diff(level), -6.02, atol=0.1)
  np.testing.assert_allclose(np.diff(10 * np.log10(tail)), 0, atol=0.3)


def test_what_nobody_hears_is_silent():
  """Below -60 dBFS: where sound comes from is then not asked for."""

  def level(strength):
    source = source_of("steam", 1.0)
    event = dataclasses.replace(source.events[0], strength=strength)
    plan = scene_plan.Plan(np.zeros(50), (dataclasses.replace(source, events=(event,)),))
    return scenes._sound(plan, np.random.default_rng(0), scenes.Settings(seconds=2.0))[1][0]

  loud_f = level(1.0)
  frame = int(loud_f.argmax())
  for excess_db, expected in ((0.1, -59.9), (-0.1, scenes.SILENT_DB)):
    found = level(10 ** ((-60 + excess_db - loud_f[frame]) / 20))[frame]
    assert found == pytest.approx(expected, abs=0.01)


def test_yaw_moves_background_and_sources_alike():
  clips = (scenes.make(8, i) for i in range(60))
  clip = next(c for c in clips if np.ptp(c.truth["camera"]["yaw_deg"]) > 12)
  yaw = np.array(clip.truth["camera"]["yaw_deg"])
  first, last = clip.frames[[0, -1], 60:].astype(float).mean(-1)
  shift = round((yaw[-1] - yaw[0]) / 120 * clip.frames.shape[2])  # turned left: all moves right

  def difference(s):
    a, b = (first, last) if s >= 0 else (last, first)
    return np.median(np.abs(a[:, : a.shape[1] - abs(s)] - b[:, abs(s) :]))

  assert difference(shift) < 0.5 * difference(-shift)


def test_out_of_range():
  for bad in ({"classes": ("kazoo",)}, {"seconds": 61}, {"size": (96, 30)}):
    with pytest.raises(UserError):
      scenes.make(0, 0, **bad)
  with pytest.raises(UserError):
    scenes.make(2**32, 0)
