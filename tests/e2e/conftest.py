"""The browser that shows a module's page, and lets nothing be said on its console."""

import pytest

from tests.e2e.browsing import CHROMIUM, DRIVER, FLAGS


@pytest.fixture
def browser(page, tmp_path):
  """A headless Chromium that shows `page`, a fixture of the module."""
  webdriver = pytest.importorskip("selenium.webdriver")
  if not CHROMIUM or not DRIVER:
    pytest.skip("needs chromium and chromedriver on the PATH")
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1600"):
    options.add_argument(flag)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
  try:
    driver.get(page)
    yield driver
    # Reading pixels back, as some tests do, earns advice on speed; nothing else may be said.
    lines = [line["message"] for line in driver.get_log("browser")]
    assert [line for line in lines if "willReadFrequently" not in line] == []
  finally:
    driver.quit()
