"""The check `rebuilt` as Dagster shows it, whichever of its two caches is made last."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kd_assets.contract import Asset
from kd_assets.store import fingerprint
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment
from kd_assets_tests.orchestration.web_queries import web_queries

CACHES: dict[str, Any] = {
    "topk": {"k": 4, "max_length": 64},
    "hidden_states": {"blocks": [], "max_length": 8, "final": "both"},
}

BOTH: tuple[Asset, ...] = ("hidden_state_cache", "topk_cache")


def evaluated(deployment: Deployment, run_id: str) -> dict[str, Any]:
    return {e.asset_key.path[-1]: e for e in deployment.checks(run_id) if e.check_name == "rebuilt"}


def n_evaluations(deployment: Deployment, run_id: str) -> int:
    return sum(e.check_name == "rebuilt" for e in deployment.checks(run_id))


def shown(deployment: Deployment) -> dict[str, dict[str, list[str]]]:
    """By asset: the check's colours in the web UI, and which partitions have them."""
    with web_queries(deployment) as web:
        return {asset: web.checks(asset)["rebuilt"].partitions for asset in deployment.recipe.rebuilt_from}


def change_record(deployment: Deployment, **changes: Any) -> None:
    """What the states' manifest has of the comparison."""
    (path,) = deployment.platform.recipe_folder("tiny").glob("hidden_state_cache/*/*/*/manifest.json")
    raw = json.loads(path.read_bytes())
    raw["checks"]["rebuilt"] |= changes
    del raw["manifest_sha256"]
    path.chmod(0o644)
    path.write_text(json.dumps(raw | {"manifest_sha256": fingerprint(raw)}))


def test_caches_of_one_pass_are_compared_and_both_have_the_check(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(caches=CACHES, student=None)
    deployment.plan()
    result = deployment.run("shards_manifest", *BOTH, partition=SHARDS[0])
    assert result.success
    found = evaluated(deployment, result.run_id)
    assert set(found) == {"hidden_state_cache", "topk_cache"}
    for asset, check in found.items():
        assert check.passed
        assert 0 < check.metadata["worst_over_tolerance"].value < 1
        assert {"max_abs_logprob_difference", "mean_kl", "n_positions", "seed"} <= set(check.metadata)
        assert check.target_materialization_data.run_id == result.run_id
        assert ("recorded with hidden_state_cache" in check.description) is (asset == "topk_cache")
    assert found["topk_cache"].metadata == found["hidden_state_cache"].metadata
    assert n_evaluations(deployment, result.run_id) == 2
    assert shown(deployment) == {asset: {"succeeded": [SHARDS[0]]} for asset in BOTH}

    again = deployment.run(*BOTH, partition=SHARDS[0])
    assert set(evaluated(deployment, again.run_id)) == {"hidden_state_cache", "topk_cache"}
    assert n_evaluations(deployment, again.run_id) == 2


@pytest.mark.parametrize("first", ["topk_cache", "hidden_state_cache"])
def test_the_cache_that_is_made_last_is_compared_with_the_one_that_is_there_and_both_have_the_check(
    deploy: Callable[..., Deployment], first: Asset
) -> None:
    deployment = deploy(caches=CACHES, student=None)
    deployment.plan()
    last = "hidden_state_cache" if first == "topk_cache" else "topk_cache"
    before = deployment.run("shards_manifest", first, partition=SHARDS[0])
    assert before.success
    assert evaluated(deployment, before.run_id) == {}
    result = deployment.run(last, partition=SHARDS[0])
    assert result.success
    found = evaluated(deployment, result.run_id)
    assert {asset: check.passed for asset, check in found.items()} == {last: True, first: True}
    assert found[last].target_materialization_data.run_id == result.run_id
    assert found[first].target_materialization_data.run_id == before.run_id
    assert shown(deployment) == {asset: {"succeeded": [SHARDS[0]]} for asset in BOTH}


def test_a_comparison_that_failed_stands_where_it_is_recorded_and_nowhere_else(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(caches=CACHES, student=None)
    deployment.plan()
    assert deployment.run("shards_manifest", *BOTH, partition=SHARDS[0]).success
    change_record(deployment, passed=False, worst_over_tolerance=7.5)
    result = deployment.run(*BOTH, partition=SHARDS[0])
    assert not result.success
    found = evaluated(deployment, result.run_id)
    assert {asset: check.passed for asset, check in found.items()} == {"hidden_state_cache": False}


def test_states_that_were_compared_with_another_top_k_say_nothing_of_todays(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(caches=CACHES, student=None)
    deployment.plan()
    assert deployment.run("shards_manifest", *BOTH, partition=SHARDS[0]).success
    change_record(deployment, compared_with="f" * 64)
    for assets in (["topk_cache"], ["hidden_state_cache"], BOTH):
        result = deployment.run(*assets, partition=SHARDS[0])
        assert set(evaluated(deployment, result.run_id)) == {"hidden_state_cache"} & set(assets)


def test_a_recipe_without_final_states_has_no_such_check(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy()
    names = {key.name for key in deployment.definitions.resolve_asset_graph().asset_check_keys}
    assert "recomputed" in names
    assert "rebuilt" not in names
