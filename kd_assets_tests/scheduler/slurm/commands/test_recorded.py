"""What is read from SLURM's literal words, of each version that is supported: see `slurm_outputs/README.md`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kd_assets.errors import SchedulerError, SchedulerMisusedError, SchedulerUnreachableError
from kd_assets.scheduler.job import Ending
from kd_assets.scheduler.slurm.commands.client import Slurm
from kd_assets.scheduler.slurm.commands.parsing import (
    AccountingRow,
    QueueRow,
    Refused,
    Unknown,
    parse_accounting,
    parse_queue,
    read_submit_answer,
)
from kd_assets.scheduler.slurm.commands.runners import Answer
from kd_assets.scheduler.slurm.commands.states import ending_of, is_held_launch

OUTPUTS = Path(__file__).parents[2] / "slurm_outputs"
VERSIONS = ("22.05", "24.11")
SEPARATOR = re.compile(r"\|[0-9a-f]{12}\|")


def recorded(version: str, name: str) -> Answer:
    head, said = (OUTPUTS / version / f"{name}.txt").read_text().split("\n", maxsplit=1)
    match = re.fullmatch(r"# exit status (\d+): (.*)", head)
    assert match is not None
    status = int(match[1])
    stdout, stderr = (said, "") if status == 0 else ("", said)
    return Answer(argv=tuple(shlex.split(match[2])), status=status, stdout=stdout, stderr=stderr)


class RecordedCommands:
    """Answers with what SLURM said in a case."""

    def __init__(self, version: str, **names: str) -> None:
        """`names`: of a command's recording; `squeue_array` of squeue's with --array."""
        self.version, self.names = version, names
        self.asked: list[list[str]] = []

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        self.asked.append(list(argv))
        name = self.names["squeue_array" if "--array" in argv else argv[0]]
        answer = recorded(self.version, name)
        drawn = SEPARATOR.search(" ".join(argv))
        stdout = answer.stdout if drawn is None else SEPARATOR.sub(lambda _: drawn[0], answer.stdout)
        return Answer(argv=tuple(argv), status=answer.status, stdout=stdout, stderr=answer.stderr)


def slurm(version: str, **names: str) -> tuple[Slurm, RecordedCommands]:
    commands = RecordedCommands(version, **names)
    return Slurm(commands, timeout_s=20), commands


def queue_row(version: str, case: str) -> QueueRow:
    (row,) = parse_queue(recorded(version, f"{case}.squeue").stdout)
    return row


def attempts(version: str, case: str) -> list[AccountingRow]:
    text = recorded(version, f"{case}.sacct").stdout
    separator = SEPARATOR.search(text)
    assert separator is not None
    return parse_accounting(text, separator[0])


# squeue of arrays


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("case", "indices", "n_calls"),
    [
        ("pending-range", range(6), 1),
        ("pending-stepped", range(0, 21, 2), 2),  # --array says nothing of 20
        ("pending-stepped-limited", range(0, 21, 2), 2),
        ("limited", range(0, 21, 2), 2),  # two of them run
        ("pending-two-steps", [0, 2, 4, 6, 8, 30, 40, 50, 60], 2),
        ("pending-every-second-cancelled", range(0, 10, 2), 2),
        ("pending-mixed", [0, 1, 2, 3, 7, 9, 10, 11], 2),
        ("mixed", range(8), 1),
        ("held", range(4), 1),
        ("requeued", range(4), 1),
        ("requeued-held", range(4), 1),
        ("launch-failed", range(2), 1),
        ("cancelled-pending", [None], 1),
    ],
)
def test_every_task_of_an_array_is_seen_by_as_few_calls_as_that_takes(
    version: str, case: str, indices: Sequence[int | None], n_calls: int
) -> None:
    client, commands = slurm(version, squeue_array=f"{case}.squeue-array", squeue=f"{case}.squeue")
    seen = [row.index for row in client.queue()]
    assert sorted(seen, key=lambda i: i or 0) == list(indices)
    assert len(commands.asked) == n_calls
    folded = parse_queue(recorded(version, f"{case}.squeue").stdout)
    assert sorted((row.index for row in folded), key=lambda i: i or 0) == list(indices)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_index_that_was_hidden_waits_as_its_neighbours_do(version: str) -> None:
    client, _ = slurm(version, squeue_array="limited.squeue-array", squeue="limited.squeue")
    rows = {row.index: row for row in client.queue()}
    assert (rows[20].state, rows[20].reason, rows[20].restarts) == ("PENDING", "JobArrayTaskLimit", 0)
    assert rows[20].submitted_at == rows[18].submitted_at
    assert rows[0].state == "RUNNING"


@pytest.mark.parametrize("version", VERSIONS)
def test_requeued_and_held_tasks_are_told_from_those_that_never_started(version: str) -> None:
    client, _ = slurm(version, squeue_array="mixed.squeue-array")
    rows = {row.index: row for row in client.queue()}
    assert {i: row.restarts for i, row in rows.items()} == {i: int(i == 1) for i in range(8)}
    assert {i: row.state for i, row in rows.items()} == {
        0: "FAILED", 1: "PENDING", 2: "RUNNING", 3: "RUNNING", **dict.fromkeys(range(4, 8), "PENDING"),
    }  # fmt: skip
    assert rows[0].exit_code == 3
    assert rows[4].reason == "JobHeldAdmin"
    assert rows[3].ended_at is None  # NONE: without a time limit


@pytest.mark.parametrize("version", VERSIONS)
def test_a_launch_that_failed_is_held(version: str) -> None:
    client, _ = slurm(version, squeue_array="launch-failed.squeue-array")
    assert [is_held_launch(row.reason) for row in client.queue()] == [True, True]


# How jobs end

ENDINGS: dict[str, tuple[Ending, int | None]] = {
    "completed": (Ending.EXITED, 0),
    "exit-3": (Ending.EXITED, 3),
    "exit-137": (Ending.EXITED, 137),
    "signal-9": (Ending.KILLED, -9),
    "no-log": (Ending.LAUNCH_FAILURE, -53),
    "out-of-memory": (Ending.HOST_MEMORY, -125),
    "node-fail": (Ending.NODE_FAILURE, None),  # its exit status is `1:0` in 24.11, and nobody's
    "preempted": (Ending.PREEMPTED, None),
    "cancelled": (Ending.CANCELLED, -15),
    "timeout": (Ending.TIME_LIMIT, -15),
    "timeout-usr1": (Ending.TIME_LIMIT, -10),
}
IN_SACCT = {"exit-137": 9, "timeout": 0, "timeout-usr1": 0, "cancelled": 0}
"""Exit codes that sacct tells otherwise."""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", ENDINGS)
def test_an_end_is_the_same_in_both_versions_by_squeue_and_by_sacct(version: str, case: str) -> None:
    ending, exit_code = ENDINGS[case]
    row = queue_row(version, case)
    assert (ending_of(row.state, row.reason, row.exit_code), row.exit_code) == (ending, exit_code)
    assert row.ended_at is not None
    (attempt,) = attempts(version, case)
    assert ending_of(attempt.state, attempt.reason, attempt.exit_code) is ending
    assert attempt.exit_code == IN_SACCT.get(case, exit_code)
    assert attempt.n_cpus >= 1


@pytest.mark.parametrize(
    ("version", "ending"), [("22.05", Ending.LAUNCH_FAILURE), ("24.11", Ending.EXITED)], ids=VERSIONS
)
def test_only_22_05_cannot_start_a_job_whose_log_folder_is_missing(version: str, ending: Ending) -> None:
    row = queue_row(version, "no-log-folder")
    (attempt,) = attempts(version, "no-log-folder")
    assert {ending_of(r.state, r.reason, r.exit_code) for r in (row, attempt)} == {ending}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("case", "ending"), [("node-fail-requeued", Ending.NODE_FAILURE), ("preempted-requeued", Ending.PREEMPTED)]
)
def test_a_job_that_slurm_took_back_waits_and_its_first_attempt_is_accounted(
    version: str, case: str, ending: Ending
) -> None:
    row = queue_row(version, case)
    assert (row.state, row.restarts, row.exit_code, row.started_at, row.ended_at) == ("PENDING", 1, None, None, None)
    first, *later = attempts(version, case)
    assert ending_of(first.state, first.reason, first.exit_code) is ending
    assert [ending_of(a.state, a.reason, a.exit_code) for a in later] == [None] * len(later)


@pytest.mark.parametrize(("version", "n_cpus"), [("22.05", 1), ("24.11", 0)])
def test_a_job_that_waits_is_accounted_without_an_end(version: str, n_cpus: int) -> None:
    assert queue_row(version, "node-down").reason.startswith("ReqNodeNotAvail, UnavailableNodes:")
    (row,) = attempts(version, "node-down")
    assert (row.state, row.n_cpus, row.started_at, row.ended_at) == ("PENDING", n_cpus, None, None)
    assert ending_of(row.state, row.reason, row.exit_code) is None


# What SLURM does not do


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "case", ["array-too-large", "constraint", "gpus", "gpu-type", "memory", "node", "option", "partition", "time"]
)
def test_what_sbatch_refuses_is_impossible(version: str, case: str) -> None:
    answer = read_submit_answer(recorded(version, f"refused.{case}.sbatch"))
    assert isinstance(answer, Refused)
    assert answer.kind == "impossible"


def test_what_22_05_lets_wait_for_ever_24_11_refuses() -> None:
    answer = read_submit_answer(recorded("24.11", "refused.cpus.sbatch"))
    assert isinstance(answer, Refused)
    assert answer.kind == "impossible"
    assert recorded("22.05", "refused.cpus.sbatch").status == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_controller_that_is_away_is_no_answer(version: str) -> None:
    names = {name: f"no-controller.{name}" for name in ("scancel", "scontrol", "sinfo")}
    client, _ = slurm(version, squeue_array="no-controller.squeue", sacct="no-slurmdbd.sacct", **names)
    asks: list[Callable[[], object]] = [
        client.queue,
        lambda: client.cancel(["58"]),
        client.max_array_size,
        client.partitions,
        lambda: client.accounting(["kd-demo"], since=0.0),
    ]
    for ask in asks:
        with pytest.raises(SchedulerUnreachableError):
            ask()
    assert isinstance(read_submit_answer(recorded(version, "no-controller.sbatch")), Unknown)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_job_that_slurm_does_not_know_is_an_answer(version: str) -> None:
    client, commands = slurm(version, scontrol="unknown.scontrol", scancel="unknown.scancel")
    client.cancel(["99999"])
    with pytest.raises(SchedulerError, match="Invalid job id specified") as e:
        client.excluded_nodes("99999")
    assert type(e.value) is SchedulerError
    commands.names["scontrol"] = "unknown.release"
    with pytest.raises(SchedulerError, match="Invalid job id specified"):
        client.release("99999")


def test_an_option_that_a_version_does_not_know_is_a_wrong_question_and_said_with_it() -> None:
    assert recorded("22.05", "array-unique.squeue").status == 0
    client, _ = slurm("24.11", squeue_array="array-unique.squeue")
    with pytest.raises(SchedulerMisusedError, match=r"`squeue .*--array.*unrecognized option '--array-unique'"):
        client.queue()


# As both versions say them, and end with these statuses: of a wrong field squeue and sinfo tell all others.
@pytest.mark.parametrize(
    ("command", "status", "stderr"),
    [
        ("squeue", 1, "squeue: unrecognized option '--bogus'\nTry \"squeue --help\" for more information\n"),
        ("squeue", 1, "squeue: invalid option -- 'Y'\nTry \"squeue --help\" for more information\n"),
        ("squeue", 1, "squeue: option requires an argument -- 'o'\nTry \"squeue --help\" for more information\n"),
        ("squeue", 0, "squeue: error: Invalid job format specification: Bogus\n"),
        (
            "squeue",
            1,
            "squeue: error: Invalid job state specified: bogus\nsqueue: error: Valid job states are …\n",
        ),
        ("squeue", 1, "Usage: squeue [-A account]\nsqueue: error: Unrecognized option: extra\n"),
        ("sacct", 1, "sacct: unrecognized option '--bogus'\n"),
        ("sacct", 1, 'sacct: error: Invalid field requested: "Bogus"\n'),
        ("sacct", 1, "Invalid time specification (pos=0): utsx\n"),
        ("sinfo", 0, "Invalid node format specification: |\n"),
        ("sinfo", 1, "sinfo: error: 'a[' invalid entry for --nodes\n"),
        ("scontrol", 1, "invalid keyword: bogus\n"),
        ("scontrol", 1, "invalid entity:bogus for keyword:show \n"),
        ("scontrol", 1, "Update of this parameter is not supported: Bogus=1\nRequest aborted\n"),
        ("scancel", 1, "scancel: unrecognized option '--bogus'\nTry \"scancel --help\" for more information\n"),
    ],
)
def test_a_wrong_question_is_no_absence(command: str, status: int, stderr: str) -> None:
    class Said:
        def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
            return Answer(argv=tuple(argv), status=status, stdout="", stderr=stderr)

    client = Slurm(Said(), timeout_s=20)
    asks: dict[str, Callable[[], object]] = {
        "squeue": client.queue,
        "sacct": lambda: client.accounting(["kd-demo"], since=0.0),
        "sinfo": lambda: client.node_states(["n0"]),
        "scontrol": lambda: client.exclude("14_3", ["n0"]),
        "scancel": lambda: client.cancel(["14"]),
    }
    with pytest.raises(SchedulerMisusedError, match=re.escape(" ".join(stderr.split()))):
        asks[command]()


# The site


@pytest.mark.parametrize("version", ["22.05", "24.11"])
def test_the_site_is_described(version: str) -> None:
    client, _ = slurm(version, sinfo="sinfo")
    assert [(p.name, p.n_nodes, p.cpus, p.gres) for p in client.partitions()] == [
        ("batch", 4, 8, "gpu:4"), ("high", 4, 8, "gpu:4"),
    ]  # fmt: skip
