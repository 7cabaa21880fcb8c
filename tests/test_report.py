"""The report: one file without requests, the right side up, safe with hostile text."""

import base64
import io as memory
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from spatialv2a_jax import cli, generate, io, report, report_run
from spatialv2a_jax.errors import UserError

RATE = 16000
HOSTILE = "</script><script>alert(1)</script>{{data}}"


def leftward(seconds=1.5):
  """Noise from the left: louder there and 0.4 ms earlier."""
  noise = np.random.default_rng(0).standard_normal(int(seconds * RATE)) * 0.1
  return np.stack([noise, 0.5 * np.roll(noise, 6)]).astype("f")


def frames(seconds=1.5, size=(32, 64)):
  rng = np.random.default_rng(1)
  return (rng.integers(0, 255, (*size, 3), np.uint8) for _ in range(int(seconds * 8)))


def payload(page):
  text = page.read_text()
  (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
  return json.loads(found)


@pytest.fixture
def clips(tmp_path):
  """A folder as generation leaves it, with one clip."""
  folder = tmp_path / "generated"
  folder.mkdir()
  io.write_audio(folder / "clip.wav", leftward(), RATE)
  io.write_video(folder / "clip.mp4", frames(), 8, leftward(), RATE)
  sidecar = {
    "version": "0.1.0",
    "seed": 7,
    "settings": {"steps": 25, "phase": "shared"},
    "prompt": HOSTILE,
    "sample_rate": RATE,
    "descriptors": [[0.5, 0.1, 0.04, 1.0, 0.0]] * 6 + [[0.0] * 5] * 6,
    "spatial": generate.spatial_cues(leftward(), RATE),
  }
  (folder / "clip.json").write_text(json.dumps(sidecar))
  return folder


def test_page_needs_no_network_and_no_other_file(clips, tmp_path):
  page = tmp_path / "report.html"
  report.write_report(clips, page)
  text = page.read_text()
  assert "default-src 'none'" in text
  outside = re.sub(r"http://www\.w3\.org/2000/svg", "", text)
  assert "http://" not in outside and "https://" not in outside
  assert not re.search(r"\{\{(title|style|script)\}\}", text)
  (clip,) = payload(page)["clips"]
  assert clip["video"].startswith("data:video/mp4;base64,")
  stored = base64.b64decode(clip["video"].partition(",")[2])
  assert stored == (clips / "clip.mp4").read_bytes()
  again = tmp_path / "again.html"
  report.write_report(clips, again)
  assert again.read_bytes() == page.read_bytes()


def test_hostile_text_stays_text(clips, tmp_path):
  report.write_report(clips, tmp_path / "report.html")
  assert (tmp_path / "report.html").read_text().count("</script>") == 2
  assert payload(tmp_path / "report.html")["clips"][0]["caption"] == HOSTILE


def test_left_is_positive_and_the_right_of_the_picture_is_negative(clips, tmp_path):
  (tmp_path / "truth").mkdir()
  azimuth = [30.0] * 11 + [None]
  truth = {"seconds": 1.5, "fps": 8, "azimuth_deg": azimuth, "sources": []}
  (tmp_path / "truth" / "clip.json").write_text(json.dumps(truth))
  report.write_report(clips, tmp_path / "report.html", truth=tmp_path / "truth")
  (clip,) = payload(tmp_path / "report.html")["clips"]
  heard = clip["curves"]["generated"]
  assert np.median(heard["ild"]) == pytest.approx(6, abs=0.3)
  assert np.median(heard["itd"]) == pytest.approx(6 / RATE * 1e6, abs=10)
  assert np.median(heard["azimuth"]) > 10
  assert len(heard["ild"]) == len(heard["azimuth"]) == 10 and heard["step"] == 0.128
  assert clip["seen"]["azimuth"] == [-30.0] * 6 + [None] * 6  # Centre of the right half.
  assert clip["seen"]["half"][0] == pytest.approx(0.2)
  assert clip["truth"]["azimuth"] == [30.0] * 11 + [None]


def test_the_cues_that_generation_wrote_are_summed_up(clips, tmp_path):
  report.write_report(clips, tmp_path / "report.html")
  (clip,) = payload(tmp_path / "report.html")["clips"]
  level, delay, coherence = clip["summary"].values()
  assert level == pytest.approx(6, abs=0.1) and delay == pytest.approx(375, abs=5)
  assert 0.95 < coherence <= 1
  names = set(re.findall(r"clip\.summary\.(\w+)", (tmp_path / "report.html").read_text()))
  assert names == set(clip["summary"])  # What the page asks for is what there is.


def test_reference_joins_the_switch_and_mono_is_always_there(clips, tmp_path):
  ref = tmp_path / "ref"
  io.write_audio(ref / "clip.flac", leftward()[::-1], RATE)
  report.write_report(clips, tmp_path / "report.html", ref=ref)
  (clip,) = payload(tmp_path / "report.html")["clips"]
  assert [track["name"] for track in clip["tracks"]] == ["generated", "reference", "mono"]
  assert clip["tracks"][0]["audio"] is None  # It is in the video.
  assert np.median(clip["curves"]["reference"]["ild"]) == pytest.approx(-6, abs=0.3)
  sound = base64.b64decode(clip["tracks"][1]["audio"].partition(",")[2])
  (tmp_path / "back.flac").write_bytes(sound)
  back = io.read_audio(tmp_path / "back.flac")
  assert np.abs(back - leftward()[::-1]).max() < 2**-14


def test_sound_without_video_gets_a_player(clips, tmp_path):
  (clips / "clip.mp4").unlink()
  report.write_report(clips, tmp_path / "report.html")
  (clip,) = payload(tmp_path / "report.html")["clips"]
  assert clip["video"] is None and clip["tracks"][0]["audio"].startswith("data:audio/flac")


def test_large_videos_are_shrunk_or_linked(clips, tmp_path, monkeypatch):
  io.write_video(clips / "clip.mp4", frames(0.5, (264, 396)), 8, leftward(0.5), RATE)
  size = (clips / "clip.mp4").stat().st_size
  monkeypatch.setattr(report, "EMBED_BYTES", size - 1)
  report.write_report(clips, tmp_path / "report.html")
  (clip,) = payload(tmp_path / "report.html")["clips"]
  (tmp_path / "small.mp4").write_bytes(base64.b64decode(clip["video"].partition(",")[2]))
  info = io.probe(tmp_path / "small.mp4")
  assert (info.height, info.width) == (240, 360) and info.audio_channels == 2
  monkeypatch.setattr(report, "EMBED_BYTES", 10)
  (tmp_path / "pages").mkdir()
  report.write_report(clips, tmp_path / "pages" / "report.html")
  (clip,) = payload(tmp_path / "pages" / "report.html")["clips"]
  assert clip["video"] == "../generated/clip.mp4"


def test_long_sound_is_linked_and_long_video_not_shrunk(clips, tmp_path, monkeypatch):
  monkeypatch.setattr(report, "EMBED_SECONDS", 1.0)
  monkeypatch.setattr(report, "EMBED_BYTES", 10)
  monkeypatch.setattr(report.io, "write_video", None)
  io.write_audio(tmp_path / "ref" / "clip.flac", leftward(), RATE)
  page = tmp_path / "pages" / "report.html"
  report.write_report(clips, page, ref=tmp_path / "ref")
  (clip,) = payload(page)["clips"]
  assert clip["video"] == "../generated/clip.mp4"
  assert [track["audio"] for track in clip["tracks"]] == [None, "../ref/clip.flac"]
  (clips / "clip.mp4").unlink()
  report.write_report(clips, page)
  (clip,) = payload(page)["clips"]
  assert [track["audio"] for track in clip["tracks"]] == ["../generated/clip.wav"]


def test_heat_strip_keeps_place_and_time():
  heat = np.zeros((3, 48, 96), np.float32)
  heat[1, :, 48:] = 1  # Right half of the second frame.
  strip = report.heat_strip(heat)
  image = np.asarray(Image.open(memory.BytesIO(base64.b64decode(strip["png"]))))
  rows, columns = strip["size"]
  assert strip["frames"] == 3 and image.shape == (rows, 3 * columns)
  tiles = image.reshape(rows, 3, columns)
  assert tiles[:, [0, 2]].max() == 0 and tiles[:, 1, : columns // 2].max() == 0
  assert tiles[:, 1, columns // 2 :].min() == 255


def test_a_folder_of_scenes_is_its_own_truth(tmp_path):
  io.write_audio(tmp_path / "s.wav", leftward(), RATE)
  truth = {
    "id": "s",
    "seconds": 1.5,
    "fps": 25,
    "caption": "a ball",
    "camera": {"hfov_deg": 120},
    "sources": [{"onsets_s": [0.0], "azimuth_deg": [45.0] * 37}],
    "azimuth_deg": [45.0] * 36 + [None],
  }
  (tmp_path / "s.json").write_text(json.dumps(truth))
  report.write_report(tmp_path, tmp_path / "report.html")
  (clip,) = payload(tmp_path / "report.html")["clips"]
  assert clip["truth"]["azimuth"][0] == 45 and clip["caption"] == "a ball"


def test_scores_put_headlines_first_beside_their_baselines(clips, tmp_path):
  one = {
    "value": 0.8,
    "ci95": [0.7, 0.9],
    "n": 9,
    "undefined": 1,
    "unit": "share",
    "better": "higher",
  }
  none = {**one, "value": None, "ci95": [None, None]}
  scores = {
    "metrics": {"isd_cos": none, "sign_agreement": one},
    "baselines": {"dual_mono": {"sign_agreement": {**one, "value": 0.5}}},
    "dropped": [{"id": "x", "reason": "no reference"}],
  }
  (clips.parent / "scores.json").write_text(json.dumps(scores))  # Beside the folder: found.
  report.write_report(clips, tmp_path / "report.html")
  got = payload(tmp_path / "report.html")["scores"]
  assert [row["name"] for row in got["rows"]] == ["sign_agreement", "isd_cos"]
  assert got["rivals"] == ["dual_mono"] and got["rows"][0]["rivals"] == [0.5]
  assert got["rows"][0]["ci95"] == [0.7, 0.9] and got["rows"][1]["rivals"] == [None]
  assert got["dropped"] == ["x: no reference"]


def test_training_run_draws_each_ear_and_thins_long_logs(tmp_path):
  count = 4 * report_run.POINTS
  rows = (
    {"step": i, "loss": 1.0, "loss/left": i % 4, "loss/right": None, "grad_norm": 2.0}
    for i in range(count)
  )
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "config.json").write_text('{"seed": 3}')
  report.write_report(tmp_path, tmp_path / "report.html")
  run = payload(tmp_path / "report.html")["run"]
  assert [figure["title"] for figure in run["figures"]][1] == "Gradient norm"
  series = run["figures"][0]["series"]
  assert list(series) == ["loss", "loss/left", "loss/right"]
  assert series["loss/left"]["y"] == [1.5] * report_run.POINTS and series["loss/right"]["y"] == []
  assert series["loss"]["x"][-1] == count - 1 and run["config"] == {"seed": 3}


def test_a_demo_shows_its_run_and_infinity_is_text(clips, tmp_path):
  """`launch.demo` trains beside what it generates; a limit of infinity stands in a config."""
  folder, run = tmp_path / "demo", tmp_path / "demo" / "runs" / "flow"
  shutil.copytree(clips, folder / "generated")
  run.mkdir(parents=True)
  (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
  (run / "config.json").write_text('{"guard": {"sigma": Infinity}}')
  sidecar = folder / "generated" / "clip.json"
  sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"prompt": math.nan}))
  report.write_report(folder, tmp_path / "report.html")
  page = payload(tmp_path / "report.html")
  assert page["run"]["config"] == {"guard": {"sigma": "Infinity"}} and len(page["clips"]) == 1


