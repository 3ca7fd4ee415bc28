"""A fake of a SLURM cluster: what a controller would answer, from a small model in memory.

It stands in the place of a `CommandRunner` and answers sbatch, squeue, sacct, scancel, scontrol and sinfo in SLURM's
words. It starts nothing, and nothing happens in it by itself: a test says what becomes of a task (`ends`, `runs`,
`forgets`) and how sbatch answers (`next_answers`). That SLURM's real text is read as this one is, is proved by
`test_client.py` with literal text and by `kd_assets_tests/slurm` on real clusters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kd_assets.errors import SchedulerUnreachableError
from kd_assets.scheduler.slurm.commands.parsing import ACCOUNTING_FIELDS, QUEUE_FIELDS
from kd_assets.scheduler.slurm.commands.runners import Answer, CommandMissingError

SbatchAnswer = Literal[
    "accepted", "accepted, not said", "not come, not said", "impossible", "pace", "submit limit", "unclear"
]
"""What becomes of an sbatch: `accepted, not said` is in the queue though its client heard nothing; `not come, not said`
is not, and its client does not know."""

_REFUSALS = {
    "impossible": "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
    "unclear": "sbatch: error: Batch job submission failed: I/O error writing script/environment to file\n",
    "pace": "sbatch: error: Batch job submission failed: Resource temporarily unavailable\n",
    "submit limit": "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job "
    "violates accounting/QOS policy (job submit limit, user's size and/or time limits)\n",
}


class Clock:
    """Time that passes only when a test, or a sleep, says so."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(kw_only=True)
class FakeTask:
    """One array task in the queue."""

    state: str = "PENDING"
    reason: str = "Priority"
    node: str = ""
    restarts: int = 0
    wait_status: int = 0
    """As squeue shows it: `768` is exit status 3, `9` signal 9."""
    started_at: int | None = None
    excluded: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class FakeArray:
    job_id: int
    name: str
    comment: str
    folder: str
    tasks: dict[int, FakeTask]


@dataclass(kw_only=True)
class FakeAttempt:
    """One row of sacct."""

    job_id: int
    index: int
    name: str
    state: str
    node: str
    exit_code: str


