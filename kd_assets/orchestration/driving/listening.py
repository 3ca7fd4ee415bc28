"""What followed jobs say, as it comes: events and printed lines to the run's log, committed results to be recorded.

An event informs; the store decides. So a result that a task says it has committed is recorded when the store shows it,
which on a shared file system may be a while later. Knows no dagster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kd_assets.cards.words import counted
from kd_assets.contract import Event
from kd_assets.errors import NO_ANSWER
from kd_assets.orchestration.driving.following import FollowedJob
from kd_assets.orchestration.driving.progress import Progress, span_in_words
from kd_assets.orchestration.driving.results import Look, Results
from kd_assets.orchestration.driving.tails import LogTail
from kd_assets.orchestration.driving.waiting import Log, Storage, Waits
from kd_assets.orchestration.retries import FailureClass
from kd_assets.scheduler import Scheduler, Submission

TRAINING_INTERVAL_S = 10.0
"""How often the progress of a training is written to the run's log."""
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
        progress: Progress,
        failures: Counter[FailureClass],
        *,
        log: Log,
        storage: Storage,
        clock: Callable[[], float],
    ) -> None:
        """`failures`: where interruptions of tasks are counted."""
        self._scheduler, self._results, self._failures = scheduler, results, failures
        self._progress = progress
        self._log, self._storage, self._clock = log, storage, clock
        self._announced: dict[str, _Announced] = {}
        self._next_training: dict[tuple[Submission, int], float] = {}
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
        self._log.info(
            f"{where}, attempt {event.attempt}: {milestone_in_words(event, job.reports[event.task].task_id)}"
        )

    def _on_progress(self, job: FollowedJob, event: Event) -> None:
        """A task's progress is part of that of the work; only a training has steps of its own to tell."""
        self._progress.on_event(event.data)
        key = (job.submission, event.task)
        if event.data.get("n_steps") and event.time >= self._next_training.get(key, 0.0):
            self._next_training[key] = event.time + TRAINING_INTERVAL_S
            self._log.info(f"task {event.task}: {training_in_words(event.data)}")

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


def training_in_words(data: Mapping[str, Any]) -> str:
    """A `progress` event of a training as one phrase: `step 20 of 60, loss 3.214, 5,120 tokens/s`."""
    words = f"step {data['done_steps']:,} of {data['n_steps']:,}, loss {data['loss']:.3f}"
    if data.get("tokens_per_s"):
        words += f", {data['tokens_per_s']:,.0f} tokens/s"
    return words


def milestone_in_words(event: Event, task_id: str = "") -> str:
    """The start of a task, its teacher or its end as one phrase. `task_id`: what SLURM calls the task; it is told only
    where its start names a SLURM partition, since the local scheduler numbers its tasks, too."""
    data = event.data
    match event.type:
        case "task_started":
            words = "task started"
            if isinstance(n_partitions := data.get("n_partitions"), int):
                words += f", {counted(n_partitions, 'partition')}"
            if node := data.get("slurm_nodelist") or data.get("host"):
                words += f", on {node}"
            if data.get("slurm_partition") is not None and task_id:
                words += f", SLURM job {task_id}"
            return words + _which_process(data)
        case "task_finished":
            return f"task finished: {_end_in_words(data)}{_which_process(data)}"
        case _:
            told = {name: value for name, value in data.items() if value is not None and not isinstance(value, Mapping)}
            told.pop("process_index", None)
            words = ", ".join(f"{name} {value}" for name, value in told.items())
            return f"{event.type.replace('_', ' ')}: {words}{_which_process(data)}"


def _end_in_words(data: Mapping[str, Any]) -> str:
    """`done, 3 results made, 0 reused, 0 failed, in 41 s, 2.1 GiB`."""
    words = str(data.get("status", ""))
    if signal := data.get("signal"):
        words += f" after {signal}"
    for name, what in (("n_committed", "made"), ("n_reused", "reused"), ("n_failed", "failed")):
        if isinstance(n := data.get(name), int):
            words += f", {counted(n, 'result')} {what}" if name == "n_committed" else f", {n:,} {what}"
    usage = data.get("usage") or {}
    if isinstance(wall_s := usage.get("wall_s"), int | float):
        words += f", in {span_in_words(wall_s)}"
    for name, of in (("max_rss_gib", ""), ("gpu_memory_gib", " of GPU memory")):
        if isinstance(gib := usage.get(name), int | float):
            words += f", {gib:,.1f} GiB{of}"
    return words


def _which_process(data: Mapping[str, Any]) -> str:
    """Of a task that several share: which one says so. The first speaks for most."""
    index = data.get("process_index")
    return f" (process {index})" if index else ""
