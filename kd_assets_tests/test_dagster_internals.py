"""What we rely on in Dagster without its promise. A failure here after an upgrade says which piece to look at."""

import json
import os
import re
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._cli.utils import get_possibly_temporary_instance_for_cli
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext, DefinitionsLoadType
from dagster._core.errors import raise_execution_interrupts
from dagster._core.events import ASSET_CHECK_EVENTS, ASSET_EVENTS, StepMaterializationData
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    AssetKeyTable,
    SqlEventLogStorageTable,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect

from kd_assets import dagster_internals
from kd_assets.dagster_internals import (
    CheckTarget,
    EventLogEntry,
    SqlEventLogStorage,
    _removal_of_planned,
    already_recorded,
    components_only,
    interrupt_is_held_back,
    interrupt_signals,
    interrupts_held_back,
    is_forgotten_at_its_end,
    is_of_this_load_alone,
    latest_storage_ids,
    place_in_code_location,
    record_events,
    store_together,
    takes_events_together,
    withdraw_planned_checks,
)
from kd_assets.dagster_storage import in_bulk
from kd_assets.dagster_storage.in_bulk import BATCH_SIZE_VARIABLE, InBulk
from kd_assets.dagster_storage.sqlite import SqliteEventLog
from kd_assets.errors import InputError
from kd_assets.recipes.project import PROJECT_FOLDER


def run_of(with_output: bool) -> tuple[dg.ExecuteInProcessResult, list[str]]:
    """A run of an asset that logs its own materialization, and of one downstream of it; and who ran."""
    ran: list[str] = []

    @dg.multi_asset(specs=[dg.AssetSpec("upstream", skippable=True)])
    def upstream(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        ran.append("upstream")
        context.log_event(dg.AssetMaterialization("upstream", metadata={"mine": 1}))
        if with_output:
            yield already_recorded(dg.AssetKey("upstream"))

    @dg.asset(deps=["upstream"])
    def downstream() -> None:
        ran.append("downstream")

    return dg.materialize([upstream, downstream]), ran


def recorded(result: dg.ExecuteInProcessResult) -> list[dg.AssetMaterialization]:
    return [
        e.step_materialization_data.materialization
        for e in result.get_asset_materialization_events()
        if e.asset_key == dg.AssetKey("upstream")
    ]


def test_already_recorded_lets_downstream_run_and_records_nothing_more() -> None:
    result, ran = run_of(with_output=True)
    assert ran == ["upstream", "downstream"]
    (only,) = recorded(result)
    assert only.metadata["mine"].value == 1


def test_without_it_dagster_skips_downstream_silently_and_calls_the_run_a_success() -> None:
    result, ran = run_of(with_output=False)
    assert ran == ["upstream"]
    assert result.success, "should Dagster fail such a run one day, already_recorded may go"


def test_a_load_that_takes_state_which_dagster_keeps_is_told_from_one_that_takes_none() -> None:
    with DefinitionsLoadContext.scoped(DefinitionsLoadContext(DefinitionsLoadType.INITIALIZATION)):
        assert not is_of_this_load_alone()
        DefinitionsLoadContext.get().get_defs_key_state_info("some_component")
        assert is_of_this_load_alone()


def test_the_instance_of_a_command_without_dagster_home_is_told_from_one_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    with get_possibly_temporary_instance_for_cli() as instance:
        assert is_forgotten_at_its_end(instance)
    kept = {"base_dir": str(tmp_path / "kept")}
    (tmp_path / "dagster.yaml").write_text(json.dumps({"storage": {"sqlite": kept}}))
    with get_possibly_temporary_instance_for_cli() as instance:
        assert not is_forgotten_at_its_end(instance)
    (tmp_path / "dagster.yaml").write_text((PROJECT_FOLDER / "dagster.yaml").read_text())  # a command in a checkout
    with get_possibly_temporary_instance_for_cli() as instance:
        assert is_forgotten_at_its_end(instance)
        assert instance.get_run_records() == []
    (tmp_path / "stays").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "stays")) as instance, dg.DagsterInstance.ephemeral() as other:
        assert not is_forgotten_at_its_end(instance)
        assert not is_forgotten_at_its_end(other)


