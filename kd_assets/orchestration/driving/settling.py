"""What became of the results of a task that has ended: recorded, tried again, or given up.

A task that says it failed is over; so is one that says it is done, or that the scheduler calls ended, once its results
are seen or the shared file system had its grace to show them. What another start can heal, and how, is `retries`' to
decide. Knows no dagster.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kd_assets.errors import NO_ANSWER
from kd_assets.orchestration.driving.following import FollowedJob
from kd_assets.orchestration.driving.results import Look, Results
from kd_assets.orchestration.driving.tails import log_tail
from kd_assets.orchestration.driving.waiting import Log, Storage
from kd_assets.orchestration.retries import (
    BLAMES_THE_NODE,
    NODE_FAULT_STATUSES,
    Asked,
    Attempts,
    FailureClass,
    NodeFaults,
    PartitionError,
    Retry,
    classify,
    decide,
)
from kd_assets.scheduler import Scheduler, Submission, TaskState
from kd_assets.scheduler.submissions import is_cancelled
from kd_assets.store import count_durable_files


@dataclass(slots=True)
class ToRetry:
    """Results that are tried again in one job."""

    paths: set[str] = field(default_factory=set)
    tasks: set[tuple[Submission, int]] = field(default_factory=set)
    """Those that left them behind."""

    @property
    def n_tasks(self) -> int:
        """No more teacher loads than what is left took before."""
        return len(self.tasks)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ended:
    """A task that is over, with what its files tell of its end."""

    job: FollowedJob
    task: int
    n_new_files: int
    """Durable files of its results since this run began to follow it. A partition may wait for its turn through many
    interruptions, so what counts as its progress is that of its task."""
    log_file: Path
    log_tail: str
    is_cancelled_by_us: bool
    """By the end of another run of this deployment, and not by somebody's scancel."""


