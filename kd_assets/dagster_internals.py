"""The few names of Dagster that it does not export, in one place. Pinned by version, tested by what they do.

Only the control plane may import it. `kd_assets_tests/test_dagster_internals.py` fails
when a new Dagster changes any of these; for the YAML, `kd_assets_tests/recipes/test_cluster_profile.py`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, TypeGuard

import dagster as dg
import sqlalchemy as sa
from dagster._cli.utils import TMP_DAGSTER_HOME_PREFIX
from dagster._core.asset_graph_view.serializable_entity_subset import SerializableEntitySubset
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
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext
from dagster._core.definitions.repository_definition import SINGLETON_REPOSITORY_NAME
from dagster._core.definitions.source_asset import SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._core.events import AssetMaterializationPlannedData, StepMaterializationData
from dagster._core.events.log import EventLogEntry
from dagster._core.remote_origin import ManagedGrpcPythonEnvCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecordStatus,
    AssetCheckExecutionResolvedStatus,
)
from dagster._core.storage.asset_check_state import AssetCheckState
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetKeyTable,
    DynamicPartitionsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME, SqliteEventLogStorage
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._core.storage.sqlite_storage import _event_logs_directory as event_logs_directory
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    PARTITION_NAME_TAG,
    REPOSITORY_LABEL_TAG,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster.components.core import component_tree
from dagster.components.core import decl as component_decls
from dagster.components.core.defs_module import ComponentPath
from dagster_shared.record import copy
from dagster_shared.serdes import serialize_value
from dagster_shared.yaml_utils import parse_yamls_with_source_position

__all__ = [
    "ASSET_PARTITION_RANGE_END_TAG",
    "ASSET_PARTITION_RANGE_START_TAG",
    "CODE_VERSION_TAG",
    "DATA_VERSION_TAG",
    "PARTITION_NAME_TAG",
    "TMP_DAGSTER_HOME_PREFIX",
    "AssetCheckExecutionRecordStatus",
    "AssetCheckExecutionResolvedStatus",
    "AssetCheckExecutionsTable",
    "AssetCheckState",
    "CheckTarget",
    "DagsterSqliteStorage",
    "EventLogEntry",
    "InterruptSignals",
    "SerializableEntitySubset",
    "SqlEventLogStorage",
    "SqliteEventLogStorage",
    "UnresolvedAssetJobDefinition",
    "already_recorded",
    "bare_rows",
    "components_only",
    "database_errors",
    "dynamic_partition_keys",
    "event_logs_directory",
    "input_data_version_tag",
    "input_tags",
    "interrupt_is_held_back",
    "interrupt_signals",
    "interrupts_held_back",
    "latest_storage_ids",
    "latest_unpartitioned_storage_id",
    "parse_yamls_with_source_position",
    "place_in_code_location",
    "planned_one_by_one",
    "record_events",
    "store_together",
    "takes_events_together",
    "version_tags",
    "withdraw_planned_checks",
]


INSERTED_TOGETHER = 1000
"""Rows of planned checks, in one statement."""


def is_forgotten_at_its_end(instance: dg.DagsterInstance) -> bool:
    """Whether Dagster made this instance for one command, since DAGSTER_HOME is not set, and deletes it afterwards.

    Not where a dagster.yaml of the working directory, which it reads then, has the records elsewhere.
    """
    if instance.is_ephemeral:
        return False
    root, storage = Path(instance.root_directory), instance.event_log_storage
    if not isinstance(storage, SqliteEventLogStorage) or not root.name.startswith(TMP_DAGSTER_HOME_PREFIX):
        return False
    kept_in = Path(storage.path_for_shard(""))
    return kept_in.is_relative_to(root) or any(p.name.startswith(TMP_DAGSTER_HOME_PREFIX) for p in kept_in.parents)


def is_of_this_load_alone() -> bool:
    """Whether the definitions that were loaded just now must not be given to the next who loads them: they were made of
    state that Dagster keeps (of components that have such), and each load says which it took."""
    load = DefinitionsLoadContext.get()
    state = load.accessed_defs_state_info
    return bool(load.get_pending_reconstruction_metadata()) or bool(state is not None and state.info_mapping)


def already_recorded(asset_key: dg.AssetKey) -> dg.MaterializeResult[None]:
    """The output of an asset whose partitions were each logged by hand: it lets downstream steps of the same run start,
    and records no event.

    Without any output Dagster skips those steps silently and calls the run a success; with an ordinary
    MaterializeResult it records every partition a second time, all with the same metadata. The metadata key is the one
    Dagster uses for observable source assets, which log their own events, too.
    """
    return dg.MaterializeResult(asset_key=asset_key, metadata={SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION: True})


def place_in_code_location(instance: dg.DagsterInstance, run: dg.DagsterRun, *, module: str, location: str) -> None:
    """Say of an ended run of the command line in which code location its job is, so that the web UI shows it on Home
    and under Jobs: it looks for runs by their origin, which only those have that Dagster launches.

    Not of a run that goes on: by its origin Dagster, and `termination`, tell whether somebody launched it.
    """
    origin = RemoteJobOrigin(
        repository_origin=RemoteRepositoryOrigin(
            code_location_origin=ManagedGrpcPythonEnvCodeLocationOrigin(
                loadable_target_origin=LoadableTargetOrigin(executable_path=sys.executable, module_name=module),
                location_name=location,
            ),
            repository_name=SINGLETON_REPOSITORY_NAME,
        ),
        job_name=run.job_name,
    )
    # First the tag, which jobs are looked up by: a run that has an origin gets it no more.
    instance.add_run_tags(run.run_id, {REPOSITORY_LABEL_TAG: origin.repository_origin.get_label()})
    tagged = instance.get_run_by_id(run.run_id)
    assert tagged is not None
    instance.run_storage.replace_job_origin(tagged, origin)


def withdraw_planned_checks(instance: dg.DagsterInstance, run_id: str, checks: Collection[dg.AssetCheckKey]) -> None:
    """Take back Dagster's word that this run will evaluate these checks, on each of its partitions; those that it has
    evaluated stay.

    The word counts from the run's creation: a partition that passed before has no colour for as long as the run waits
    and works, and once the run fails, every check of a shard that could not be made counts as failed, and so does the
    check as a whole ("0 / 4 Passed") whatever it found at all other shards. Without it a check is as it was found last.
    Only databases are known, which is all that Dagster has.
    """
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage) or not checks:
        return
    with storage.index_connection() as connection:
        connection.execute(_removal_of_planned(run_id, checks))


def _removal_of_planned(run_id: str, checks: Collection[dg.AssetCheckKey]) -> sa.Delete:
    """Keys and names are there for the index, which begins with them: a run's id alone would have the whole table
    read."""
    table = AssetCheckExecutionsTable.c
    return AssetCheckExecutionsTable.delete().where(
        table.asset_key.in_(sorted({check.asset_key.to_string() for check in checks})),
        table.check_name.in_(sorted({check.name for check in checks})),
        table.run_id == run_id,
        table.execution_status == AssetCheckExecutionRecordStatus.PLANNED.value,
    )


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


def version_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Those of a materialization's tags that say of which code and inputs it was made, and what it is."""
    kept = (CODE_VERSION_TAG, DATA_VERSION_TAG, f"{INPUT_DATA_VERSION_TAG_PREFIX}/")
    return {name: value for name, value in tags.items() if name.startswith(kept)}


