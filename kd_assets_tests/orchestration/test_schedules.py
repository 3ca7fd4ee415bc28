"""The nightly schedule: what is missing or stale, never what a live run holds. On a real instance; the events that the
schedule judges by are logged directly, since no job needs to run for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import dagster as dg
import pytest

from kd_assets.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    input_data_version_tag,
)
from kd_assets.orchestration import schedules
from kd_assets.orchestration.schedules import MAX_PARTITIONS_A_RUN, PartitionRange, nightly_requests, ranges_of
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment

Requests = list[tuple[str, str, set[str]]]


class Night:
    """Writes the history that a night starts from, and asks the schedule what it wants."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment, self.recipe, self.instance = deployment, deployment.recipe, deployment.instance
        self.instance.add_dynamic_partitions("tiny_shards", list(SHARDS))
        self.plan("plan1")

    def plan(self, version: str) -> None:
        self._log("shard_plan", None, {DATA_VERSION_TAG: version})

    def shard(self, key: str, *, data: str = "shard1", plan: str = "plan1", code: str | None = None) -> None:
        self._log(
            "shards_manifest",
            key,
            {
                DATA_VERSION_TAG: data,
                CODE_VERSION_TAG: code or self.recipe.code_version("shards_manifest"),
                input_data_version_tag(self.recipe.key("shard_plan")): plan,
            },
        )

    def cache(self, asset: str, key: str, *, shard: str = "shard1") -> None:
        self._log(
            asset,
            key,
            {
                DATA_VERSION_TAG: "cache1",
                CODE_VERSION_TAG: self.recipe.code_version(asset),
                input_data_version_tag(self.recipe.key("shards_manifest")): shard,
            },
        )

    def all_fresh(self, *, but: tuple[str, str] | None = None) -> None:
        """A history in which nothing is wanted, except the asset and partition `but`."""
        for key in SHARDS:
            self.shard(key)
            for asset in CACHES:
                if (asset, key) != but:
                    self.cache(asset, key)

    def _log(self, asset: str, key: str | None, tags: dict[str, str]) -> None:
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization(self.recipe.key(asset), partition=key, tags=tags)
        )

    def asks_for(self, *, put_aside: Mapping[str, set[str]] = MappingProxyType({})) -> Requests:
        return [
            (
                r.tags[ASSET_PARTITION_RANGE_START_TAG],
                r.tags[ASSET_PARTITION_RANGE_END_TAG],
                {k.path[-1] for k in r.asset_selection or ()},
            )
            for r in nightly_requests(self.instance, self.recipe, put_aside=put_aside)
            if isinstance(r, dg.RunRequest)
        ]

    def reason(self) -> str:
        (answer,) = nightly_requests(self.instance, self.recipe)
        assert isinstance(answer, dg.SkipReason)
        return str(answer.skip_message)


@pytest.fixture
def night(deploy: Callable[..., Deployment]) -> Night:
    return Night(deploy())


EVERYTHING = {"shards_manifest", *CACHES}


