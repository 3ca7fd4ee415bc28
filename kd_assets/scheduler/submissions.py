"""Where submissions live on disk, for every scheduler: `<jobs folder>/<recipe>/<kind>-<key>/<number>/`.

Used by the schedulers, and by orchestration for who follows a job and what it asked for. The invariant: a submission
whose `spec.json` is there was decided upon by exactly one caller; the newest number of a key is the only one that may
be live.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd_assets.contract import JobKind, decode
from kd_assets.errors import ContractError, SchedulerError
from kd_assets.scheduler.folder import Submission
from kd_assets.scheduler.job import JobSpec


class SubmissionFolders:
    """The submissions under one jobs folder."""

    def __init__(self, jobs_folder: Path) -> None:
        self.root = jobs_folder

    @contextmanager
    def deciding(self, recipe: str, kind: JobKind) -> Iterator[None]:
        """Held while looking for live jobs and submitting what none of them does: one decision at a time, over all
        processes (and nodes, where the file system's locks reach them)."""
        with self._writable():
            make_folder(self.root / recipe)
        with locked(self.root / recipe / f"{kind}.lock"):
            yield

    def newest(self, recipe: str, kind: JobKind) -> list[Submission]:
        """The newest submission of each key of a recipe's jobs of a kind; without those of other versions of
        kd_assets, whose results hold their leases all the same."""
        keys = sorted((self.root / recipe).glob(f"{kind}-*"))
        found = (self._newest_of(folder) for folder in keys)
        return [s for s in found if s is not None and _is_readable(s)]

    def create(self, spec: JobSpec, write_job_file: Callable[[Submission], object]) -> Submission:
        """A new folder with its job file and spec, the next number of its key. Call it while `deciding`."""
        with self._writable():
            key_folder = self.root / spec.recipe / f"{spec.kind}-{spec.key}"
            make_folder(key_folder)
            numbers = [int(p.name) for p in key_folder.iterdir() if p.name.isdigit()]
            submission = Submission(folder=key_folder / f"{max(numbers, default=0) + 1:04d}")
            for folder in (submission.folder, submission.events_folder, submission.log_folder):
                make_folder(folder)
            write_job_file(submission)
            write_json(submission.spec_file, dataclasses.asdict(spec))
            return submission

    def _newest_of(self, key_folder: Path) -> Submission | None:
        numbers = [p for p in key_folder.glob("[0-9]*") if (p / "spec.json").exists()]
        return Submission(folder=max(numbers, key=lambda p: int(p.name))) if numbers else None

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise SchedulerError(
                f"no job can be started under {self.root} ({e}): KD_HOME must be a folder that this user can write, "
                "with room on its disk"
            ) from e


@contextmanager
def followed_by(submission: Submission, run_id: str) -> Iterator[None]:
    """Makes it known that a run waits for this job, for as long as this process lives."""
    folder = submission.folder / "followers"
    make_folder(folder)
    with locked(folder / run_id):
        yield


def followers(submission: Submission) -> dict[str, bool]:
    """Run id → whether its process still waits for this job; of every run that ever did."""
    return {path.name: is_locked(path) for path in sorted((submission.folder / "followers").glob("*"))}


def read_spec(submission: Submission) -> JobSpec:
    """Raises SchedulerError when it is gone or damaged."""
    try:
        return decode(JobSpec, json.loads(submission.spec_file.read_bytes()), where=str(submission.spec_file))
    except FileNotFoundError as e:
        raise SchedulerError(
            f"the folder of a job was taken away: {submission.folder}. What it committed is in the store; run again"
        ) from e
    except (ValueError, ContractError) as e:
        raise SchedulerError(f"{submission.spec_file} cannot be read ({e}): move {submission.folder} away") from e


def _is_readable(submission: Submission) -> bool:
    try:
        read_spec(submission)
    except SchedulerError:
        return False
    return True


def write_json(path: Path, record: Any) -> None:
    """Durably, whole or not at all: what follows may be a submission that must be found again after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640), "w") as f:
        json.dump(record, f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path) -> Any | None:
    """What `write_json` wrote; None when there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def make_folder(folder: Path) -> None:
    """The folder and those above it that are missing, each 0750 (mkdir's own `parents` takes no mode)."""
    if not folder.parent.exists():
        make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o750)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock that this file stands for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who ask at once do not take each other for the holder.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone, among all processes that lock the same path."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def mark_cancelled(submission: Submission) -> None:
    """From now on nothing more of it is submitted, and its end is a cancellation, whatever its processes say."""
    (submission.folder / "cancelled").touch(mode=0o640)


def is_cancelled(submission: Submission) -> bool:
    return (submission.folder / "cancelled").exists()
