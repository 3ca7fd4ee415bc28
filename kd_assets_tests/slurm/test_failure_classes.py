"""What a run does about each way in which a task can fail, on a real SLURM with a stub in the teacher's place."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets.scheduler.submissions import read_spec
from kd_assets_tests.slurm.background import Background, part_files
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.deployment import KEYS, PARTS_OF_A_PARTITION, SlurmDeployment

Deploy = Callable[..., SlurmDeployment]
MakeCluster = Callable[..., SlurmCluster]
ONE, TWO = (KEYS[0], KEYS[0]), (KEYS[0], KEYS[1])


def memory_asked_for(deployment: SlurmDeployment) -> list[float | None]:
    """GiB of each job, one after the other."""
    return [read_spec(s).resources.memory_gib for s in deployment.submissions()]


@pytest.fixture
def limits_memory(slurm: SlurmCluster) -> None:
    if not slurm.cgroup:
        pytest.skip("this machine's memory cgroups are not writable: SLURM limits no job's memory here")


# Memory


@pytest.mark.usefixtures("limits_memory")
def test_a_task_out_of_memory_is_tried_again_with_more_until_it_fits(slurm: SlurmCluster, deploy: Deploy) -> None:
    told = {"units": {KEYS[1]: "take_memory"}}
    deployment = deploy(slurm, n_tasks=1, told=told, slurm={"memory_gib": 0.25, "max_memory_gib": 2})
    with Background(deployment, TWO) as run:
        result = run.succeeds()
    assert memory_asked_for(deployment) == [0.25, 0.5, 1.0]
    assert deployment.recorded(result.run_id) == [KEYS[0], KEYS[1]]
    assert deployment.n_made() == {KEYS[0]: 1, KEYS[1]: 1}
    assert f"{KEYS[1]}: out of host memory (task 0 {run.task_id()}: OUT_OF_MEMORY" in run.log()
    assert "tried again, with 1 GiB of memory" in run.log()
    assert [m["failures"] for m in run.job_metadata()] == ["out of host memory × 1", "out of host memory × 1", "none"]


@pytest.mark.usefixtures("limits_memory")
def test_a_task_that_the_most_memory_does_not_suffice_is_given_up_naming_the_limit(
    slurm: SlurmCluster, deploy: Deploy
) -> None:
    told = {"units": {KEYS[0]: "take_memory"}}
    deployment = deploy(slurm, n_tasks=1, told=told, slurm={"memory_gib": 0.25, "max_memory_gib": 0.5})
    with Background(deployment, ONE) as run:
        said = run.fails()
    assert memory_asked_for(deployment) == [0.25, 0.5]
    assert "OUT_OF_MEMORY" in said
    assert "it had the most memory that max_memory_gib allows, 0.5 GiB" in said
    assert "out of host memory × 2" in said  # failures_by_class


@pytest.mark.parametrize("token_budget", [{"token_budget": 1024}, {}], ids=["given", "found"])
def test_a_task_out_of_device_memory_is_tried_again_with_smaller_batches_until_they_fit(
    slurm: SlurmCluster, deploy: Deploy, tiny_teacher: object, token_budget: dict[str, int]
) -> None:
    teacher = {"model_id": str(tiny_teacher), "dtype": "float32", **token_budget}
    deployment = deploy(slurm, n_tasks=1, told={"units": {KEYS[1]: "device_memory"}}, teacher=teacher)
    with Background(deployment, TWO) as run:
        run.succeeds()
    assert deployment.n_made() == {KEYS[0]: 1, KEYS[1]: 1}
    said = f"{KEYS[1]}: out of device memory (OutOfDeviceMemoryError: batches of 1024 tokens are too large, on node "
    assert said in run.log()
    assert "tried again, with batches of 512 tokens" in run.log()
    assert "tried again, with batches of 256 tokens" in run.log()
    assert [m["failures"] for m in run.job_metadata()][-1] == "none"


# The time limit, where there was no chance to flush: at the next of slurmctld's ticks, half a minute apart


def time_runs_out(run: Background, submission: int) -> None:
    """The task's time is up, and its worker, stopped, cannot do anything about it."""
    os.kill(int(run.started(submission=submission).data["pid"]), signal.SIGSTOP)
    run.cluster.end_job(run.task_id(submission=submission))


