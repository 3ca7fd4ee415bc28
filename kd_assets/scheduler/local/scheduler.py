"""The embedded scheduler: job arrays on this machine, as detached process groups running `slurm/task.sbatch`.

It behaves as SLURM would: the job outlives whoever submitted it, is found again by its key, restarts a task that asks
for it (exit status 75), and cancelling sends TERM, then KILL to the whole group. One small supervisor process a job
(`kd_assets.scheduler.local.supervisor`) starts the tasks.

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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from kd_assets.contract import JobKind
from kd_assets.errors import EXIT_RESUMABLE, SchedulerError
from kd_assets.scheduler.folder import Submission
from kd_assets.scheduler.job import AccountedAttempt, Ending, JobSpec, Poll, TaskPhase, TaskState
from kd_assets.scheduler.local.supervisor import GROUP_FILE, JOB_LOCK, START_FILE, STATE_FILE, task_log_file
from kd_assets.scheduler.submissions import SubmissionFolders, is_cancelled, is_locked, mark_cancelled, read_spec

KILL_WAIT_S = 30.0
"""Between TERM and KILL when a job is cancelled, as SLURM's KillWait."""


class LocalScheduler:
    """Runs jobs under `jobs_folder`, which must be on a local disk (it relies on flock)."""

    poll_interval_s = 0.2
    visibility_grace_s = 0.0

    def __init__(
        self,
        jobs_folder: Path,
        *,
        script: Path,
        python: str = sys.executable,
        kill_wait_s: float = KILL_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folders, self._script, self._python = SubmissionFolders(jobs_folder), script, python
        self._kill_wait_s, self._clock = kill_wait_s, clock

    def deciding(self, recipe: str, kind: JobKind) -> AbstractContextManager[None]:
        """See `Scheduler`."""
        return self._folders.deciding(recipe, kind)

    def live(self, recipe: str, kind: JobKind) -> list[Submission]:
        """All submissions of a recipe's jobs of a kind that still live."""
        return [s for s in self._folders.newest(recipe, kind) if self.is_live(s)]

    def submit(self, spec: JobSpec, write_job_file: Callable[[Submission], object]) -> Submission:
        """Start a job in a folder of its own."""
        if not self._script.is_file():
            raise SchedulerError(f"the batch script {self._script} is missing: run from a checkout that has slurm/")
        submission = self._folders.create(spec, write_job_file)
        self._start(spec, submission)
        return submission

    def is_live(self, submission: Submission) -> bool:
        """Whether any process of the job is still there."""
        return is_locked(submission.folder / JOB_LOCK)

    def poll(self, submissions: Sequence[Submission]) -> Poll:
        """Every task's state. A job whose processes are gone has only ended tasks, whatever was last written."""
        return Poll(states={s: self._states(s) for s in submissions})

    def _states(self, submission: Submission) -> dict[int, TaskState]:
        live = self.is_live(submission)  # asked first: a state written after a "no" is complete
        n_tasks = read_spec(submission).n_tasks
        try:
            written = json.loads((submission.folder / STATE_FILE).read_bytes())
        except FileNotFoundError:
            written = {}
        group = process_group(submission)
        task_ids = {i: f"{group}_{i}" if group else "" for i in range(n_tasks)}
        cancelled = is_cancelled(submission)
        return {
            i: _state_of(written.get(str(i), {}), live=live, cancelled=cancelled, task_id=task_ids[i])
            for i in range(n_tasks)
        }

    def accounting(self, submission: Submission) -> dict[int, list[AccountedAttempt]]:
        """Nobody keeps accounts here."""
        return {}

    def describe(self, submission: Submission) -> str:
        return f"local job {submission.folder}"

    def log_file(self, submission: Submission, task_index: int) -> Path:
        return task_log_file(submission, task_index)

    def submitted_at(self, submission: Submission) -> float:
        return submission.spec_file.stat().st_mtime

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """TERM to every process of the jobs, KILL to what is left after the kill wait; returns once they are gone."""
        for submission in submissions:
            mark_cancelled(submission)
            self._cancel(submission)

    def _cancel(self, submission: Submission) -> None:
        for number, patience_s in ((signal.SIGTERM, self._kill_wait_s), (signal.SIGKILL, 10.0)):
            deadline = self._clock() + patience_s
            group = process_group(submission)
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

    def begin_cancelling(self, submissions: Sequence[Submission]) -> None:
        """TERM to every process of the jobs; KILL where they were asked to end longer ago than the kill wait."""
        for submission in submissions:
            number = signal.SIGTERM
            if not is_cancelled(submission):
                mark_cancelled(submission)
            elif time.time() - (submission.folder / "cancelled").stat().st_mtime >= self._kill_wait_s:
                number = signal.SIGKILL
            group = process_group(submission)
            if group is not None and self.is_live(submission):
                with suppress(ProcessLookupError):
                    os.killpg(group, number)

    def _start(self, spec: JobSpec, submission: Submission) -> None:
        (submission.folder / START_FILE).write_text(json.dumps({"name": spec.name, "script": str(self._script)}))
        fd = os.open(submission.folder / JOB_LOCK, os.O_RDWR | os.O_CREAT, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with (submission.log_folder / "supervisor.log").open("ab") as log:
                # Returns at once: the supervisor forks itself off, so that it is nobody's child and no zombie.
                subprocess.run(
                    [self._python, "-m", "kd_assets.scheduler.local.supervisor", str(submission.folder), str(fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(fd,),
                    env={**os.environ, "KD_PYTHON": self._python, "KD_N_PROCESSES": str(spec.resources.n_processes)},
                    check=True,
                )
        except (OSError, subprocess.CalledProcessError) as e:
            raise SchedulerError(
                f"{self._python} cannot start the job's supervisor ({e}): see {submission.log_folder}/supervisor.log"
            ) from e
        finally:
            os.close(fd)


def _state_of(written: dict[str, object], *, live: bool, cancelled: bool, task_id: str) -> TaskState:
    phase = TaskPhase(written.get("phase", "pending"))
    exit_code = written.get("exit_code")
    restarts = written.get("restarts", 0)
    assert isinstance(restarts, int)
    assert exit_code is None or isinstance(exit_code, int)
    if live and phase is not TaskPhase.ENDED:
        return TaskState(phase=phase, restarts=restarts, task_id=task_id)
    ending, reason = (Ending.CANCELLED, "cancelled") if cancelled else _ending(phase, exit_code)
    return TaskState(
        phase=TaskPhase.ENDED, ending=ending, reason=reason, exit_code=exit_code, restarts=restarts, task_id=task_id
    )


def _ending(phase: TaskPhase, exit_code: int | None) -> tuple[Ending, str]:
    """Why a task of a job without processes, or one that the supervisor saw end, is over."""
    if phase is TaskPhase.RUNNING:
        return Ending.KILLED, "its processes are gone without an exit status (killed, or the machine restarted)"
    if phase is TaskPhase.PENDING:
        return Ending.LOST, "it was never started: the job's supervisor is gone"
    if exit_code is None or exit_code == EXIT_RESUMABLE:
        # By somebody else than us: TERM to the supervisor, which otherwise starts a resumable task again.
        return Ending.CANCELLED, "cancelled"
    # The batch script is a shell: a worker killed by signal N ends it with 128 + N.
    number = -exit_code if exit_code < 0 else exit_code - 128
    if 0 < number < signal.NSIG:
        return Ending.KILLED, f"killed by {signal.Signals(number).name}"
    return Ending.EXITED, f"exit status {exit_code}" if exit_code else "ended"


def process_group(submission: Submission) -> int | None:
    """That of the job's processes, which is also its SLURM_ARRAY_JOB_ID; None before it has begun."""
    try:
        return int((submission.folder / GROUP_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
