"""The embedded scheduler: job arrays on this machine, as detached process groups running `slurm/task.sbatch`.

It behaves as SLURM would: the job outlives whoever submitted it, is found again by its key, restarts a task that asks
for it (exit status 75), and cancelling sends TERM, then KILL to the whole group. One small supervisor process a job
(`kd_assets.scheduler.supervisor`) starts the tasks.

Whether a job lives is the answer to one question: is its lock file locked? The lock is taken before the supervisor
starts and inherited by it and by every process of its tasks, so it is free exactly when all of them are gone, however
they went; a process id is never trusted, since ids are reused.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kd_assets.contract import JobKind
from kd_assets.errors import SchedulerError
from kd_assets.scheduler.job import JobSpec, Submission, TaskPhase, TaskState
from kd_assets.scheduler.supervisor import GROUP_FILE, JOB_LOCK, SPEC_FILE, STATE_FILE

KILL_WAIT_S = 30.0
"""Between TERM and KILL when a job is cancelled, as SLURM's KillWait."""


class LocalScheduler:
    """Runs jobs under `jobs_folder`, which must be on a local disk (it relies on flock)."""

    def __init__(
        self,
        jobs_folder: Path,
        *,
        script: Path,
        python: str = sys.executable,
        kill_wait_s: float = KILL_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs_folder, self._script, self._python = jobs_folder, script, python
        self._kill_wait_s, self._clock = kill_wait_s, clock

    def find(self, spec: JobSpec) -> Submission | None:
        """The live submission of this work, whoever made it; None when there is none."""
        latest = self._latest(self._key_folder(spec))
        return latest if latest is not None and self.is_live(latest) else None

    def find_or_submit(self, spec: JobSpec, write_job_file: Callable[[Submission], object]) -> tuple[Submission, bool]:
        """The live submission of this work, else a new one; and whether it is new.

        `write_job_file` must write `submission.job_file`; it runs before anything starts. Two callers at once get the
        same submission.
        """
        key_folder = self._key_folder(spec)
        try:
            _make_folder(key_folder)
            with _locked(key_folder / "submit.lock"):
                if (live := self.find(spec)) is not None:
                    return live, False
                latest = self._latest(key_folder)
                number = 1 if latest is None else int(latest.folder.name) + 1
                submission = Submission(folder=key_folder / f"{number:04d}")
                for folder in (submission.folder, submission.events_folder, submission.log_folder):
                    _make_folder(folder)
                write_job_file(submission)
                self._start(spec, submission)
                return submission, True
        except OSError as e:
            raise SchedulerError(
                f"no job can be started under {self._jobs_folder} ({e}): KD_HOME must be a folder that this user can "
                "write, with room on its disk"
            ) from e

    def live(self, recipe: str, kind: JobKind) -> list[Submission]:
        """All submissions of a recipe's jobs of a kind that still live."""
        latest = (self._latest(folder) for folder in sorted((self._jobs_folder / recipe).glob(f"{kind}-*")))
        return [s for s in latest if s is not None and self.is_live(s)]

    def is_live(self, submission: Submission) -> bool:
        """Whether any process of the job is still there."""
        try:
            fd = os.open(submission.folder / JOB_LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            # Shared, so that two who ask at once do not take each other for the job.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def states(self, submission: Submission) -> dict[int, TaskState]:
        """Every task's state. A job whose processes are gone has only ended tasks, whatever was last written."""
        live = self.is_live(submission)  # asked first: a state written after a "no" is complete
        try:
            n_tasks = int(json.loads((submission.folder / SPEC_FILE).read_bytes())["n_tasks"])
        except FileNotFoundError as e:
            raise SchedulerError(
                f"the folder of a job was taken away: {submission.folder}. What it committed is in the store; run again"
            ) from e
        try:
            written = json.loads((submission.folder / STATE_FILE).read_bytes())
        except FileNotFoundError:
            written = {}
        return {i: _state_of(written.get(str(i), {}), live=live) for i in range(n_tasks)}

    def describe(self, submission: Submission) -> str:
        return f"local job {submission.folder}"

    def job_id(self, submission: Submission) -> str:
        """The id tasks see as SLURM_ARRAY_JOB_ID: the supervisor's process group."""
        return str(_process_group(submission) or "")

    def cancel(self, submission: Submission) -> None:
        """TERM to the whole job, KILL to what is left after the kill wait; returns once it is gone."""
        for number, patience_s in ((signal.SIGTERM, self._kill_wait_s), (signal.SIGKILL, 10.0)):
            deadline = self._clock() + patience_s
            group = _process_group(submission)
            if group is None or not self.is_live(submission):
                return
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                return
            while self._clock() < deadline:
                if not self.is_live(submission):
                    return
                time.sleep(0.05)
        raise SchedulerError(f"process group {group} of {submission.folder} survived KILL: see `ps -g {group}`")

    def _key_folder(self, spec: JobSpec) -> Path:
        return self._jobs_folder / spec.recipe / f"{spec.kind}-{spec.key}"

    def _latest(self, key_folder: Path) -> Submission | None:
        numbers = [p for p in key_folder.glob("[0-9]*") if (p / SPEC_FILE).exists()]
        return Submission(folder=max(numbers, key=lambda p: int(p.name))) if numbers else None

    def _start(self, spec: JobSpec, submission: Submission) -> None:
        if not self._script.is_file():
            raise SchedulerError(f"the batch script {self._script} is missing: run from a checkout that has slurm/")
        (submission.folder / SPEC_FILE).write_text(
            json.dumps(
                {
                    "name": spec.name,
                    "n_tasks": spec.n_tasks,
                    "concurrency": spec.concurrency,
                    "script": str(self._script),
                }
            )
        )
        fd = os.open(submission.folder / JOB_LOCK, os.O_RDWR | os.O_CREAT, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with (submission.log_folder / "supervisor.log").open("ab") as log:
                # Returns at once: the supervisor forks itself off, so that it is nobody's child and no zombie.
                subprocess.run(
                    [self._python, "-m", "kd_assets.scheduler.supervisor", str(submission.folder), str(fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(fd,),
                    env={**os.environ, **spec.environment, "KD_PYTHON": self._python},
                    check=True,
                )
        except (OSError, subprocess.CalledProcessError) as e:
            raise SchedulerError(
                f"{self._python} cannot start the job's supervisor ({e}): see {submission.log_folder}/supervisor.log"
            ) from e
        finally:
            os.close(fd)


def _state_of(written: dict[str, object], *, live: bool) -> TaskState:
    phase = TaskPhase(written.get("phase", "pending"))
    exit_code = written.get("exit_code")
    restarts = written.get("restarts", 0)
    assert isinstance(restarts, int)
    assert exit_code is None or isinstance(exit_code, int)
    if phase is TaskPhase.ENDED:
        return TaskState(phase=phase, reason=_reason(exit_code), exit_code=exit_code, restarts=restarts)
    if live:
        return TaskState(phase=phase, restarts=restarts)
    started = phase is TaskPhase.RUNNING
    return TaskState(
        phase=TaskPhase.ENDED,
        reason="its processes are gone without an exit status (killed, or the machine restarted)"
        if started
        else "it was never started: the job's supervisor is gone",
        restarts=restarts,
    )


def _reason(exit_code: int | None) -> str:
    if exit_code is None:
        return "cancelled before it started"
    if exit_code == 0:
        return "ended"
    # The batch script is a shell: a worker killed by signal N ends it with 128 + N.
    number = -exit_code if exit_code < 0 else exit_code - 128
    if 0 < number < signal.NSIG:
        return f"killed by {signal.Signals(number).name}"
    return f"exit status {exit_code}"


def _process_group(submission: Submission) -> int | None:
    try:
        return int((submission.folder / GROUP_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _make_folder(folder: Path) -> None:
    """The folder and those above it that are missing, each 0750 (mkdir's own `parents` takes no mode)."""
    if not folder.parent.exists():
        _make_folder(folder.parent)
    folder.mkdir(exist_ok=True, mode=0o750)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
