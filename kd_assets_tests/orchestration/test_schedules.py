"""The nightly schedule: what is missing or stale, never what a live run holds. On a real instance; the events that the
schedule judges by are logged directly, since no job needs to run for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from kd_assets.contract import Asset
from kd_assets.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    input_data_version_tag,
)
from kd_assets.orchestration.schedules import (
    MAX_PARTITIONS_A_RUN,
    MOST_RANGES,
    WHY_TAG,
    PartitionRange,
    few_ranges,
    nightly_requests,
    ranges_of,
)
from kd_assets.orchestration.staleness.latest_tags import FILE, latest_tags, read_ahead
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


def test_a_night_after_a_run_that_stopped_in_the_middle_of_many_partitions_asks_for_few_runs(night: Night) -> None:
    keys = [f"tiny-{i:05d}" for i in range(3, 3 + 3 * MOST_RANGES)]
    night.instance.add_dynamic_partitions("tiny_shards", keys)
    night.all_fresh()
    for i, key in enumerate(keys):
        night.shard(key)
        for asset in CACHES:
            if i % 3 == 0 or (i % 3 == 1 and asset != "topk_cache"):
                night.cache(asset, key)
    assert night.asks_for() == [(keys[1], keys[-1], set(CACHES))]
    assert said(night)[1] == [f"{2 * MOST_RANGES} missing, {MOST_RANGES - 1} between them that are there"]


def test_what_a_live_run_holds_is_in_no_range_though_it_lies_between_two_that_are_needed(night: Night) -> None:
    keys = [f"tiny-{i:05d}" for i in range(3, 3 + 4 * MOST_RANGES)]
    night.instance.add_dynamic_partitions("tiny_shards", keys)
    night.all_fresh()
    for key in keys[::2]:
        night.shard(key)
        for asset in CACHES:
            night.cache(asset, key)
    for held in (keys[20], keys[23]):  # the one is there, the other is missing
        job = night.deployment.definitions.resolve_job_def("tiny_caches")
        night.instance.create_run_for_job(job, tags={"dagster/partition": held}, status=dg.DagsterRunStatus.STARTED)
    assert night.asks_for() == [
        (keys[1], keys[19], EVERYTHING),
        (keys[21], keys[21], EVERYTHING),
        (keys[25], keys[-1], EVERYTHING),
    ]


@pytest.mark.parametrize(
    ("n_ranges", "gap", "expected"),
    [
        (MOST_RANGES, 2, MOST_RANGES),  # few enough as they are
        (MOST_RANGES + 1, 2, 1),
        (20, 100, 4),  # no run is of more than MAX_PARTITIONS_A_RUN, those between included
        (20, MAX_PARTITIONS_A_RUN, 20),
    ],
)
def test_neighbouring_ranges_become_one_where_they_are_many(
    night: Night, n_ranges: int, gap: int, expected: int
) -> None:
    keys = [f"s{i:05d}" for i in range(n_ranges * gap)]
    needed: dict[str, tuple[Asset, ...]] = dict.fromkeys(keys[::gap], ("topk_cache",))
    found = few_ranges(night.recipe, keys, needed, held=set(), would_be_made=lambda: needed)
    assert len(found) == expected
    assert sum(r.n_partitions for r in found) == n_ranges


def test_ranges_become_one_only_where_their_run_makes_nothing_that_was_not_asked_for(night: Night) -> None:
    keys = [f"s{i:05d}" for i in range(4 * MOST_RANGES)]
    needed: dict[str, tuple[Asset, ...]] = dict.fromkeys(keys[::2], ("topk_cache",))
    needed[keys[20]] = ("embedding_cache",)

    def n_ranges(**stale: tuple[Asset, ...]) -> int:
        made = {**needed, **stale}
        return len(few_ranges(night.recipe, keys, needed, held=set(), would_be_made=lambda: made))

    assert n_ranges() == 1
    assert n_ranges(s00007=("embedding_cache",)) == 2, "it would be made with what s00020 needs, and not without"
    assert n_ranges(s00007=("topk_cache",)) == 2
    assert n_ranges(s00008=("topk_cache", "embedding_cache")) == 2, "of a needed one another asset is stale"
    assert n_ranges(s00007=("hidden_state_cache",)) == 1


def test_the_schedules_ship_stopped_and_evaluate_in_dagster(night: Night) -> None:
    definitions = night.deployment.definitions
    schedules = {s.name: s for s in definitions.schedules or () if isinstance(s, dg.ScheduleDefinition)}
    assert set(schedules) == {"tiny_nightly_plan", "tiny_nightly_caches"}
    assert all(s.default_status is dg.DefaultScheduleStatus.STOPPED for s in schedules.values())
    with dg.build_schedule_context(
        instance=night.instance,
        repository_def=definitions.get_repository_def(),
        resources={"kd_assets_platform": night.deployment.platform},
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
    monkeypatch.setattr("kd_assets.orchestration.staleness.latest_tags.READ_AT_ONCE", 2)
    night.all_fresh()
    night.shard(SHARDS[1], data="newer")
    counted = CountedInstance(night.instance)
    tags = latest_tags(counted, night.recipe.key("shards_manifest"), [*SHARDS, "never"])  # type: ignore[arg-type]
    assert {key: found[DATA_VERSION_TAG] for key, found in tags.items()} == {
        SHARDS[0]: "shard1",
        SHARDS[1]: "newer",
        SHARDS[2]: "shard1",
    }
    assert (counted.n_queries, counted.n_records) == (3, 3)


def data_versions(night: Night, instance: Any = None) -> dict[str, str]:
    tags = latest_tags(instance or night.instance, night.recipe.key("shards_manifest"), SHARDS)
    return {key: of_key[DATA_VERSION_TAG] for key, of_key in tags.items()}


def test_a_materialization_is_read_once_and_afterwards_only_new_ones_are(night: Night) -> None:
    for key in SHARDS:
        night.shard(key)
    first = data_versions(night)
    counted = CountedInstance(night.instance)
    assert data_versions(night, counted) == first
    assert counted.n_records == 1, "of all, the last one, to see that it is there as it was"
    night.shard(SHARDS[1], data="newer")
    assert data_versions(night, counted) == first | {SHARDS[1]: "newer"}
    assert counted.n_records == 3


def test_storage_ids_that_are_given_anew_after_a_run_was_deleted_are_read_anew(night: Night) -> None:
    for key in SHARDS:
        night.shard(key, data="older")
    assert set(data_versions(night).values()) == {"older"}
    ids = night.instance.get_latest_storage_id_by_partition(
        night.recipe.key("shards_manifest"), dg.DagsterEventType.ASSET_MATERIALIZATION
    )
    with night.instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
        connection.execute(sa.text(f"delete from event_logs where id >= {min(ids.values())}"))
    for key in SHARDS:
        night.shard(key, data="newer")
    again = night.instance.get_latest_storage_id_by_partition(
        night.recipe.key("shards_manifest"), dg.DagsterEventType.ASSET_MATERIALIZATION
    )
    assert again == ids
    assert set(data_versions(night).values()) == {"newer"}


def test_a_damaged_file_of_tags_costs_a_second_reading_and_nothing_else(night: Night) -> None:
    for key in SHARDS:
        night.shard(key)
    first = data_versions(night)
    (Path(night.instance.root_directory) / FILE).write_bytes(b"no database" * 1000)
    assert data_versions(night) == first
    assert data_versions(night) == first
    counted = CountedInstance(night.instance)
    assert data_versions(night, counted) == first
    assert counted.n_records == 1, "the file has been made anew"


def test_what_a_tick_cannot_read_the_next_one_does(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_assets.orchestration.staleness.latest_tags.READ_AT_ONCE", 1)
    for key in SHARDS:
        night.shard(key)
    left = []
    for _ in range(3):
        now = iter(range(10))
        keys = [night.recipe.key("shards_manifest"), night.recipe.key("topk_cache")]
        left.append(read_ahead(night.instance, keys, SHARDS, until=2, clock=lambda now=now: float(next(now))))  # type: ignore[misc]
    assert left == [1, 0, 0]


def said(night: Night, **how: Any) -> tuple[list[str], list[str]]:
    """What a tick tells its log, and the reason that each run request has in its tags."""
    lines: list[str] = []
    requests = list(nightly_requests(night.instance, night.recipe, say=lines.append, **how))
    return lines, [r.tags[WHY_TAG] for r in requests if isinstance(r, dg.RunRequest)]


def test_a_tick_says_which_partitions_how_many_and_that_they_are_missing(night: Night) -> None:
    assert said(night) == (
        [f"{SHARDS[0]} to {SHARDS[-1]}, 3 partitions of {', '.join(night.recipe.partitioned)}: 3 missing"],
        ["3 missing"],
    )


def test_a_tick_says_since_what_partitions_are_stale(night: Night) -> None:
    night.all_fresh()
    night.shard(SHARDS[1], data="shard2")
    night.shard(SHARDS[2], code="of an earlier recipe")
    assert said(night)[1] == [
        "1 stale since tiny/shards_manifest changed",
        "1 stale since the recipe or the code that computes changed",
    ]
    night.all_fresh()
    night.plan("plan2")
    assert said(night)[1] == ["3 stale since tiny/shard_plan changed"]


def test_a_tick_says_what_is_in_quarantine_and_how_many_live_runs_hold(night: Night) -> None:
    night.all_fresh()
    assert said(night, put_aside={"topk_cache": {SHARDS[1]}})[1] == ["1 in quarantine"]
    job = night.deployment.definitions.resolve_job_def("tiny_caches")
    held = night.instance.create_run_for_job(
        job, tags={"dagster/partition": SHARDS[0]}, status=dg.DagsterRunStatus.STARTED
    )
    assert held.job_name == "tiny_caches"
    lines, _ = said(night, put_aside={"topk_cache": set(SHARDS)})
    assert lines[-1] == "1 more that are missing or stale are held by live runs"


def test_a_tick_says_in_which_run_a_partition_failed_that_is_missing(night: Night) -> None:
    job = night.deployment.definitions.resolve_job_def("tiny_caches")
    tags = {ASSET_PARTITION_RANGE_START_TAG: SHARDS[1], ASSET_PARTITION_RANGE_END_TAG: SHARDS[2]}
    failed = night.instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.FAILURE)
    assert said(night)[1] == [f"2 failed in run {failed.run_id[:8]}, 1 missing"]
