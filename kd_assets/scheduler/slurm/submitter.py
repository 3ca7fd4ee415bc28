"""Submitting a job's arrays: what the site takes now, the rest later, nothing twice.

Used by `scheduler`. One sbatch is one array of consecutive tasks; there are several where MaxArraySize or a limit on
submitted jobs wants them smaller. The invariant: of a task at most one array is not refused, and none is submitted
while an earlier sbatch has no answer. An answer that was lost is found out by the array's name, and only when the
cluster has answered without it for a while is the array taken for one that never came.
"""

from __future__ import annotations

import dataclasses
import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kd_assets.durable import atomic_write, prepare_folder
from kd_assets.errors import JobFilesUnavailableError, SchedulerError, StorageUnavailableError
from kd_assets.locks import try_locked
from kd_assets.scheduler.folder import Submission, key_folder
from kd_assets.scheduler.job import JobSpec, TaskPhase
from kd_assets.scheduler.slurm.accounting import Accounting
from kd_assets.scheduler.slurm.commands.client import Slurm, sbatch_argv
from kd_assets.scheduler.slurm.commands.parsing import Accepted, Refused, SubmitAnswer
from kd_assets.scheduler.slurm.commands.runners import FOR_COMMANDS_ONLY
from kd_assets.scheduler.slurm.profile import Profile
from kd_assets.scheduler.slurm.queue import Queue
from kd_assets.scheduler.slurm.records import Array, KnownJob
from kd_assets.scheduler.submissions import is_cancelled

PACE_S = (30.0, 300.0)
"""First and longest wait after the site refused further jobs."""
UNCLEAR_PATIENCE_S = 1800.0
"""How long a refusal in words that we do not know is tried again: a controller whose disk is full, or whose
configuration is being changed, is mended in that time or by somebody who wants to be told."""
REPLY_GRACE_S = 15.0
"""How long after an sbatch without an answer its job may still turn up: a busy controller works off its queue."""


@dataclass(slots=True)
class _Pace:
    """How submission goes on after a refusal that time will heal."""

    chunk: int
    """Most tasks of the next array: a limit on submitted tasks refuses an array as a whole."""
    wait_s: float
    not_before: float = 0.0
    is_limited: bool = False
    """Whether the site has refused anything yet."""


