"""The part that both storages have."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import dagster as dg

from kd_assets.dagster_internals import (
    AssetCheckState,
    EventLogEntry,
    SqlEventLogStorage,
    dynamic_partition_keys,
    planned_one_by_one,
    store_together,
    takes_events_together,
)
from kd_assets.dagster_storage.check_states import check_states

if TYPE_CHECKING:
    Base = SqlEventLogStorage
else:
    Base = object

BATCH_SIZE_VARIABLE = "DAGSTER_EVENT_BATCH_SIZE"
BATCH_SIZE = 1000
"""Events that Dagster hands over together. In sqlite others wait for as long as these are written."""

TAKEN_TOGETHER = {
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
    dg.DagsterEventType.ASSET_MATERIALIZATION,
}


class InBulk(Base):
    """Beside a storage of Dagster's: writes a batch in one transaction, reads at once how an asset's checks stand
    and which partitions there are."""

    @property
    def supports_partition_subset_in_asset_materialization_planned_events(self) -> bool:
        """Asks Dagster for one event of what a run will materialize of an asset, and not for one a partition, all of
        which it would hold together in memory. What is stored is an event a partition all the same, since Dagster
        tells by those which partitions a run works on, and which a failed one has not made."""
        return takes_events_together(self)

    def store_event(self, event: EventLogEntry) -> None:
        if _is_planned_of_several(event):
            self.store_event_batch([event])
        else:
            super().store_event(event)

    def store_event_batch(self, events: Sequence[EventLogEntry]) -> None:
        if not any(map(_is_planned_of_several, events)):
            self._store_batch(events)
            return
        one_by_one = (one for event in events for one in planned_one_by_one(event))
        for batch in _batches(one_by_one):
            try:
                self._store_batch(batch)
            except Exception as e:  # noqa: BLE001 - as Dagster does, which would begin with the first batch again
                sys.stderr.write(f"Exception while storing event batch: {e}\n")
                for event in batch:
                    super().store_event(event)

    def _store_batch(self, events: Sequence[EventLogEntry]) -> None:
        of_one_run = len({event.run_id for event in events}) == 1
        is_known = {event.dagster_event_type for event in events} <= TAKEN_TOGETHER
        if of_one_run and is_known and takes_events_together(self):
            store_together(self, events)
        else:
            super().store_event_batch(events)

    def get_dynamic_partitions(self, partitions_def_name: str) -> Sequence[str]:
        return dynamic_partition_keys(self, partitions_def_name)

    def get_asset_check_state(
        self, keys: Sequence[tuple[dg.AssetCheckKey, dg.PartitionsDefinition | None]]
    ) -> Mapping[dg.AssetCheckKey, AssetCheckState]:
        names: dict[tuple[dg.AssetKey, dg.DynamicPartitionsDefinition], list[str]] = {}
        others = []
        for key, partitions_def in keys:
            if isinstance(partitions_def, dg.DynamicPartitionsDefinition) and partitions_def.name is not None:
                names.setdefault((key.asset_key, partitions_def), []).append(key.name)
            else:
                others.append((key, partitions_def))
        states = dict(super().get_asset_check_state(others)) if others else {}
        for (asset_key, partitions_def), of_asset in names.items():
            states |= check_states(self, self._instance, asset_key, of_asset, partitions_def)
        return states


def _is_planned_of_several(event: EventLogEntry) -> bool:
    if event.dagster_event_type is not dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED:
        return False
    return event.get_dagster_event().asset_materialization_planned_data.partitions_subset is not None


def _batches(events: Iterable[EventLogEntry]) -> Iterator[list[EventLogEntry]]:
    left = iter(events)
    while batch := list(islice(left, BATCH_SIZE)):
        yield batch


def have_batches_handed_over() -> None:
    """Dagster has no setting for it but a variable of the environment, which every process of an instance must have:
    also the command line of whoever starts runs from a shell."""
    os.environ.setdefault(BATCH_SIZE_VARIABLE, str(BATCH_SIZE))
