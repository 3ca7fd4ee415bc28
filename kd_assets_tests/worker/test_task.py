"""A task of a job: the order of its events, its exit status, and what one partition's failure does to the others.

The runner is the tests' own (loading a teacher is not the subject here); what it commits are real results.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kd_assets.contract import JobFile, Reporter, WorkUnit, event_file, read_events
from kd_assets.errors import (
    BadRecordError,
    InterruptedTaskError,
    StorageUnavailableError,
    StorageUnreachableError,
    StoreError,
)
from kd_assets.store import commit_file_result, computing_versions, plan_output
from kd_assets.worker import task as task_module
from kd_assets.worker.attempt import Attempt, starts_of
from kd_assets.worker.main import share_node
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import Runner, Task
from kd_assets.worker.usage import n_cpus
from kd_assets_tests.contract.test_contract import a_job
from kd_assets_tests.patience import PATIENCE_S


class Harness:
    def __init__(self, folder: Path, keys: list[str]) -> None:
        self.recipe_folder = folder / "store" / "demo"
        self.recipe_folder.mkdir(parents=True)
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
        self.attempt = Attempt.of({})
        self.n_loads = 0
        self.stop_at = ""
        self.waits: list[float] = []
        self.on_wait: Callable[[int], None] = lambda n_waits: None
        """Called in place of each wait, with how many there have been."""
        self.load_failures: list[Exception] = []

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.on_wait(len(self.waits))

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

        def make(job: JobFile, report: Reporter, stop: StopFlag) -> Runner:
            harness.n_loads += 1
            if harness.load_failures:
                raise harness.load_failures.pop()
            return FakeRunner()

        events = event_file(self.events_folder, 0)
        with Reporter(events, stream=io.StringIO()) as report:
            return Task(
                self.job,
                self.units,
                report,
                self.stop,
                make_runner=make,
                attempt=self.attempt,
                earlier_starts=starts_of(events),
                sleep=self.wait,
            ).run()

    def events(self, event_type: str) -> list[dict[str, Any]]:
        found = [e for _, e in read_events(event_file(self.events_folder, 0)) if not isinstance(e, str)]
        return [e.data for e in found if e.type == event_type]


def nothing(unit: WorkUnit) -> None:
    return


HOLDER = """
import sys
from pathlib import Path
from kd_assets.contract import read_job
from kd_assets.store import ResultWriter
job = read_job(Path(sys.argv[1]))
(unit,) = (u for u in job.units if u.partition_key == sys.argv[2])
names = {"recipe": "demo", "recipe_folder": Path(job.recipe_folder), "partition_key": unit.partition_key}
with ResultWriter(unit.outputs[0], **names) as result:
    print("holds", flush=True)
    sys.stdin.readline()
    result.write_file(0, "curve.json", b"{}")
    result.commit(parts=1, checks={}, provenance={})
