"""Starts of a task: which copy may work, and when it has been tried often enough.

Other copies are real processes that hold real locks.
"""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kd_assets.contract import Reporter, event_file, lease_file, read_events
from kd_assets.errors import ContractError, InterruptedTaskError, ResultBusyError, StorageUnavailableError
from kd_assets.locks import Lease, local_locks
from kd_assets.store import count_durable_files
from kd_assets.worker import attempt as attempts
from kd_assets.worker.attempt import Attempt, DuplicateTaskError, gpus_of_process, hold_task, no_progress, starts_of
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.store.failing import FailingStorage

HOLD = """
    import sys, time
    from pathlib import Path
    from kd_assets.durable import prepare_folder
    from kd_assets.locks import Lease
    path = Path(sys.argv[1])
    prepare_folder(path.parent)
    Lease(path).acquire({"slurm_job_id": sys.argv[2], "host": "n0", "pid": 77, "slurm_restart_count": 0})
    print("held", flush=True)
    time.sleep(300)
"""


def an_attempt(**environment: str) -> Attempt:
    return Attempt.of({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "14", **environment})


@pytest.fixture
def hold() -> Iterator[Callable[[Path, str], subprocess.Popen[str]]]:
    """Start a process of another SLURM job that holds a lease; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path, slurm_job_id: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HOLD), str(path), slurm_job_id], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


class CountingStopFlag(StopFlag):
    """Counts how often somebody sleeps until the next look, and does something meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.n_sleeps = 0
        self.then: dict[int, Callable[[], object]] = {}

    def sleep(self, seconds: float) -> None:
        self.n_sleeps += 1
        self.then.get(self.n_sleeps, lambda: None)()
        super().sleep(seconds)


class Desk:
    def __init__(self, folder: Path) -> None:
        self.events, self.lease = event_file(folder / "events", 3), lease_file(folder / "events", 3)
        self.stop = CountingStopFlag()

    def after_looks(self, n: int, happens: Callable[[], object]) -> None:
        """When the lease has been looked at so often in vain."""
        self.stop.then[n] = happens

    def hold_task(self, attempt: Attempt) -> Lease | None:
        with Reporter(self.events, stream=io.StringIO()) as report:
            return hold_task(self.lease, attempt, report=report, stop=self.stop)

    def warnings(self) -> list[str]:
        return [e.data["message"] for _, e in read_events(self.events) if not isinstance(e, str)]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(attempts, "LEASE_POLL_S", 0.05)
    return Desk(tmp_path)


# ---------------------------------------------------------------------- the lease of a task


def test_a_task_that_nobody_is_at_is_taken_and_says_who_has_it(desk: Desk) -> None:
    lease = desk.hold_task(an_attempt(SLURM_RESTART_COUNT="2", SLURM_JOB_NODELIST="n7"))
    assert lease is not None
    said = json.loads(desk.lease.read_text())
    assert (said["slurm_job_id"], said["slurm_restart_count"], said["slurm_nodelist"]) == ("15", 2, "n7")
    assert said["pid"] == os.getpid()
    assert desk.lease.parent.name == "leases"
    assert desk.warnings() == []
    lease.release()