class SlurmSubmitter:
    """Knows how a job of this deployment is asked for, and at which pace the site takes it."""

    def __init__(
        self,
        slurm: Slurm,
        accounting: Accounting,
        *,
        jobs_folder: Path,
        profile: Profile,
        script: Path,
        python: str,
        secrets_file: Path | None,
        clock: Callable[[], float],
    ) -> None:
        self._slurm, self._accounting, self._jobs_folder = slurm, accounting, jobs_folder
        self._profile, self._script, self._python = profile, script, python
        self._secrets_file, self._clock = secrets_file, clock
        self._paces: dict[Submission, _Pace] = {}

    def prepare(self, submission: Submission, spec: JobSpec) -> None:
        """Write all that its tasks need; whoever finds the submission after a kill right behind this can submit it."""
        prepare_folder(submission.arrays_folder)
        text = self.environment_text(spec)
        atomic_write(submission.environment_file, text.encode(errors="surrogateescape"))

    def submit_more(self, job: KnownJob) -> None:
        """Submit what of it is not submitted yet, unless another process is at that."""
        covered = sum(a.n_tasks for a in job.arrays if not a.is_refused)
        if covered == job.spec.n_tasks:
            return
        self._alone(job, partial(self._submit_rest, job))

    def settle(self, job: KnownJob, queue: Queue) -> None:
        """Find what became of an sbatch whose answer was lost, unless another process is at that."""
        if not all(array.is_answered for array in job.arrays):
            self._alone(job, partial(self._settle_arrays, job, queue))

    def preview(self, spec: JobSpec) -> list[list[str]]:
        """The command lines that `submit` would run now, with `NUMBER` and `NONCE` where each submission differs."""
        folder = key_folder(self._jobs_folder, recipe=spec.recipe, kind=spec.kind, key=spec.key) / "NUMBER"
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
            f"unset {' '.join(FOR_COMMANDS_ONLY)}\n"
            f"export KD_PYTHON={shlex.quote(self._python)}\n"
            f"export KD_N_PROCESSES={spec.resources.n_processes}\n"
            # What the worker must see of them there (`kd_assets.worker.given_gpus`).
            f"export KD_GPUS_PER_NODE={spec.resources.gpus_per_node or 0}\n"
            f"{self._time_limit(spec)}"
            f"{self._profile.setup.rstrip()}\n"
        )

    def _time_limit(self, spec: JobSpec) -> str:
        """For the words of a task that its time never suffices for (`kd_assets.worker.attempt.no_progress`)."""
        if spec.resources.time_minutes is None:
            return ""
        return f"export KD_TIME_LIMIT_S={60 * spec.resources.time_minutes} KD_SIGNAL_S={self._profile.signal_s}\n"

    def _alone(self, job: KnownJob, act: Callable[[], None]) -> None:
        """Act as the only process that submits for it, and with what the one before it wrote; never waits for another.

        A disk that fails ends it: nothing is submitted that could not be found again. It is told of, and everything
        goes on at the next look.
        """
        try:
            with try_locked(job.submission.submit_lock) as is_alone:
                if is_alone:
                    job.read()
                    act()
        except (StorageUnavailableError, JobFilesUnavailableError) as e:
            job.tell_once("submitting", f"nothing more of {job.submission.folder} is submitted for now: {e}")
        else:
            job.tell_once("submitting", None)

    def _settle_arrays(self, job: KnownJob, queue: Queue) -> None:
        patience_s = self._profile.command_timeout_s + REPLY_GRACE_S
        for array in job.arrays:
            if array.is_answered:
                continue
            if found := queue.rows.get(array.name):
                job.write_acceptance(array, next(iter(found.values())).job_id, found=True)
            elif queue.at < array.at + patience_s:
                continue
            elif rows := self._accounting.rows([array]):
                job.write_acceptance(array, rows[0].job_id, found=True)
            else:
                why = "sbatch gave no answer, and the cluster has no such job"
                job.write_refusal(array, why, absent=True)

    def _submit_rest(self, job: KnownJob) -> None:
        """Submit arrays until all tasks are in, an answer is missing, or the site wants us to wait."""
        spec, submission = job.spec, job.submission
        pace = self._paces.setdefault(submission, _Pace(chunk=self._slurm.max_array_size(), wait_s=PACE_S[0]))
        while self._clock() >= pace.not_before and not is_cancelled(submission):
            if any(a.impossible or not a.is_answered for a in job.arrays):
                return
            submitted = {task for a in job.arrays if not a.is_refused for task in a.tasks}
            left = [task for task in range(spec.n_tasks) if task not in submitted]
            chunk = self._chunk(job, submitted, pace)
            if not left or chunk < 1:
                return
            first, size = next(_chunks(left, chunk))
            answer = self._sbatch(job, first, size)
            pace.is_limited |= isinstance(answer, Refused) and answer.kind == "pace"
            if isinstance(answer, Accepted):
                pace.wait_s, pace.chunk = PACE_S[0], min(2 * pace.chunk, self._slurm.max_array_size())
            elif isinstance(answer, Refused) and answer.kind == "impossible":
                job.notices.append(f"SLURM refuses {len(left)} tasks: {answer.text}")
            elif isinstance(answer, Refused) and job.arrays[-1].impossible:
                job.notices.append(f"{job.arrays[-1].refused}; {len(left)} tasks are given up")
            elif isinstance(answer, Refused) and size > 1 and answer.is_submit_limit:
                pace.chunk = size // 2
            elif isinstance(answer, Refused):
                why = "refuses, and may take later" if answer.kind == "unclear" else "takes no more jobs now"
                job.notices.append(
                    f"SLURM {why} ({answer.text}); {len(left)} tasks wait, next try in {pace.wait_s:.0f} s"
                )
                pace.not_before = self._clock() + pace.wait_s
                pace.wait_s = min(2 * pace.wait_s, PACE_S[1])
            else:
                job.notices.append(
                    f"sbatch gave no answer ({answer.text}); its job is looked for before anything is submitted again"
                )
                return

    def _chunk(self, job: KnownJob, submitted: set[int], pace: _Pace) -> int:
        """Most tasks of the next array. Where the site takes only a few at a time, those before it still have some of
        the tasks that may run at once; arrays of the full size share them from the start (see `_throttle`)."""
        if not pace.is_limited:
            return pace.chunk
        ended = {task for task, state in job.states.items() if state.phase is TaskPhase.ENDED}
        return min(pace.chunk, self._concurrency(job.spec) - len(submitted - ended))

    def _concurrency(self, spec: JobSpec) -> int:
        return min(spec.concurrency, self._profile.array_concurrency or spec.concurrency)

    def _throttle(self, spec: JobSpec, array: Array) -> int:
        """How many tasks of one array may run at once: several share what the job may, each at least one."""
        largest = self._slurm.max_array_size()
        n_arrays, i = -(-spec.n_tasks // largest), array.first_task // largest
        return max(1, min((self._concurrency(spec) + n_arrays - 1 - i) // n_arrays, array.n_tasks))

    def _sbatch(self, job: KnownJob, first: int, size: int) -> SubmitAnswer:
        spec, number = job.spec, len(job.arrays) + 1
        name = f"{spec.name}-{job.submission.folder.name}.{number}-{secrets.token_hex(4)}"
        array = Array(number=number, name=name, first_task=first, n_tasks=size, at=self._clock())
        keep_from = job.keep_from
        excluded = tuple(sorted(keep_from.union(spec.excluded_nodes)))
        argv = self._argv(job.submission, dataclasses.replace(spec, excluded_nodes=excluded), array)
        job.write_intent(array, argv)
        try:
            answer = self._slurm.submit(argv)
        except SchedulerError as e:  # sbatch could not even be started
            job.write_refusal(array, str(e), impossible=True)
            raise
        if isinstance(answer, Accepted):
            job.kept_from |= dict.fromkeys(array.tasks, keep_from)
            job.write_acceptance(array, answer.job_id)
        elif isinstance(answer, Refused):
            is_unclear = answer.kind == "unclear"
            refused_for_s = array.at - _unclear_since(job, array)
            if is_unclear and refused_for_s >= UNCLEAR_PATIENCE_S:
                why = f"{answer.text} (so it has said for {refused_for_s / 60:.0f} minutes)"
                job.write_refusal(array, why, impossible=True)
            else:
                job.write_refusal(array, answer.text, impossible=answer.kind == "impossible", unclear=is_unclear)
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
                str(submission.environment_file),
                str(self._secrets_file or "-"),
            ],
            folder=submission.folder,
        )


def _unclear_since(job: KnownJob, array: Array) -> float:
    """When the unclear refusals began that `array` is the last of."""
    since = array.at
    for earlier in reversed(job.arrays):
        if earlier.number != array.number:
            if not earlier.unclear:
                break
            since = earlier.at
    return since


def _chunks(tasks: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Consecutive tasks as (first, how many), none of more than `size`."""
    start = 0
    while start < len(tasks):
        end = start + 1
        while end < len(tasks) and end - start < size and tasks[end] == tasks[end - 1] + 1:
            end += 1
        yield tasks[start], end - start
        start = end
