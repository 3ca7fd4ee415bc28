"""Following a job: its tasks' events as they come, and what became of every result once it is over.

Knows no dagster. May be interrupted and begun again at any time: event files are read from their start, and what is
committed is asked of the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kd_assets.contract import Asset, Event, JobFile, Output, WorkUnit, event_file, read_events, read_job
from kd_assets.errors import StoreError
from kd_assets.scheduler import LocalScheduler, Submission, TaskPhase, TaskState
from kd_assets.store import committed

POLL_INTERVAL_S = 0.2
LOG_TAIL_LINES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedResult:
    """A result that a job should have left and did not."""

    partition_key: str
    asset: Asset
    folder: str
    cause: str
    log_file: Path
    log_tail: str


@dataclass(slots=True)
class EventTail:
    """The events of all tasks of a submission, each once, however often it is asked."""

    submission: Submission
    n_tasks: int
    _offsets: dict[int, int] = field(default_factory=dict)

    def new_events(self) -> Iterator[Event | str]:
        """Events since the last call, task by task. A line that is no event comes as its text."""
        for task in range(self.n_tasks):
            path = event_file(self.submission.events_folder, task)
            for offset, event in read_events(path, self._offsets.get(task, 0)):
                self._offsets[task] = offset
                yield event


def follow(
    scheduler: LocalScheduler,
    submission: Submission,
    on_event: Callable[[Event | str], None],
    *,
    poll_interval_s: float = POLL_INTERVAL_S,
    sleep: Callable[[float], None] = time.sleep,
) -> list[FailedResult]:
    """Pass every event to `on_event` until all tasks have ended; returns what is not committed, with its cause."""
    job = read_job(submission.job_file)
    tail = EventTail(submission, len(job.tasks))
    causes: dict[str, str] = {}
    while True:
        states = scheduler.states(submission)
        ended = all(s.phase is TaskPhase.ENDED for s in states.values())
        for event in tail.new_events():  # read after the states: the last events of a task precede its end
            _remember_cause(event, causes)
            on_event(event)
        if ended:
            return list(_failed_results(job, submission, states, causes))
        sleep(poll_interval_s)


def _remember_cause(event: Event | str, causes: dict[str, str]) -> None:
    """The last word on each partition: a failure of an earlier attempt is forgotten once a later one starts it."""
    if isinstance(event, str):
        return
    if event.type == "partition_failed":
        causes[event.data["partition_key"]] = f"{event.data['error']}: {event.data['message']}"
    elif event.type == "committed":
        causes.pop(event.data["partition_key"], None)


def _failed_results(
    job: JobFile, submission: Submission, states: dict[int, TaskState], causes: dict[str, str]
) -> Iterator[FailedResult]:
    for task, unit, output in _outputs(job):
        state, log_file = states[task], submission.log_file(task)
        cause = causes.get(unit.partition_key, f"task {task} of {submission.folder}: {state.reason}")
        try:
            if committed(Path(output.path), output.fingerprint) is not None:
                continue
        except StoreError as e:
            cause = str(e)
        yield FailedResult(
            partition_key=unit.partition_key,
            asset=output.asset,
            folder=output.path,
            cause=cause,
            log_file=log_file,
            log_tail=log_tail(log_file),
        )


def _outputs(job: JobFile) -> Iterator[tuple[int, WorkUnit, Output]]:
    for task, unit_indexes in enumerate(job.tasks):
        for index in unit_indexes:
            for output in job.units[index].outputs:
                yield task, job.units[index], output


def log_tail(path: Path, n_lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a task's log that are not event lines; empty when there is no log."""
    try:
        with path.open("rb") as f:
            size = f.seek(0, 2)
            f.seek(max(0, size - 65536))
            lines = f.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join([line for line in lines if not line.startswith('{"v":')][-n_lines:])
