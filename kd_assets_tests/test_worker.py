"""A task of a job: the order of its events, its exit status, and what one partition's failure does to the others.

The runner is the tests' own (loading a teacher is not the subject here); what it commits are real results.
"""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_assets import worker
from kd_assets.contract import JobFile, WorkUnit, event_file, read_events
from kd_assets.errors import BadRecordError, InterruptedTaskError, ResultBusyError, StoreError
from kd_assets.report import Reporter, StopFlag
from kd_assets.store import commit_file_result, plan_output
from kd_assets_tests.test_contract import a_job


class Harness:
    def __init__(self, folder: Path, keys: list[str]) -> None:
        self.recipe_folder = folder / "store" / "demo"
        self.events_folder = folder / "events"
        self.units = tuple(
            WorkUnit(
                partition_key=key,
                outputs=(
                    plan_output("student_smoke", {"input": key}, recipe_folder=self.recipe_folder, partition_key=key),
                ),
            )
            for key in keys
        )
        self.job: JobFile = a_job(
            units=self.units,
            tasks=(tuple(range(len(keys))),),
            recipe_folder=str(self.recipe_folder),
            events_folder=str(self.events_folder),
        )
        self.stop = StopFlag()
        self.n_loads = 0

    def commit(self, unit: WorkUnit) -> None:
        for output in unit.outputs:
            commit_file_result(
                output,
                recipe="demo",
                recipe_folder=self.recipe_folder,
                partition_key=unit.partition_key,
                files={"curve.json": unit.partition_key.encode()},
                checks={},
                provenance={},
                facts={},
            )

    def run(self, behave: Callable[[WorkUnit], None]) -> int:
        """One attempt of the task; `behave` is called for every unit before it is committed."""
        harness = self

        class FakeRunner:
            def run(self, unit: WorkUnit) -> dict[str, Any]:
                behave(unit)
                harness.commit(unit)
                return {}

            def close(self) -> None:
                pass

        def make(job: JobFile, report: Reporter, stop: StopFlag) -> worker.Runner:
            harness.n_loads += 1
            return FakeRunner()

        with Reporter(event_file(self.events_folder, 0), stream=io.StringIO()) as report:
            return worker.Task(self.job, self.units, report, self.stop, make_runner=make).run()

    def events(self, event_type: str) -> list[dict[str, Any]]:
        found = [e for _, e in read_events(event_file(self.events_folder, 0)) if not isinstance(e, str)]
        return [e.data for e in found if e.type == event_type]


def nothing(unit: WorkUnit) -> None:
    return


def test_a_task_loads_once_and_reports_every_result_it_commits(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0", "p1", "p2"])
    assert harness.run(nothing) == 0
    assert harness.n_loads == 1
    assert [(e["partition_key"], e["reused"]) for e in harness.events("committed")] == [
        ("p0", False),
        ("p1", False),
        ("p2", False),
    ]
    (finished,) = harness.events("task_finished")
    assert (finished["status"], finished["n_committed"], finished["n_loads"]) == ("done", 3, 1)


def test_what_is_committed_already_is_reported_and_nothing_is_loaded_for_it(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0", "p1"])
    harness.run(nothing)
    assert harness.run(lambda unit: pytest.fail("ran a committed partition")) == 0
    assert harness.n_loads == 1
    assert [e["reused"] for e in harness.events("committed")] == [False, False, True, True]


def test_one_failed_partition_leaves_the_others_their_turn(tmp_path: Path) -> None:
    def behave(unit: WorkUnit) -> None:
        if unit.partition_key == "p1":
            raise StoreError("no room for p1")

    harness = Harness(tmp_path, ["p0", "p1", "p2"])
    assert harness.run(behave) == 1
    assert [e["partition_key"] for e in harness.events("committed")] == ["p0", "p2"]
    (failed,) = harness.events("partition_failed")
    assert (failed["partition_key"], failed["error"], failed["message"]) == ("p1", "StoreError", "no room for p1")


def test_bad_input_alone_ends_with_status_2_and_any_other_failure_with_1(tmp_path: Path) -> None:
    def bad_input(unit: WorkUnit) -> None:
        raise BadRecordError("f.jsonl:3: no text")

    assert Harness(tmp_path / "a", ["p0"]).run(bad_input) == 2

    def mixed(unit: WorkUnit) -> None:
        raise BadRecordError("x") if unit.partition_key == "p0" else RuntimeError("y")

    assert Harness(tmp_path / "b", ["p0", "p1"]).run(mixed) == 1


def test_an_error_nobody_foresaw_is_reported_too_and_its_traceback_is_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(unit: WorkUnit) -> None:
        raise ZeroDivisionError

    harness = Harness(tmp_path, ["p0"])
    assert harness.run(behave) == 1
    assert harness.events("partition_failed")[0]["error"] == "ZeroDivisionError"
    assert "Traceback" in capsys.readouterr().err


def test_a_teacher_that_cannot_be_loaded_is_not_loaded_again_for_every_partition(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0", "p1", "p2"])
    loads = []

    def fail(job: JobFile, report: Reporter, stop: StopFlag) -> worker.Runner:
        loads.append(1)
        raise StoreError("weights unreadable")

    with Reporter(event_file(harness.events_folder, 0), stream=io.StringIO()) as report:
        assert worker.Task(harness.job, harness.units, report, StopFlag(), make_runner=fail).run() == 1
    assert len(loads) == 1
    assert len(harness.events("partition_failed")) == 3


def test_a_stop_request_ends_the_task_resumable_and_the_next_attempt_goes_on(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0", "p1", "p2"])

    def stop_in_p1(unit: WorkUnit) -> None:
        if unit.partition_key == "p1":
            harness.stop._signal_name = "SIGUSR1"
            raise InterruptedTaskError("flushed")

    assert harness.run(stop_in_p1) == 75
    assert harness.events("task_finished")[0]["status"] == "resumable"
    harness.stop = StopFlag()
    assert harness.run(nothing) == 0
    assert [(e["partition_key"], e["reused"]) for e in harness.events("committed")] == [
        ("p0", False),
        ("p0", True),
        ("p1", False),
        ("p2", False),
    ]


def test_a_partition_that_another_task_computes_is_left_to_it_and_taken_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "BUSY_POLL_S", 0.02)
    harness = Harness(tmp_path, ["p0", "p1"])
    ran: list[str] = []

    def behave(unit: WorkUnit) -> None:
        ran.append(unit.partition_key)
        if unit.partition_key == "p0":
            if len(ran) == 1:
                threading.Timer(0.3, harness.commit, [unit]).start()
            raise ResultBusyError("p0 is computed elsewhere")

    assert harness.run(behave) == 0
    assert ran[:2] == ["p0", "p1"], "the others come first"
    assert {e["partition_key"]: e["reused"] for e in harness.events("committed")} == {"p0": True, "p1": False}


def test_a_worker_process_refuses_a_job_file_that_is_none_with_status_and_reason(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    run = subprocess.run(
        [sys.executable, "-m", "kd_assets.worker", str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "contract version None" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_worker_process_without_an_argument_says_how_it_is_used() -> None:
    run = subprocess.run([sys.executable, "-m", "kd_assets.worker"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "usage: python -m kd_assets.worker JOB.json" in run.stderr
