"""Files that cannot be reached while jobs are followed: nothing follows from it, and it is tried again for a while."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_assets.errors import SchedulerUnreachableError, StorageUnavailableError
from kd_assets.orchestration.driving import results as results_module
from kd_assets.orchestration.driving.following import FollowedJob
from kd_assets.orchestration.driving.waiting import STORAGE_PATIENCE_S
from kd_assets.orchestration.retries import FailureClass
from kd_assets.scheduler import Ending, Submission
from kd_assets.scheduler.submissions import followers
from kd_assets.store import committed
from kd_assets_tests.orchestration.driving.world import RUN_ID, START, World


class Trouble:
    """A fake of a file system whose server is away: what is asked of the store, or of files, fails as a test says."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.until_s, self.n_asked = world, 0.0, 0
        monkeypatch.setattr(results_module, "committed", self.committed)

    def lasts(self, seconds: float) -> None:
        self.until_s = self.world.now + seconds

    @property
    def is_on(self) -> bool:
        return self.world.now < self.until_s

    def committed(self, folder: Path, fingerprint: str) -> Any:
        self.n_asked += 1
        if self.is_on:
            raise StorageUnavailableError(f"cannot read {folder}: Stale file handle")
        return committed(folder, fingerprint)


@pytest.fixture
def trouble(world: World, monkeypatch: pytest.MonkeyPatch) -> Trouble:
    return Trouble(world, monkeypatch)


def test_a_result_that_cannot_be_reached_for_a_moment_is_recorded_soon_after(world: World, trouble: Trouble) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.at(10, lambda: trouble.lasts(5))
        world.at(10, lambda: world.commit_and_say(job, "p0"))
        world.at(2000, lambda: world.work_through(job))

    world.on_each_submission(script)
    driver = world.run()
    assert driver.failed == []
    assert 15 <= world.recorded_at["p0"] < 30
    assert world.log.count("a file cannot be reached") == 1
    assert world.log.count("all files can be reached again") == 1


@pytest.mark.parametrize("last_word", ["done", "failed"])
def test_results_that_cannot_be_reached_when_their_task_ends_are_not_its_failure(
    world: World, trouble: Trouble, last_word: str
) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.commit("p0", "p1")
        world.say(job, "task_finished", status=last_word)
        trouble.lasts(STORAGE_PATIENCE_S / 2)

    world.on_each_submission(script)
    driver = world.run()
    assert (driver.failed, driver.failures) == ([], Counter())
    assert sorted(world.keys_recorded) == ["p0", "p1"]
    assert len(world.scheduler.submitted) == 1


def test_a_partition_is_decided_on_as_a_whole_once_all_of_it_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two caches that a killed task left behind one is missing, and of the other nobody can tell for a while."""
    world = World(tmp_path, ["p0"], ["topk_cache", "embedding_cache"])
    embeddings = Path(world.output("p0", "embedding_cache").path)

    def stale(folder: Path, fingerprint: str) -> Any:
        if folder == embeddings and world.scheduler.submitted and world.now < START + 100:
            raise StorageUnavailableError(f"cannot read {folder}: Stale file handle")
        return committed(folder, fingerprint)

    monkeypatch.setattr(results_module, "committed", stale)

    def killed(job: Submission) -> None:
        world.say(job, "task_started")
        world.end(job, Ending.KILLED)

    def works(job: Submission) -> None:
        again = FollowedJob.of(job)
        assert [output.asset for output in again.outputs_of(0)] == ["topk_cache", "embedding_cache"]
        failing = {"partition_key": "p0", "error": "TeacherError", "message": "enough"}
        world.say(job, "task_started")
        world.say(job, "partition_failed", **failing)  # type: ignore[arg-type]
        world.say(job, "task_finished", status="failed")

    world.on_each_submission(killed, works)
    driver = world.run()
    assert driver.failures == {FailureClass.KILLED: 1, FailureClass.WORK: 1}


def test_results_that_cannot_be_reached_for_too_long_are_given_up_in_the_storages_words(
    world: World, trouble: Trouble
) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.say(job, "task_finished")
        trouble.lasts(1e9)

    world.on_each_submission(script)
    driver = world.run()
    assert STORAGE_PATIENCE_S <= world.now - START < 1.5 * STORAGE_PATIENCE_S
    assert {f.partition_key for f in driver.failed} == {"p0", "p1"}
    assert all("Stale file handle" in f.cause and "away" not in f.cause for f in driver.failed)
    assert trouble.n_asked < 100, "asked ever more seldom"


def test_nothing_is_submitted_for_a_result_of_which_nobody_can_tell(world: World, trouble: Trouble) -> None:
    world.commit("p0", "p1")
    trouble.lasts(60)
    world.run()
    assert world.scheduler.submitted == []
    assert set(world.keys_recorded) == {"p0", "p1"}


def test_a_result_that_cannot_be_recorded_for_a_moment_is_recorded_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recording sets the head of a reused result, which writes to the store."""
    record, n_failures = world._record, iter([1, 2, 3])

    def full(result: Any) -> None:
        if next(n_failures, None):
            raise StorageUnavailableError("cannot write head.json: No space left on device")
        record(result)

    monkeypatch.setattr(world, "_record", full)
    world.commit("p0", "p1")
    assert world.run().failed == []
    assert set(world.keys_recorded) == {"p0", "p1"}


