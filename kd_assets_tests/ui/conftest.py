"""The browser, and an instance as the checkout's dagster.yaml makes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from kd_assets.orchestration.platform import PROJECT_FOLDER
from kd_assets_tests.ui.web_ui import BROWSER, DRIVER

NO_BROWSER = pytest.mark.skipif(
    (BROWSER is None or DRIVER is None) and "CI" not in os.environ,
    reason="no Chromium: apt-get install chromium chromium-driver",
)
"""In CI a missing browser is a failure and no reason to skip."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests. In CI a missing browser is a failure and no reason to skip."""
    missing = (BROWSER is None or DRIVER is None) and "CI" not in os.environ
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.ui)
            item.add_marker(pytest.mark.skipif(missing, reason="no Chromium: apt-get install chromium chromium-driver"))


@pytest.fixture
def dagster_home(tmp_path: Path) -> Path:
    """DAGSTER_HOME with the checkout's dagster.yaml."""
    folder = tmp_path / "dagster home"
    folder.mkdir()
    shutil.copy(PROJECT_FOLDER / "dagster.yaml", folder)
    return folder


@pytest.fixture
def instance(dagster_home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(dagster_home)) as made:
        yield made


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
