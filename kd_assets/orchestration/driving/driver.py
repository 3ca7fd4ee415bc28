"""Getting missing results made: join the jobs that are at it, submit the rest, follow all, retry.

The rules: a result that is committed is recorded and never computed; no work is submitted that a live job is at; every
partition that was asked for ends either recorded or named with its cause; a termination cancels the jobs that nobody
else waits for, while any other death of this process leaves them running to be found again.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg

from kd_assets.contract import Event, JobFile, Output, WorkUnit
from kd_assets.durable import atomic_write
from kd_assets.errors import SchedulerError, SchedulerUnreachableError, StoreError
from kd_assets.orchestration.driving.following import FollowedJob, LogTail, log_tail
from kd_assets.orchestration.planner import PlannedWork, Planner, is_committed
from kd_assets.orchestration.platform import code_commit
from kd_assets.orchestration.recording.job_table import job_observation, task_facts
from kd_assets.orchestration.retries import Asked, Attempts, FailureClass, Retry, classify, decide
from kd_assets.recipes.recipe import Recipe
from kd_assets.scheduler import JobSpec, Resources, Scheduler, Submission, spread, submission_key
from kd_assets.scheduler.submissions import followed_by, followers, is_cancelled, read_spec
from kd_assets.store import count_durable_files

PROGRESS_INTERVAL_S = 10.0
"""How often a task's progress is written to Dagster's log."""
LOG_INTERVAL_S = 2.0
"""How often what tasks print is passed on to Dagster's log."""
EVENT_INTERVAL_S = 0.5
"""How often event files are read; the scheduler is asked at its own interval."""
LONGEST_READ_S = 5.0
"""Of one job's events in one look, however fast its tasks commit: the scheduler and other jobs have their turn, too."""
LONGEST_BACKOFF_S = 120.0
LAST_WORDS_WAIT_S = 5.0
"""How long tasks whose results are all there may take to say what they used."""