def latest_storage_ids(
    instance: dg.DagsterInstance, asset_key: dg.AssetKey, partition_keys: Sequence[str]
) -> Mapping[str, int]:
    """Partition → storage id of its last materialization; without the partitions that have none. One query."""
    if not partition_keys:
        return {}  # Dagster takes an empty set for all partitions
    return instance.get_latest_storage_id_by_partition(
        asset_key, dg.DagsterEventType.ASSET_MATERIALIZATION, set(partition_keys)
    )


def latest_unpartitioned_storage_id(storage: SqlEventLogStorage, asset_key: dg.AssetKey) -> int:
    """Of the last materialization that names no partition; 0 where there is none."""
    return storage._get_latest_unpartitioned_materialization_storage_ids([asset_key]).get(asset_key, 0)


def bare_rows(storage: SqlEventLogStorage, query: sa.Select[Any]) -> list[tuple[Any, ...]]:
    """What the driver gives, of columns of numbers and text: SQLAlchemy makes an object of each row, which of thousands
    of rows takes several times as long, and most of that is Python's garbage collection."""
    with storage.index_connection() as connection:
        return list(connection.execute(query).cursor.fetchall())


def dynamic_partition_keys(storage: SqlEventLogStorage, partitions_def_name: str) -> list[str]:
    """All of a definition, in the order in which they were added. Raises what Dagster raises of a database of before
    there were such."""
    storage._check_partitions_table()
    table = DynamicPartitionsTable.c
    query = sa.select(table.partition).where(table.partitions_def_name == partitions_def_name).order_by(table.id)
    return [key for (key,) in bare_rows(storage, query)]


