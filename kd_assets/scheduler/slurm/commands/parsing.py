"""The text of SLURM's commands, parsed: pure functions, tested with literal output of the versions we know."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kd_assets.errors import SchedulerUnreachableError
from kd_assets.scheduler.slurm.commands.runners import Answer
from kd_assets.scheduler.slurm.commands.states import ENDED_STATES, base_state, may_come_back

OUR_PREFIX = "kd-"
"""How the names of our jobs begin (`JobSpec.name`)."""
OUR_COMMENT = "kd_assets "
"""How their comments begin, which stay when somebody renames a job."""

# With `Field:separator`, and no size between, -O prints a field in full. Its default is to cut at 20 characters; and -o
# knows neither restarts nor exit codes.
QUEUE_FIELDS = (
    "ArrayJobID", "ArrayTaskID", "State", "Reason", "NodeList", "RestartCnt", "exit_code",
    "SubmitTime", "StartTime", "EndTime", "Name", "Comment",
)  # fmt: skip

ACCOUNTING_FIELDS = (
    "JobID", "JobName", "Comment", "State", "Reason", "ExitCode", "NodeList",
    "Submit", "Start", "End", "ElapsedRaw", "TotalCPU", "NCPUS", "MaxRSS",
)  # fmt: skip

PARTITION_FIELDS = ("%a", "%D", "%l", "%c", "%m", "%G", "%R")  # the name last: it may hold the separator

UNANSWERED = (
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

SUBMIT_LIMITS = ("MaxSubmit", "GrpSubmit", "MaxJobs", "GrpJobs")  # QOSMaxSubmitJobPerUserLimit, ...

PACE = (*SUBMIT_LIMITS, "temporarily unable to accept job", "Resource temporarily unavailable")
"""In sbatch's text: too many jobs for now. A policy violation that names no such limit is not among them."""

