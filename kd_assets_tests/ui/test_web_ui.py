"""What a person sees and clicks in the web UI, in a real headless Chromium, on a real web server with its daemon.

The tests share one server and one home, since both take long to make, and stand in the order of a first day: each finds
what those before it have made. Each leaves a picture in `screenshots/`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from kd_assets.contract import ExportParams
from kd_assets.orchestration.platform import PROJECT_FOLDER, Platform
from kd_assets.orchestration.recording.metadata import result_metadata
from kd_assets.orchestration.recording.telemetry_picture import WIDTH, telemetry_picture_markdown
from kd_assets_tests.export import exported, made_up
from kd_assets_tests.orchestration.deployment import (
    CACHES,
    SHARDS,
    Deployment,
    documents,
    make_tiny_teacher,
    write_definitions,
)
from kd_assets_tests.orchestration.recording.made_up import GPU_SERIES
from kd_assets_tests.ui.web_ui import (
    LIMIT_S,
    click,
    keep_screenshot,
    open_browser,
    page_text,
    start_dagster_dev,
    wait_for,
    wait_for_text,
)

BROKEN_SHARDS = ("broken-00000", "broken-00001", "broken-00002")
"""Of a recipe whose second shard has a bad record."""
PYTHON = """#!/bin/bash
# A task whose number stands in the file `hold` waits until it does not.
while [ "$2" = kd_assets.worker ] && grep -qsw "${{SLURM_ARRAY_TASK_ID:-0}}" {hold}; do sleep 0.1; done
exec {python} "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A web UI at `address`, on two recipes."""

    address: str
    tiny: Deployment
    broken: Deployment
    hold: Path

    def page(self, asset: str, *, recipe: str = "tiny", **query: str) -> str:
        return f"{self.address}/assets/{recipe}/{asset}?" + "&".join(f"{k}={v}" for k, v in query.items())

    def tasks(self) -> list[str]:
        """Process ids of the tasks that there are."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if "kd_assets.worker" in command and str(self.tiny.platform.jobs_folder) in " ".join(command):
                    found.append(process.name)
        return found

    def last_run(self) -> dg.DagsterRun:
        return self.tiny.instance.get_runs(limit=1)[0]


@pytest.fixture(scope="module")
def dagster_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With the shipped dagster.yaml, whose storage asks the environment for it."""
    folder = tmp_path_factory.mktemp("dagster home")
    (folder / "dagster.yaml").write_bytes((PROJECT_FOLDER / "dagster.yaml").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, dagster_home: Path) -> Iterator[Site]:
    """`tiny` has its shards and no caches yet, and two tasks for its teacher; `broken` was run."""
    home = tmp_path_factory.mktemp("home")
    hold, python = home / "hold", home / "python"
    python.write_text(PYTHON.format(hold=hold, python=sys.executable))
    python.chmod(0o755)
    platform, teacher = Platform(home=str(home), compute_python=str(python)), make_tiny_teacher(home / "teacher")
    bad = [{"text": None} if i == 5 else document for i, document in enumerate(documents(12))]
    (home / "broken.jsonl").write_text("".join(json.dumps(document) + "\n" for document in bad))
    with dg.DagsterInstance.from_config(str(dagster_home)) as instance:
        tiny = Deployment(
            home,
            teacher,
            instance,
            platform=platform,
            jobs={"teacher": {"n_tasks": 2}},
            exports=["hf", {"format": "original", "states": [1]}],
        )
        broken = Deployment(
            home,
            teacher,
            instance,
            platform=platform,
            recipe="broken",
            sources=[{"name": "corpus", "path": "$KD_HOME/broken.jsonl", "licence": "CC0-1.0"}],
            caches={"embeddings": {"max_length": 64}},
            student=None,
        )
        definitions = write_definitions(tiny)
        with definitions.open("a") as file:
            file.write(
                "defs = dg.Definitions.merge("
                f"defs, recipe_definitions(TeacherCaches(**{broken.attributes}).to_recipe()))\n"
            )
        with start_dagster_dev(definitions, dagster_home) as server:
            # While it starts.
            tiny.plan()
            assert tiny.run("shards_manifest", partition_range=(SHARDS[0], SHARDS[-1])).success
            broken.plan()
            assert not broken.run(
                "shards_manifest", "embedding_cache", partition_range=(BROKEN_SHARDS[0], BROKEN_SHARDS[-1])
            ).success
            yield Site(address=server.wait(), tiny=tiny, broken=broken, hold=hold)


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        opened.set_window_size(1360, 1000)  # for pictures that are still read when they are made smaller
        yield opened


