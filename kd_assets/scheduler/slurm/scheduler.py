"""Jobs on a SLURM cluster: one array a submission, found again by name, followed with one query for all of them.

Four rules, each learnt from how others fail:
- The intent is on disk before sbatch runs, under a name that no other array ever has. An answer that was lost is looked
  up by that name, and only when the cluster has answered without it for a while is the array submitted again.
- A job is its name. Ids are reused after a controller lost its state; they address commands, and identify nothing.
- No answer is no information: the last known state stands. A task that a cluster which answers does not know is lost
  after a grace period, and not before.
- A state says why a task ended, never that its work is done.

What is on disk of a submission is in `records`, submitting in `submitter`, the shared squeue in `queue`; SLURM's
commands are in `client`, their text in `parsing`, their state words in `states`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kd_assets.contract import JobKind
from kd_assets.errors import SchedulerError, SchedulerUnreachableError
from kd_assets.scheduler.folder import Submission
from kd_assets.scheduler.job import AccountedAttempt, Ending, JobSpec, Poll, TaskPhase, TaskState
from kd_assets.scheduler.slurm.client import Slurm
from kd_assets.scheduler.slurm.command import CommandRunner, command_runner_for
from kd_assets.scheduler.slurm.parsing import AccountingRow, QueueRow
from kd_assets.scheduler.slurm.profile import Profile
from kd_assets.scheduler.slurm.queue import Queue, SharedQueue, ended_state, live_state
from kd_assets.scheduler.slurm.records import Array, alone, read_arrays, read_endings, write_answer, write_endings
from kd_assets.scheduler.slurm.states import ending_of, is_bad_node, is_held_launch, is_impossible_wait, may_come_back
from kd_assets.scheduler.slurm.submitter import SlurmSubmitter
from kd_assets.scheduler.submissions import (
    SubmissionFolders,
    is_cancelled,
    mark_cancelled,
    read_json,
    read_spec,
    write_json,
)

CANCEL_PATIENCE_S = 240.0
"""How long `cancel` tries: below Dagster's own patience with a run that is terminated (`cancel_timeout_seconds`)."""
CANCEL_POLL_S = (0.5, 5.0)
"""First and longest pause between two looks at a job that is being cancelled."""
SCANCEL_AGAIN_S = 30.0
"""A task that traps TERM has as long as SLURM's KillWait, 30 s by default."""
REPLY_GRACE_S = 15.0
"""How long after an sbatch without an answer its job may still turn up: a busy controller works off its queue."""
UNSEEN_FILE = "unseen.json"
REQUEUE_GRACE_S = 15.0
"""A preempted task or one of a failed node is seen ended for a moment before SLURM puts it back into the queue."""


@dataclass(slots=True)
class _Memory:
    """What one scheduler object has seen of a submission; lost with the process, and found out again."""

    states: dict[int, TaskState] = field(default_factory=dict)
    unseen_since: dict[int, float] = field(default_factory=dict)
    """Task → when a cluster that answered first did not know it, or showed an end that may be taken back."""
    unseen_written: dict[int, float] = field(default_factory=dict)
    """What of it is on disk."""
    ran_on: dict[int, TaskState] = field(default_factory=dict)
    """Task → what was known of it when it was last seen running."""
    failed_nodes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    """What the next poll is to say."""


