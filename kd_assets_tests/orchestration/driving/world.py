"""What a driver sees, scripted: a fake cluster and a fake clock, over real job folders, event files and results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kd_assets.contract import Asset, Event, EventType, JobFile, JobKind, Output, TeacherParams, WorkUnit, event_file
from kd_assets.errors import SchedulerUnreachableError
from kd_assets.orchestration.driving.callbacks import Callbacks, CommittedResult
from kd_assets.orchestration.driving.driver import Driver
from kd_assets.orchestration.driving.following import FollowedJob
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.retries import Asked, FailureClass
from kd_assets.scheduler import (
    AccountedAttempt,
    Ending,
    JobSpec,
    Poll,
    Resources,
    Submission,
    TaskPhase,
    TaskState,
    submission_key,
)
from kd_assets.scheduler.submissions import SubmissionFolders, mark_cancelled
from kd_assets.store import commit_file_result, plan_output

RECIPE = "tiny"
RUN_ID = "this-run"
START = 1000.0
LONGEST_S = 20_000.0
"""Of a test's clock: a driver that waits for longer waits for ever."""
KINDS_EVENT: dict[EventType, dict[str, Any]] = {
    "task_started": {"slurm_nodelist": "node1"},
    "task_finished": {"status": "done", "signal": None},
}


