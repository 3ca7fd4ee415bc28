"""Submissions on disk: which of them may live, and what looking for those costs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from kd_assets.contract import CONTRACT_VERSION, contract_version_of
from kd_assets.errors import JobFilesUnavailableError, SchedulerError
from kd_assets.scheduler import Submission
from kd_assets.scheduler.submissions import (
    SubmissionFolders,
    followed_by,
    followers,
    is_cancelled,
    mark_cancelled,
    read_spec,
)
from kd_assets_tests.disks import failing, opened_files
from kd_assets_tests.scheduler.jobs import KEY, job_spec, write_job_file


@pytest.fixture
def folders(tmp_path: Path) -> SubmissionFolders:
    return SubmissionFolders(tmp_path / "jobs")


def create(folders: SubmissionFolders, key: str = KEY) -> Submission:
    with folders.deciding("demo", "teacher"):
        return folders.create(job_spec(key=key), write_job_file)


def numbered_key(i: int) -> str:
    return f"{i:032x}"


# ------------------------------------------------------------------ which may live


def test_what_was_created_may_live_until_it_was_seen_to_be_over(folders: SubmissionFolders) -> None:
    first, second = create(folders, "a" * 32), create(folders, "b" * 32)
    assert folders.may_live("demo", "teacher") == [first, second]
    folders.mark_over(first)
    folders.mark_over(first)
    assert folders.may_live("demo", "teacher") == [second]
    folders.mark_live(first)
    assert folders.may_live("demo", "teacher") == [first, second]
    assert folders.may_live("demo", "shards") == folders.may_live("other", "teacher") == []


def test_only_the_newest_of_a_key_may_live(folders: SubmissionFolders) -> None:
    first, second = create(folders), create(folders)
    assert folders.may_live("demo", "teacher") == [second]
    folders.mark_live(first)
    assert folders.may_live("demo", "teacher") == [second]
    folders.mark_over(first)
    assert folders.may_live("demo", "teacher") == [second]


def test_looking_for_live_jobs_opens_nothing_of_those_that_are_over(folders: SubmissionFolders) -> None:
    made = [create(folders, numbered_key(i)) for i in range(20)]
    for submission in made[1:]:
        folders.mark_over(submission)
    with opened_files(folders.root) as opened:
        assert folders.may_live("demo", "teacher") == [made[0]]
    assert {path for path in opened if path.is_relative_to(folders.root / "demo") and "teacher-" in str(path)} == {
        made[0].spec_file,
        made[0].job_file,
    }


def test_jobs_from_before_there_was_an_index_are_found_and_put_into_it(folders: SubmissionFolders) -> None:
    made = [create(folders, numbered_key(i)) for i in range(3)]
    for entry in (folders.root / "demo" / "teacher.live").iterdir():
        entry.unlink()
    (folders.root / "demo" / "teacher.live").rmdir()
    assert folders.may_live("demo", "teacher") == made, "by whoever only looks"
    assert not (folders.root / "demo" / "teacher.live").exists()
    with folders.deciding("demo", "teacher"):
        assert folders.may_live("demo", "teacher") == made
        folders.mark_over(made[0])
    with folders.deciding("demo", "teacher"):
        assert folders.may_live("demo", "teacher") == made[1:]


# ------------------------------------------------------------------ other versions


@pytest.mark.parametrize("is_indexed", [True, False])
def test_jobs_of_another_version_are_no_jobs_to_join(folders: SubmissionFolders, is_indexed: bool) -> None:
    old, new = create(folders, "a" * 32), create(folders, "b" * 32)
    job = json.loads(old.job_file.read_text())
    old.job_file.write_text(json.dumps(job | {"contract_version": 1}, indent=1, sort_keys=True))
    if not is_indexed:
        os.rename(folders.root / "demo" / "teacher.live", folders.root / "taken away")
    assert folders.may_live("demo", "teacher") == [new]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"key": 1}', "\x00" * 100])
def test_a_job_file_that_is_none_is_no_job_to_join(folders: SubmissionFolders, text: str) -> None:
    submission = create(folders)
    submission.job_file.write_text(text)
    assert folders.may_live("demo", "teacher") == []
    submission.job_file.unlink()
    assert folders.may_live("demo", "teacher") == []


def test_the_version_of_a_job_file_is_read_from_its_first_bytes(folders: SubmissionFolders) -> None:
    path = create(folders).job_file
    assert contract_version_of(path) == CONTRACT_VERSION
    path.write_bytes(path.read_bytes()[:40])
    assert contract_version_of(path) == CONTRACT_VERSION


@pytest.mark.parametrize("change", [{"cheese": 1}, {"n_tasks": "two"}])
def test_a_spec_that_is_not_understood_is_no_job_to_join(folders: SubmissionFolders, change: dict[str, object]) -> None:
    submission = create(folders)
    spec = json.loads(submission.spec_file.read_text())
    submission.spec_file.write_text(json.dumps(spec | change))
    assert folders.may_live("demo", "teacher") == []
    with pytest.raises(SchedulerError, match=r"move .* away"):
        read_spec(submission)


def test_a_spec_written_before_a_resource_could_be_refused_is_read(folders: SubmissionFolders) -> None:
    submission = create(folders)
    spec = json.loads(submission.spec_file.read_text())
    spec["resources"] |= {"exclusive": False, "sbatch_options": []}
    submission.spec_file.write_text(json.dumps(spec))
    assert read_spec(submission).resources.exclusive is False
    assert read_spec(submission).resources.sbatch_options == ()


# ------------------------------------------------------------------ a creation that was cut off


def test_a_creation_that_failed_leaves_no_job_and_its_number_to_the_next(folders: SubmissionFolders) -> None:
    def fails(submission: Submission) -> None:
        raise RuntimeError

    with folders.deciding("demo", "teacher"), pytest.raises(RuntimeError):
        folders.create(job_spec(), fails)
    assert folders.may_live("demo", "teacher") == []
    submission = create(folders)
    assert submission.folder.name == "0001"
    assert folders.may_live("demo", "teacher") == [submission]


# ------------------------------------------------------------------ disks


PASSING = [errno.ESTALE, errno.EIO, errno.ENOSPC, errno.EDQUOT]
LASTING = [errno.EACCES, errno.EROFS]


every_error = pytest.mark.parametrize("number", PASSING + LASTING, ids=errno.errorcode.get)


@every_error
def test_what_cannot_be_read_now_says_so_and_names_the_file(folders: SubmissionFolders, number: int) -> None:
    submission = create(folders)
    with failing(number, of=submission.spec_file):
        with pytest.raises(JobFilesUnavailableError, match=r"cannot read .*spec\.json: "):
            read_spec(submission)
        with pytest.raises(JobFilesUnavailableError):
            folders.may_live("demo", "teacher")
    with failing(number, of=submission.job_file), pytest.raises(JobFilesUnavailableError, match=r"job\.json"):
        folders.may_live("demo", "teacher")
    with failing(number, of=folders.root / "demo" / "teacher.live"), pytest.raises(JobFilesUnavailableError):
        folders.may_live("demo", "teacher")
    with failing(number, of=submission.cancelled_mark):
        with pytest.raises(JobFilesUnavailableError, match="cancelled"):
            is_cancelled(submission)
        with pytest.raises(JobFilesUnavailableError, match="cancelled"):
            mark_cancelled(submission)
    with failing(number, of=submission.followers_folder):
        with pytest.raises(JobFilesUnavailableError, match="followers"):
            followers(submission)
        with pytest.raises(JobFilesUnavailableError, match="followers"), followed_by(submission, "run"):
            pass
    assert read_spec(submission) == job_spec()


@every_error
def test_a_job_that_cannot_be_started_now_is_tried_again_and_one_that_never_can_be_is_refused(
    folders: SubmissionFolders, number: int
) -> None:
    for failing_name in ("demo", "teacher.lock", "job.json", "spec.json", f"{KEY}.0001"):
        with failing(number, of_name=failing_name), pytest.raises(SchedulerError) as raised:
            create(folders)
        assert isinstance(raised.value, JobFilesUnavailableError) is (number in PASSING), failing_name
        assert ("KD_HOME must be a folder" in str(raised.value)) is (number in LASTING)
        assert folders.may_live("demo", "teacher") == []
    assert create(folders).folder.name == "0001"


@every_error
def test_an_index_that_cannot_be_written_when_a_job_is_over_fails_nobody(
    folders: SubmissionFolders, number: int
) -> None:
    submission = create(folders)
    with failing(number, of=folders.root / "demo" / "teacher.live"):
        folders.mark_over(submission)
    assert folders.may_live("demo", "teacher") == [submission]


def test_jobs_are_not_started_where_nobody_can_be_excluded(
    folders: SubmissionFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake: no file system here is without locks."""

    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(SchedulerError, match="the file system has no locks: mount it with them") as raised:
        create(folders)
    assert not isinstance(raised.value, JobFilesUnavailableError)
    assert str(folders.root / "demo" / "teacher.lock") in str(raised.value)
