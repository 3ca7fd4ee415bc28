"""Finding who does the work: a live job that is at it already is joined, the rest is submitted.

No work is submitted that a live job is at. A scheduler or a file system that does not answer is asked again after
growing waits, while the run goes on recording what its other jobs commit. Knows no dagster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from kd_assets.contract import JobFile
from kd_assets.durable import atomic_write
from kd_assets.errors import (
    NO_ANSWER,
    ContractError,
    SchedulerError,
    SchedulerUnreachableError,
    StorageUnavailableError,
)
from kd_assets.orchestration.driving.following import FollowedJob, described
from kd_assets.orchestration.driving.results import Look, Results
from kd_assets.orchestration.driving.settling import left_out_in_words, n_durable_files
from kd_assets.orchestration.driving.waiting import Log, Storage, Waits, scheduler_waits, storage_waits
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.retries import Asked, FailureClass, NodeFaults
from kd_assets.scheduler import JobSpec, Scheduler, Submission, spread, submission_key
from kd_assets.scheduler.submissions import followed_by, is_cancelled

MakeJobFile = Callable[[PlannedWork, JobSpec, tuple[tuple[int, ...], ...], Submission, Asked], JobFile]
"""The job file of a new submission: its work, what it asks for, which units each task works through."""


class FollowerMarks:
    """Makes it known to other runs which jobs this one waits for, for as long as it is entered."""

    def __init__(self, run_id: str, storage: Storage) -> None:
        self._run_id, self._storage = run_id, storage
        self._marks = ExitStack()
        self._marked: set[Submission] = set()
        self._not_marked: set[Submission] = set()
        """Those whose folder could not be written."""

    def __enter__(self) -> FollowerMarks:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._marks.close()

    def mark(self, submission: Submission) -> None:
        """Once, since the lock that says so is this process's own."""
        if submission in self._marked:
            return
        what = ("follower", submission)
        try:
            self._marks.enter_context(followed_by(submission, self._run_id))
        except NO_ANSWER as e:  # it is followed all the same
            self._storage.failed(what, e)
            self._not_marked.add(submission)
            return
        self._storage.reached(what)
        self._marked.add(submission)
        self._not_marked.discard(submission)

    def mark_the_rest(self) -> None:
        """Try those again that could not be marked."""
        for submission in list(self._not_marked):
            if self._storage.is_due(("follower", submission)):
                self.mark(submission)


@dataclass(slots=True, eq=False)
class _Pending:
    """Results that nobody makes yet, and when to look again for somebody who does."""

    paths: set[str]
    asked: Asked
    n_tasks: int
    """Of a job that is submitted for them, at most."""
    waits: Waits
    """For the scheduler."""
    looks: Waits
    """For results of which nobody can tell whether they are there."""