def test_a_recipe_without_shards_is_told_to_make_a_plan(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy()
    (answer,) = nightly_requests(deployment.instance, deployment.recipe)
    assert isinstance(answer, dg.SkipReason)
    assert "materialize tiny/shard_plan" in str(answer.skip_message)


def test_what_is_missing_is_asked_for_as_one_range(night: Night) -> None:
    assert night.asks_for() == [(SHARDS[0], SHARDS[-1], EVERYTHING)]


def test_nothing_is_asked_for_when_all_is_there_and_fresh(night: Night) -> None:
    night.all_fresh()
    assert "all 3 partitions of tiny are there and fresh" in night.reason()


def test_what_was_put_aside_is_asked_for_though_dagster_has_it_for_materialized(night: Night) -> None:
    night.all_fresh()
    assert night.asks_for(put_aside={"topk_cache": {SHARDS[1]}}) == [(SHARDS[1], SHARDS[1], {"topk_cache"})]
    assert night.asks_for(put_aside={"shards_manifest": {SHARDS[0]}}) == [(SHARDS[0], SHARDS[0], EVERYTHING)]
    assert night.asks_for(put_aside={"topk_cache": {"no-longer-planned"}, "student_smoke": {SHARDS[0]}}) == []


def test_one_missing_cache_of_one_partition_is_asked_for_alone(night: Night) -> None:
    night.all_fresh(but=("topk_cache", SHARDS[1]))
    assert night.asks_for() == [(SHARDS[1], SHARDS[1], {"topk_cache"})]


def test_a_new_plan_makes_every_shard_stale_and_its_caches_with_it(night: Night) -> None:
    night.all_fresh()
    night.plan("plan2")
    assert night.asks_for() == [(SHARDS[0], SHARDS[-1], EVERYTHING)]


def test_a_shard_with_new_content_makes_its_caches_stale_and_no_others(night: Night) -> None:
    night.all_fresh()
    night.shard(SHARDS[2], data="shard2")
    assert night.asks_for() == [(SHARDS[2], SHARDS[2], set(CACHES))]


def test_a_shard_materialized_again_with_the_same_content_leaves_its_caches_fresh(night: Night) -> None:
    night.all_fresh()
    night.shard(SHARDS[2])
    assert "fresh" in night.reason()


def test_another_code_version_is_stale(night: Night) -> None:
    night.all_fresh()
    night.shard(SHARDS[0], code="0-deadbeef")
    assert night.asks_for() == [(SHARDS[0], SHARDS[0], EVERYTHING)]


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_a_partition_that_a_live_run_holds_is_not_asked_for_again(night: Night, status: dg.DagsterRunStatus) -> None:
    job = night.deployment.definitions.resolve_job_def("tiny_caches")
    run = night.instance.create_run_for_job(
        job,
        tags={ASSET_PARTITION_RANGE_START_TAG: SHARDS[0], ASSET_PARTITION_RANGE_END_TAG: SHARDS[1]},
        status=status,
        asset_selection=frozenset({night.recipe.key("topk_cache")}),
    )
    assert night.asks_for() == [(SHARDS[2], SHARDS[2], EVERYTHING)]
    single = night.instance.create_run_for_job(job, tags={"dagster/partition": SHARDS[2]}, status=status)
    assert "live runs hold all 3 partitions" in night.reason()
    for ended in (run, single):
        night.instance.report_run_canceled(ended)
    assert night.asks_for() == [(SHARDS[0], SHARDS[-1], EVERYTHING)]


def test_a_live_run_of_another_recipe_holds_nothing_of_this_one(night: Night) -> None:
    @dg.asset(partitions_def=dg.DynamicPartitionsDefinition(name="tiny_shards"))
    def other() -> None: ...

    job = dg.Definitions(assets=[other]).resolve_implicit_global_asset_job_def()
    night.instance.create_run_for_job(
        job,
        tags={"dagster/partition": SHARDS[0]},
        status=dg.DagsterRunStatus.STARTED,
        asset_selection=frozenset({other.key}),
    )
    assert night.asks_for() == [(SHARDS[0], SHARDS[-1], EVERYTHING)]


def test_ranges_are_split_at_gaps_at_other_needs_and_at_the_most_partitions_of_a_run() -> None:
    keys = [f"s{i:04d}" for i in range(MAX_PARTITIONS_A_RUN + 10)]
    needed = dict.fromkeys(keys, ("shards_manifest",))
    assert [s.n_partitions for s in ranges_of(keys, needed)] == [MAX_PARTITIONS_A_RUN, 10]  # type: ignore[arg-type]
    few = {"s0000": ("topk_cache",), "s0001": ("topk_cache",), "s0003": ("topk_cache",), "s0004": ("embedding_cache",)}
    assert list(ranges_of(keys, few)) == [  # type: ignore[arg-type]
        PartitionRange(first="s0000", last="s0001", assets=("topk_cache",), n_partitions=2),
        PartitionRange(first="s0003", last="s0003", assets=("topk_cache",), n_partitions=1),
        PartitionRange(first="s0004", last="s0004", assets=("embedding_cache",), n_partitions=1),
    ]


def test_the_schedules_ship_stopped_and_evaluate_in_dagster(night: Night) -> None:
    definitions = night.deployment.definitions
    schedules = {s.name: s for s in definitions.schedules or () if isinstance(s, dg.ScheduleDefinition)}
    assert set(schedules) == {"tiny_nightly_plan", "tiny_nightly_caches"}
    assert all(s.default_status is dg.DefaultScheduleStatus.STOPPED for s in schedules.values())
    with dg.build_schedule_context(
        instance=night.instance,
        repository_def=definitions.get_repository_def(),
        resources={"platform": night.deployment.platform},
    ) as context:
        data = schedules["tiny_nightly_caches"].evaluate_tick(context)
    assert [r.tags[ASSET_PARTITION_RANGE_END_TAG] for r in data.run_requests or ()] == [SHARDS[-1]]


class CountedInstance:
    """A Dagster instance that counts what is read of its history."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self.n_queries = self.n_records = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instance, name)

    def get_latest_storage_id_by_partition(self, *args: Any) -> Any:
        self.n_queries += 1
        return self._instance.get_latest_storage_id_by_partition(*args)

    def fetch_materializations(self, *args: Any, **kwargs: Any) -> Any:
        self.n_queries += 1
        page = self._instance.fetch_materializations(*args, **kwargs)
        self.n_records += len(page.records)
        return page


@pytest.mark.parametrize("n_nights", [1, 4])
def test_a_tick_reads_the_last_materialization_of_each_partition_and_no_more_of_the_history(
    night: Night, n_nights: int
) -> None:
    for _ in range(n_nights):
        night.all_fresh()
    night.instance.add_dynamic_partitions("tiny_shards", ["tiny-00003"])  # one that was never materialized
    counted = CountedInstance(night.instance)
    (request,) = nightly_requests(counted, night.recipe)  # type: ignore[arg-type]
    assert isinstance(request, dg.RunRequest)
    assert request.tags[ASSET_PARTITION_RANGE_START_TAG] == "tiny-00003"
    n_assets = 1 + len(CACHES)
    assert counted.n_records == n_assets * len(SHARDS) + 1, "and the plan's"
    assert counted.n_queries == 2 * n_assets + 1


def test_the_tags_of_many_partitions_are_read_in_pages(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "READ_AT_ONCE", 2)
    night.all_fresh()
    night.shard(SHARDS[1], data="newer")
    counted = CountedInstance(night.instance)
    tags = schedules.latest_tags(counted, night.recipe.key("shards_manifest"), [*SHARDS, "never"])  # type: ignore[arg-type]
    assert {key: found[DATA_VERSION_TAG] for key, found in tags.items()} == {
        SHARDS[0]: "shard1",
        SHARDS[1]: "newer",
        SHARDS[2]: "shard1",
    }
    assert (counted.n_queries, counted.n_records) == (3, 3)
