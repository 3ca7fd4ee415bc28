"""The words of a job: what it asks for, its tasks and their states, and what orchestration asks of a scheduler."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from kd_assets.contract import JobKind, WorkUnit
from kd_assets.errors import SchedulerError
from kd_assets.scheduler.folder import Submission


class TaskPhase(enum.Enum):
    """Where a task is. Only `ENDED` is final, and it says nothing about success: committed results do."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


class Ending(enum.Enum):
    """Why a task is over, in a scheduler's eyes. None of them says that the work is done."""

    EXITED = "exited"
    """The batch script ended by itself; the exit code says how."""
    KILLED = "killed"
    """By a signal that no limit explains: kill -9, a lost supervisor."""
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    NODE_FAILURE = "node failure"
    HOST_MEMORY = "host memory"
    LAUNCH_FAILURE = "launch failure"
    """The node could not start it: a missing folder, a failed prolog."""
    HELD = "held"
    """Its launch failed again and again, and the scheduler will not try once more by itself."""
    IMPOSSIBLE = "impossible request"
    CANCELLED = "cancelled"
    LOST = "lost"
    """The scheduler no longer knows it, and nobody saw its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskState:
    """What the scheduler knows of one array task."""

    phase: TaskPhase
    reason: str = ""
    """Why it ended or waits, in words fit for an error message."""
    ending: Ending | None = None
    """Set exactly when the phase is `ENDED`."""
    exit_code: int | None = None
    """Of the last attempt; negative for a signal; None while running or where the scheduler never learned it."""
    restarts: int = 0
    task_id: str = ""
    """The scheduler's name for it, `14_3` in SLURM; empty where it has none."""
    node: str = ""
    """Where it runs, or ran last; empty while it waits."""
    started_at: float | None = None
    """Seconds since the epoch; of the last attempt."""
    failed_nodes: tuple[str, ...] = ()
    """Where it ran before and had to leave since the node failed, as far as that was seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What each task of a job asks for. None says nothing: it is what is said elsewhere (see `Profile.resources`), or
    else what the site gives by default. 0, False and an empty tuple say no."""

    slurm_partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int | None = None
    gpu_memory_gib: float | None = None
    """Of one GPU. Not asked for: it tells whether a teacher fits (see `kd_assets.model_files.placement`)."""
    cpus: int | None = None
    memory_gib: float | None = None
    memory_of: Literal["cpu", "gpu", "site"] | None = None
    """What `memory_gib` is of; None: a node. "site": nothing is asked for, since the site has no limits of memory."""
    max_memory_gib: float | None = None
    """How far the memory may be raised when a task ran out of it."""
    time_minutes: int | None = None
    exclusive: bool | None = None
    exclude: str | None = None
    """Nodes that a task must not run on, as SLURM writes them: `n[1-3],n7`."""
    nodelist: str | None = None
    """The node that every task must run on."""
    processes_per_task: int | None = None
    """Processes that share a task's partitions on its node, each with an equal share of the GPUs and a teacher of its
    own; None: one, unless `kd_assets.model_files.placement` makes it more."""
    sbatch_options: tuple[str, ...] | None = None
    """Further options of sbatch, one argument each (`--reservation=maintenance`)."""

    @property
    def memory_of_node_gib(self) -> float | None:
        """What is asked for of a node, as far as it can be told."""
        n = {None: 1, "cpu": self.cpus, "gpu": self.gpus_per_node}.get(self.memory_of)
        return None if n is None or self.memory_gib is None else n * self.memory_gib

    @property
    def n_processes(self) -> int:
        return self.processes_per_task or 1


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """One array of tasks to start."""

    key: str
    recipe: str
    kind: JobKind
    n_tasks: int
    concurrency: int
    """How many tasks may run at once."""
    resources: Resources = field(default_factory=Resources)
    excluded_nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Both become parts of job names, comments and paths that shells and schedulers read.
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", self.recipe):
            raise SchedulerError(f"{self.recipe!r} cannot name a recipe's jobs: letters, digits and _ only")
        if not re.fullmatch(r"[0-9a-f]{32}", self.key):
            raise SchedulerError(f"{self.key!r} is no submission key: 32 hex digits (see submission_key)")

    @property
    def name(self) -> str:
        return f"kd-{self.recipe}-{self.kind}-{self.key[:12]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Poll:
    """One look at jobs. A task's state is the last known one while the scheduler cannot be reached."""

    states: Mapping[Submission, Mapping[int, TaskState]]
    unreachable: str | None = None
    """Why the scheduler gave no answer this time; None when it did. It is never a reason to call a job ended."""
    notices: Sequence[str] = ()
    """What is worth a line in the log: a held task released, a refusal that is waited out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountedAttempt:
    """One start of a task as the site's accounting has it."""

    state: str
    """In the scheduler's own word."""
    elapsed_s: float
    cpu_s: float
    n_cpus: int
    max_rss_gib: float | None


class Scheduler(Protocol):
    """What orchestration asks of a scheduler. Raises SchedulerError for a refusal that waiting will not change, and
    SchedulerUnreachableError where there is no answer at all, be it of the scheduler or of the disk with the files of
    its jobs. `poll`, `describe`, `log_file` and `accounting` never raise the second."""

    @property
    def poll_interval_s(self) -> float:
        """How often `poll` may be called."""
        ...

    @property
    def visibility_grace_s(self) -> float:
        """How long what a task wrote may take to be seen here after its end."""
        ...

    def deciding(self, recipe: str, kind: JobKind) -> AbstractContextManager[None]:
        """Held while looking for live jobs and submitting what none of them does: one decision at a time."""
        ...

    def live(self, recipe: str, kind: JobKind) -> list[Submission]:
        """All submissions of a recipe's jobs of a kind that are not over, whoever made them."""
        ...

    def submit(self, spec: JobSpec, write_job_file: Callable[[Submission], object]) -> Submission:
        """Start a job. `write_job_file` must write `submission.job_file`; it runs before anything starts."""
        ...

    def poll(self, submissions: Sequence[Submission]) -> Poll:
        """One query for all of them."""
        ...

    def keep_from(self, submissions: Sequence[Submission], nodes: Iterable[str]) -> None:
        """What of them waits, and what is submitted later, is to stay away from these nodes, besides those of earlier
        calls. Takes effect with the next `poll`."""
        ...

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """End them; returns once they are gone."""
        ...

    def begin_cancelling(self, submissions: Sequence[Submission]) -> None:
        """Ask them to end, without waiting for it: for who may not wait, and asks again until they are gone."""
        ...

    def accounting(self, submission: Submission) -> Mapping[int, Sequence[AccountedAttempt]]:
        """Task → its attempts, oldest first; empty where nobody keeps accounts, or not yet."""
        ...

    def describe(self, submission: Submission) -> str: ...

    def log_file(self, submission: Submission, task_index: int) -> Path:
        """Standard output and error of all attempts of a task, appended."""
        ...

    def submitted_at(self, submission: Submission) -> float:
        """Seconds since the epoch."""
        ...


def submission_key(kind: JobKind, recipe: str, units: Iterable[WorkUnit]) -> str:
    """32 hex digits that equal work shares: kind, recipe and every output with the fingerprint of its content.

    Who asks, when, in which order and with how many tasks do not matter.
    """
    outputs = sorted((o.asset, u.partition_key, o.fingerprint) for u in units for o in u.outputs)
    return hashlib.sha256(json.dumps([kind, recipe, outputs]).encode()).hexdigest()[:32]
