"""The part that both storages have."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import dagster as dg

from kd_assets.dagster_internals import (
    AssetCheckState,
    EventLogEntry,
    SqlEventLogStorage,
    store_together,
    takes_events_together,
)
from kd_assets.dagster_storage.check_states import StateByHalves

if TYPE_CHECKING:
    Base = SqlEventLogStorage
else:
    Base = object

BATCH_SIZE_VARIABLE = "DAGSTER_EVENT_BATCH_SIZE"
BATCH_SIZE = 1000
"""Events that Dagster hands over together. In sqlite others wait for as long as these are written."""

KNOWN_S = 1.0
"""How long the names of partitions are known that were read. What is recorded of them is always read anew."""

TAKEN_TOGETHER = {
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
    dg.DagsterEventType.ASSET_MATERIALIZATION,
}


class TakesBatches(Base):
    """Beside a storage of Dagster's: writes a batch in one transaction, and reads the partitions at once."""

    def store_event_batch(self, events: Sequence[EventLogEntry]) -> None:
        of_one_run = len({event.run_id for event in events}) == 1
        is_known = {event.dagster_event_type for event in events} <= TAKEN_TOGETHER
        if of_one_run and is_known and takes_events_together(self):
            store_together(self, events)
        else:
            super().store_event_batch(events)

    def get_checkpointed_asset_check_state(
        self, keys: Sequence[dg.AssetCheckKey]
    ) -> Mapping[dg.AssetCheckKey, AssetCheckState]:
        return dict.fromkeys(keys, StateByHalves.empty())

    _clock: Callable[[], float] = staticmethod(time.monotonic)
    _asked: tuple[str, float] = ("", -math.inf)
    _known: tuple[str, float, frozenset[str]] = ("", -math.inf, frozenset())

    def has_dynamic_partition(self, partitions_def_name: str, partition_key: str) -> bool:
        """The page of an asset asks this of each partition of each of its checks, which are as many queries: so from
        the second question on all are read at once, and hold for KNOWN_S: one that another process deletes meanwhile
        is still there for as long. One that is not among them is looked up."""
        now = self._clock()
        name, since, keys = self._known
        if name != partitions_def_name or now - since > KNOWN_S:
            keys = frozenset[str]()
            if self._asked[0] == partitions_def_name and now - self._asked[1] <= KNOWN_S:
                keys = frozenset(self.get_dynamic_partitions(partitions_def_name))
                self._known = (partitions_def_name, self._clock(), keys)
        self._asked = (partitions_def_name, now)
        return partition_key in keys or super().has_dynamic_partition(partitions_def_name, partition_key)

    def delete_dynamic_partition(self, partitions_def_name: str, partition_key: str) -> None:
        super().delete_dynamic_partition(partitions_def_name, partition_key)
        self._known = ("", -math.inf, frozenset())


def have_batches_handed_over() -> None:
    """Dagster has no setting for it but a variable of the environment, which every process of an instance must have:
    also the command line of whoever starts runs from a shell."""
    os.environ.setdefault(BATCH_SIZE_VARIABLE, str(BATCH_SIZE))
