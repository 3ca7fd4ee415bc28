"""SLURM's own commands as functions: sbatch, squeue, sacct, scancel, scontrol, sinfo. Their text, parsed; no decisions.

Nothing here knows submissions, retries or time: that is `slurm_scheduler`. Every call goes through a `CommandRunner`
with a time limit; the parsers are pure functions of a command's text. JSON output is not used: 22.05's squeue ignores
its filters with it, its sacct reports the exit code 0 for 3, and the shapes changed by 24.11.

Anybody's job name or comment may hold any character, the separator and line ends included. So each call draws a
separator that no name can contain (`_new_separator`), and a text that does not end as a whole row is no answer.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd_assets.errors import SchedulerError, SchedulerUnreachableError
from kd_assets.scheduler.command import Answer, CommandMissingError, CommandRunner
from kd_assets.scheduler.job import JobSpec, Resources
from kd_assets.scheduler.profile import Profile
from kd_assets.scheduler.slurm_states import ENDED_STATES, base_state, may_come_back

__all__ = [
    "Accepted",
    "AccountingRow",
    "PartitionInfo",
    "QueueRow",
    "Refused",
    "Slurm",
    "SubmitAnswer",
    "Unknown",
    "excluded_nodes",
    "parse_accounting",
    "parse_node_states",
    "parse_partitions",
    "parse_queue",
    "read_submit_answer",
    "sbatch_argv",
]

OUR_PREFIX = "kd-"
"""How the names of our jobs begin (`JobSpec.name`)."""

# With `Field:separator`, and no size between, -O prints a field in full. Its default is to cut at 20 characters; and -o
# knows neither restarts nor exit codes.
_QUEUE_FIELDS = (
    "ArrayJobID", "ArrayTaskID", "State", "Reason", "NodeList", "RestartCnt", "exit_code",
    "SubmitTime", "StartTime", "EndTime", "Name", "Comment",
)  # fmt: skip
_ACCOUNTING_FIELDS = (
    "JobID", "JobName", "Comment", "State", "Reason", "ExitCode", "NodeList",
    "Submit", "Start", "End", "ElapsedRaw", "TotalCPU", "NCPUS", "MaxRSS",
)  # fmt: skip
_PARTITION_FIELDS = ("%a", "%D", "%l", "%c", "%m", "%G", "%R")  # the name last: it may hold the separator
_FIRST_UTS = 1_000_000_000  # sacct refuses times since the epoch of fewer digits
_NAMES_A_CALL = 500
_IDS_A_CALL = 1000

_UNANSWERED = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "connection timed out",
    "connection reset",
    "communication connection failure",
    "zero bytes were transmitted",
    "message receive failure",
    "message send failure",
    "unexpected message received",
    "insane message length",
    "standby mode",
    "munge",
    "authentication error",
    "authentication credential",
    "configuration source",
)
"""In sbatch's text, in lower case: it got no answer, or could not ask. Some of them come after the job was accepted."""

_SUBMIT_LIMITS = ("MaxSubmit", "GrpSubmit", "MaxJobs", "GrpJobs")  # QOSMaxSubmitJobPerUserLimit, ...
_PACE = (*_SUBMIT_LIMITS, "temporarily unable to accept job", "Resource temporarily unavailable")
"""In sbatch's text: too many jobs for now. A policy violation that names no such limit is not among them."""

