"""The few names of Dagster that it does not export, in one place. Pinned by version, tested by what they do.

Only `kd_assets.orchestration` and `kd_assets.recipes` may import it. `kd_assets_tests/test_dagster_internals.py` fails
when a new Dagster changes any of these; for the YAML, `kd_assets_tests/recipes/test_cluster_profile.py`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster._cli.utils import TMP_DAGSTER_HOME_PREFIX
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData as CheckTarget,
)
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    INPUT_DATA_VERSION_TAG_PREFIX,
    INPUT_EVENT_POINTER_TAG_PREFIX,
    NULL_EVENT_POINTER,
)
from dagster._core.definitions.source_asset import SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    PARTITION_NAME_TAG,
)
from dagster_shared.yaml_utils import parse_yamls_with_source_position

__all__ = [
    "ASSET_PARTITION_RANGE_END_TAG",
    "ASSET_PARTITION_RANGE_START_TAG",
    "CODE_VERSION_TAG",
    "DATA_VERSION_TAG",
    "PARTITION_NAME_TAG",
    "CheckTarget",
    "InterruptSignals",
    "UnresolvedAssetJobDefinition",
    "already_recorded",
    "input_data_version_tag",
    "input_tags",
    "interrupt_signals",
    "interrupts_held_back",
    "latest_storage_ids",
    "one_transaction",
    "parse_yamls_with_source_position",
]


def is_forgotten_at_its_end(instance: dg.DagsterInstance) -> bool:
    """Whether Dagster made this instance for one command, since DAGSTER_HOME is not set, and deletes it afterwards."""
    return not instance.is_ephemeral and Path(instance.root_directory).name.startswith(TMP_DAGSTER_HOME_PREFIX)


def already_recorded(asset_key: dg.AssetKey) -> dg.MaterializeResult[None]:
    """The output of an asset whose partitions were each logged by hand: it lets downstream steps of the same run start,
    and records no event.

    Without any output Dagster skips those steps silently and calls the run a success; with an ordinary
    MaterializeResult it records every partition a second time, all with the same metadata. The metadata key is the one
    Dagster uses for observable source assets, which log their own events, too.
    """
    return dg.MaterializeResult(asset_key=asset_key, metadata={SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION: True})


def input_tags(upstream: dg.AssetKey, data_version: str, event_pointer: int | None) -> dict[str, str]:
    """The provenance tags that let Dagster tell whether a hand-logged materialization is stale.

    `event_pointer` is the storage id of the upstream materialization that was read; None when there is none.
    """
    pointer_tag = f"{INPUT_EVENT_POINTER_TAG_PREFIX}/{upstream.to_user_string()}"
    return {
        input_data_version_tag(upstream): data_version,
        pointer_tag: NULL_EVENT_POINTER if event_pointer is None else str(event_pointer),
    }


def input_data_version_tag(upstream: dg.AssetKey) -> str:
    """The tag that holds the data version of the input `upstream` that was read."""
    return f"{INPUT_DATA_VERSION_TAG_PREFIX}/{upstream.to_user_string()}"


def latest_storage_ids(
    instance: dg.DagsterInstance, asset_key: dg.AssetKey, partition_keys: Sequence[str]
) -> Mapping[str, int]:
    """Partition → storage id of its last materialization; without the partitions that have none. One query."""
    if not partition_keys:
        return {}  # Dagster takes an empty set for all partitions
    return instance.get_latest_storage_id_by_partition(
        asset_key, dg.DagsterEventType.ASSET_MATERIALIZATION, set(partition_keys)
    )


@contextmanager
def one_transaction(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Events of this run that this thread stores inside are written together at the end; on an exception, none of them.

    For every single event Dagster's sqlite storage opens engines and connections and commits two or three times, which
    is most of what an event costs. Inside, this thread has one connection and one transaction for each of the two files
    that an event goes to (the run's own, and the index of all runs): it reads what it has written, others see it at the
    end. Others that want to write wait meanwhile: be brief. Other storages (PostgreSQL, in memory) go on as ever.
    """
    storage = instance.event_log_storage
    if not isinstance(storage, SqliteEventLogStorage):
        yield
        return
    for connection_of_dagster in (storage.run_connection(run_id), storage.index_connection()):
        with connection_of_dagster:
            pass  # makes the file, should it not be there yet
    dagsters_connect, this_thread = storage._connect, threading.get_ident()
    opened: dict[str, sa.Connection] = {}
    with ExitStack() as connections:

        @contextmanager
        def connect(shard: str) -> Iterator[sa.Connection]:
            if threading.get_ident() != this_thread:
                with dagsters_connect(shard) as connection:
                    yield connection
                return
            if shard not in opened:
                engine = sa.create_engine(
                    storage.conn_string_for_shard(shard),
                    poolclass=sa.NullPool,
                    connect_args={"timeout": SQLITE_BUSY_TIMEOUT_SECONDS},
                )
                opened[shard] = connections.enter_context(engine.connect())
                opened[shard].begin()
            yield opened[shard]

        storage._connect = connect  # type: ignore[method-assign]
        try:
            yield
        finally:
            del storage._connect  # the instance's own: it is the method of the class again
        # In the order of opening, which is Dagster's: a partition counts as materialized when the index says so, and
        # that comes last. What is not committed is rolled back as its connection closes.
        for connection in opened.values():
            connection.commit()


class InterruptSignals:
    """The signals that have interrupted this process: Dagster turns SIGINT and SIGTERM into the same exception."""

    def __init__(self) -> None:
        self.last: int | None = None


@contextmanager
def interrupt_signals() -> Iterator[InterruptSignals]:
    """Remembers which signal it is that interrupts what is inside; what it does stays as it was.

    Outside the main thread there are no signals to see.
    """
    received = InterruptSignals()

    def remember(number: int, frame: FrameType | None) -> None:
        received.last = number
        handler = before[number]
        assert callable(handler)
        handler(number, frame)

    before = _handlers_replaced(remember)
    try:
        yield received
    finally:
        _restore(before)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A termination that comes inside (SIGINT or SIGTERM) takes effect at the end, as it would have there."""
    held_back: list[int] = []
    before = _handlers_replaced(lambda number, frame: held_back.append(number))
    try:
        yield
    finally:
        _restore(before)
        if held_back:
            signal.raise_signal(held_back[0])


def _handlers_replaced(handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Have `handler` called for the signals that interrupt; returns what was called for them before, where anything
    was: a signal that is ignored, or ends the process, goes on to do so."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    called = {int(number): previous for number, previous in before.items() if callable(previous)}
    for number in called:
        signal.signal(number, handler)
    return called


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
