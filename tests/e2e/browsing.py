"""What tests of pages in a real browser share."""

import shutil
import time

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
  "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --mute-audio "
  "--disable-background-networking --disable-component-update --disable-sync"
).split()


def wait(driver, script, seconds=10):
  """Waits until the script returns something true, and returns it."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if found := driver.execute_script(script):
      return found
    time.sleep(0.05)
  raise AssertionError(f"never became true: {script}")


def click(driver, selector):
  driver.find_element("css selector", selector).click()
