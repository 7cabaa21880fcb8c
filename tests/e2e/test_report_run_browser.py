"""The page of a training run in a real browser."""

import pytest

from spatialv2a_jax import report
from tests.e2e.browsing import click, wait
from tests.test_report_run import write_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  folder = write_run(tmp_path_factory.mktemp("run"))
  report.write_report(folder, folder / "report.html")
  return (folder / "report.html").as_uri()


def test_the_bar_shows_where_the_time_went(browser):
  wait(browser, "return document.querySelector('.bar')")
  share = (
    "const bar = document.querySelector('.bar').getBoundingClientRect().width;"
    "return document.querySelector('[data-phase=step]').getBoundingClientRect().width / bar"
  )
  assert abs(browser.execute_script(share) - 0.8) < 0.02
  assert browser.find_element("css selector", ".goodput dd").text.startswith("80 %")


def test_curves_fall_and_carry_marks(browser):
  path = "return document.querySelector('#run-figures .curve').getAttribute('d')"
  text = wait(browser, path)
  points = [tuple(map(float, pair.split())) for pair in text[1:].split("L")]
  assert len(points) == 20 and points[0][1] < points[-1][1]  # Down is larger.
  count = "return document.querySelectorAll('#run-figures figure:first-child {}').length"
  assert browser.execute_script(count.format(".mark.checkpoint")) == 2
  assert browser.execute_script(count.format(".mark.skipped")) == 1
  shown = "return document.getElementById('run-summary').innerText"
  assert "200 of 400, not finished" in browser.execute_script(shown)


def test_sound_plays_one_at_a_time_after_the_check_of_the_ears(browser):
  visible = "return document.getElementById('check').offsetParent !== null"
  assert wait(browser, visible)
  players = "document.querySelectorAll('#run-sounds audio')"
  ready = f"return {players}.length === 2 && [...{players}].every((p) => p.readyState > 0)"
  assert wait(browser, ready)
  click(browser, "#run-sounds audio")
  browser.execute_script(f"{players}[0].play().catch(() => {{}})")
  wait(browser, f"return !{players}[0].paused")
  browser.execute_script(f"{players}[1].play().catch(() => {{}})")
  wait(browser, f"return {players}[0].paused")


def test_folds_open_and_a_phone_needs_no_sideways_scrolling(browser):
  folds = "return document.querySelectorAll('#run details[hidden]').length"
  assert browser.execute_script(folds) == 0
  for fold in ("more", "skipped", "config"):
    click(browser, f"#run-{fold} summary")
  text = browser.execute_script("return document.getElementById('run').innerText")
  assert "step 101: loss nan: not finite" in text and '"kind": "flow"' in text
  phone = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
  browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
  wait(browser, "return document.documentElement.scrollWidth <= 360")
