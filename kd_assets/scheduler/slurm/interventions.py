"""What is done about tasks that SLURM alone would leave waiting for ever, or send back to a node that failed.

Only for jobs that somebody follows: who merely looks does none of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from kd_assets.durable import storage_errors
from kd_assets.errors import SchedulerError, SchedulerMisusedError, SchedulerUnreachableError, StorageUnavailableError
from kd_assets.scheduler.job import Ending, TaskPhase, TaskState
from kd_assets.scheduler.slurm.commands.client import Slurm
from kd_assets.scheduler.slurm.commands.parsing import QueueRow
from kd_assets.scheduler.slurm.commands.states import is_bad_node, is_held_launch, is_impossible_wait
from kd_assets.scheduler.slurm.queue import Queue
from kd_assets.scheduler.slurm.records import KnownJob
from kd_assets.scheduler.slurm.task_states import arrays_by_task, ended_state


class Interventions:
    """Changes what SLURM does with tasks, and tells of it by the notices of their job."""

    def __init__(self, slurm: Slurm, *, clock: Callable[[], float], poll_interval_s: float) -> None:
        self._slurm, self._clock = slurm, clock
        # A task that was just released may be shown held for one more look: it has to have been started since.
        self._time_to_start_s = max(5.0, 1.5 * poll_interval_s)

    # ------------------------------------------------------------------ tasks that wait for ever

    def release_or_give_up(self, job: KnownJob, states: dict[int, TaskState], queue: Queue) -> None:
        """Release a task whose launch failed and that SLURM holds, once; then give it up, as one that can never
        start. Changes the states of those that are given up."""
        arrays = arrays_by_task(job.arrays, queue)
        for task, state in states.items():
            array = arrays.get(task)
            row = None if array is None else queue.find(array, task)
            if row is None or row.state != "PENDING" or state.phase is TaskPhase.ENDED:
                continue
            held_again = False
            if is_held_launch(row.reason):
                released_at = _released_at(job, task)
                if released_at is None:
                    self._release(job, task, row.task_id)
                    job.notices.append(f"task {task} ({row.task_id}) is held by SLURM ({row.reason}): released once")
                    continue
                held_again = self._clock() - released_at > self._time_to_start_s
            if held_again or is_impossible_wait(row.reason):
                self._slurm.cancel([row.task_id])
                ending = Ending.HELD if held_again else Ending.IMPOSSIBLE
                reason = f"SLURM cannot start it: {row.reason}"
                states[task] = dataclasses.replace(ended_state(row, ending), reason=reason)

    def _release(self, job: KnownJob, task: int, task_id: str) -> None:
        try:
            self._slurm.release(task_id)
        except (SchedulerUnreachableError, SchedulerMisusedError):
            raise
        except SchedulerError:  # somebody else released or cancelled it; or it may not be, and then stays held
            pass
        job.released_at[task] = self._clock()
        mark = job.submission.released_mark(task)
        # Without the mark another process may release it once more.
        with suppress(StorageUnavailableError), storage_errors(mark, "write"):
            mark.touch(mode=0o640)

    # ------------------------------------------------------------------ nodes that failed

    def leave_failed_nodes(self, states: Mapping[KnownJob, dict[int, TaskState]]) -> None:
        """Exclude the node from which SLURM put a task back into the queue, if that node is a bad one now: SLURM itself
        would start the task there again as soon as the node is back. sinfo is asked only when a task was put back.
        Completes `TaskState.failed_nodes`."""
        requeued = [
            (job, task, before) for job, tasks in states.items() for task, before in _requeued(job, tasks).items()
        ]
        if requeued:
            try:
                words = self._slurm.node_states(sorted({before.node for _, _, before in requeued}))
            except SchedulerMisusedError:
                raise
            except SchedulerError:
                requeued.clear()  # asked again at the next look
        for job, task, before in requeued:
            del job.ran_on[task]
            if is_bad_node(words.get(before.node, "")):
                self._leave(job, task, states[job][task], before, words[before.node])
        for job, tasks in states.items():
            for task, nodes in job.failed_nodes.items():
                tasks[task] = dataclasses.replace(tasks[task], failed_nodes=nodes)

    def _leave(self, job: KnownJob, task: int, state: TaskState, before: TaskState, word: str) -> None:
        job.failed_nodes[task] = (*job.failed_nodes.get(task, ()), before.node)
        if state.phase is TaskPhase.PENDING:
            try:
                self._slurm.exclude(state.task_id, job.failed_nodes[task])
            except SchedulerMisusedError:
                raise
            except SchedulerError:  # it has been started meanwhile
                pass
        job.notices.append(
            f"task {task} ({before.task_id}) was requeued: its node {before.node} is {word} and is excluded from now on"
        )

    # ------------------------------------------------------------------ nodes that are at fault

    def keep_from_nodes(self, job: KnownJob, states: Mapping[int, TaskState], queue: Queue) -> None:
        """Keep the tasks that wait from the nodes of `KnownJob.keep_from`, all of an array with one question and one
        command, and each that was put back into the queue by itself: it may be kept from nodes of its own."""
        arrays = arrays_by_task(job.arrays, queue)
        groups: dict[tuple[int, int | None], list[tuple[int, QueueRow]]] = {}
        """Array, and a task that is by itself → waiting tasks with their rows."""
        for task, state in states.items():
            array = arrays.get(task)
            is_kept = job.keep_from <= job.kept_from.get(task, frozenset())
            row = None if array is None or is_kept else queue.find(array, task)
            if row is None or row.state != "PENDING" or state.phase is not TaskPhase.PENDING:
                continue
            own = (row.job_id, None if row.restarts == 0 and task not in job.failed_nodes else task)
            groups.setdefault(own, []).append((task, row))
        for group in groups.values():
            self._keep_from(job, group)

    def _keep_from(self, job: KnownJob, group: Sequence[tuple[int, QueueRow]]) -> None:
        nodes = ", ".join(sorted(job.keep_from))
        try:
            self._slurm.exclude(group[0][1].task_id, sorted(job.keep_from), of=task_list([r for _, r in group]))
        except SchedulerMisusedError:
            raise
        except SchedulerUnreachableError as e:  # tried again at the next look
            job.tell_once("keep_from", f"what waits could not be kept from {nodes} yet: {e}")
            return
        except SchedulerError as e:  # some were started meanwhile, or no node would be left
            job.tell_once("keep_from", f"not all that waits could be kept from {nodes}: {e}")
        else:
            job.notices.append(f"{len(group)} waiting tasks are kept from {nodes}, where tasks failed")
        job.kept_from |= dict.fromkeys((task for task, _ in group), job.keep_from)


def task_list(rows: Sequence[QueueRow]) -> str:
    """Tasks of one array as scontrol takes them: `14_3`, `14_[0-2,7]`."""
    indices = sorted(row.index for row in rows if row.index is not None)
    if len(rows) == 1 or not indices:
        return rows[0].task_id
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    words = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{rows[0].job_id}_[{words}]"


def _requeued(job: KnownJob, tasks: Mapping[int, TaskState]) -> dict[int, TaskState]:
    """Tasks that were put back into the queue since they were last seen running, with what was known of them then."""
    found = {}
    for task, state in tasks.items():
        if (before := job.ran_on.get(task)) is not None and state.restarts > before.restarts:
            found[task] = before
        elif state.phase is TaskPhase.RUNNING and state.reason == "RUNNING":  # not while its end is dealt with
            job.ran_on[task] = state
    return found


def _released_at(job: KnownJob, task: int) -> float | None:
    """When any process released a held task; None: none did."""
    if task not in job.released_at:
        mark = job.submission.released_mark(task)
        with storage_errors(mark, "look at"):
            try:
                job.released_at[task] = mark.stat().st_mtime
            except FileNotFoundError:
                return None
    return job.released_at[task]
