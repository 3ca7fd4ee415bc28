"""A partition is materialized by clicking, in a real headless Chromium, on a real webserver with its daemon."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
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

from kd_assets.orchestration.platform import PROJECT_FOLDER
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment, make_tiny_teacher, write_definitions

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.ui,
    # In CI a missing browser is a failure and no reason to skip.
    pytest.mark.skipif(
        (BROWSER is None or DRIVER is None) and "CI" not in os.environ,
        reason="no Chromium: apt-get install chromium chromium-driver",
    ),
]


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = 120) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.3)
    return value


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    instance_folder = tmp_path / "dagster home"
    instance_folder.mkdir()
    shutil.copy(PROJECT_FOLDER / "dagster.yaml", instance_folder)
    with dg.DagsterInstance.from_config(str(instance_folder)) as instance:
        made = Deployment(tmp_path, make_tiny_teacher(tmp_path / "teacher"), instance)
        made.plan()
        yield made


@pytest.fixture
def address(deployment: Deployment, tmp_path: Path) -> Iterator[str]:
    """Where the web UI of the deployment answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    definitions = write_definitions(deployment)
    with (tmp_path / "ui.log").open("w") as log:
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
            env={**os.environ, "DAGSTER_HOME": str(tmp_path / "dagster home")},
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "ui.log").read_text()[-2000:]
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


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
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
        f"--user-data-dir={tmp_path / 'browser'}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


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


def test_a_partition_is_materialized_by_clicking(
    deployment: Deployment, address: str, browser: webdriver.Chrome
) -> None:
    assert deployment.run("shards_manifest", partition=SHARDS[1]).success
    page = f"{address}/assets/tiny/topk_cache?view=partitions&partition={SHARDS[1]}"
    browser.get(page)
    click(browser, "Materialize")
    click(browser, "Launch 1 run")
    key = deployment.recipe.key("topk_cache")
    wait_for(lambda: deployment.instance.get_materialized_partitions(key), "the materialization")
    wait_for(lambda: all(r.is_finished for r in deployment.instance.get_runs()), "the run's end")
    assert deployment.instance.get_runs(limit=1)[0].status is dg.DagsterRunStatus.SUCCESS
    assert deployment.instance.get_materialized_partitions(key) == {SHARDS[1]}
    browser.get(page)
    shown = WebDriverWait(browser, 60).until(lambda d: d.page_source if "bytes_per_token" in d.page_source else False)
    assert str(deployment.platform.recipe_folder("tiny") / "topk_cache") in shown


def test_a_backfill_started_in_the_ui_covers_all_partitions_in_one_run(
    deployment: Deployment, address: str, browser: webdriver.Chrome
) -> None:
    browser.get(f"{address}/assets/tiny/shards_manifest?view=partitions")
    click(browser, "Materialize")
    click(browser, "All")
    click(browser, "Launch")
    key = deployment.recipe.key("shards_manifest")
    wait_for(lambda: deployment.instance.get_materialized_partitions(key) == set(SHARDS), "all partitions")
    assert len(deployment.job_events("task_started")) == 1
