"""What each task of a job is in, by the queue, by what is known of it, and by the accounting. It only looks.

A task that a cluster which answers does not know keeps its last state for a grace period, and is lost after it. An end
that SLURM may take back (a requeue) is one only after a while. How long, is counted in `KnownJob.unseen_since`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from kd_assets.scheduler.job import Ending, TaskPhase, TaskState
from kd_assets.scheduler.slurm.accounting import Accounting
from kd_assets.scheduler.slurm.commands.client import Slurm
from kd_assets.scheduler.slurm.commands.parsing import AccountingRow, QueueRow
from kd_assets.scheduler.slurm.commands.states import RUNNING_STATES, base_state, ending_of, may_come_back
from kd_assets.scheduler.slurm.queue import Queue
from kd_assets.scheduler.slurm.records import Array, KnownJob
from kd_assets.scheduler.submissions import is_cancelled

REQUEUE_GRACE_S = 15.0
"""A preempted task or one of a failed node is seen ended for a moment before SLURM puts it back into the queue."""


def states_by_queue(job: KnownJob, queue: Queue, *, absence_grace_s: float) -> dict[int, TaskState]:
    """Task → its state."""
    arrays, states = arrays_by_task(job.arrays, queue), {}
    not_submitted = None
    for task in range(job.spec.n_tasks):
        if (array := arrays.get(task)) is None:
            not_submitted = not_submitted or _not_submitted(job)
            states[task] = not_submitted
        elif (row := queue.find(array, task)) is not None:
            states[task] = _state_of_row(job, task, row, queue)
        else:
            states[task] = job.endings.get(task) or _state_unseen(job, task, array, queue, absence_grace_s)
    return states


def explain_by_accounting(
    states: Mapping[KnownJob, dict[int, TaskState]], queue: Queue, accounting: Accounting
) -> None:
    """What the queue no longer shows, the accounting may: put its endings in the place of what is guessed."""
    unseen: dict[str, list[tuple[KnownJob, Array, int]]] = {}
    for job in states:
        for array in job.arrays:
            for task in array.tasks if not array.is_refused else ():
                is_guess = task in job.unseen_since and task not in job.endings and queue.find(array, task) is None
                if is_guess:
                    unseen.setdefault(array.name, []).append((job, array, task))
    asked_for = {array.name: array for waiting in unseen.values() for _, array, _ in waiting}
    last = {(r.name, r.index or 0): r for r in accounting.rows(list(asked_for.values()))}
    for job, array, task in (entry for waiting in unseen.values() for entry in waiting):
        row = last.get((array.name, task - array.first_task))
        ending = None if row is None else ending_of(row.state, row.reason, row.exit_code)
        if row is None or ending is None:
            continue
        if not (may_come_back(row.state) and queue.at - job.unseen_since[task] < REQUEUE_GRACE_S):
            states[job][task] = ended_state(row, ending)


def follow_by_id(states: Mapping[KnownJob, dict[int, TaskState]], queue: Queue, slurm: Slurm) -> None:
    """Before a task is called lost, its job's id is asked after: somebody may have changed both name and comment. What
    lives under it keeps its last known state. Asked only for what would be lost."""
    for job, tasks in states.items():
        arrays = arrays_by_task(job.arrays, queue)
        lost: dict[int, list[int]] = {}
        for task, state in tasks.items():
            if state.ending is Ending.LOST and task not in job.endings:
                lost.setdefault(arrays[task].number, []).append(task)
        for array in job.arrays:
            if array.number not in lost or array.job_id is None:
                continue
            live = slurm.live_indices(array.job_id, job.submission.folder)
            for task in lost[array.number]:
                if task - array.first_task in live or None in live:
                    tasks[task] = job.states.get(task) or TaskState(phase=TaskPhase.PENDING, reason="submitted")
                    job.tell_once(
                        "renamed",
                        f"SLURM job {array.job_id} has another name and comment than {array.name} was submitted "
                        "with: it is followed by its id",
                    )


def arrays_by_task(arrays: Sequence[Array], queue: Queue) -> dict[int, Array]:
    """Task → the array that it is in: the last one that was not refused. But one that was taken for lost and turned up
    late is at work already, and a later copy of it leaves by itself."""
    found = {task: array for array in arrays if not array.is_refused for task in array.tasks}
    for array in reversed(arrays):
        for task in array.tasks if array.absent and array.name in queue.rows else ():
            row = queue.find(array, task)
            if row is not None and ending_of(row.state, row.reason, row.exit_code) is None:
                found[task] = array
    return found


def _not_submitted(job: KnownJob) -> TaskState:
    why = next((a.refused for a in reversed(job.arrays) if a.is_refused), None)
    if any(a.impossible for a in job.arrays):
        return TaskState(phase=TaskPhase.ENDED, ending=Ending.IMPOSSIBLE, reason=f"SLURM refuses it: {why}")
    if is_cancelled(job.submission):
        return TaskState(phase=TaskPhase.ENDED, ending=Ending.CANCELLED, reason="cancelled before it was submitted")
    return TaskState(phase=TaskPhase.PENDING, reason=f"not submitted yet: {why}" if why else "not submitted yet")


def _state_of_row(job: KnownJob, task: int, row: QueueRow, queue: Queue) -> TaskState:
    ending = ending_of(row.state, row.reason, row.exit_code)
    if ending is None:
        job.unseen_since.pop(task, None)
        return live_state(row)
    if (known := job.endings.get(task)) is not None:
        return known  # what we made of it then: a held task that was given up is cancelled in SLURM's words
    if may_come_back(row.state):
        since = job.unseen_since.setdefault(task, queue.at)
        if queue.at - since < REQUEUE_GRACE_S:
            return dataclasses.replace(
                live_state(row), phase=TaskPhase.PENDING, reason=f"{row.state}: it may be requeued"
            )
    return ended_state(row, ending)


def _state_unseen(job: KnownJob, task: int, array: Array, queue: Queue, absence_grace_s: float) -> TaskState:
    last = job.states.get(task) or TaskState(phase=TaskPhase.PENDING, reason="submitted")
    # The answer is older than the question; or whether it is submitted at all is found out by `SlurmSubmitter.settle`.
    if queue.at <= array.at or not array.is_answered:
        return last
    since = job.unseen_since.setdefault(task, queue.at)
    if queue.at - since < absence_grace_s:
        return last
    return dataclasses.replace(
        last,
        phase=TaskPhase.ENDED,
        ending=Ending.LOST,
        reason=f"the cluster has not known {array.name} for {queue.at - since:.0f} s, and nobody saw it end",
    )


def live_state(row: QueueRow) -> TaskState:
    is_running = base_state(row.state) in RUNNING_STATES
    return TaskState(
        phase=TaskPhase.RUNNING if is_running else TaskPhase.PENDING,
        reason=row.state if is_running else row.reason or row.state,
        restarts=row.restarts,
        task_id=row.task_id,
        node=row.node,
        started_at=row.started_at if is_running else None,
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
