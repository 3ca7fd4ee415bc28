"""The fake cluster tells the truth: what the scheduler's client reads of it is what it reads of a real one.

Each test makes the same happen on both, and compares what is read. What happens on the fake is said in one line; the
real one is made to do it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets.errors import SchedulerError
from kd_assets.scheduler.slurm.commands.client import Slurm
from kd_assets.scheduler.slurm.commands.parsing import AccountingRow, QueueRow, Refused, excluded_nodes
from kd_assets.scheduler.slurm.commands.runners import LocalRunner
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.scheduler.slurm.fake_cluster import Clock, FakeCluster
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.test_client import argv, submit

BEGINS_LATER = "--begin=now+1hour"


class Both:
    """A real cluster and a fake one, each with its client, that were asked the same."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.fake, self._folder = cluster, FakeCluster(Clock()), folder
        self.real_client = Slurm(LocalRunner({**os.environ, **cluster.env}), timeout_s=PATIENCE_S)
        self.fake_client = Slurm(self.fake, timeout_s=PATIENCE_S)
        self.job = 0

    def submit(self, body: str, *sbatch_options: str) -> None:
        words = argv(self._folder, body, array="0-1", sbatch_options=sbatch_options)
        self.job = submit(self.real_client, words)
        assert submit(self.fake_client, words) == 1

    def real_rows(self) -> dict[int | None, QueueRow]:
        return {r.index: r for r in self.real_client.queue() if r.job_id == self.job}

    def fake_rows(self) -> dict[int | None, QueueRow]:
        return {r.index: r for r in self.fake_client.queue()}

    def waits_until(self, *states: str) -> None:
        """The real tasks are in these states."""
        wait_until(
            f"the tasks are {states}", lambda: [r.state.split()[0] for r in self.real_rows().values()] == list(states)
        )


@pytest.fixture
def both(slurm_accounting: SlurmCluster, tmp_path: Path) -> Both:
    return Both(slurm_accounting, tmp_path)


def told(rows: dict[int | None, QueueRow]) -> list[object]:
    """What does not differ between two jobs to which the same happened."""
    return [
        (
            r.index, r.name, r.comment, r.state.split()[0], r.reason, r.restarts, r.exit_code, bool(r.node),
            r.started_at is not None, r.task_id == f"{r.job_id}_{r.index}",
        )
        for _, r in sorted(rows.items(), key=lambda item: item[0] or 0)
    ]  # fmt: skip


def test_tasks_that_wait(both: Both) -> None:
    both.submit("true", BEGINS_LATER)
    wait_until("SLURM says why", lambda: {r.reason for r in both.real_rows().values()} == {"BeginTime"})
    for task in (0, 1):
        both.fake.waits(task, "BeginTime")
    assert told(both.real_rows()) == told(both.fake_rows())


def test_tasks_that_run(both: Both) -> None:
    both.submit("sleep 600")
    both.waits_until("RUNNING", "RUNNING")
    for task in (0, 1):
        both.fake.runs(task)
    assert told(both.real_rows()) == told(both.fake_rows())


@pytest.mark.parametrize(
    ("body", "fails"),
    [
        ("true", lambda fake, task: fake.ends(task)),
        ("exit 3", lambda fake, task: fake.ends(task, "FAILED", reason="NonZeroExitCode", status=3 << 8)),
        ("kill -9 $$", lambda fake, task: fake.ends(task, "FAILED", reason="JobLaunchFailure", status=9)),
    ],
    ids=["completed", "exit status", "killed"],
)
def test_tasks_that_ended(both: Both, body: str, fails: Callable[[FakeCluster, int], None]) -> None:
    both.submit(body)
    both.waits_until(*["COMPLETED" if body == "true" else "FAILED"] * 2)
    for task in (0, 1):
        both.fake.runs(task)
        fails(both.fake, task)
    assert told(both.real_rows()) == told(both.fake_rows())

    def accounted(client: Slurm, job: int) -> list[tuple[object, ...]]:
        rows: list[AccountingRow] = client.accounting(["kd-demo-teacher-0"], 0.0) or []
        mine = sorted((r for r in rows if r.job_id == job), key=lambda r: r.index or 0)
        return [(r.index, r.name, r.state, r.exit_code, bool(r.node), r.restarts) for r in mine]

    expected = accounted(both.fake_client, 1)
    wait_until("sacct has them", lambda: accounted(both.real_client, both.job) == expected)


def test_tasks_that_are_cancelled(both: Both) -> None:
    both.submit("sleep 600", BEGINS_LATER)
    for task in (0, 1):
        both.cluster.scontrol("update", f"JobId={both.job}_{task}", "StartTime=now")
    both.waits_until("RUNNING", "RUNNING")
    for task in (0, 1):
        both.fake.runs(task)
    both.real_client.cancel([str(both.job)])
    both.fake_client.cancel(["1"])
    both.waits_until("CANCELLED", "CANCELLED")
    assert told(both.real_rows()) == told(both.fake_rows())


def test_a_task_is_kept_from_nodes(both: Both) -> None:
    both.submit("true", BEGINS_LATER)
    first, second = both.cluster.nodes[:2]
    for client, job in ((both.real_client, both.job), (both.fake_client, 1)):
        client.exclude(f"{job}_0", [first])
        client.exclude(f"{job}_0", [second])
    (folded,) = excluded_nodes(both.cluster.scontrol("--oneliner", "show", "job", f"{both.job}_0"))
    assert both.cluster.scontrol("show", "hostnames", folded).split() == [first, second]
    assert both.fake.task(0).excluded == [first, second]
    assert both.real_client.node_states([first]) == both.fake_client.node_states([first])


def test_what_is_refused(both: Both) -> None:
    words = argv(both.cluster.root, "true", slurm_partition="nowhere")
    both.fake.next_answers = ["impossible"]
    real, fake = both.real_client.submit(words), both.fake_client.submit(words)
    assert isinstance(real, Refused)
    assert isinstance(fake, Refused)
    assert real.kind == fake.kind == "impossible"
    assert fake.text in real.text
    for client in (both.real_client, both.fake_client):
        client.cancel(["999999"])
    with pytest.raises(SchedulerError):
        both.real_client.release("999999_0")
