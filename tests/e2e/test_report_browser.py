"""The report in a real browser: it plays, switches sounds in time, and complains about nothing."""

import json
import time

import numpy as np
import pytest

from spatialv2a_jax import generate, io, report
from tests.e2e.browsing import click, wait

pytestmark = pytest.mark.browser

RATE, SECONDS = 16000, 3


def write_clip(folder, name):
  """A dot that moves from left to right, with noise that follows it."""
  place_v = np.linspace(-0.8, 0.8, 8 * SECONDS)
  noise = np.random.default_rng(0).standard_normal(SECONDS * RATE) * 0.1
  pan = np.linspace(0, 1, len(noise))
  sound = np.stack([noise * (1 - pan), noise * pan]).astype("f")
  frames = np.full((len(place_v), 90, 160, 3), 60, np.uint8)
  heat = np.zeros((len(place_v), 18, 32), np.float32)
  for v, place in enumerate(place_v):
    column = int((place + 1) * 80)
    frames[v, 35:55, column - 8 : column + 8] = 240
    heat[v, 7:11, (column - 8) // 5 : (column + 8) // 5] = 1
  io.write_audio(folder / f"{name}.wav", sound, RATE)
  io.write_video(folder / f"{name}.mp4", frames, 8, sound, RATE)
  sidecar = {
    "prompt": "a dot <b>crossing</b>",
    "settings": {"steps": 25},
    "descriptors": [[float(place), 0.05, 0.02, float(np.sign(place)), 0.0] for place in place_v],
    "heat": report.heat_strip(heat),
    "spatial": generate.spatial_cues(sound, RATE),
  }
  azimuth = (-60 * place_v).tolist()
  truth = {"seconds": SECONDS, "fps": 8, "azimuth_deg": azimuth, "sources": []}
  (folder / "truth").mkdir(exist_ok=True)
  (folder / "truth" / f"{name}.json").write_text(json.dumps(truth))
  (folder / f"{name}.json").write_text(json.dumps(sidecar))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp("report")
  for name in ("one", "two"):
    write_clip(folder, name)
  io.write_audio(folder / "ref" / "one.wav", io.read_audio(folder / "one.wav")[::-1], RATE)
  rows = [{"step": i, "loss": 1 / (i + 1), "loss/left": 1.0, "loss/right": 2.0} for i in range(50)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  score = {"value": 0.8, "ci95": [0.7, 0.9], "n": 2, "undefined": 0, "unit": "share"}
  metrics = {"sign_agreement": score, "isd_cos": score}
  scores = {"metrics": metrics, "baselines": {"dual_mono": metrics}, "dropped": []}
  (folder / "scores.json").write_text(json.dumps(scores))
  report.write_report(folder, folder / "report.html", ref=folder / "ref", truth=folder / "truth")
  return (folder / "report.html").as_uri()


def start(driver):
  """Plays the first clip with the keyboard, a gesture that browsers accept."""
  driver.execute_script("document.querySelector('video').focus()")
  driver.find_element("css selector", "video").send_keys(" ")
  wait(driver, "return document.querySelector('video').currentTime > 0.3")


def test_a_clip_plays_and_the_play_heads_follow(browser):
  start(browser)
  head = "return Number(document.querySelector('svg .head').getAttribute('x1'))"
  before = browser.execute_script(head)
  wait(browser, f"{head.replace('return ', 'return (')}) > {before + 20}")
  assert (
    browser.execute_script("return parseFloat(document.querySelector('.picture .head').style.left)")
    > 10
  )


def test_switching_sound_keeps_the_time_and_silences_the_rest(browser):
  browser.execute_script(
    "window.sounds = []; const play = HTMLMediaElement.prototype.play;"
    "HTMLMediaElement.prototype.play = function () {"
    " if (this.tagName === 'AUDIO') window.sounds.push(this); return play.call(this); }"
  )
  start(browser)
  image = "return document.querySelector('.spectrogram img').src"
  before = browser.execute_script(image)
  click(browser, "input[value=reference]")
  wait(browser, "return window.sounds.length && window.sounds[0].currentTime > 0.5")
  apart = (
    "const v = document.querySelector('video'), a = window.sounds[0];"
    "return [Math.abs(v.currentTime - a.currentTime), v.muted, a.paused]"
  )
  gap, muted, paused = browser.execute_script(apart)
  assert gap < 0.25 and muted and not paused
  assert browser.execute_script(image) != before
  click(browser, "input[value=generated]")
  _, muted, paused = browser.execute_script(apart)
  assert not muted and paused


def test_starting_one_clip_stops_the_other(browser):
  start(browser)
  browser.execute_script("document.querySelectorAll('video')[1].play()")
  wait(browser, "return document.querySelectorAll('video')[0].paused")


def test_check_tones_sound_in_one_ear_each(browser):
  browser.execute_script(
    "window.pans = []; const make = AudioContext.prototype.createStereoPanner;"
    "AudioContext.prototype.createStereoPanner = function () {"
    " const node = make.call(this); window.pans.push(node.pan); return node; }"
  )
  for side in ("left", "right"):
    click(browser, f"[data-tone={side}]")
    text = browser.find_element("css selector", "#tone-status").text
    assert side in text
  assert browser.execute_script("return window.pans.map((pan) => pan.value)") == [-1, 1]


def test_clicking_a_plot_seeks_and_left_is_up(browser):
  wait(browser, "return document.querySelector('video').readyState > 0")
  plot = browser.find_element("css selector", ".plots svg")
  browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
  plot.click()  # In the middle.
  now = wait(browser, "return document.querySelector('video').currentTime")
  assert abs(now - SECONDS / 2) < 0.2
  path = "return document.querySelector('svg .truth').getAttribute('d')"
  points = [tuple(map(float, pair.split())) for pair in browser.execute_script(path)[1:].split("L")]
  assert points[0][0] < points[-1][0] and points[0][1] < points[-1][1]  # From the left, at the top.


def test_the_cues_of_the_sidecar_are_shown(browser):
  texts = "return [...document.querySelectorAll('#clips article:first-of-type .summary {}')]"
  texts += ".map((e) => e.textContent)"
  names, values = (browser.execute_script(texts.format(tag)) for tag in ("dt", "dd"))
  assert names == ["Level difference", "Time difference", "Interaural coherence"]
  level, delay, coherence = (value.split() for value in values)
  assert abs(float(level[0])) < 1 and level[1] == "dB"
  assert abs(float(delay[0])) < 1 and delay[1] == "µs" and 0 < float(coherence[0]) <= 1


def test_the_heat_is_drawn_where_the_dot_is_and_can_be_hidden(browser):
  wait(browser, "return document.querySelector('video').readyState > 1")
  lit = (
    "const c = document.querySelector('.stage canvas');"
    "const d = c.getContext('2d').getImageData(0, c.height / 2, c.width, 1).data; let x = [];"
    "for (let i = 0; i < c.width; i++) if (d[4 * i + 3] > 100) x.push(i / c.width);"
    "return x.length ? [x.reduce((a, b) => a + b) / x.length] : null"
  )
  for at, side in ((0.1, 0.1), (2.9, 0.9)):
    browser.execute_script(f"document.querySelector('video').currentTime = {at}")
    time.sleep(0.5)
    assert abs(wait(browser, lit)[0] - side) < 0.08
  click(browser, ".overlay input")
  assert browser.execute_script(lit) is None


def test_scores_unfold_and_a_phone_needs_no_sideways_scrolling(browser):
  rows = "return [...document.querySelectorAll('tbody tr')].filter((r) => r.offsetParent).length"
  assert browser.execute_script(rows) == 1
  click(browser, "#all-scores")
  assert browser.execute_script(rows) == 2
  phone = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
  browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
  time.sleep(0.3)
  assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
