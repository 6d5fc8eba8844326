"""TensorBoard in a headless browser: what its pages hold, and what they look like."""

import io
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from lmc_lightning.experiments.view import tensorboard_command

PATIENCE = 60.0
"""For a page to be drawn without a graphics card [s]."""

# Old tabs of TensorBoard hide their content in shadow trees, which CSS selectors do not enter.
DEEP = """
const deep = (root, css) => [...root.querySelectorAll(css), ...[...root.querySelectorAll('*')]
    .filter(e => e.shadowRoot).flatMap(e => deep(e.shadowRoot, css))];
const found = deep(document, arguments[0]);
"""


class Browser:
    """Chromium on one TensorBoard."""

    def __init__(self, address: str, driver: Any) -> None:
        self.address, self.driver = address, driver

    def open(self, tab: str, **options: str) -> None:
        """Show a tab, with the options that TensorBoard takes in its address."""
        self.driver.get("about:blank")  # otherwise only the fragment changes, and the options of the last page stay
        unsmoothed = "" if tab == "timeseries" else "&_smoothingWeight=0"
        self.driver.get(f"{self.address}?{urlencode({'smoothing': '0', **options})}#{tab}{unsmoothed}")

    def texts(self, css: str) -> list[str]:
        """What elements say, wherever they are on the page."""
        found: list[str] = self.driver.execute_script(DEEP + "return found.map(e => e.textContent.trim());", css)
        return found

    def count(self, css: str) -> int:
        """How many elements there are that take room on the page."""
        return int(self.driver.execute_script(DEEP + "return found.filter(e => e.clientWidth > 9).length;", css))

    def click(self, css: str) -> None:
        """Press the first of the elements, if there is one."""
        self.driver.execute_script(DEEP + "found[0]?.click();", css)

    def colors(self, css: str) -> int:
        """How many colours the first of the elements shows, as far as it is on the screen."""
        box = "const b = found[0].getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom];"
        left, top, right, bottom = self.driver.execute_script(DEEP + box, css)
        with Image.open(io.BytesIO(self.driver.get_screenshot_as_png())) as image:
            area = image.convert("RGB").crop((left, top, min(right, image.width), min(bottom, image.height)))
        return len(np.unique(np.asarray(area).reshape(-1, 3), axis=0))

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """The value of a condition as soon as it is true."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            value = condition()
            if value:
                return value
            time.sleep(0.2)
        raise AssertionError(f"After {PATIENCE:.0f} s there is no {what} on {self.driver.current_url}")

    def severe(self) -> list[str]:
        """What the page has complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def save(self, path: Path) -> None:
        """Take a screenshot, when the last animations have come to rest."""
        time.sleep(4)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))


@contextmanager
def browser(logdir: Path, log: Path, size: tuple[int, int] = (1500, 1000)) -> Iterator[Browser]:
    """TensorBoard as ``lmc-lightning view`` starts it, and Chromium on it."""
    command = tensorboard_command(logdir, "--host", "127.0.0.1", "--port", "0", "--reload_interval", "5")
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("headless=new", "no-sandbox", "use-angle=swiftshader", "enable-unsafe-swiftshader"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--window-size={size[0]},{size[1]}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield Browser(_address(server, log), driver)
        finally:
            driver.quit()
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE)


def _address(server: "subprocess.Popen[bytes]", log: Path) -> str:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and server.poll() is None:
        words = [word for word in log.read_text().split() if word.startswith("http://127")]
        if words:
            return words[0]
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard does not start: {log.read_text()}")
