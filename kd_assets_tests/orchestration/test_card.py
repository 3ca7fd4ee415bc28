"""The asset `cache_card`: there after every run over the recipe's caches, with what the store holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest

from kd_assets import cli, components
from kd_assets.orchestration import card_asset
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment, failure_text


def page_of(deployment: Deployment) -> str:
    record = deployment.instance.get_latest_materialization_event(deployment.recipe.key("cache_card"))
    assert record is not None
    assert record.asset_materialization is not None
    return str(record.asset_materialization.metadata["card"].value)


def test_a_run_over_caches_leaves_a_card_that_counts_them(deployment: Deployment) -> None:
    result = deployment.run("shards_manifest", "topk_cache", partition=SHARDS[0])
    assert result.success
    record = deployment.instance.get_latest_materialization_event(deployment.recipe.key("cache_card"))
    assert record is not None
    assert record.asset_materialization is not None
    assert isinstance(record.asset_materialization.metadata["card_s"].value, float)
    page = page_of(deployment)
    assert "| `topk_cache` | `█░░` | 1 of 3, 2 missing |" in page
    assert "| `hidden_state_cache` | `░░░` | 0 of 3, 3 missing |" in page, "none of it was made yet"
    assert record.asset_materialization.metadata["partitions missing"].value == 2 + 2 + 3 + 3
    readme = deployment.home / "store" / "tiny" / "README.md"
    assert page.rstrip() in readme.read_text()
    assert "base64" not in page


def test_a_card_is_materialized_by_its_own_button_too(deployment: Deployment) -> None:
    assert deployment.run("shards_manifest", partition=SHARDS[0]).success
    assert deployment.run("cache_card").success
    assert "| `shards_manifest` | `█░░` |" in page_of(deployment)


def test_before_any_result_the_button_says_what_to_do(deployment: Deployment) -> None:
    result = deployment.run("cache_card")
    assert not result.success
    (failed,) = [event for event in result.all_events if event.is_step_failure]
    data = failed.step_failure_data.user_failure_data
    assert data is not None
    assert "materialize" in str(data.description)
    assert "NotCommittedError" in failure_text(result)


HOUR = 3600.0


@pytest.fixture
def planned(deploy: Callable[..., Deployment]) -> Deployment:
    """Three partitions, as Dagster knows them; no job is run."""
    made = deploy(caches={"topk": {"k": 4, "max_length": 64}}, student=None)
    made.instance.add_dynamic_partitions(str(made.recipe.partitions.name), list(SHARDS))
    return made


def say_made(deployment: Deployment, asset: str, *, partition: str | None = None, metadata: Any = None) -> None:
    event = dg.AssetMaterialization(deployment.recipe.key(asset), partition=partition, metadata=metadata)
    deployment.instance.report_runless_asset_event(event)


def due(deployment: Deployment, *, after_s: float) -> bool:
    event = deployment.instance.get_latest_materialization_event(deployment.recipe.key("cache_card"))
    now = (0 if event is None else event.timestamp) + after_s
    return card_asset.why_not_yet(deployment.instance, deployment.recipe, SHARDS, now) is None


def test_a_card_is_made_as_often_as_takes_a_twentieth_of_the_time(planned: Deployment) -> None:
    """However many partitions there are, and however few of them a run is over."""
    assert due(planned, after_s=0), "there is none"
    say_made(planned, "cache_card", metadata={"card_s": 30.0, "partitions missing": 2})
    assert not due(planned, after_s=599)
    assert due(planned, after_s=601)
    say_made(planned, "cache_card", metadata={"card_s": 180.0, "partitions missing": 2})
    assert not due(planned, after_s=0.9 * HOUR)
    assert due(planned, after_s=1.1 * HOUR)
    assert due(planned, after_s=-HOUR), "a clock that was put back"
    say_made(planned, "cache_card")
    assert due(planned, after_s=1), "one of an earlier version says not how long it took"


def test_the_card_is_made_anew_when_nothing_is_missing_any_more(planned: Deployment) -> None:
    say_made(planned, "cache_card", metadata={"card_s": 30.0, "partitions missing": 2})
    for asset in ("shards_manifest", "topk_cache"):
        for key in SHARDS:
            assert not due(planned, after_s=1)
            say_made(planned, asset, partition=key)
    assert due(planned, after_s=1)
    say_made(planned, "cache_card", metadata={"card_s": 30.0, "partitions missing": 0})
    assert not due(planned, after_s=1), "it says so already"


def test_a_card_that_cannot_be_made_stops_no_run(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card_asset, "write_card", full)
    assert deployment.run("shards_manifest", partition=SHARDS[0]).success


def test_a_run_that_fails_says_so_and_leaves_a_card(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    assert deployment.run("shards_manifest", partition=SHARDS[0]).success
    (deployment.home / "store" / "tiny" / "README.md").unlink()
    result = deployment.run("topk_cache", partition=SHARDS[1])
    assert f"tiny/shards_manifest has no partition {SHARDS[1]}" in failure_text(result)
    assert (deployment.home / "store" / "tiny" / "README.md").is_file()

    def broken(*_: object, **__: object) -> None:
        raise StopIteration

    monkeypatch.setattr(card_asset, "contents_of", broken)
    result = deployment.run("topk_cache", partition=SHARDS[1])
    assert f"tiny/shards_manifest has no partition {SHARDS[1]}" in failure_text(result)
    assert "StopIteration" not in failure_text(result)
    assert deployment.run("shards_manifest", partition=SHARDS[1]).success


def test_a_first_run_that_makes_nothing_says_nothing_of_the_card_but_that_there_is_none(
    deployment: Deployment,
) -> None:
    result = deployment.run("topk_cache", partition=SHARDS[1])
    assert f"tiny/shards_manifest has no partition {SHARDS[1]}" in failure_text(result)
    records = deployment.instance.get_records_for_run(result.run_id).records
    said = [r.event_log_entry for r in records if "cache_card" in str(r.event_log_entry.user_message)]
    assert [(entry.level, entry.user_message) for entry in said] == [
        (20, "tiny/cache_card is not made: there is no result of tiny yet")
    ]


def test_the_command_writes_by_a_name_what_a_run_writes(
    deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(description="Sentences about a fox.")
    deployment.plan()
    assert deployment.run("shards_manifest", partition=SHARDS[0]).success
    folder = deployment.home / "store" / "tiny"
    files = {name: (folder / name).read_bytes() for name in ("README.md", "croissant.json")}
    assert b"about a fox" in files["README.md"]
    for name in files:
        (folder / name).unlink()
    monkeypatch.setenv("KD_HOME", str(deployment.home))
    monkeypatch.setattr(components, "load_recipe", lambda name: deployment.recipe)
    assert cli.main(["card", "tiny", "--write"]) == 0
    assert {name: (folder / name).read_bytes() for name in files} == files
