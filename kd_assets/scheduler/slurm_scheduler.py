"""Jobs on a SLURM cluster: one array a submission, found again by name, followed with one query for all of them.

Four rules, each learnt from how others fail:
- The intent is on disk before sbatch runs, under a name that no other array ever has. An answer that was lost is looked
  up by that name, and only when the cluster has answered without it for a while is the array submitted again.
- A job is its name. Ids are reused after a controller lost its state; they address commands, and identify nothing.
- No answer is no information: the last known state stands. A task that a cluster which answers does not know is lost
  after a grace period, and not before.
- A state says why a task ended, never that its work is done.

A submission's folder holds, beside what every scheduler keeps: `arrays/0001.json` (the intent: name, tasks, command
line), `arrays/0001.answer.json` (its job id, or the refusal), `endings.json` (how tasks ended), `environment.sh`, and
the markers `cancelled` and `released-<task>`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kd_assets.contract import JobKind, decode
from kd_assets.errors import SchedulerError, SchedulerUnreachableError
from kd_assets.scheduler.command import CommandRunner, runner_for
from kd_assets.scheduler.job import Attempt, Ending, JobSpec, Poll, Submission, TaskPhase, TaskState
from kd_assets.scheduler.profile import Profile
from kd_assets.scheduler.slurm import (
    Accepted,
    AccountingRow,
    QueueRow,
    Refused,
    Slurm,
    SubmitAnswer,
    parse_queue,
    sbatch_argv,
)
from kd_assets.scheduler.slurm_states import (
    RUNNING_STATES,
    base_state,
    ending_of,
    is_bad_node,
    is_held_launch,
    is_impossible_wait,
    may_come_back,
)
from kd_assets.scheduler.submissions import (
    SubmissionFolders,
    is_cancelled,
    locked,
    make_folder,
    mark_cancelled,
    read_json,
    read_spec,
    write_json,
)

CANCEL_PATIENCE_S = 240.0
"""How long `cancel` tries: below Dagster's own patience with a run that is terminated (`cancel_timeout_seconds`)."""
CANCEL_POLL_S = 0.5
REPLY_GRACE_S = 15.0
"""How long after an sbatch without an answer its job may still turn up: a busy controller works off its queue."""
REQUEUE_GRACE_S = 15.0
"""A preempted task or one of a failed node is seen ended for a moment before SLURM puts it back into the queue."""
PACE_S = (30.0, 300.0)
"""First and longest wait after the site refused further jobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """One sbatch: some consecutive tasks of a submission. Array index i is task `first_task` + i."""

    number: int
    name: str
    """Of the job; no other array, of whatever submission, has it."""
    first_task: int
    n_tasks: int
    at: float
    """When it was about to be submitted, in seconds since the epoch."""
    job_id: int | None = None
    refused: str | None = None
    """Why it is not and will not be in the queue, in SLURM's words; its tasks are to be submitted again."""
    impossible: bool = False
    """The refusal is one that time will not change."""

    @property
    def stands(self) -> bool:
        return self.refused is None

    @property
    def is_answered(self) -> bool:
        return self.job_id is not None or self.refused is not None

    def __contains__(self, task: object) -> bool:
        return isinstance(task, int) and self.first_task <= task < self.first_task + self.n_tasks


@dataclass(slots=True)
class _Pace:
    """How submission goes on after a refusal that time will heal."""

    chunk: int
    """Most tasks of the next array: a limit on submitted tasks refuses an array as a whole."""
    wait_s: float
    not_before: float = 0.0
    is_limited: bool = False
    """Whether the site has refused anything yet."""


