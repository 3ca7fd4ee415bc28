"""What SLURM's commands say, as SLURM 22.05.8 really said it, and what is read from it.

In the literal texts `¦` stands for the separator, which is drawn anew for each call.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from kd_assets.errors import SchedulerError, SchedulerUnreachableError
from kd_assets.scheduler.job import JobSpec, Resources
from kd_assets.scheduler.slurm.commands.client import Slurm, sbatch_argv
from kd_assets.scheduler.slurm.commands.parsing import (
    Accepted,
    AccountingRow,
    PartitionInfo,
    QueueRow,
    Refused,
    Unknown,
    parse_accounting,
    parse_node_states,
    parse_partitions,
    parse_queue,
    read_submit_answer,
)
from kd_assets.scheduler.slurm.commands.runners import Answer, CommandMissingError
from kd_assets.scheduler.slurm.profile import Profile

SEPARATOR = "|27f20ed438da|"

# Jobs: evil (of this user, not of this program), an array of five, two at a time, whose task 1 failed and whose task
# 0 was requeued; one killed by kill -9, one without a folder for its log, one out of memory, one whose node went down.
QUEUE = """\
ARRAY_JOB_ID¦ARRAY_TASK_ID¦STATE¦REASON¦NODELIST¦RESTART_COUNT¦EXIT_CODE¦SUBMIT_TIME¦START_TIME¦END_TIME¦NAME¦COMMENT¦
2¦1¦FAILED¦NonZeroExitCode¦n0¦0¦768¦1795357526¦1795357526¦1795357526¦kd-demo-teacher-0123456789ab¦kd_assets 0123¦
5¦N/A¦FAILED¦JobLaunchFailure¦n0¦0¦9¦1795357527¦1795357527¦1795357527¦kd-killed¦(null)¦
7¦N/A¦FAILED¦JobLaunchFailure¦n0¦0¦4021¦1795357527¦1795357527¦1795357527¦kd-no-log¦(null)¦
6¦N/A¦OUT_OF_MEMORY¦OutOfMemory¦n0¦0¦253¦1795357527¦1795357527¦1795357528¦kd-memory¦(null)¦
2¦0¦PENDING¦JobArrayTaskLimit¦¦1¦0¦1795357532¦1795357538¦NONE¦kd-demo-teacher-0123456789ab¦kd_assets 0123¦
2¦4¦PENDING¦JobArrayTaskLimit¦¦0¦0¦1795357526¦N/A¦N/A¦kd-demo-teacher-0123456789ab¦kd_assets 0123¦
10¦N/A¦PENDING¦BeginTime¦¦1¦0¦1795357532¦1795357538¦1826893538¦kd-node¦(null)¦
13¦N/A¦PENDING¦ReqNodeNotAvail, UnavailableNodes:n1¦¦0¦0¦1795357535¦N/A¦N/A¦kd-waits¦(null)¦
1¦N/A¦RUNNING¦None¦n0¦0¦0¦1795357526¦1795357526¦1826893526¦evil|name
kd-x|1|2|3 é中¦a|b
kd-y|0|\x1fc¦
2¦3¦RUNNING¦None¦n0¦0¦0¦1795357526¦1795357532¦NONE¦kd-demo-teacher-0123456789ab¦kd_assets 0123¦
2¦2¦RUNNING¦None¦n0¦0¦0¦1795357526¦1795357527¦1795363527¦kd-demo-teacher-0123456789ab¦kd_assets 0123¦
"""
HEADER = QUEUE.splitlines()[0] + "\n"

ACCOUNTING = """\
1¦evil|name
kd-x|1|2|3 é?¦¦RUNNING¦None¦0:0¦n0¦1795357526¦1795357526¦Unknown¦19¦00:00:00¦1¦
1.batch¦batch¦¦RUNNING¦¦0:0¦n0¦1795357526¦1795357526¦Unknown¦19¦00:00:00¦1¦
2_0¦kd-demo¦kd_assets 0123¦REQUEUED¦None¦0:0¦n0¦1795357526¦1795357526¦1795357531¦5¦00:00.839¦1¦
2_0.batch¦batch¦¦CANCELLED¦¦0:15¦n0¦1795357526¦1795357526¦1795357532¦6¦00:00.839¦1¦36272K
2_1¦kd-demo¦kd_assets 0123¦FAILED¦None¦3:0¦n0¦1795357526¦1795357526¦1795357526¦0¦00:00.001¦1¦
2_1.batch¦batch¦¦FAILED¦¦3:0¦n0¦1795357526¦1795357526¦1795357526¦0¦00:00.001¦1¦0
2_2¦kd-demo¦kd_assets 0123¦CANCELLED by 0¦JobArrayTaskLimit¦0:0¦n0¦1795357526¦1795357527¦1795357537¦10¦00:01.541¦1¦
2_2.batch¦batch¦¦CANCELLED¦¦0:15¦n0¦1795357527¦1795357527¦1795357538¦11¦00:01.541¦1¦36272K
2_0¦kd-demo¦kd_assets 0123¦FAILED¦BeginTime¦7:0¦n1¦1795357532¦1795357538¦1795357539¦1¦00:00.021¦1¦
2_0.batch¦batch¦¦FAILED¦¦7:0¦n1¦1795357538¦1795357538¦1795357539¦1¦00:00.017¦1¦3828K
9¦kd-steps¦¦COMPLETED¦None¦0:0¦n0¦1795357527¦1795357527¦1795357533¦6¦00:00.153¦1¦
9.batch¦batch¦¦COMPLETED¦¦0:0¦n0¦1795357527¦1795357527¦1795357533¦6¦00:00.020¦1¦3804K
9.0¦sleep¦¦COMPLETED¦¦0:0¦n0¦1795357527¦1795357527¦1795357530¦3¦00:00.002¦1¦112K
9.1¦python3¦¦COMPLETED¦¦0:0¦n0¦1795357530¦1795357530¦1795357533¦3¦00:00.130¦1¦41048K
10¦kd-node¦¦NODE_FAIL¦None¦0:0¦n1¦1795357527¦1795357527¦1795357532¦5¦00:00:00¦8¦
10.batch¦batch¦¦CANCELLED¦¦¦n1¦1795357527¦1795357527¦1795357532¦5¦00:00:00¦8¦
10¦kd-node¦¦PENDING¦BeginTime¦0:0¦None assigned¦1795357532¦Unknown¦Unknown¦0¦00:00:00¦8¦
15_[2,4-6%3]¦kd-waits¦¦PENDING¦None¦0:0¦None assigned¦1795357532¦Unknown¦Unknown¦0¦00:00:00¦1¦
"""

POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


class FakeCommands:
    """Answers each command by its name, with the text it would get; and keeps what was asked."""

    def __init__(self, **answers: str | Answer | Exception) -> None:
        self.answers = answers
        self.asked: list[list[str]] = []

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        assert timeout_s == 20
        self.asked.append(list(argv))
        answer = self.answers[argv[0]]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Answer):
            return answer
        drawn = re.search(r"\|[0-9a-f]{12}\|", " ".join(argv))
        return said(answer.replace("¦", drawn[0] if drawn else ""), *argv)


def said(stdout: str = "", *argv: str, stderr: str = "", status: int = 0) -> Answer:
    return Answer(argv=argv or ("sbatch",), status=status, stdout=stdout, stderr=stderr)


def slurm(**answers: str | Answer | Exception) -> tuple[Slurm, FakeCommands]:
    commands = FakeCommands(**answers)
    return Slurm(commands, timeout_s=20), commands


def queue(text: str) -> list[QueueRow]:
    return parse_queue(text.replace("¦", SEPARATOR))


def accounting(text: str) -> list[AccountingRow]:
    return parse_accounting(text.replace("¦", SEPARATOR), SEPARATOR)


# squeue


def test_a_running_task_of_an_array() -> None:
    (row,) = [r for r in queue(QUEUE) if r.task_id == "2_2"]
    assert row == QueueRow(
        job_id=2,
        index=2,
        name="kd-demo-teacher-0123456789ab",
        comment="kd_assets 0123",
        state="RUNNING",
        reason="",
        node="n0",
        restarts=0,
        exit_code=None,
        submitted_at=1795357526.0,
        started_at=1795357527.0,
        ended_at=None,  # squeue's is when its time is up
    )


def test_a_requeued_task_waits_and_counts_its_restarts() -> None:
    (row,) = [r for r in queue(QUEUE) if r.task_id == "2_0"]
    assert (row.state, row.reason, row.restarts, row.node) == ("PENDING", "JobArrayTaskLimit", 1, "")
    assert row.started_at is None  # squeue's is an estimate
    assert row.submitted_at == 1795357532.0  # of the requeue: the job was submitted six seconds earlier


def test_wait_statuses_become_exit_codes_and_signals() -> None:
    codes = {r.name: r.exit_code for r in queue(QUEUE) if r.exit_code is not None}
    assert codes == {"kd-demo-teacher-0123456789ab": 3, "kd-killed": -9, "kd-no-log": -53, "kd-memory": -125}


def test_a_job_that_nobody_knows_an_exit_code_of_has_none() -> None:
    assert (
        queue(HEADER + "52¦N/A¦FAILED¦BadConstraints¦¦0¦1¦1795357034¦1795357034¦1795357034¦kd-x¦¦\n")[0].exit_code
        is None
    )
    assert (
        queue(HEADER + "22¦N/A¦NODE_FAIL¦NodeDown¦n1¦0¦0¦1795357034¦1795357034¦1795357034¦kd-x¦¦\n")[0].exit_code
        is None
    )


def test_names_of_other_jobs_hide_nothing_and_forge_nothing() -> None:
    rows = queue(QUEUE)
    assert len(rows) == 10
    assert not {r.name for r in rows} & {"kd-x", "kd-y"}
    assert {r.index for r in rows if r.job_id == 2} == {0, 1, 2, 3, 4}


def test_a_reason_may_hold_spaces_and_commas() -> None:
    (row,) = [r for r in queue(QUEUE) if r.name == "kd-waits"]
    assert row.reason == "ReqNodeNotAvail, UnavailableNodes:n1"


def test_an_empty_queue_is_an_answer() -> None:
    assert queue(HEADER) == []


@pytest.mark.parametrize("notice", ["Maintenance on Friday.\n", "squeue: warning: a|b\n\nWelcome\n", "\n"])
def test_what_a_site_prints_before_the_queue_is_not_of_the_queue(notice: str) -> None:
    assert queue(notice + QUEUE) == queue(QUEUE)


def test_a_job_that_somebody_renamed_is_known_by_its_comment() -> None:
    comment = f"kd_assets {'0123456789abcdef' * 2} kd-demo-teacher-0123456789ab-0001.1-c0ffee00"
    text = QUEUE.replace("¦kd-waits¦(null)¦", f"¦mine¦{comment}¦")
    assert [(r.name, r.comment) for r in queue(text) if r.job_id == 13] == [("mine", comment)]


def test_a_queue_that_was_cut_off_is_no_answer() -> None:
    whole = QUEUE.replace("¦", SEPARATOR)
    for length in range(len(whole) - 1):
        text = whole[:length]
        # After a whole row it could be all there is; then only squeue's exit status tells.
        if not (text.endswith(f"{SEPARATOR}\n") and text.count(SEPARATOR) % 12 == 0):
            with pytest.raises(SchedulerUnreachableError, match=r"cut off|does not have its header"):
                parse_queue(text)


@pytest.mark.parametrize(
    ("indices", "meant"),
    [
        ("3", [3]),
        ("0-3,7,9-11%4", [0, 1, 2, 3, 7, 9, 10, 11]),
        ("6-14:4%3", [6, 10, 14]),
        ("0-2", [0, 1, 2]),
        ("4,6%1", [4, 6]),
        ("N/A", [None]),
    ],
)
def test_pending_ranges_are_one_row_a_task(indices: str, meant: list[int | None]) -> None:
    rows = queue(HEADER + f"14¦{indices}¦PENDING¦Priority¦¦0¦0¦1795357526¦N/A¦N/A¦kd-demo¦¦\n")
    assert [r.index for r in rows] == meant


def test_a_range_that_squeue_cut_off_is_no_answer() -> None:
    # Without SLURM_BITSTR_LEN=0; the tasks that are not named would seem gone.
    row = (
        "14¦0,2,4,6,8,10,12,14,16,18,20,22,24,26,28,30,32,34,36,38,40,...%3¦PENDING¦Priority¦¦0¦0¦1¦N/A¦N/A¦kd-demo¦¦\n"
    )
    with pytest.raises(SchedulerUnreachableError, match="cut off"):
        queue(HEADER + row)


def test_one_query_covers_all_jobs_and_its_text_can_be_read_elsewhere() -> None:
    client, commands = slurm(squeue=QUEUE)
    texts = client.queue_texts()
    assert len(parse_queue(*texts)) == 10
    assert commands.asked[0][:-1] == ["squeue", "--me", "--all", "--array", "--states=all"]
    assert [field.partition(":")[0] for field in commands.asked[0][-1].removeprefix("--Format=").split(",")] == [
        "ArrayJobID", "ArrayTaskID", "State", "Reason", "NodeList", "RestartCnt", "exit_code", "SubmitTime",
        "StartTime", "EndTime", "Name", "Comment",
    ]  # fmt: skip
    client.queue_texts()
    assert commands.asked[0] != commands.asked[1]  # another separator


@pytest.mark.parametrize(
    "stderr",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
        "slurm_load_jobs error: Socket timed out on send/recv operation\n",
        "",
    ],
)
def test_a_queue_that_cannot_be_asked_is_unreachable(stderr: str) -> None:
    client, _ = slurm(squeue=said("", "squeue", stderr=stderr, status=1))
    with pytest.raises(SchedulerUnreachableError, match="squeue failed"):
        client.queue_texts()


# sacct


def test_every_attempt_of_a_task_is_a_row_and_counts_those_before() -> None:
    attempts = [r for r in accounting(ACCOUNTING) if r.task_id == "2_0"]
    assert [(r.state, r.restarts, r.exit_code, r.node) for r in attempts] == [
        ("REQUEUED", 0, None, "n0"),
        ("FAILED", 1, 7, "n1"),
    ]


def test_steps_say_what_an_attempt_used() -> None:
    (row,) = [r for r in accounting(ACCOUNTING) if r.name == "kd-steps"]
    assert row == AccountingRow(
        job_id=9,
        index=None,
        name="kd-steps",
        comment="",
        state="COMPLETED",
        reason="",
        node="n0",
        restarts=0,
        exit_code=0,
        submitted_at=1795357527.0,
        started_at=1795357527.0,
        ended_at=1795357533.0,
        elapsed_s=6.0,
        cpu_s=0.153,
        n_cpus=1,
        max_rss_gib=41048 / 1024**2,
    )


def test_memory_that_was_never_sampled_is_unknown_not_zero() -> None:
    assert [r.max_rss_gib for r in accounting(ACCOUNTING) if r.task_id == "2_1"] == [None]


def test_an_attempt_that_waits_has_no_times() -> None:
    (row,) = [r for r in accounting(ACCOUNTING) if r.name == "kd-node" and r.state == "PENDING"]
    assert (row.started_at, row.ended_at, row.node, row.restarts) == (None, None, "", 1)


def test_pending_tasks_in_accounting_are_one_row_each() -> None:
    assert [r.index for r in accounting(ACCOUNTING) if r.name == "kd-waits"] == [2, 4, 5, 6]


def test_other_names_and_cut_off_texts_in_accounting() -> None:
    assert {r.name for r in accounting(ACCOUNTING)} == {"kd-demo", "kd-steps", "kd-node", "kd-waits"}
    assert accounting("") == []
    with pytest.raises(SchedulerUnreachableError, match="cut off"):
        accounting(ACCOUNTING[:-12])


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("00:00.021", 0.021),
        ("01:02.500", 62.5),
        ("02:03:04", 7384.0),
        ("1-02:03:04.567", 93784.567),
        ("12-00:00:00", 1036800.0),
        ("", 0.0),
    ],
)
def test_durations(duration: str, seconds: float) -> None:
    text = f"9¦kd-x¦¦COMPLETED¦None¦0:0¦n0¦1795357527¦1795357527¦1795357533¦6¦{duration}¦1¦\n"
    assert accounting(text)[0].cpu_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("written", "gib"),
    [
        ("3828K", 3828 / 1024**2),
        ("512M", 0.5),
        ("1.50G", 1.5),
        ("2T", 2048.0),
        ("1073741824", 1.0),
        ("0", None),
        ("", None),
    ],
)
def test_sizes(written: str, gib: float | None) -> None:
    row = "9¦kd-x¦¦COMPLETED¦None¦0:0¦n0¦1795357527¦1795357527¦1795357533¦6¦00:01.000¦1¦\n"
    step = f"9.batch¦batch¦¦COMPLETED¦¦0:0¦n0¦1795357527¦1795357527¦1795357533¦6¦00:01.000¦1¦{written}\n"
    assert accounting(row + step)[0].max_rss_gib == gib


def test_accounting_is_asked_for_names_since_a_time() -> None:
    client, commands = slurm(sacct=ACCOUNTING)
    rows = client.accounting(["kd-demo", "kd-steps"], since=1795357000.9)
    assert rows is not None
    assert len(rows) == 11
    assert {"--duplicates", "--starttime=uts1795357000", "--name=kd-demo,kd-steps"} <= set(commands.asked[0])


def test_many_names_take_several_calls() -> None:
    client, commands = slurm(sacct="")
    names = [f"kd-demo-teacher-{i:012x}-0001.1-00ff00ff" for i in range(1200)]
    assert client.accounting(names, since=1795357000) == []
    asked = [arg.removeprefix("--name=").split(",") for argv in commands.asked for arg in argv if "--name=" in arg]
    assert [name for names_of_a_call in asked for name in names_of_a_call] == names
    assert all(sum(map(len, argv)) < 100_000 for argv in commands.asked)  # a remote line has its limits too


def test_no_accounting_is_none_and_no_answer_is_no_answer() -> None:
    disabled = said("", "sacct", stderr="Slurm accounting storage is disabled\n", status=1)
    assert slurm(sacct=disabled)[0].accounting(["kd-demo"], since=0) is None
    assert slurm(sacct=CommandMissingError("no sacct"))[0].accounting(["kd-demo"], since=0) is None
    down = said(
        "",
        "sacct",
        stderr="sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection to "
        "host:127.0.0.1:13234: Connection refused\nsacct: error: Sending PersistInit msg: Connection refused\n"
        "sacct: error: Problem talking to the database: Connection refused\n",
        status=1,
    )
    with pytest.raises(SchedulerUnreachableError, match="Problem talking to the database"):
        slurm(sacct=down)[0].accounting(["kd-demo"], since=0)


# sbatch


@pytest.mark.parametrize(
    ("stdout", "job_id"), [("14\n", 14), ("14;cluster\n", 14), ("the plugin says hello\n14\n", 14)]
)
def test_an_accepted_job_has_an_id(stdout: str, job_id: int) -> None:
    assert read_submit_answer(said(stdout, "sbatch")) == Accepted(job_id=job_id)


@pytest.mark.parametrize(
    ("stderr", "status"),
    [
        (
            "sbatch: error: invalid partition specified: nopart\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            1,
        ),
        (
            "sbatch: error: CPU count per node can not be satisfied\n"
            "sbatch: error: Batch job submission failed: Requested node configuration is not available\n",
            1,
        ),
        (
            "sbatch: error: Memory specification can not be satisfied\n"
            "sbatch: error: Batch job submission failed: Requested node configuration is not available\n",
            1,
        ),
        (
            "sbatch: error: Batch job submission failed: "
            "Requested time limit is invalid (missing or exceeds some limit)\n",
            1,
        ),
        ("sbatch: error: Batch job submission failed: Node count specification invalid\n", 1),
        ("sbatch: error: Batch job submission failed: More processors requested than permitted\n", 1),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n",
            1,
        ),
        ("sbatch: error: Batch job submission failed: Invalid qos specification\n", 1),
        ("sbatch: error: Batch job submission failed: Invalid job array specification\n", 1),
        ("sbatch: error: Batch job submission failed: Invalid feature specification\n", 1),
        ("sbatch: error: Batch job submission failed: Invalid node name specified\n", 1),
        ("sbatch: error: Batch job submission failed: Requested reservation is invalid\n", 1),
        ("sbatch: error: Invalid generic resource (gres) specification\n", 1),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: {POLICY}\n", 1),
        (f"sbatch: error: QOSMaxCpuPerJobLimit\nsbatch: error: Batch job submission failed: {POLICY}\n", 1),
        (f"sbatch: error: Batch job submission failed: {POLICY}\n", 1),
        ("sbatch: unrecognized option '--bogus'\nTry \"sbatch --help\" for more information\n", 255),
        ("sbatch: error: Invalid --time specification\n", 255),
        ("sbatch: error: Unable to open file /nonexistent.sh\n", 1),
    ],
)
def test_what_waiting_does_not_change_is_impossible(stderr: str, status: int) -> None:
    answer = read_submit_answer(said("", "sbatch", stderr=stderr, status=status))
    assert answer == Refused(text=" ".join(stderr.split()), kind="impossible")


@pytest.mark.parametrize(
    "stderr",
    [
        "sbatch: error: Batch job submission failed: I/O error writing script/environment to file\n",
        "sbatch: error: Batch job submission failed: Required partition not available (inactive or drain)\n",
        "sbatch: error: Batch job submission failed: Unspecified error\n",
        "sbatch: error: Batch job submission failed: Requested operation is presently disabled\n",
        "sbatch: error: Parsing error: NodeNam\nsbatch: fatal: Unable to process configuration file",
        "sbatch: error: Invalid SlurmdPort value in slurm.conf\n",
        "sbatch: error: Our site says: come back after the maintenance\n",
    ],
)
def test_a_refusal_in_words_that_nobody_knows_may_pass(stderr: str) -> None:
    answer = read_submit_answer(said("", "sbatch", stderr=stderr, status=1))
    assert answer == Refused(text=" ".join(stderr.split()), kind="unclear")


@pytest.mark.parametrize("limit", ["QOSMaxSubmitJobPerUserLimit", "AssocMaxSubmitJobLimit", "AssocGrpSubmitJobsLimit"])
def test_a_limit_on_the_number_of_jobs_is_a_matter_of_pace(limit: str) -> None:
    stderr = f"sbatch: error: {limit}\nsbatch: error: Batch job submission failed: {POLICY}\n"
    answer = read_submit_answer(said("", "sbatch", stderr=stderr, status=1))
    assert isinstance(answer, Refused)
    assert answer.kind == "pace"
    assert answer.is_submit_limit


def test_a_full_controller_is_a_matter_of_pace_whatever_the_size() -> None:
    stderr = "sbatch: error: Batch job submission failed: Resource temporarily unavailable\n"
    answer = read_submit_answer(said("", "sbatch", stderr=stderr, status=1))
    assert isinstance(answer, Refused)
    assert (answer.kind, answer.is_submit_limit) == ("pace", False)


@pytest.mark.parametrize(
    ("stderr", "status"),
    [
        # Seen on a stopped slurmctld: it ran the job when it went on.
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n", 1),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n", 1),
        ("sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received\n", 1),
        ("sbatch: error: Batch job submission failed: Unexpected message received\n", 1),
        ("sbatch: error: Batch job submission failed: Protocol authentication error\n", 1),
        ("", -9),
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n", -15),
        ("", 1),
        ("Segmentation fault\n", 139),
    ],
)
def test_whatever_is_not_certain_is_unknown(stderr: str, status: int) -> None:
    assert isinstance(read_submit_answer(said("", "sbatch", stderr=stderr, status=status)), Unknown)


def test_success_without_an_id_is_unknown() -> None:
    assert isinstance(read_submit_answer(said("", "sbatch")), Unknown)
    assert isinstance(read_submit_answer(said("Submitted batch job 14\n", "sbatch")), Unknown)


def test_an_sbatch_that_was_killed_for_time_is_unknown() -> None:
    client, _ = slurm(sbatch=SchedulerUnreachableError("sbatch gave no answer within 30 s and was killed."))
    assert client.submit(["sbatch"]) == Unknown(text="sbatch gave no answer within 30 s and was killed.")


# The command line

SPEC = JobSpec(
    key="0123456789abcdef" * 2,
    recipe="demo",
    kind="teacher",
    n_tasks=12,
    concurrency=3,
    resources=Resources(
        slurm_partition="h100",
        account="kd",
        qos="long",
        constraint="nvlink&hbm3",
        gpus_per_node=4,
        cpus=32,
        memory_gib=200.5,
        time_minutes=2880,
        exclusive=True,
        sbatch_options=("--reservation=maintenance",),
    ),
    excluded_nodes=("n3", "n7"),
)


def command_line(spec: JobSpec = SPEC, folder: str = "/data/jobs/demo/0001") -> list[str]:
    return sbatch_argv(
        profile=Profile(name="site", signal_s=300),
        spec=spec,
        name=spec.name,
        comment="kd_assets 0123",
        array="0-11%3",
        log_folder=Path(folder) / "logs",
        script="/opt/kd/slurm/task.sbatch",
        arguments=[f"{folder}/job.json", "0"],
        folder=Path(folder),
    )


def test_all_options_stand_on_the_command_line() -> None:
    assert command_line() == [
        "sbatch",
        "--parsable",
        "--job-name=kd-demo-teacher-0123456789ab",
        "--comment=kd_assets 0123",
        "--array=0-11%3",
        "--chdir=/data/jobs/demo/0001",
        "--output=/data/jobs/demo/0001/logs/slurm-%A_%a.log",
        "--open-mode=append",
        "--signal=B:USR1@300",
        "--export=ALL",
        "--partition=h100",
        "--account=kd",
        "--qos=long",
        "--constraint=nvlink&hbm3",
        "--gpus-per-node=4",
        "--cpus-per-task=32",
        "--mem=205312M",
        "--time=2880",
        "--exclude=n3,n7",
        "--requeue",
        "--exclusive",
        "--reservation=maintenance",
        "/opt/kd/slurm/task.sbatch",
        "/data/jobs/demo/0001/job.json",
        "0",
    ]


@pytest.mark.parametrize(
    ("resources", "memory"),
    [
        (Resources(memory_gib=2), ["--mem=2048M"]),
        (Resources(memory_gib=2, memory_of="cpu"), ["--mem-per-cpu=2048M"]),
        (Resources(memory_gib=2, memory_of="gpu", exclusive=True), ["--mem-per-gpu=2048M"]),
        (Resources(exclusive=True), ["--mem=0"]),
        (Resources(exclusive=True, memory_of="site"), []),
        (Resources(), []),
    ],
)
def test_memory_is_asked_for_by_one_option_or_none(resources: Resources, memory: list[str]) -> None:
    argv = command_line(dataclasses.replace(SPEC, resources=resources))
    assert [word for word in argv if word.startswith("--mem")] == memory


def test_nodes_that_are_excluded_by_whoever_add_up() -> None:
    argv = command_line(dataclasses.replace(SPEC, resources=Resources(exclude="n[1-2]", nodelist="n9")))
    assert "--exclude=n[1-2],n3,n7" in argv
    assert "--nodelist=n9" in argv


def test_a_job_is_sent_to_the_cluster_of_its_profile() -> None:
    argv = sbatch_argv(
        profile=Profile(name="site", clusters="c1"),
        spec=SPEC,
        name=SPEC.name,
        comment="",
        array="0",
        log_folder=Path("/logs"),
        script="x",
        arguments=[],
        folder=Path("/"),
    )
    assert argv[2] == "--clusters=c1"


def test_a_cluster_that_forbids_arrays_says_so() -> None:
    client, _ = slurm(scontrol=said("MaxArraySize            = 0\n", "scontrol"))
    with pytest.raises(SchedulerError, match=r"forbids job arrays \(MaxArraySize=0 .* ask its administrators to set"):
        client.max_array_size()


NOTICE = "CLUSTER: c1\n*** maintenance | on Friday ***\n\n"


def test_a_notice_before_an_answer_is_passed_over() -> None:
    line = "up|2|infinite|8|4000|gpu:4|batch\n"
    assert parse_partitions(NOTICE + line) == parse_partitions(line)
    assert parse_node_states(NOTICE + "n1|idle\nn2|down*\n") == {"n1": "idle", "n2": "down*"}
    assert accounting(NOTICE + ACCOUNTING) == accounting(ACCOUNTING) != []
    client, _ = slurm(scontrol=said(NOTICE + "MaxArraySize            = 7\n", "scontrol"))
    assert client.max_array_size() == 7


def test_what_a_job_does_not_ask_for_is_left_to_the_site() -> None:
    argv = command_line(JobSpec(key="0" * 32, recipe="demo", kind="shards", n_tasks=1, concurrency=1))
    asked = {word.partition("=")[0] for word in argv if word.startswith("--")}
    assert asked == {
        "--parsable", "--job-name", "--comment", "--array", "--chdir", "--output", "--open-mode", "--signal",
        "--export", "--requeue",
    }  # fmt: skip


def test_what_is_refused_is_not_asked_for() -> None:
    refused = Resources(gpus_per_node=0, exclusive=False, sbatch_options=())
    one = JobSpec(key="0" * 32, recipe="demo", kind="shards", n_tasks=1, concurrency=1)
    assert command_line(dataclasses.replace(one, resources=refused)) == command_line(one)


def test_a_percent_sign_in_a_path_is_no_symbol_of_sbatchs() -> None:
    assert "--output=/data/50%%A off/logs/slurm-%A_%a.log" in command_line(folder="/data/50%A off")
    assert "--chdir=/data/50%A off" in command_line(folder="/data/50%A off")


@pytest.mark.parametrize("folder", ["/data/back\\slash", "/data/line\nend"])
def test_a_path_that_sbatch_cannot_express_is_refused(folder: str) -> None:
    with pytest.raises(SchedulerError, match="SLURM cannot write logs under"):
        command_line(folder=folder)


# The others


def test_cancelling_what_is_gone_is_no_error() -> None:
    client, commands = slurm(scancel=said("", "scancel"))
    client.cancel(["14", "15_3"])
    assert commands.asked == [["scancel", "14", "15_3"]]
    client.cancel([])
    assert len(commands.asked) == 1
    gone = "scancel: error: Kill job error on job id 14: Invalid job id specified\n"
    slurm(scancel=said("", "scancel", stderr=gone, status=1))[0].cancel(["14"])


def test_cancelling_without_a_controller_is_unreachable() -> None:
    stderr = "scancel: error: Kill job error on job id 2: Invalid job id specified\n"
    stderr += "scancel: error: Kill job error on job id 1: Unable to contact slurm controller (connect failure)\n"
    client, _ = slurm(scancel=said("", "scancel", stderr=stderr, status=8))
    with pytest.raises(SchedulerUnreachableError, match="Unable to contact"):
        client.cancel(["1"])


def test_cancelling_what_is_not_ours_is_an_answer() -> None:
    stderr = "scancel: error: Kill job error on job id 1: Access/permission denied\n"
    client, _ = slurm(scancel=said("", "scancel", stderr=stderr, status=1))
    with pytest.raises(SchedulerError, match="permission denied") as caught:
        client.cancel(["1"])
    assert not isinstance(caught.value, SchedulerUnreachableError)


def test_releasing_what_is_gone_says_so() -> None:
    client, _ = slurm(scontrol=said("", "scontrol", stderr="9999_3: Invalid job id specified\n", status=1))
    with pytest.raises(SchedulerError, match="Invalid job id"):
        client.release("9999_3")


def test_nodes_that_a_task_is_kept_from_are_added_to_those_it_is_kept_from_already() -> None:
    shown = (
        "JobId=2 ArrayJobId=1 ArrayTaskId=0 JobName=kd-x JobState=PENDING Reason=BeginTime Partition=batch "
        "ReqNodeList=(null) ExcNodeList=n[0-2],n7 NodeList= NumNodes=1 Comment=a ExcNodeList=n9 b \n"
    )
    client, commands = slurm(scontrol=shown)
    client.exclude("1_0", ["n3", "n7"])
    assert commands.asked[-1] == ["scontrol", "update", "JobId=1_0", "ExcNodeList=n[0-2],n7,n3,n7"]
    client, commands = slurm(scontrol=shown.replace("n[0-2],n7", "(null)"))
    client.exclude("1_0", ["n3"])
    assert commands.asked[-1][-1] == "ExcNodeList=n3"


def test_a_task_that_has_started_meanwhile_can_no_longer_be_kept_from_a_node() -> None:
    client, _ = slurm(scontrol=said("", "scontrol", stderr="1_0: Job is no longer pending execution\n", status=1))
    with pytest.raises(SchedulerError, match="no longer pending") as caught:
        client.exclude("1_0", ["n3"])
    assert not isinstance(caught.value, SchedulerUnreachableError)


def test_the_states_of_nodes_are_asked_for_in_one_call() -> None:
    client, commands = slurm(sinfo="n0|down*\nn0|down*\nn1|idle\nn1|idle\n")  # one line a node and partition
    assert client.node_states(["n0", "n1", "gone"]) == {"n0": "down*", "n1": "idle"}
    (argv,) = commands.asked
    assert "--nodes=n0,n1,gone" in argv


def test_the_largest_array_is_asked_for_once() -> None:
    client, commands = slurm(
        scontrol="MailProg                = /bin/mail\nMaxArraySize            = 10001\nMaxJobCount  = 5\n"
    )
    assert [client.max_array_size(), client.max_array_size()] == [10001, 10001]
    assert len(commands.asked) == 1


def test_partitions_with_nodes_of_several_shapes() -> None:
    text = (
        "up|2|infinite|8|4000|gpu:4|batch\n"
        "up|1|2-00:30:00|64|1031000|gpu:h100:4(S:0-1)|batch\n"
        "down|3|10:00|8|512|(null)|a|b\n"
    )
    assert parse_partitions(text) == [
        PartitionInfo(
            name="batch", state="up", n_nodes=2, max_time_minutes=None, cpus=8, memory_gib=3.90625, gres="gpu:4"
        ),
        PartitionInfo(
            name="batch",
            state="up",
            n_nodes=1,
            max_time_minutes=2910,
            cpus=64,
            memory_gib=1031000 / 1024,
            gres="gpu:h100:4(S:0-1)",
        ),
        PartitionInfo(name="a|b", state="down", n_nodes=3, max_time_minutes=10, cpus=8, memory_gib=0.5, gres=""),
    ]