class Joiner:
    """Puts results into the hands of jobs."""

    def __init__(
        self,
        work: PlannedWork,
        recipe: str,
        scheduler: Scheduler,
        results: Results,
        *,
        concurrency: int,
        make_job_file: MakeJobFile,
        node_faults: NodeFaults,
        marks: FollowerMarks,
        log: Log,
        storage: Storage,
        clock: Callable[[], float],
    ) -> None:
        self._work, self._recipe, self._scheduler, self._results = work, recipe, scheduler, results
        self._concurrency, self._make_job_file, self._marks = concurrency, make_job_file, marks
        self._node_faults = node_faults
        self._log, self._storage, self._clock = log, storage, clock
        self._pending: dict[Asked, _Pending] = {}
        self._not_joined: set[Submission] = set()
        """Live jobs of another version of kd_assets, each of which is logged once."""
        self.jobs: dict[Submission, FollowedJob] = {}
        """All that were joined or submitted."""
        self.submitting: Submission | None = None
        """The job that the scheduler is being asked to take."""

    def add(self, paths: Iterable[str], asked: Asked, n_tasks: int) -> None:
        """Have these results made: by a live job that is at them already, or by a new one of at most `n_tasks` tasks.
        What waits for a scheduler that does not answer becomes one job with what asks for the same."""
        if (pending := self._pending.get(asked)) is None:
            waits = scheduler_waits(self._scheduler.poll_interval_s)
            self._pending[asked] = _Pending(set(paths), asked, n_tasks, waits, storage_waits())
        else:
            pending.paths.update(paths)
            pending.n_tasks += n_tasks

    def try_due(self) -> bool:
        """Try to find or start a job for what has none; returns whether any job was joined or submitted."""
        n_before = len(self.jobs)
        for pending in list(self._pending.values()):
            now = self._clock()
            if pending.waits.is_due(now) and pending.looks.is_due(now) and self._storage.is_due(pending):
                self._try(pending)
            if not pending.paths:
                del self._pending[pending.asked]
                self._storage.forget(pending)
        return len(self.jobs) > n_before

    def _try(self, pending: _Pending) -> None:
        if pending.waits.n_failures:  # what was committed meanwhile needs no scheduler to be recorded
            self._look(pending)
        try:
            self._put_into_hands(pending)
        except NO_ANSWER as e:
            if not _is_about_files(e):
                self._wait_for_the_scheduler(pending, e)
            elif self._storage.failed(pending, e):
                self._give_up(pending, FailureClass.WORK, f"no job can be started: {e}")
        except SchedulerError as e:
            left_out = left_out_in_words(pending.asked.excluded_nodes, self._node_faults)
            self._give_up(pending, FailureClass.IMPOSSIBLE, f"{e}{left_out}")
        else:
            pending.waits = scheduler_waits(self._scheduler.poll_interval_s)
            self._storage.reached(pending)
            pending.looks.failed(self._clock())  # for what is left, if anything is

    def _wait_for_the_scheduler(self, pending: _Pending, why: Exception) -> None:
        if not pending.waits.n_failures:
            self._log.warning(
                f"the scheduler does not answer ({why}); nothing is submitted before it does, and it is asked again"
            )
        pending.waits.failed(self._clock())

    def _put_into_hands(self, pending: _Pending) -> None:
        with self._scheduler.deciding(self._recipe, self._work.kind):
            for submission in self._scheduler.live(self._recipe, self._work.kind):
                # One that is being cancelled goes on for a while; leases keep it and its successor apart.
                if submission not in self.jobs and not is_cancelled(submission):
                    self._join(submission, pending)
            if missing := self._look(pending):
                self._submit(self._work.only(lambda output: output.path in missing), pending)

    def _look(self, pending: _Pending) -> set[str]:
        """Record what is there of what nobody makes; returns what is certainly not there."""
        looks = {path: self._results.look(path) for path in sorted(pending.paths)}
        pending.paths.difference_update(p for p, look in looks.items() if look in (Look.RECORDED, Look.GIVEN_UP))
        return {path for path, look in looks.items() if look is Look.MISSING}

    def _give_up(self, pending: _Pending, failure: FailureClass, cause: str) -> None:
        self.submitting = None
        self._results.give_up_all(sorted(pending.paths), failure, cause)
        pending.paths.clear()

    # ------------------------------------------------------------------ joining

    def _join(self, submission: Submission, pending: _Pending) -> None:
        """Follow a job that is at some of this work already, whoever started it: the work of a run that was killed is
        found here, whatever it has committed since."""
        try:
            heard = FollowedJob.of(submission)
        except ContractError as e:
            if submission not in self._not_joined:
                self._not_joined.add(submission)
                self._log.warning(f"{described(self._scheduler, submission)} cannot be joined: {e}")
            return
        heard.read(lambda job, event: None)
        # A task that has said its last word leaves behind nothing more, though its job may not be gone yet.
        mine = {
            o.path: task
            for task, _, o in heard.outputs()
            if o.path in pending.paths and not heard.reports[task].is_final
        }
        if not mine:
            return
        job = FollowedJob(submission=submission, job=heard.job, spec=heard.spec, is_joined=True)
        for path, task in mine.items():
            self._results.take_up(path, submission, task)
        pending.paths.difference_update(mine)
        _count_files(job)
        self._follow(job)
        if submission == self.submitting:
            self.submitting = None
        words = described(self._scheduler, submission)
        self._log.info(f"{self._work.kind}: found, still running, {words} with {len(mine)} of the results")

    def _follow(self, job: FollowedJob) -> None:
        self.jobs[job.submission] = job
        self._marks.mark(job.submission)

    # ------------------------------------------------------------------ submitting

    def _submit(self, work: PlannedWork, pending: _Pending) -> None:
        units, asked = work.units, pending.asked
        assignment = spread([u.n_tokens for u in units], pending.n_tasks)
        spec = JobSpec(
            key=submission_key(work.kind, self._recipe, units),
            recipe=self._recipe,
            kind=work.kind,
            n_tasks=len(assignment),
            concurrency=self._concurrency,
            resources=asked.resources,
            excluded_nodes=tuple(sorted(asked.excluded_nodes)),
        )
        made: list[FollowedJob] = []

        def write_job_file(new: Submission) -> None:
            job_file = self._make_job_file(work, spec, assignment, new, asked)
            atomic_write(new.job_file, job_file.to_json().encode())
            made.append(FollowedJob(submission=new, job=job_file, spec=spec))
            _count_files(made[-1])
            # From before anything is submitted: a termination may come while the scheduler is being asked.
            self.submitting = new
            self._marks.mark(new)

        submission = self._scheduler.submit(spec, write_job_file)
        job = made[-1]
        for task, unit_indexes in enumerate(assignment):
            for output in [o for index in unit_indexes for o in units[index].outputs]:
                self._results.take_up(output.path, submission, task)
                pending.paths.discard(output.path)
        self._follow(job)
        self.submitting = None
        self._log.info(
            f"{work.kind}: submitted {described(self._scheduler, submission)} for {len(units)} partitions in "
            f"{len(assignment)} tasks"
        )


def _is_about_files(error: Exception) -> bool:
    """Whether it is files that do not answer, those of a scheduler's jobs included, and not the scheduler."""
    return not isinstance(error, SchedulerUnreachableError) or isinstance(error.__cause__, StorageUnavailableError)


def _count_files(job: FollowedJob) -> None:
    """Note how far the results of each task are, before it goes on."""
    for task in job.reports:
        try:
            job.n_files_before[task] = n_durable_files(job, task)
        except NO_ANSWER:  # then its first failure counts as one with progress, at most
            continue