def record_events(
    context: dg.AssetExecutionContext, events: Sequence[dg.AssetMaterialization | dg.AssetCheckEvaluation]
) -> list[CheckTarget]:
    """Log events of partitions as `context.log_event` does one by one, but all in one transaction; returns where each
    is stored. On an exception none of them is.

    Not in the list of events that the step ends with, which would hold all of a run in memory, nor in what it prints.
    Where `takes_events_together` says no they are logged one by one: nothing is returned then, and an exception leaves
    those that came before it.
    """
    storage = context.instance.event_log_storage
    if not takes_events_together(storage):
        for event in events:
            context.log_event(event)
        return []
    entries = [_entry(context, event) for event in events]
    ids = store_together(storage, entries)
    return [
        CheckTarget(run_id=entry.run_id, storage_id=storage_id, timestamp=entry.timestamp)
        for entry, storage_id in zip(entries, ids, strict=True)
    ]


def _entry(
    context: dg.AssetExecutionContext, event: dg.AssetMaterialization | dg.AssetCheckEvaluation
) -> EventLogEntry:
    """What `context.log_event` stores."""
    step_context = context.get_step_execution_context()
    step = step_context.step
    data: StepMaterializationData | dg.AssetCheckEvaluation
    if isinstance(event, dg.AssetMaterialization):
        event_type, data = dg.DagsterEventType.ASSET_MATERIALIZATION, StepMaterializationData(event)
        message = event.description or f"Materialized value {event.label}."
    else:
        event_type, data = dg.DagsterEventType.ASSET_CHECK_EVALUATION, event
        message = f"Asset check '{event.check_name}' on '{event.asset_key.to_user_string()}' "
        message += "passed." if event.passed else "did not pass."
        message += f" Description: '{event.description}'" if event.description is not None else ""
    return EventLogEntry(  # type: ignore[no-untyped-call]
        level=logging.DEBUG,
        user_message=message,
        run_id=step_context.run_id,
        timestamp=time.time(),
        step_key=step.key,
        job_name=step_context.job_name,
        error_info=None,
        dagster_event=dg.DagsterEvent(
            event_type_value=event_type.value,
            job_name=step_context.job_name,
            step_handle=step.handle,
            node_handle=step.node_handle,
            step_kind_value=step.kind.value,
            logging_tags=step_context.event_tags,
            event_specific_data=data,
            message=message,
            pid=os.getpid(),
        ),
    )


def database_errors() -> tuple[type[Exception], ...]:
    """What Dagster's storages raise whose database cannot be reached or cannot write: a driver's words, and those of
    `dagster_postgres` after some tries, if it is in use (it is not installed everywhere)."""
    postgres = sys.modules.get("dagster_postgres.utils")
    return (
        (sa.exc.OperationalError,) if postgres is None else (sa.exc.OperationalError, postgres.DagsterPostgresException)
    )


def planned_one_by_one(entry: EventLogEntry) -> Iterator[EventLogEntry]:
    """The event that says which partitions of an asset a run will materialize, as one event for each of them, as they
    are asked for; of any other event itself."""
    event = entry.get_dagster_event()
    is_planned = event.event_type is dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
    if not is_planned or (subset := event.asset_materialization_planned_data.partitions_subset) is None:
        yield entry
        return
    asset_key = event.asset_materialization_planned_data.asset_key
    for key in subset.get_partition_keys():
        of_one = AssetMaterializationPlannedData(asset_key, partition=key)
        yield entry._replace(dagster_event=event._replace(event_specific_data=of_one))


