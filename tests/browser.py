"""Headless Chromium for tests of pages: Debian's packages chromium and chromium-driver, driven by selenium."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZES = {"wide": (1280, 900), "phone": (390, 844)}


class Browser:
    """A page in headless Chromium.

    Attributes:
        driver: selenium's.
    """

    def __init__(self, driver):
        self.driver = driver

    def open(self, page: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Open a file at a width in CSS pixels, in the "light" or "dark" scheme, with an empty log."""
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self._devtools("Emulation.setDeviceMetricsOverride", **metrics)
        self._devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.driver.get_log("browser")
        self.driver.get(page.absolute().as_uri())

    def run(self, script: str, *arguments):
        """What a JavaScript function body returns."""
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        """The texts of the elements that a CSS selector finds."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())", selector)

    def hover(self, selector: str) -> str:
        """Move the mouse over the middle of a chart and return the text of the value that it shows; "" for none."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.by import By

        chart = self.driver.find_element(By.CSS_SELECTOR, f"{selector} svg")
        self.run("arguments[0].scrollIntoView({block: 'center'})", chart)
        ActionChains(self.driver).move_to_element(chart).perform()
        tip = "const tip = document.querySelector(arguments[0] + ' .tip')"
        return self.run(f"{tip}; return tip.hidden ? '' : tip.innerText", selector)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        found = self._devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def problems(self) -> list[str]:
        """What a page must not do: write errors to the console, load anything, or be wider than the window."""
        found = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        found += self.run(
            "return performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith('data:'))"
        )
        width, inner = self.run("return [document.documentElement.scrollWidth, window.innerWidth]")
        return found + ([f"{width} pixels wide in a window of {inner}"] if width > inner else [])

    def _devtools(self, command: str, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium; skips the test where it is not installed."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