class FakeScheduler:
    """Stands for a cluster: which jobs there are, whether it answers, and where each task is, is what a test says.

    Nothing runs. Submission folders, specs, job files and marks are real.
    """

    poll_interval_s = 1.0
    visibility_grace_s = 10.0

    def __init__(self, jobs_folder: Path) -> None:
        self.folders = SubmissionFolders(jobs_folder)
        self.answers = True
        """Whether anything that is asked of it is answered."""
        self.states: dict[Submission, dict[int, TaskState]] = {}
        self.on_submit: Callable[[Submission], object] = lambda submission: None
        """Called with each new job once it is there, before `submit` returns."""
        self.submitted: list[Submission] = []
        self.cancelled: list[Submission] = []
        self.n_polls = self.n_live = 0
        self.kept_from: dict[Submission, set[str]] = {}
        """Job → nodes that what waits of it is to stay away from."""

    def deciding(self, recipe: str, kind: JobKind) -> AbstractContextManager[None]:
        return self.folders.deciding(recipe, kind)

    def live(self, recipe: str, kind: JobKind) -> list[Submission]:
        self.n_live += 1
        self._must_answer()
        return [s for s in self.states if self.is_live(s)]

    def is_live(self, submission: Submission) -> bool:
        return any(state.phase is not TaskPhase.ENDED for state in self.states.get(submission, {}).values())

    def submit(self, spec: JobSpec, write_job_file: Callable[[Submission], object]) -> Submission:
        self._must_answer()
        submission = self.folders.create(spec, write_job_file)
        waiting = TaskState(phase=TaskPhase.PENDING, reason="Priority")
        self.states[submission] = dict.fromkeys(range(spec.n_tasks), waiting)
        self.submitted.append(submission)
        self.on_submit(submission)
        return submission

    def poll(self, submissions: Sequence[Submission]) -> Poll:
        self.n_polls += 1
        states = {s: dict(self.states[s]) for s in submissions}
        return Poll(states=states, unreachable=None if self.answers else "it is away")

    def keep_from(self, submissions: Sequence[Submission], nodes: Iterable[str]) -> None:
        for submission in submissions:
            self.kept_from.setdefault(submission, set()).update(nodes)

    def cancel(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            mark_cancelled(submission)
            self.cancelled.append(submission)

    def begin_cancelling(self, submissions: Sequence[Submission]) -> None:
        self.cancel(submissions)

    def accounting(self, submission: Submission) -> Mapping[int, Sequence[AccountedAttempt]]:
        return {}

    def describe(self, submission: Submission) -> str:
        return f"fake job {submission.folder.name}"

    def log_file(self, submission: Submission, task_index: int) -> Path:
        return submission.log_folder / f"{task_index}.log"

    def submitted_at(self, submission: Submission) -> float:
        return START

    def _must_answer(self) -> None:
        if not self.answers:
            raise SchedulerUnreachableError("it is away")


class Log:
    """What the run's log has, line by line with its level."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str, /) -> None:
        self.lines.append(f"info {message}")

    def warning(self, message: str, /) -> None:
        self.lines.append(f"warning {message}")

    def error(self, message: str, /) -> None:
        self.lines.append(f"error {message}")

    def count(self, words: str) -> int:
        return sum(words in line for line in self.lines)

    def __contains__(self, words: str) -> bool:
        return self.count(words) > 0


class World:
    """A recipe whose partitions have these caches each, a cluster for them, and a run that wants them."""

    def __init__(
        self, folder: Path, partitions: Sequence[str] = ("p0", "p1"), assets: Sequence[Asset] = ("topk_cache",)
    ) -> None:
        self.now = START
        self.partitions = list(partitions)
        self.store = folder / "store" / RECIPE
        self.store.mkdir(parents=True)  # where it is missing, a share is away
        self.scheduler = FakeScheduler(folder / "jobs")
        self.log = Log()
        self.recorded: list[tuple[str, Submission | None, int | None]] = []
        """Partition, job and task of each recorded result, in order."""
        self.recorded_at: dict[str, float] = {}
        """Partition → seconds after the start."""
        self.observed: list[tuple[Submission, Counter[FailureClass]]] = []
        self.is_terminated = True
        self.is_canceled = False
        self.n_asked_whether_canceled = 0
        self.lost_interrupt_from = math.inf
        """The time from which on there is an interrupt that nothing was raised by."""
        self.units = tuple(
            WorkUnit(partition_key=key, n_tokens=1, outputs=tuple(self.output(key, asset) for asset in assets))
            for key in self.partitions
        )
        self._actions: list[tuple[float, Callable[[], object]]] = []

    # ------------------------------------------------------------------ what is wanted

    def output(self, partition_key: str, asset: Asset = "topk_cache") -> Output:
        identity = {"asset": asset, "input": f"shard of {partition_key}"}
        return plan_output(asset, identity, recipe_folder=self.store, partition_key=partition_key)

    def folder_of(self, partition_key: str) -> Path:
        return Path(self.output(partition_key).path)

    def driver(self, *, n_tasks: int = 1, memory_gib: float | None = 1.0, token_budget: int | None = 4096) -> Driver:
        return Driver(
            PlannedWork(kind="teacher", units=self.units),
            RECIPE,
            self.scheduler,
            Callbacks(
                run_id=RUN_ID,
                log=self.log,
                record=self._record,
                flush=lambda: None,
                observe=lambda job, failures: self.observed.append((job.submission, Counter(failures))),
                is_terminated=lambda: self.is_terminated,
                is_canceled=self._is_canceled,
                raise_lost_interrupt=lambda: interrupt() if self.now >= self.lost_interrupt_from else None,
            ),
            asked=Asked(resources=Resources(memory_gib=memory_gib), token_budget=token_budget),
            n_tasks=n_tasks,
            concurrency=n_tasks,
            make_job_file=self._job_file,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def run(self, **settings: Any) -> Driver:
        """A driver that has run to its end."""
        driver = self.driver(**settings)
        driver.run()
        return driver

    def _is_canceled(self) -> bool:
        self.n_asked_whether_canceled += 1
        return self.is_canceled

    def _record(self, result: CommittedResult) -> None:
        key = result.unit.partition_key
        self.recorded.append((key, None if result.job is None else result.job.submission, result.task))
        self.recorded_at[key] = self.now - START

    def _job_file(
        self,
        work: PlannedWork,
        spec: JobSpec,
        tasks: tuple[tuple[int, ...], ...],
        submission: Submission,
        asked: Asked,
    ) -> JobFile:
        return JobFile(
            kind=work.kind,
            recipe=RECIPE,
            key=spec.key,
            recipe_folder=str(self.store),
            events_folder=str(submission.events_folder),
            tasks=tasks,
            units=work.units,
            teacher=TeacherParams(
                model="m", weights_fingerprint="w", tokenizer_fingerprint="t", token_budget=asked.token_budget
            ),
        )

    # ------------------------------------------------------------------ time

    def at(self, after_s: float, action: Callable[[], object]) -> None:
        """Have something happen so many seconds from now."""
        self._actions.append((self.now + after_s, action))
        self._actions.sort(key=lambda pair: pair[0])

    def sleep(self, seconds: float) -> None:
        assert self.now < START + LONGEST_S, "it waits for ever"
        self.now += seconds
        while self._actions and self._actions[0][0] <= self.now:
            self._actions.pop(0)[1]()

    # ------------------------------------------------------------------ what tasks and the cluster do

    def job_of_another_run(self, partitions: Sequence[str], n_tasks: int = 1) -> Submission:
        """A live job for these partitions that was there before this run, dealt out to its tasks in turn."""
        units = tuple(u for u in self.units if u.partition_key in partitions)
        tasks = tuple(tuple(range(task, len(units), n_tasks)) for task in range(n_tasks))
        key = submission_key("teacher", RECIPE, units)
        spec = JobSpec(key=key, recipe=RECIPE, kind="teacher", n_tasks=n_tasks, concurrency=n_tasks)
        work, asked = PlannedWork(kind="teacher", units=units), Asked(resources=spec.resources)
        submission = self.scheduler.submit(
            spec, lambda new: new.job_file.write_text(self._job_file(work, spec, tasks, new, asked).to_json())
        )
        self.scheduler.submitted.clear()
        return submission

    def say(
        self,
        submission: Submission,
        event_type: EventType,
        task: int = 0,
        *,
        attempt: int = 0,
        process_index: int = 0,
        **data: Any,
    ) -> None:
        """A task appends an event to its file."""
        path = event_file(submission.events_folder, task, process_index)
        known = KINDS_EVENT.get(event_type, {}) | {"process_index": process_index}
        event = Event(type=event_type, time=self.now, task=task, attempt=attempt, data=known | data)
        with path.open("a") as f:
            f.write(event.to_line())

    def commit(self, *partition_keys: str) -> None:
        """Somebody commits the results of these partitions."""
        for key in partition_keys:
            commit_file_result(
                self.output(key),
                recipe=RECIPE,
                recipe_folder=self.store,
                partition_key=key,
                files={"numbers": b"1"},
                checks={},
                provenance={},
            )

    def commit_and_say(self, submission: Submission, partition_key: str, task: int = 0) -> None:
        self.commit(partition_key)
        self.say_committed(submission, partition_key, task)

    def say_committed(self, submission: Submission, partition_key: str, task: int = 0) -> None:
        output = self.output(partition_key)
        self.say(submission, "committed", task, partition_key=partition_key, asset=output.asset, path=output.path)

    def set_state(self, submission: Submission, task: int, phase: TaskPhase, **state: Any) -> None:
        self.scheduler.states[submission][task] = TaskState(phase=phase, **state)

    def end(self, submission: Submission, ending: Ending = Ending.EXITED, task: int = 0, **state: Any) -> None:
        """The cluster says from now on that a task has ended."""
        self.set_state(submission, task, TaskPhase.ENDED, ending=ending, **{"reason": ending.value} | state)

    def work_through(self, submission: Submission) -> None:
        """Every task of a job starts, commits what it was given, says it is done, and ends."""
        job = FollowedJob.of(submission)
        for task in job.reports:
            self.say(submission, "task_started", task)
            for output in job.outputs_of(task):
                self.commit_and_say(submission, Path(output.path).parent.name, task)
            self.say(submission, "task_finished", task)
            self.end(submission, task=task, exit_code=0)

    def on_each_submission(self, *scripts: Callable[[Submission], object]) -> None:
        """What each new job does, from its submission on; there must be as many as there are scripts at most."""
        remaining = list(scripts)

        def begin(submission: Submission) -> None:
            remaining.pop(0)(submission)

        self.scheduler.on_submit = begin

    @property
    def keys_recorded(self) -> list[str]:
        return [key for key, _, _ in self.recorded]

    def specs(self) -> Iterator[JobSpec]:
        """Of what this run has submitted, in order."""
        return (FollowedJob.of(submission).spec for submission in self.scheduler.submitted)


def interrupt() -> None:
    """What Ctrl-C does, and a termination by Dagster."""
    raise KeyboardInterrupt