@dataclass(slots=True)
class _Memory:
    """What one scheduler object has seen of a submission; lost with the process, and found out again."""

    states: dict[int, TaskState] = field(default_factory=dict)
    unseen_since: dict[int, float] = field(default_factory=dict)
    """Task → when a cluster that answered first did not know it, or showed an end that may be taken back."""
    ran_on: dict[int, TaskState] = field(default_factory=dict)
    """Task → what was known of it when it was last seen running."""
    failed_nodes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    pace: _Pace | None = None
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
        self._folders, self._profile, self._script, self._python = (
            SubmissionFolders(jobs_folder),
            profile,
            script,
            python,
        )
        self._secrets_file, self._clock, self._sleep = secrets_file, clock, sleep
        self._slurm = Slurm(runner or runner_for(profile), timeout_s=profile.command_timeout_s)
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
        submission = self._folders.create(spec, lambda new: self._prepare(new, spec, write_job_file))
        self._remembered(submission).notices += self._submit_more(submission)
        if refusal := next((a.refused for a in self._arrays(submission) if a.impossible), None):
            mark_cancelled(submission)
            raise SchedulerError(f"SLURM refuses {spec.name}: {refusal}")
        return submission

    def _prepare(self, submission: Submission, spec: JobSpec, write_job_file: Callable[[Submission], object]) -> None:
        """All that a task needs; whoever finds the submission after a kill right behind this can submit it."""
        write_job_file(submission)
        make_folder(submission.folder / "arrays")
        environment_file = submission.folder / "environment.sh"
        environment_file.write_text(self.environment_text(spec))
        environment_file.chmod(0o640)

    def preview(self, spec: JobSpec) -> list[list[str]]:
        """The command lines that `submit` would run now, with `NUMBER` and `NONCE` where each submission differs."""
        folder = self._folders.root / spec.recipe / f"{spec.kind}-{spec.key}" / "NUMBER"
        chunk = self._slurm.max_array_size()
        return [
            self._argv(
                Submission(folder=folder),
                spec,
                Array(number=n, name=f"{spec.name}-NUMBER.{n}-NONCE", first_task=first, n_tasks=size, at=0.0),
            )
            for n, (first, size) in enumerate(_chunks(range(spec.n_tasks), chunk), start=1)
        ]

    def environment_text(self, spec: JobSpec) -> str:
        """What every task sources before it starts."""
        return (
            "# Sourced by slurm/task.sbatch: the compute environment, then the cluster profile's own lines.\n"
            f"export KD_PYTHON={shlex.quote(self._python)}\n"
            f"export KD_RANKS={spec.resources.processes_per_task}\n"
            f"{self._profile.setup.rstrip()}\n"
        )

    def _submit_what_is_left(self, submission: Submission, spec: JobSpec) -> Iterator[str]:
        """Submit arrays until all tasks are in, an answer is missing, or the site wants us to wait; yields notices."""
        memory = self._remembered(submission)
        if memory.pace is None:
            memory.pace = _Pace(chunk=self._slurm.max_array_size(), wait_s=PACE_S[0])
        pace = memory.pace
        while self._clock() >= pace.not_before and not is_cancelled(submission):
            arrays = self._arrays(submission)
            if any(a.impossible or not a.is_answered for a in arrays):
                return
            left = [t for t in range(spec.n_tasks) if not any(a.stands and t in a for a in arrays)]
            chunk = self._chunk(spec, arrays, memory)
            if not left or chunk < 1:
                return
            first, size = next(_chunks(left, chunk))
            answer = self._sbatch(submission, spec, len(arrays) + 1, first, size)
            pace.is_limited |= isinstance(answer, Refused)
            if isinstance(answer, Accepted):
                pace.wait_s, pace.chunk = PACE_S[0], min(2 * pace.chunk, self._slurm.max_array_size())
            elif isinstance(answer, Refused) and answer.kind == "impossible":
                yield f"SLURM refuses {len(left)} tasks: {answer.text}"
            elif isinstance(answer, Refused) and size > 1 and answer.is_submit_limit:
                pace.chunk = size // 2
            elif isinstance(answer, Refused):
                yield (
                    f"SLURM takes no more jobs now ({answer.text}); {len(left)} tasks wait, next try in "
                    f"{pace.wait_s:.0f} s"
                )
                pace.not_before = self._clock() + pace.wait_s
                pace.wait_s = min(2 * pace.wait_s, PACE_S[1])
            else:
                yield f"sbatch gave no answer ({answer.text}); its job is looked for before anything is submitted again"
                return

    def _chunk(self, spec: JobSpec, arrays: Sequence[Array], memory: _Memory) -> int:
        """Most tasks of the next array. Where the site takes only a few at a time, those before it still have some of
        the tasks that may run at once; arrays of the full size share them from the start (see `_throttle`)."""
        assert memory.pace is not None
        if not memory.pace.is_limited:
            return memory.pace.chunk
        submitted = (t for a in arrays if a.stands for t in range(a.first_task, a.first_task + a.n_tasks))
        n_alive = sum(1 for t in submitted if t not in memory.states or memory.states[t].phase is not TaskPhase.ENDED)
        return min(memory.pace.chunk, self._concurrency(spec) - n_alive)

    def _concurrency(self, spec: JobSpec) -> int:
        return min(spec.concurrency, self._profile.array_concurrency or spec.concurrency)

    def _throttle(self, spec: JobSpec, array: Array) -> int:
        """How many tasks of one array may run at once: several share what the job may, each at least one."""
        largest = self._slurm.max_array_size()
        n_arrays, i = -(-spec.n_tasks // largest), array.first_task // largest
        return max(1, min((self._concurrency(spec) + n_arrays - 1 - i) // n_arrays, array.n_tasks))

    def _sbatch(self, submission: Submission, spec: JobSpec, number: int, first: int, size: int) -> SubmitAnswer:
        name = f"{spec.name}-{submission.folder.name}.{number}-{secrets.token_hex(4)}"
        array = Array(number=number, name=name, first_task=first, n_tasks=size, at=self._clock())
        argv = self._argv(submission, spec, array)
        path = submission.folder / "arrays" / f"{number:04d}.json"
        intent = {f: getattr(array, f) for f in ("number", "name", "first_task", "n_tasks", "at")}
        write_json(path, intent | {"argv": argv})
        answer = self._slurm.submit(argv)
        if isinstance(answer, Accepted):
            write_json(_answer_file(path), {"job_id": answer.job_id})
        elif isinstance(answer, Refused):
            write_json(_answer_file(path), {"refused": answer.text, "impossible": answer.kind == "impossible"})
        return answer

    def _argv(self, submission: Submission, spec: JobSpec, array: Array) -> list[str]:
        return sbatch_argv(
            profile=self._profile,
            spec=spec,
            name=array.name,
            comment=f"kd_assets {spec.key} {array.name}",
            array=f"0-{array.n_tasks - 1}%{self._throttle(spec, array)}",
            log_folder=submission.log_folder,
            script=str(self._script),
            arguments=[
                str(submission.job_file),
                str(array.first_task),
                str(submission.folder / "environment.sh"),
                str(self._secrets_file or "-"),
            ],
            folder=submission.folder,
        )

    # ------------------------------------------------------------------ finding and following

    def live(self, recipe: str, kind: JobKind) -> list[Submission]:
        """Those of which a task may still run or be submitted. Raises SchedulerUnreachableError: then nobody knows."""
        candidates = [
            s
            for s in self._folders.newest(recipe, kind)
            if (s.folder / "arrays").is_dir() and not self._is_over(s, self._endings(s))
        ]
        if not candidates:
            return []
        poll = self.poll(candidates)
        if poll.unreachable is not None:
            raise SchedulerUnreachableError(poll.unreachable)
        return [s for s in candidates if any(t.phase is not TaskPhase.ENDED for t in poll.states[s].values())]

    def poll(self, submissions: Sequence[Submission]) -> Poll:
        """The states of all tasks by one squeue, and one sacct for those that it no longer shows."""
        try:
            return self._poll(submissions)
        except SchedulerUnreachableError as e:
            return Poll(states={s: self._last_known(s) for s in submissions}, unreachable=str(e))

    def _poll(self, submissions: Sequence[Submission]) -> Poll:
        queue = self._queue(max_age_s=0.9 * self.poll_interval_s)
        notices: list[str] = []
        for submission in submissions:
            self._settle_intents(submission, queue)
            memory = self._remembered(submission)
            notices += [*memory.notices, *self._submit_more(submission)]
            memory.notices.clear()
        states = {s: self._look_at(s, queue, notices) for s in submissions}
        self._ask_accounting(states, queue)
        self._leave_failed_nodes(states, notices)
        for submission, tasks in states.items():
            self._remember(submission, tasks)
        return Poll(states=states, notices=notices)

    def _queue(self, *, max_age_s: float) -> _Queue:
        """squeue's answer, shared by all processes of this deployment: one query an interval for all their jobs."""
        folder = self._folders.root / ".slurm"
        make_folder(folder)
        shared = folder / f"{self._profile.name}.json"
        with locked(folder / f"{self._profile.name}.lock"):
            asked = read_json(shared)
            # A clock that was set back must not make an answer last for ever.
            if asked is None or not 0 <= self._clock() - asked["at"] < max_age_s:
                at = self._clock()
                asked = {"at": at, "text": self._slurm.queue_text()}
                temporary = shared.with_suffix(".tmp")
                temporary.write_text(json.dumps(asked))
                temporary.replace(shared)
        rows: dict[str, dict[int | None, QueueRow]] = {}
        for row in parse_queue(asked["text"]):
            rows.setdefault(row.name, {})[row.index] = row
        return _Queue(at=asked["at"], rows=rows)

    def _settle_intents(self, submission: Submission, queue: _Queue) -> None:
        """Find what became of an sbatch whose answer was lost."""
        for array in self._arrays(submission):
            if array.is_answered:
                continue
            path = submission.folder / "arrays" / f"{array.number:04d}.json"
            if found := queue.rows.get(array.name):
                write_json(_answer_file(path), {"job_id": next(iter(found.values())).job_id, "found": True})
                continue
            patience = self._profile.command_timeout_s + REPLY_GRACE_S
            with self._alone(submission) as alone:
                if not alone or queue.at < array.at + patience:
                    continue
                if rows := self._accounting([array.name], since=array.at):
                    write_json(_answer_file(path), {"job_id": rows[0].job_id, "found": True})
                else:
                    write_json(
                        _answer_file(path), {"refused": "sbatch gave no answer, and the cluster has no such job"}
                    )

    def _submit_more(self, submission: Submission) -> list[str]:
        spec = read_spec(submission)
        covered = sum(a.n_tasks for a in self._arrays(submission) if a.stands)
        if covered == spec.n_tasks or is_cancelled(submission):
            return []
        with self._alone(submission) as alone:
            return list(self._submit_what_is_left(submission, spec)) if alone else []

    def _look_at(self, submission: Submission, queue: _Queue, notices: list[str]) -> dict[int, TaskState]:
        arrays, endings = self._arrays(submission), self._endings(submission)
        memory = self._remembered(submission)
        states: dict[int, TaskState] = {}
        for task in range(read_spec(submission).n_tasks):
            array = next((a for a in reversed(arrays) if a.stands and task in a), None)
            row = None if array is None else queue.find(array, task)
            if array is None:
                states[task] = _not_submitted(submission, arrays)
            elif row is None:
                states[task] = endings.get(task) or self._unknown_to_the_queue(memory, task, array, queue)
            else:
                states[task] = self._in_the_queue(submission, task, row, endings.get(task), queue, notices)
        return states

    def _in_the_queue(
        self,
        submission: Submission,
        task: int,
        row: QueueRow,
        known: TaskState | None,
        queue: _Queue,
        notices: list[str],
    ) -> TaskState:
        memory = self._remembered(submission)
        ending = ending_of(row.state, row.reason, row.exit_code)
        if ending is None:
            memory.unseen_since.pop(task, None)
            return self._unheld(submission, task, row, notices)
        if known is not None:
            return known  # what we made of it then: a held task that was given up is cancelled in SLURM's words
        if may_come_back(row.state):
            since = memory.unseen_since.setdefault(task, queue.at)
            if queue.at - since < REQUEUE_GRACE_S:
                return _live_state(row, phase=TaskPhase.PENDING, reason=f"{row.state}: it may be requeued")
        return _ended_state(row, ending)

    def _unheld(self, submission: Submission, task: int, row: QueueRow, notices: list[str]) -> TaskState:
        """The state of a task in the queue; one whose launch failed and that SLURM holds is released once, and then
        given up, as is one that can never start."""
        task_id, marker = row.task_id, submission.folder / f"released-{task}"
        held = row.state == "PENDING" and is_held_launch(row.reason)
        if held and not marker.exists():
            self._release(task_id)
            marker.touch()
            notices.append(f"task {task} ({task_id}) is held by SLURM ({row.reason}): released once")
            return _live_state(row)
        # Released a moment ago, the queue may show it held for one more look: it has to have been started since.
        held_again = held and self._clock() - marker.stat().st_mtime > max(5.0, 1.5 * self.poll_interval_s)
        impossible = row.state == "PENDING" and is_impossible_wait(row.reason)
        if held_again or impossible:
            self._slurm.cancel([task_id])
            ending = Ending.HELD if held_again else Ending.IMPOSSIBLE
            return dataclasses.replace(_ended_state(row, ending), reason=f"SLURM cannot start it: {row.reason}")
        return _live_state(row)

    def _release(self, task_id: str) -> None:
        try:
            self._slurm.release(task_id)
        except SchedulerUnreachableError:
            raise
        except SchedulerError:  # somebody else released or cancelled it; or it may not be, and then stays held
            return

    def _unknown_to_the_queue(self, memory: _Memory, task: int, array: Array, queue: _Queue) -> TaskState:
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

    def _ask_accounting(self, states: dict[Submission, dict[int, TaskState]], queue: _Queue) -> None:
        """What squeue no longer shows, sacct may: replace the guesses in `states` by its endings."""
        unseen: dict[str, list[tuple[Submission, int, Array]]] = {}
        for submission, tasks in states.items():
            memory, endings = self._remembered(submission), self._endings(submission)
            for array in self._arrays(submission):
                for task in range(array.first_task, array.first_task + array.n_tasks):
                    in_queue = queue.find(array, task) is not None
                    if array.stands and not in_queue and task in memory.unseen_since and task not in endings:
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
                    states[submission][task] = _ended_state(row, ending)

    def _accounting(self, names: Sequence[str], since: float) -> list[AccountingRow]:
        """The last attempt of each task; empty where there is no accounting, or it does not answer."""
        if not self._has_accounting:
            return []
        try:
            rows = self._slurm.accounting(names, since)
        except SchedulerUnreachableError:
            return []
        self._has_accounting = rows is not None
        return rows or []

    def accounting(self, submission: Submission) -> dict[int, list[Attempt]]:
        """See `Scheduler`: what sacct has by now."""
        arrays = [a for a in self._arrays(submission) if a.stands]
        rows = self._accounting([a.name for a in arrays], since=min((a.at for a in arrays), default=0.0))
        first_task = {a.name: a.first_task for a in arrays}
        attempts: dict[int, list[Attempt]] = {}
        for row in rows:
            attempts.setdefault(first_task[row.name] + (row.index or 0), []).append(
                Attempt(
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
        trouble = ""
        while self._clock() < deadline:
            try:
                ids, is_sure = self._alive(submissions)
                if ids:
                    self._slurm.cancel(sorted(ids))
                elif is_sure:
                    return
            except SchedulerUnreachableError as e:
                trouble = f": {e}"
            self._sleep(CANCEL_POLL_S)
        names = ",".join(a.name for s in submissions for a in self._arrays(s))
        raise SchedulerUnreachableError(
            f"the jobs were asked to end and are not gone after {CANCEL_PATIENCE_S:.0f} s{trouble}. By hand: "
            f"scancel --name={names}"
        )

    def _alive(self, submissions: Sequence[Submission]) -> tuple[set[str], bool]:
        """Ids of the arrays that have a task alive now; and whether that is all, which it is not while an sbatch has
        not been answered."""
        queue = self._queue(max_age_s=0.0)
        alive: set[str] = set()
        is_sure = True
        for submission in submissions:
            self._settle_intents(submission, queue)
            for array in self._arrays(submission):
                rows = queue.rows.get(array.name, {}).values()
                alive |= {str(r.job_id) for r in rows if ending_of(r.state, r.reason, r.exit_code) is None}
                is_sure &= array.is_answered and (array.refused is not None or queue.at > array.at)
        return alive, is_sure

    # ------------------------------------------------------------------ words and files

    def describe(self, submission: Submission) -> str:
        ids = [str(a.job_id) for a in self._arrays(submission) if a.job_id is not None]
        named = f"SLURM job {', '.join(ids)}" if ids else "a SLURM job"
        return f"{named} ({read_spec(submission).name}, {submission.folder})"

    def log_file(self, submission: Submission, task_index: int) -> Path:
        array = next((a for a in reversed(self._arrays(submission)) if a.stands and task_index in a), None)
        if array is None or array.job_id is None:
            return submission.log_folder
        return submission.log_folder / f"slurm-{array.job_id}_{task_index - array.first_task}.log"

    def submitted_at(self, submission: Submission) -> float:
        return min((a.at for a in self._arrays(submission)), default=submission.spec_file.stat().st_mtime)

    def _arrays(self, submission: Submission) -> list[Array]:
        arrays = []
        for path in sorted((submission.folder / "arrays").glob("[0-9][0-9][0-9][0-9].json")):
            intent = {k: v for k, v in (read_json(path) or {}).items() if k != "argv"}
            answer = {k: v for k, v in (read_json(_answer_file(path)) or {}).items() if k != "found"}
            arrays.append(decode(Array, intent | answer, where=str(path)))
        return arrays

    def _endings(self, submission: Submission) -> dict[int, TaskState]:
        """How tasks ended, as far as any process has seen it."""
        written: Mapping[str, Mapping[str, object]] = read_json(submission.folder / "endings.json") or {}
        return {int(task): _state_from_json(record) for task, record in written.items()}

    def _is_over(self, submission: Submission, endings: Mapping[int, TaskState]) -> bool:
        if is_cancelled(submission) and not self._arrays(submission):
            return True
        return len(endings) == read_spec(submission).n_tasks

    def _remember(self, submission: Submission, tasks: Mapping[int, TaskState]) -> None:
        """Keep endings on disk: squeue forgets them within minutes, and not every site has sacct."""
        self._remembered(submission).states = dict(tasks)
        endings = {task: state for task, state in tasks.items() if state.phase is TaskPhase.ENDED}
        if endings != self._endings(submission):
            write_json(submission.folder / "endings.json", {str(t): _state_json(s) for t, s in endings.items()})

    def _last_known(self, submission: Submission) -> dict[int, TaskState]:
        memory, endings = self._remembered(submission), self._endings(submission)
        unknown = TaskState(phase=TaskPhase.PENDING, reason="not known yet: the cluster does not answer")
        n_tasks = read_spec(submission).n_tasks
        return {t: endings.get(t) or memory.states.get(t) or unknown for t in range(n_tasks)}

    def _remembered(self, submission: Submission) -> _Memory:
        return self._memory.setdefault(submission, _Memory())

    @contextmanager
    def _alone(self, submission: Submission) -> Iterator[bool]:
        """Whether this process is the one that may submit for it now; it never waits for another."""
        fd = os.open(submission.folder / "submit.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(fd)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Queue:
    """One answer of squeue."""

    at: float
    """When it was asked for."""
    rows: Mapping[str, Mapping[int | None, QueueRow]]
    """Job name → array index → row."""

    def find(self, array: Array, task: int) -> QueueRow | None:
        """The row of a task; that without an index stands for all cancelled ones that have none of their own."""
        rows = self.rows.get(array.name, {})
        return rows.get(task - array.first_task) or rows.get(None)


def _answer_file(intent: Path) -> Path:
    return intent.with_suffix(".answer.json")


def _chunks(tasks: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Consecutive tasks as (first, how many), none of more than `size`."""
    start = 0
    while start < len(tasks):
        end = start + 1
        while end < len(tasks) and end - start < size and tasks[end] == tasks[end - 1] + 1:
            end += 1
        yield tasks[start], end - start
        start = end


def _not_submitted(submission: Submission, arrays: Sequence[Array]) -> TaskState:
    why = next((a.refused for a in reversed(arrays) if a.refused is not None), None)
    if any(a.impossible for a in arrays):
        return TaskState(phase=TaskPhase.ENDED, ending=Ending.IMPOSSIBLE, reason=f"SLURM refuses it: {why}")
    if is_cancelled(submission):
        return TaskState(phase=TaskPhase.ENDED, ending=Ending.CANCELLED, reason="cancelled before it was submitted")
    return TaskState(phase=TaskPhase.PENDING, reason=f"not submitted yet: {why}" if why else "not submitted yet")


def _live_state(row: QueueRow, *, phase: TaskPhase | None = None, reason: str | None = None) -> TaskState:
    running = base_state(row.state) in RUNNING_STATES
    return TaskState(
        phase=phase or (TaskPhase.RUNNING if running else TaskPhase.PENDING),
        reason=reason or (row.state if running else row.reason or row.state),
        restarts=row.restarts,
        task_id=row.task_id,
        node=row.node,
        started_at=row.started_at if running else None,
    )


def _ended_state(row: QueueRow | AccountingRow, ending: Ending) -> TaskState:
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


def _state_json(state: TaskState) -> dict[str, object]:
    return dataclasses.asdict(state) | {
        "phase": state.phase.value,
        "ending": None if state.ending is None else state.ending.value,
    }


def _state_from_json(record: Mapping[str, object]) -> TaskState:
    ending = record.get("ending")
    typed: dict[str, object] = {
        "phase": TaskPhase(record["phase"]),
        "ending": None if ending is None else Ending(ending),
        "failed_nodes": tuple(record["failed_nodes"]),  # type: ignore[arg-type]
    }
    return TaskState(**{**record, **typed})  # type: ignore[arg-type]
