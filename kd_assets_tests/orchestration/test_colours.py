"""What is green, red and yellow in the web UI, by the queries that it makes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from kd_assets.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    CheckTarget,
    input_data_version_tag,
)
from kd_assets.errors import StorageUnavailableError, StorageUnreachableError
from kd_assets.orchestration.recording.recorder import latest_data_version
from kd_assets.orchestration.schedules import NO_PLAN_YET, nightly_requests
from kd_assets.orchestration.staleness.planned_checks import CREATED_AFTER_S
from kd_assets.orchestration.staleness.up_to_date import (
    LOOK_AFAR_EVERY_S,
    PAUSE_S_A_RESULT,
    Looked,
    look_whether_up_to_date,
)
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment, documents, failure_text
from kd_assets_tests.orchestration.web_queries import web_queries

SMALL = {"caches": {"embeddings": {"max_length": 64}}, "student": None}
PARTITION_CHECKS = ("complete", "schema", "finite", "recomputed")


class Sensor:
    """`<recipe>_up_to_date`, tick by tick."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment, self.cursor, self.now = deployment, "", 0.0

    def tick(self) -> str:
        context = dg.build_sensor_context(instance=self.deployment.instance, cursor=self.cursor)
        answer = look_whether_up_to_date(
            context, self.deployment.recipe, self.deployment.platform, clock=lambda: self.now
        )
        self.cursor = context.cursor or ""
        return str(answer.skip_message)


def break_a_shard(deployment: Deployment) -> None:
    lines = deployment.corpus.read_text().splitlines()
    lines[5] = json.dumps({"text": None})
    deployment.corpus.write_text("\n".join(lines) + "\n")


