"""What we rely on in Dagster without its promise. A failure here after an upgrade says which piece to look at."""

import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.events import StepMaterializationData

from kd_assets.dagster_internals import (
    already_recorded,
    interrupt_signals,
    interrupts_held_back,
    latest_storage_ids,
    one_transaction,
)


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


RUN_ID = "11111111-2222-3333-4444-555555555555"
KEY = dg.AssetKey("partitioned")


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def store(instance: dg.DagsterInstance, partition: str) -> None:
    """What `context.log_event` comes down to."""
    event = dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.ASSET_MATERIALIZATION.value,
        job_name="job",
        event_specific_data=StepMaterializationData(dg.AssetMaterialization(KEY, partition=partition)),
    )
    instance.report_dagster_event(event, run_id=RUN_ID)


def stored(instance: dg.DagsterInstance) -> tuple[list[str | None], list[str | None]]:
    """The partitions in the index and in the run's own log."""
    index = instance.fetch_materializations(KEY, limit=100, ascending=True).records
    return [r.partition_key for r in index], [r.partition_key for r in instance.get_records_for_run(RUN_ID).records]


def test_events_of_one_transaction_are_seen_by_their_thread_at_once_and_by_others_at_its_end(
    instance: dg.DagsterInstance,
) -> None:
    store(instance, "before")
    with ThreadPoolExecutor(1) as other_thread:
        with one_transaction(instance, RUN_ID):
            store(instance, "a")
            store(instance, "b")
            assert stored(instance) == (["before", "a", "b"],) * 2
            assert other_thread.submit(stored, instance).result() == (["before"],) * 2
        assert other_thread.submit(stored, instance).result() == (["before", "a", "b"],) * 2
    store(instance, "after")
    assert stored(instance) == (["before", "a", "b", "after"],) * 2


def test_an_exception_leaves_nothing_of_its_transaction(instance: dg.DagsterInstance) -> None:
    def store_and_fail() -> None:
        with one_transaction(instance, RUN_ID):
            store(instance, "a")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        store_and_fail()
    assert stored(instance) == ([], [])
    with one_transaction(instance, RUN_ID):
        store(instance, "b")
    assert stored(instance) == (["b"], ["b"])


def test_one_transaction_takes_no_more_connections_for_more_events(
    instance: dg.DagsterInstance,
) -> None:
    """Should Dagster store events in another way one day, they cost more again, and only this test says so."""
    n_connections = Counter[str]()

    def on_connect(connection: sqlite3.Connection, _: object) -> None:
        (_, _, path) = connection.execute("PRAGMA database_list").fetchone()
        n_connections[Path(path).name] += 1

    store(instance, "before")
    sa.event.listen(sa.Pool, "connect", on_connect)
    try:
        store(instance, "one")
        assert n_connections == {f"{RUN_ID}.db": 1, "index.db": 1}
        n_connections.clear()
        with one_transaction(instance, RUN_ID):
            for i in range(10):
                store(instance, f"p{i}")
    finally:
        sa.event.remove(sa.Pool, "connect", on_connect)
    # One to make the file if need be, and that of the transaction.
    assert n_connections == {f"{RUN_ID}.db": 2, "index.db": 2}


def test_storages_other_than_sqlite_go_on_as_ever() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        with one_transaction(instance, RUN_ID):
            store(instance, "a")
        assert stored(instance) == (["a"], ["a"])


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
def test_an_interrupt_is_not_lost_where_something_fails() -> None:
    def interrupted() -> None:
        with interrupts_held_back():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("no more")

    with pytest.raises(KeyboardInterrupt) as raised:
        interrupted()
    assert isinstance(raised.value.__context__, ValueError)


def test_outside_the_main_thread_nothing_is_held_back_or_remembered() -> None:
    def inside() -> int | None:
        with interrupts_held_back(), interrupt_signals() as received:
            return received.last

    with ThreadPoolExecutor(1) as other_thread:
        assert other_thread.submit(inside).result() is None
