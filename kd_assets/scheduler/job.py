"""The words of a submission: its key, its folder and files, its tasks and their states."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kd_assets.contract import JobKind, WorkUnit


class TaskPhase(enum.Enum):
    """Where a task is. Only `ENDED` is final, and it says nothing about success: committed results do."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskState:
    """What the scheduler knows of one array task."""

    phase: TaskPhase
    reason: str = ""
    """Why it ended or waits, in words fit for an error message."""
    exit_code: int | None = None
    """Of the last attempt; negative for a signal; None while running or where the scheduler never learned it."""
    restarts: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """One array of tasks to start."""

    key: str
    recipe: str
    kind: JobKind
    n_tasks: int
    concurrency: int
    """How many tasks may run at once."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the tasks' environment. No secrets: a scheduler may show it."""

    @property
    def name(self) -> str:
        return f"kd-{self.recipe}-{self.kind}-{self.key[:12]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job that was handed to the scheduler once; its folder holds everything about it and is never deleted.

    The folder is `<jobs folder>/<recipe>/<kind>-<key>/<number>/`: the same work submitted again after an end is the
    next number.
    """

    folder: Path

    @property
    def job_file(self) -> Path:
        return self.folder / "job.json"

    @property
    def events_folder(self) -> Path:
        return self.folder / "events"

    @property
    def log_folder(self) -> Path:
        return self.folder / "logs"

    def log_file(self, task_index: int) -> Path:
        """Standard output and error of all attempts of a task, appended."""
        return self.log_folder / f"task-{task_index:05d}.log"


def submission_key(kind: JobKind, recipe: str, units: Iterable[WorkUnit]) -> str:
    """32 hex digits that equal work shares: kind, recipe and every output with the fingerprint of its content.

    Who asks, when, in which order and with how many tasks do not matter.
    """
    outputs = sorted((o.asset, u.partition_key, o.fingerprint) for u in units for o in u.outputs)
    return hashlib.sha256(json.dumps([kind, recipe, outputs]).encode()).hexdigest()[:32]


def task_environment(
    *, job_id: int, name: str, task_index: int, n_tasks: int, restarts: int, node: str, cpus: int, folder: Path
) -> dict[str, str]:
    """The variables SLURM gives an array task (sbatch(1), OUTPUT ENVIRONMENT VARIABLES), for schedulers that are not
    SLURM."""
    return {
        "SLURM_JOB_ID": str(job_id),
        "SLURM_JOB_NAME": name,
        "SLURM_JOB_NODELIST": node,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CLUSTER_NAME": "local",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_CPUS_ON_NODE": str(cpus),
        "SLURMD_NODENAME": node,
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_ARRAY_JOB_ID": str(job_id),
        "SLURM_ARRAY_TASK_ID": str(task_index),
        "SLURM_ARRAY_TASK_COUNT": str(n_tasks),
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": str(n_tasks - 1),
        "SLURM_RESTART_COUNT": str(restarts),
    }
