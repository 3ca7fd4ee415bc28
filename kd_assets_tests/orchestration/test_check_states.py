"""How checks stand at thousands of partitions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.partitions.subset import DefaultPartitionsSubset, PartitionsSubset
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from kd_assets.dagster_internals import AssetCheckPartitionInfo, AssetCheckState
from kd_assets.dagster_storage.check_states import StateByHalves
from kd_assets.dagster_storage.sqlite import SqliteEventLog

CHECK = dg.AssetCheckKey(dg.AssetKey("cache"), "files")
RUNS = {"failed": dg.DagsterRunStatus.FAILURE, "ended": dg.DagsterRunStatus.SUCCESS}


def records(n: int, seed: int = 0) -> Sequence[AssetCheckPartitionInfo]:
    """Of partitions of which each has a check that is planned, of a run that ended or of one that goes on, or
    evaluated, before or after the partition was last materialized."""
    rng = random.Random(seed)
    return [
        AssetCheckPartitionInfo(
            check_key=CHECK,
            partition_key=f"p{i}",
            latest_execution_status=rng.choice(list(AssetCheckExecutionRecordStatus)),
            latest_planned_run_id=rng.choice([*RUNS, "goes on"]),
            latest_check_event_storage_id=rng.randrange(1000),
            latest_materialization_storage_id=rng.choice([None, 1, 2]),
            latest_target_materialization_storage_id=rng.choice([1, 2]),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("n", [0, 1, 64, 65, 1000])
def test_the_state_of_many_partitions_is_that_which_dagster_makes_one_by_one(n: int) -> None:
    partitions = dg.StaticPartitionsDefinition([f"p{i}" for i in range(n) if i % 10])  # some have been deleted
    expected, found = (
        empty.with_updates(CHECK, partitions, records(n), RUNS)
        for empty in (AssetCheckState.empty(), StateByHalves.empty())
    )
    assert found.latest_storage_id == expected.latest_storage_id
    assert found.subsets == expected.subsets
    assert found.in_progress_runs == expected.in_progress_runs
    assert n < 1000 or not any(subset.is_empty for subset in found.subsets.values())


def test_a_check_of_an_asset_without_partitions_has_its_state() -> None:
    evaluated = AssetCheckPartitionInfo(
        check_key=CHECK,
        partition_key=None,
        latest_execution_status=AssetCheckExecutionRecordStatus.SUCCEEDED,
        latest_planned_run_id="ended",
        latest_check_event_storage_id=2,
        latest_materialization_storage_id=1,
        latest_target_materialization_storage_id=1,
    )
    state = StateByHalves.empty().with_updates(CHECK, None, [evaluated], {})
    assert {status.value: subset.value for status, subset in state.subsets.items()}["SUCCEEDED"] is True


def test_twice_the_partitions_cost_about_twice_and_not_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = [0]
    unite = DefaultPartitionsSubset.__or__

    def counted(one: DefaultPartitionsSubset, other: DefaultPartitionsSubset) -> PartitionsSubset[str]:
        copied[0] += len(one) + len(other)
        return unite(one, other)

    monkeypatch.setattr(DefaultPartitionsSubset, "__or__", counted)
    n_copied = []
    for n in (2000, 4000):
        copied[0] = 0
        partitions = dg.StaticPartitionsDefinition([f"p{i}" for i in range(n)])
        StateByHalves.empty().with_updates(CHECK, partitions, records(n), RUNS)
        n_copied.append(copied[0])
    assert n_copied[1] < 2.5 * n_copied[0]


def test_the_storage_begins_with_it(tmp_path: Path) -> None:
    states = SqliteEventLog(str(tmp_path)).get_checkpointed_asset_check_state([CHECK])
    assert isinstance(states[CHECK], StateByHalves)