@pytest.fixture
def browser(shared_browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """Says nothing of errors in its console when a test is over."""
    yield shared_browser
    errors = [entry["message"] for entry in shared_browser.get_log("browser")]
    assert not errors


@pytest.fixture
def hold(site: Site) -> Iterator[Path]:
    """Tasks whose number is written into it wait, until it is gone: at the latest when the test is over, so that one
    that failed holds none of the tests after it."""
    yield site.hold
    site.hold.unlink(missing_ok=True)


@pytest.fixture
def dark(site: Site, browser: webdriver.Chrome) -> Iterator[None]:
    """The web UI's dark theme, in this test alone."""
    browser.get(f"{site.address}/server_info")  # whatever page is of the server: the theme is kept for its address
    browser.execute_script("localStorage.setItem('dagster-theme', JSON.stringify('Dark'))")
    yield
    browser.execute_script("localStorage.removeItem('dagster-theme')")


def materialize_all(browser: webdriver.Chrome, site: Site, asset: str) -> None:
    """Its three partitions, by the dialog."""
    browser.get(site.page(asset, view="partitions"))
    click(browser, "Materialize")
    click(browser, "All")
    click(browser, "Launch")


def dot(browser: webdriver.Chrome, partition: str) -> str:
    """The colour of the dot beside a partition's name."""
    found = browser.find_element(By.XPATH, f"//*[@title='{partition}']/../following-sibling::div")
    return in_words(found.value_of_css_property("background-color"))


def node(browser: webdriver.Chrome, asset: str) -> str:
    """The colour of an asset's border in the graph, seen from afar."""
    return in_words(
        browser.find_element(By.XPATH, f"//*[text()='{asset}']/..").value_of_css_property("border-top-color")
    )


def in_words(css: str) -> str:
    red, green, blue = (int(part) for part in css[css.index("(") + 1 :].split(",")[:3])
    return "red" if red > 2 * green else "green" if green > 2 * red else "yellow" if red > 2 * blue else "grey"


def show_markdown(browser: webdriver.Chrome, *, of: str) -> WebElement:
    """Opens what a row of the metadata table has folded; returns the dialog."""
    link = f"//tr[td[contains(., '{of}')]]//*[contains(text(), 'Show Markdown')]"
    WebDriverWait(browser, LIMIT_S).until(lambda d: d.find_element(By.XPATH, link)).click()
    dialog = WebDriverWait(browser, LIMIT_S).until(lambda d: d.find_element(By.XPATH, "//*[@role='dialog']"))
    # It opens at its end, where its buttons are.
    browser.execute_script("for (const e of document.querySelectorAll('*')) e.scrollTop = 0")
    return dialog


def test_the_graph_shows_every_asset_of_a_recipe_and_only_what_is_made_is_green(
    site: Site, browser: webdriver.Chrome
) -> None:
    browser.set_window_size(1600, 1100)  # in a smaller one Dagster leaves out what stands in the nodes
    browser.get(f"{site.address}/locations/__repository__@tiny_definitions.py/asset-groups/tiny/lineage")
    wait_for_text(
        browser, *site.tiny.everything, "cache_card", "export_hf", "export_original", "Passed", "3 partitions"
    )
    keep_screenshot(browser, "graph from near")
    browser.set_window_size(1360, 1000)
    browser.refresh()
    wait_for_text(browser, *site.tiny.everything, "cache_card")
    wait_for(lambda: node(browser, "shard_plan") == "green", "the colours")
    assert node(browser, "shards_manifest") == "green"
    assert {node(browser, asset) for asset in (*CACHES, "student_smoke", "export_hf", "export_original")} == {"grey"}
    keep_screenshot(browser, "graph")


def test_a_partition_is_materialized_by_the_dialog(site: Site, browser: webdriver.Chrome) -> None:
    browser.get(site.page("topk_cache", view="partitions", partition=SHARDS[0]))
    click(browser, "Materialize")
    click(browser, "Launch 1 run")
    key = site.tiny.recipe.key("topk_cache")
    wait_for(lambda: site.tiny.instance.get_materialized_partitions(key), "the materialization")
    wait_for(lambda: site.last_run().is_finished, "the run's end")
    assert site.last_run().status is dg.DagsterRunStatus.SUCCESS
    assert site.tiny.instance.get_materialized_partitions(key) == {SHARDS[0]}
    browser.get(site.page("topk_cache", view="partitions", partition=SHARDS[0]))
    wait_for_text(browser, "bytes_per_token", str(site.tiny.platform.recipe_folder("tiny") / "topk_cache"))
    keep_screenshot(browser, "partition")


def test_a_range_is_back_filled_by_the_dialog_and_its_run_says_how_far_it_is(
    site: Site, browser: webdriver.Chrome, hold: Path
) -> None:
    """Of the run's two tasks one is held until the page has said what the other did."""
    hold.write_text("1")
    materialize_all(browser, site, "embedding_cache")
    key = site.tiny.recipe.key("embedding_cache")
    wait_for(lambda: site.tiny.instance.get_materialized_partitions(key), "the first task's partitions")
    run = site.last_run()
    browser.get(f"{site.address}/runs/{run.run_id}")
    events = WebDriverWait(browser, LIMIT_S).until(
        lambda d: d.find_element(By.XPATH, "//input[@placeholder='Filter…']")
    )
    events.send_keys("shards")
    wait_for_text(browser, "of 3 shards")
    keep_screenshot(browser, "run at work")
    hold.unlink()
    wait_for(lambda: site.tiny.instance.get_materialized_partitions(key) == set(SHARDS), "all partitions")
    wait_for(lambda: site.last_run().is_finished, "the run's end")
    assert site.last_run().run_id == run.run_id, "one run for all"
    wait_for_text(browser, "Success")
    events.send_keys(Keys.CONTROL, "a")
    events.send_keys("reused")
    wait_for_text(browser, "3 made, 0 reused, 0 failed")
    keep_screenshot(browser, "run that succeeded")


def test_the_card_of_a_recipe_is_one_page(site: Site, browser: webdriver.Chrome) -> None:
    browser.get(site.page("cache_card"))
    card = show_markdown(browser, of="card")
    wait_for_text(browser, "shard")
    keep_screenshot(browser, "card")
    assert card.find_elements(By.TAG_NAME, "table")


def test_a_failed_shard_is_red_the_others_are_green_and_so_are_their_checks(
    site: Site, browser: webdriver.Chrome
) -> None:
    browser.get(site.page("embedding_cache", recipe="broken", view="partitions", partition=BROKEN_SHARDS[1]))
    wait_for_text(browser, "Failed (1)", "Materialized (2)", *BROKEN_SHARDS, "failed, and did not materialize")
    assert [dot(browser, partition) for partition in BROKEN_SHARDS] == ["green", "red", "green"]
    keep_screenshot(browser, "failed shard")
    browser.get(site.page("embedding_cache", recipe="broken", view="checks"))
    wait_for_text(browser, "complete Succeeded", "finite Succeeded", "recomputed Succeeded", "schema Succeeded")
    keep_screenshot(browser, "checks beside a failed shard")


def test_a_failed_run_says_which_record_of_which_file_is_bad(site: Site, browser: webdriver.Chrome) -> None:
    (failed,) = site.broken.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))
    browser.get(f"{site.address}/runs/{failed.run_id}")
    wait_for_text(browser, "Failure", "broken-00001", "broken.jsonl")
    keep_screenshot(browser, "run that failed")


