"""Scoring of folders: baselines in their places, everything counted, the same on any machine.

Axes: e ear, p sample.
"""

import json
import shutil

import numpy as np
import pytest
import scipy.io.wavfile

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import alignment, distances, evaluate, spatial
from spatialv2a_jax.spatial import hrtf

RATE, SECONDS, FPS = 16000, 2, 8
CLIPS = 5


def quiet(line):
  del line


def scene(folder, index):
  """Bursts of noise, each from another angle, with their truth."""
  rng = np.random.default_rng(index)
  audio_ep = 1e-4 * rng.standard_normal((2, SECONDS * RATE))
  azimuth, times = np.full(SECONDS * FPS, None), []
  for slot in range(4):
    angle, start = rng.uniform(-70, 70), slot / 2 + rng.uniform(0, 0.1)
    burst_p = 0.1 * rng.standard_normal(6000) * np.linspace(1, 0.2, 6000)
    at = round(start * RATE)
    for ear, taps in enumerate(hrtf.sphere(RATE).ir(angle)):
      audio_ep[ear, at : at + 6000] += np.convolve(burst_p, taps)[:6000]
    azimuth[slot * 4 : slot * 4 + 4] = angle
    times.append(start)
  stem = f"clip_{index}"
  io.write_audio(folder / f"{stem}.wav", audio_ep, RATE)
  truth = {"seconds": SECONDS, "fps": FPS, "azimuth_deg": list(azimuth)}
  truth["sources"] = [{"onsets_s": times}]
  (folder / f"{stem}.json").write_text(json.dumps(truth))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("scenes")
  for index in range(CLIPS):
    scene(folder, index)
  return folder


@pytest.fixture(scope="module")
def scores(scenes, tmp_path_factory):
  out = tmp_path_factory.mktemp("out") / "scores.json"
  evaluate.run(scenes, scenes, scenes, out, baselines={"ceiling": scenes}, echo=quiet)
  return json.loads(out.read_text())


def test_the_set_of_clips_has_a_digest_and_work_is_shown(scenes, scores, tmp_path, capsys):
  digest = scores["settings"]["set_sha256"]
  assert digest == evaluate.set_digest(scenes, scenes) and len(digest) == 64
  assert digest != evaluate.set_digest(scenes, None)
  other = tmp_path / "other"
  shutil.copytree(scenes, other)
  assert evaluate.set_digest(other, other) == digest  # Wherever it lies.
  (other / "clip_0.json").write_text("{}")
  changed = evaluate.set_digest(other, other)
  (other / "clip_1.wav").unlink()
  assert len({digest, changed, evaluate.set_digest(other, other)}) == 3
  evaluate.run(other, other, None, tmp_path / "x.json", echo=quiet)
  assert "scoring: 4/4" in capsys.readouterr().err


def copy(scenes, folder):
  return shutil.copytree(scenes, folder)


def test_layout(scores):
  names = {*spatial.METRICS, *distances.METRICS, *alignment.METRICS}
  assert set(scores["metrics"]) == names
  want = {"dual_mono", "swapped_ears", "shuffled", "reference", "ceiling"}
  assert set(scores["baselines"]) == want
  keys = {"value", "median", "ci95", "n", "undefined", "unit"}
  for table in (scores["metrics"], *scores["baselines"].values()):
    assert set(table) == names
    for row in table.values():
      assert keys <= set(row)
      assert row["n"] + row["undefined"] == CLIPS
      assert (row["value"] is None) == (row["n"] == 0)
  assert scores["counts"] == {"expected": CLIPS, "found": CLIPS, "used": CLIPS, "dropped": 0}
  assert [clip["id"] for clip in scores["clips"]] == [f"clip_{i}" for i in range(CLIPS)]
  assert set(scores["clips"][0]["metrics"]) == names


def test_baselines_stand_where_they_must(scores):
  def value(name, table=None):
    rows = scores["baselines"][table] if table else scores["metrics"]
    return rows[name]["value"]

  assert value("sign_agreement") > 0.9
  assert value("sign_agreement", "dual_mono") == 0.5
  assert value("sign_agreement", "swapped_ears") == pytest.approx(1 - value("sign_agreement"))
  assert value("azimuth_pearson_r") > 0.9
  assert value("azimuth_pearson_r", "dual_mono") is None
  assert value("azimuth_pearson_r", "swapped_ears") == pytest.approx(-value("azimuth_pearson_r"))
  assert abs(value("azimuth_pearson_r", "shuffled")) < 0.7
  assert value("azimuth_mae_deg") < 8 < value("azimuth_mae_deg", "dual_mono")
  assert value("onset_error_ms") < 5 < value("onset_error_ms", "shuffled")
  assert value("onset_f1") > 0.9
  assert value("iacc_clip", "dual_mono") == pytest.approx(1)
  assert value("stft_distance", "reference") == 0
  assert value("stft_distance", "dual_mono") > 0.01
  assert value("ild_error_frame_db") == 0 and value("ild_error_frame_db", "shuffled") > 1
  assert value("stft_distance", "shuffled") > value("stft_distance", "dual_mono")
  low, high = scores["metrics"]["sign_agreement"]["ci95"]
  assert low <= value("sign_agreement") <= high


