"""The embedded scheduler: job arrays on this machine, as detached process groups running `slurm/task.sbatch`.

It behaves as SLURM would: the job outlives whoever submitted it, is found again by its key, restarts a task that asks
for it (exit status 75), and cancelling sends TERM, then KILL to the whole group. One small supervisor process a job
(`kd_assets.scheduler.local.supervisor`) starts the tasks.

Whether a job lives is the answer to one question: is its lock file locked? The lock is taken before anybody can find
the job and inherited by the supervisor and by every process of its tasks, so it is free exactly when all of them are
gone, however they went; a process id is never trusted, since ids are reused.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

from kd_assets.contract import JobKind
from kd_assets.durable import storage_errors
from kd_assets.errors import EXIT_RESUMABLE, JobFilesUnavailableError, SchedulerError
from kd_assets.locks import is_locked, locked
from kd_assets.scheduler.folder import Submission
from kd_assets.scheduler.job import AccountedAttempt, Ending, JobSpec, Poll, TaskPhase, TaskState
from kd_assets.scheduler.submissions import (
    SubmissionFolders,
    is_cancelled,
    is_there,
    mark_cancelled,
    read_json,
    read_spec,
    storage_as_no_answer,
    write_json,
)

KILL_WAIT_S = 30.0
"""Between TERM and KILL when a job is cancelled, as SLURM's KillWait."""


class LocalScheduler:
    """Runs jobs under `jobs_folder`, which must be on a local disk: only there do children inherit a lock."""

    poll_interval_s = 0.2
    visibility_grace_s = 0.0

    def __init__(
        self,
        jobs_folder: Path,
        *,
        script: Path,
        python: str = sys.executable,
        kill_wait_s: float = KILL_WAIT_S,
    ) -> None:
        self._folders, self._script, self._python = SubmissionFolders(jobs_folder), script, python
        self._kill_wait_s = kill_wait_s
        self._last_states: dict[Submission, dict[int, TaskState]] = {}

    def deciding(self, recipe: str, kind: JobKind) -> AbstractContextManager[None]:
        """See `Scheduler`."""
        return self._folders.deciding(recipe, kind)

    @storage_as_no_answer()
    def live(self, recipe: str, kind: JobKind) -> list[Submission]:
        """All submissions of a recipe's jobs of a kind that still live."""
        alive = []
        for submission in self._folders.may_live(recipe, kind):
            if self.is_live(submission):
                alive.append(submission)
            elif is_there(submission.job_lock):  # not one of SLURM's
                self._folders.mark_over(submission)
        return alive

    def submit(self, spec: JobSpec, write_job_file: Callable[[Submission], object]) -> Submission:
        """Start a job in a folder of its own."""
        if not self._script.is_file():
            raise SchedulerError(f"the batch script {self._script} is missing: install kd-assets anew")
        with ExitStack() as held:
            locks: list[int] = []

            def prepare(new: Submission) -> None:
                write_job_file(new)
                write_json(new.start_file, {"name": spec.name, "script": str(self._script)})
                locks.append(held.enter_context(locked(new.job_lock)))

            submission = self._folders.create(spec, prepare)
            self._start(spec, submission, locks[0])
        return submission

    @storage_as_no_answer()
    def is_live(self, submission: Submission) -> bool:
        """Whether any process of the job is still there."""
        return is_locked(submission.job_lock)

    def poll(self, submissions: Sequence[Submission]) -> Poll:
        """Every task's state. A job whose processes are gone has only ended tasks, whatever was last written."""
        unreachable = None
        for submission in submissions:
            try:
                self._last_states[submission] = self._states(submission)
            except JobFilesUnavailableError as e:
                unreachable = str(e)
        return Poll(states={s: self._last_states.get(s, {}) for s in submissions}, unreachable=unreachable)

    @storage_as_no_answer()
    def _states(self, submission: Submission) -> dict[int, TaskState]:
        live = self.is_live(submission)  # asked first: a state written after a "no" is complete
        written: Mapping[str, dict[str, object]] = read_json(submission.state_file) or {}
        group, cancelled = process_group(submission), is_cancelled(submission)
        return {
            i: _state_of(
                written.get(str(i), {}), live=live, cancelled=cancelled, task_id=f"{group}_{i}" if group else ""
            )
            for i in range(read_spec(submission).n_tasks)
        }

    def accounting(self, submission: Submission) -> dict[int, list[AccountedAttempt]]:
        """Nobody keeps accounts here."""
        return {}

    def describe(self, submission: Submission) -> str:
        return f"local job {submission.folder}"

    def log_file(self, submission: Submission, task_index: int) -> Path:
        return submission.local_log(task_index)

    @storage_as_no_answer()
    def submitted_at(self, submission: Submission) -> float:
        with storage_errors(submission.spec_file, "look at"):
            return submission.spec_file.stat().st_mtime

    def keep_from(self, submissions: Sequence[Submission], nodes: Iterable[str]) -> None:
        """Nothing: there is one node."""

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """TERM to every process of the jobs, KILL to what is left after the kill wait; returns once they are gone.

        A disk on which that cannot be noted does not keep them alive: it is an error once they are gone.
        """
        unmarked: JobFilesUnavailableError | None = None
        for submission in submissions:
            try:
                mark_cancelled(submission)
            except JobFilesUnavailableError as e:
                unmarked = e
            self._cancel(submission)
        if unmarked is not None:
            raise unmarked

    def _cancel(self, submission: Submission) -> None:
        for number, patience_s in ((signal.SIGTERM, self._kill_wait_s), (signal.SIGKILL, 10.0)):
            deadline = time.monotonic() + patience_s
            group = process_group(submission)
            if group is None or not self.is_live(submission):
                return
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                return
            while time.monotonic() < deadline:
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
            elif time.time() - submission.cancelled_mark.stat().st_mtime >= self._kill_wait_s:
                number = signal.SIGKILL
            group = process_group(submission)
            if group is not None and self.is_live(submission):
                with suppress(ProcessLookupError):
                    os.killpg(group, number)

    def _start(self, spec: JobSpec, submission: Submission, lock: int) -> None:
        try:
            with submission.supervisor_log.open("ab") as log:
                # Returns at once: the supervisor forks itself off, so that it is nobody's child and no zombie.
                subprocess.run(
                    [self._python, "-m", "kd_assets.scheduler.local.supervisor", str(submission.folder), str(lock)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(lock,),
                    env={**os.environ, "KD_PYTHON": self._python, "KD_N_PROCESSES": str(spec.resources.n_processes)},
                    check=True,
                )
        except (OSError, subprocess.CalledProcessError) as e:
            raise SchedulerError(
                f"{self._python} cannot start the job's supervisor ({e}): see {submission.supervisor_log}"
            ) from e


def _state_of(written: Mapping[str, object], *, live: bool, cancelled: bool, task_id: str) -> TaskState:
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


@storage_as_no_answer()
def process_group(submission: Submission) -> int | None:
    """That of the job's processes, which is also its SLURM_ARRAY_JOB_ID; None before it has begun."""
    with storage_errors(submission.process_group_file, "read"):
        try:
            return int(submission.process_group_file.read_text())
        except (FileNotFoundError, ValueError):  # ValueError: it is being written
            return None