@pytest.mark.parametrize("said", ["~/home", "{home}"])
def test_events_of_the_shipped_instance_lie_where_those_of_dagsters_default_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DAGSTER_HOME", said.format(home=home))
    monkeypatch.chdir(tmp_path)
    with dg.DagsterInstance.get() as instance:  # Dagster's default
        run_id = instance.create_run_for_job(dg.job(name="nothing")(lambda: None)).run_id
    (home / "dagster.yaml").write_text((PROJECT_FOLDER / "dagster.yaml").read_text())
    with dg.DagsterInstance.get() as instance:
        assert type(instance.event_log_storage) is SqliteEventLog
        assert [record.dagster_run.run_id for record in instance.get_run_records()] == [run_id]
    assert not (tmp_path / "~").exists()


RUN_ID = "11111111-2222-3333-4444-555555555555"
KEY = dg.AssetKey("partitioned")
KEY_CHECKED = dg.AssetKey("checked")
PARTITIONS = ("a", "b", "c")
RANGE = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}
TIMES = re.compile(r"timestamp$")


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def store(instance: dg.DagsterInstance, partition: str) -> None:
    """What `context.log_event` comes down to."""
    instance.event_log_storage.store_event(materialized(partition))


def materialized(partition: str) -> EventLogEntry:
    event = dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.ASSET_MATERIALIZATION.value,
        job_name="job",
        event_specific_data=StepMaterializationData(dg.AssetMaterialization(KEY, partition=partition)),
    )
    return EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None, level=10, user_message="", run_id=RUN_ID, timestamp=1.0, dagster_event=event
    )


def stored(instance: dg.DagsterInstance) -> tuple[list[str | None], list[str | None]]:
    """The partitions in the index and in the run's own log."""
    index = instance.fetch_materializations(KEY, limit=100, ascending=True).records
    return [r.partition_key for r in index], [r.partition_key for r in instance.get_records_for_run(RUN_ID).records]


def sql(instance: dg.DagsterInstance) -> SqlEventLogStorage:
    storage = instance.event_log_storage
    assert isinstance(storage, SqlEventLogStorage)
    return storage


def everything_stored(instance: dg.DagsterInstance) -> dict[str, list[dict[str, Any]]]:
    """All that the event log storage has of assets and checks, without times and process ids."""
    storage, found = sql(instance), {}
    tables = [SqlEventLogStorageTable, AssetKeyTable, AssetEventTagsTable, AssetCheckExecutionsTable]
    with storage.index_connection() as connection:
        for table in tables:
            found[table.name] = rows_of(connection, table)
    with storage.run_connection(RUN_ID) as connection:
        found["the run's log"] = rows_of(connection, SqlEventLogStorageTable)
    of_assets = {t.value for t in ASSET_EVENTS | ASSET_CHECK_EVENTS}
    for name in (SqlEventLogStorageTable.name, "the run's log"):
        found[name] = [row for row in found[name] if row["dagster_event_type"] in of_assets]
    return found


def rows_of(connection: sa.Connection, table: sa.Table) -> list[dict[str, Any]]:
    rows = connection.execute(table.select().order_by(table.c.id)).mappings()
    return [
        {
            name: comparable(json.loads(value)) if isinstance(value, str) and value.startswith("{") else value
            for name, value in row.items()
            if not TIMES.search(name)
        }
        for row in rows
    ]


def comparable(value: Any) -> Any:
    """Without times and process ids; of a planned check the row says the partition, whatever its event does."""
    if isinstance(value, dict):
        if value.get("__class__") == "AssetCheckEvaluationPlanned":
            value = value | {"partitions_subset": None}
        return {name: comparable(v) for name, v in value.items() if name not in ("timestamp", "pid")}
    return [comparable(v) for v in value] if isinstance(value, list) else value