class Settler:
    """Settles the tasks of followed jobs, one after the other as they end."""

    def __init__(
        self,
        scheduler: Scheduler,
        results: Results,
        failures: Counter[FailureClass],
        node_faults: NodeFaults,
        *,
        log: Log,
        storage: Storage,
        clock: Callable[[], float],
    ) -> None:
        """`failures`: where is counted what kept tasks from their results; a task counts once for each class.
        `node_faults`: the same, by node."""
        self._scheduler, self._results, self._failures = scheduler, results, failures
        self._node_faults = node_faults
        self._log, self._storage, self._clock = log, storage, clock
        self._attempts: dict[str, Attempts] = {}
        """By partition."""
        self._counted: set[tuple[Submission, int, FailureClass]] = set()
        self._retries: dict[Asked, ToRetry] = {}

    def take_retries(self) -> dict[Asked, ToRetry]:
        """What is to be tried again since the last call, by what it asks for: away from all nodes that are left out by
        now, also for what failed before one of them was."""
        retries: dict[Asked, ToRetry] = {}
        for asked, to_retry in self._retries.items():
            merged = retries.setdefault(self._without_sick_nodes(asked), ToRetry())
            merged.paths |= to_retry.paths
            merged.tasks |= to_retry.tasks
        self._retries = {}
        return retries

    def _without_sick_nodes(self, asked: Asked) -> Asked:
        return dataclasses.replace(asked, excluded_nodes=asked.excluded_nodes | self._node_faults.sick_nodes)

    def settle(self, job: FollowedJob) -> None:
        """See what became of each task of a job that has ended. Call it when all that its tasks said is read."""
        now = self._clock()
        for task in job.ended_tasks(now):
            has_had_its_grace = (
                job.reports[task].last_word == "failed"
                or now - job.ended_since[task] >= self._scheduler.visibility_grace_s
            )
            if not has_had_its_grace and self._has_missing(job, task):
                continue
            if has_had_its_grace:
                self._settle_task(job, task)
            if not self._results.of_task(job.submission, task):
                job.end(task)
        for task in list(job.still_read):
            # A task that was taken for lost may live, and commit what is now in another's hands.
            is_waited_for = any(self._results.is_open(o.path) for o in job.outputs_of(task))
            if job.reports[task].is_final or not is_waited_for:
                job.finish_reading(task)

    def _has_missing(self, job: FollowedJob, task: int) -> bool:
        """Whether the task owes a result that is not to be seen; those before it are recorded."""
        return any(
            self._results.look(path, job, task) in (Look.MISSING, Look.UNREACHABLE)
            for path in self._results.of_task(job.submission, task)
        )

    def _settle_task(self, job: FollowedJob, task: int) -> None:
        missing: dict[str, list[str]] = {}
        unreachable: set[str] = set()
        for path in self._results.of_task(job.submission, task):
            partition_key = self._results.partition_of(path)
            look = self._results.look(path, job, task)  # a result whose event was lost is a result all the same
            if look is Look.MISSING:
                missing.setdefault(partition_key, []).append(path)
            elif look is Look.UNREACHABLE:
                unreachable.add(partition_key)
        # A partition is decided on as a whole, when all of it is known.
        decidable = {key: paths for key, paths in missing.items() if key not in unreachable}
        if not decidable or (ended := self._ended(job, task, decidable)) is None:
            return
        for partition_key, paths in decidable.items():
            self._count(ended, self._settle_partition(ended, partition_key, paths))

    def _ended(self, job: FollowedJob, task: int, missing: dict[str, list[str]]) -> _Ended | None:
        """What the files of a task tell of its end; None while they cannot be reached."""
        what = (job.submission, task)
        if not self._storage.is_due(what):
            return None
        try:
            log_file = self._scheduler.log_file(job.submission, task)
            ended = _Ended(
                job=job,
                task=task,
                n_new_files=n_durable_files(job, task) - job.n_files_before.get(task, 0),
                log_file=log_file,
                log_tail=log_tail(log_file),
                is_cancelled_by_us=is_cancelled(job.submission),
            )
        except NO_ANSWER as e:
            if self._storage.failed(what, e):
                self._storage.forget(what)
                for paths in missing.values():
                    self._results.give_up_all(paths, FailureClass.WORK, f"{job.submission.folder}: {e}")
            return None
        self._storage.reached(what)
        return ended

    def _settle_partition(self, ended: _Ended, partition_key: str, paths: Sequence[str]) -> FailureClass:
        """Try the missing results of one partition again, or give them up; returns what kept it from them."""
        job, task, report, state = ended.job, ended.task, ended.job.reports[ended.task], ended.job.state(ended.task)
        error, node = report.errors.get(partition_key), state.node or report.node
        has_begun = report.attempt >= 0
        said_anything = has_begun or bool(ended.log_tail)
        failure = classify(state, report.last_word, error, said_anything=said_anything, has_begun=has_begun)
        if failure is FailureClass.CANCELLED and ended.is_cancelled_by_us:
            failure = FailureClass.INTERRUPTED
        words = _what_happened(task, state, error)
        if failure in BLAMES_THE_NODE and node:
            self._note_fault(ended, node, failure, words)
        asked, attempts = asked_of(job), self._attempts.get(partition_key, Attempts())
        decision = decide(
            failure,
            asked,
            attempts,
            n_parts=attempts.n_parts + ended.n_new_files,
            node=node,
            token_budget=report.token_budget(partition_key),
        )
        on_node = f", on node {node}" if node and node not in words.split() else ""
        if isinstance(decision, Retry):
            self._retry(ended, partition_key, paths, decision)
            changes = changes_in_words(asked, self._without_sick_nodes(decision.asked))
            self._log.warning(f"{partition_key}: {failure.value} ({words}{on_node}); tried again{changes}")
        else:
            why = f"; {decision.why}" if decision.why else ""
            if failure is FailureClass.TIME_LIMIT:
                why += _time_in_words(asked, report.load_s)
            if failure is FailureClass.IMPOSSIBLE:
                why += left_out_in_words(asked.excluded_nodes | self._node_faults.sick_nodes, self._node_faults)
            self._log.error(f"{partition_key}: {failure.value}: {words}{on_node}{why}\n{ended.log_tail}")
            for path in paths:
                self._results.give_up(
                    path,
                    failure,
                    f"{words}{on_node}{why} (log: {ended.log_file})",
                    log_file=ended.log_file,
                    log_tail=ended.log_tail,
                )
        return failure

    def _note_fault(self, ended: _Ended, node: str, failure: FailureClass, words: str) -> None:
        """A node is left out from its second fault on; that is said once."""
        sick_before = self._node_faults.sick_nodes
        self._node_faults.note(node, (ended.job.submission, ended.task), words)
        if (ended.job.submission, ended.task, failure) not in self._counted:
            ended.job.faulty_nodes[node] += 1
        for sick in self._node_faults.sick_nodes - sick_before:
            self._log.warning(
                f"node {sick} is left out from now on: {self._node_faults.in_words(frozenset({sick}))}. Have it looked "
                "at; to keep all jobs from it, name it in the profile's `exclude`"
            )

    def _retry(self, ended: _Ended, partition_key: str, paths: Sequence[str], decision: Retry) -> None:
        self._attempts[partition_key] = decision.attempts
        to_retry = self._retries.setdefault(decision.asked, ToRetry())
        to_retry.paths.update(paths)
        to_retry.tasks.add((ended.job.submission, ended.task))
        for path in paths:
            self._results.let_go(path)

    def _count(self, ended: _Ended, failure: FailureClass) -> None:
        key = (ended.job.submission, ended.task, failure)
        if key not in self._counted:
            self._counted.add(key)
            self._failures[failure] += 1
            ended.job.failures[failure] += 1