def test_a_second_submission_learns_who_is_at_the_task(
    desk: Desk, hold: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    hold(desk.lease, "99")
    with pytest.raises(DuplicateTaskError, match=r"SLURM job 99 is at this task on n0 \(process 77") as e:
        desk.hold_task(an_attempt())
    assert e.value.holder["slurm_job_id"] == "99"


def test_outside_slurm_a_second_copy_is_a_duplicate_too(
    desk: Desk, hold: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    hold(desk.lease, "99")
    with pytest.raises(DuplicateTaskError):
        desk.hold_task(Attempt.of({}))


def test_an_earlier_attempt_of_the_same_job_is_waited_for_and_taken_over_from(
    desk: Desk, hold: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    old = hold(desk.lease, "15")
    desk.after_looks(5, old.kill)
    lease = desk.hold_task(an_attempt(SLURM_RESTART_COUNT="1"))
    assert lease is not None
    assert desk.stop.n_sleeps >= 5, "it waited"
    assert len(desk.warnings()) == 1, "one line, however often it looked"
    assert desk.warnings()[0].startswith("waits for an earlier attempt that still runs on n0 (process 77")
    assert json.loads(desk.lease.read_text())["slurm_restart_count"] == 1
    lease.release()


def test_waiting_for_an_earlier_attempt_ends_with_a_request_to_stop(
    desk: Desk, hold: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    hold(desk.lease, "15")
    desk.after_looks(3, lambda: setattr(desk.stop, "_signal_name", "SIGUSR1"))
    with pytest.raises(InterruptedTaskError, match="SIGUSR1 while it waited for an earlier attempt"):
        desk.hold_task(an_attempt(SLURM_RESTART_COUNT="1"))


def test_a_holder_that_has_not_said_who_it_is_is_waited_for(
    desk: Desk, hold: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    """The moment between its lock and its words; or words that have not come over the network yet."""
    hold(desk.lease, "99")
    said = desk.lease.read_text()
    desk.lease.write_text("")
    desk.after_looks(4, lambda: desk.lease.write_text(said))
    with pytest.raises(DuplicateTaskError):
        desk.hold_task(an_attempt())
    assert desk.stop.n_sleeps >= 4, "it waited"


def test_a_disk_without_locks_is_told_of_with_its_remedy_and_the_work_goes_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results' own leases are still asked for, and refuse to work there."""

    def no_locks(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert desk.hold_task(an_attempt()) is None
    (warning,) = desk.warnings()
    assert warning.startswith("whether another copy of this task runs cannot be told")
    assert "mount it with them (Lustre: -o flock" in warning
    with pytest.raises(StorageUnavailableError, match="the file system has no locks"):
        Lease(desk.lease).acquire({})


def test_a_lease_whose_holder_cannot_be_read_is_told_of_and_the_work_goes_on(
    desk: Desk, hold: Callable[[Path, str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(desk.lease, "99")
    FailingStorage(monkeypatch, desk.lease).fail(errno.EIO, first=1)  # it can be opened to be locked, and not after
    assert desk.hold_task(an_attempt()) is None
    (warning,) = desk.warnings()
    assert warning.startswith(f"whether another copy of this task runs cannot be told: cannot read {desk.lease}: ")


def test_asking_for_a_lease_names_its_holder_and_takes_and_makes_nothing(
    tmp_path: Path, hold: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    Lease(tmp_path / "a").raise_if_busy()
    assert list(tmp_path.iterdir()) == []
    process = hold(tmp_path / "b", "99")
    with pytest.raises(ResultBusyError, match='"slurm_job_id": "99"'):
        Lease(tmp_path / "b").raise_if_busy()
    process.kill()
    process.wait()
    Lease(tmp_path / "b").raise_if_busy()


def test_asking_for_a_lease_of_its_own_does_not_drop_it(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "a")
    lease.acquire({"pid": "of the test"})
    Lease(tmp_path / "a").raise_if_busy()
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "a"), "99"]
    other = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "ResultBusyError" in other.stderr
    assert "of the test" in other.stderr
    lease.release()


# ---------------------------------------------------------------------- mounts whose locks stay on one node

MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
server:/a /shared/a nfs4 rw,vers=4.2,local_lock=none 0 0
server:/b /shared/b nfs rw,vers=3,nolock,local_lock=all 0 0
mgs@tcp:/l /lustre\\040one lustre rw,localflock,lazystatfs 0 0
mgs@tcp:/m /lustre lustre rw,flock 0 0
server:/c /shared/b/inner nfs4 rw,local_lock=none 0 0
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/x", None),
        ("/shared/a/store", None),
        ("/shared/b/store", "/shared/b is mounted with local_lock=all (nfs)"),
        ("/shared/b/inner/store", None),
        ("/shared/bb/store", None),
        ("/lustre one/store", "/lustre one is mounted with localflock (lustre)"),
        ("/lustre/store", None),
    ],
)
def test_a_mount_whose_locks_other_nodes_do_not_see_is_recognised(path: str, expected: str | None) -> None:
    assert local_locks(Path(path), MOUNTS) == expected


def test_the_mounts_of_this_machine_can_be_read(tmp_path: Path) -> None:
    assert local_locks(tmp_path) is None


# ---------------------------------------------------------------------- progress


def started(path: Path, n_parts: list[int]) -> None:
    with Reporter(path, stream=io.StringIO()) as report:
        for n in n_parts:
            report.emit("task_started", n_parts_on_disk=n, host="n0")
            report.emit("progress", message='not a "task_started"')


@pytest.mark.parametrize(
    ("n_parts", "now", "is_stuck"),
    [
        ([], 0, False),
        ([0] * 4, 0, False),
        ([0] * 5, 0, True),
        ([0] * 5, 1, False),
        ([7, 7, 7, 7, 8], 8, False),
        ([7, 8, 8, 8, 8, 8], 8, True),
        ([8, 8, 8, 8, 7], 8, False),
    ],
)
def test_five_starts_in_a_row_that_added_nothing_are_the_last(
    tmp_path: Path, n_parts: list[int], now: int, is_stuck: bool
) -> None:
    started(tmp_path / "task.jsonl", n_parts)
    assert (no_progress(starts_of(tmp_path / "task.jsonl"), now) is not None) == is_stuck


def test_the_error_says_how_often_it_was_started_and_where(tmp_path: Path) -> None:
    started(tmp_path / "task.jsonl", [1, *[3] * 7])
    error = no_progress(starts_of(tmp_path / "task.jsonl"), 3)
    assert "started 7 times (last on n0) and no start added a file to its results, which have 3" in str(error)


def test_a_part_that_fits_into_no_time_limit_is_said_with_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    with Reporter(path, stream=io.StringIO()) as report:
        for ran_s in (61, 60, 60, 62, 61):
            report.emit("task_started", n_parts_on_disk=0, host="n0")
            report.emit("teacher_loaded", load_s=40.2)
            report.emit("task_finished", status="resumable", signal="SIGUSR1", wall_s=ran_s)
    said = str(no_progress(starts_of(path), 0, {"KD_TIME_LIMIT_S": "360", "KD_SIGNAL_S": "300"}))
    assert (
        "Each was told by the time limit to stop, the longest after 62 s, of which loading took 40 s, so a part takes "
        "more than the other 22 s. The time limit is 360 s, and a task is told 300 s before. Give the job more `time`"
    ) in said


def test_starts_that_something_killed_are_not_blamed_on_the_time_limit(tmp_path: Path) -> None:
    started(tmp_path / "task.jsonl", [0] * 5)
    said = str(no_progress(starts_of(tmp_path / "task.jsonl"), 0, {"KD_TIME_LIMIT_S": "360", "KD_SIGNAL_S": "300"}))
    assert "look for what kills it" in said
    assert "time limit" not in said


def test_starts_are_read_past_half_lines_and_what_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    started(path, [1])
    with path.open("ab") as file:
        file.write(b'{"v": 1, "type": "task_started", "da\n\xff\xfe "task_started"\n')
    started(path, [2])
    assert [s.n_parts_on_disk for s in starts_of(path)] == [1, 2]
    assert starts_of(tmp_path / "none.jsonl") == []


def test_counting_what_is_on_disk_sees_parts_and_manifests_and_nothing_in_flight(tmp_path: Path) -> None:
    for name in ("part-00000.parquet", "manifest.json", "journal.jsonl", ".lease", ".part-00001.parquet.x.tmp"):
        (tmp_path / name).touch()
    assert count_durable_files([tmp_path, tmp_path / "not there", tmp_path / "manifest.json" / "x"]) == 2


def test_counting_asks_each_folder_once_and_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / str(i) for i in range(30)]
    for folder in folders:
        folder.mkdir()
        for name in ("part-00000.parquet", "part-00001.parquet", "journal.jsonl"):
            (folder / name).touch()
    storage = FailingStorage(monkeypatch, tmp_path)
    assert count_durable_files(folders) == 60
    assert storage.n_calls == 30


# ---------------------------------------------------------------------- several processes


@pytest.mark.parametrize(
    ("visible", "n_gpus", "expected"),
    [
        ("4,5,6,7", 8, ["4", "5", "6", "7"]),
        ("GPU-aa,GPU-bb", 8, ["GPU-aa", "GPU-bb", "GPU-aa", "GPU-bb"]),
        ("0,1,2,3,4,5,6,7", 8, ["0,1", "2,3", "4,5", "6,7"]),
        (None, 4, ["0", "1", "2", "3"]),
        (None, 9, ["0,1", "2,3", "4,5", "6,7"]),
        (None, 2, ["0", "1", "0", "1"]),
        (None, 0, [None] * 4),
        ("", 4, [""] * 4),
    ],
)
def test_each_process_gets_an_equal_share_of_the_gpus(visible: str | None, n_gpus: int, expected: list[Any]) -> None:
    assert [gpus_of_process(visible, process_index, 4, n_gpus=n_gpus) for process_index in range(4)] == expected


@pytest.mark.parametrize(
    "environment", [{"KD_PROCESS_INDEX": "4", "KD_N_PROCESSES": "4"}, {"KD_N_PROCESSES": "x"}, {"KD_N_PROCESSES": "0"}]
)
def test_an_environment_that_makes_no_sense_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ContractError, match=r"KD_(PROCESS_INDEX|N_PROCESSES)"):
        Attempt.of(environment)