def run_that_records(
    instance: dg.DagsterInstance,
    record: Callable[[dg.AssetExecutionContext, list[dg.AssetMaterialization | dg.AssetCheckEvaluation]], object],
) -> None:
    """A run over three partitions of an asset with a check, of which it records two, in two goes; the check of one
    twice."""
    partitions = dg.StaticPartitionsDefinition(PARTITIONS)

    @dg.multi_asset(
        specs=[dg.AssetSpec(KEY, skippable=True, code_version="1")],
        check_specs=[dg.AssetCheckSpec("sound", asset=KEY, partitions_def=partitions)],
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def partitioned(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        tags = {"dagster/data_version": "of {}", "dagster/code_version": "1"}
        first, second = (
            dg.AssetMaterialization(
                KEY,
                partition=key,
                metadata={"n": 1, "text": dg.MetadataValue.md("*x*")},
                tags={name: value.format(key) for name, value in tags.items()},
                description="told" if key == "b" else None,
            )
            for key in "ab"
        )
        target = CheckTarget(run_id=RUN_ID, storage_id=7, timestamp=1.0)
        checks = [
            dg.AssetCheckEvaluation(
                asset_key=KEY,
                check_name="sound",
                passed=passed,
                partition=key,
                description=description,
                metadata={"worst": 0.5},
                target_materialization_data=target if passed else None,
            )
            for key, passed, description in (("a", False, None), ("b", True, "it is"), ("a", True, None))
        ]
        record(context, [first, second, checks[0], checks[1]])
        record(context, [checks[2]])
        yield already_recorded(KEY)
        raise ValueError("c cannot be made")

    job = dg.Definitions(assets=[partitioned]).resolve_implicit_global_asset_job_def()
    assert not job.execute_in_process(instance=instance, tags=RANGE, run_id=RUN_ID, raise_on_error=False).success


def log_one_by_one(context: dg.AssetExecutionContext, events: list[Any]) -> None:
    for event in events:
        context.log_event(event)


def test_events_that_are_recorded_together_are_stored_as_dagster_stores_them_one_by_one(tmp_path: Path) -> None:
    found = []
    for name, record in (("one by one", log_one_by_one), ("together", record_events)):
        (tmp_path / name).mkdir()
        with dg.DagsterInstance.local_temp(str(tmp_path / name)) as instance:
            run_that_records(instance, record)
            found.append(everything_stored(instance))
    assert found[0] == found[1]
    statuses = [(r["partition"], r["execution_status"]) for r in found[0]["asset_check_executions"]]
    assert sorted(statuses) == [("a", "SUCCEEDED"), ("b", "SUCCEEDED"), ("c", "PLANNED")]


def test_what_a_run_plans_is_stored_as_dagster_stores_it_and_names_no_partitions_in_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BATCH_SIZE_VARIABLE, raising=False)
    monkeypatch.setattr(dagster_internals, "INSERTED_TOGETHER", 2)
    found = []
    for name in ("dagster", "ours"):
        (tmp_path / name).mkdir()
        if name == "ours":
            monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / name))
            (tmp_path / name / "dagster.yaml").write_text((PROJECT_FOLDER / "dagster.yaml").read_text())
        else:
            (tmp_path / name / "dagster.yaml").touch()
        with dg.DagsterInstance.from_config(str(tmp_path / name)) as instance:
            run_that_records(instance, lambda context, events: None)
            found.append(everything_stored(instance))
            with sql(instance).index_connection() as connection:
                planned = connection.execute(sa.select(AssetCheckExecutionsTable.c.evaluation_event)).scalars().all()
    assert found[0] == found[1]
    assert len(planned) == len(PARTITIONS)
    assert not any('"b"' in event for event in planned)