def _what_happened(task: int, state: TaskState, error: PartitionError | None) -> str:
    if error is not None:
        return f"{error.name}: {error.message}"
    words = f"task {task} {state.task_id}: {state.reason}"
    if state.exit_code in NODE_FAULT_STATUSES:
        words += f", exit status {state.exit_code}: {NODE_FAULT_STATUSES[state.exit_code]}"
    return words


def _time_in_words(asked: Asked, load_s: float | None) -> str:
    """What a part that fits into no time limit had, in words that follow the cause."""
    minutes = asked.resources.time_minutes
    limit = "the site's time limit" if minutes is None else f"the time limit of {minutes} minutes"
    loading = "" if load_s is None else f", of which loading took {load_s:.0f} s"
    return f": {limit}{loading}, is too short for a part. Give the job more `time`, and materialize again"


def left_out_in_words(nodes: frozenset[str], faults: NodeFaults) -> str:
    """Which nodes a request leaves out, in words that follow why it cannot be granted; empty where it does not."""
    if not nodes:
        return ""
    why = faults.in_words(nodes)
    return f"; it leaves out {', '.join(sorted(nodes))}{f', for tasks failed there: {why}' if why else ''}"


def asked_of(job: FollowedJob) -> Asked:
    """What a job asked for, with the nodes that failed under it."""
    return Asked(
        resources=job.spec.resources,
        excluded_nodes=frozenset(job.spec.excluded_nodes).union(*(s.failed_nodes for s in job.states.values())),
        token_budget=None if job.job.teacher is None else job.job.teacher.token_budget,
    )


def n_durable_files(job: FollowedJob, task: int) -> int:
    """How far the results of a task are: grows with every part that a kill does not undo."""
    return count_durable_files(Path(o.path) for o in job.outputs_of(task))


def changes_in_words(before: Asked, after: Asked) -> str:
    """What a retry asks for otherwise, in words that follow "tried again"."""
    changes = []
    if added := after.excluded_nodes - before.excluded_nodes:
        changes.append(f"without node {', '.join(sorted(added))}")
    if after.resources.memory_gib != before.resources.memory_gib:
        changes.append(f"with {after.resources.memory_gib:g} GiB of memory")
    if after.token_budget != before.token_budget:
        changes.append(f"with batches of {after.token_budget} tokens")
    return "".join(f", {change}" for change in changes)