@pytest.mark.slow
def test_a_task_whose_time_runs_out_is_submitted_again_and_goes_on_after_its_last_part(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    deployment = deploy(slurm, n_tasks=1, told={"gate": str(gate), "before_gate": PARTS_OF_A_PARTITION + 1})
    with Background(deployment, TWO) as run:
        run.wait_for_parts(KEYS[1])
        time_runs_out(run, 0)
        gate.touch()  # for its second attempt
        result = run.succeeds()
    assert deployment.recorded(result.run_id) == [KEYS[0], KEYS[1]]
    assert deployment.n_made() == {KEYS[0]: 1, KEYS[1]: 1}
    assert run.started(submission=1).data["n_parts_on_disk"] >= 1
    assert f"{KEYS[1]}: time limit (task 0 {run.task_id()}: TIMEOUT" in run.log()
    assert run.job_metadata()[0]["failures"] == "time limit × 1"


@pytest.mark.slow
def test_a_task_whose_time_runs_out_three_times_before_its_first_part_is_given_up(
    slurm: SlurmCluster, deploy: Deploy
) -> None:
    deployment = deploy(slurm, n_tasks=1, told={"units": {KEYS[0]: "hang"}})
    with Background(deployment, ONE) as run:
        for i in range(3):
            time_runs_out(run, i)
        said = run.fails()
    assert len(deployment.submissions()) == 3
    assert "TIMEOUT" in said
    assert "given up after 3 attempts in a row without a new part on disk" in said
    assert "time limit × 3" in said


# A node that is at fault


def test_a_node_that_lacks_what_a_task_needs_is_left_out_and_all_is_made_elsewhere(
    slurm: SlurmCluster, deploy: Deploy
) -> None:
    """It would be free at once each time, and eat every task that waits."""
    sick = slurm.nodes[0]
    setup = f'[ "$SLURMD_NODENAME" != {sick} ] || KD_PYTHON=/not-mounted/bin/python\n'
    deployment = deploy(slurm, n_tasks=4, profile={"setup": setup, "array_concurrency": 1}, slurm={"exclusive": True})
    with Background(deployment, (KEYS[0], KEYS[3])) as run:
        run.succeeds()
    assert deployment.n_made() == dict.fromkeys(KEYS[:4], 1)
    assert f"node {sick} is left out from now on: {sick} (2 faults; the last: task " in run.log()
    assert "exit status 127: a program that is not on this node: is a mount missing?" in run.log()
    assert any(f"{sick} × " in m["nodes_at_fault"] for m in run.job_metadata())


# Somebody does not want it, or nothing comes of it


def test_a_task_that_somebody_cancels_is_not_started_again(slurm: SlurmCluster, deploy: Deploy) -> None:
    deployment = deploy(slurm, n_tasks=2, told={"units": {KEYS[1]: "hang"}})
    with Background(deployment, TWO) as run:
        wait_until("one task hangs", lambda: run.keys_of(0) and run.started(0) and run.started(1))
        hangs = next(task for task in (0, 1) if run.keys_of(task) == [KEYS[1]])
        run.wait_for_committed(KEYS[0])
        slurm.run("scancel", run.task_id(hangs))
        said = run.fails()
        result = run.result()
    assert deployment.recorded(result.run_id) == [KEYS[0]]
    assert f"{KEYS[1]} (topk_cache): task {hangs} {run.task_id(hangs)}: CANCELLED" in said
    assert "cancelled × 1" in said
    assert len(deployment.submissions()) == 1


def test_a_task_that_is_requeued_again_and_again_without_a_new_part_ends_by_itself(
    slurm: SlurmCluster, deploy: Deploy
) -> None:
    deployment = deploy(slurm, n_tasks=1, told={"units": {KEYS[0]: "hang"}})
    with Background(deployment, ONE) as run:
        for attempt in range(5):
            run.started(attempt=attempt)
            slurm.scontrol("requeue", run.task_id())
            run.start_soon(run.task_id())
        said = run.fails()
    assert f"{KEYS[0]} (topk_cache): NoProgressError: this task was started 5 times" in said
    assert len(deployment.submissions()) == 1
    assert part_files(deployment) == []


def test_a_job_that_ended_and_was_forgotten_between_two_questions_is_explained_by_its_own_words(
    make_cluster: MakeCluster, deploy: Deploy
) -> None:
    cluster = make_cluster(nodes=1, min_job_age_s=2)
    told = {"part_s": 0.1, "units": {KEYS[1]: "fail"}}
    deployment = deploy(cluster, n_tasks=1, told=told, profile={"poll_interval_s": 6})
    with Background(deployment, TWO) as run:
        said = run.fails()
        result = run.result()
    assert deployment.recorded(result.run_id) == [KEYS[0]]
    assert f"{KEYS[1]} (topk_cache): TeacherError: {KEYS[1]}: the stub was told to fail" in said


def kill_script(run: Background) -> None:
    """kill -9 of the batch script and its worker: no last word, and SLURM calls it FAILED."""
    worker = int(run.started().data["pid"])
    with open(f"/proc/{worker}/stat") as stat:
        script = int(stat.read().rpartition(")")[2].split()[1])
    os.kill(script, signal.SIGKILL)
    wait_until("so is its worker", lambda: not Path(f"/proc/{worker}/exe").exists())


def test_without_accounting_a_job_that_squeue_soon_forgets_is_submitted_again(
    make_cluster: MakeCluster, deploy: Deploy, tmp_path: Path
) -> None:
    cluster = make_cluster(nodes=1, min_job_age_s=2)
    gate = tmp_path / "gate"
    told = {"gate": str(gate), "before_gate": 1}
    deployment = deploy(cluster, n_tasks=1, told=told, profile={"poll_interval_s": 8, "absence_grace_s": 4})
    with Background(deployment, TWO) as run:
        run.wait_for_parts(KEYS[0])
        kill_script(run)
        gate.touch()
        run.succeeds()
    assert deployment.n_made() == {KEYS[0]: 1, KEYS[1]: 1}
    assert len(deployment.submissions()) == 2
    # SLURM forgets it at the next of its rounds: before our look, or just after.
    assert any(words in run.job_metadata()[0]["failures"] for words in ("lost by the scheduler", "killed"))


def test_accounting_explains_the_end_of_a_job_that_was_forgotten_before_anybody_looked(
    make_cluster: MakeCluster, deploy: Deploy, tmp_path: Path
) -> None:
    cluster = make_cluster(nodes=1, min_job_age_s=2, accounting=True)
    gate = tmp_path / "gate"
    told = {"gate": str(gate), "before_gate": 1}
    deployment = deploy(cluster, n_tasks=1, told=told, profile={"poll_interval_s": 8, "absence_grace_s": 120})
    with Background(deployment, TWO) as run:
        run.wait_for_parts(KEYS[0])
        kill_script(run)
        gate.touch()
        run.succeeds()
    assert deployment.n_made() == {KEYS[0]: 1, KEYS[1]: 1}
    assert len(deployment.submissions()) == 2
    assert "killed" in run.job_metadata()[0]["failures"]
    assert "lost" not in run.job_metadata()[0]["failures"]
