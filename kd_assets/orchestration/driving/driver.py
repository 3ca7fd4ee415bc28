"""Getting missing results made: join the jobs that are at it, submit the rest, follow all, retry.

The rules: a result that is committed is recorded and never computed; no work is submitted that a live job is at; every
result that was asked for ends either recorded or named with its cause; recording never waits for the scheduler; a
termination cancels the jobs that nobody else waits for, while any other death of this process leaves them running to be
found again.

This is the loop. Who does the work is found in `joining`; what jobs say is heard in `listening`; what becomes of an
ended task's results is settled in `settling`; `results` keeps the account. Knows no dagster: what it asks of its run
comes as `Callbacks`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable

from kd_assets.errors import NO_ANSWER, SchedulerError
from kd_assets.orchestration.driving.callbacks import Callbacks
from kd_assets.orchestration.driving.following import FollowedJob, described
from kd_assets.orchestration.driving.joining import FollowerMarks, Joiner, MakeJobFile
from kd_assets.orchestration.driving.listening import Listener
from kd_assets.orchestration.driving.progress import Progress
from kd_assets.orchestration.driving.results import FailedResult, Results
from kd_assets.orchestration.driving.settling import Settler
from kd_assets.orchestration.driving.waiting import STORAGE_PATIENCE_S, Storage, scheduler_waits
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.retries import Asked, FailureClass, NodeFaults
from kd_assets.scheduler import Scheduler, Submission
from kd_assets.scheduler.submissions import followers

EVENT_INTERVAL_S = 0.5
"""How often event files are read; the scheduler is asked at its own interval."""
CANCELED_INTERVAL_S = 30.0
"""How often it is asked whether the run is cancelled, of which a signal may not have come."""
LAST_WORDS_WAIT_S = 5.0
"""How long tasks whose results are all there may take to say what they used."""


class Driver:
    """One kind of work of one run, from what is missing to what is there or given up."""

    def __init__(
        self,
        work: PlannedWork,
        recipe: str,
        scheduler: Scheduler,
        callbacks: Callbacks,
        *,
        asked: Asked,
        n_tasks: int,
        concurrency: int,
        make_job_file: MakeJobFile,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        storage_patience_s: float = STORAGE_PATIENCE_S,
    ) -> None:
        """`asked`: what a job asks for at first; it has at most `n_tasks` tasks, `concurrency` of them at once."""
        self._work, self._scheduler, self._callbacks = work, scheduler, callbacks
        self._asked, self._n_tasks, self._clock, self._sleep = asked, n_tasks, clock, sleep
        log = callbacks.log
        self._log = log
        self.failures: Counter[FailureClass] = Counter()
        """What kept tasks from their results, healed or not: a task counts once for each class."""
        self.node_faults = NodeFaults()
        """Which nodes were at fault."""
        storage = Storage(log, clock, patience_s=storage_patience_s)
        self._progress = Progress(work, log=log, clock=clock)
        self._results = Results(work, callbacks.record, storage, self._progress)
        self._marks = FollowerMarks(callbacks.run_id, storage)
        self._joiner = Joiner(
            work,
            recipe,
            scheduler,
            self._results,
            concurrency=concurrency,
            make_job_file=make_job_file,
            node_faults=self.node_faults,
            marks=self._marks,
            log=log,
            storage=storage,
            clock=clock,
        )
        self._listener = Listener(
            scheduler, self._results, self._progress, self.failures, log=log, storage=storage, clock=clock
        )
        self._settler = Settler(
            scheduler, self._results, self.failures, self.node_faults, log=log, storage=storage, clock=clock
        )
        self._polling = scheduler_waits(scheduler.poll_interval_s)
        self._next_poll = 0.0
        self._next_canceled = clock() + CANCELED_INTERVAL_S
        self._queue_words: dict[Submission, str] = {}
        """The last thing that was logged of each job's queueing."""

    @property
    def failed(self) -> list[FailedResult]:
        """Wanted results that will not be there."""
        return self._results.failed

    @property
    def _jobs(self) -> dict[Submission, FollowedJob]:
        return self._joiner.jobs

    def run(self) -> None:
        """Returns when every wanted result is recorded or in `failed`."""
        with self._marks:
            try:
                self._joiner.add([o.path for u in self._work.units for o in u.outputs], self._asked, self._n_tasks)
                while self._results.are_open():
                    if self._look() and self._results.are_open():
                        self._sleep(min(EVENT_INTERVAL_S, self._scheduler.poll_interval_s))
                    self._end_if_canceled()
                self._hear_last_words()
                self._listener.pass_on_logs(at_once=True)
            except self._callbacks.interrupts:
                self._stop()
                raise
            finally:
                self._callbacks.flush()
            for job in self._jobs.values():
                self._callbacks.observe(job, job.failures)

    def _look(self) -> bool:
        """One round over all jobs; returns whether it took in all there was to read."""
        self._callbacks.raise_lost_interrupt()
        if self._joiner.try_due():
            self._next_poll = 0.0
        if self._clock() >= self._next_poll:
            self._poll()
        has_read_all = True
        for job in list(self._jobs.values()):
            if self._listener.read(job):
                self._settler.settle(job)
            else:
                has_read_all = False  # what its tasks have said last may not have been read yet
        self._listener.record_announced()
        self._callbacks.flush()
        self._progress.tell()
        self._listener.pass_on_logs()
        for asked, to_retry in self._settler.take_retries().items():
            self._joiner.add(to_retry.paths, asked, to_retry.n_tasks)
        return has_read_all

    def _end_if_canceled(self) -> None:
        """As an interrupt would: whoever marks a run as cancelled whose code server is gone sends none."""
        if self._clock() < self._next_canceled:
            return
        self._next_canceled = self._clock() + CANCELED_INTERVAL_S
        if self._callbacks.is_canceled():
            self._log.warning("this run was cancelled, and nothing else has told its process")
            raise self._callbacks.interrupts[0]

    def _poll(self) -> None:
        """Ask the scheduler what it knows of the jobs that are to make open results."""
        self._marks.mark_the_rest()
        active = [submission for submission in self._jobs if self._results.has_open(submission)]
        now, interval_s = self._clock(), self._scheduler.poll_interval_s
        if not active:
            self._next_poll = now + interval_s
            return
        if sick_nodes := self.node_faults.sick_nodes:
            self._scheduler.keep_from(active, sick_nodes)
        try:
            poll = self._scheduler.poll(active)
            unanswered = poll.unreachable
        except NO_ANSWER as e:  # of its own records
            unanswered = str(e)
        n_unanswered = self._polling.n_failures
        if unanswered is not None:
            if not n_unanswered:
                self._log.warning(
                    f"the scheduler does not answer ({unanswered}); nothing follows from it, the jobs are asked after "
                    "again and again"
                )
            self._polling.failed(now)
            self._next_poll = max(self._polling.next_at, now + interval_s)
            return
        if n_unanswered:
            self._log.info(f"the scheduler answers again, after {n_unanswered} questions without answer")
            self._polling = scheduler_waits(interval_s)
        self._next_poll = now + interval_s
        for notice in poll.notices:
            self._log.warning(notice)
        for submission, states in poll.states.items():
            job = self._jobs[submission]
            job.see(states)
            if (words := job.queue_in_words()) != self._queue_words.get(submission):
                self._queue_words[submission] = words
                self._log.info(f"{described(self._scheduler, submission)}: {words}")

    def _hear_last_words(self) -> None:
        """Let the tasks whose results are all there say what they used, and be gone."""
        deadline = self._clock() + LAST_WORDS_WAIT_S
        mine = [job for job in self._jobs.values() if not job.is_joined]
        while any(job.may_say_more() for job in mine) and self._clock() < deadline:
            self._sleep(0.1)
            for job in mine:
                self._listener.read(job)

    def _stop(self) -> None:
        """Cancel what nobody else waits for, when it is this run that somebody wants to end."""
        if not self._callbacks.is_terminated():
            self._log.warning(
                "this process is stopped, its run was not terminated: the jobs go on, and the next run finds them"
            )
            return
        submitted = dict.fromkeys(self._jobs)
        submitting = self._joiner.submitting
        # Without its spec nothing of it was submitted, and nobody will.
        if submitting is not None and os.path.exists(submitting.spec_file):
            submitted[submitting] = None
        cancelled = [submission for submission in submitted if not self._is_waited_for(submission)]
        if not cancelled:
            return
        try:
            self._scheduler.cancel(cancelled)
        except SchedulerError as e:
            self._log.error(f"terminated, and its jobs may go on: {e}")
            raise
        self._log.info(f"nothing runs any more of {', '.join(described(self._scheduler, s) for s in cancelled)}")

    def _is_waited_for(self, submission: Submission) -> bool:
        """Whether another run waits for a job; says what becomes of it."""
        try:
            others = [run for run, waits in followers(submission).items() if waits and run != self._callbacks.run_id]
        except NO_ANSWER as e:
            self._log.warning(
                f"{described(self._scheduler, submission)} goes on: who waits for it cannot be read ({e})"
            )
            return True
        if others:
            self._log.warning(f"{described(self._scheduler, submission)} goes on: run {others[0]} waits for it, too")
        else:
            self._log.warning(f"terminated: cancelling {described(self._scheduler, submission)}")
        return bool(others)