def test_a_bad_shard_leaves_the_checks_of_the_others_green_and_has_none_itself(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(**SMALL)
    break_a_shard(deployment)
    deployment.plan()
    assert not deployment.run("shards_manifest", "embedding_cache", partition_range=(SHARDS[0], SHARDS[2])).success
    with web_queries(deployment) as web:
        assert web.partitions("embedding_cache") == (3, 2, 1)
        shown = web.checks("embedding_cache")
    for name in PARTITION_CHECKS:
        assert shown[name].partitions == {"succeeded": [SHARDS[0], SHARDS[2]]}, name


def test_a_good_run_does_not_end_in_checks_that_are_missing(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(**SMALL)
    deployment.plan()
    result = deployment.run("shards_manifest", "embedding_cache", partition_range=(SHARDS[0], SHARDS[2]))
    assert result.success, failure_text(result)
    said = [entry.user_message for entry in deployment.instance.all_logs(result.run_id)]
    assert not [line for line in said if "did not yield" in line]
    assert len(deployment.checks(result.run_id)) == 3 * len(PARTITION_CHECKS), "and each is recorded once"
    with web_queries(deployment) as web:
        for name in PARTITION_CHECKS:
            assert web.checks("embedding_cache")[name].partitions == {"succeeded": list(SHARDS)}


def test_a_recipe_that_was_never_planned_has_a_partition_that_is_missing(deploy: Callable[..., Deployment]) -> None:
    """Of no partitions at all Dagster's web UI says in green that all are there."""
    deployment = deploy(**SMALL)
    sensor = Sensor(deployment)
    assert "no shard plan yet" in sensor.tick()
    with web_queries(deployment) as web:
        assert web.partitions("embedding_cache") == (1, 0, 0)
    (reason,) = nightly_requests(deployment.instance, deployment.recipe)
    assert isinstance(reason, dg.SkipReason), "nobody works for it"
    result = deployment.run("shards_manifest", partition=NO_PLAN_YET)
    assert "materialize tiny/shard_plan" in failure_text(result)
    deployment.plan()
    assert list(deployment.instance.get_dynamic_partitions("tiny_shards")) == list(SHARDS)


@pytest.fixture
def made(deploy: Callable[..., Deployment]) -> Deployment:
    deployment = deploy(**SMALL)
    deployment.plan()
    result = deployment.run("shards_manifest", "embedding_cache", partition_range=(SHARDS[0], SHARDS[1]))
    assert result.success, failure_text(result)
    return deployment


def test_a_changed_source_a_new_plan_and_a_changed_parameter_show_on_the_assets_own_pages(
    made: Deployment, deploy: Callable[..., Deployment]
) -> None:
    sensor = Sensor(made)
    sensor.tick()
    with web_queries(made) as web:
        plan, cache = web.checks("shard_plan"), web.checks("embedding_cache")
        assert (plan["up_to_date"].status, cache["up_to_date"].status) == ("SUCCEEDED", "SUCCEEDED")
        assert "embedding_cache: 1 missing, 0 stale" in plan["coverage"].description
        assert (plan["coverage"].status, plan["coverage"].severity) == ("FAILED", "WARN")
    assert sensor.tick() == "nothing has changed since the last look"

    changed = documents(12)
    changed[5]["text"] += " again"
    made.write(changed)
    sensor.tick()
    with web_queries(made) as web:
        shown = web.checks("shard_plan")["up_to_date"]
        assert (shown.status, shown.severity) == ("FAILED", "WARN")
        assert "source corpus" in shown.description
        assert "corpus.jsonl" in shown.description

    made.plan()
    with web_queries(made) as web:
        plan = web.checks("shard_plan")
        assert plan["up_to_date"].status == "SUCCEEDED"
        assert "0 of 3 partitions" in plan["coverage"].description, "all are to be looked at again"
    sensor.tick()
    with web_queries(made) as web:
        shown = web.checks("embedding_cache")["up_to_date"]
        assert (shown.status, shown.severity) == ("FAILED", "WARN")
        assert f"2 of 2 partitions that are made are stale: {SHARDS[0]}, {SHARDS[1]}" in shown.description

    assert made.run("shards_manifest", "embedding_cache", partition_range=(SHARDS[0], SHARDS[2])).success
    sensor.tick()
    with web_queries(made) as web:
        assert web.checks("shard_plan")["coverage"].status == "SUCCEEDED"
        assert web.checks("embedding_cache")["up_to_date"].status == "SUCCEEDED"

    longer = deploy(**SMALL | {"caches": {"embeddings": {"max_length": 32}}})
    longer.write(changed)
    other = Sensor(longer)
    other.cursor = sensor.cursor
    other.tick()
    with web_queries(longer) as web:
        assert "3 of 3 partitions" in web.checks("embedding_cache")["up_to_date"].description


def test_a_source_that_is_gone_is_named_on_the_page_of_the_plan(made: Deployment) -> None:
    made.corpus.unlink()
    Sensor(made).tick()
    with web_queries(made) as web:
        shown = web.checks("shard_plan")["up_to_date"]
    assert shown.status == "FAILED"
    assert "corpus.jsonl" in shown.description


@pytest.fixture
def recorded(deploy: Callable[..., Deployment]) -> Deployment:
    """As `made`, in a moment: the events are there, and nothing else is."""
    deployment = deploy(**SMALL)
    deployment.plan()
    recipe, instance = deployment.recipe, deployment.instance
    plan_version = latest_data_version(instance, recipe.key("shard_plan"))
    inputs = {"shards_manifest": ("shard_plan", plan_version), "embedding_cache": ("shards_manifest", "of a shard")}
    for asset, (upstream, version) in inputs.items():
        tags = {
            DATA_VERSION_TAG: "of a shard",
            CODE_VERSION_TAG: recipe.code_version(asset),
            input_data_version_tag(recipe.key(upstream)): str(version),
        }
        for key in SHARDS[:2]:
            instance.report_runless_asset_event(dg.AssetMaterialization(recipe.key(asset), partition=key, tags=tags))
    cache = recipe.key("embedding_cache")
    for record in instance.fetch_materializations(cache, limit=2).records:
        target = CheckTarget(run_id=record.run_id, storage_id=record.storage_id, timestamp=record.timestamp)
        for name in PARTITION_CHECKS:
            found = dg.AssetCheckEvaluation(
                asset_key=cache,
                check_name=name,
                passed=True,
                partition=record.partition_key,
                target_materialization_data=target,
            )
            instance.report_runless_asset_event(found)
    return deployment


class Afar:
    """Sources that are not on this machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sensor: Sensor) -> None:
        self.state: str | Exception = "as they were"
        self.looks: list[float] = []
        self.sensor = sensor
        sensor.now = 10 * LOOK_AFAR_EVERY_S
        monkeypatch.setattr("kd_assets.orchestration.staleness.up_to_date._is_afar", lambda recipe: True)
        monkeypatch.setattr("kd_assets.orchestration.staleness.up_to_date.state_of_sources", self._look)

    def _look(self, *_: object) -> str:
        self.looks.append(self.sensor.now)
        if isinstance(self.state, Exception):
            raise self.state
        return self.state


@pytest.mark.parametrize("state", ["as they were", StorageUnreachableError("the hub does not answer")])
def test_sources_far_away_are_looked_at_once_an_hour_whether_they_answer_or_not(
    recorded: Deployment, monkeypatch: pytest.MonkeyPatch, state: str | Exception
) -> None:
    sensor = Sensor(recorded)
    afar = Afar(monkeypatch, sensor)
    afar.state = state
    first = sensor.now
    for _ in range(6):
        sensor.tick()
        sensor.now += LOOK_AFAR_EVERY_S / 2
    assert afar.looks == [first, first + LOOK_AFAR_EVERY_S, first + 2 * LOOK_AFAR_EVERY_S]


def test_a_plan_that_went_stale_between_two_looks_afar_is_yellow_after_the_next(
    recorded: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensor = Sensor(recorded)
    Afar(monkeypatch, sensor)
    sensor.tick()
    recorded.plan()
    changed = documents(12)
    changed[5]["text"] += " again"
    recorded.write(changed)
    sensor.now += LOOK_AFAR_EVERY_S / 2
    sensor.tick()  # results rest on the new plan; nobody asks for the sources yet
    sensor.now += LOOK_AFAR_EVERY_S / 2
    sensor.tick()
    with web_queries(recorded) as web:
        assert web.checks("shard_plan")["up_to_date"].status == "FAILED"


def test_a_hub_that_does_not_answer_keeps_nobody_from_looking_at_results(
    recorded: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensor = Sensor(recorded)
    afar = Afar(monkeypatch, sensor)
    afar.state = StorageUnreachableError("the hub does not answer")
    said = sensor.tick()
    assert "the hub does not answer" in said
    assert "all 2 partitions that are made are those of today" in said
    assert sensor.tick() == "nothing has changed since the last look"


def created(deployment: Deployment, status: dg.DagsterRunStatus, asset: str = "embedding_cache") -> dg.DagsterRun:
    """A run over all partitions as the web UI creates it: with its checks planned."""
    job = deployment.definitions.resolve_implicit_global_asset_job_def()
    return deployment.instance.create_run_for_job(
        job.get_subset(asset_selection={deployment.recipe.key(asset)}),
        status=status,
        asset_selection=frozenset({deployment.recipe.key(asset)}),
        tags={ASSET_PARTITION_RANGE_START_TAG: SHARDS[0], ASSET_PARTITION_RANGE_END_TAG: SHARDS[2]},
    )


@pytest.mark.parametrize(
    "status", [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.FAILURE]
)
def test_a_run_that_has_not_come_to_its_step_takes_no_colours(
    recorded: Deployment, status: dg.DagsterRunStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    green = {"succeeded": [SHARDS[0], SHARDS[1]]}
    run = created(recorded, status)
    with web_queries(recorded) as web:
        assert web.checks("embedding_cache")["finite"].partitions != green, "Dagster's own way"
    sensor = Sensor(recorded)
    sensor.now = time.time()
    sensor.tick()
    with web_queries(recorded) as web:
        for name in PARTITION_CHECKS:
            assert web.checks("embedding_cache")[name].partitions == green, name
    is_settled = Looked.of(sensor.cursor).run == run.run_id
    assert is_settled == (status is not dg.DagsterRunStatus.NOT_STARTED), "which may still be being created"

    withdrawn: list[str] = []
    monkeypatch.setattr(
        "kd_assets.orchestration.staleness.planned_checks.withdraw_planned_checks",
        lambda _, run_id, checks: withdrawn.append(run_id),
    )
    sensor.tick()
    assert withdrawn == ([] if is_settled else [run.run_id])
    sensor.now += CREATED_AFTER_S
    sensor.tick()
    withdrawn.clear()
    sensor.tick()
    assert withdrawn == [], "each once"


def test_while_runs_are_at_work_a_large_plan_is_looked_at_seldom(
    recorded: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensor = Sensor(recorded)
    sensor.now = time.time()
    sensor.tick()
    run = created(recorded, dg.DagsterRunStatus.STARTING)
    recorded.instance.report_runless_asset_event(
        dg.AssetMaterialization(recorded.recipe.key("embedding_cache"), partition=SHARDS[2])
    )
    monkeypatch.setattr("kd_assets.orchestration.staleness.up_to_date.PAUSE_S_A_RESULT", 100.0)
    sensor.now += 120
    assert "looked at in 8 minutes" in sensor.tick(), "3 partitions of 2 assets, less what has passed"
    recorded.instance.report_run_canceled(run)
    assert "embedding_cache: 1 of 3 partitions that are made are stale" in sensor.tick()
    assert PAUSE_S_A_RESULT * 1000 * 4 < 120, "a thousand partitions are looked at in every tick"


def test_a_tick_that_cannot_read_all_leaves_the_rest_to_the_next(
    recorded: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensor = Sensor(recorded)
    monkeypatch.setattr("kd_assets.orchestration.staleness.latest_tags.FILE", Path("another.sqlite"))
    with monkeypatch.context() as short:
        short.setattr("kd_assets.orchestration.staleness.up_to_date.READ_S", 0.0)
        assert "4 results are still to be looked at: the next tick goes on" in sensor.tick()
    assert "all 2 partitions that are made are those of today" in sensor.tick()


def test_the_partition_that_stands_for_all_goes_where_others_came_at_the_same_time(recorded: Deployment) -> None:
    recorded.instance.add_dynamic_partitions("tiny_shards", [NO_PLAN_YET])
    Sensor(recorded).tick()
    assert list(recorded.instance.get_dynamic_partitions("tiny_shards")) == list(SHARDS)


def test_a_plan_of_which_nobody_can_say_how_much_is_made_is_recorded_and_says_why(
    recorded: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise StorageUnavailableError("the quarantine cannot be read")

    monkeypatch.setattr("kd_assets.orchestration.staleness.coverage.still_put_aside", fails)
    result = recorded.run("shard_plan")
    assert result.success, failure_text(result)
    assert [e.asset_key for e in result.get_asset_materialization_events()] == [recorded.recipe.key("shard_plan")]
    said = [entry.user_message for entry in recorded.instance.all_logs(result.run_id)]
    assert [line for line in said if "the quarantine cannot be read" in line]
    assert not [line for line in said if "did not yield" in line]
    coverage = next(e for e in recorded.checks(result.run_id, of_partitions=False) if e.check_name == "coverage")
    assert not coverage.passed
    assert "the quarantine cannot be read" in str(coverage.description)


def test_a_plan_of_too_much_to_read_leaves_its_coverage_to_the_sensor(
    recorded: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_assets.orchestration.staleness.latest_tags.FILE", Path("another.sqlite"))
    monkeypatch.setattr("kd_assets.orchestration.staleness.coverage.READ_IN_PLAN_S", 0.0)
    result = recorded.run("shard_plan")
    assert result.success, failure_text(result)
    coverage = next(e for e in recorded.checks(result.run_id, of_partitions=False) if e.check_name == "coverage")
    assert not coverage.passed
    assert "4 results are still to be looked at, which the sensor tiny_up_to_date does" in str(coverage.description)


def test_a_cursor_that_nobody_understands_is_none() -> None:
    assert Looked.of("not ours") == Looked.of(None) == Looked()


def test_the_check_of_an_asset_as_a_whole_can_be_executed_alone(made: Deployment) -> None:
    key = dg.AssetCheckKey(made.recipe.key("embedding_cache"), "up_to_date")
    selection = dg.AssetSelection.checks(key)
    job = dg.define_asset_job("alone", selection=selection)
    definitions = dg.Definitions.merge(made.definitions, dg.Definitions(jobs=[job]))
    result = definitions.resolve_job_def("alone").execute_in_process(instance=made.instance, raise_on_error=False)
    assert result.success, failure_text(result)
    (evaluation,) = made.checks(result.run_id, of_partitions=False)
    assert (evaluation.check_name, evaluation.passed, evaluation.partition) == ("up_to_date", True, None)
