"""The page of an audit in a real browser: it plays, shows the heat, and complains about nothing."""

import time

import numpy as np
import pytest

from launch import data as command
from tests.data import clips
from tests.e2e.browsing import wait

pytestmark = pytest.mark.browser

COLUMN = 0.8


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
  """One kept clip whose square trembles on the right, a silent one, and one cut in two."""
  folder = tmp_path_factory.mktemp("videos")
  clips.write(folder / "kept.mp4", 2, column=COLUMN)
  clips.write(folder / "silent.mp4", 2, np.zeros((2, 2 * clips.RATE), np.float32))
  blob = clips.write(folder / "cut.mp4", 2).read_bytes()
  (folder / "cut.mp4").write_bytes(blob[: len(blob) // 2])
  out = tmp_path_factory.mktemp("build") / "out"
  build = ["vggsound", "--videos", folder, "--out", out, "--seconds", 2, "--jobs", 1]
  assert command.main(list(map(str, build))) == 0
  command.main(["audit", str(out), "--videos", str(folder)])
  return (out / "audit.html").as_uri()


def test_clips_play_one_at_a_time_and_the_line_follows(browser):
  wait(browser, "return [...document.querySelectorAll('video')].every((v) => v.readyState > 0)")
  assert browser.execute_script("return document.querySelectorAll('video').length") == 2
  kept = browser.find_element("css selector", "video")
  browser.execute_script("arguments[0].focus()", kept)
  kept.send_keys(" ")
  wait(browser, "return document.querySelector('.head').getAttribute('x1') > 20")
  browser.execute_script("document.querySelectorAll('video')[1].play()")
  wait(browser, "return document.querySelectorAll('video')[0].paused")


def test_the_heat_lies_on_what_moves_and_can_be_hidden(browser):
  wait(browser, "return document.querySelector('video').readyState > 1")
  browser.execute_script("document.querySelector('video').currentTime = 1")
  lit = (
    "const c = document.querySelector('canvas'), { width, height } = c;"
    "const d = c.getContext('2d').getImageData(0, 0, width, height).data;"
    "let sum = 0, at = 0;"
    "for (let i = 0; i < width * height; i++) {"
    " sum += d[4 * i + 3]; at += d[4 * i + 3] * ((i % width) + 0.5) / width; }"
    "return sum ? [at / sum] : null"
  )
  assert abs(wait(browser, lit)[0] - COLUMN) < 0.08
  browser.find_element("css selector", "#overlay").click()
  wait(browser, f"return !(() => {{ {lit} }})()")


def test_every_dropped_clip_says_why(browser):
  text = browser.find_element("css selector", "body").text
  assert "1 of 1 kept clips" in text and "2 of 2 dropped clips" in text
  cards = {card.text.split("\n")[0]: card.text for card in browser.find_elements(
    "css selector", ".clip")}  # fmt: skip
  assert "silent" in cards["silent"] and "unreadable" in cards["cut"] and "none:" in cards["cut"]
  rows = "return [...document.querySelectorAll('tr.failed')].map((row) => row.innerText)"
  (failed,) = [row for row in browser.execute_script(rows) if "are kept" in row]
  assert "1 of 3" in failed
  phone = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
  browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
  time.sleep(0.3)
  assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