def takes_events_together(storage: object) -> TypeGuard[SqlEventLogStorage]:
    """Whether `store_together` can write to it: a sqlite of Dagster's, in files or in memory, or a PostgreSQL, that
    says what ids the rows of a statement got (MySQL does not, nor a sqlite before 3.35)."""
    if isinstance(storage, SqliteEventLogStorage):  # which makes engines as it needs them
        dialect = sa.create_engine("sqlite://").dialect
    elif isinstance(storage, SqlEventLogStorage) and isinstance(engine := getattr(storage, "_engine", None), sa.Engine):
        dialect = engine.dialect
    else:
        return False
    return dialect.name in ("sqlite", "postgresql") and dialect.insert_returning


def store_together(storage: SqlEventLogStorage, entries: Sequence[EventLogEntry]) -> list[int]:
    """Write events of one run, all of them or, on an exception, none, as Dagster's own storages write each by itself;
    returns their storage ids.

    For every single event these open connections, look at the columns of a table and commit two to four times, which is
    most of what an event costs; and with each partition of a planned check they write all partitions of its run. Others
    that want to write to a sqlite wait meanwhile: be brief. Only events of assets and of their checks.
    """
    if not entries:
        return []
    rows = [storage._event_to_row(entry) for entry in entries]
    try:
        return _stored_together(storage, entries, rows)
    except sa.exc.DBAPIError as e:
        if not e.connection_invalidated:
            raise
    # The server went away in the middle, and took the transaction with it; or it had committed, and could not say so.
    return _stored_before(storage, rows) or _stored_together(storage, entries, rows)


