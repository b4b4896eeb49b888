"""A headless Chromium, driven by selenium. Needs Debian's `chromium` and `chromium-driver`."""

from __future__ import annotations

import shutil
from pathlib import Path

from selenium import webdriver

MISSING = "chromium or chromedriver is missing (apt-get install chromium chromium-driver)"


def start_chromium(folder: Path, size: tuple[int, int] = (1280, 1000)) -> webdriver.Chrome | None:
    """One with a profile in `folder` and a window of `size`; None where it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size={},{}".format(*size))
    options.add_argument(f"--user-data-dir={folder}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def show_colours(browser: webdriver.Chrome, colours: str) -> None:
    """Let pages believe that the system's colours are `light` or `dark`."""
    feature = {"name": "prefers-color-scheme", "value": colours}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
