"""Jobs on a SLURM cluster: one array a submission, found again by name, followed with one query for all of them.

Four rules, each learnt from how others fail:
- The intent is on disk before sbatch runs, under a name that no other array ever has. An answer that was lost is looked
  up by that name, and only when the cluster has answered without it for a while is the array submitted again.
- A job is its name. Ids are reused after a controller lost its state; they address commands, and identify nothing.
- No answer is no information: the last known state stands. A task that a cluster which answers does not know is lost
  after a grace period, and not before. A disk that fails is no answer, either.
- A state says why a task ended, never that its work is done.

`records` has what is known of a submission, `submitter` submits, `task_states` finds out what each task is in, and
`interventions` what to do about it; `queue` is the shared squeue, `accounting` sacct, `commands` are SLURM's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kd_assets.contract import JobKind
from kd_assets.durable import storage_errors
from kd_assets.errors import (
    JobFilesUnavailableError,
    SchedulerError,
    SchedulerMisusedError,
    SchedulerUnreachableError,
    StorageUnavailableError,
)
from kd_assets.locks import try_locked
from kd_assets.scheduler.folder import Submission
from kd_assets.scheduler.job import AccountedAttempt, JobSpec, Poll, TaskPhase, TaskState
from kd_assets.scheduler.slurm.accounting import Accounting
from kd_assets.scheduler.slurm.commands.client import Slurm
from kd_assets.scheduler.slurm.commands.runners import CommandRunner, cluster_asked, command_runner_for
from kd_assets.scheduler.slurm.commands.states import base_state, ending_of, may_come_back
from kd_assets.scheduler.slurm.interventions import Interventions
from kd_assets.scheduler.slurm.profile import Profile
from kd_assets.scheduler.slurm.queue import Queue, SharedQueue
from kd_assets.scheduler.slurm.records import Array, KnownJob
from kd_assets.scheduler.slurm.submitter import SlurmSubmitter
from kd_assets.scheduler.slurm.task_states import explain_by_accounting, follow_by_id, states_by_queue
from kd_assets.scheduler.submissions import (
    SubmissionFolders,
    is_cancelled,
    is_there,
    mark_cancelled,
    storage_as_no_answer,
)

CANCEL_PATIENCE_S = 240.0
"""How long `cancel` tries: below Dagster's own patience with a run that is terminated (`cancel_timeout_seconds`)."""
CANCEL_POLL_S = (0.5, 5.0)
"""First and longest pause between two looks at a job that is being cancelled."""
SCANCEL_AGAIN_S = 30.0
"""A task that traps TERM has as long as SLURM's KillWait, 30 s by default."""


