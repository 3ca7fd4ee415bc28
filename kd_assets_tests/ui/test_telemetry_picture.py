"""The web UI shows the picture of a partition's telemetry: it lets an SVG through, and the browser draws it."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from kd_assets.orchestration.recording.telemetry_picture import WIDTH, telemetry_picture_markdown
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment, make_tiny_teacher
from kd_assets_tests.orchestration.recording.made_up import GPU_SERIES
from kd_assets_tests.ui.web_ui import dagster_dev


def test_the_picture_of_a_partition_is_drawn(
    tmp_path: Path, instance: dg.DagsterInstance, dagster_home: Path, browser: webdriver.Chrome
) -> None:
    deployment = Deployment(tmp_path, make_tiny_teacher(tmp_path / "teacher"), instance)
    deployment.plan()
    picture = telemetry_picture_markdown(GPU_SERIES)
    assert picture is not None
    instance.report_runless_asset_event(
        dg.AssetMaterialization(
            deployment.recipe.key("topk_cache"),
            partition=SHARDS[0],
            metadata={"telemetry": dg.MetadataValue.md(picture)},
        )
    )
    with dagster_dev(deployment, dagster_home) as address:
        browser.get(f"{address}/assets/tiny/topk_cache?view=partitions&partition={SHARDS[0]}")
        wait = WebDriverWait(browser, 60)
        wait.until(lambda d: d.find_element(By.XPATH, "//*[contains(text(), 'Show Markdown')]")).click()
        image = wait.until(lambda d: d.find_element(By.XPATH, "//img[starts-with(@src, 'data:image/svg')]"))
        assert "tokens/s over time" in str(image.get_attribute("alt"))
        width = wait.until(lambda d: d.execute_script("return arguments[0].naturalWidth", image))
        assert width == WIDTH, "the browser could read it"
        browser.save_screenshot(str(tmp_path / "picture.png"))
