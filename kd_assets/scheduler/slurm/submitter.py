"""Submitting a job's arrays: what the site takes now, the rest later, nothing that stands already.

Used by `scheduler`. One sbatch is one array of consecutive tasks; there are several where MaxArraySize or a limit
on submitted jobs wants them smaller. The invariant: of a task at most one array stands, and none is submitted while an
earlier sbatch has no answer.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_assets.durable import atomic_write, prepare_folder, try_locked
from kd_assets.errors import SchedulerError
from kd_assets.scheduler.folder import Submission, key_folder
from kd_assets.scheduler.job import JobSpec, TaskPhase, TaskState
from kd_assets.scheduler.slurm.client import Slurm, sbatch_argv
from kd_assets.scheduler.slurm.parsing import Accepted, Refused, SubmitAnswer
from kd_assets.scheduler.slurm.profile import Profile
from kd_assets.scheduler.slurm.records import Array, read_arrays, write_answer, write_intent
from kd_assets.scheduler.submissions import is_cancelled, read_spec

PACE_S = (30.0, 300.0)
"""First and longest wait after the site refused further jobs."""


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
        *,
        jobs_folder: Path,
        profile: Profile,
        script: Path,
        python: str,
        secrets_file: Path | None,
        clock: Callable[[], float],
    ) -> None:
        self._slurm, self._jobs_folder, self._profile, self._script = slurm, jobs_folder, profile, script
        self._python, self._secrets_file, self._clock = python, secrets_file, clock
        self._paces: dict[Submission, _Pace] = {}

    def prepare(self, submission: Submission, spec: JobSpec) -> None:
        """Write all that its tasks need; whoever finds the submission after a kill right behind this can submit it."""
        prepare_folder(submission.arrays_folder)
        atomic_write(submission.environment_file, self.environment_text(spec).encode(errors="surrogateescape"))

    def submit_more(self, submission: Submission, states: Mapping[int, TaskState]) -> list[str]:
        """Submit what of it is not submitted yet, unless another process is at that; returns what is worth telling.

        `states`: what is known of its tasks.
        """
        spec = read_spec(submission)
        covered = sum(a.n_tasks for a in read_arrays(submission) if a.may_run)
        if covered == spec.n_tasks or is_cancelled(submission):
            return []
        with try_locked(submission.submit_lock) as is_alone:
            return list(self._what_is_left(submission, spec, states)) if is_alone else []

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
            f"export KD_PYTHON={shlex.quote(self._python)}\n"
            f"export KD_N_PROCESSES={spec.resources.n_processes}\n"
            f"{self._profile.setup.rstrip()}\n"
        )

    def _what_is_left(self, submission: Submission, spec: JobSpec, states: Mapping[int, TaskState]) -> Iterator[str]:
        """Submit arrays until all tasks are in, an answer is missing, or the site wants us to wait; yields notices."""
        pace = self._paces.setdefault(submission, _Pace(chunk=self._slurm.max_array_size(), wait_s=PACE_S[0]))
        while self._clock() >= pace.not_before and not is_cancelled(submission):
            arrays = read_arrays(submission)
            if any(a.impossible or not a.is_answered for a in arrays):
                return
            left = [t for t in range(spec.n_tasks) if not any(a.may_run and t in a for a in arrays)]
            chunk = self._chunk(spec, arrays, pace, states)
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

    def _chunk(self, spec: JobSpec, arrays: Sequence[Array], pace: _Pace, states: Mapping[int, TaskState]) -> int:
        """Most tasks of the next array. Where the site takes only a few at a time, those before it still have some of
        the tasks that may run at once; arrays of the full size share them from the start (see `_throttle`)."""
        if not pace.is_limited:
            return pace.chunk
        submitted = (t for a in arrays if a.may_run for t in range(a.first_task, a.first_task + a.n_tasks))
        n_alive = sum(1 for t in submitted if t not in states or states[t].phase is not TaskPhase.ENDED)
        return min(pace.chunk, self._concurrency(spec) - n_alive)

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
        write_intent(submission, array, argv)
        try:
            answer = self._slurm.submit(argv)
        except SchedulerError as e:  # sbatch could not even be started
            write_answer(submission, array, refused=str(e), impossible=True)
            raise
        if isinstance(answer, Accepted):
            write_answer(submission, array, job_id=answer.job_id)
        elif isinstance(answer, Refused):
            write_answer(submission, array, refused=answer.text, impossible=answer.kind == "impossible")
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


def _chunks(tasks: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Consecutive tasks as (first, how many), none of more than `size`."""
    start = 0
    while start < len(tasks):
        end = start + 1
        while end < len(tasks) and end - start < size and tasks[end] == tasks[end - 1] + 1:
            end += 1
        yield tasks[start], end - start
        start = end
