"""Dagster's own verdict: a shard made again with equal content leaves its caches fresh, a changed one turns them stale.

The verdict is computed by the resolver behind the web UI's "stale" marks, which Dagster does not export.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus

from kd_assets.orchestration import card_asset
from kd_assets.orchestration.staleness.latest_tags import latest_tags
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment, documents, failure_text
from kd_assets_tests.orchestration.test_schedules import CountedInstance


def status(deployment: Deployment, asset: str, partition: str | None = None) -> StaleStatus:
    from dagster._core.definitions.assets.graph.asset_graph import AssetGraph
    from dagster._core.loader import LoadingContextForTest

    graph: AssetGraph = deployment.definitions.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(deployment.instance, graph, LoadingContextForTest(deployment.instance))
    return resolver.get_status(deployment.recipe.key(asset), partition)


def run(deployment: Deployment, *assets: str) -> None:
    result = deployment.run(*assets, partition_range=(SHARDS[0], SHARDS[1]))
    assert result.success, failure_text(result)


def test_equal_content_stays_fresh_and_changed_content_turns_stale(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(caches={"embeddings": {"max_length": 64}}, student=None)
    deployment.plan()
    run(deployment, "shards_manifest", "embedding_cache")
    assert status(deployment, "embedding_cache", SHARDS[0]) is StaleStatus.FRESH

    run(deployment, "shards_manifest")
    assert status(deployment, "embedding_cache", SHARDS[0]) is StaleStatus.FRESH, "the same shard again"

    changed = documents(12)
    changed[5]["text"] += " again"
    deployment.write(changed)
    deployment.plan()
    assert status(deployment, "shards_manifest", SHARDS[0]) is StaleStatus.STALE, "a new plan: to be looked at"
    run(deployment, "shards_manifest")
    assert status(deployment, "shards_manifest", SHARDS[0]) is StaleStatus.FRESH
    assert status(deployment, "embedding_cache", SHARDS[0]) is StaleStatus.FRESH, "its shard did not change"
    assert status(deployment, "embedding_cache", SHARDS[1]) is StaleStatus.STALE, "its shard changed"

    loads = deployment.n_teacher_loads()
    run(deployment, "embedding_cache")
    assert status(deployment, "embedding_cache", SHARDS[1]) is StaleStatus.FRESH
    assert deployment.n_teacher_loads() == loads + 1
    old_and_new = list(deployment.platform.recipe_folder("tiny").glob(f"embedding_cache/*/{SHARDS[1]}/*/manifest.json"))
    assert len(old_and_new) == 2, "the old result is still there"


def test_what_a_run_records_is_not_read_again_to_see_what_is_stale(
    deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(caches={"embeddings": {"max_length": 64}}, student=None)
    deployment.plan()
    run(deployment, "shards_manifest", "embedding_cache")
    key, counted = deployment.recipe.key("embedding_cache"), CountedInstance(deployment.instance)
    known = latest_tags(counted, key, SHARDS)  # type: ignore[arg-type]
    assert counted.n_records == 1, "the last one, to see that it is there as it was"
    monkeypatch.setattr("kd_assets.orchestration.staleness.latest_tags.FILE", Path("another.sqlite"))
    assert latest_tags(counted, key, SHARDS) == known  # type: ignore[arg-type]
    assert counted.n_records == 1 + 2
    assert len(known) == 2


def test_a_card_is_fresh_until_a_partition_is_made_after_it_whatever_is_not_made_yet(
    deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(caches={"embeddings": {"max_length": 64}}, student=None)
    deployment.plan()
    assert status(deployment, "cache_card") is StaleStatus.MISSING
    run(deployment, "shards_manifest")
    assert status(deployment, "cache_card") is StaleStatus.FRESH, (
        "caches of which nothing is made are none of its inputs"
    )

    monkeypatch.setattr(card_asset, "why_not_yet", lambda *_: "it was made a moment ago")
    run(deployment, "embedding_cache")
    assert status(deployment, "cache_card") is StaleStatus.STALE
    assert deployment.run("cache_card").success
    assert status(deployment, "cache_card") is StaleStatus.FRESH