def test_dagster_hands_over_one_event_of_all_partitions_that_a_run_will_make_of_an_asset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold one a partition together, which at 10,000 partitions of three assets are 140 MB."""
    handed_over: list[EventLogEntry] = []
    store_event_batch = InBulk.store_event_batch

    def noted(storage: InBulk, events: Sequence[EventLogEntry]) -> None:
        handed_over.extend(events)
        store_event_batch(storage, events)

    monkeypatch.setattr(InBulk, "store_event_batch", noted)
    with instance_of_ours(tmp_path / "home", monkeypatch) as instance:
        run_that_records(instance, lambda context, events: None)
        stored = instance.all_logs(RUN_ID, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    types = [event.dagster_event_type for event in handed_over]
    assert types.count(dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED) == 1
    assert sorted(event.get_dagster_event().partition or "" for event in stored) == list(PARTITIONS)


def test_of_what_a_run_plans_a_batch_that_cannot_be_written_together_is_written_one_by_one_and_no_other_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(in_bulk, "BATCH_SIZE", 1)
    n_written = 0

    def fails_once(storage: SqlEventLogStorage, events: Sequence[EventLogEntry]) -> list[int]:
        nonlocal n_written
        n_written += 1
        if n_written == 2:
            raise sa.exc.OperationalError("INSERT", {}, Exception("database is locked"))
        return store_together(storage, events)

    monkeypatch.setattr(in_bulk, "store_together", fails_once)
    with instance_of_ours(tmp_path / "home", monkeypatch) as instance:
        run_that_records(instance, lambda context, events: None)
        stored = instance.all_logs(RUN_ID, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    assert sorted(event.get_dagster_event().partition or "" for event in stored) == list(PARTITIONS)
    assert "database is locked" in capsys.readouterr().err


def test_dynamic_partitions_are_those_that_dagster_reads_and_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with instance_of_ours(tmp_path / "home", monkeypatch) as instance:
        assert list(instance.get_dynamic_partitions("shards")) == []
        instance.add_dynamic_partitions("shards", ["c", "é", "a", "it's"])
        instance.add_dynamic_partitions("others", ["b"])
        instance.delete_dynamic_partition("shards", "c")
        instance.add_dynamic_partitions("shards", ["b", "c"])
        of_dagster = SqlEventLogStorage.get_dynamic_partitions(sql(instance), "shards")
        assert list(instance.get_dynamic_partitions("shards")) == list(of_dagster) == ["é", "a", "it's", "b", "c"]


def test_the_storage_of_the_shipped_dagster_yaml_has_the_files_of_dagsters_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BATCH_SIZE_VARIABLE, raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        store(instance, "a")
    (tmp_path / "dagster.yaml").write_text((PROJECT_FOLDER / "dagster.yaml").read_text())
    with dg.DagsterInstance.get() as instance:
        assert stored(instance) == (["a"], ["a"])


def test_an_exception_leaves_nothing_of_what_was_to_be_stored_together(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(instance, "before")

    def fail(*arguments: object) -> None:
        raise ValueError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(dagster_internals, "_store_checks", fail)
        with pytest.raises(ValueError, match="no more"):
            store_together(sql(instance), [materialized("a"), materialized("b")])
    assert stored(instance) == (["before"], ["before"])
    assert store_together(sql(instance), [materialized("a"), materialized("b")]) == [2, 3]
    assert stored(instance) == (["before", "a", "b"],) * 2
    store(instance, "after")
    assert stored(instance) == (["before", "a", "b", "after"],) * 2
    assert store_together(sql(instance), []) == []


MOMENTS = ("begin", "before_cursor_execute", "after_cursor_execute", "commit")
"""Of a transaction, as SQLAlchemy names them."""


def store_interrupted(instance: dg.DagsterInstance, moment: str, *, held_back: bool) -> None:
    """Ctrl-C at this moment of storing two events, the first time that it comes."""
    is_sent = False

    def send(*arguments: object) -> None:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            os.kill(os.getpid(), signal.SIGINT)

    sa.event.listen(sa.Engine, moment, send)
    try:
        with raise_execution_interrupts(), interrupt_signals(), interrupts_held_back() if held_back else nullcontext():
            store_together(sql(instance), [materialized("a"), materialized("b")])
    finally:
        sa.event.remove(sa.Engine, moment, send)


def check_that_interrupts_are_neither_lost_nor_leave_a_half(instance: dg.DagsterInstance) -> None:
    store(instance, "before")
    for moment in MOMENTS:
        before = stored(instance)
        with pytest.raises(dg.DagsterExecutionInterruptedError):
            store_interrupted(instance, moment, held_back=False)
        assert stored(instance) == before, moment
        with pytest.raises(dg.DagsterExecutionInterruptedError):
            store_interrupted(instance, moment, held_back=True)
        assert stored(instance) == ([*before[0], "a", "b"], [*before[1], "a", "b"]), moment


@pytest.mark.usefixtures("handlers")
def test_an_interrupt_at_any_moment_of_storing_is_not_lost_and_leaves_no_half(instance: dg.DagsterInstance) -> None:
    check_that_interrupts_are_neither_lost_nor_leave_a_half(instance)


def check_that_one_sees_what_the_other_writes(one: dg.DagsterInstance, other: dg.DagsterInstance) -> None:
    """With two instances on one database, as two processes have them."""
    for i in range(3):
        other.add_dynamic_partitions("mine", [f"p{i}"])
        assert one.has_dynamic_partition("mine", f"p{i}")
        assert one.get_dynamic_partitions("mine") == [f"p{j}" for j in range(i + 1)]
        before = stored(one)
        store_together(sql(other), [materialized(f"p{i}")])
        assert stored(one) == ([*before[0], f"p{i}"], [*before[1], f"p{i}"])
        assert one.get_materialized_partitions(KEY) == {f"p{j}" for j in range(i + 1)}
    other.delete_dynamic_partition("mine", "p1")
    assert one.get_dynamic_partitions("mine") == ["p0", "p2"]
    assert not one.has_dynamic_partition("mine", "p1")


def test_what_one_process_writes_another_sees_at_its_next_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.delenv(BATCH_SIZE_VARIABLE, raising=False)
    (tmp_path / "dagster.yaml").write_text((PROJECT_FOLDER / "dagster.yaml").read_text())
    with dg.DagsterInstance.get() as one, dg.DagsterInstance.from_config(str(tmp_path)) as other:
        check_that_one_sees_what_the_other_writes(one, other)


def test_an_instance_that_is_not_in_dagster_home_says_so_and_records_nothing_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "instance").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "instance" / "dagster.yaml").write_text((PROJECT_FOLDER / "dagster.yaml").read_text())
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="DAGSTER_HOME"):
        dg.DagsterInstance.from_config(str(tmp_path / "instance"))
    monkeypatch.delenv("DAGSTER_HOME")
    with pytest.raises(InputError, match="export DAGSTER_HOME"):
        dg.DagsterInstance.from_config(str(tmp_path / "instance"))


def test_more_events_that_are_stored_together_take_no_more_connections(instance: dg.DagsterInstance) -> None:
    n_connections = Counter[str]()

    def on_connect(connection: sqlite3.Connection, _: object) -> None:
        (_, _, path) = connection.execute("PRAGMA database_list").fetchone()
        n_connections[Path(path).name] += 1

    store(instance, "before")
    sa.event.listen(sa.Pool, "connect", on_connect)
    try:
        found = []
        for n in (1, 10):
            store_together(sql(instance), [materialized(f"p{i}") for i in range(n)])
            found.append(dict(n_connections))
            n_connections.clear()
    finally:
        sa.event.remove(sa.Pool, "connect", on_connect)
    assert found[0] == found[1]
    assert sum(found[0].values()) <= 6


def test_a_storage_that_is_in_memory_takes_events_together_too() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run_that_records(instance, record_events)
        assert instance.get_materialized_partitions(KEY) == {"a", "b"}


def instance_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dg.DagsterInstance:
    """With the storage of the shipped dagster.yaml."""
    folder.mkdir()
    monkeypatch.delenv(BATCH_SIZE_VARIABLE, raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(folder))
    (folder / "dagster.yaml").write_text((PROJECT_FOLDER / "dagster.yaml").read_text())
    return dg.DagsterInstance.from_config(str(folder))


def test_a_sqlite_that_does_not_say_the_ids_of_rows_takes_events_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3.dbapi2, "sqlite_version_info", (3, 34, 1))
    found = []
    for record in (log_one_by_one, record_events):
        with instance_of_ours(tmp_path / record.__name__, monkeypatch) as instance:
            assert not takes_events_together(instance.event_log_storage)
            run_that_records(instance, record)
            found.append(everything_stored(instance))
    assert found[0] == found[1]


@pytest.mark.parametrize(("dialect", "expected"), [(mysql.dialect, False), (postgresql.dialect, True)])
def test_of_databases_with_a_server_postgresql_alone_takes_events_together(
    monkeypatch: pytest.MonkeyPatch, dialect: type[sa.Dialect], expected: bool
) -> None:
    with dg.DagsterInstance.ephemeral() as instance, monkeypatch.context() as patched:
        patched.setattr(instance.event_log_storage._engine, "dialect", dialect())  # type: ignore[attr-defined]
        assert takes_events_together(instance.event_log_storage) is expected


def test_what_was_being_written_as_a_server_went_away_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, is_committed = dagster_internals._transaction, False
    lost: list[bool] = []

    @contextmanager
    def goes_away(storage: SqlEventLogStorage, run_id: str) -> Iterator[list[sa.Connection]]:
        lost.append(is_committed or not lost or not lost[-1])  # the second time it stays
        gone = sa.exc.DBAPIError("COMMIT", {}, Exception("gone"), connection_invalidated=True)
        with begin(storage, run_id) as connections:
            yield connections
            if lost[-1] and not is_committed:
                raise gone
        if lost[-1]:
            raise gone

    found = []
    for name in ("it stays", "goes before the commit", "goes before it can say that it committed"):
        is_committed = "committed" in name
        lost.clear()
        with instance_of_ours(tmp_path / name, monkeypatch) as instance, monkeypatch.context() as patched:
            if name != "it stays":
                patched.setattr(dagster_internals, "_transaction", goes_away)
            run_that_records(instance, record_events)
            found.append(everything_stored(instance))
            # A batch was planned and two are recorded.
            assert lost.count(True) == (0 if name == "it stays" else 3)
    assert found[0] == found[1] == found[2]


def test_latest_storage_ids_are_those_of_each_partitions_last_materialization(instance: dg.DagsterInstance) -> None:
    for partition in ("a", "b", "a", "c"):
        store(instance, partition)
    ids = [r.storage_id for r in instance.fetch_materializations(KEY, limit=100, ascending=True).records]
    assert latest_storage_ids(instance, KEY, ["a", "b", "never"]) == {"a": ids[2], "b": ids[1]}
    assert latest_storage_ids(instance, KEY, []) == {}


@pytest.fixture
def handlers() -> Iterator[None]:
    """Dagster has SIGTERM do what SIGINT does, and leaves it so."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_is_held_back_comes_at_the_end(sent: signal.Signals) -> None:
    done = []

    def interrupted() -> None:
        with interrupts_held_back():
            os.kill(os.getpid(), sent)
            done.append("inside")
        done.append("outside")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["inside"]