def test_terminating_a_run_ends_its_job(site: Site, browser: webdriver.Chrome, hold: Path) -> None:
    hold.write_text("0 1")
    materialize_all(browser, site, "hidden_state_cache")
    run = wait_for(lambda: site.last_run() if not site.last_run().is_finished else None, "the run")
    wait_for(site.tasks, "its tasks")
    browser.get(f"{site.address}/runs/{run.run_id}")
    click(browser, "Terminate")
    WebDriverWait(browser, LIMIT_S).until(lambda d: d.find_elements(By.XPATH, "//*[@role='dialog']"))
    click(browser, "Terminate", within="//*[@role='dialog']")
    wait_for(lambda: site.last_run().is_finished, "the run's end")
    assert site.last_run().status is dg.DagsterRunStatus.CANCELED
    wait_for(lambda: not site.tasks(), "the tasks' end")
    browser.get(f"{site.address}/runs/{run.run_id}")
    wait_for_text(browser, "Canceled")
    keep_screenshot(browser, "run that was terminated")


def test_the_page_of_an_export_says_what_it_is_and_how_it_is_loaded(
    site: Site, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    folders = made_up.commit(tmp_path, made_up.truths(1, exported.KEY))
    job = exported.job_of(tmp_path, folders, [ExportParams(asset="export_original", states=(1,))])
    assert exported.run(job) == 0
    ((folder, manifest),) = exported.results(job)
    assert manifest is not None
    key = site.tiny.recipe.key("export_original")
    metadata = result_metadata(manifest, folder)
    site.tiny.instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=SHARDS[0], metadata=metadata))
    browser.get(site.page("export_original"))
    wait_for_text(
        browser,
        "in files for the trainer of the scripts that this project replaces. states: 1.",
        f"the trainer's data folder: {folder / 'data'}",
        "1, fewer than 2 tokens",
        *(f"{cache} (variant " for cache in CACHES),
        *(f"tiny / {cache}" for cache in CACHES),
        "hidden_L1 list<list<float32>>",
        "[L, hidden_size] output of decoder block 1",
    )
    keep_screenshot(browser, "export")


