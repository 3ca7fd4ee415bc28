"""A disk that fails while jobs are followed: a full one, a stale handle, a mode that was changed.

What only saves questions to the cluster is gone on without. What is needed is like no answer: nothing ends, the last
known states stand, and everything goes on once the disk does. Nothing is submitted that could not be found again, and
what is to be cancelled is cancelled.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets.errors import JobFilesUnavailableError, SchedulerUnreachableError
from kd_assets.scheduler import Ending, Submission, TaskPhase
from kd_assets.scheduler.slurm.scheduler import CANCEL_PATIENCE_S
from kd_assets_tests.disks import failing
from kd_assets_tests.scheduler.slurm.site import GRACE_S, Site

every_error = pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.EIO], ids=errno.errorcode.get
)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, accounting=False)


# ------------------------------------------------------------------ what only saves questions


@every_error
def test_a_queue_that_cannot_be_shared_is_asked_for_by_each(site: Site, number: int) -> None:
    submission = site.submit()
    site.cluster.runs(0)
    with failing(number, of=site.jobs_folder / ".slurm"):
        for n_looks in range(1, 4):
            assert site.state(submission).phase is TaskPhase.RUNNING
            assert site.cluster.n_asked("squeue") == n_looks


def test_a_file_system_without_locks_keeps_nobody_from_the_queue(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake: no file system here is without locks."""
    submission = site.submit()
    site.cluster.runs(0)

    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert site.state(submission).phase is TaskPhase.RUNNING


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"at": 1}', b'{"at": "x", "text": ""}', b"\xff\xfe"])
def test_a_shared_answer_that_is_damaged_is_asked_for_again(site: Site, content: bytes) -> None:
    submission = site.submit()
    site.look(submission)
    (site.jobs_folder / ".slurm" / "site.json").write_bytes(content)
    site.cluster.runs(0)
    assert site.state(submission, after_s=0).phase is TaskPhase.RUNNING


# ------------------------------------------------------------------ what is needed


def arrays_folder(submission: Submission) -> Path:
    return submission.arrays_folder


def endings_file(submission: Submission) -> Path:
    return submission.endings_file


@every_error
@pytest.mark.parametrize("unreadable", [arrays_folder, endings_file])
def test_records_that_cannot_be_read_leave_the_last_known_states(
    site: Site, number: int, unreadable: Callable[[Submission], Path]
) -> None:
    submission = site.submit(n_tasks=2)
    site.cluster.ends(0)
    site.cluster.runs(1)
    known = site.states(submission)
    site.cluster.ends(1)
    with failing(number, of=unreadable(submission)):
        poll = site.look(submission)
        assert list(poll.states[submission].values()) == known
        assert poll.unreachable is not None
        assert str(unreadable(submission)) in poll.unreachable
        with pytest.raises(JobFilesUnavailableError):
            site.process().live("demo", "teacher")
    assert site.states(submission)[1].ending is Ending.EXITED


@every_error
def test_a_process_that_has_read_nothing_yet_knows_nothing_and_raises_nothing(site: Site, number: int) -> None:
    submission = site.submit()
    site.look(submission)
    with failing(number, of=submission.folder):
        fresh = site.process()
        poll = fresh.poll([submission])
        assert poll.unreachable is not None
        assert poll.states == {submission: {}}
        assert fresh.describe(submission) == f"a SLURM job ({submission.folder})"
        assert fresh.log_file(submission, 0) == submission.log_folder
        assert fresh.accounting(submission) == {}
    assert fresh.describe(submission) == f"SLURM job 1 ({submission.folder})"
    assert site.state(submission, scheduler=fresh).phase is TaskPhase.PENDING


@every_error
def test_an_end_that_cannot_be_written_is_known_told_once_and_written_later(site: Site, number: int) -> None:
    submission = site.submit()
    with failing(number, of_name="endings.json", only_writing=True):
        site.cluster.ends(0)
        polls = [site.look(submission) for _ in range(3)]
        site.cluster.forgets()
        polls.append(site.look(submission, after_s=2 * GRACE_S))
    assert [p.states[submission][0].ending for p in polls] == [Ending.EXITED] * 4, "and not lost"
    (notice,) = [n for p in polls for n in p.notices]
    assert f"what is known of {submission.folder} cannot be kept for other runs" in notice
    assert site.look(submission).notices == []
    assert site.state(submission, scheduler=site.process()).ending is Ending.EXITED