T = TypeVar("T")
RecordResult = Callable[[WorkUnit, Output, Mapping[str, Any]], None]
"""Called for each result that a job committed, with what is known of its making."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedResult:
    """A result that is not there, and will not be by anything this run does."""

    partition_key: str
    asset: str
    failure: FailureClass
    cause: str
    log_file: Path | None = None


@dataclass(slots=True)
class _Again:
    """Wanted results that are tried again in one job."""

    paths: set[str] = field(default_factory=set)
    tasks: set[tuple[Submission, int]] = field(default_factory=set)
    """Those that left them behind."""

    @property
    def n_tasks(self) -> int:
        """No more teacher loads than what is left took before."""
        return len(self.tasks)


@dataclass(slots=True)
class _Followed:
    """A job with what this run wants of it."""

    job: FollowedJob
    joined: bool
    """Somebody else submitted it."""
    waits_for: str = ""
    """The last thing that was logged of its queueing."""
    next_progress: dict[int, float] = field(default_factory=dict)
    n_files_before: dict[int, int] = field(default_factory=dict)
    """Task → durable files of its results when this run began to follow it."""
    failures: Counter[FailureClass] = field(default_factory=Counter)
    """Why partitions were left without a result when their task was over."""


class Driver:
    """One kind of work of one run, from what is missing to what is there or given up."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        recipe: Recipe,
        planner: Planner,
        scheduler: Scheduler,
        work: PlannedWork,
        *,
        resources: Resources,
        record: RecordResult,
        flush: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`resources`: what each task asks for at first. `flush` is called after each look, so that what `record` has
        collected reaches Dagster."""
        self._context, self._recipe, self._planner, self._scheduler = context, recipe, planner, scheduler
        self._record, self._flush, self._clock, self._sleep = record, flush, clock, sleep
        self._work, self._resources = work, resources
        self._open: dict[str, tuple[WorkUnit, Output]] = {o.path: (u, o) for u in work.units for o in u.outputs}
        self._jobs: dict[Submission, _Followed] = {}
        self._submitting: Submission | None = None
        """The job that the scheduler is being asked to take."""
        self._announced: set[Submission] = set()
        self._in_hand: dict[str, Submission] = {}
        """Folder of a wanted result → the job that is to make it."""
        self._attempts: dict[str, Attempts] = {}
        self._following = ExitStack()
        self._next_poll = self._next_logs = 0.0
        self._logs = LogTail()
        self._n_unreachable = 0
        self.failed: list[FailedResult] = []
        self.failures: Counter[FailureClass] = Counter()
        """What kept tasks from their results, healed or not: a task counts once for each class."""

    def run(self) -> None:
        """Returns when every wanted result is recorded or in `failed`."""
        asked = Asked(
            resources=self._resources,
            token_budget=self._recipe.teacher.token_budget if self._work.kind == "teacher" else None,
        )
        with self._following:
            try:
                self._join_or_submit(self._work, asked, self._recipe.tasks_of(self._work.kind).n_tasks)
                while self._open:
                    if self._look() and self._open:
                        self._sleep(min(EVENT_INTERVAL_S, self._scheduler.poll_interval_s))
                self._hear_last_words()
                self._next_logs = 0.0
                self._pass_on_logs()
            except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
                self._stop()
                raise
            finally:
                self._flush()
            for followed in self._jobs.values():
                self._context.log_event(job_observation(self._recipe, self._scheduler, followed.job, followed.failures))

    # ------------------------------------------------------------------ joining and submitting

    def _join_or_submit(self, work: PlannedWork, asked: Asked, n_tasks: int) -> None:
        """Put every result of `work` into a job's hands: a live one that is at it already, or a new one of at most
        `n_tasks` tasks."""
        self._patiently(lambda: self._decide_who_does(work, asked, n_tasks))
        self._next_poll = 0.0

    def _decide_who_does(self, work: PlannedWork, asked: Asked, n_tasks: int) -> None:
        wanted = {o.path for u in work.units for o in u.outputs}
        with self._scheduler.deciding(self._recipe.name, work.kind):
            for submission in self._scheduler.live(self._recipe.name, work.kind):
                # One that is being cancelled goes on for a while; leases keep it and its successor apart.
                if submission not in self._jobs and not is_cancelled(submission):
                    self._join(submission, wanted)
            rest = work.only(lambda o: o.path in wanted and o.path not in self._in_hand and not is_committed(o))
            if rest.units:
                self._submit(rest, asked, n_tasks)
        for path in wanted - set(self._in_hand):  # committed meanwhile by somebody
            self._commit(path, None, None)

    def _join(self, submission: Submission, wanted: set[str]) -> None:
        """Follow a job that is at some of this work already, whoever started it: the work of a run that was killed is
        found here, whatever it has committed since."""
        heard = FollowedJob.of(submission)
        heard.read(lambda job, event: None)
        # A task that has said its last word leaves behind nothing more, though its job may not be gone yet.
        mine = {o.path for task, _, o in heard.outputs() if o.path in wanted and not heard.reports[task].is_final}
        if not mine:
            return
        job = FollowedJob.of(submission)
        self._follow(submission, job, joined=True)
        self._in_hand |= dict.fromkeys(mine, submission)
        job.read(self._on_event)
        self._context.log.info(
            f"{self._work.kind}: found, still running, {self._scheduler.describe(submission)} with {len(mine)} of the "
            "results"
        )

    def _submit(self, work: PlannedWork, asked: Asked, n_tasks: int) -> None:
        units = work.units
        assignment = spread([u.n_tokens for u in units], n_tasks)
        spec = JobSpec(
            key=submission_key(work.kind, self._recipe.name, units),
            recipe=self._recipe.name,
            kind=work.kind,
            n_tasks=len(assignment),
            concurrency=self._recipe.tasks_of(work.kind).concurrency,
            resources=asked.resources,
            excluded_nodes=tuple(sorted(asked.excluded_nodes)),
        )

        def write_job_file(new: Submission) -> None:
            atomic_write(new.job_file, self._job_file(work, spec, assignment, new, asked).to_json().encode())
            # From before anything is submitted: a termination may come while the scheduler is being asked.
            self._submitting = new
            self._announce(new)

        try:
            submission = self._scheduler.submit(spec, write_job_file)
        except SchedulerUnreachableError:
            raise
        except SchedulerError as e:
            for path in [o.path for u in units for o in u.outputs]:
                self._give_up(path, FailureClass.IMPOSSIBLE, str(e))
            return
        self._in_hand |= dict.fromkeys((o.path for u in units for o in u.outputs), submission)
        self._follow(submission, FollowedJob.of(submission), joined=False)
        self._submitting = None
        self._context.log.info(
            f"{work.kind}: submitted {self._scheduler.describe(submission)} for {len(units)} partitions in "
            f"{len(assignment)} tasks"
        )

    def _follow(self, submission: Submission, job: FollowedJob, *, joined: bool) -> None:
        n_files_before = {task: _n_durable_files(job, task) for task in job.reports}
        self._jobs[submission] = _Followed(job=job, joined=joined, n_files_before=n_files_before)
        self._announce(submission)

    def _announce(self, submission: Submission) -> None:
        """Make it known that this run waits for a job; once, since the lock that says so is this process's own."""
        if submission not in self._announced:
            self._announced.add(submission)
            self._following.enter_context(followed_by(submission, self._context.run.run_id))

    def _job_file(
        self,
        work: PlannedWork,
        spec: JobSpec,
        assignment: tuple[tuple[int, ...], ...],
        submission: Submission,
        asked: Asked,
    ) -> JobFile:
        planner, kind = self._planner, work.kind
        teacher = planner.teacher_params() if kind == "teacher" else None
        if teacher is not None and asked.token_budget is not None:
            teacher = dataclasses.replace(teacher, token_budget=asked.token_budget)
        return JobFile(
            kind=kind,
            recipe=self._recipe.name,
            key=spec.key,
            recipe_folder=str(planner.recipe_folder),
            events_folder=str(submission.events_folder),
            tasks=assignment,
            units=work.units,
            shards=planner.shards_params() if kind == "shards" else None,
            teacher=teacher,
            student=planner.student_params() if kind == "student" else None,
            provenance=planner.provenance(kind)
            | {"code_commit": code_commit(), "dagster_run_id": self._context.run.run_id, "submission_key": spec.key},
        )

    # ------------------------------------------------------------------ following

    def _look(self) -> bool:
        """One round over all jobs; returns whether it took in all there was to read."""
        if self._clock() >= self._next_poll:
            self._poll()
        retries: dict[Asked, _Again] = {}
        has_read_all = True
        for followed in list(self._jobs.values()):
            until = self._clock() + LONGEST_READ_S
            if not followed.job.read(self._on_event, lambda until=until: self._clock() > until):  # type: ignore[misc]
                has_read_all = False  # what its tasks have said last may not have been read yet
                continue
            tasks_of_paths = self._open_of(followed)
            for task in followed.job.newly_over(
                self._clock(),
                self._scheduler.visibility_grace_s,
                lambda t, o=tasks_of_paths: self._is_complete(o[t]),  # type: ignore[misc]
            ):
                self._settle(followed, task, tasks_of_paths[task], retries)
        self._flush()
        self._pass_on_logs()
        for asked, again in retries.items():
            self._join_or_submit(self._work.only(lambda o, again=again: o.path in again.paths), asked, again.n_tasks)  # type: ignore[misc]
        return has_read_all

    def _pass_on_logs(self) -> None:
        """What tasks print beside their events, warnings of libraries for instance, as it comes."""
        if self._clock() < self._next_logs:
            return
        self._next_logs = self._clock() + LOG_INTERVAL_S
        for submission, followed in self._jobs.items():
            for task in [t for t, report in followed.job.reports.items() if report.started_at]:
                for line in self._logs.new_lines(self._scheduler.log_file(submission, task)):
                    self._context.log.info(f"task {task} | {line}")

    def _poll(self) -> None:
        active = [s for s, followed in self._jobs.items() if any(self._open_of(followed).values())]
        poll = self._scheduler.poll(active)
        interval_s = self._scheduler.poll_interval_s
        if poll.unreachable is not None:
            wait_s = self._backoff_s()
            if self._n_unreachable == 1:
                self._context.log.warning(
                    f"the scheduler does not answer ({poll.unreachable}); nothing follows from it, the jobs are asked "
                    "after again and again"
                )
            self._next_poll = self._clock() + max(wait_s, interval_s)
            return
        if self._n_unreachable:
            self._context.log.info(f"the scheduler answers again, after {self._n_unreachable} questions without answer")
        self._n_unreachable = 0
        self._next_poll = self._clock() + interval_s
        for notice in poll.notices:
            self._context.log.warning(notice)
        for submission, states in poll.states.items():
            followed = self._jobs[submission]
            followed.job.states = states
            if (words := followed.job.queue_in_words()) != followed.waits_for:
                followed.waits_for = words
                self._context.log.info(f"{self._scheduler.describe(submission)}: {words}")

    def _backoff_s(self) -> float:
        """Longer after each question without an answer, and never in step with others who ask."""
        self._n_unreachable += 1
        longest_s = min(self._scheduler.poll_interval_s * 2.0 ** min(self._n_unreachable, 20), LONGEST_BACKOFF_S)
        return longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret

    def _patiently(self, ask: Callable[[], T]) -> T:
        """The answer of a question that must be answered before anything is submitted, however long it takes."""
        while True:
            try:
                answer = ask()
            except SchedulerUnreachableError as e:
                wait_s = self._backoff_s()
                self._context.log.warning(
                    f"the scheduler does not answer ({e}); nothing is submitted before it does; next try in "
                    f"{wait_s:.0f} s"
                )
                self._sleep(wait_s)
            else:
                self._n_unreachable = 0
                return answer

    def _open_of(self, followed: _Followed) -> dict[int, list[str]]:
        """Task → folders of the wanted results that it is to make and that are not there yet."""
        submission = followed.job.submission
        found: dict[int, list[str]] = {task: [] for task in followed.job.reports}
        for task, _, output in followed.job.outputs():
            if output.path in self._open and self._in_hand.get(output.path) == submission:
                found[task].append(output.path)
        return found

    def _is_complete(self, paths: Iterable[str]) -> bool:
        try:
            return all(is_committed(self._open[p][1]) for p in paths if p in self._open)
        except StoreError:
            return True  # it will not get better by waiting; `_settle` says what is wrong

    def _hear_last_words(self) -> None:
        """Let the tasks whose results are all there say what they used, and be gone."""
        deadline = self._clock() + LAST_WORDS_WAIT_S
        mine = [f for f in self._jobs.values() if not f.joined]
        while any(f.job.may_say_more() for f in mine) and self._clock() < deadline:
            self._sleep(0.1)
            for followed in mine:
                followed.job.read(self._on_event)

    # ------------------------------------------------------------------ results and failures

    def _commit(self, path: str, followed: _Followed | None, task: int | None) -> None:
        """Record a wanted result that is on disk, once."""
        if (wanted := self._open.get(path)) is None:
            return
        unit, output = wanted
        facts: Mapping[str, Any] = {}
        if followed is not None and task is not None:
            facts = task_facts(self._scheduler, followed.job, task)
        self._record(unit, output, facts)
        del self._open[path]

    def _settle(self, followed: _Followed, task: int, paths: Sequence[str], retries: dict[Asked, _Again]) -> None:
        """What became of the wanted results of a task that is over."""
        missing: dict[str, list[str]] = {}
        for path in paths:
            unit, output = self._open[path]
            try:
                if is_committed(output):
                    self._commit(path, followed, task)  # a result whose event was lost is a result all the same
                else:
                    missing.setdefault(unit.partition_key, []).append(path)
            except StoreError as e:
                self._give_up(path, FailureClass.WORK, str(e))
        if not missing:
            return
        n_new_files = _n_durable_files(followed.job, task) - followed.n_files_before[task]
        classes = {
            self._settle_partition(followed, task, same_partition, retries, n_new_files=n_new_files)
            for same_partition in missing.values()
        }
        self.failures.update(classes)
        followed.failures.update(classes)

    def _settle_partition(
        self,
        followed: _Followed,
        task: int,
        paths: Sequence[str],
        retries: dict[Asked, _Again],
        *,
        n_new_files: int,
    ) -> FailureClass:
        """Try the missing results of one partition again, or give them up; returns what kept it from them.

        What counts as progress is that of its task: a partition may wait for its turn through many interruptions.
        """
        job, (unit, _) = followed.job, self._open[paths[0]]
        key, state, report = unit.partition_key, job.state(task), job.reports[task]
        error = report.errors.get(key)
        log_file = self._scheduler.log_file(job.submission, task)
        tail = log_tail(log_file)
        failure = classify(state, report.last_word, error, said_anything=report.attempt >= 0 or bool(tail))
        if failure is FailureClass.CANCELLED and is_cancelled(job.submission):
            failure = FailureClass.INTERRUPTED  # by the end of another run of ours, and not by somebody's scancel
        asked = self._asked_of(job)
        node = state.node or report.node
        attempts = self._attempts.get(key, Attempts())
        decision = decide(
            failure,
            asked,
            attempts,
            n_parts=attempts.n_parts + n_new_files,
            node=node,
            token_budget=report.token_budget(key),
        )
        words = (
            f"{error.name}: {error.message}" if error is not None else f"task {task} {state.task_id}: {state.reason}"
        )
        if isinstance(decision, Retry):
            self._attempts[key] = decision.attempts
            again = retries.setdefault(decision.asked, _Again())
            again.paths.update(paths)
            again.tasks.add((job.submission, task))
            for path in paths:
                del self._in_hand[path]
            self._context.log.warning(f"{key}: {failure.value} ({words}); tried again{_changes(asked, decision.asked)}")
            return failure
        why = f"; {decision.why}" if decision.why else ""
        self._context.log.error(f"{key}: {failure.value}: {words}{why}\n{tail}")
        for path in paths:
            self._give_up(path, failure, f"{words}{why} (log: {log_file})", log_file)
        return failure

    def _asked_of(self, job: FollowedJob) -> Asked:
        spec = read_spec(job.submission)
        return Asked(
            resources=spec.resources,
            excluded_nodes=frozenset(spec.excluded_nodes).union(*(s.failed_nodes for s in job.states.values())),
            token_budget=None if job.job.teacher is None else job.job.teacher.token_budget,
        )

    def _give_up(self, path: str, failure: FailureClass, cause: str, log_file: Path | None = None) -> None:
        unit, output = self._open.pop(path)
        self.failed.append(
            FailedResult(
                partition_key=unit.partition_key, asset=output.asset, failure=failure, cause=cause, log_file=log_file
            )
        )

    def _on_event(self, job: FollowedJob, event: Event | str) -> None:
        log, followed = self._context.log, self._jobs[job.submission]
        if isinstance(event, str):
            log.warning(f"a line of the event file is no event (a killed attempt?): {event[:200]}")
            return
        data, where = event.data, f"task {event.task}"
        match event.type:
            case "committed":
                self._on_committed(followed, event)
            case "partition_failed":
                log.error(f"{where}: {data['partition_key']}: {data['error']}: {data['message']}")
            case "warning":
                log.warning(f"{where}: {data['message']}")
            case "progress":
                if event.time >= followed.next_progress.get(event.task, 0.0):
                    followed.next_progress[event.task] = event.time + PROGRESS_INTERVAL_S
                    log.info(f"{where}: {progress_in_words(data)}")
            case "task_started" if event.attempt > 0 and (why := job.interruptions(event.task)):
                self.failures[why[-1]] += 1
                log.warning(f"{where} was requeued ({why[-1].value}) and goes on as attempt {event.attempt}")
            case "task_started" | "teacher_loaded" | "task_finished":
                log.info(f"{where}, attempt {event.attempt}: {event.type.replace('_', ' ')}: {_in_words(data)}")

    def _on_committed(self, followed: _Followed, event: Event) -> None:
        path = str(event.data.get("path", ""))
        if path not in self._open:
            return
        try:
            if is_committed(self._open[path][1]):  # an event informs; the store decides, when it shows the result
                self._commit(path, followed, event.task)
        except StoreError:
            return  # said when the task is over

    # ------------------------------------------------------------------ the end of this process

    def _stop(self) -> None:
        """Cancel what nobody else waits for, when it is this run that somebody wants to end."""
        log = self._context.log
        if not is_terminated(self._context):
            log.warning(
                "this process is stopped, its run was not terminated: the jobs go on, and the next run finds them"
            )
            return
        mine = []
        submitted = list(self._jobs)
        # Without its spec nothing of it was submitted, and nobody will.
        if self._submitting is not None and self._submitting.spec_file.exists():
            submitted.append(self._submitting)
        for submission in submitted:
            others = [run for run, waits in followers(submission).items() if waits and run != self._context.run.run_id]
            if others:
                log.warning(f"{self._scheduler.describe(submission)} goes on: run {others[0]} waits for it, too")
            else:
                log.warning(f"terminated: cancelling {self._scheduler.describe(submission)}")
                mine.append(submission)
        self._scheduler.cancel(mine)


