"""Submissions of which nobody heard the answer, runs at the same time, terminated runs, held tasks: each partition is
computed once, and nothing is left in the queue."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kd_assets.scheduler.submissions import followers
from kd_assets_tests.orchestration.command_line import CommandLine
from kd_assets_tests.orchestration.deployment import failure_text
from kd_assets_tests.slurm.background import RUN_S, Background
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.deployment import ALL, KEYS, PARTS_OF_A_PARTITION, SlurmDeployment
from kd_assets_tests.slurm.fakes import put_first

Deploy = Callable[..., SlurmDeployment]
MakeCluster = Callable[..., SlurmCluster]
ONCE = dict.fromkeys(KEYS, 1)
GRACE = "kd_assets.scheduler.slurm.submitter.REPLY_GRACE_S"


@pytest.fixture
def command_line() -> Iterator[Callable[[SlurmDeployment], CommandLine]]:
    """`dagster asset materialize` on a deployment, whose processes do not outlive the test."""
    made: list[CommandLine] = []

    def make(deployment: SlurmDeployment) -> CommandLine:
        made.append(CommandLine(deployment))
        return made[-1]

    yield make
    for process in (p for line in made for p in line.started):
        process.kill()
        process.communicate()


MakeCommandLine = Callable[[SlurmDeployment], CommandLine]


def span(first: str, last: str) -> tuple[str, str]:
    """The option that selects partitions."""
    return ("--partition-range", f"{first}...{last}")


def n_followed(deployment: SlurmDeployment) -> int:
    """Runs that wait for a job."""
    return len({run for s in deployment.submissions() for run, waits in followers(s).items() if waits})


# ------------------------------------------------------------------ an answer that was lost


@pytest.mark.parametrize(
    ("lost", "timeout_s"),
    [
        pytest.param('first && { real "$@" >/dev/null; kill -9 $$; }', 60, id="sbatch killed"),
        pytest.param('first && { real "$@" >/dev/null; exit 0; }', 60, id="nothing printed"),
        pytest.param('first && { real "$@" >/dev/null; sleep 600; }', 6, id="sbatch hangs"),
        # The controller works off its queue: the client was given up, and its job comes all the same.
        pytest.param('first && { (sleep 9; real "$@" >/dev/null) & kill -9 $$; }', 6, id="job comes late"),
    ],
)
def test_a_job_whose_sbatch_gave_no_answer_is_found_and_not_submitted_again(
    lost: str,
    timeout_s: int,
    slurm: SlurmCluster,
    deploy: Deploy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GRACE, 120.0)  # after the time that sbatch may take: it is found long before
    deployment = deploy(slurm, profile={"command_timeout_s": timeout_s, "absence_grace_s": 0.5})
    put_first(tmp_path / "fakes", "sbatch", lost, monkeypatch)
    with Background(deployment) as run:
        result = run.succeeds()
    assert "its job is looked for before anything is submitted again" in run.log()
    (array,) = deployment.arrays()
    assert deployment.array_jobs() == [f"{array['job_id']} {array['name']}"]
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert deployment.n_teacher_loads() == 3


def test_a_job_that_never_reached_the_controller_is_submitted_again_after_a_while(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GRACE, 2.0)
    deployment = deploy(slurm, profile={"command_timeout_s": 6, "absence_grace_s": 0.5})
    words = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    put_first(tmp_path / "fakes", "sbatch", f"first && {{ echo '{words}' >&2; exit 1; }}", monkeypatch)
    began = time.monotonic()
    result = deployment.run("topk_cache", partition_range=ALL)
    assert result.success, failure_text(result)
    assert time.monotonic() - began > 8
    lost, taken = deployment.arrays()
    assert lost["refused"] == "sbatch gave no answer, and the cluster has no such job"
    assert (taken["first_task"], taken["n_tasks"]) == (0, 3)
    assert len(deployment.array_jobs()) == 1
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)


def test_a_run_killed_before_it_heard_sbatchs_answer_leaves_a_job_that_the_next_run_finds(
    slurm: SlurmCluster,
    deploy: Deploy,
    command_line: MakeCommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = tmp_path / "gate"
    deployment = deploy(slurm, told={"gate": str(gate)})
    put_first(tmp_path / "fakes", "sbatch", 'first && { real "$@" >/dev/null; kill -9 $PPID; exit; }', monkeypatch)
    status, text = command_line(deployment).run("topk_cache", partition=span(*ALL))
    assert status == -signal.SIGKILL, text
    (array,) = deployment.arrays()
    assert "job_id" not in array
    with Background(deployment) as run:
        run.waits_for_log("found, still running")
        gate.touch()
        result = run.succeeds()
    assert len(deployment.submissions()) == len(deployment.array_jobs()) == len(deployment.arrays()) == 1
    assert deployment.n_made() == ONCE
    assert deployment.n_teacher_loads() == 3
    assert deployment.recorded(result.run_id) == list(KEYS)


def test_a_run_killed_before_sbatch_reached_the_controller_leaves_work_that_the_next_run_submits(
    slurm: SlurmCluster,
    deploy: Deploy,
    command_line: MakeCommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GRACE, 1.0)
    deployment = deploy(slurm, profile={"command_timeout_s": 6, "absence_grace_s": 0.5})
    put_first(tmp_path / "fakes", "sbatch", "first && { kill -9 $PPID; exit 1; }", monkeypatch)
    status, text = command_line(deployment).run("topk_cache", partition=span(*ALL))
    assert status == -signal.SIGKILL, text
    result = deployment.run("topk_cache", partition_range=ALL)
    assert result.success, failure_text(result)
    assert len(deployment.submissions()) == 1
    assert len(deployment.array_jobs()) == 1
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)


# ------------------------------------------------------------------ two runs at once


@pytest.mark.parametrize("second", [ALL, (KEYS[4], KEYS[9])], ids=["same", "overlapping"])
def test_two_runs_at_once_compute_every_partition_once_and_each_records_all_of_its_own(
    second: tuple[str, str], slurm: SlurmCluster, deploy: Deploy, command_line: MakeCommandLine, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    deployment = deploy(slurm, told={"gate": str(gate)})
    first = ALL if second == ALL else (KEYS[0], KEYS[7])
    line, before = command_line(deployment), {r.run_id for r in deployment.instance.get_runs()}
    processes = [line.start("topk_cache", partition=span(*keys)) for keys in (first, second)]
    wait_until("both wait for a job", lambda: n_followed(deployment) == 2)
    gate.touch()
    for process in processes:
        text, _ = process.communicate(timeout=RUN_S)
        assert process.returncode == 0, text
    recorded = [deployment.recorded(r.run_id) for r in deployment.instance.get_runs() if r.run_id not in before]
    wanted = [[k for k in KEYS if a <= k <= b] for a, b in (first, second)]
    assert sorted(recorded) == sorted(wanted)
    assert deployment.n_made() == {k: 1 for k in KEYS if any(k in w for w in wanted)}


# ------------------------------------------------------------------ terminated runs


def test_a_terminated_run_ends_when_the_queue_shows_none_of_its_tasks_alive(
    slurm: SlurmCluster, deploy: Deploy, command_line: MakeCommandLine
) -> None:
    deployment = deploy(slurm, n_tasks=6, concurrency=2)
    python = deployment.home / "python"
    python.write_text("#!/bin/bash\ntrap '' TERM  # so only KillWait's SIGKILL ends it\nwhile :; do sleep 1; done\n")
    run = command_line(deployment).start("topk_cache", partition=span(*ALL))
    wait_until("two tasks run", lambda: [t.split()[1] for t in deployment.alive()].count("RUNNING") == 2)
    run.send_signal(signal.SIGINT)
    text, _ = run.communicate(timeout=RUN_S)
    assert deployment.alive() == []
    assert run.returncode != 0
    assert "terminated: cancelling SLURM job" in text
    assert deployment.slurm.live("tiny", "teacher") == []


def test_a_terminated_run_leaves_a_job_that_another_run_waits_for(
    slurm: SlurmCluster, deploy: Deploy, command_line: MakeCommandLine, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    deployment = deploy(slurm, told={"gate": str(gate)})
    first = command_line(deployment).start("topk_cache", partition=span(*ALL))
    wait_until("the job is submitted", deployment.array_jobs)
    with Background(deployment) as second:
        second.waits_for_log("found, still running")
        first.send_signal(signal.SIGINT)
        text, _ = first.communicate(timeout=RUN_S)
        assert f"goes on: run {second.run_id} waits for it, too" in text
        gate.touch()
        result = second.succeeds()
    assert len(deployment.array_jobs()) == 1
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)


def test_work_that_was_cancelled_is_submitted_anew_by_the_next_run(
    slurm: SlurmCluster, deploy: Deploy, command_line: MakeCommandLine, tmp_path: Path
) -> None:
    never = tmp_path / "gate"
    deployment = deploy(slurm, told={"gate": str(never), "before_gate": PARTS_OF_A_PARTITION})
    run = command_line(deployment).start("topk_cache", partition=span(*ALL))
    wait_until("a partition is committed", deployment.n_made)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=RUN_S)
    deployment.tell({})
    result = deployment.run("topk_cache", partition_range=ALL)
    assert result.success, failure_text(result)
    assert len(deployment.array_jobs()) == 2
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)


# ------------------------------------------------------------------ held tasks


def test_a_task_whose_launch_failed_is_released_once_and_then_runs(make_cluster: MakeCluster, deploy: Deploy) -> None:
    cluster = make_cluster(prolog=True)
    deployment = deploy(cluster, n_tasks=1)
    cluster.fail_prolog(True, once=True)
    with Background(deployment) as run:
        run.waits_for_log("is held by SLURM (launch failed requeued held): released once")
        run.start_soon(run.task_id())
        result = run.succeeds()
    assert run.log().count("released once") == 1
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert len(deployment.array_jobs()) == 1


def test_a_task_that_is_held_again_fails_the_run_with_slurms_reason_and_leaves_the_queue(
    make_cluster: MakeCluster, deploy: Deploy
) -> None:
    cluster = make_cluster(prolog=True)
    deployment = deploy(cluster, n_tasks=1)
    cluster.fail_prolog(True)
    with Background(deployment) as run:
        run.waits_for_log("released once")
        run.start_soon(run.task_id())
        said = run.fails()
    assert "SLURM cannot start it: launch failed requeued held" in said
    assert f"{KEYS[0]} … {KEYS[-1]} (12 partitions)" in said
    assert run.log().count("released once") == 1
    assert deployment.alive() == []
    assert len(deployment.array_jobs()) == 1
