"""Where submissions live on disk, for every scheduler: `<jobs folder>/<recipe>/<kind>-<key>/<number>/`.

Used by the schedulers, and by orchestration for who follows a job and what it asked for. The invariants: a submission
whose `spec.json` is there was decided upon by exactly one caller; the newest number of a key is the only one that may
be live; and every one that may be live is in the index (an empty file `<recipe>/<kind>.live/<key>.<number>`), so that
looking for live jobs costs nothing for those that are over.

A file that cannot be read or written now is a JobFilesUnavailableError: like a scheduler that gives no answer it says
nothing about a job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kd_assets.contract import CONTRACT_VERSION, JobKind, contract_version_of, decode, parse_json
from kd_assets.durable import atomic_write, prepare_folder, read_if_there, storage_errors
from kd_assets.errors import ContractError, JobFilesUnavailableError, SchedulerError, StorageUnavailableError
from kd_assets.locks import is_locked, locked
from kd_assets.scheduler.folder import Submission, key_folder
from kd_assets.scheduler.job import JobSpec

_WAITING_DOES_NOT_HELP = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
        errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS,
    }
)  # fmt: skip
"""Errors under which a job will not be started later either."""


@contextmanager
def storage_as_no_answer() -> Iterator[None]:
    """Storage that fails in the block is like a scheduler that gives no answer: nothing follows, one asks again."""
    try:
        yield
    except StorageUnavailableError as e:
        raise JobFilesUnavailableError(str(e)) from e


class SubmissionFolders:
    """The submissions under one jobs folder."""

    def __init__(self, jobs_folder: Path) -> None:
        self.root = jobs_folder

    @contextmanager
    def deciding(self, recipe: str, kind: JobKind) -> Iterator[None]:
        """Held while looking for live jobs and submitting what none of them does: one decision at a time, over all
        processes (and nodes, where the file system's locks reach them)."""
        with ExitStack() as held:
            with self._starting_jobs():
                prepare_folder(self.root / recipe)
                held.enter_context(locked(self.root / recipe / f"{kind}.lock"))
                self._make_index(recipe, kind)
            yield

    @storage_as_no_answer()
    def may_live(self, recipe: str, kind: JobKind) -> list[Submission]:
        """The newest submission of each key of a recipe's jobs of a kind, without those that were seen to be over, and
        without those of other versions of kd_assets, whose results hold their leases all the same."""
        has_index = is_there(self._index(recipe, kind))
        found = self._indexed(recipe, kind) if has_index else self._newest_of_each_key(recipe, kind)
        return [s for s in found if _is_of_this_version(s)]

    def create(self, spec: JobSpec, prepare: Callable[[Submission], object]) -> Submission:
        """A new folder with its spec, the next number of its key. Call it while `deciding`. `prepare` writes all that
        must be there before anybody finds the submission, its job file first of all.

        Raises SchedulerError where jobs cannot be started, JobFilesUnavailableError where they cannot be now.
        """
        with self._starting_jobs():
            folder = key_folder(self.root, recipe=spec.recipe, kind=spec.kind, key=spec.key)
            earlier = _submissions_in(folder)
            submission = Submission(folder=folder / f"{1 + max(map(number_of, earlier), default=0):04d}")
            for needed in (submission.folder, submission.events_folder, submission.log_folder):
                prepare_folder(needed)
            with storage_errors(submission.folder, "write in"):
                prepare(submission)
            self.mark_live(submission)
            write_json(submission.spec_file, dataclasses.asdict(spec))
            for other in earlier:
                self.mark_over(other)
            return submission

    # ------------------------------------------------------------------ which may be live

    def mark_live(self, submission: Submission) -> None:
        """It is looked at from now on whenever live jobs are looked for."""
        entry = _index_entry(submission)
        if is_there(entry.parent):  # else all are
            atomic_write(entry, b"")

    def mark_over(self, submission: Submission) -> None:
        """It is not looked at any more when live jobs are looked for. Only saves time: a disk that does not do it is no
        error."""
        with contextlib.suppress(OSError):
            _index_entry(submission).unlink(missing_ok=True)

    def _index(self, recipe: str, kind: JobKind) -> Path:
        return self.root / recipe / f"{kind}.live"

    def _indexed(self, recipe: str, kind: JobKind) -> list[Submission]:
        newest: dict[str, str] = {}
        for name in names_in(self._index(recipe, kind)):
            key, _, number = name.partition(".")
            if number.isdigit() and int(number) > int(newest.get(key, "0")):
                newest[key] = number
        folders = {key: key_folder(self.root, recipe=recipe, kind=kind, key=key) for key in newest}
        return [Submission(folder=folders[key] / number) for key, number in newest.items()]

    def _make_index(self, recipe: str, kind: JobKind) -> None:
        """Once, for the jobs that were made before there was one."""
        index = self._index(recipe, kind)
        if is_there(index):
            return
        unfinished = index.with_name(f"{index.name}.unfinished")
        prepare_folder(unfinished)
        with storage_errors(unfinished, "write"):
            for submission in self._newest_of_each_key(recipe, kind):
                if _is_of_this_version(submission):
                    (unfinished / _index_entry(submission).name).touch(mode=0o640)
            unfinished.rename(index)

    def _newest_of_each_key(self, recipe: str, kind: JobKind) -> list[Submission]:
        folders = [self.root / recipe / name for name in names_in(self.root / recipe) if name.startswith(f"{kind}-")]
        return [max(found, key=number_of) for folder in folders if (found := _submissions_in(folder))]

    @contextmanager
    def _starting_jobs(self) -> Iterator[None]:
        with storage_as_no_answer():
            try:
                yield
            except StorageUnavailableError as e:
                if not isinstance(e.__cause__, OSError) or e.__cause__.errno not in _WAITING_DOES_NOT_HELP:
                    raise
                raise SchedulerError(
                    f"no job can be started under {self.root} ({e}): KD_HOME must be a folder that this user can "
                    "write, on a file system with locks"
                ) from e


def number_of(submission: Submission) -> int:
    """Which submission of its key it is, from 1."""
    return int(submission.folder.name)


def _submissions_in(folder: Path) -> list[Submission]:
    """Of one key, in no order. A folder without a spec is what was left of one that was never made."""
    found = [Submission(folder=folder / name) for name in names_in(folder) if name.isdigit()]
    return [s for s in found if is_there(s.spec_file)]


def _index_entry(submission: Submission) -> Path:
    kind, _, key = submission.folder.parent.name.partition("-")
    return submission.folder.parents[1] / f"{kind}.live" / f"{key}.{submission.folder.name}"


def _is_of_this_version(submission: Submission) -> bool:
    try:
        read_spec(submission)
    except JobFilesUnavailableError:
        raise
    except SchedulerError:
        return False
    with storage_errors(submission.job_file, "read"):
        try:
            return contract_version_of(submission.job_file) == CONTRACT_VERSION
        except FileNotFoundError:
            return False


# ------------------------------------------------------------------ who waits for a job


@contextmanager
def followed_by(submission: Submission, run_id: str) -> Iterator[None]:
    """Makes it known that a run waits for this job, for as long as this process lives."""
    with ExitStack() as held:
        with storage_as_no_answer():
            prepare_folder(submission.followers_folder)
            held.enter_context(locked(submission.followers_folder / run_id))
        yield


@storage_as_no_answer()
def followers(submission: Submission) -> dict[str, bool]:
    """Run id → whether its process still waits for this job; of every run that ever did."""
    folder = submission.followers_folder
    return {name: is_locked(folder / name) for name in names_in(folder)}


# ------------------------------------------------------------------ what a submission's files say


@storage_as_no_answer()
def read_spec(submission: Submission) -> JobSpec:
    """Raises SchedulerError when it is gone or damaged, JobFilesUnavailableError when it cannot be read now."""
    raw = read_json(submission.spec_file)
    if raw is None:
        raise SchedulerError(
            f"the folder of a job was taken away: {submission.folder}. What it committed is in the store; run again"
        )
    try:
        return decode(JobSpec, raw, where=str(submission.spec_file))
    except ContractError as e:
        raise SchedulerError(f"{submission.spec_file} cannot be read ({e}): move {submission.folder} away") from e


@storage_as_no_answer()
def mark_cancelled(submission: Submission) -> None:
    """From now on nothing more of it is submitted, and its end is a cancellation, whatever its processes say."""
    with storage_errors(submission.cancelled_mark, "write"):
        submission.cancelled_mark.touch(mode=0o640)


@storage_as_no_answer()
def is_cancelled(submission: Submission) -> bool:
    return is_there(submission.cancelled_mark)


def write_json(path: Path, record: Any) -> None:
    """Durably, whole or not at all: what follows may be a submission that must be found again after a power cut.

    Raises StorageUnavailableError.
    """
    atomic_write(path, json.dumps(record, indent=1, sort_keys=True).encode())


def read_json(path: Path) -> Any | None:
    """What `write_json` wrote; None when there is no such file.

    Raises StorageUnavailableError when it cannot be read, SchedulerError when it is damaged.
    """
    raw = read_if_there(path)
    if raw is None:
        return None
    try:
        return parse_json(raw)
    except ValueError as e:
        raise SchedulerError(f"{path} is damaged ({e}): move {path} away and run again") from e


def names_in(folder: Path) -> list[str]:
    """Sorted; none where there is no such folder. Raises StorageUnavailableError."""
    with storage_errors(folder, "list"):
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []


def is_there(path: Path) -> bool:
    """Whether a file or folder exists. Raises StorageUnavailableError where that cannot be told now."""
    with storage_errors(path, "look for"):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True