def is_terminated(context: dg.AssetExecutionContext) -> bool:
    """Whether an interrupt that reached this process means the run and not only the process.

    A run that a code server started is terminated by Dagster, which says so in the run's status first; any other signal
    is the server going down. A process that nobody started but its user (the command line) has only Ctrl-C.
    """
    run = context.instance.get_run_by_id(context.run.run_id)
    launched = multiprocessing.parent_process() is not None
    return not launched or run is None or run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


def progress_in_words(data: Mapping[str, Any]) -> str:
    """A `progress` event as one phrase: which partition, how far, how fast."""
    words = f"{data['partition_key']}: {data['done_documents']:,} of {data['n_documents']:,} documents"
    if data.get("n_steps"):
        words += f", step {data['done_steps']:,} of {data['n_steps']:,}, loss {data['loss']:.3f}"
    if data.get("tokens_per_s"):
        words += f", {data['tokens_per_s']:,.0f} tokens/s"
    return words


def _n_durable_files(job: FollowedJob, task: int) -> int:
    """How far the results of a task are: grows with every part that a kill does not undo."""
    return count_durable_files(Path(o.path) for i in job.job.tasks[task] for o in job.job.units[i].outputs)


def _in_words(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in data.items() if value is not None and value != {})


def _changes(before: Asked, after: Asked) -> str:
    """What a retry asks for otherwise, in words that follow "tried again"."""
    changes = []
    if added := after.excluded_nodes - before.excluded_nodes:
        changes.append(f"without node {', '.join(sorted(added))}")
    if after.resources.memory_gib != before.resources.memory_gib:
        changes.append(f"with {after.resources.memory_gib:g} GiB of memory")
    if after.token_budget != before.token_budget:
        changes.append(f"with batches of {after.token_budget} tokens")
    return "".join(f", {change}" for change in changes)
