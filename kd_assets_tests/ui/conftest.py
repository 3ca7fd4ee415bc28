"""The browser, and an instance as the checkout's dagster.yaml makes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import dagster as dg
import pytest
from selenium import webdriver

from kd_assets.orchestration.platform import PROJECT_FOLDER
from kd_assets_tests.ui.web_ui import BROWSER, DRIVER, keep_screenshot, open_browser

NO_BROWSER = pytest.mark.skipif(
    (BROWSER is None or DRIVER is None) and "CI" not in os.environ,
    reason="no Chromium: apt-get install chromium chromium-driver",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests. In CI a missing browser is a failure and no reason to skip."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.ui)
            item.add_marker(NO_BROWSER)


@pytest.fixture
def dagster_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DAGSTER_HOME with the checkout's dagster.yaml."""
    folder = tmp_path / "dagster home"
    folder.mkdir()
    shutil.copy(PROJECT_FOLDER / "dagster.yaml", folder)
    monkeypatch.setenv("DAGSTER_HOME", str(folder))
    return folder


@pytest.fixture
def instance(dagster_home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(dagster_home)) as made:
        yield made


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    with open_browser(tmp_path / "browser") as opened:
        yield opened


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of a test that fails, what its browser showed is kept."""
    report = yield
    driver = getattr(item, "funcargs", {}).get("browser")
    if report.when == "call" and report.failed and driver is not None:
        keep_screenshot(driver, f"failed {item.name}")
    return report
