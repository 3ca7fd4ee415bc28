"""Sources that grow are planned anew, and what is missing then is asked for, once. On a real instance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from kd_assets.orchestration.assets import new_data_sensor, recipe_jobs
from kd_assets.orchestration.new_data import look_for_new_data, requests_for_missing
from kd_assets.orchestration.schedules import MOST_RANGES
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, documents
from kd_assets_tests.orchestration.test_schedules import Night

EVERYTHING = {"shards_manifest", *CACHES}


class Sensor:
    """Looks again and again, as the daemon does."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.cursor: str | None = None

    def look(self) -> list[dg.RunRequest | dg.SkipReason]:
        context = dg.build_sensor_context(instance=self.deployment.instance, cursor=self.cursor)
        asked = list(look_for_new_data(context, self.deployment.recipe, self.deployment.platform))
        self.cursor = context.cursor
        return asked

    def requests(self) -> list[dg.RunRequest]:
        return [asked for asked in self.look() if isinstance(asked, dg.RunRequest)]

    def reason(self) -> str:
        (asked,) = self.look()
        assert isinstance(asked, dg.SkipReason)
        return str(asked.skip_message)


def ranges(requests: list[dg.RunRequest]) -> list[tuple[str, str, set[str]]]:
    return [
        (
            request.tags["dagster/asset_partition_range_start"],
            request.tags["dagster/asset_partition_range_end"],
            {key.path[-1] for key in request.asset_selection or ()},
        )
        for request in requests
    ]


def materialized(deployment: Deployment, *keys: str, assets: tuple[str, ...] = ("shards_manifest", *CACHES)) -> None:
    """As if these had been made."""
    for asset in assets:
        for key in keys:
            event = dg.AssetMaterialization(deployment.recipe.key(asset), partition=key)
            deployment.instance.report_runless_asset_event(event)


def live_run(deployment: Deployment, job: str, **tags: str) -> None:
    deployment.instance.create_run_for_job(
        deployment.definitions.resolve_job_def(f"tiny_{job}"), status=dg.DagsterRunStatus.STARTED, tags=tags
    )


def test_sources_without_a_plan_are_planned(deploy: Callable[..., Deployment]) -> None:
    sensor = Sensor(deploy())
    (request,) = sensor.requests()
    assert request.job_name == "tiny_plan"
    assert "have not changed" in sensor.reason(), "and not twice: there are no partitions yet"


def test_a_plan_of_the_sources_as_they_are_is_not_made_again(deployment: Deployment) -> None:
    assert ranges(Sensor(deployment).requests()) == [(SHARDS[0], SHARDS[2], EVERYTHING)]


def test_a_file_that_grows_is_planned_and_its_new_partitions_alone_are_asked_for(deployment: Deployment) -> None:
    sensor = Sensor(deployment)
    materialized(deployment, *SHARDS)
    assert "all 3 partitions are there" in sensor.reason()
    deployment.write(documents(len(SHARDS) * 4 + 4))
    (plan,) = sensor.requests()
    assert plan.job_name == "tiny_plan"
    deployment.plan()
    (caches,) = sensor.requests()
    assert caches.job_name == "tiny_caches"
    assert ranges([caches]) == [("tiny-00003", "tiny-00003", EVERYTHING)]
    (again,) = sensor.requests()
    assert again.run_key == caches.run_key, "Dagster starts no second run with the same key"
    materialized(deployment, "tiny-00003")
    assert "all 4 partitions are there" in sensor.reason()


def test_a_file_that_is_again_what_it_was_is_planned_again(deployment: Deployment) -> None:
    sensor = Sensor(deployment)
    sensor.look()
    keys = []
    for n in (16, 12, 16):
        deployment.write(documents(n))
        keys += [request.run_key for request in sensor.requests()]
    assert len(set(keys)) == 3


def test_only_assets_that_are_missing_are_asked_for(deployment: Deployment) -> None:
    materialized(deployment, *SHARDS, assets=("shards_manifest", "topk_cache"))
    materialized(deployment, SHARDS[1], assets=CACHES[1:])
    missing = set(CACHES[1:])
    assert ranges(Sensor(deployment).requests()) == [
        (SHARDS[0], SHARDS[0], missing),
        (SHARDS[2], SHARDS[2], missing),
    ]


