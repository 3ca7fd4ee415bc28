"""One squeue for all jobs and all processes of a deployment, and what its rows say of tasks.

Used by `scheduler`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kd_assets.durable import atomic_write, locked, prepare_folder
from kd_assets.scheduler.job import Ending, TaskPhase, TaskState
from kd_assets.scheduler.slurm.client import Slurm
from kd_assets.scheduler.slurm.parsing import AccountingRow, QueueRow, parse_queue
from kd_assets.scheduler.slurm.records import Array
from kd_assets.scheduler.slurm.states import RUNNING_STATES, base_state
from kd_assets.scheduler.submissions import read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """One answer of squeue."""

    at: float
    """When it was asked for."""
    rows: Mapping[str, Mapping[int | None, QueueRow]]
    """Job name → array index → row."""

    def find(self, array: Array, task: int) -> QueueRow | None:
        """The row of a task; that without an index stands for all cancelled ones that have none of their own."""
        rows = self.rows.get(array.name, {})
        return rows.get(task - array.first_task) or rows.get(None)


class SharedQueue:
    """squeue's answer, in a file that all runs of the deployment read: one query an interval for all their jobs."""

    def __init__(self, folder: Path, name: str, slurm: Slurm, clock: Callable[[], float]) -> None:
        """`name`: of the cluster, as far as this deployment tells clusters apart."""
        self._folder, self._name, self._slurm, self._clock = folder, name, slurm, clock

    def ask(self, *, max_age_s: float) -> Queue:
        """An answer of at most this age. Raises SchedulerUnreachableError."""
        prepare_folder(self._folder)
        shared = self._folder / f"{self._name}.json"
        with locked(self._folder / f"{self._name}.lock"):
            try:
                asked = read_json(shared)
            except ValueError:  # a power cut left it empty
                asked = None
            # A clock that was set back must not make an answer last for ever.
            if asked is None or not 0 <= self._clock() - asked["at"] < max_age_s:
                at = self._clock()
                asked = {"at": at, "text": self._slurm.queue_text()}
                atomic_write(shared, json.dumps(asked).encode())
        rows: dict[str, dict[int | None, QueueRow]] = {}
        for row in parse_queue(asked["text"]):
            rows.setdefault(row.name, {})[row.index] = row
        return Queue(at=asked["at"], rows=rows)


def live_state(row: QueueRow, *, phase: TaskPhase | None = None, reason: str | None = None) -> TaskState:
    running = base_state(row.state) in RUNNING_STATES
    return TaskState(
        phase=phase or (TaskPhase.RUNNING if running else TaskPhase.PENDING),
        reason=reason or (row.state if running else row.reason or row.state),
        restarts=row.restarts,
        task_id=row.task_id,
        node=row.node,
        started_at=row.started_at if running else None,
    )


def ended_state(row: QueueRow | AccountingRow, ending: Ending) -> TaskState:
    reason = row.state if row.reason in ("", "None") else f"{row.state} ({row.reason})"
    return TaskState(
        phase=TaskPhase.ENDED,
        ending=ending,
        reason=reason + (f" on {row.node}" if row.node else ""),
        exit_code=row.exit_code,
        restarts=row.restarts,
        task_id=row.task_id,
        node=row.node,
        started_at=row.started_at,
    )