"""


def start_holding(harness: Harness, key: str) -> subprocess.Popen[str]:
    """A process that has begun to make the partition, and goes on when it is told to `finish`."""
    job_file = harness.recipe_folder.parent / "job.json"
    job_file.write_text(harness.job.to_json())
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(job_file), key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=PATIENCE_S)
    assert process.returncode == 0


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

    def fail(job: JobFile, report: Reporter, stop: StopFlag) -> Runner:
        loads.append(1)
        raise StoreError("weights unreadable")

    with Reporter(event_file(harness.events_folder, 0), stream=io.StringIO()) as report:
        assert Task(harness.job, harness.units, report, StopFlag(), make_runner=fail).run() == 1
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


def test_a_partition_that_another_task_computes_is_left_to_it_and_taken_when_it_is_there(tmp_path: Path) -> None:
    """The other process is real, and so is its lease."""
    harness = Harness(tmp_path, ["p0", "p1"])
    other = start_holding(harness, "p0")
    ran: list[str] = []

    def at_last(n_waits: int) -> None:
        if n_waits == 6:
            finish(other)

    harness.on_wait = at_last
    assert harness.run(lambda unit: ran.append(unit.partition_key)) == 0
    assert ran == ["p1"]
    assert {e["partition_key"]: e["reused"] for e in harness.events("committed")} == {"p0": True, "p1": False}
    assert harness.waits == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0], "longer each time, to a limit"
    (warning,) = harness.events("warning")
    assert warning["message"].startswith("p0 is waited for: ")
    assert 'is being computed by another live task ({"host": ' in warning["message"]
    assert f'"pid": {other.pid}' in warning["message"]


def test_nothing_is_loaded_or_read_for_partitions_that_are_all_computed_elsewhere(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0", "p1"])
    others = [start_holding(harness, key) for key in ("p0", "p1")]

    def at_last(n_waits: int) -> None:
        if n_waits == 3:
            for other in others:
                finish(other)

    harness.on_wait = at_last
    assert harness.run(lambda unit: pytest.fail("ran what another task computes")) == 0
    assert harness.n_loads == 0
    assert [e["reused"] for e in harness.events("committed")] == [True, True]


def test_a_node_with_another_version_of_what_computes_makes_nothing_under_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = plan_output(
        "shards_manifest",
        {"tokenising_version": 2, "input": "records"},
        recipe_folder=tmp_path / "store" / "demo",
        partition_key="p1",
    )
    harness = Harness(tmp_path, ["p0"])
    harness.units += (WorkUnit(partition_key="p1", outputs=(shard,)),)
    assert harness.run(nothing) == 1
    assert [e["partition_key"] for e in harness.events("committed")] == ["p0"]
    (failed,) = harness.events("partition_failed")
    assert (failed["partition_key"], failed["error"]) == ("p1", "ContractError")
    assert "{'tokenising_version': 2}, this node computes with versions of 1: install the same" in failed["message"]
    monkeypatch.setattr(computing_versions, "TOKENISING_VERSION", 2)
    assert harness.run(nothing) == 0


# ---------------------------------------------------------------------- storage that does not answer


def test_storage_that_does_not_answer_for_a_while_costs_no_partition(tmp_path: Path) -> None:
    failures = [StorageUnreachableError("cannot read the shard: Stale file handle")] * 5

    def behave(unit: WorkUnit) -> None:
        if unit.partition_key == "p0" and failures:
            raise failures.pop()

    harness = Harness(tmp_path, ["p0", "p1"])
    assert harness.run(behave) == 0
    assert [e["partition_key"] for e in harness.events("committed")] == ["p1", "p0"], "the others have their turn"
    assert harness.waits == [1.0, 2.0, 4.0, 8.0]
    assert harness.n_loads == 1
    assert [e["message"] for e in harness.events("warning")] == [
        "p0 is tried again later: cannot read the shard: Stale file handle"
    ], "said once"


def test_storage_that_never_answers_fails_the_partition_by_its_own_class(tmp_path: Path) -> None:
    tried: list[str] = []

    def behave(unit: WorkUnit) -> None:
        tried.append(unit.partition_key)
        raise StorageUnreachableError("cannot read the shard: Stale file handle")

    harness = Harness(tmp_path, ["p0"])
    assert harness.run(behave) == 1
    assert len(tried) == task_module.STORAGE_TRIES
    (failed,) = harness.events("partition_failed")
    assert (failed["error"], failed["during"]) == ("StorageUnreachableError", "run")
    assert sum(harness.waits) == 85


def test_storage_that_is_full_is_not_waited_for(tmp_path: Path) -> None:
    def behave(unit: WorkUnit) -> None:
        raise StorageUnavailableError("cannot write: No space left on device")

    harness = Harness(tmp_path, ["p0"])
    assert harness.run(behave) == 1
    assert harness.waits == []


def test_a_store_that_is_not_mounted_is_waited_for_and_nothing_is_loaded(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0"])
    away = harness.recipe_folder.with_name("away")
    harness.recipe_folder.rename(away)

    def mounted_again(n_waits: int) -> None:
        assert harness.n_loads == 0
        if n_waits == 2:
            away.rename(harness.recipe_folder)

    harness.on_wait = mounted_again
    assert harness.run(nothing) == 0
    assert harness.n_loads == 1
    (warning,) = harness.events("warning")
    assert "check that the store is mounted" in warning["message"]


def test_loading_that_fails_on_storage_that_comes_back_is_done_again(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0", "p1"])
    harness.load_failures = [StorageUnreachableError("cannot read the digests: Stale file handle")] * 3
    assert harness.run(nothing) == 0
    assert harness.n_loads == 4
    assert len(harness.events("committed")) == 2


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


def test_a_worker_process_that_cannot_see_the_jobs_folder_is_to_be_started_again(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "kd_assets.worker", str(tmp_path / "not mounted" / "job.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 75
    assert "check that the store is mounted on this machine" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_worker_process_without_an_argument_says_how_it_is_used() -> None:
    run = subprocess.run([sys.executable, "-m", "kd_assets.worker"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "usage: python -m kd_assets.worker JOB.json [--task-offset N]" in run.stderr


# ---------------------------------------------------------------------- what a task tells of itself


def test_a_task_says_where_it_runs_and_how_much_of_it_is_on_disk(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0", "p1"])
    environment = {
        "SLURM_JOB_ID": "15",
        "SLURM_ARRAY_JOB_ID": "14",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_JOB_NODELIST": "n7",
        "SLURM_JOB_PARTITION": "h100",
    }
    harness.attempt = Attempt.of(environment)
    harness.run(nothing)
    harness.run(nothing)
    first, second = harness.events("task_started")
    assert first["host"]
    assert first["pid"] == os.getpid()
    assert {name: first[name] for name in first if name.startswith("slurm_")} == {
        "slurm_job_id": "15",
        "slurm_array_job_id": "14",
        "slurm_array_task_id": "1",
        "slurm_restart_count": 2,
        "slurm_nodelist": "n7",
        "slurm_partition": "h100",
        "slurm_cluster": None,
    }
    assert (first["n_parts_on_disk"], second["n_parts_on_disk"]) == (0, 4), "a file and a manifest of each result"


def test_what_a_task_used_stands_beside_each_result_and_at_its_end(tmp_path: Path) -> None:
    def work(unit: WorkUnit) -> None:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass

    harness = Harness(tmp_path, ["p0", "p1"])
    harness.run(work)
    first, second = (e["usage"] for e in harness.events("committed"))
    (finished,) = harness.events("task_finished")
    last = finished["usage"]
    assert 0.19 <= first["cpu_s"] <= second["cpu_s"] - 0.19 <= last["cpu_s"] - 0.19, "of the attempt so far"
    assert finished["wall_s"] == last["wall_s"] >= second["wall_s"]
    assert 1 <= last["n_cpus"] <= len(os.sched_getaffinity(0))
    assert last["cpu_efficiency"] == pytest.approx(last["cpu_s"] / (last["wall_s"] * last["n_cpus"]), abs=0.01)
    assert 0.01 < last["max_rss_gib"] < 1000
    assert not any("gpu" in name or name == "joules" for name in last), "no NVML, no word of it"


def test_where_slurm_gives_fewer_processors_than_the_node_has_those_count() -> None:
    assert n_cpus({"SLURM_CPUS_ON_NODE": "1"}) == 1
    assert n_cpus({}) == n_cpus({"SLURM_CPUS_ON_NODE": "100000"}) == len(os.sched_getaffinity(0))
    assert n_cpus({}, n_processes=100000) == 1


def test_a_failed_partition_says_whether_loading_failed_or_its_own_work(tmp_path: Path) -> None:
    def fail(unit: WorkUnit) -> None:
        raise StoreError("no room")

    harness = Harness(tmp_path / "run", ["p0"])
    harness.run(fail)
    assert harness.events("partition_failed")[0]["during"] == "run"

    def no_load(job: JobFile, report: Reporter, stop: StopFlag) -> Runner:
        raise StoreError("weights unreadable")

    harness = Harness(tmp_path / "load", ["p0"])
    with Reporter(event_file(harness.events_folder, 0), stream=io.StringIO()) as report:
        Task(harness.job, harness.units, report, StopFlag(), make_runner=no_load).run()
    assert harness.events("partition_failed")[0]["during"] == "load"


def test_memory_that_runs_out_in_any_kind_of_work_has_its_class_and_remedy(tmp_path: Path) -> None:
    def behave(unit: WorkUnit) -> None:
        if unit.partition_key == "p0":
            raise MemoryError("Unable to allocate 9.9 PiB")

    harness = Harness(tmp_path, ["p0", "p1"])
    assert harness.run(behave) == 1
    (failed,) = harness.events("partition_failed")
    assert failed["error"] == "OutOfHostMemoryError"
    assert failed["message"] == (
        "the node's memory did not suffice (Unable to allocate 9.9 PiB): ask for more memory for the task"
    )
    assert [e["partition_key"] for e in harness.events("committed")] == ["p1"]


def test_a_failed_partition_leaves_none_of_its_arrays_behind(tmp_path: Path) -> None:
    """An exception keeps the frames it went through; one that is kept keeps what filled the memory."""

    class Arrays:
        pass

    kept: list[weakref.ref[Arrays]] = []

    def behave(unit: WorkUnit) -> None:
        arrays = Arrays()
        kept.append(weakref.ref(arrays))
        if unit.partition_key == "p0":
            raise StoreError("no room")
        gc.collect()
        assert kept[0]() is None

    assert Harness(tmp_path, ["p0", "p1"]).run(behave) == 1
    assert len(kept) == 2


# ---------------------------------------------------------------------- a loop of starts


def interrupted(harness: Harness) -> Callable[[WorkUnit], None]:
    def behave(unit: WorkUnit) -> None:
        raise InterruptedTaskError("stopped before it had anything")

    return behave


def test_a_loop_of_requeues_without_progress_ends_by_itself(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0", "p1"])
    statuses = [harness.run(interrupted(harness)) for _ in range(6)]
    assert statuses == [75, 75, 75, 75, 75, 1]
    assert [e["error"] for e in harness.events("partition_failed")] == ["NoProgressError", "NoProgressError"]
    assert "started 5 times" in harness.events("partition_failed")[0]["message"]
    assert harness.n_loads == 5, "nothing was loaded for the last"
    assert harness.events("task_finished")[-1]["status"] == "failed"


def test_what_is_committed_is_reported_even_by_the_start_that_ends_a_loop(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0", "p1"])

    def only_p0(unit: WorkUnit) -> None:
        if unit.partition_key == "p1":
            raise InterruptedTaskError("stopped")

    statuses = [harness.run(only_p0) for _ in range(7)]
    assert statuses == [75, 75, 75, 75, 75, 75, 1], "the first one made progress"
    assert harness.events("committed")[-1]["partition_key"] == "p0"
    assert [e["partition_key"] for e in harness.events("partition_failed")] == ["p1"]


def test_starts_that_make_progress_are_not_counted(tmp_path: Path) -> None:
    harness = Harness(tmp_path, [f"p{i}" for i in range(12)])

    def one_more(unit: WorkUnit) -> None:
        if len(harness.events("committed")) and unit.partition_key == harness.stop_at:
            raise InterruptedTaskError("stopped")

    for index in range(1, 12):
        harness.stop_at = f"p{index}"
        assert harness.run(one_more) == 75
    harness.stop_at = ""
    assert harness.run(one_more) == 0


def test_a_task_that_is_complete_is_done_however_often_it_was_started(tmp_path: Path) -> None:
    harness = Harness(tmp_path, ["p0"])
    assert [harness.run(nothing) for _ in range(8)] == [0] * 8


# ---------------------------------------------------------------------- worker processes: copies, offsets, ranks

PROGRAM = """
import sys, time
from pathlib import Path
from kd_assets.errors import InterruptedTaskError
from kd_assets.worker.main import main
from kd_assets.worker.attempt import Attempt, starts_of
from kd_assets.store import commit_file_result

