"""What followed jobs say, as it comes: events and printed lines to the run's log, committed results to be recorded.

An event informs; the store decides. So a result that a task says it has committed is recorded when the store shows it,
which on a shared file system may be a while later. Knows no dagster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kd_assets.contract import Event
from kd_assets.errors import NO_ANSWER
from kd_assets.orchestration.driving.following import FollowedJob
from kd_assets.orchestration.driving.results import Look, Results
from kd_assets.orchestration.driving.tails import LogTail
from kd_assets.orchestration.driving.waiting import Log, Storage, Waits
from kd_assets.orchestration.retries import FailureClass
from kd_assets.scheduler import Scheduler, Submission

PROGRESS_INTERVAL_S = 10.0
"""How often a task's progress is written to the run's log."""
LOG_INTERVAL_S = 2.0
"""How often what tasks print is passed on to the run's log."""
LONGEST_READ_S = 5.0
"""Of one job's events in one look, however fast its tasks commit: the scheduler and other jobs have their turn, too."""
ANNOUNCED_WAIT_S = (1.0, 30.0)
"""First and longest pause between looks at a result that a task says is there and the file system does not show."""


@dataclass(frozen=True, slots=True)
class _Announced:
    """A result that a task says it has committed."""

    job: FollowedJob
    task: int
    waits: Waits


class Listener:
    """Reads the events and logs of followed jobs."""

    def __init__(
        self,
        scheduler: Scheduler,
        results: Results,
        failures: Counter[FailureClass],
        *,
        log: Log,
        storage: Storage,
        clock: Callable[[], float],
    ) -> None:
        """`failures`: where interruptions of tasks are counted."""
        self._scheduler, self._results, self._failures = scheduler, results, failures
        self._log, self._storage, self._clock = log, storage, clock
        self._announced: dict[str, _Announced] = {}
        self._next_progress: dict[tuple[Submission, int], float] = {}
        self._printing: dict[tuple[Submission, int], FollowedJob] = {}
        """Tasks whose logs may hold lines that were not passed on."""
        self._logs = LogTail()
        self._next_logs = 0.0

    # ------------------------------------------------------------------ events

    def read(self, job: FollowedJob) -> bool:
        """Take in the new events of a job; returns whether these were all, however fast its tasks write."""
        until = self._clock() + LONGEST_READ_S
        return job.read(self._on_event, lambda: self._clock() > until, self._storage)

    def record_announced(self) -> None:
        """Record results that tasks have announced and that were not to be seen then."""
        now = self._clock()
        for path, announced in list(self._announced.items()):
            if not self._results.is_open(path):
                del self._announced[path]
            elif announced.waits.is_due(now):
                self._results.look(path, announced.job, announced.task)
                announced.waits.failed(now)

    def _on_event(self, job: FollowedJob, event: Event | str) -> None:
        log = self._log
        if isinstance(event, str):
            log.warning(f"a line of the event file is no event (a killed attempt?): {event[:200]}")
            return
        data, where = event.data, f"task {event.task}"
        match event.type:
            case "committed":
                self._on_committed(job, event)
            case "partition_failed":
                log.error(f"{where}: {data['partition_key']}: {data['error']}: {data['message']}")
            case "warning":
                log.warning(f"{where}: {data['message']}")
            case "progress":
                self._on_progress(job, event)
            case "task_started" | "teacher_loaded" | "task_finished":
                self._on_milestone(job, event)

    def _on_milestone(self, job: FollowedJob, event: Event) -> None:
        where = f"task {event.task}"
        if event.type == "task_started":
            self._printing[job.submission, event.task] = job
            if event.attempt > 0 and (why := job.interruptions(event.task)):
                self._failures[why[-1]] += 1
                self._log.warning(f"{where} was requeued ({why[-1].value}) and goes on as attempt {event.attempt}")
                return
        words = event.type.replace("_", " ")
        self._log.info(f"{where}, attempt {event.attempt}: {words}: {_in_words(event.data)}")

    def _on_progress(self, job: FollowedJob, event: Event) -> None:
        key = (job.submission, event.task)
        if event.time >= self._next_progress.get(key, 0.0):
            self._next_progress[key] = event.time + PROGRESS_INTERVAL_S
            self._log.info(f"task {event.task}: {progress_in_words(event.data)}")

    def _on_committed(self, job: FollowedJob, event: Event) -> None:
        path = str(event.data.get("path", ""))
        if not self._results.is_open(path):
            return
        if self._results.look(path, job, event.task) in (Look.MISSING, Look.UNREACHABLE):
            waits = Waits(*ANNOUNCED_WAIT_S)
            waits.failed(self._clock())
            self._announced[path] = _Announced(job, event.task, waits)

    # ------------------------------------------------------------------ logs

    def pass_on_logs(self, *, at_once: bool = False) -> None:
        """What tasks print beside their events, warnings of libraries for instance: every LOG_INTERVAL_S."""
        if not at_once and self._clock() < self._next_logs:
            return
        self._next_logs = self._clock() + LOG_INTERVAL_S
        for (submission, task), job in list(self._printing.items()):
            try:
                lines = self._logs.new_lines(self._scheduler.log_file(submission, task))
            except NO_ANSWER:  # logs inform
                continue
            for line in lines:
                self._log.info(f"task {task} | {line}")
            if task in job.over:
                del self._printing[submission, task]


def progress_in_words(data: Mapping[str, Any]) -> str:
    """A `progress` event as one phrase: which partition, how far, how fast."""
    words = f"{data['partition_key']}: {data['done_documents']:,} of {data['n_documents']:,} documents"
    if data.get("n_steps"):
        words += f", step {data['done_steps']:,} of {data['n_steps']:,}, loss {data['loss']:.3f}"
    if data.get("tokens_per_s"):
        words += f", {data['tokens_per_s']:,.0f} tokens/s"
    return words


def _in_words(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in data.items() if value is not None and value != {})