class SlurmScheduler:
    """Submits to one cluster; `jobs_folder` must be seen by its nodes under the same path."""

    def __init__(
        self,
        jobs_folder: Path,
        *,
        profile: Profile,
        script: Path,
        python: str,
        secrets_file: Path | None = None,
        runner: CommandRunner | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folders, self._profile, self._script = SubmissionFolders(jobs_folder), profile, script
        self._clock, self._sleep = clock, sleep
        self._slurm = Slurm(runner or command_runner_for(profile), timeout_s=profile.command_timeout_s)
        self._queue = SharedQueue(jobs_folder / ".slurm", profile.name, self._slurm, clock)
        self._submitter = SlurmSubmitter(
            self._slurm,
            jobs_folder=jobs_folder,
            profile=profile,
            script=script,
            python=python,
            secrets_file=secrets_file,
            clock=clock,
        )
        self._memory: dict[Submission, _Memory] = {}
        self._has_accounting = True

    @property
    def poll_interval_s(self) -> float:
        return self._profile.poll_interval_s

    @property
    def visibility_grace_s(self) -> float:
        return self._profile.visibility_grace_s

    def deciding(self, recipe: str, kind: JobKind) -> AbstractContextManager[None]:
        """See `Scheduler`."""
        return self._folders.deciding(recipe, kind)

    # ------------------------------------------------------------------ submitting

    def submit(self, spec: JobSpec, write_job_file: Callable[[Submission], object]) -> Submission:
        """Submit what the site takes now; `poll` submits the rest.

        Raises SchedulerError with SLURM's own words for a request that can never be granted.
        """
        if not self._script.is_file():
            raise SchedulerError(f"the batch script {self._script} is missing: run from a checkout that has slurm/")
        self.preview(spec)  # raises what sbatch could not be asked, while nothing is written

        def prepare(new: Submission) -> None:
            write_job_file(new)
            self._submitter.prepare(new, spec)

        submission = self._folders.create(spec, prepare)
        self._remembered(submission).notices += self._submitter.submit_more(submission, {})
        arrays = read_arrays(submission)
        refusal = next((a.refused for a in arrays if a.impossible), None)
        if refusal is not None and not any(a.may_run for a in arrays):
            mark_cancelled(submission)
            raise SchedulerError(f"SLURM refuses {spec.name}: {refusal}")
        return submission

    def preview(self, spec: JobSpec) -> list[list[str]]:
        """The command lines that `submit` would run now, with `NUMBER` and `NONCE` where each submission differs."""
        return self._submitter.preview(spec)

    def environment_text(self, spec: JobSpec) -> str:
        """What every task sources before it starts."""
        return self._submitter.environment_text(spec)

    # ------------------------------------------------------------------ finding and following

    def live(self, recipe: str, kind: JobKind) -> list[Submission]:
        """Those of which a task may still run or be submitted. It only looks: what is to be done about a job is for
        those who follow it. Raises SchedulerUnreachableError: then nobody knows."""
        candidates = [
            s
            for s in self._folders.newest(recipe, kind)
            if (s.folder / "arrays").is_dir() and not self._is_over(s, read_endings(s))
        ]
        if not candidates:
            return []
        states = self._poll(candidates, acts=False).states
        return [s for s in candidates if any(t.phase is not TaskPhase.ENDED for t in states[s].values())]

    def poll(self, submissions: Sequence[Submission]) -> Poll:
        """The states of all tasks by one squeue, and one sacct for those that it no longer shows."""
        try:
            return self._poll(submissions, acts=True)
        except SchedulerUnreachableError as e:
            return Poll(states={s: self._last_known(s) for s in submissions}, unreachable=str(e))

    def _poll(self, submissions: Sequence[Submission], *, acts: bool) -> Poll:
        """`acts`: also submit what is left, release what is held, keep away from failed nodes."""
        queue = self._queue.ask(max_age_s=0.9 * self.poll_interval_s)
        notices: list[str] = []
        for submission in submissions if acts else ():
            self._settle_intents(submission, queue)
            memory = self._remembered(submission)
            notices += [*memory.notices, *self._submitter.submit_more(submission, memory.states)]
            memory.notices.clear()
        states = {s: self._look_at(s, queue) for s in submissions}
        self._ask_accounting(states, queue)
        if acts:
            for submission, tasks in states.items():
                self._unhold(submission, tasks, queue, notices)
            self._leave_failed_nodes(states, notices)
        for submission, tasks in states.items():
            self._remember(submission, tasks)
        return Poll(states=states, notices=notices)

    def _settle_intents(self, submission: Submission, queue: Queue) -> None:
        """Find what became of an sbatch whose answer was lost."""
        if all(array.is_answered for array in read_arrays(submission)):
            return
        patience = self._profile.command_timeout_s + REPLY_GRACE_S
        with alone(submission) as is_alone:
            for array in read_arrays(submission) if is_alone else ():  # again: its writer may have been at it
                if array.is_answered:
                    continue
                if found := queue.rows.get(array.name):
                    write_answer(submission, array, job_id=next(iter(found.values())).job_id, found=True)
                elif queue.at < array.at + patience:
                    continue
                elif rows := self._accounting([array.name], since=array.at):
                    write_answer(submission, array, job_id=rows[0].job_id, found=True)
                else:
                    why = "sbatch gave no answer, and the cluster has no such job"
                    write_answer(submission, array, refused=why, absent=True)

    def _look_at(self, submission: Submission, queue: Queue) -> dict[int, TaskState]:
        arrays, endings = read_arrays(submission), read_endings(submission)
        memory = self._remembered(submission)
        states: dict[int, TaskState] = {}
        for task in range(read_spec(submission).n_tasks):
            array = array_of(task, arrays, queue)
            row = None if array is None else queue.find(array, task)
            if array is None:
                states[task] = _not_submitted(submission, arrays)
            elif row is None:
                states[task] = endings.get(task) or self._unknown_to_the_queue(memory, task, array, queue)
            else:
                states[task] = self._in_the_queue(memory, task, row, endings.get(task), queue)
        return states

    def _in_the_queue(
        self, memory: _Memory, task: int, row: QueueRow, known: TaskState | None, queue: Queue
    ) -> TaskState:
        ending = ending_of(row.state, row.reason, row.exit_code)
        if ending is None:
            memory.unseen_since.pop(task, None)
            return live_state(row)
        if known is not None:
            return known  # what we made of it then: a held task that was given up is cancelled in SLURM's words
        if may_come_back(row.state):
            since = memory.unseen_since.setdefault(task, queue.at)
            if queue.at - since < REQUEUE_GRACE_S:
                return live_state(row, phase=TaskPhase.PENDING, reason=f"{row.state}: it may be requeued")
        return ended_state(row, ending)

    def _unhold(self, submission: Submission, states: dict[int, TaskState], queue: Queue, notices: list[str]) -> None:
        """Release a task whose launch failed and that SLURM holds, once; then give it up, as one that can never
        start."""
        arrays = read_arrays(submission)
        for task, state in states.items():
            array = array_of(task, arrays, queue)
            row = None if array is None else queue.find(array, task)
            if row is None or row.state != "PENDING" or state.phase is TaskPhase.ENDED:
                continue
            marker, held = submission.folder / f"released-{task}", is_held_launch(row.reason)
            if held and not marker.exists():
                self._release(row.task_id)
                marker.touch(mode=0o640)
                notices.append(f"task {task} ({row.task_id}) is held by SLURM ({row.reason}): released once")
                continue
            # Released a moment ago, the queue may show it held for one more look: it has to have been started since.
            held_again = held and self._clock() - marker.stat().st_mtime > max(5.0, 1.5 * self.poll_interval_s)
            if held_again or is_impossible_wait(row.reason):
                self._slurm.cancel([row.task_id])
                ending = Ending.HELD if held_again else Ending.IMPOSSIBLE
                states[task] = dataclasses.replace(
                    ended_state(row, ending), reason=f"SLURM cannot start it: {row.reason}"
                )

    def _release(self, task_id: str) -> None:
        try:
            self._slurm.release(task_id)
        except SchedulerUnreachableError:
            raise
        except SchedulerError:  # somebody else released or cancelled it; or it may not be, and then stays held
            return

    def _unknown_to_the_queue(self, memory: _Memory, task: int, array: Array, queue: Queue) -> TaskState:
        last = memory.states.get(task) or TaskState(phase=TaskPhase.PENDING, reason="submitted")
        # The answer is older than the question; or whether it is submitted at all is what `_settle_intents` finds out.
        if queue.at <= array.at or not array.is_answered:
            return last
        since = memory.unseen_since.setdefault(task, queue.at)
        if queue.at - since < self._profile.absence_grace_s:
            return last
        return dataclasses.replace(
            last,
            phase=TaskPhase.ENDED,
            ending=Ending.LOST,
            reason=f"the cluster has not known {array.name} for {queue.at - since:.0f} s, and nobody saw it end",
        )

    def _leave_failed_nodes(self, states: dict[Submission, dict[int, TaskState]], notices: list[str]) -> None:
        """Exclude the node from which SLURM put a task back into the queue, if that node is a bad one now: SLURM itself
        would start the task there again as soon as the node is back. sinfo is asked only when a task was put back."""
        requeued: list[tuple[Submission, int, TaskState]] = []
        for submission, tasks in states.items():
            ran_on = self._remembered(submission).ran_on
            for task, state in tasks.items():
                if (before := ran_on.get(task)) is not None and state.restarts > before.restarts:
                    requeued.append((submission, task, before))
                elif state.phase is TaskPhase.RUNNING and state.reason == "RUNNING":  # not while its end is dealt with
                    ran_on[task] = state
        if requeued:
            try:
                words = self._slurm.node_states(sorted({before.node for _, _, before in requeued}))
            except SchedulerError:
                requeued.clear()  # asked again at the next look
        for submission, task, before in requeued:
            memory, state = self._remembered(submission), states[submission][task]
            del memory.ran_on[task]
            if not is_bad_node(words.get(before.node, "")):
                continue
            memory.failed_nodes[task] = (*memory.failed_nodes.get(task, ()), before.node)
            if state.phase is TaskPhase.PENDING:
                with suppress(SchedulerError):  # it has been started meanwhile
                    self._slurm.exclude(state.task_id, memory.failed_nodes[task])
            notices.append(
                f"task {task} ({before.task_id}) was requeued: its node {before.node} is {words[before.node]} "
                "and is excluded from now on"
            )
        for submission, tasks in states.items():
            for task, nodes in self._remembered(submission).failed_nodes.items():
                tasks[task] = dataclasses.replace(tasks[task], failed_nodes=nodes)

    def _ask_accounting(self, states: dict[Submission, dict[int, TaskState]], queue: Queue) -> None:
        """What squeue no longer shows, sacct may: replace the guesses in `states` by its endings."""
        unseen: dict[str, list[tuple[Submission, int, Array]]] = {}
        for submission in states:
            memory, endings = self._remembered(submission), read_endings(submission)
            for array in read_arrays(submission):
                for task in range(array.first_task, array.first_task + array.n_tasks):
                    in_queue = queue.find(array, task) is not None
                    if array.may_run and not in_queue and task in memory.unseen_since and task not in endings:
                        unseen.setdefault(array.name, []).append((submission, task, array))
        if not unseen:
            return
        since = min(array.at for tasks in unseen.values() for _, _, array in tasks)
        found = {(r.name, r.index or 0): r for r in self._accounting(sorted(unseen), since)}
        for name, waiting in unseen.items():
            for submission, task, array in waiting:
                row = found.get((name, task - array.first_task))
                ending = None if row is None else ending_of(row.state, row.reason, row.exit_code)
                since_s = queue.at - self._remembered(submission).unseen_since[task]
                if row is not None and ending is not None:
                    if may_come_back(row.state) and since_s < REQUEUE_GRACE_S:
                        continue
                    states[submission][task] = ended_state(row, ending)

    def _accounting(self, names: Sequence[str], since: float) -> list[AccountingRow]:
        """The last attempt of each task; empty where there is no accounting, or it does not answer."""
        if not self._has_accounting:
            return []
        try:
            rows = self._slurm.accounting(names, since)
        except SchedulerError:  # no answer, or one that does not help: sacct only ever explains
            return []
        self._has_accounting = rows is not None
        return rows or []

    def accounting(self, submission: Submission) -> dict[int, list[AccountedAttempt]]:
        """See `Scheduler`: what sacct has by now."""
        arrays = [a for a in read_arrays(submission) if a.may_run]
        rows = self._accounting([a.name for a in arrays], since=min((a.at for a in arrays), default=0.0))
        first_task = {a.name: a.first_task for a in arrays}
        attempts: dict[int, list[AccountedAttempt]] = {}
        for row in rows:
            attempts.setdefault(first_task[row.name] + (row.index or 0), []).append(
                AccountedAttempt(
                    state=row.state,
                    node=row.node,
                    exit_code=row.exit_code,
                    submitted_at=row.submitted_at,
                    started_at=row.started_at,
                    elapsed_s=row.elapsed_s,
                    cpu_s=row.cpu_s,
                    n_cpus=row.n_cpus,
                    max_rss_gib=row.max_rss_gib,
                )
            )
        return attempts

    # ------------------------------------------------------------------ ending

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """scancel; returns once the queue shows none of their tasks alive.

        Raises SchedulerUnreachableError when the cluster does not answer for CANCEL_PATIENCE_S; the submissions stay
        marked, so that nothing more of them is submitted.
        """
        for submission in submissions:
            mark_cancelled(submission)
        deadline = self._clock() + CANCEL_PATIENCE_S
        trouble, pause_s, next_scancel = "", CANCEL_POLL_S[0], 0.0
        while self._clock() < deadline:
            try:
                ids, is_sure = self._alive(submissions)
                if ids and self._clock() >= next_scancel:
                    next_scancel = self._clock() + SCANCEL_AGAIN_S
                    self._slurm.cancel(sorted(ids))
                elif not ids and is_sure:
                    return
            except SchedulerUnreachableError as e:
                trouble = f": {e}"
            self._sleep(pause_s)
            pause_s = min(1.5 * pause_s, CANCEL_POLL_S[1])
        names = ",".join(a.name for s in submissions for a in read_arrays(s))
        raise SchedulerUnreachableError(
            f"the jobs were asked to end and are not gone after {CANCEL_PATIENCE_S:.0f} s{trouble}. By hand: "
            f"scancel --name={names}"
        )

    def begin_cancelling(self, submissions: Sequence[Submission]) -> None:
        """scancel, once; they are marked, so that nothing more of them is submitted.

        Raises SchedulerUnreachableError when the cluster does not answer.
        """
        for submission in submissions:
            mark_cancelled(submission)
        if ids := self._alive(submissions)[0]:
            self._slurm.cancel(sorted(ids))

    def _alive(self, submissions: Sequence[Submission]) -> tuple[set[str], bool]:
        """Ids of the arrays that have a task alive now; and whether that is all, which it is not while an sbatch has
        not been answered."""
        queue = self._queue.ask(max_age_s=0.0)
        alive: set[str] = set()
        is_sure = True
        for submission in submissions:
            self._settle_intents(submission, queue)
            with alone(submission) as is_alone:  # nobody is past the mark and about to submit more
                is_sure &= is_alone
            for array in read_arrays(submission):
                rows = queue.rows.get(array.name, {}).values()
                alive |= {str(r.job_id) for r in rows if ending_of(r.state, r.reason, r.exit_code) is None}
                is_sure &= array.is_answered and (array.refused is not None or queue.at > array.at)
        return alive, is_sure

    # ------------------------------------------------------------------ words and files

    def describe(self, submission: Submission) -> str:
        ids = [str(a.job_id) for a in read_arrays(submission) if a.job_id is not None]
        named = f"SLURM job {', '.join(ids)}" if ids else "a SLURM job"
        return f"{named} ({read_spec(submission).name}, {submission.folder})"

    def log_file(self, submission: Submission, task_index: int) -> Path:
        array = next((a for a in reversed(read_arrays(submission)) if a.may_run and task_index in a), None)
        if array is None or array.job_id is None:
            return submission.log_folder
        return submission.log_folder / f"slurm-{array.job_id}_{task_index - array.first_task}.log"

    def submitted_at(self, submission: Submission) -> float:
        return min((a.at for a in read_arrays(submission)), default=submission.spec_file.stat().st_mtime)

    def _is_over(self, submission: Submission, endings: Mapping[int, TaskState]) -> bool:
        if is_cancelled(submission) and not read_arrays(submission):
            return True
        return len(endings) == read_spec(submission).n_tasks

    def _remember(self, submission: Submission, tasks: Mapping[int, TaskState]) -> None:
        """Keep endings on disk: squeue forgets them within minutes, and not every site has sacct."""
        memory = self._remembered(submission)
        memory.states = dict(tasks)
        # A grace must end though nobody looks for long enough: every process goes on counting.
        if memory.unseen_since != memory.unseen_written:
            write_json(submission.folder / UNSEEN_FILE, memory.unseen_since)
            memory.unseen_written = dict(memory.unseen_since)
        endings = {task: state for task, state in tasks.items() if state.phase is TaskPhase.ENDED}
        write_endings(submission, endings)

    def _last_known(self, submission: Submission) -> dict[int, TaskState]:
        memory, endings = self._remembered(submission), read_endings(submission)
        unknown = TaskState(phase=TaskPhase.PENDING, reason="not known yet: the cluster does not answer")
        n_tasks = read_spec(submission).n_tasks
        return {t: endings.get(t) or memory.states.get(t) or unknown for t in range(n_tasks)}

    def _remembered(self, submission: Submission) -> _Memory:
        if submission not in self._memory:
            unseen = read_json(submission.folder / UNSEEN_FILE) or {}
            self._memory[submission] = _Memory(unseen_since={int(task): at for task, at in unseen.items()})
        return self._memory[submission]


def array_of(task: int, arrays: Sequence[Array], queue: Queue) -> Array | None:
    """The array that a task is in: the last that stands. But one that was taken for lost and turned up late is at work
    already, and a later copy of it leaves by itself."""
    for array in arrays:
        row = queue.find(array, task) if array.absent and task in array else None
        if row is not None and ending_of(row.state, row.reason, row.exit_code) is None:
            return array
    return next((a for a in reversed(arrays) if a.may_run and task in a), None)


def _not_submitted(submission: Submission, arrays: Sequence[Array]) -> TaskState:
    why = next((a.refused for a in reversed(arrays) if a.refused is not None), None)
    if any(a.impossible for a in arrays):
        return TaskState(phase=TaskPhase.ENDED, ending=Ending.IMPOSSIBLE, reason=f"SLURM refuses it: {why}")
    if is_cancelled(submission):
        return TaskState(phase=TaskPhase.ENDED, ending=Ending.CANCELLED, reason="cancelled before it was submitted")
    return TaskState(phase=TaskPhase.PENDING, reason=f"not submitted yet: {why}" if why else "not submitted yet")