IMPOSSIBLE = re.compile(
    r"unrecognized option|invalid option|option .*(requires an argument|is ambiguous)|mutually exclusive|"
    r"invalid .*(specification|specified|value|argument|entry)|specification (invalid|can not be satisfied)|"
    r"can not be satisfied|Requested node configuration is not available|Requested time limit is invalid|"
    r"Requested reservation is invalid|More processors requested than permitted|violates accounting/QOS policy|"
    r"Invalid account or account/partition combination|not permitted to use this partition|"
    r"Access/permission denied|Invalid user|Unable to open file|Batch script is empty|"
    r"does not look like a batch script|script contains (a )?NULL|Pathname of a file.* too long|Job size specification",
    re.IGNORECASE,
)
"""In sbatch's text: the request is wrong, or the user may not make it. Any other refusal may pass: the controller
cannot write its state, is being configured anew, or a plugin of the site's has words of its own."""


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
    kind: Literal["impossible", "pace", "unclear"]
    """`pace`: the same request may be accepted once other jobs are gone. `unclear`: words that we do not know, so the
    same request may be accepted later."""

    @property
    def is_submit_limit(self) -> bool:
        """Whether a limit on the number of jobs was named, each task of an array counted: a smaller array may fit."""
        return self.kind == "pace" and any(phrase in self.text for phrase in SUBMIT_LIMITS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """No usable answer: the job may have been accepted. Look for it before submitting again."""

    text: str


SubmitAnswer = Accepted | Refused | Unknown


def read_submit_answer(answer: Answer) -> SubmitAnswer:
    """What sbatch's text and exit status say. Whatever they do not say for certain is `Unknown`."""
    text = " ".join((answer.stderr or answer.stdout).split())
    if answer.status == 0:
        # `14`, or `14;cluster`; anything before it is somebody's job_submit plugin talking.
        match = re.fullmatch(r"(\d+)(;\S*)?", answer.stdout.strip().rpartition("\n")[2])
        return Accepted(job_id=int(match[1])) if match else Unknown(text=text or "sbatch named no job")
    if answer.status < 0 or any(phrase in text.lower() for phrase in UNANSWERED):
        return Unknown(text=text or f"sbatch was killed by signal {-answer.status}")
    if any(phrase in text for phrase in PACE):
        return Refused(text=text, kind="pace")
    if re.search(r"sbatch: (error|fatal|unrecognized option|invalid option|option )", text):
        is_of_the_site = re.search(r"slurm\.conf|configuration file|plugin", text, re.IGNORECASE)
        return Refused(text=text, kind="impossible" if IMPOSSIBLE.search(text) and not is_of_the_site else "unclear")
    return Unknown(text=text or f"sbatch ended with exit status {answer.status} and no word")


def parse_queue(text: str, folded: str | None = None) -> list[QueueRow]:
    """The rows of our jobs in `Slurm.queue_texts`, one a task. A site may print what it likes before the header.

    Of `folded`, only what `text` hides: the rest of its rows is less exact.
    Raises SchedulerUnreachableError for a text that was cut off: tasks missing from it are not gone.
    """
    rows = _our_rows(text)
    if folded is not None:
        seen = {(r.job_id, r.index) for r in rows}
        waiting = {r.job_id: r for r in sorted(filter(_never_started, rows), key=lambda r: r.index or 0)}
        # As its neighbours are: of a folded row, the reasons are those of all the tasks in it.
        rows += [
            dataclasses.replace(waiting[r.job_id], index=r.index)
            for r in _our_rows(folded)
            if r.job_id in waiting and (r.job_id, r.index) not in seen
        ]
    return rows


def hides_an_index(rows: Sequence[QueueRow]) -> bool:
    """Whether squeue may have kept a waiting task to itself.

    With --array it leaves out the last index of a list that SLURM writes with a step: `0-20:2` is 0, 2, ... 18. So the
    tasks of an array that wait and never started tell it, when there is a gap between them.
    """
    indices: dict[int, set[int]] = {}
    for row in filter(_never_started, rows):
        indices.setdefault(row.job_id, set()).add(row.index or 0)
    return any(max(found) - min(found) >= len(found) for found in indices.values())


def _never_started(row: QueueRow) -> bool:
    return row.index is not None and base_state(row.state) == "PENDING" and row.restarts == 0


def _our_rows(text: str) -> list[QueueRow]:
    header = re.search(r"^\w+(\|[0-9a-f]{12}\|)", text, re.MULTILINE)
    if header is None:
        raise SchedulerUnreachableError(f"squeue's answer does not have its header: {text[:80]!r}")
    cells = _records(text[header.start() :], header[1], len(QUEUE_FIELDS))
    records = (dict(zip(QUEUE_FIELDS, fields, strict=True)) for fields in cells)
    return [
        row
        for record in records
        if record["Name"].startswith(OUR_PREFIX) or record["Comment"].startswith(OUR_COMMENT)
        for row in _queue_rows(record)
    ]


def parse_accounting(text: str, separator: str) -> list[AccountingRow]:
    """The attempts in sacct's answer, each with what its steps used; in sacct's order, oldest first.

    Raises SchedulerUnreachableError for a text that was cut off.
    """
    attempts: list[tuple[dict[str, str], list[dict[str, str]]]] = []
    for fields in _lines(text, separator, len(ACCOUNTING_FIELDS)):
        row = dict(zip(ACCOUNTING_FIELDS, fields, strict=True))
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
    """The lines of `sinfo --exact --format` with the fields `PARTITION_FIELDS`; others are passed over."""
    found = []
    for line in text.splitlines():
        cells = line.split("|", len(PARTITION_FIELDS) - 1)
        if len(cells) < len(PARTITION_FIELDS) or not cells[1].isdecimal():
            continue  # a site's notice, or `CLUSTER: c1`
        state, n_nodes, limit, cpus, memory, gres, name = cells
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
    """The lines of `sinfo --Node --format=%N|%T`: one a node and partition; others are passed over."""
    found = (re.fullmatch(r"([^\s|]+)\|([^\s|]+)", line.strip()) for line in text.splitlines())
    return {match[1]: match[2] for match in found if match is not None}


def excluded_nodes(text: str) -> list[str]:
    """Which nodes `scontrol --oneliner show job` says that a job must not run on, as SLURM folds them: `n[0-2],n7`."""
    # The name and the comment of a job come before and after it, and may say the same of themselves.
    match = re.search(r" ReqNodeList=\S+ ExcNodeList=(\S+) ", text)
    return [said] if match and (said := _said(match[1])) else []


def parse_live_indices(text: str, folder: str) -> set[int | None]:
    """Of `scontrol --oneliner show job`: the indices of the tasks that live and whose working folder this is; the index
    None for a plain job."""
    found: set[int | None] = set()
    for line in text.splitlines():
        state = re.search(r" JobState=(\S+)", line)
        # No word of a name can be taken for it: a path is whole, and a name comes before it.
        if state is None or base_state(state[1]) in ENDED_STATES or f" WorkDir={folder} " not in f"{line} ":
            continue
        index = re.match(r"JobId=\d+ ArrayJobId=\d+ ArrayTaskId=(\S+)", line)
        found.update(_indices(index[1]) if index else [None])
    return found


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


def _records(text: str, separator: str, n_fields: int) -> Iterator[list[str]]:
    """squeue's rows after its header: every field is followed by the separator, every row by a line end."""
    *cells, tail = text.split(separator)
    if tail != "\n" or len(cells) % n_fields:
        raise SchedulerUnreachableError(f"squeue's answer was cut off: it ends with {text[-80:]!r}")
    for i in range(n_fields, len(cells), n_fields):
        yield [cells[i].removeprefix("\n"), *cells[i + 1 : i + n_fields]]


def _lines(text: str, separator: str, n_fields: int) -> Iterator[list[str]]:
    """sacct's rows: the separator stands between fields, and a field may hold line ends. Lines before the first row are
    passed over."""
    fields: list[str] = []
    for line in text.splitlines(keepends=True):
        first, *others = line.split(separator)
        if not fields and not others:  # its first field has no line end: this is a site's notice
            continue
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
