"""The check `rebuilt` as Dagster shows it, whichever of its two caches is made last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kd_assets.contract import Asset
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment

CACHES: dict[str, Any] = {
    "topk": {"k": 4, "max_length": 64},
    "hidden_states": {"blocks": [], "max_length": 8, "final": "both"},
}


def evaluated(deployment: Deployment, run_id: str) -> dict[str, Any]:
    return {e.asset_key.path[-1]: e for e in deployment.checks(run_id) if e.check_name == "rebuilt"}


def test_caches_of_one_pass_are_compared_and_the_states_have_the_check(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(caches=CACHES, student=None)
    deployment.plan()
    result = deployment.run("shards_manifest", "topk_cache", "hidden_state_cache", partition=SHARDS[0])
    assert result.success
    found = evaluated(deployment, result.run_id)
    assert set(found) == {"hidden_state_cache"}
    check = found["hidden_state_cache"]
    assert check.passed
    assert 0 < check.metadata["worst_over_tolerance"].value < 1
    assert {"max_abs_logprob_difference", "mean_kl", "n_positions", "seed"} <= set(check.metadata)


@pytest.mark.parametrize("first", ["topk_cache", "hidden_state_cache"])
def test_the_cache_that_is_made_last_is_compared_with_the_one_that_is_there(
    deploy: Callable[..., Deployment], first: Asset
) -> None:
    deployment = deploy(caches=CACHES, student=None)
    deployment.plan()
    last = "hidden_state_cache" if first == "topk_cache" else "topk_cache"
    result = deployment.run("shards_manifest", first, partition=SHARDS[0])
    assert result.success
    assert evaluated(deployment, result.run_id) == {}
    result = deployment.run(last, partition=SHARDS[0])
    assert result.success
    found = evaluated(deployment, result.run_id)
    assert {asset: check.passed for asset, check in found.items()} == {last: True}


def test_a_recipe_without_final_states_has_no_such_check(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy()
    names = {key.name for key in deployment.definitions.resolve_asset_graph().asset_check_keys}
    assert "recomputed" in names
    assert "rebuilt" not in names
