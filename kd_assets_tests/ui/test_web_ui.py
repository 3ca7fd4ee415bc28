"""A partition is materialized by clicking, in a real headless Chromium, on a real webserver with its daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from kd_assets_tests.orchestration.deployment import SHARDS, Deployment, make_tiny_teacher
from kd_assets_tests.ui.web_ui import click, dagster_dev, wait_for


@pytest.fixture
def deployment(tmp_path: Path, instance: dg.DagsterInstance) -> Deployment:
    made = Deployment(tmp_path, make_tiny_teacher(tmp_path / "teacher"), instance)
    made.plan()
    return made


@pytest.fixture
def address(deployment: Deployment, dagster_home: Path) -> Iterator[str]:
    """Where the web UI of the deployment answers."""
    with dagster_dev(deployment, dagster_home) as url:
        yield url


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
