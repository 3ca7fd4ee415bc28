"""Following jobs: their tasks' events as they come, folded into what each task has said of itself.

Knows no dagster. May be interrupted and begun again at any time: event files are read from their start, and what is
committed is asked of the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_assets.contract import Event, JobFile, Output, WorkUnit, event_file, read_events, read_job
from kd_assets.orchestration.retries import FailureClass, PartitionError
from kd_assets.scheduler import Submission, TaskPhase, TaskState
from kd_assets.scheduler.submissions import read_spec

LOG_TAIL_LINES = 12
LOG_LINES_A_LOOK = 20
"""Of one task's log that are passed on at once; the file has them all."""
LOG_BYTES_A_LOOK = 65536
LOG_LINE_CHARACTERS = 500
EVENT_LINE = b'{"v":'
"""How the events in a log begin: a task writes them there, too, and they are read from its event file."""
LAST_WORDS = ("failed", "done")
"""How `task_finished` calls a task that will not be started again by itself."""
_WORST_FIRST = ("resumable", *LAST_WORDS)


@dataclass(slots=True)
class EventTail:
    """The events of all tasks of a submission, each once, however often it is asked."""

    submission: Submission
    n_tasks: int
    n_processes: int = 1
    """Processes of a task, each with an event file of its own."""
    _offsets: dict[Path, int] = field(default_factory=dict)

    def new_events(self) -> Iterator[Event | str]:
        """Events since the last call, file by file. A line that is no event comes as its text."""
        for task in range(self.n_tasks):
            for process_index in range(self.n_processes):
                path = event_file(self.submission.events_folder, task, process_index)
                for offset, event in read_events(path, self._offsets.get(path, 0)):
                    self._offsets[path] = offset
                    yield event


@dataclass(slots=True)
class LogTail:
    """What tasks print beside their events, each line once."""

    _offsets: dict[Path, int] = field(default_factory=dict)

    def new_lines(self, path: Path) -> list[str]:
        """Complete lines since the last call, without events; of many the last LOG_LINES_A_LOOK, and a word on how
        many were left out."""
        try:
            with path.open("rb") as f:
                size = f.seek(0, 2)
                start = self._offsets.get(path, 0)
                first = max(start, size - LOG_BYTES_A_LOOK)
                f.seek(first)
                whole, newline, _ = f.read(size - first).rpartition(b"\n")
        except OSError:  # logs inform
            return []
        if not newline:
            return []
        self._offsets[path] = first + len(whole) + 1
        found = [line for line in whole.split(b"\n") if not line.startswith(EVENT_LINE)]
        lines = [text for line in found if (text := _printable(line))]
        n_left_out = len(lines) - LOG_LINES_A_LOOK
        if n_left_out > 0 or first > start:
            lines = ["… (more in the log)", *lines[-LOG_LINES_A_LOOK:]]
        return lines


def _printable(line: bytes) -> str:
    """What a terminal would show of a line in the end: a progress bar overwrites itself after each carriage return."""
    text = line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2].rstrip()
    return "".join(c for c in text if c.isprintable() or c == "\t")[:LOG_LINE_CHARACTERS]


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


@dataclass(slots=True)
class FollowedJob:
    """One submission, with what its tasks have said."""

    submission: Submission
    job: JobFile
    reports: dict[int, TaskReport]
    tail: EventTail
    states: Mapping[int, TaskState] = field(default_factory=dict)
    ended_since: dict[int, float] = field(default_factory=dict)
    over: set[int] = field(default_factory=set)
    """Tasks that nothing more is expected of."""

    @staticmethod
    def of(submission: Submission) -> FollowedJob:
        job = read_job(submission.job_file)
        n_tasks, n_processes = len(job.tasks), read_spec(submission).resources.n_processes
        return FollowedJob(
            submission=submission,
            job=job,
            reports={i: TaskReport(n_processes=n_processes) for i in range(n_tasks)},
            tail=EventTail(submission, n_tasks, n_processes),
        )

    def read(
        self, on_event: Callable[[FollowedJob, Event | str], None], is_enough: Callable[[], bool] = lambda: False
    ) -> bool:
        """Take in what is new, and pass it on; returns whether that is all, which it is not after `is_enough`."""
        for event in self.tail.new_events():
            if isinstance(event, Event) and event.task in self.reports:
                self.reports[event.task].add(event)
            on_event(self, event)
            if is_enough():
                return False
        return True

    def newly_over(self, now: float, grace_s: float, is_complete: Callable[[int], bool]) -> list[int]:
        """Tasks of which nothing more is to come since the last call.

        A task that says it failed is over; so is one that says it is done, or that the scheduler calls ended, once its
        results are seen or the shared file system had `grace_s` to show them.
        """
        newly = []
        for task, report in self.reports.items():
            if task in self.over:
                continue
            state = self.states.get(task)
            ended = state is not None and state.phase is TaskPhase.ENDED
            if not (ended or report.is_final):
                self.ended_since.pop(task, None)  # it was requeued
                continue
            waited_s = now - self.ended_since.setdefault(task, now)
            if report.last_word == "failed" or waited_s >= grace_s or is_complete(task):
                newly.append(task)
        self.over.update(newly)
        return newly

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
        """Whether a task that nobody has seen end has not said its last word."""
        return any(
            not report.is_final and self.state(task).phase is not TaskPhase.ENDED
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

    def outputs(self) -> Iterator[tuple[int, WorkUnit, Output]]:
        """Everything it is to leave behind, with the task that makes it."""
        for task, unit_indexes in enumerate(self.job.tasks):
            for index in unit_indexes:
                for output in self.job.units[index].outputs:
                    yield task, self.job.units[index], output


def _task_id(data: Mapping[str, Any]) -> str:
    job, index = data.get("slurm_array_job_id"), data.get("slurm_array_task_id")
    return f"{job}_{index}" if job and index else str(data.get("slurm_job_id") or "")


def log_tail(path: Path, n_lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a task's log that are not event lines; empty when there is no log."""
    try:
        with path.open("rb") as f:
            size = f.seek(0, 2)
            f.seek(max(0, size - 65536))
            lines = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join([line for line in lines if not line.startswith(EVENT_LINE.decode())][-n_lines:])
