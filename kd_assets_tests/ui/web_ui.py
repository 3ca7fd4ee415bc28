"""A real webserver with its daemon, and a real headless Chromium that clicks in it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from kd_assets_tests.orchestration.deployment import Deployment, write_definitions

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = 120) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.3)
    return value


@contextmanager
def dagster_dev(
    deployment: Deployment, dagster_home: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Runs the web UI of the deployment with its daemon; gives the address where it answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    definitions = write_definitions(deployment)
    with (dagster_home / "ui.log").open("w") as log:
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
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {}), "DAGSTER_HOME": str(dagster_home)},
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (dagster_home / "ui.log").read_text()[-2000:]
        try:
            return bool(urllib.request.urlopen(f"{url}/server_info", timeout=2).status == 200)
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait_for(answers, "the web server")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def click(browser: webdriver.Chrome, text: str) -> None:
    """Click the first enabled button with this text, once there is one; React may replace it meanwhile."""

    def clicked(driver: webdriver.Chrome) -> bool:
        for button in driver.find_elements(By.XPATH, f"//button[contains(., '{text}')]"):
            if button.is_enabled():
                button.click()
                return True
        return False

    moving = (StaleElementReferenceException, ElementClickInterceptedException, ElementNotInteractableException)
    WebDriverWait(browser, 60, ignored_exceptions=moving).until(clicked)