class Runner:
    "Stands for a teacher: commits one small real result for each output."
    def __init__(self, job, report, stop):
        self.job, self.stop = job, stop
        report.emit("teacher_loaded", load_s=0.0)
    def run(self, unit):
        while Path("hold").exists() and not self.stop:
            time.sleep(0.01)
        if self.stop:
            raise InterruptedTaskError("flushed")
        for output in unit.outputs:
            commit_file_result(
                output, recipe="demo", recipe_folder=Path(self.job.recipe_folder), partition_key=unit.partition_key,
                files={"curve.json": unit.partition_key.encode()}, checks={}, provenance={},
            )
        return {}
    def close(self):
        pass

sys.exit(main(sys.argv, make_runner=Runner))
"""


class Processes:
    """Worker processes of one job of 6 partitions, in 2 tasks; their runner is the program above."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, list[subprocess.Popen[str]]()
        self.harness = Harness(folder, [f"p{i}" for i in range(6)])
        job = dataclasses.replace(self.harness.job, tasks=((0, 1, 2, 3), (4, 5)))
        (folder / "job.json").write_text(job.to_json())

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.folder / "job.json"), *arguments],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "0", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.running.append(process)
        return process

    def hold(self) -> Path:
        """While this file is there runners do not get on."""
        path = self.folder / "hold"
        path.touch()
        return path

    def events(self, event_type: str, task: int = 0, process_index: int = 0) -> list[dict[str, Any]]:
        path = event_file(self.harness.events_folder, task, process_index)
        found = [e for _, e in read_events(path) if not isinstance(e, str)]
        return [e.data for e in found if e.type == event_type]

    def wait_for(self, event_type: str, n: int = 1, **where: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(self.events(event_type, **where)) < n:
            assert time.monotonic() < deadline, f"no {event_type}"
            time.sleep(0.02)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    for process in made.running:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def committed_keys(events: list[dict[str, Any]]) -> list[str]:
    return [e["partition_key"] for e in events if not e["reused"]]


def test_the_offset_chooses_the_task_of_a_later_array(processes: Processes) -> None:
    assert processes.start("--task-offset", "1").wait(PATIENCE_S) == 0
    assert committed_keys(processes.events("committed", task=1)) == ["p4", "p5"]
    assert processes.events("task_started", task=0) == []
    too_far = processes.start("--task-offset", "2")
    assert too_far.wait(PATIENCE_S) == 2
    assert "was started as task 2" in too_far.communicate()[0]


def test_a_duplicate_submission_exits_by_itself_and_names_who_is_at_the_task(processes: Processes) -> None:
    hold = processes.hold()
    first = processes.start(SLURM_JOB_ID="15")
    processes.wait_for("teacher_loaded")
    assert processes.start(SLURM_JOB_ID="99").wait(PATIENCE_S) == 0
    (finished,) = processes.events("task_finished")
    assert finished["status"] == "duplicate"
    assert finished["slurm_job_id"] == "99"
    assert (finished["holder"]["slurm_job_id"], finished["holder"]["pid"]) == ("15", first.pid)
    assert "SLURM job 15 is at this task" in processes.events("warning")[0]["message"]
    assert len(processes.events("task_started")) == 1, "a copy that leaves has not started"
    hold.unlink()
    assert first.wait(PATIENCE_S) == 0
    assert committed_keys(processes.events("committed")) == ["p0", "p1", "p2", "p3"]


def test_a_later_attempt_waits_for_the_one_that_lives_on_and_finds_its_work_done(processes: Processes) -> None:
    hold = processes.hold()
    first = processes.start(SLURM_JOB_ID="15")
    processes.wait_for("teacher_loaded")
    second = processes.start(SLURM_JOB_ID="15", SLURM_RESTART_COUNT="1")
    processes.wait_for("warning")
    hold.unlink()
    assert (first.wait(PATIENCE_S), second.wait(PATIENCE_S)) == (0, 0)
    assert [e["status"] for e in processes.events("task_finished")] == ["done", "done"]
    assert len(processes.events("teacher_loaded")) == 1
    assert committed_keys(processes.events("committed")) == ["p0", "p1", "p2", "p3"]


def test_a_later_attempt_takes_over_from_one_that_is_killed(processes: Processes) -> None:
    hold = processes.hold()
    first = processes.start(SLURM_JOB_ID="15")
    processes.wait_for("teacher_loaded")
    second = processes.start(SLURM_JOB_ID="15", SLURM_RESTART_COUNT="1")
    processes.wait_for("warning")
    first.kill()
    processes.wait_for("teacher_loaded", 2)
    hold.unlink()
    assert second.wait(PATIENCE_S) == 0
    assert [e["n_parts_on_disk"] for e in processes.events("task_started")] == [0, 0]


def test_a_waiting_attempt_that_is_stopped_ends_resumable(processes: Processes) -> None:
    processes.hold()
    processes.start(SLURM_JOB_ID="15")
    processes.wait_for("teacher_loaded")
    second = processes.start(SLURM_JOB_ID="15", SLURM_RESTART_COUNT="1")
    processes.wait_for("warning")
    second.send_signal(signal.SIGUSR1)
    assert second.wait(PATIENCE_S) == 75
    (finished,) = processes.events("task_finished")
    assert (finished["status"], finished["signal"]) == ("resumable", "SIGUSR1")


def test_processes_of_one_task_divide_its_partitions_each_with_events_of_its_own(processes: Processes) -> None:
    started = [processes.start(KD_PROCESS_INDEX=str(r), KD_N_PROCESSES="3", SLURM_JOB_ID="15") for r in range(3)]
    assert [process.wait(PATIENCE_S) for process in started] == [0, 0, 0]
    assert [committed_keys(processes.events("committed", process_index=r)) for r in range(3)] == [
        ["p0", "p3"],
        ["p1"],
        ["p2"],
    ]
    names = sorted(path.name for path in processes.harness.events_folder.iterdir())
    assert names == ["task-00000.jsonl", "task-00000.process-1.jsonl", "task-00000.process-2.jsonl"]
    assert [processes.events("task_started", process_index=r)[0]["process_index"] for r in range(3)] == [0, 1, 2]


def test_each_of_several_processes_sees_its_own_gpu_and_share_of_processors() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    share_node(Attempt.of({"KD_PROCESS_INDEX": "2", "KD_N_PROCESSES": "4"}), environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "6"
    assert int(environment["OMP_NUM_THREADS"]) >= 1
    environment = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    share_node(Attempt.of({"KD_PROCESS_INDEX": "1", "KD_N_PROCESSES": "2"}), environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "6,7", "of a teacher over two GPUs"
    untouched = {"CUDA_VISIBLE_DEVICES": "4,5"}
    share_node(Attempt.of({}), untouched)
    assert untouched == {"CUDA_VISIBLE_DEVICES": "4,5"}


def test_no_secret_of_the_environment_is_in_what_a_task_writes(processes: Processes) -> None:
    done = processes.start(HF_TOKEN="hf_VerySecretValue", SLURM_JOB_ID="15")
    assert done.wait(PATIENCE_S) == 0
    assert "hf_VerySecretValue" not in done.communicate()[0]
    files = [path for path in processes.folder.rglob("*") if path.is_file()]
    assert any("lease" in path.name for path in files)
    assert not [path for path in files if b"hf_VerySecretValue" in path.read_bytes()]