def test_scoring_the_truth_is_the_reference_and_the_ceiling(scores):
  assert scores["metrics"] == scores["baselines"]["reference"] == scores["baselines"]["ceiling"]


def test_swapping_changes_direction_but_no_unsigned_cue(scores):
  swapped = scores["baselines"]["swapped_ears"]
  for name in ("iacc_clip", "ild_frame_db", "isd_l1", "ipd_100_1500_w_rad", "onset_f1"):
    assert swapped[name]["value"] == pytest.approx(scores["metrics"][name]["value"])
  name = "ild_frame_signed_db"
  assert swapped[name]["value"] == pytest.approx(-scores["metrics"][name]["value"])


@pytest.mark.slow
def test_processes_do_not_change_the_file(scenes, tmp_path):
  for jobs in (1, 2):
    evaluate.run(scenes, scenes, scenes, tmp_path / f"{jobs}.json", jobs=jobs, echo=quiet)
  assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_every_loss_has_its_reason(scenes, tmp_path):
  pred, ref = copy(scenes, tmp_path / "pred"), copy(scenes, tmp_path / "ref")
  noise = 0.1 * np.random.default_rng(0).standard_normal((2, RATE))
  (pred / "clip_0.wav").write_bytes(b"not sound")
  io.write_audio(pred / "clip_1.wav", noise[:1], RATE)
  io.write_audio(pred / "clip_2.wav", noise[:, :2000], RATE)
  (pred / "clip_3.wav").unlink()
  io.write_audio(pred / "stranger.wav", noise, RATE)
  lines = []
  got = evaluate.run(pred, ref, None, tmp_path / "s.json", echo=lines.append)
  reasons = {row["id"]: row["reason"] for row in got["dropped"]}
  assert "damaged" in reasons["clip_0"]
  assert "mono file" in reasons["clip_1"]
  assert "too short" in reasons["clip_2"]
  assert reasons["clip_3"] == "no prediction"
  assert reasons["stranger"] == "no reference"
  assert got["counts"] == {"expected": 5, "found": 5, "used": 1, "dropped": 5}
  assert lines[0] == "expected 5 found 5 used 1 dropped 5"
  assert all(any(stem in line for line in lines) for stem in reasons)
  assert "sign_agreement" not in got["metrics"]
  assert got["baselines"]["shuffled"]["stft_distance"]["value"] is None  # One clip has no other.
  assert got["metrics"]["iacc_clip"]["ci95"] == [None, None]


def test_silent_and_incomplete_clips_are_counted_not_zero(scenes, tmp_path):
  pred, truth = copy(scenes, tmp_path / "pred"), copy(scenes, tmp_path / "truth")
  io.write_audio(pred / "clip_0.wav", np.zeros((2, SECONDS * RATE)), RATE)
  (truth / "clip_1.json").unlink()
  (truth / "clip_2.json").write_text("{}")
  got = evaluate.run(pred, scenes, truth, tmp_path / "s.json", echo=quiet)
  assert got["counts"]["used"] == CLIPS
  assert got["metrics"]["iacc_clip"]["undefined"] == 1
  assert got["metrics"]["sign_agreement"]["undefined"] == 3
  assert got["clips"][0]["metrics"]["onset_error_ms"] == 500
  assert got["clips"][1]["notes"] == ["no truth: alignment not scored"]
  assert "clip_2.json" in got["clips"][2]["notes"][0]
  named = [(clip["ref"], clip["truth"]) for clip in got["clips"][1:4]]
  assert named == [("clip_1.wav", None), ("clip_2.wav", None), ("clip_3.wav", "clip_3.json")]


def test_reference_without_stereo_sound(scenes, tmp_path):
  ref = tmp_path / "ref"
  ref.mkdir()
  frames = np.zeros((8, 32, 32, 3), np.uint8)
  mono = 0.1 * np.random.default_rng(0).standard_normal((1, RATE))
  io.write_video(ref / "clip_0.mp4", frames, 8)
  io.write_audio(ref / "clip_1.wav", mono, RATE)
  got = evaluate.run(scenes, ref, scenes, tmp_path / "s.json", echo=quiet)
  assert got["counts"] == {"expected": 2, "found": CLIPS, "used": 2, "dropped": CLIPS - 2}
  assert got["metrics"]["stft_distance"]["undefined"] == 2
  assert got["metrics"]["sign_agreement"]["n"] == 2
  assert got["baselines"]["reference"]["iacc_clip"]["n"] == 0
  assert all("not compared" in clip["notes"][0] for clip in got["clips"])
  assert [(clip["ref"], clip["truth"]) for clip in got["clips"]] == [
    (None, "clip_0.json"),
    (None, "clip_1.json"),
  ]