def bare(number: int) -> OSError:
    return OSError(number, "of the test")


Errors = Callable[[str, BaseException, int], None]


@pytest.fixture
def fails_at_first(monkeypatch: pytest.MonkeyPatch) -> Errors:
    """Have a function of a driving module raise this as often, and then do what it does."""

    def arrange(where: str, error: BaseException, n_times: int) -> None:
        module, name = where.rsplit(".", 1)
        target = __import__(f"kd_assets.orchestration.driving.{module}", fromlist=[name])
        real, left = getattr(target, name), iter(range(n_times))

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is not None:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, replaced)

    return arrange


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "where",
    [
        "tails.read_events",
        "settling.is_cancelled",
        "settling.count_durable_files",
        "joining.n_durable_files",
        "joining.is_cancelled",
        "joining.followed_by",
        "results.committed",
    ],
)
def test_no_error_of_the_file_system_ends_a_run_that_follows_jobs(
    world: World, fails_at_first: Errors, where: str, number: int
) -> None:
    """Each thing that a run does with files fails a few times on its way: a job is found and joined, dies, and is
    submitted again."""
    fails_at_first(where, bare(number), 3)
    theirs = world.job_of_another_run(["p0", "p1"])
    world.say(theirs, "task_started")
    world.at(60, lambda: world.end(theirs, Ending.KILLED))
    world.on_each_submission(world.work_through)
    driver = world.run()
    assert driver.failed == []
    assert sorted(world.keys_recorded) == ["p0", "p1"]
    assert len(world.scheduler.submitted) == 1


def test_a_job_that_could_not_be_marked_as_waited_for_is_marked_later(world: World, fails_at_first: Errors) -> None:
    fails_at_first("joining.followed_by", bare(errno.ENOSPC), 2)
    theirs = world.job_of_another_run(["p0", "p1"])
    seen: list[dict[str, bool]] = []
    for after_s in (0.5, 30):
        world.at(after_s, lambda: seen.append(followers(theirs)))
    world.at(40, lambda: world.work_through(theirs))
    world.run()
    assert seen == [{}, {RUN_ID: True}]


def test_a_listing_of_event_files_that_fails_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = world.scheduler.log_file, iter(range(2))
    listdir = os.listdir
    failures = iter(range(2))

    def stale(folder: Any) -> list[str]:
        if Path(folder).name == "events" and next(failures, None) is not None:
            raise bare(errno.ESTALE)
        return listdir(folder)

    def log_file(submission: Submission, task: int) -> Path:
        if next(left, None) is not None:
            raise bare(errno.ESTALE)
        return real(submission, task)

    monkeypatch.setattr(os, "listdir", stale)
    monkeypatch.setattr(world.scheduler, "log_file", log_file)
    world.on_each_submission(world.work_through)
    assert world.run().failed == []
    assert set(world.keys_recorded) == {"p0", "p1"}


def test_records_of_the_scheduler_that_cannot_be_read_are_an_answer_that_does_not_come(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll, left = world.scheduler.poll, iter(range(3))

    def stale(submissions: Any) -> Any:
        if next(left, None) is not None:
            raise bare(errno.ESTALE)
        return poll(submissions)

    monkeypatch.setattr(world.scheduler, "poll", stale)

    def script(job: Submission) -> None:
        world.commit("p0", "p1")
        world.end(job)

    world.on_each_submission(script)
    assert world.run().failed == []
    assert "the scheduler answers again, after 3 questions without answer" in world.log


def test_job_files_that_cannot_be_written_are_waited_for_but_not_as_long_as_a_scheduler(world: World) -> None:
    """A scheduler says of its own files that it cannot be reached; a cluster may be away for days, a disk may not."""

    def full(job: Submission) -> None:
        try:
            raise StorageUnavailableError("cannot write arrays/0001.json: No space left on device; free some space")
        except StorageUnavailableError as e:
            world.end(job, Ending.CANCELLED)
            raise SchedulerUnreachableError(str(e)) from e

    world.on_each_submission(*[full] * 100)
    driver = world.run()
    assert {f.partition_key for f in driver.failed} == {"p0", "p1"}
    assert all("free some space" in f.cause for f in driver.failed)
    assert STORAGE_PATIENCE_S <= world.now - START < 1.5 * STORAGE_PATIENCE_S
    assert "the scheduler does not answer" not in world.log


def test_a_job_that_cannot_be_started_for_want_of_space_is_given_up_after_a_while_with_the_reason(
    world: World, fails_at_first: Errors
) -> None:
    full = StorageUnavailableError("cannot write job.json: No space left on device; free some space")
    fails_at_first("joining.atomic_write", full, 10**6)
    driver = world.run()
    assert {f.partition_key for f in driver.failed} == {"p0", "p1"}
    assert all("free some space" in f.cause for f in driver.failed)
    assert STORAGE_PATIENCE_S <= world.now - START < 1.5 * STORAGE_PATIENCE_S
