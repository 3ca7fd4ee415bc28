"""A result that was put aside is asked for by the night, and made again by what asks for it."""

from __future__ import annotations

import dagster as dg

from kd_assets.dagster_internals import ASSET_PARTITION_RANGE_START_TAG
from kd_assets.orchestration.assets import caches_schedule
from kd_assets.store import CacheReader, put_aside, verify
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment


def requests_of_the_night(deployment: Deployment) -> list[tuple[str, set[str]]]:
    context = dg.build_schedule_context(
        instance=deployment.instance, resources={"kd_assets_platform": deployment.platform}
    )
    found = caches_schedule(deployment.recipe).evaluate_tick(context).run_requests or ()
    return [
        (request.tags[ASSET_PARTITION_RANGE_START_TAG], {key.path[-1] for key in request.asset_selection or ()})
        for request in found
    ]


def test_what_was_put_aside_is_asked_for_by_the_night_and_made_again(deployment: Deployment) -> None:
    everything = ("shards_manifest", *CACHES)
    assert deployment.run(*everything, partition_range=(SHARDS[0], SHARDS[-1])).success
    folder = deployment.platform.recipe_folder(deployment.recipe.name)
    before = CacheReader(folder, "topk_cache")
    versions = [manifest.data_version for manifest in before.manifests]
    assert requests_of_the_night(deployment) == []

    (moved,) = put_aside(folder, [SHARDS[1]], ["topk_cache"], why="a bad node")
    assert CacheReader(folder, "topk_cache", missing="skip").partition_keys == (SHARDS[0], SHARDS[2])
    assert requests_of_the_night(deployment) == [(SHARDS[1], {"topk_cache"})]

    n_loads = deployment.n_teacher_loads()
    assert deployment.run("topk_cache", partition=SHARDS[1]).success
    assert deployment.n_teacher_loads() == n_loads + 1
    after = CacheReader(folder, "topk_cache")
    assert [manifest.data_version for manifest in after.manifests] == versions
    assert after.folders[1] == moved.was
    assert requests_of_the_night(deployment) == []
    assert verify(folder).ok
