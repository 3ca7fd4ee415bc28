"""A real webserver with its daemon, and a real headless Chromium that clicks in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from kd_assets_tests.orchestration.deployment import Deployment, write_definitions
from kd_assets_tests.ports import reserve_ports

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SCREENSHOTS = Path(__file__).parent / "screenshots"
"""What the tests saw, for a person's eyes; git ignores it."""
LIMIT_S = 300.0
"""How long anything is waited for before a test fails: no measure of speed, however busy the machine is."""


@contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """A headless Chromium whose profile is this folder."""
    assert BROWSER is not None
    assert DRIVER is not None, "no Chromium: apt-get install chromium chromium-driver"
    options = Options()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1600,1100",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def keep_screenshot(browser: webdriver.Chrome, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def page_text(browser: webdriver.Chrome) -> str:
    """What a person reads on the page, in one line."""
    return " ".join(str(browser.execute_script("return document.body.innerText")).split())


def wait_for_text(browser: webdriver.Chrome, *texts: str) -> None:
    """Wait until the page has all these texts."""
    missing: list[str] = list(texts)

    def shown() -> bool:
        text = page_text(browser)
        missing[:] = [words for words in texts if words not in text]
        return not missing

    try:
        wait_for(shown, "the page")
    except AssertionError:
        raise AssertionError(f"{browser.current_url} does not show {missing}, but: {page_text(browser)}") from None


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.3)
    return value


@dataclass(frozen=True)
class Server:
    """A web UI with its daemon, which may still be starting."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait(self) -> str:
        """Returns the address once it answers there."""
        wait_for(self._answers, "the web server")
        return self.url

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            return bool(urllib.request.urlopen(f"{self.url}/server_info", timeout=LIMIT_S).status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def start_dagster_dev(
    definitions: Path, dagster_home: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Runs `dagster dev` over a file of definitions; it ends with the block."""
    log = dagster_home / "ui.log"
    with ExitStack() as stack, log.open("w") as output:
        (port,) = reserve_ports(1, until=stack)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dagster",
                "dev",
                "-f",
                str(definitions),
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {}), "DAGSTER_HOME": str(dagster_home)},
        )
        try:
            yield Server(process, f"http://127.0.0.1:{port}", log)
        finally:
            process.terminate()
            process.wait(LIMIT_S)


@contextmanager
def dagster_dev(
    deployment: Deployment, dagster_home: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Runs the web UI of the deployment with its daemon; gives the address where it answers."""
    with start_dagster_dev(write_definitions(deployment), dagster_home, environment) as server:
        yield server.wait()


def click(browser: webdriver.Chrome, text: str, *, within: str = "") -> None:
    """Click the first enabled button with this text, once there is one; React may replace it meanwhile. `within`: an
    XPath."""

    def clicked(driver: webdriver.Chrome) -> bool:
        for button in driver.find_elements(By.XPATH, f"{within}//button[contains(., '{text}')]"):
            if button.is_enabled():
                button.click()
                return True
        return False

    moving = (StaleElementReferenceException, ElementClickInterceptedException, ElementNotInteractableException)
    WebDriverWait(browser, LIMIT_S, ignored_exceptions=moving).until(clicked)