def test_the_picture_of_a_partitions_telemetry_is_drawn(site: Site, browser: webdriver.Chrome) -> None:
    """The web UI lets an SVG through."""
    picture = telemetry_picture_markdown(GPU_SERIES)
    assert picture is not None
    site.tiny.instance.report_runless_asset_event(
        dg.AssetMaterialization(
            site.tiny.recipe.key("topk_cache"),
            partition=SHARDS[0],
            metadata={"telemetry": dg.MetadataValue.md(picture)},
        )
    )
    browser.get(site.page("topk_cache", view="partitions", partition=SHARDS[0]))
    dialog = show_markdown(browser, of="telemetry")
    image = dialog.find_element(By.XPATH, ".//img[starts-with(@src, 'data:image/svg')]")
    assert "tokens/s over time" in str(image.get_attribute("alt"))
    assert browser.execute_script("return arguments[0].naturalWidth", image) == WIDTH, "the browser could read it"
    keep_screenshot(browser, "telemetry")


@pytest.mark.usefixtures("dark")
def test_a_card_and_a_picture_are_shown_in_the_dark_theme(site: Site, browser: webdriver.Chrome) -> None:
    browser.get(site.page("topk_cache", view="partitions", partition=SHARDS[0]))
    dialog = show_markdown(browser, of="telemetry")
    ground = dialog.value_of_css_property("background-color")
    keep_screenshot(browser, "telemetry in the dark")
    browser.get(site.page("cache_card"))
    show_markdown(browser, of="card")
    keep_screenshot(browser, "card in the dark")
    assert max(int(part) for part in ground[ground.index("(") + 1 :].split(",")[:3]) < 64, ground
    assert page_text(browser)