@every_error
def test_a_grace_that_cannot_be_written_is_counted_all_the_same(site: Site, number: int) -> None:
    submission = site.submit()
    site.look(submission)
    site.cluster.forgets()
    with failing(number, of_name="unseen.json", only_writing=True):
        assert site.state(submission).phase is TaskPhase.PENDING
        assert site.state(submission, after_s=GRACE_S + 1).ending is Ending.LOST


# ------------------------------------------------------------------ submitting


@every_error
@pytest.mark.parametrize("unwritable", ["0001.json", "submit.lock"])
def test_what_could_not_be_found_again_is_not_submitted_until_it_could(
    site: Site, number: int, unwritable: str
) -> None:
    with failing(number, of_name=unwritable):
        submission = site.submit()
        polls = [site.look(submission) for _ in range(3)]
        assert site.cluster.n_asked("sbatch") == 0
    assert [p.states[submission][0].reason for p in polls] == ["not submitted yet"] * 3
    (notice,) = [n for p in polls for n in p.notices]
    assert f"nothing more of {submission.folder} is submitted for now: cannot " in notice
    site.look(submission)
    assert site.cluster.n_asked("sbatch") == 1
    assert site.state(submission).reason == "Priority"


@every_error
def test_an_answer_that_cannot_be_written_is_one_that_was_lost(site: Site, number: int) -> None:
    with failing(number, of_name="0001.answer.json", only_writing=True):
        submission = site.submit()
        assert site.state(submission).task_id == "1_0", "by its name"
        site.clock.now += 1000
        assert site.state(submission).task_id == "1_0"
    assert site.state(submission).task_id == "1_0"
    assert site.cluster.n_asked("sbatch") == 1
    assert site.process().log_file(submission, 0).name == "slurm-1_0.log"


# ------------------------------------------------------------------ held tasks


@every_error
def test_a_held_task_that_may_have_been_released_already_is_left_alone(site: Site, number: int) -> None:
    submission = site.submit()
    site.cluster.waits(0, "JobHoldMaxRequeue")
    with failing(number, of=submission.released_mark(0)):
        assert site.look(submission).unreachable is not None
    assert site.cluster.task(0).reason == "JobHoldMaxRequeue"


def test_a_release_that_cannot_be_noted_is_made_once_by_this_process(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path, mode: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "touch", touch)
    submission = site.submit()
    site.cluster.waits(0, "JobHoldMaxRequeue")
    assert "released once" in site.look(submission).notices[0]
    site.cluster.waits(0, "JobHoldMaxRequeue")
    assert site.state(submission, after_s=6).ending is Ending.HELD


# ------------------------------------------------------------------ cancelling


@every_error
def test_what_cannot_be_marked_is_cancelled_in_the_queue_at_once_and_the_trouble_is_told(
    site: Site, number: int
) -> None:
    submission, before = site.submit(), site.clock.now
    cancelled_at: list[float] = []
    sleep = site.clock.sleep

    def watch(seconds: float) -> None:
        if site.cluster.task(0).state == "CANCELLED by 0":
            cancelled_at.append(site.clock.now)
        sleep(seconds)

    site.clock.sleep = watch  # type: ignore[method-assign]
    with failing(number, of=submission.cancelled_mark):
        with pytest.raises(SchedulerUnreachableError, match=r"cannot write .*cancelled: "):
            site.process().cancel([submission])
    assert cancelled_at[0] - before < 1
    assert site.clock.now - before >= CANCEL_PATIENCE_S


def test_cancelling_goes_on_once_the_disk_does(site: Site) -> None:
    submission, before = site.submit(), site.clock.now
    sleep = site.clock.sleep
    disk = failing(errno.ENOSPC, of=submission.cancelled_mark)

    def freed_after_a_while(seconds: float) -> None:
        if before + 20 < site.clock.now < before + 20 + seconds:
            disk.__exit__(None, None, None)
        sleep(seconds)

    site.clock.sleep = freed_after_a_while  # type: ignore[method-assign]
    disk.__enter__()
    site.process().cancel([submission])
    assert 20 < site.clock.now - before < 40
    assert submission.cancelled_mark.exists()


def test_what_this_process_knows_of_is_cancelled_though_its_records_cannot_be_read(site: Site) -> None:
    submission = site.submit()
    site.look(submission)
    with failing(errno.ESTALE, of=submission.folder):
        with pytest.raises(SchedulerUnreachableError, match=r"By hand: scancel --name=kd-demo-teacher"):
            site.scheduler.cancel([submission])
    assert site.cluster.task(0).state == "CANCELLED by 0"
