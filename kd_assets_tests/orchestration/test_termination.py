"""What ends a run's jobs, and what only ends its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.errors import raise_execution_interrupts
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from kd_assets.dagster_internals import interrupt_signals, interrupts_held_back
from kd_assets.orchestration.termination import is_canceled, is_terminated

STARTED, CANCELING, CANCELED, FAILURE = (
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
    dg.DagsterRunStatus.CANCELED,
    dg.DagsterRunStatus.FAILURE,
)
INT, TERM = signal.SIGINT, signal.SIGTERM
ORIGIN = RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "repository"), "job")


@pytest.mark.parametrize(
    ("is_launched", "status", "interrupt", "expected"),
    [
        # Launched, by whichever launcher: the status says it, whatever signal a launcher sends.
        (True, CANCELING, INT, True),
        (True, CANCELING, TERM, True),
        (True, CANCELED, TERM, True),
        # A code server, a container or a machine that goes down; a run that monitoring has given up.
        (True, STARTED, TERM, False),
        (True, STARTED, INT, False),
        (True, FAILURE, INT, False),
        # In a process of its user's own: Ctrl-C, a notebook's stop button; a machine that shuts down.
        (False, STARTED, INT, True),
        (False, STARTED, None, True),
        (False, STARTED, TERM, False),
        (False, CANCELING, TERM, True),
    ],
)
def test_a_run_is_terminated_when_dagster_says_so_or_somebody_presses_ctrl_c(
    is_launched: bool, status: dg.DagsterRunStatus, interrupt: int | None, expected: bool
) -> None:
    run = dg.DagsterRun(job_name="job", status=status, remote_job_origin=ORIGIN if is_launched else None)
    assert is_terminated(run, interrupt) is expected


@pytest.mark.parametrize("interrupt", [INT, TERM, None])
def test_a_run_that_was_deleted_from_dagster_is_not_terminated(interrupt: int | None) -> None:
    assert not is_terminated(None, interrupt)


def test_a_run_that_is_cancelled_already_is_so_whatever_signal_has_come_and_a_failed_one_is_not() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        for status in (STARTED, CANCELING, CANCELED, FAILURE):
            run = dg.DagsterRun(job_name="job", status=status)
            instance.add_run(run)
            assert is_canceled(instance, run.run_id) is (status is CANCELED)
        assert not is_canceled(instance, "of no run")


def test_a_database_that_does_not_answer_cancels_nothing() -> None:
    class Away(dg.DagsterInstance):
        def __init__(self) -> None: ...

        def get_run_by_id(self, run_id: str) -> dg.DagsterRun | None:
            raise sa.exc.OperationalError("SELECT 1", None, Exception("the server is away"))

    assert not is_canceled(Away(), "run")


@pytest.mark.parametrize("sent", [INT, TERM])
def test_the_signal_behind_an_interrupt_of_dagsters_is_remembered(sent: signal.Signals) -> None:
    before = signal.getsignal(INT), signal.getsignal(TERM)
    try:
        with raise_execution_interrupts():
            during = signal.getsignal(INT), signal.getsignal(TERM)
            with interrupt_signals() as received:
                with pytest.raises(dg.DagsterExecutionInterruptedError):
                    os.kill(os.getpid(), sent)
            assert (signal.getsignal(INT), signal.getsignal(TERM)) == during
    finally:
        signal.signal(TERM, before[1])
    assert received.last == sent
    assert signal.getsignal(INT) == before[0]


@pytest.mark.parametrize("sent", [INT, TERM])
def test_the_signal_is_remembered_also_when_it_was_held_back(sent: signal.Signals) -> None:
    before, during = signal.getsignal(TERM), []

    def hold_back() -> None:
        with interrupts_held_back():
            os.kill(os.getpid(), sent)
            during.append(received.last)

    try:
        with raise_execution_interrupts(), interrupt_signals() as received:
            with pytest.raises(dg.DagsterExecutionInterruptedError):
                hold_back()
    finally:
        signal.signal(TERM, before)
    assert during == [None]
    assert received.last == sent


DEFINITIONS = """
import dagster as dg

@dg.asset
def nothing() -> None: ...

defs = dg.Definitions(assets=[nothing], jobs=[dg.define_asset_job("job")])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("command", "is_launched"), [("launch", True), ("execute", False)])
def test_dagster_gives_a_remote_origin_to_runs_that_are_launched_and_to_no_others(
    tmp_path: Path, command: str, is_launched: bool
) -> None:
    (tmp_path / "dagster.yaml").touch()
    (tmp_path / "definitions.py").write_text(DEFINITIONS)
    subprocess.run(
        [sys.executable, "-m", "dagster", "job", command, "-f", "definitions.py", "-j", "job"],
        cwd=tmp_path,
        env={**os.environ, "DAGSTER_HOME": str(tmp_path)},
        capture_output=True,
        timeout=300,
        check=True,
    )
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        (run,) = instance.get_runs()
    assert (run.remote_job_origin is not None) is is_launched