def test_lengths_may_differ_and_are_noted(scenes, tmp_path):
  whole, cut = scenes / "clip_0.wav", tmp_path / "cut.wav"
  io.write_audio(cut, io.read_audio(whole)[:, : -RATE // 2], RATE)
  for pred, ref, gap in ((whole, cut, "+0.50"), (cut, whole, "-0.50")):
    one = evaluate.score(evaluate.Job("x", pred, ref, None, {}))
    assert isinstance(one, evaluate.Scored)
    assert one.notes == (f"prediction is {gap} s longer than reference",)
    parts = one.parts[evaluate.PREDICTION]
    assert parts["ild_error_frame_db"] < 0.01 and parts["stft_distance"] < 1e-3


def test_a_reference_that_cannot_be_used_is_named(scenes, tmp_path):
  io.write_audio(tmp_path / "short.wav", np.full((2, 2000), 0.1), RATE)
  sound = np.full((RATE, 2), 0.1, np.float32)
  sound[7] = np.nan
  scipy.io.wavfile.write(tmp_path / "nan.wav", RATE, sound)
  for name, words in (("short", "too short"), ("nan", "not finite")):
    ref = tmp_path / f"{name}.wav"
    one = evaluate.score(evaluate.Job("x", scenes / "clip_0.wav", ref, None, {}))
    assert isinstance(one, evaluate.Dropped) and one.file == ref.name
    assert one.reason.startswith("reference: ") and words in one.reason


def test_missing_baseline_clip_is_noted(scenes, tmp_path):
  rival = copy(scenes, tmp_path / "rival")
  (rival / "clip_4.wav").unlink()
  got = evaluate.run(
    scenes, scenes, None, tmp_path / "s.json", baselines={"codec": rival}, echo=quiet
  )
  assert got["baselines"]["codec"]["iacc_clip"]["undefined"] == 1
  assert got["clips"][4]["notes"] == ["baseline codec: no file for this clip"]


def test_wav_comes_before_video_of_the_same_stem(scenes, tmp_path):
  pred = copy(scenes, tmp_path / "pred")
  frames = np.zeros((16, 32, 32, 3), np.uint8)
  io.write_video(pred / "clip_0.mp4", frames, 8, np.zeros((2, 2 * RATE)), RATE)
  got = evaluate.run(pred, scenes, None, tmp_path / "s.json", echo=quiet)
  assert got["clips"][0]["pred"] == "clip_0.wav"


def test_mistakes_are_one_line_and_write_nothing(scenes, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  other = copy(scenes, tmp_path / "other")
  for path in other.glob("*.wav"):
    path.rename(path.with_name("x" + path.name))
  out = tmp_path / "made" / "s.json"
  cases = [
    ((tmp_path / "nowhere", scenes, None, out), "nowhere"),
    ((scenes, empty, None, out), "empty"),
    ((scenes / "clip_0.wav", scenes, None, out), "is a file"),
    ((other, scenes, None, out), "no file stem in common"),
    ((scenes, scenes, empty, out), "holds no truth"),
    ((scenes, scenes, None, empty), "cannot write"),
    ((scenes, scenes, None, out, {"shuffled": scenes}), "built in"),
  ]
  for arguments, words in cases:
    with pytest.raises(UserError, match=words) as error:
      evaluate.run(*arguments, echo=quiet)
    assert "\n" not in str(error.value)
  assert not out.exists()


def test_nothing_usable_is_an_error_without_a_file(scenes, tmp_path):
  pred = tmp_path / "pred"
  pred.mkdir()
  (pred / "clip_4.wav").write_bytes(b"not sound")  # Those before it have no prediction.
  with pytest.raises(UserError, match="none of 1 clips can be scored; clip_4: .*damaged"):
    evaluate.run(pred, scenes, None, tmp_path / "s.json", echo=quiet)
  assert not list(tmp_path.glob("*.json"))


def test_table(scores):
  lines = evaluate.markdown(scores).splitlines()
  assert len(lines) == 2 + len(evaluate.HEADLINES)
  assert len({line.count("|") for line in lines}) == 1
  cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
  one = scores["metrics"]["sign_agreement"]
  assert cells[0] == "sign_agreement" and cells[5:7] == [str(one["n"]), str(one["undefined"])]
  rivals = [rival["sign_agreement"]["value"] for rival in scores["baselines"].values()]
  values = [float(cell) for cell in (cells[3], *cells[4].split(" .. "), *cells[7:])]
  assert values == pytest.approx([one["value"], *one["ci95"], *rivals], rel=1e-3)
