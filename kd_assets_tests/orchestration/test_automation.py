"""`automation: condition`: the conditions, evaluated by Dagster on a real instance; nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kd_assets.dagster_internals import PARTITION_NAME_TAG
from kd_assets.orchestration.schedules import NO_PLAN_YET
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment
from kd_assets_tests.orchestration.test_schedules import EVERYTHING, Night

Asked = set[tuple[str, str | None]]


class Looks:
    """The sensor's looks, one after the other."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.cursor: Any = None

    def look(self) -> Asked:
        """What is asked for: asset and partition."""
        result = dg.evaluate_automation_conditions(
            defs=self.deployment.definitions, instance=self.deployment.instance, cursor=self.cursor
        )
        self.cursor = result.cursor
        asked: dict[str, set[str | None]] = {
            asset: set(result.get_requested_partitions(self.deployment.recipe.key(asset)))
            for asset in self.deployment.recipe.partitioned
        }
        return {(asset, key) for asset, keys in asked.items() for key in keys}


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield Deployment(tmp_path, tmp_path / "no teacher", instance, automation="condition")


def of(*keys: str, assets: Any = EVERYTHING) -> Asked:
    return {(asset, key) for asset in assets for key in keys}


def test_what_is_missing_is_asked_for_once(deployment: Deployment) -> None:
    Night(deployment)
    looks = Looks(deployment)
    assert looks.look() == of(*SHARDS)
    assert looks.look() == set()
    assert looks.look() == set()
    deployment.instance.add_dynamic_partitions("tiny_shards", ["tiny-00003"])
    assert looks.look() == of("tiny-00003"), "a plan has named another"


def test_before_the_first_plan_nothing_is_asked_for(deployment: Deployment) -> None:
    deployment.instance.add_dynamic_partitions("tiny_shards", [NO_PLAN_YET])
    assert Looks(deployment).look() == set()


def test_what_is_stale_is_asked_for_once(deployment: Deployment) -> None:
    night = Night(deployment)
    night.all_fresh()
    looks = Looks(deployment)
    assert looks.look() == set()
    night.shard(SHARDS[1], data="shard2")
    assert looks.look() == of(SHARDS[1], assets=CACHES), "its shard has other content"
    assert looks.look() == set()
    night.shard(SHARDS[0])
    assert looks.look() == set(), "a shard that was made again with the same content"
    night.plan("plan2")
    assert looks.look() == of(*SHARDS, assets=["shards_manifest"])
    assert looks.look() == set()


def test_what_a_live_run_makes_is_not_asked_for(deployment: Deployment) -> None:
    Night(deployment)
    job = deployment.definitions.resolve_job_def("tiny_caches")
    run = deployment.instance.create_run_for_job(
        job, tags={PARTITION_NAME_TAG: SHARDS[0]}, status=dg.DagsterRunStatus.STARTED
    )
    planned = deployment.instance.get_records_for_run(run.run_id).records
    looks = Looks(deployment)
    assert looks.look() == of(*SHARDS[1:]), planned


def test_the_sensor_ships_stopped_and_takes_the_place_of_the_nightly_schedule(deployment: Deployment) -> None:
    repository = deployment.definitions.get_repository_def()
    assert {schedule.name for schedule in repository.schedule_defs} == {"tiny_nightly_plan"}
    sensor = repository.get_sensor_def("tiny_automation")
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    assert isinstance(sensor, dg.AutomationConditionSensorDefinition)
    assert {s.name for s in repository.sensor_defs if isinstance(s, dg.AutomationConditionSensorDefinition)} == {
        "tiny_automation"
    }, "Dagster makes none of its own beside it"