def _stored_before(storage: SqlEventLogStorage, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of these rows of one run, of which all are there or none is; without ids, none."""
    table, times = SqlEventLogStorageTable.c, [row["timestamp"] for row in rows]
    asked = sa.select(table.event, table.id).where(
        table.run_id == rows[0]["run_id"], table.timestamp >= min(times), table.timestamp <= max(times)
    )
    with storage.index_connection() as connection:
        ids = {row.event: int(row.id) for row in connection.execute(asked)}
    return [ids[row["event"]] for row in rows] if rows[0]["event"] in ids else []


def _stored_together(
    storage: SqlEventLogStorage, entries: Sequence[EventLogEntry], rows: Sequence[Mapping[str, Any]]
) -> list[int]:
    with _transaction(storage, entries[0].run_id) as connections:
        for connection in connections:
            ids = _inserted(connection, rows)
        index = connections[-1]
        of_assets = [(e, i) for e, i in zip(entries, ids, strict=True) if e.get_dagster_event().asset_key is not None]
        if of_assets:
            storage._store_asset_event_tags(index, *map(list, zip(*of_assets, strict=True)))
            _update_asset_keys(storage, index, of_assets)
        _store_checks(storage, index, list(zip(entries, ids, [str(row["event"]) for row in rows], strict=True)))
    return ids


@contextmanager
def _transaction(storage: SqlEventLogStorage, run_id: str) -> Iterator[list[sa.Connection]]:
    """Connections to all databases that an event of a run goes to, the index of all runs last, each in a transaction.

    Of sqlite these are two files. They are committed in this order: a partition counts as materialized when the index
    says so.
    """
    if not isinstance(storage, SqliteEventLogStorage):
        with storage.index_transaction() as connection:
            yield [connection]
        return
    for connection_of_dagster in (storage.run_connection(run_id), storage.index_connection()):
        with connection_of_dagster:
            pass  # makes the file, should it not be there yet
    with ExitStack() as stack:
        connections = []
        for shard in (run_id, INDEX_SHARD_NAME):
            engine = sa.create_engine(
                storage.conn_string_for_shard(shard),
                poolclass=sa.NullPool,
                connect_args={"timeout": SQLITE_BUSY_TIMEOUT_SECONDS},
            )
            connections.append(stack.enter_context(engine.connect()))
        yield connections
        for connection in connections:  # what is not committed is rolled back as its connection closes
            connection.commit()


def _inserted(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    table = SqlEventLogStorageTable
    statement = table.insert().returning(table.c.id, sort_by_parameter_order=True)
    return [int(storage_id) for (storage_id,) in connection.execute(statement, list(rows))]


def _update_asset_keys(
    storage: SqlEventLogStorage, index: sa.Connection, of_assets: Sequence[tuple[EventLogEntry, int]]
) -> None:
    """The row of each asset that says what came last of it. In an order, since PostgreSQL locks what is updated."""
    has_columns = storage._has_asset_key_index_cols_on_connection(index)
    values: dict[str, dict[str, Any]] = {}
    last: dict[tuple[str, str], tuple[EventLogEntry, int]] = {}
    for entry, storage_id in of_assets:
        event = entry.get_dagster_event()
        assert event.asset_key is not None
        last[event.asset_key.to_string(), event.event_type_value] = (entry, storage_id)
    for (asset, _), (entry, storage_id) in last.items():
        values.setdefault(asset, {}).update(storage._get_asset_entry_values(entry, storage_id, has_columns))
    table = AssetKeyTable
    for asset, of_asset in sorted(values.items()):
        if index.execute(table.update().where(table.c.asset_key == asset).values(**of_asset)).rowcount == 0:
            index.execute(table.insert().values(asset_key=asset, **of_asset))


def _store_checks(
    storage: SqlEventLogStorage, index: sa.Connection, stored: Sequence[tuple[EventLogEntry, int, str]]
) -> None:
    """`stored`: events with their ids and as they are serialized."""
    table = AssetCheckExecutionsTable
    planned = (row for entry, storage_id, _ in stored for row in _planned_check_rows(storage, entry, storage_id))
    # A row for each partition of each check of a run: all at once they are as large as the run is for hours.
    while rows := list(islice(planned, INSERTED_TOGETHER)):
        index.execute(table.insert(), rows)
    rows = [row for of_event in stored if (row := _evaluated_check_row(storage, *of_event)) is not None]
    if not rows:
        return
    identity = ("asset_key", "check_name", "partition")
    found = sa.select(table.c.id, *(table.c[name] for name in identity)).where(
        *(table.c[name].in_({row[name] for row in rows}) for name in identity), table.c.run_id == rows[0]["run_id"]
    )
    ids = {tuple(of_row): row_id for row_id, *of_row in index.execute(found)}
    new = [row for row in rows if tuple(row[name] for name in identity) not in ids]
    for row in rows:
        if (row_id := ids.get(tuple(row[name] for name in identity))) is not None:
            index.execute(table.update().where(table.c.id == row_id).values(**row))
    if new:
        index.execute(table.insert(), new)


def _planned_check_rows(storage: SqlEventLogStorage, entry: EventLogEntry, storage_id: int) -> Iterator[dict[str, Any]]:
    """A row a partition. Its event names no partitions: with all of the run's in each, what a run writes would grow
    with their square."""
    event = entry.get_dagster_event()
    if event.event_type is not dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED:
        return
    planned = event.asset_check_planned_data
    without_partitions = event._replace(event_specific_data=copy(planned, partitions_subset=None))
    serialized = serialize_value(entry._replace(dagster_event=without_partitions))
    keys = [None] if planned.partitions_subset is None else planned.partitions_subset.get_partition_keys()
    timestamp = storage._event_insert_timestamp(entry)  # type: ignore[no-untyped-call]
    for key in keys:
        yield {
            "asset_key": planned.asset_key.to_string(),
            "check_name": planned.check_name,
            "partition": key,
            "run_id": entry.run_id,
            "execution_status": AssetCheckExecutionRecordStatus.PLANNED.value,
            "evaluation_event": serialized,
            "evaluation_event_timestamp": timestamp,
            "evaluation_event_storage_id": storage_id,
        }


def _evaluated_check_row(
    storage: SqlEventLogStorage, entry: EventLogEntry, storage_id: int, serialized: str
) -> dict[str, Any] | None:
    event = entry.get_dagster_event()
    if event.event_type is not dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        return None
    evaluation, status = event.asset_check_evaluation_data, AssetCheckExecutionRecordStatus
    assert evaluation.partition is not None, "rows are found by their partition"
    target = evaluation.target_materialization_data
    return {
        "asset_key": evaluation.asset_key.to_string(),
        "check_name": evaluation.check_name,
        "partition": evaluation.partition,
        "run_id": entry.run_id,
        "execution_status": (status.SUCCEEDED if evaluation.passed else status.FAILED).value,
        "evaluation_event": serialized,
        "evaluation_event_timestamp": storage._event_insert_timestamp(entry),  # type: ignore[no-untyped-call]
        "evaluation_event_storage_id": storage_id,
        "materialization_event_storage_id": None if target is None else target.storage_id,
    }


@contextmanager
def components_only(is_wanted: Callable[[Path], bool]) -> Iterator[None]:
    """Component trees that the body makes have only these files and folders; a file needs those around it.

    Dagster has no other way to load a defs folder without a part of it: while it looks for what is there, it reads each
    YAML and imports each module, and one that raises ends the whole. Not for two threads at once.
    """
    found_in = component_decls.build_filesystem_component_decl_from_context

    def found_of_wanted(context: Any) -> Any:
        found = found_in(context) if is_wanted(context.path) else None
        if found is None and context.path == context.defs_module_path:  # which Dagster takes for never empty
            loc = ComponentPath.from_path(context.path)
            return component_decls.DefsFolderDecl(
                context=context, loc=loc, children={}, source_tree=None, component_file_model=None
            )
        return found

    with ExitStack() as patches:
        for module in (component_decls, component_tree):
            name = found_in.__name__
            patches.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, found_of_wanted)
        yield


class InterruptSignals:
    """The signals that have interrupted this process: Dagster turns SIGINT and SIGTERM into the same exception."""

    def __init__(self) -> None:
        self.last: int | None = None

    def raise_again(self) -> None:
        """Interrupt once more where something has, for code that is not to go on after an interrupt. The exception that
        a signal raises is lost where it comes in a finalizer or a callback of a weak reference, which Python runs
        anywhere and whose exceptions it only prints, and where a library passes over whatever is raised."""
        if self.last is not None:
            signal.raise_signal(self.last)


@contextmanager
def interrupt_signals() -> Iterator[InterruptSignals]:
    """Remembers which signal it is that interrupts what is inside; what it does stays as it was.

    Outside the main thread there are no signals to see.
    """
    received = InterruptSignals()
    before = _interrupt_handlers()

    def remember(number: int, frame: FrameType | None) -> None:
        received.last = number
        before[number](number, frame)

    try:
        _set_handlers(dict.fromkeys(before, remember))
        yield received
    finally:
        _set_handlers(before)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A termination that comes inside (SIGINT or SIGTERM) takes effect at the end, as it would have there.

    What waits inside, and has begun nothing, should give up once `interrupt_is_held_back`.
    """
    held_back = _HeldBack()
    before = _interrupt_handlers()
    try:
        _set_handlers(dict.fromkeys(before, held_back))
        yield
    finally:
        _set_handlers(before)
        if held_back.numbers:
            signal.raise_signal(held_back.numbers[0])


class _HeldBack:
    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)


def interrupt_is_held_back() -> bool:
    """Whether this thread is inside `interrupts_held_back` and a termination has come."""
    if threading.current_thread() is not threading.main_thread():
        return False
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return any(isinstance(handler, _HeldBack) and handler.numbers for handler in handlers)


Handler = Callable[[int, FrameType | None], object]


def _interrupt_handlers() -> dict[int, Handler]:
    """What is called for the signals that interrupt, where anything is: a signal that is ignored, or ends the process,
    goes on to do so."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {number: handler for number, handler in handlers.items() if callable(handler)}


def _set_handlers(handlers: Mapping[int, Handler]) -> None:
    """All of them, also where a signal comes in between and raises."""
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:
        _set_handlers(handlers)
        raise
