"""PostgreSQL as Dagster's storage, as docs/production.md has it: a real server, which dies, too."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml  # type: ignore[import-untyped]

from kd_assets import dagster_internals
from kd_assets.dagster_internals import SqlEventLogStorage, record_events
from kd_assets.dagster_storage.in_bulk import BATCH_SIZE_VARIABLE
from kd_assets.dagster_storage.postgresql import wait_for_the_server, with_driver
from kd_assets.errors import DatabaseUnavailableError
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.schedules import nightly_requests
from kd_assets.orchestration.staleness.coverage import asset_evaluations
from kd_assets_tests.benchmarks.do_nothing import write_python
from kd_assets_tests.benchmarks.only_commits import HOLD
from kd_assets_tests.benchmarks.scheduler import CACHE_SETTINGS
from kd_assets_tests.orchestration.command_line import CommandLine, group_of
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment
from kd_assets_tests.orchestration.postgresql_server import PostgresqlServer, server_programs, storage_on
from kd_assets_tests.orchestration.test_check_states import check_that_states_are_those_of_dagster, make_history
from kd_assets_tests.orchestration.web_queries import web_queries
from kd_assets_tests.slurm.deployment import commit_shards
from kd_assets_tests.test_dagster_internals import (
    check_that_interrupts_are_neither_lost_nor_leave_a_half,
    check_that_one_sees_what_the_other_writes,
    everything_stored,
    handlers,
    log_one_by_one,
    run_that_records,
)

__all__ = ["handlers"]  # the fixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        server_programs() is None and "CI" not in os.environ, reason="no PostgreSQL server: .ci/install-postgresql"
    ),
]
RANGE = ("--partition-range", f"{SHARDS[0]}...{SHARDS[-1]}")


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresqlServer]:
    with PostgresqlServer() as started:
        yield started


class Instances(Protocol):
    def __call__(self, name: str, *, storage: str = "ours") -> dg.DagsterInstance: ...


@pytest.fixture
def instances(tmp_path: Path, server: PostgresqlServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Instances]:
    """Makes instances on databases of their own."""
    monkeypatch.delenv(BATCH_SIZE_VARIABLE, raising=False)
    made = []

    def make(name: str, *, storage: str = "ours") -> dg.DagsterInstance:
        folder = tmp_path / name
        folder.mkdir()
        url = server.new_database()
        settings = {
            "storage": storage_on(url) if storage == "ours" else {"postgres": {"postgres_url": with_driver(url)}}
        }
        (folder / "dagster.yaml").write_text(yaml.safe_dump(settings))
        made.append(dg.DagsterInstance.from_config(str(folder)))
        return made[-1]

    yield make
    for instance in made:
        instance.dispose()


@pytest.fixture
def deployment(tmp_path: Path, tiny_teacher: Path, instances: Instances) -> Deployment:
    """Its shards are committed; jobs commit tiny results at once."""
    home = tmp_path / "home"
    home.mkdir()
    write_python(home / "python", module="kd_assets_tests.benchmarks.only_commits")
    platform = Platform(home=str(home), compute_python=str(home / "python"))
    made = Deployment(
        home, tiny_teacher, instances("instance"), platform=platform, caches=dict(CACHE_SETTINGS.values())
    )
    made.plan()
    commit_shards(made)
    return made


@pytest.fixture
def command_line(deployment: Deployment) -> Iterator[CommandLine]:
    made = CommandLine(deployment)
    yield made
    (deployment.home / HOLD).unlink(missing_ok=True)  # or its jobs would wait for ever
    for process in made.started:
        process.kill()
        process.communicate()


def everything_is_recorded(deployment: Deployment) -> bool:
    instance, keys = deployment.instance, [deployment.recipe.key(asset) for asset in ("shards_manifest", *CACHES)]
    return all(instance.get_materialized_partitions(key) == set(SHARDS) for key in keys)


def test_a_range_of_partitions_is_planned_made_checked_and_shown(deployment: Deployment) -> None:
    result = deployment.run("shards_manifest", *CACHES, partition_range=(SHARDS[0], SHARDS[-1]))
    assert result.success
    assert everything_is_recorded(deployment)
    counts = Counter(map(len, deployment.materializations(result.run_id).values()))
    assert counts == {1: len(SHARDS) * (1 + len(CACHES))}
    checks = deployment.checks(result.run_id)
    assert all(check.passed for check in checks)
    assert len(checks) == len(SHARDS) * len(CACHES) * 4
    recipe, instance = deployment.recipe, deployment.instance
    assert [type(asked) for asked in nightly_requests(instance, recipe)] == [dg.SkipReason]
    assert all(e.passed for e in asset_evaluations(instance, recipe, SHARDS, {}))
    with web_queries(deployment) as web:
        assert web.partitions("topk_cache") == (len(SHARDS), len(SHARDS), 0)
        assert web.checks("topk_cache")["complete"].partitions == {"succeeded": list(SHARDS)}
        assert web.partitions_tab("topk_cache")["materializedPartitions"] == list(SHARDS)


def test_what_is_stored_is_what_dagsters_own_storage_stores(instances: Instances) -> None:
    found = []
    for storage, record in (("dagster's", log_one_by_one), ("ours", record_events)):
        instance = instances(storage, storage=storage)
        run_that_records(instance, record)
        found.append(everything_stored(instance))
    assert found[0] == found[1]


@pytest.mark.usefixtures("handlers")
def test_the_states_of_checks_are_those_that_dagster_makes(instances: Instances) -> None:
    instance = instances("ours")
    make_history(instance, n=300)
    check_that_states_are_those_of_dagster(instance)


def test_an_interrupt_at_any_moment_of_storing_is_not_lost_and_leaves_no_half(instances: Instances) -> None:
    check_that_interrupts_are_neither_lost_nor_leave_a_half(instances("interrupted"))


def test_what_one_process_writes_another_sees_at_its_next_query(instances: Instances) -> None:
    one = instances("one")
    with dg.DagsterInstance.from_config(one.root_directory) as other:
        check_that_one_sees_what_the_other_writes(one, other)


@pytest.mark.parametrize("change", [{"username": "nobody"}, {"database": "nowhere"}])
def test_a_server_that_refuses_the_login_or_has_no_such_database_is_not_waited_for(
    server: PostgresqlServer, change: dict[str, str]
) -> None:
    engine = sa.create_engine(sa.make_url(with_driver(server.url)).set(**change))  # type: ignore[arg-type]
    slept: list[float] = []
    wait_for_the_server(engine, sleep=slept.append)
    with pytest.raises(DatabaseUnavailableError, match="does not exist"):
        engine.connect()
    assert slept == []


def test_a_batch_whose_commit_was_answered_to_nobody_is_stored_once(
    instances: Instances, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = dagster_internals._transaction
    lost: list[str] = []

    @contextmanager
    def goes_away(storage: SqlEventLogStorage, run_id: str) -> Iterator[list[sa.Connection]]:
        with begin(storage, run_id) as connections:
            yield connections
        lost.append(run_id)
        raise sa.exc.DBAPIError("COMMIT", {}, Exception("gone"), connection_invalidated=True)

    found = []
    for name in ("stays", "goes away"):
        if name == "goes away":
            monkeypatch.setattr(dagster_internals, "_transaction", goes_away)
        instance = instances(name)
        run_that_records(instance, record_events)
        found.append(everything_stored(instance))
    assert len(lost) == 3  # a batch was planned and two are recorded
    assert found[0] == found[1]


def test_a_terminated_run_ends_its_jobs_and_the_next_does_only_the_rest(
    deployment: Deployment, command_line: CommandLine
) -> None:
    (deployment.home / HOLD).touch()
    process = command_line.start("shards_manifest", *CACHES, partition=RANGE)
    _, submission = command_line.wait_for_task("teacher")
    group = group_of(submission)
    wait_until(lambda: n_recorded(deployment) == 1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=240)
    assert process.returncode != 0, text
    (run,) = deployment.instance.get_runs(dg.RunsFilter(job_name="__ASSET_JOB"), limit=1)
    assert run.is_finished
    wait_until(lambda: not any_process_of(group))  # one that is killed is there until it is waited for
    (deployment.home / HOLD).unlink()
    assert deployment.run("shards_manifest", *CACHES, partition_range=(SHARDS[0], SHARDS[-1])).success
    assert everything_is_recorded(deployment)
    assert n_commits(deployment) == dict.fromkeys(SHARDS, 1)


def test_a_server_that_is_killed_during_a_run_and_started_again_is_waited_for(
    deployment: Deployment, command_line: CommandLine, server: PostgresqlServer
) -> None:
    (deployment.home / HOLD).touch()
    process = command_line.start("shards_manifest", *CACHES, partition=RANGE)
    wait_until(lambda: n_recorded(deployment) == 1)
    server.kill()
    (deployment.home / HOLD).unlink()
    wait_until(lambda: len(n_commits(deployment)) == len(SHARDS))  # nobody can be told
    server.start()
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text[-5000:]
    assert everything_is_recorded(deployment)
    assert n_commits(deployment) == dict.fromkeys(SHARDS, 1)


def any_process_of(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def n_recorded(deployment: Deployment) -> int:
    return len(deployment.instance.get_materialized_partitions(deployment.recipe.key("topk_cache")))


def n_commits(deployment: Deployment) -> dict[str, int]:
    """Partition → how often its top-k cache was committed."""
    audit = deployment.platform.recipe_folder(deployment.recipe.name) / "audit.jsonl"
    commits = [json.loads(line) for line in audit.read_text().splitlines()]
    return dict(Counter(c["partition_key"] for c in commits if c["asset"] == "topk_cache"))


def wait_until(happened: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)
