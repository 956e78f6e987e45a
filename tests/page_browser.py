"""A headless browser for the tests of the page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

INSTALL = "tests of the page need Chromium and chromedriver: apt-get install chromium chromium-driver"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def _binary(variable: str, *names: str) -> str:
    found = os.environ.get(variable) or next((p for n in names if (p := shutil.which(n))), None)
    if found is None:
        pytest.fail(INSTALL)
    return found


class Browser:
    """A headless browser with what the tests ask of it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, fragment: str = "", width: int = 1280, dark: bool = False) -> None:
        """Load the page afresh at that width."""
        d = self.driver
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        d.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        d.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        d.get("about:blank")
        d.get_log("browser"), d.get_log("performance")
        d.get(page.as_uri() + fragment)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def complaints(self) -> list[Any]:
        """What the console says, warnings included."""
        return list(self.driver.get_log("browser"))

    def requests(self) -> list[str]:
        """Every address that was asked for since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        wide: int = self.js("return document.documentElement.scrollWidth - window.innerWidth")
        return wide


@contextmanager
def launched(profile: Path) -> Iterator[Browser]:
    """Chromium with a fresh profile; the test fails with what to install where there is none."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _binary("LETHE_CHROMIUM", "chromium", "chromium-browser", "google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_binary("LETHE_CHROMEDRIVER", "chromedriver")))
    driver.set_page_load_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
