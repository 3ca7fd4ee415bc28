"""A followed job: what its tasks have said so far and what the scheduler says of them.

Knows no dagster. May be interrupted and begun again at any time: event files are read from their start, and what is
committed is asked of the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kd_assets.contract import Event, JobFile, Output, WorkUnit, read_job
from kd_assets.errors import NO_ANSWER, SchedulerError
from kd_assets.orchestration.driving.tails import EventTail
from kd_assets.orchestration.driving.waiting import Storage
from kd_assets.orchestration.retries import FailureClass, PartitionError
from kd_assets.scheduler import JobSpec, Scheduler, Submission, TaskPhase, TaskState
from kd_assets.scheduler.submissions import read_spec

LAST_WORDS = ("failed", "done")
"""How `task_finished` calls a task that will not be started again by itself."""
_WORST_FIRST = ("resumable", *LAST_WORDS)


@dataclass(slots=True)
class TaskReport:
    """What one task has said of itself so far, over all its attempts and processes."""

    n_processes: int = 1
    attempt: int = -1
    """The last one that began; -1 before any did."""
    started_at: list[float] = field(default_factory=list)
    """Of each attempt, in seconds since the epoch."""
    node: str = ""
    task_id: str = ""
    """What the scheduler calls it, `14_3`."""
    errors: dict[str, PartitionError] = field(default_factory=dict)
    """Partition → what the last attempt failed with."""
    last_words: dict[int, str] = field(default_factory=dict)
    """Rank → how it said that the last attempt ended."""
    last_signal: str | None = None
    interruptions: list[tuple[str, FailureClass]] = field(default_factory=list)
    """Where each earlier attempt ran, and why it ended as far as the task itself can tell."""
    usage: Mapping[str, Any] = field(default_factory=dict)
    """What the last attempt used, as it last said."""
    load_s: float | None = None
    """How long the last attempt that loaded a model took for it."""
    token_budgets: dict[str | None, int] = field(default_factory=dict)
    """Partition → the token budget that the last attempt came down to in it; None → what it began with."""

    def add(self, event: Event) -> None:
        data = event.data
        if event.attempt < self.attempt:
            return  # of another process of the task, whose file is read after this attempt's beginning
        if isinstance(budget := data.get("token_budget"), int):
            self.token_budgets[data.get("partition_key")] = budget
        match event.type:
            case "task_started":
                self._start(event)
            case "teacher_loaded":
                self.load_s = data.get("load_s")
            case "partition_failed":
                self.errors[data["partition_key"]] = PartitionError(
                    name=data["error"], message=data["message"], while_loading=data.get("during") == "load"
                )
            case "committed":
                self.errors.pop(data["partition_key"], None)
                self.usage = data.get("usage") or self.usage
            case "task_finished" if data["status"] == "duplicate":
                pass  # a second copy, which left: the first one still speaks for the task
            case "task_finished":
                self.last_words[int(data.get("process_index") or 0)] = data["status"]
                self.last_signal = data.get("signal")
                self.usage = data.get("usage") or self.usage
            case _:
                pass

    @property
    def last_word(self) -> str | None:
        """How the last attempt said it ended: its worst process; None while one runs, or when one was killed."""
        if len(self.last_words) < self.n_processes:
            return None
        return min(self.last_words.values(), key=_WORST_FIRST.index)

    @property
    def is_final(self) -> bool:
        return self.last_word in LAST_WORDS

    def token_budget(self, partition_key: str) -> int | None:
        """What the last attempt said last of its token budget in this partition; None: nothing."""
        return self.token_budgets.get(partition_key, self.token_budgets.get(None))

    def _start(self, event: Event) -> None:
        if event.attempt > self.attempt or not self.started_at:
            if self.started_at:
                self.interruptions.append((self.node, self._why_it_ended()))
            self.attempt, self.last_signal = event.attempt, None
            self.last_words.clear()
            self.errors.clear()
            self.token_budgets.clear()
            self.started_at.append(event.time)
        self.last_words.pop(int(event.data.get("process_index") or 0), None)
        self.node = str(event.data.get("slurm_nodelist") or event.data.get("host") or "")
        self.task_id = _task_id(event.data)

    def _why_it_ended(self) -> FailureClass:
        """USR1 comes before the time limit; TERM without a cancellation is what preemption sends; no last word at all
        is what kill -9 and a dead node leave."""
        match self.last_word:
            case "resumable" if self.last_signal == "SIGUSR1":
                return FailureClass.TIME_LIMIT
            case "resumable":
                return FailureClass.PREEMPTED
            case None:
                return FailureClass.KILLED
            case _:
                return FailureClass.INTERRUPTED


@dataclass(slots=True, eq=False)
class FollowedJob:
    """One submission, with what its tasks have said and what the scheduler says of them."""

    submission: Submission
    job: JobFile
    spec: JobSpec
    """What its tasks asked for."""
    is_joined: bool = False
    """Somebody else submitted it."""
    reports: dict[int, TaskReport] = field(init=False)
    states: Mapping[int, TaskState] = field(default_factory=dict)
    """What the scheduler said last; set by `see`."""
    ended_since: dict[int, float] = field(default_factory=dict)
    """Task that seems to have ended and is not over → when that was seen first."""
    over: set[int] = field(default_factory=set)
    """Tasks that nothing more is expected of."""
    still_read: set[int] = field(default_factory=set)
    """Tasks that are over and whose events are still read."""
    n_files_before: dict[int, int] = field(default_factory=dict)
    """Task → durable files of its results when this run began to follow it."""
    failures: Counter[FailureClass] = field(default_factory=Counter)
    """Why partitions were left without a result by its tasks."""
    faulty_nodes: Counter[str] = field(default_factory=Counter)
    """Node → how many of its tasks met a fault there."""
    _tail: EventTail = field(init=False)
    _ending: set[int] = field(default_factory=set)
    """Tasks that may have ended, from what was read or seen last; not all of these have."""

    def __post_init__(self) -> None:
        n_tasks, n_processes = len(self.job.tasks), self.spec.resources.n_processes
        self.reports = {task: TaskReport(n_processes=n_processes) for task in range(n_tasks)}
        self._tail = EventTail(self.submission, n_tasks, n_processes)

    @staticmethod
    def of(submission: Submission, *, is_joined: bool = False) -> FollowedJob:
        """The job of a submission's folder.

        Raises ContractError for one of another version of kd_assets, SchedulerError where its folder was taken away,
        OSError or StorageUnavailableError where it cannot be reached.
        """
        job, spec = read_job(submission.job_file), read_spec(submission)
        return FollowedJob(submission=submission, job=job, spec=spec, is_joined=is_joined)

    def read(
        self,
        on_event: Callable[[FollowedJob, Event | str], None],
        is_enough: Callable[[], bool] = lambda: False,
        storage: Storage | None = None,
    ) -> bool:
        """Take in what is new, and pass it on; returns whether that is all, which it is not after `is_enough`."""
        for event in self._tail.new_events(storage):
            if isinstance(event, Event) and event.task in self.reports:
                self.reports[event.task].add(event)
                if self.reports[event.task].is_final and event.task not in self.over:
                    self._ending.add(event.task)
            on_event(self, event)
            if is_enough():
                return False
        return True

    def see(self, states: Mapping[int, TaskState]) -> None:
        """Take in what the scheduler says of its tasks."""
        self.states = states
        self._ending.update(task for task, state in states.items() if state.phase is TaskPhase.ENDED)
        self._ending -= self.over

    def ended_tasks(self, now: float) -> list[int]:
        """Tasks that are not over and have ended as far as they or the scheduler say. `ended_since` says since when."""
        for task in list(self._ending):
            if self.reports[task].is_final or self.state(task).phase is TaskPhase.ENDED:
                self.ended_since.setdefault(task, now)
            else:  # it was requeued
                self._ending.discard(task)
                self.ended_since.pop(task, None)
        return sorted(self._ending)

    def end(self, task: int) -> None:
        """Nothing more is expected of a task; its events are read until `finish_reading`, should it live all the
        same."""
        self.over.add(task)
        self._ending.discard(task)
        self.still_read.add(task)

    def finish_reading(self, task: int) -> None:
        """Read no more events of a task that is over."""
        self.still_read.discard(task)
        self._tail.finish(task)

    def state(self, task: int) -> TaskState:
        """What the scheduler said last of a task."""
        return self.states.get(task) or TaskState(phase=TaskPhase.PENDING)

    def interruptions(self, task: int) -> list[FailureClass]:
        """Why each earlier attempt of a task ended: in its own words, but of a failed node the scheduler knows."""
        failed_nodes = self.state(task).failed_nodes
        return [
            FailureClass.NODE_FAILURE if node in failed_nodes else why for node, why in self.reports[task].interruptions
        ]

    def may_say_more(self) -> bool:
        """Whether a task that has begun, and that nobody has seen end, has not said its last word."""
        return any(
            report.attempt >= 0 and not report.is_final and self.state(task).phase is not TaskPhase.ENDED
            for task, report in self.reports.items()
        )

    def queue_in_words(self) -> str:
        """How many tasks run, wait and why: `3 run, 5 wait (Priority)`."""
        states = [self.state(task) for task in self.reports]
        words = [
            f"{n} {word}"
            for phase, word in ((TaskPhase.RUNNING, "run"), (TaskPhase.ENDED, "ended"))
            if (n := sum(s.phase is phase for s in states))
        ]
        waiting = Counter(s.reason for s in states if s.phase is TaskPhase.PENDING)
        words += [f"{n} wait ({reason})" if reason else f"{n} wait" for reason, n in sorted(waiting.items())]
        return ", ".join(words)

    def outputs_of(self, task: int) -> list[Output]:
        """What one task is to leave behind."""
        return [output for index in self.job.tasks[task] for output in self.job.units[index].outputs]

    def outputs(self) -> Iterator[tuple[int, WorkUnit, Output]]:
        """Everything it is to leave behind, with the task that makes it."""
        for task, unit_indexes in enumerate(self.job.tasks):
            for index in unit_indexes:
                for output in self.job.units[index].outputs:
                    yield task, self.job.units[index], output


def described(scheduler: Scheduler, submission: Submission) -> str:
    """A job in words for people: its folder, where no more can be read of it."""
    try:
        return scheduler.describe(submission)
    except (SchedulerError, *NO_ANSWER):
        return f"the job of {submission.folder}"


def _task_id(data: Mapping[str, Any]) -> str:
    job, index = data.get("slurm_array_job_id"), data.get("slurm_array_task_id")
    return f"{job}_{index}" if job and index else str(data.get("slurm_job_id") or "")