class FakeCluster:
    """See above."""

    def __init__(self, clock: Clock, *, accounting: bool = True, max_array_size: int = 1001) -> None:
        self._clock, self._accounting, self._max_array_size = clock, accounting, max_array_size
        self.is_reachable = True
        self.silent: set[str] = set()
        """Commands that get no answer, whatever the others get."""
        self.next_answers: list[SbatchAnswer] = []
        """How the next sbatch commands are answered, in order; then all are accepted."""
        self.arrays: list[FakeArray] = []
        """What squeue shows."""
        self.accounted: list[FakeAttempt] = []
        """What sacct shows."""
        self.late: list[FakeArray] = []
        """Arrays that the controller has not worked off yet: see `arrives`."""
        self.hidden: list[FakeArray] = []
        """Arrays that squeue does not show for now, though they are there."""
        self.node_states: dict[str, str] = {}
        self.asked: list[list[str]] = []
        """Every command line."""
        self.kills_slowly = False
        """Whether tasks that are cancelled stay in the queue until `kills` ends them."""
        self._last_id = 0

    # ------------------------------------------------------------------ what a test says

    def task(self, task: int, array: int = 0) -> FakeTask:
        return self.arrays[array].tasks[task]

    def runs(self, task: int, *, node: str = "n1", array: int = 0, restarts: int = 0) -> None:
        found = self.task(task, array)
        found.state, found.reason, found.node, found.restarts = "RUNNING", "None", node, restarts
        found.started_at = int(self._clock.now)

    def waits(self, task: int, reason: str, *, array: int = 0, restarts: int = 0) -> None:
        found = self.task(task, array)
        found.state, found.reason, found.node, found.restarts = "PENDING", reason, "", restarts

    def ends(
        self, task: int, state: str = "COMPLETED", *, reason: str = "None", status: int = 0, array: int = 0
    ) -> None:
        """squeue and, where there is one, sacct show this end; `status` as in `FakeTask.wait_status`."""
        job, found = self.arrays[array], self.task(task, array)
        found.state, found.reason, found.wait_status = state, reason, status
        if self._accounting:
            exit_code = f"{status >> 8}:{status & 0x7F}"
            self.accounted.append(
                FakeAttempt(
                    job_id=job.job_id, index=task, name=job.name, state=state, node=found.node, exit_code=exit_code
                )
            )

    def forgets(self, array: int = 0, *, task: int | None = None) -> None:
        """squeue no longer shows it, as after MinJobAge, or after a controller lost its state."""
        if task is None:
            del self.arrays[array]
        else:
            del self.arrays[array].tasks[task]

    def arrives(self) -> None:
        """What the controller had not worked off is in the queue now."""
        self.arrays += self.late
        self.late.clear()

    def kills(self) -> None:
        """KillWait is over."""
        for job in self.arrays:
            for task in job.tasks.values():
                if task.state == "COMPLETING":
                    task.state = "CANCELLED"

    def n_asked(self, command: str) -> int:
        return sum(argv[0] == command for argv in self.asked)

    # ------------------------------------------------------------------ the command runner

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        self.asked.append(list(argv))
        if not self.is_reachable or argv[0] in self.silent:
            raise SchedulerUnreachableError(f"{argv[0]} gave no answer within {timeout_s:g} s and was killed")
        answers = {
            "sbatch": self._sbatch,
            "squeue": self._squeue,
            "sacct": self._sacct,
            "scancel": self._scancel,
            "scontrol": self._scontrol,
            "sinfo": self._sinfo,
        }
        return answers[argv[0]](argv)

    def _sbatch(self, argv: Sequence[str]) -> Answer:
        answer = self.next_answers.pop(0) if self.next_answers else "accepted"
        if answer in _REFUSALS:
            return _answer(argv, stderr=_REFUSALS[answer], status=1)
        last, _, _ = _option(argv, "array").removeprefix("0-").partition("%")
        self._last_id += 1
        job = FakeArray(
            job_id=self._last_id,
            name=_option(argv, "job-name"),
            comment=_option(argv, "comment"),
            folder=_option(argv, "chdir"),
            tasks={index: FakeTask() for index in range(int(last) + 1)},
        )
        if answer == "not come, not said":
            self.late.append(job)
        else:
            self.arrays.append(job)
        if answer != "accepted":
            raise SchedulerUnreachableError("sbatch gave no answer within 30 s and was killed")
        return _answer(argv, stdout=f"{job.job_id}\n")

    def _squeue(self, argv: Sequence[str]) -> Answer:
        separator = _separator(argv)
        rows = [
            (
                job.job_id, index, task.state, task.reason, task.node, task.restarts, task.wait_status,
                int(self._clock.now), task.started_at or "N/A", "N/A", job.name, job.comment,
            )
            for job in self.arrays
            for index, task in job.tasks.items()
            if job not in self.hidden
        ]  # fmt: skip
        lines = ["".join(f"{cell}{separator}" for cell in row) for row in [QUEUE_FIELDS, *rows]]
        return _answer(argv, stdout="\n".join(lines) + "\n")

    def _sacct(self, argv: Sequence[str]) -> Answer:
        if not self._accounting:
            return _answer(argv, stderr="Slurm accounting storage is disabled\n", status=1)
        names, separator = _option(argv, "name").split(","), _option(argv, "delimiter")
        lines = []
        for row in self.accounted:
            cells = dict.fromkeys(ACCOUNTING_FIELDS, "") | {
                "JobID": f"{row.job_id}_{row.index}",
                "JobName": row.name,
                "State": row.state,
                "ExitCode": row.exit_code,
                "NodeList": row.node,
            }
            if row.name in names:
                lines.append(separator.join(cells.values()) + "\n")
        return _answer(argv, stdout="".join(lines))

    def _scancel(self, argv: Sequence[str]) -> Answer:
        for word in argv[1:]:
            job_id, _, index = word.partition("_")
            for job in (j for j in self.arrays if j.job_id == int(job_id)):
                for i, task in job.tasks.items():
                    if (not index or i == int(index)) and task.state in ("PENDING", "RUNNING"):
                        task.wait_status = 15 if task.state == "RUNNING" else 0
                        task.state = "COMPLETING" if self.kills_slowly else "CANCELLED by 0"
        return _answer(argv)

    def _scontrol(self, argv: Sequence[str]) -> Answer:
        match list(argv[1:]):
            case ["show", "config"]:
                return _answer(argv, stdout=f"MaxArraySize            = {self._max_array_size}\n")
            case ["release", task_id]:
                self._find(task_id).reason = "None"
                return _answer(argv)
            case ["--oneliner", "show", "job", job_id] if job_id.isdecimal():
                return self._show_job(argv, int(job_id))
            case ["--oneliner", "show", "job", task_id]:
                nodes = ",".join(self._find(task_id).excluded) or "(null)"
                return _answer(argv, stdout=f"JobId=1 ReqNodeList=(null) ExcNodeList={nodes} NodeList= ")
            case ["update", job, nodes]:
                for task in self._find_all(job.removeprefix("JobId=")):
                    task.excluded = nodes.removeprefix("ExcNodeList=").split(",")
                return _answer(argv)
        raise AssertionError(f"the fake has no answer to {argv}")

    def _show_job(self, argv: Sequence[str], job_id: int) -> Answer:
        lines = [
            f"JobId={job_id} ArrayJobId={job_id} ArrayTaskId={index} JobName={job.name} JobState={task.state} "
            f"WorkDir={job.folder} StdErr=x\n"
            for job in self.arrays
            if job.job_id == job_id
            for index, task in job.tasks.items()
        ]
        if not lines:
            return _answer(argv, stderr="slurm_load_jobs error: Invalid job id specified\n", status=1)
        return _answer(argv, stdout="".join(lines))

    def _sinfo(self, argv: Sequence[str]) -> Answer:
        wanted = _option(argv, "nodes").split(",")
        return _answer(argv, stdout="".join(f"{n}|{self.node_states.get(n, 'idle')}\n" for n in wanted))

    def _find_all(self, words: str) -> list[FakeTask]:
        """`14_3`, or `14_[0-2,7]`."""
        job_id, _, indices = words.partition("_")
        runs = [run.partition("-") for run in indices.strip("[]").split(",")]
        found = [i for first, _, last in runs for i in range(int(first), int(last or first) + 1)]
        return [self._find(f"{job_id}_{i}") for i in found]

    def _find(self, task_id: str) -> FakeTask:
        job_id, _, index = task_id.partition("_")
        (job,) = [j for j in self.arrays if j.job_id == int(job_id)]
        return job.tasks[int(index)]


class MissingCommands:
    """A fake of a machine without SLURM."""

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        raise CommandMissingError(f"{argv[0]} is not installed here")


def _answer(argv: Sequence[str], *, stdout: str = "", stderr: str = "", status: int = 0) -> Answer:
    return Answer(argv=tuple(argv), status=status, stdout=stdout, stderr=stderr)


def _option(argv: Sequence[str], name: str) -> str:
    return next(word.partition("=")[2] for word in argv if word.startswith(f"--{name}="))


def _separator(argv: Sequence[str]) -> str:
    found = re.search(r"\|[0-9a-f]{12}\|", _option(argv, "Format"))
    assert found is not None
    return found[0]