@pytest.mark.usefixtures("handlers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_whose_exception_python_only_prints_can_be_raised_again() -> None:
    class InterruptedFinalizer:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with raise_execution_interrupts(), interrupt_signals() as received:
        received.raise_again()
        InterruptedFinalizer()
        with pytest.raises(dg.DagsterExecutionInterruptedError):
            received.raise_again()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("context", [interrupt_signals, interrupts_held_back])
def test_a_signal_between_two_handlers_that_are_set_leaves_none_behind(
    context: Callable[[], AbstractContextManager[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    n_set, set_handler = Counter[str](), signal.signal

    for at in range(1, 5):

        def set_and_interrupt(number: int, handler: Any, at: int = at) -> object:
            n_set["n"] += 1
            previous = set_handler(number, handler)
            if n_set["n"] == at:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
            return previous

        n_set.clear()
        with monkeypatch.context() as patched:
            patched.setattr(signal, "signal", set_and_interrupt)
            with pytest.raises(KeyboardInterrupt), context():
                pass
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.usefixtures("handlers")
def test_an_interrupt_is_not_lost_where_something_fails() -> None:
    def interrupted() -> None:
        with interrupts_held_back():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("no more")

    with pytest.raises(KeyboardInterrupt) as raised:
        interrupted()
    assert isinstance(raised.value.__context__, ValueError)


@pytest.mark.usefixtures("handlers")
def test_what_waits_while_interrupts_are_held_back_can_see_that_one_has_come() -> None:
    seen = []

    def interrupted() -> None:
        with interrupts_held_back():
            seen.append(interrupt_is_held_back())
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(interrupt_is_held_back())

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [False, True]
    assert not interrupt_is_held_back()


def test_outside_the_main_thread_nothing_is_held_back_or_remembered() -> None:
    def inside() -> int | None:
        with interrupts_held_back(), interrupt_signals() as received:
            return received.last

    with ThreadPoolExecutor(1) as other_thread:
        assert other_thread.submit(inside).result() is None


@pytest.mark.parametrize("withdraws", [True, False])
def test_planned_checks_are_withdrawn_and_evaluated_ones_stay(instance: dg.DagsterInstance, withdraws: bool) -> None:
    partitions = dg.StaticPartitionsDefinition(["a", "b"])

    @dg.multi_asset(
        specs=[dg.AssetSpec("checked", skippable=True)],
        check_specs=[dg.AssetCheckSpec("sound", asset="checked", partitions_def=partitions)],
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def checked(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        if withdraws:
            withdraw_planned_checks(context.instance, context.run.run_id, context.selected_asset_check_keys)
        context.log_event(
            dg.AssetCheckEvaluation(asset_key=KEY_CHECKED, check_name="sound", passed=True, partition="a")
        )
        yield already_recorded(KEY_CHECKED)
        raise ValueError("b cannot be made")

    tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "b"}
    job = dg.Definitions(assets=[checked]).resolve_implicit_global_asset_job_def()
    assert not job.execute_in_process(instance=instance, tags=tags, raise_on_error=False).success
    history = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(KEY_CHECKED, "sound"), limit=10
    )
    found = {(record.partition, record.status.value) for record in history}
    assert found == {("a", "SUCCEEDED")} | (set() if withdraws else {("b", "PLANNED")})


def test_a_defs_folder_is_loaded_without_some_of_its_files_and_then_again_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some_definitions"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "good.py").write_text("import dagster as dg\n\nmine = dg.AssetSpec('mine')\n")
    (folder / "bad.py").write_text("import no_such_package\n")
    (tmp_path / "dg.toml").write_text('directory_type = "project"\n[project]\ndefs_module = "some_definitions"\n')
    monkeypatch.syspath_prepend(tmp_path)

    def found() -> list[str]:
        specs = dg.load_from_defs_folder(path_within_project=tmp_path).resolve_all_asset_specs()
        return [spec.key.to_user_string() for spec in specs]

    with components_only(lambda path: path.name != "bad.py"):
        assert found() == ["mine"]
    with components_only(lambda path: False):
        assert found() == []
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        found()


def test_planned_checks_are_found_by_an_index_and_not_by_reading_the_whole_table(instance: dg.DagsterInstance) -> None:
    checks = [dg.AssetCheckKey(dg.AssetKey(["tiny", asset]), name) for asset in ("a", "b") for name in ("c", "d", "e")]
    removal = _removal_of_planned("run", checks).compile(
        dialect=sqlite_dialect(), compile_kwargs={"literal_binds": True}
    )
    with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
        plan = [str(row[3]) for row in connection.execute(sa.text(f"EXPLAIN QUERY PLAN {removal}"))]
    expected = "USING INDEX idx_asset_check_executions_unique (asset_key=? AND check_name=? AND run_id=?)"
    assert [line for line in plan if expected in line], plan
    assert not [line for line in plan if line.startswith("SCAN")], plan


def test_an_ended_run_of_the_command_line_is_found_by_the_code_location_that_it_is_placed_in(
    instance: dg.DagsterInstance,
) -> None:
    @dg.asset
    def made() -> None: ...

    job = dg.Definitions(assets=[made], jobs=[dg.define_asset_job("make")]).resolve_job_def("make")
    run = job.execute_in_process(instance=instance, tags={"mine": "kept"}).dagster_run
    assert run.remote_job_origin is None
    place_in_code_location(instance, run, module="a.module", location="here")
    (found,) = instance.get_runs(dg.RunsFilter(job_name="make", tags={".dagster/repository": "__repository__@here"}))
    assert (found.run_id, found.status, found.tags["mine"]) == (run.run_id, dg.DagsterRunStatus.SUCCESS, "kept")
    assert found.remote_job_origin is not None
    assert found.remote_job_origin.location_name == "here"
