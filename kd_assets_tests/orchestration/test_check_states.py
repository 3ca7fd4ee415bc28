"""How checks stand at thousands of partitions, as an asset's page asks for it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml  # type: ignore[import-untyped]
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.storage.asset_check_state import bulk_update_asset_check_state

from kd_assets.dagster_internals import (
    AssetCheckExecutionRecordStatus,
    AssetCheckExecutionsTable,
    AssetCheckState,
    store_together,
)
from kd_assets.recipes.project import PROJECT_FOLDER
from kd_assets_tests.test_dagster_internals import KEY, materialized, sql

PARTITIONS = dg.DynamicPartitionsDefinition(name="mine")
NAMES = ("complete", "finite", "never evaluated")
CHECKS = [dg.AssetCheckKey(KEY, name) for name in NAMES]
RUNS = {
    "failed": dg.DagsterRunStatus.FAILURE,
    "cancelled": dg.DagsterRunStatus.CANCELED,
    "ended": dg.DagsterRunStatus.SUCCESS,
    "goes on": dg.DagsterRunStatus.STARTED,
    "also goes on": dg.DagsterRunStatus.STARTED,
}
FORGOTTEN = "a run that was deleted"


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """With the storage of the shipped dagster.yaml."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    settings = yaml.safe_load((PROJECT_FOLDER / "dagster.yaml").read_text())
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"storage": settings["storage"]}))
    with dg.DagsterInstance.get() as made:
        yield made


def make_history(instance: dg.DagsterInstance, *, n: int, seed: int = 0) -> None:
    """Of `n` partitions each has been materialized, or not, or twice, and its checks planned and evaluated, before and
    after that, by runs that ended in every way. Some partitions have been deleted since."""
    rng = random.Random(seed)
    keys = [f"p{i}" for i in range(n)]
    instance.add_dynamic_partitions("mine", [key for key in keys if rng.random() < 0.9])
    for run_id, status in RUNS.items():
        instance.add_run(dg.DagsterRun(job_name="job", run_id=run_id, status=status))
    targets: list[int | None] = [None]
    for _ in range(2):
        chosen = rng.sample(keys, len(keys) * 2 // 3)
        targets += store_together(sql(instance), [materialized(key) for key in chosen]) if chosen else []
    rows = [
        {
            "asset_key": KEY.to_string(),
            "check_name": name,
            "partition": key,
            "run_id": run_id,
            "execution_status": rng.choice(list(AssetCheckExecutionRecordStatus)).value,
            "evaluation_event_storage_id": rng.choice([None, rng.randrange(1, 1000)]) if key == "p0" else 1 + at,
            "materialization_event_storage_id": rng.choice(targets),
        }
        for key in [*keys, None]
        for name in NAMES[:2]
        for at, run_id in enumerate(rng.sample([*RUNS, FORGOTTEN], rng.randrange(4)))
    ]
    newest = targets_of(instance)
    for row in rows:
        if rng.random() < 0.6:
            row["materialization_event_storage_id"] = newest.get(str(row["partition"]))
    with sql(instance).index_connection() as connection:
        connection.execute(AssetCheckExecutionsTable.insert(), rows)


def targets_of(instance: dg.DagsterInstance) -> Mapping[str, int]:
    return instance.get_latest_storage_id_by_partition(KEY, dg.DagsterEventType.ASSET_MATERIALIZATION)


Asked = Sequence[tuple[dg.AssetCheckKey, dg.PartitionsDefinition | None]]


def of_dagster(instance: dg.DagsterInstance, asked: Asked) -> Mapping[dg.AssetCheckKey, AssetCheckState]:
    with partition_loading_context(dynamic_partitions_store=instance):
        return bulk_update_asset_check_state(instance, asked, {key: AssetCheckState.empty() for key, _ in asked})


def check_that_states_are_those_of_dagster(instance: dg.DagsterInstance) -> None:
    asked = [(key, PARTITIONS) for key in CHECKS]
    assert instance.event_log_storage.get_asset_check_state(asked) == of_dagster(instance, asked)


@pytest.mark.parametrize("n", [0, 1, 300])
def test_the_states_of_checks_are_those_that_dagster_makes(n: int, instance: dg.DagsterInstance) -> None:
    make_history(instance, n=n)
    check_that_states_are_those_of_dagster(instance)
    if n == 300:
        state = instance.event_log_storage.get_asset_check_state([(CHECKS[0], PARTITIONS)])[CHECKS[0]]
        assert not any(subset.is_empty for subset in state.subsets.values()), "the history has everything"
        assert set(state.in_progress_runs) == {"goes on", "also goes on", FORGOTTEN}
    whole = materialized(None)  # type: ignore[arg-type]
    instance.event_log_storage.store_event(whole)
    check_that_states_are_those_of_dagster(instance)


def test_checks_of_other_partitions_and_of_none_are_left_to_dagster(instance: dg.DagsterInstance) -> None:
    make_history(instance, n=20)
    of_names = dg.StaticPartitionsDefinition([f"p{i}" for i in range(20)])
    asked = [(CHECKS[0], None), (CHECKS[1], of_names)]
    assert instance.event_log_storage.get_asset_check_state(asked) == of_dagster(instance, asked)


def test_hundreds_of_partitions_take_a_handful_of_queries(instance: dg.DagsterInstance) -> None:
    make_history(instance, n=200)
    statements: list[str] = []

    def note(*arguments: object) -> None:
        statements.append(str(arguments[2]))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    instance.event_log_storage.get_asset_check_state([(key, PARTITIONS) for key in CHECKS])
    sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert 3 <= len([said for said in statements if said.startswith("SELECT")]) < 12