def test_mistakes_are_one_line(clips, tmp_path):
  page = tmp_path / "report.html"
  empty = tmp_path / "empty"
  empty.mkdir()
  cases = [
    (dict(folder=empty), "neither clips"),
    (dict(folder=tmp_path / "absent"), "not a folder"),
    (dict(folder=clips, ref=tmp_path / "absent"), "--ref"),
    (dict(folder=clips, truth=clips / "clip.json"), "--truth"),
    (dict(folder=clips, scores=clips / "clip.json"), "no scores"),
    (dict(folder=clips, scores=tmp_path / "absent.json"), "cannot read"),
  ]
  for arguments, words in cases:
    with pytest.raises(UserError, match=words):
      report.write_report(out_html=page, **arguments)
  (clips / "clip.json").write_text("{")
  with pytest.raises(UserError, match="clip.json"):
    report.write_report(clips, page)
  assert not page.exists()


def test_a_damaged_clip_is_left_out_and_named(clips, tmp_path, capsys):
  for suffix in (".wav", ".json"):
    (clips / f"other{suffix}").write_bytes((clips / f"clip{suffix}").read_bytes())
  (clips / "other.wav").write_bytes(b"RIFF")
  page = tmp_path / "report.html"
  assert cli.main(["report", str(clips), "--out", str(page)]) == 4
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "left out" in error and "other.wav" in error
  assert len(payload(page)["clips"]) == 1
