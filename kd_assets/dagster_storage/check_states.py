"""How a check stands at each partition of its asset, as the asset's page asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import dagster as dg

from kd_assets.dagster_internals import AssetCheckPartitionInfo, AssetCheckState

AT_ONCE = 64


class StateByHalves(AssetCheckState):
    """The state of a check of which nothing is known yet.

    Dagster brings it up to date by adding one partition after another to a set that it copies each time: for four
    checks of 10,000 partitions that takes seconds. A partition has one record, so two halves make up the whole.
    """

    def with_updates(
        self,
        key: dg.AssetCheckKey,
        partitions_def: dg.PartitionsDefinition | None,
        partition_records: Sequence[AssetCheckPartitionInfo],
        run_statuses: Mapping[str, dg.DagsterRunStatus],
    ) -> AssetCheckState:
        n = len(partition_records)
        if n <= AT_ONCE:
            return super().with_updates(key, partitions_def, partition_records, run_statuses)
        halves = (partition_records[: n // 2], partition_records[n // 2 :])
        return united(*(self.with_updates(key, partitions_def, half, run_statuses) for half in halves))


def united(one: AssetCheckState, other: AssetCheckState) -> AssetCheckState:
    """Of a check at some partitions, and at others."""
    runs = dict(one.in_progress_runs)
    for run_id, partitions in other.in_progress_runs.items():
        runs[run_id] = runs[run_id].compute_union(partitions) if run_id in runs else partitions
    return AssetCheckState(
        latest_storage_id=max(one.latest_storage_id, other.latest_storage_id),
        subsets={status: one.subsets[status].compute_union(other.subsets[status]) for status in one.subsets},
        in_progress_runs=runs,
    )
