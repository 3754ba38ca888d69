"""A real headless Chromium for tests of pages: what it logs, what it requests, how a page looks."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@contextlib.contextmanager
def open_browser(width: int = 1280, height: int = 900) -> Iterator:
    """A driver of a new browser, which is closed in the end. It finds no host but this machine. The test is
    skipped without Chromium."""
    if not (Path(CHROMIUM).exists() and Path(DRIVER).exists()):
        pytest.skip("needs chromium and chromium-driver, as Debian installs them")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*_OPTIONS, f"--window-size={width},{height}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})

    class Browser(webdriver.Chrome):
        def get(self, url: str) -> None:
            """On a busy machine Chrome's driver may return while the page is still being read."""
            super().get(url)
            wait_for(self, "document.readyState === 'complete'")

    # A path to the driver: without one selenium's manager asks the network for it.
    driver = Browser(options=options, service=Service(DRIVER))
    try:
        driver.set_page_load_timeout(60)
        yield driver
    finally:
        driver.quit()


def console_of(driver) -> list[str]:
    """What the browser has logged since the last call: errors, warnings, refusals of the page's policy."""
    return [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]


def requests_of(driver) -> list[str]:
    """The addresses that pages have requested since the last call, without data: and blob:."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    sent = (m["params"] for m in messages if m["method"] == "Network.requestWillBeSent")
    urls = (params["request"]["url"] for params in sent)
    return [url for url in urls if not url.startswith(("data:", "blob:", "chrome:", "devtools:"))]


def set_look(driver, scheme: str = "light", width: int | None = None, height: int = 900) -> None:
    """Sets the colour scheme that the reader prefers, and the width of the screen in CSS pixels."""
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    if width:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait_for(driver, script: str, timeout_s: float = 60.0):
    """The value of a JavaScript expression once it is true; fails after timeout_s."""
    until = time.monotonic() + timeout_s
    while not (value := driver.execute_script(f"return {script}")):
        assert time.monotonic() < until, f"{script} was not true within {timeout_s:.0f} s"
        time.sleep(0.1)
    return value


# Whether the page is no wider than the window.
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def scrolls_sideways(driver) -> bool:
    """Whether the page is wider than the window."""
    return not driver.execute_script(f"return {FITS}")


def save_screenshot(driver, path: Path) -> None:
    """Saves the whole page, not the window alone, as PNG."""
    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))