class SlurmScheduler:
    """Submits to one cluster; `jobs_folder` must be seen by its nodes under the same path."""

    def __init__(
        self,
        jobs_folder: Path,
        *,
        profile: Profile,
        script: Path,
        python: str,
        secrets_file: Path | None = None,
        runner: CommandRunner | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folders, self._profile, self._script = SubmissionFolders(jobs_folder), profile, script
        self._clock, self._sleep = clock, sleep
        self._slurm = Slurm(runner or command_runner_for(profile), timeout_s=profile.command_timeout_s)
        self._queue = SharedQueue(jobs_folder / ".slurm", _queue_name(profile), self._slurm, clock)
        self._accounting = Accounting(self._slurm)
        self._interventions = Interventions(self._slurm, clock=clock, poll_interval_s=profile.poll_interval_s)
        self._submitter = SlurmSubmitter(
            self._slurm,
            self._accounting,
            jobs_folder=jobs_folder,
            profile=profile,
            script=script,
            python=python,
            secrets_file=secrets_file,
            clock=clock,
        )
        self._jobs: dict[Submission, KnownJob] = {}

    @property
    def poll_interval_s(self) -> float:
        return self._profile.poll_interval_s

    @property
    def visibility_grace_s(self) -> float:
        return self._profile.visibility_grace_s

    def deciding(self, recipe: str, kind: JobKind) -> AbstractContextManager[None]:
        """See `Scheduler`."""
        return self._folders.deciding(recipe, kind)

    # ------------------------------------------------------------------ submitting

    def submit(self, spec: JobSpec, write_job_file: Callable[[Submission], object]) -> Submission:
        """Submit what the site takes now; `poll` submits the rest.

        Raises SchedulerError with SLURM's own words for a request that can never be granted.
        """
        if not self._script.is_file():
            raise SchedulerError(f"the batch script {self._script} is missing: install kd-assets anew")
        self.preview(spec)  # raises what sbatch could not be asked, while nothing is written

        def prepare(new: Submission) -> None:
            write_job_file(new)
            self._submitter.prepare(new, spec)

        submission = self._folders.create(spec, prepare)
        job = self._known(submission)
        self._submitter.submit_more(job)
        refusal = next((a.refused for a in job.arrays if a.impossible), None)
        if refusal is not None and all(a.is_refused for a in job.arrays):
            with suppress(JobFilesUnavailableError):  # whoever finds it sees the refusal, too
                mark_cancelled(submission)
            raise SchedulerError(f"SLURM refuses {spec.name}: {refusal}")
        return submission

    def preview(self, spec: JobSpec) -> list[list[str]]:
        """The command lines that `submit` would run now, with `NUMBER` and `NONCE` where each submission differs."""
        return self._submitter.preview(spec)

    def environment_text(self, spec: JobSpec) -> str:
        """What every task sources before it starts."""
        return self._submitter.environment_text(spec)

    # ------------------------------------------------------------------ finding and following

    @storage_as_no_answer()
    def live(self, recipe: str, kind: JobKind) -> list[Submission]:
        """Those of which a task may still run or be submitted. It only looks: what is to be done about a job is for
        those who follow it. Raises SchedulerUnreachableError: then nobody knows."""
        candidates = [
            s
            for s in self._folders.may_live(recipe, kind)
            if is_there(s.arrays_folder) and not self._was_seen_to_be_over(self._known(s))
        ]
        if not candidates:
            return []
        states = self._look_at(candidates, acts=False)
        return [s for s in candidates if any(t.phase is not TaskPhase.ENDED for t in states[s].values())]

    def poll(self, submissions: Sequence[Submission]) -> Poll:
        """The states of all tasks by one squeue, and one sacct for those that it no longer shows."""
        try:
            states = self._look_at(submissions, acts=True)
        except SchedulerUnreachableError as e:
            return Poll(states={s: self._last_known(s) for s in submissions}, unreachable=str(e))
        return Poll(states=states, notices=[n for s in submissions for n in self._known(s).take_notices()])

    @storage_as_no_answer()
    def _look_at(self, submissions: Sequence[Submission], *, acts: bool) -> dict[Submission, dict[int, TaskState]]:
        """`acts`: also submit what is left, release what is held, keep away from failed nodes."""
        queue = self._queue.ask(max_age_s=0.9 * self.poll_interval_s)
        jobs = [self._known(submission) for submission in submissions]
        for job in jobs:
            job.read()
            if acts:
                self._submitter.settle(job, queue)
                self._submitter.submit_more(job)
        states = {j: states_by_queue(j, queue, absence_grace_s=self._profile.absence_grace_s) for j in jobs}
        explain_by_accounting(states, queue, self._accounting)
        follow_by_id(states, queue, self._slurm)
        if acts:
            for job, tasks in states.items():
                self._interventions.release_or_give_up(job, tasks, queue)
            self._interventions.leave_failed_nodes(states)
            for job, tasks in states.items():
                self._interventions.keep_from_nodes(job, tasks, queue)
        for job, tasks in states.items():
            job.remember(tasks)
            self._note_whether_over(job)
        return {job.submission: tasks for job, tasks in states.items()}

    def keep_from(self, submissions: Sequence[Submission], nodes: Iterable[str]) -> None:
        """See `Scheduler`."""
        for job in map(self._known, submissions):
            job.keep_from = job.keep_from.union(nodes)

    def _was_seen_to_be_over(self, job: KnownJob) -> bool:
        """By anybody, without a question to the cluster."""
        job.read()
        job.is_over = len(job.endings) == job.spec.n_tasks or (not job.arrays and is_cancelled(job.submission))
        if job.is_over:
            self._folders.mark_over(job.submission)
        return job.is_over

    def _note_whether_over(self, job: KnownJob) -> None:
        """One that is over is not looked at any more when live jobs are looked for; unless it turns up again."""
        is_over = all(state.phase is TaskPhase.ENDED for state in job.states.values())
        if is_over and not job.is_over:
            self._folders.mark_over(job.submission)
        elif job.is_over and not is_over:
            self._folders.mark_live(job.submission)
        job.is_over = is_over

    def _last_known(self, submission: Submission) -> dict[int, TaskState]:
        job = self._known(submission)
        unknown = TaskState(phase=TaskPhase.PENDING, reason="not known yet: the cluster does not answer")
        try:
            with suppress(JobFilesUnavailableError):  # then what was read before has to do
                job.read()
            n_tasks = job.spec.n_tasks
        except JobFilesUnavailableError:
            return {}
        return {t: job.endings.get(t) or job.states.get(t) or unknown for t in range(n_tasks)}

    # ------------------------------------------------------------------ ending

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """scancel; returns once each of their tasks was seen to end, or the cluster has answered for `absence_grace_s`
        without it, be it by name, by comment or by id: one that is only not shown for a moment must not go on.

        Raises SchedulerUnreachableError when the cluster does not answer for CANCEL_PATIENCE_S, or when what must be
        written cannot be, and SchedulerMisusedError at once. The submissions stay marked, so that nothing more of them
        is submitted.
        """
        deadline = self._clock() + CANCEL_PATIENCE_S
        pause_s, next_scancel = CANCEL_POLL_S[0], 0.0
        seen, alive = _Seen(), dict[str, str]()
        unmarked: Sequence[Submission] = submissions
        while self._clock() < deadline:
            unmarked, trouble = _mark_cancelled(unmarked)
            try:
                alive, doubt = self._alive(submissions, seen)
                trouble = trouble or doubt
                if alive and self._clock() >= next_scancel:
                    next_scancel = self._clock() + SCANCEL_AGAIN_S
                    self._slurm.cancel(sorted(alive))
                elif not (alive or trouble):
                    return
            except SchedulerUnreachableError as e:
                trouble = str(e)
            except SchedulerMisusedError as e:
                raise SchedulerMisusedError(f"the jobs may go on: {e}. {self._by_hand(submissions)}") from e
            self._sleep(pause_s)
            pause_s = min(1.5 * pause_s, CANCEL_POLL_S[1])
        raise SchedulerUnreachableError(
            f"the jobs were asked to end and are not gone after {CANCEL_PATIENCE_S:.0f} s"
            f"{f': {trouble}' if trouble else ''}. {_in_words(alive)}{self._by_hand(submissions, alive)}"
        )

    def begin_cancelling(self, submissions: Sequence[Submission]) -> None:
        """scancel, once; they are marked where they can be, so that nothing more of them is submitted.

        Raises SchedulerUnreachableError when the cluster does not answer.
        """
        _mark_cancelled(submissions)
        if alive := self._alive(submissions, _Seen())[0]:
            self._slurm.cancel(sorted(alive))

    def _by_hand(self, submissions: Sequence[Submission], alive: Iterable[str] = ()) -> str:
        names = ",".join(array.name for s in submissions for array in self._arrays_of(s))
        return f"By hand: scancel --name={names}" + "".join(f"; scancel {job_id}" for job_id in sorted(alive))

    def _alive(self, submissions: Sequence[Submission], seen: _Seen) -> tuple[dict[str, str], str]:
        """Id of each array that has a task alive now, and what that is in; and why there may be more; empty where there
        are not. `seen`: over all looks of one cancellation."""
        queue = self._queue.ask(max_age_s=0.0)
        alive: dict[str, str] = {}
        doubt = ""
        for job in map(self._known, submissions):
            try:
                job.read()
                self._submitter.settle(job, queue)
                with try_locked(job.submission.submit_lock) as is_alone:
                    # It may be past the mark.
                    doubt = doubt if is_alone else f"another process is submitting tasks of {job.submission.folder}"
                job.read()
            except (JobFilesUnavailableError, StorageUnavailableError) as e:
                doubt = str(e)
            for array in job.arrays:
                for row in queue.rows.get(array.name, {}).values():
                    if ending_of(row.state, row.reason, row.exit_code) is None:
                        alive[str(row.job_id)] = base_state(row.state) + (f" on {row.node}" if row.node else "")
                if array.is_refused:
                    continue
                if not (array.is_answered and queue.at > array.at):
                    doubt = f"whether sbatch has submitted {array.name} is not known yet"
                elif not self._has_ended_or_is_shown(job, array, queue, seen):
                    assert array.job_id is not None
                    if self._slurm.live_indices(array.job_id, job.submission.folder):
                        alive[str(array.job_id)] = "under another name"
                        seen.absent_since.pop(array.name, None)
                    since = seen.absent_since.setdefault(array.name, queue.at)
                    if queue.at - since < self._profile.absence_grace_s:
                        doubt = f"SLURM does not show job {array.job_id} ({array.name}), and nobody saw it end"
        return alive, doubt

    def _has_ended_or_is_shown(self, job: KnownJob, array: Array, queue: Queue, seen: _Seen) -> bool:
        """Whether each task of an array is in the queue, or was seen to end by anybody."""
        for task in array.tasks:
            row = queue.find(array, task)
            if row is not None and ending_of(row.state, row.reason, row.exit_code) is not None:
                seen.ended.add((array.name, task))

        def unknown() -> list[int]:
            known = {task for name, task in seen.ended if name == array.name} | job.endings.keys()
            return [task for task in array.tasks if task not in known and queue.find(array, task) is None]

        if unknown():
            for last in self._accounting.rows([array]):
                if ending_of(last.state, last.reason, last.exit_code) is not None and not may_come_back(last.state):
                    seen.ended.add((array.name, array.first_task + (last.index or 0)))
        return not unknown()

    # ------------------------------------------------------------------ words and files

    def accounting(self, submission: Submission) -> dict[int, list[AccountedAttempt]]:
        """See `Scheduler`: what sacct has by now."""
        return self._accounting.attempts([a for a in self._arrays_of(submission) if not a.is_refused])

    def describe(self, submission: Submission) -> str:
        ids = [str(a.job_id) for a in self._arrays_of(submission) if a.job_id is not None]
        named = f"SLURM job {', '.join(ids)}" if ids else "a SLURM job"
        return f"{named} ({submission.folder})"

    def log_file(self, submission: Submission, task_index: int) -> Path:
        """See `Scheduler`; the folder of all of them while its name is not known."""
        try:
            array = self._known(submission).array_with(task_index)
        except JobFilesUnavailableError:
            array = None
        if array is None or array.job_id is None:
            return submission.log_folder
        return submission.slurm_log(array.job_id, task_index - array.first_task)

    @storage_as_no_answer()
    def submitted_at(self, submission: Submission) -> float:
        if arrays := self._arrays_of(submission):
            return min(a.at for a in arrays)
        with storage_errors(submission.spec_file, "look at"):
            return submission.spec_file.stat().st_mtime

    def _arrays_of(self, submission: Submission) -> list[Array]:
        """As the last look found them; where there was none yet, or it found nothing, as they are on disk."""
        job = self._known(submission)
        if not job.arrays:
            with suppress(JobFilesUnavailableError):
                job.read()
        return job.arrays

    def _known(self, submission: Submission) -> KnownJob:
        return self._jobs.setdefault(submission, KnownJob(submission))


def _queue_name(profile: Profile) -> str:
    """Two processes that ask different clusters do not share an answer."""
    cluster = cluster_asked(profile)
    return f"{profile.name}@{cluster}".replace("/", "_") if cluster else profile.name


@dataclass(slots=True)
class _Seen:
    """What the looks of one cancellation have seen so far."""

    ended: set[tuple[str, int]] = field(default_factory=set)
    """Array and task."""
    absent_since: dict[str, float] = field(default_factory=dict)
    """Array that the cluster does not know, without that anybody saw its end → since when."""


def _in_words(alive: Mapping[str, str]) -> str:
    """What still runs, by job id; empty where nothing is known to."""
    jobs = ", ".join(f"{job_id} ({state})" for job_id, state in sorted(alive.items()))
    return f"Still there: {jobs}. " if jobs else ""


def _mark_cancelled(submissions: Sequence[Submission]) -> tuple[list[Submission], str]:
    """Those that cannot be marked now, and why; empty where all could be."""
    unmarked, trouble = [], ""
    for submission in submissions:
        try:
            mark_cancelled(submission)
        except JobFilesUnavailableError as e:
            unmarked.append(submission)
            trouble = str(e)
    return unmarked, trouble