_REFUSALS = (
    "Access/permission denied",
    "Invalid job id",
    "Job/step already completing or completed",
    "Job is no longer pending execution",
    "Invalid user",
)
"""In the text of the other commands: an answer, and waiting does not change it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueRow:
    """What squeue says of one array task, or of one plain job."""

    job_id: int
    """Of the whole array: `14` of `14_3`."""
    index: int | None
    """Of the array task. None: a plain job; or, when CANCELLED, all tasks of an array without a row of their own: where
    somebody cancelled all jobs of a user (`scancel --user`), SLURM forgets the indices of those that never started."""
    name: str
    comment: str
    state: str
    reason: str
    node: str
    restarts: int
    exit_code: int | None
    """Of a job that ended by itself or was killed; negative for a signal."""
    submitted_at: float | None
    """Seconds since the epoch. A requeue moves it to the time of the requeue."""
    started_at: float | None
    """None while it waits (SLURM tells an estimate then)."""
    ended_at: float | None
    """None while it lives (SLURM tells its time limit then)."""

    @property
    def task_id(self) -> str:
        """The name that scancel and scontrol take."""
        return str(self.job_id) if self.index is None else f"{self.job_id}_{self.index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountingRow:
    """What sacct says of one attempt of an array task or plain job, its steps included."""

    job_id: int
    index: int | None
    name: str
    comment: str
    """Empty where the site does not store comments (AccountingStoreFlags=job_comment)."""
    state: str
    reason: str
    """Why it last waited, not why it ended: sacct keeps no other."""
    node: str
    restarts: int
    """How many attempts of it come before, among those asked for."""
    exit_code: int | None
    """As in the queue, but 137 is told as 9: sacct drops the eighth bit."""
    submitted_at: float | None
    started_at: float | None
    ended_at: float | None
    elapsed_s: float
    cpu_s: float
    """User and system time of its steps; 0 while it runs."""
    n_cpus: int
    max_rss_gib: float | None
    """Largest of its steps, as sampled; None when no sample was taken."""

    @property
    def task_id(self) -> str:
        return str(self.job_id) if self.index is None else f"{self.job_id}_{self.index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionInfo:
    """The nodes of one shape in one SLURM partition."""

    name: str
    state: str
    """`up`, `down`, `drain`, `inact`."""
    n_nodes: int
    max_time_minutes: int | None
    """None: no limit."""
    cpus: int
    memory_gib: float
    gres: str
    """`gpu:h100:4`; empty without any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    job_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """The controller said no: the job does not exist, or only as a record of its failure."""

    text: str
    kind: Literal["impossible", "pace"]
    """`pace`: the same request may be accepted once other jobs are gone."""

    @property
    def is_submit_limit(self) -> bool:
        """Whether a limit on the number of jobs was named, each task of an array counted: a smaller array may fit."""
        return self.kind == "pace" and any(phrase in self.text for phrase in _SUBMIT_LIMITS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """No usable answer: the job may have been accepted. Look for it before submitting again."""

    text: str


SubmitAnswer = Accepted | Refused | Unknown


class Slurm:
    """A cluster's commands. Each raises SchedulerUnreachableError when there is no answer within `timeout_s`."""

    def __init__(self, run: CommandRunner, *, timeout_s: float) -> None:
        self._runner, self._timeout_s = run, timeout_s
        self._max_array_size: int | None = None

    def submit(self, argv: Sequence[str]) -> SubmitAnswer:
        """Run an sbatch command line that asks for `--parsable` output. Never raises for want of an answer."""
        try:
            return read_submit_answer(self._run(argv))
        except SchedulerUnreachableError as e:
            return Unknown(text=str(e))

    def queue_text(self) -> str:
        """One squeue call for all of this user's jobs, as a text that `parse_queue` reads in any process."""
        fields = ",".join(f"{field}:{separator}" for separator in (_new_separator(),) for field in _QUEUE_FIELDS)
        # Without --array-unique squeue folds a task that was requeued or held into its array's row of those that never
        # started, with their restart count of 0. --array would name each task, but forgets the last one of `0-20:2`.
        return self._answer(["squeue", "--me", "--all", "--array-unique", "--states=all", f"--Format={fields}"]).stdout

    def queue(self) -> list[QueueRow]:
        """All of this user's jobs whose name is one of ours, ended ones until SLURM forgets them (MinJobAge)."""
        return parse_queue(self.queue_text())

    def accounting(self, names: Sequence[str], since: float) -> list[AccountingRow] | None:
        """Every attempt of the jobs with these names that lived at `since` (epoch) or later, oldest first.

        None where the site has no accounting. A new job takes up to five seconds to appear.
        """
        rows: list[AccountingRow] = []
        for i in range(0, len(names), _NAMES_A_CALL):
            separator = _new_separator()
            argv = [
                "sacct", "--duplicates", "--noheader", "--parsable2", f"--delimiter={separator}",
                f"--starttime=uts{max(int(since), _FIRST_UTS)}", f"--name={','.join(names[i : i + _NAMES_A_CALL])}",
                f"--format={','.join(_ACCOUNTING_FIELDS)}",
            ]  # fmt: skip
            try:
                answer = self._run(argv)
            except CommandMissingError:
                return None
            if answer.status != 0:
                if "accounting storage is disabled" in answer.stderr:
                    return None
                raise _no_answer(answer)
            rows += parse_accounting(answer.stdout, separator)
        return rows

    def cancel(self, ids: Sequence[str]) -> None:
        """Ask for the end of jobs (`14`) or array tasks (`14_3`), and return before they are gone.

        One that SLURM does not know any more is no error.
        """
        for i in range(0, len(ids), _IDS_A_CALL):
            answer = self._run(["scancel", *ids[i : i + _IDS_A_CALL]])
            gone = [line for line in answer.stderr.splitlines() if "Invalid job id" in line]
            if answer.status != 0 and (not gone or len(gone) < len(answer.stderr.splitlines())):
                raise _no_answer(answer)

    def release(self, task_id: str) -> None:
        """Let a held task start. Raises SchedulerError when it may not, or is no longer there."""
        answer = self._run(["scontrol", "release", task_id])
        if answer.status != 0:
            raise _no_answer(answer)

    def exclude(self, task_id: str, nodes: Sequence[str]) -> None:
        """Keep a task that waits from these nodes, too. Raises SchedulerError when it no longer waits."""
        shown = self._answer(["scontrol", "--oneliner", "show", "job", task_id]).stdout
        update = f"ExcNodeList={','.join([*excluded_nodes(shown), *nodes])}"
        self._answer(["scontrol", "update", f"JobId={task_id}", update])

    def node_states(self, nodes: Sequence[str]) -> dict[str, str]:
        """Node → sinfo's word for it (see `slurm_states.is_bad_node`); without those that SLURM does not know."""
        argv = ["sinfo", "--noheader", "--all", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T"]
        return parse_node_states(self._answer(argv).stdout)

    def max_array_size(self) -> int:
        """One more than the largest index of an array. Asked once."""
        if self._max_array_size is None:
            text = self._answer(["scontrol", "show", "config"]).stdout
            match = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
            self._max_array_size = int(match[1]) if match else 1001  # SLURM's default
        return self._max_array_size

    def version(self) -> str:
        """`22.05.8`."""
        text = self._answer(["squeue", "--version"]).stdout
        match = re.search(r"\d+\.\d+(\.\d+)?\S*", text)
        return match[0] if match else text.strip()

    def partitions(self) -> list[PartitionInfo]:
        """What sinfo lists, one entry for each shape of node in a partition."""
        return parse_partitions(
            self._answer(["sinfo", "--noheader", "--exact", "--format=" + "|".join(_PARTITION_FIELDS)]).stdout
        )

    def _answer(self, argv: Sequence[str]) -> Answer:
        answer = self._run(argv)
        if answer.status != 0:
            raise _no_answer(answer)
        return answer

    def _run(self, argv: Sequence[str]) -> Answer:
        return self._runner.run(argv, timeout_s=self._timeout_s)


def sbatch_argv(
    *,
    profile: Profile,
    spec: JobSpec,
    name: str,
    comment: str,
    array: str,
    log_folder: Path,
    script: str,
    arguments: Sequence[str],
    folder: Path,
) -> list[str]:
    """The command line that submits an array, every option on it; `slurm/task.sbatch` has none of its own.

    Each task's output is appended to `slurm-<job id>_<index>.log` in `log_folder`; `folder` is where it starts.

    The command's own environment becomes the jobs' (see `command`): typed into a shell, put `env -i` and what the job
    may see before it. Raises SchedulerError for a folder whose name sbatch cannot express.
    """
    wanted = spec.resources
    options = {
        "job-name": name,
        "comment": comment,
        "array": array,
        "chdir": str(folder),
        "output": f"{_literal(str(log_folder))}/slurm-%A_%a.log",
        "open-mode": "append",
        "signal": f"B:USR1@{profile.signal_s}",
        # Not a list of names, nor NONE: both make the node run `su - user` for the login environment, which may stall
        # or fail, and hand the same narrow list on to every srun. ALL is small here, see `command.KEPT_VARIABLES`.
        "export": "ALL",
        "partition": wanted.slurm_partition,
        "account": wanted.account,
        "qos": wanted.qos,
        "constraint": wanted.constraint,
        "gpus-per-node": wanted.gpus_per_node,
        "cpus-per-task": wanted.cpus,
        "mem": _memory(wanted),
        "time": wanted.time_minutes,
        "exclude": ",".join(spec.excluded_nodes) or None,
    }
    flags = ["--requeue", *(["--exclusive"] if wanted.exclusive else [])]
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *flags, *wanted.sbatch_options, script, *arguments]


def _memory(wanted: Resources) -> str | None:
    """sbatch's `--mem`. A whole node has all of its memory (0): SLURM alone would give it the site's default."""
    if wanted.memory_gib is None:
        return "0" if wanted.exclusive else None
    return f"{round(wanted.memory_gib * 1024)}M"


def read_submit_answer(answer: Answer) -> SubmitAnswer:
    """What sbatch's text and exit status say. Whatever they do not say for certain is `Unknown`."""
    text = " ".join((answer.stderr or answer.stdout).split())
    if answer.status == 0:
        # `14`, or `14;cluster`; anything before it is somebody's job_submit plugin talking.
        match = re.fullmatch(r"(\d+)(;\S*)?", answer.stdout.strip().rpartition("\n")[2])
        return Accepted(job_id=int(match[1])) if match else Unknown(text=text or "sbatch named no job")
    if answer.status < 0 or any(phrase in text.lower() for phrase in _UNANSWERED):
        return Unknown(text=text or f"sbatch was killed by signal {-answer.status}")
    if any(phrase in text for phrase in _PACE):
        return Refused(text=text, kind="pace")
    if re.search(r"sbatch: (error|fatal|unrecognized option|invalid option|option )", text):
        return Refused(text=text, kind="impossible")
    return Unknown(text=text or f"sbatch ended with exit status {answer.status} and no word")


def parse_queue(text: str) -> list[QueueRow]:
    """The rows of our jobs in `Slurm.queue_text`, pending ranges as one row a task.

    Raises SchedulerUnreachableError for a text that was cut off: tasks missing from it are not gone.
    """
    header = re.match(r"\w+(\|[0-9a-f]{12}\|)", text)
    if header is None:
        raise SchedulerUnreachableError(f"squeue's answer does not begin with its header: {text[:80]!r}")
    names = len(_QUEUE_FIELDS)
    return [
        row
        for fields in _records(text, header[1], names)
        if fields[_QUEUE_FIELDS.index("Name")].startswith(OUR_PREFIX)
        for row in _queue_rows(dict(zip(_QUEUE_FIELDS, fields, strict=True)))
    ]


def parse_accounting(text: str, separator: str) -> list[AccountingRow]:
    """The attempts in sacct's answer, each with what its steps used; in sacct's order, oldest first.

    Raises SchedulerUnreachableError for a text that was cut off.
    """
    attempts: list[tuple[dict[str, str], list[dict[str, str]]]] = []
    for fields in _lines(text, separator, len(_ACCOUNTING_FIELDS)):
        row = dict(zip(_ACCOUNTING_FIELDS, fields, strict=True))
        job, is_step, _ = row["JobID"].partition(".")
        if not is_step:
            attempts.append((row, []))
        elif attempts and attempts[-1][0]["JobID"] == job:  # `14_3.batch` follows its `14_3`
            attempts[-1][1].append(row)
    rows: list[AccountingRow] = []
    seen: dict[tuple[str, int, int | None], int] = {}
    for row, steps in attempts:
        if not row["JobName"].startswith(OUR_PREFIX):
            continue
        job_id, indices = _identity(row["JobID"])
        for index in indices:
            restarts = seen.get((row["JobName"], job_id, index), 0)
            seen[row["JobName"], job_id, index] = restarts + 1
            rows.append(_accounting_row(row, steps, job_id=job_id, index=index, restarts=restarts))
    return rows


def parse_partitions(text: str) -> list[PartitionInfo]:
    """The lines of `sinfo --exact --format` with the fields `_PARTITION_FIELDS`."""
    found = []
    for line in text.splitlines():
        state, n_nodes, limit, cpus, memory, gres, name = line.split("|", len(_PARTITION_FIELDS) - 1)
        seconds = _duration_s(limit)
        found.append(
            PartitionInfo(
                name=name,
                state=state,
                n_nodes=int(n_nodes),
                max_time_minutes=None if seconds is None else int(seconds // 60),
                cpus=int(cpus.rstrip("+")),
                memory_gib=float(memory.rstrip("+")) / 1024,
                gres="" if gres in ("(null)", "N/A") else gres,
            )
        )
    return found


def parse_node_states(text: str) -> dict[str, str]:
    """The lines of `sinfo --Node --format=%N|%T`: one a node and partition."""
    return {name: state for name, _, state in (line.rpartition("|") for line in text.splitlines())}


def excluded_nodes(text: str) -> list[str]:
    """Which nodes `scontrol --oneliner show job` says that a job must not run on, as SLURM folds them: `n[0-2],n7`."""
    # The name and the comment of a job come before and after it, and may say the same of themselves.
    match = re.search(r" ReqNodeList=\S+ ExcNodeList=(\S+) ", text)
    return [said] if match and (said := _said(match[1])) else []


def _queue_rows(row: dict[str, str]) -> Iterator[QueueRow]:
    state, ended = row["State"], base_state(row["State"]) in ENDED_STATES
    waits = base_state(state) == "PENDING"
    for index in _indices(row["ArrayTaskID"]):
        yield QueueRow(
            job_id=int(row["ArrayJobID"]),
            index=index,
            name=row["Name"],
            comment=_said(row["Comment"]),
            state=state,
            reason=_said(row["Reason"]),
            node=_said(row["NodeList"]),
            restarts=int(row["RestartCnt"]),
            exit_code=_exit_code(state, row["NodeList"], row["exit_code"]),
            submitted_at=_time(row["SubmitTime"]),
            started_at=None if waits else _time(row["StartTime"]),
            ended_at=_time(row["EndTime"]) if ended else None,
        )


def _accounting_row(
    row: dict[str, str], steps: list[dict[str, str]], *, job_id: int, index: int | None, restarts: int
) -> AccountingRow:
    samples = [gib for step in steps if (gib := _gib(step["MaxRSS"])) is not None]
    used_by_steps = sum(_duration_s(step["TotalCPU"]) or 0.0 for step in steps)
    return AccountingRow(
        job_id=job_id,
        index=index,
        name=row["JobName"],
        comment=row["Comment"],
        state=row["State"],
        reason=_said(row["Reason"]),
        node=_said(row["NodeList"]),
        restarts=restarts,
        exit_code=_exit_code(row["State"], row["NodeList"], row["ExitCode"]),
        submitted_at=_time(row["Submit"]),
        started_at=_time(row["Start"]),
        ended_at=_time(row["End"]),
        elapsed_s=float(row["ElapsedRaw"] or 0),
        cpu_s=max(_duration_s(row["TotalCPU"]) or 0.0, used_by_steps),
        n_cpus=int(row["NCPUS"] or 0),
        max_rss_gib=max(samples, default=None),
    )


def _new_separator() -> str:
    """Drawn for one call, so that no name or comment can hold it."""
    return f"|{secrets.token_hex(6)}|"


def _records(text: str, separator: str, n_fields: int) -> Iterator[list[str]]:
    """squeue's rows after its header: every field is followed by the separator, every row by a line end."""
    *cells, tail = text.split(separator)
    if tail != "\n" or len(cells) % n_fields:
        raise SchedulerUnreachableError(f"squeue's answer was cut off: it ends with {text[-80:]!r}")
    for i in range(n_fields, len(cells), n_fields):
        yield [cells[i].removeprefix("\n"), *cells[i + 1 : i + n_fields]]


def _lines(text: str, separator: str, n_fields: int) -> Iterator[list[str]]:
    """sacct's rows: the separator stands between fields, and a field may hold line ends."""
    fields: list[str] = []
    for line in text.splitlines(keepends=True):
        first, *others = line.split(separator)
        if fields:
            fields[-1] += first
            fields += others
        else:
            fields = [first, *others]
        if len(fields) == n_fields and fields[-1].endswith("\n"):
            yield [*fields[:-1], fields[-1].removesuffix("\n")]
            fields = []
    if fields:
        raise SchedulerUnreachableError(f"sacct's answer was cut off: it ends with {text[-80:]!r}")


def _identity(text: str) -> tuple[int, list[int | None]]:
    """`14`, `14_3`, `14_[0-3,7%2]` → the job's id and the indices meant."""
    job_id, _, indices = text.partition("_")
    return int(job_id.partition("+")[0]), _indices(indices.strip("[]") or "N/A")


def _indices(text: str) -> list[int | None]:
    """`3`, `0-3,7,9-11%4`, `6-60:2%3` → indices; `N/A` → [None]: no array, or an array's cancelled rest."""
    if text in ("N/A", ""):
        return [None]
    found: list[int | None] = []
    for part in text.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match is None:  # `...`: cut off, and the tasks not named would seem gone
            raise SchedulerUnreachableError(f"array indices that were cut off: {text!r} (SLURM_BITSTR_LEN=0 was lost)")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        found += range(first, last + 1, step)
    return found


def _exit_code(state: str, node: str, text: str) -> int | None:
    """squeue's wait status (`768`: exit 3; `9`: signal 9) or sacct's pair (`3:0`, `0:9`) → 3, -9.

    None where SLURM's 0 means that nobody knows: while it lives, if it never started, when its node was taken away.
    """
    if base_state(state) not in ENDED_STATES or may_come_back(state) or not _said(node):
        return None
    if ":" in text:
        code, number = (int(part) for part in text.split(":")[:2])
    elif text.isdecimal():
        code, number = int(text) >> 8, int(text) & 0x7F  # the eighth bit says core dumped
    else:
        return None
    return -number if number else code


def _time(text: str) -> float | None:
    """Seconds since the epoch; None for `Unknown`, `N/A`, `NONE` and the like."""
    return float(text) if text.isdecimal() and text != "0" else None


def _duration_s(text: str) -> float | None:
    """`00:01.250`, `02:03:04`, `1-02:03:04.567` → seconds; None for `infinite`, and whatever is no duration."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text)
    if match is None:
        return None
    days, hours, minutes = (int(part or 0) for part in match.groups()[:3])
    return ((days * 24 + hours) * 60 + minutes) * 60 + float(match[4])


def _gib(text: str) -> float | None:
    """`3828K`, `1.50G`, `0` → GiB. None for an empty field, and for 0: the step ended before its first sample."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", text)
    if match is None or float(match[1]) == 0:
        return None
    return float(match[1]) * 1024.0 ** ("KMGTP".index(match[2]) - 2 if match[2] else -3)


def _said(text: str) -> str:
    """A field without SLURM's words for nothing."""
    return "" if text in ("(null)", "None", "N/A", "n/a", "None assigned") else text


def _literal(path: str) -> str:
    """A folder in sbatch's `--output`, where `%` starts a symbol.

    Raises SchedulerError for a backslash: one anywhere makes sbatch take all symbols literally, so all tasks of an
    array would write one file.
    """
    if "\\" in path or not path.isprintable():
        raise SchedulerError(
            f"SLURM cannot write logs under {path!r}: choose a KD_HOME without backslashes and line ends"
        )
    return path.replace("%", "%%")


def _no_answer(answer: Answer) -> SchedulerError:
    """The error for a command that failed: unreachable, unless the controller clearly said no."""
    text = " ".join((answer.stderr or answer.stdout).split())[-500:]
    said = f"{answer.argv[0]} failed (exit status {answer.status}): {text or 'without a word'}"
    if any(phrase in text for phrase in _REFUSALS) and not any(phrase in text.lower() for phrase in _UNANSWERED):
        return SchedulerError(said)
    return SchedulerUnreachableError(said)