def test_partitions_that_a_live_run_holds_are_left_to_it(deployment: Deployment) -> None:
    tags = {"dagster/asset_partition_range_start": SHARDS[0], "dagster/asset_partition_range_end": SHARDS[2]}
    live_run(deployment, "caches", **tags)
    assert "live runs hold all 3 missing partitions" in Sensor(deployment).reason()


def test_a_plan_that_is_being_made_is_waited_for(deployment: Deployment) -> None:
    sensor = Sensor(deployment)
    live_run(deployment, "plan")
    deployment.write(documents(16))
    assert "is being made" in sensor.reason()
    assert sensor.cursor is None, "what changed is asked for when it has ended"


def test_sources_that_cannot_be_reached_have_not_changed(deployment: Deployment, tmp_path: Path) -> None:
    sensor = Sensor(deployment)
    sensor.look()
    before = sensor.cursor
    kept = deployment.corpus.rename(tmp_path / "away")
    assert "corpus.jsonl" in sensor.reason()
    assert sensor.cursor == before
    kept.rename(deployment.corpus)
    assert ranges(sensor.requests()) == [(SHARDS[0], SHARDS[2], EVERYTHING)]


def test_a_cursor_that_is_none_of_ours_is_as_none(deployment: Deployment) -> None:
    sensor = Sensor(deployment)
    sensor.cursor = "written by hand"
    assert ranges(sensor.requests()) == [(SHARDS[0], SHARDS[2], EVERYTHING)]


def test_the_sensor_is_off_by_default_and_its_ticks_start_the_recipes_jobs(deployment: Deployment) -> None:
    sensor = deployment.definitions.resolve_sensor_def("tiny_new_data")
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    assert sensor.minimum_interval_seconds == 300
    context = dg.build_sensor_context(
        instance=deployment.instance,
        resources={"kd_assets_platform": deployment.platform},
        repository_def=deployment.definitions.get_repository_def(),
    )
    (request,) = sensor.evaluate_tick(context).run_requests or ()
    assert request.job_name == "tiny_caches"
    run_id = deployment.instance.create_run_for_job(
        deployment.definitions.resolve_job_def("tiny_caches"), tags=dict(request.tags)
    ).run_id
    assert deployment.instance.get_run_by_id(run_id) is not None


@pytest.mark.slow
def test_the_runs_that_the_sensor_asks_for_make_what_was_added(deployment: Deployment) -> None:
    sensor = Sensor(deployment)
    deployment.write(documents(16))
    for _ in range(2):
        for request in sensor.requests():
            job = deployment.definitions.resolve_job_def(str(request.job_name))
            assert job.execute_in_process(instance=deployment.instance, tags=dict(request.tags)).success
    assert "all 4 partitions are there" in sensor.reason()


def test_its_jobs_are_those_of_the_recipe(deployment: Deployment) -> None:
    jobs = recipe_jobs(deployment.recipe)
    assert [job.name for job in new_data_sensor(deployment.recipe, jobs[:2]).jobs] == ["tiny_plan", "tiny_caches"]


def test_what_is_missing_between_fresh_partitions_is_few_runs_and_what_is_stale_there_stays_the_nightlys(
    deploy: Callable[..., Deployment],
) -> None:
    history = Night(deploy())
    keys = [*SHARDS, *(f"tiny-{i:05d}" for i in range(len(SHARDS), 2 * MOST_RANGES + 2))]
    history.instance.add_dynamic_partitions("tiny_shards", keys[len(SHARDS) :])
    for key in keys[::2]:
        history.shard(key)
        for asset in CACHES:
            history.cache(asset, key)

    def asked() -> list[dg.RunRequest]:
        found = requests_for_missing(history.instance, history.recipe)
        return [request for request in found if isinstance(request, dg.RunRequest)]

    (request,) = asked()
    assert ranges([request]) == [(keys[1], keys[-1], EVERYTHING)]
    assert request.tags["kd_assets/why"] == f"{MOST_RANGES + 1} missing"
    history.plan("plan2")
    assert ranges(asked()) == [(key, key, EVERYTHING) for key in keys[1::2]]
