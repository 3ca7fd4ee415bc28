"""Tasks that are stopped, killed, preempted or lose their node: what is on disk stays, and the rest is made.

The worker's teacher is a stub that is slow as told, but where numbers are compared across an interruption.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from kd_assets.scheduler.slurm import task_states
from kd_assets.scheduler.submissions import read_spec
from kd_assets.store import verify
from kd_assets_tests.slurm.background import Background, part_files, parts, store_of
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.deployment import ALL, KEYS, PARTS_OF_A_PARTITION, SlurmDeployment

Deploy = Callable[..., SlurmDeployment]
MakeCluster = Callable[..., SlurmCluster]
FOUR = (KEYS[0], KEYS[3])


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Until a test makes this file, tasks stand still after as many parts as they are told."""
    return tmp_path / "gate"


@pytest.fixture(scope="module")
def undisturbed(
    slurm: SlurmCluster, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, bytes]]:
    """The parts that the stub makes of all partitions when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "instance").mkdir()
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.local_temp(str(folder / "instance")) as instance:
        for name, value in slurm.env.items():
            patch.setenv(name, value)
        deployment = SlurmDeployment(folder / "home", tiny_teacher, instance, slurm)
        assert deployment.run("topk_cache", partition_range=ALL).success
        yield parts(deployment)


def assert_whole(deployment: SlurmDeployment, undisturbed: dict[str, bytes], keys: tuple[str, str] = ALL) -> None:
    """Every part as it would be had nothing happened, each partition computed to its end once, no hash wrong."""
    expected = {name: data for name, data in undisturbed.items() if keys[0] <= name.split("/")[2] <= keys[1]}
    assert parts(deployment) == expected
    assert set(deployment.n_made().values()) == {1}
    assert verify(store_of(deployment)).problems == ()


def worker_pid(run: Background, task: int = 0, submission: int = 0) -> int:
    return int(run.started(task, submission=submission).data["pid"])


def wait_for_end(pid: int) -> None:
    """A process is gone, or a zombie, which has no `exe`."""
    wait_until(f"process {pid} is gone", lambda: not Path(f"/proc/{pid}/exe").exists())


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process that is stopped will get this signal when it goes on."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


# Stopped on request


def test_a_task_that_usr1_stops_within_a_partition_goes_on_after_its_last_part_with_the_same_bytes(
    slurm: SlurmCluster, deploy: Deploy, tiny_teacher: Path
) -> None:
    # The tiny real teacher, a document at a time, and each a part.
    teacher = {"model_id": str(tiny_teacher), "dtype": "float32", "token_budget": 16}
    shape = {"n_tasks": 1, "n_shards": 2, "documents_per_shard": 40, "part_documents": 1}
    real = {"stub": False, "teacher": teacher, "slurm": {"memory_gib": 2}}
    two = (KEYS[0], KEYS[1])
    without = deploy(slurm, home="uninterrupted", **shape, **real)
    assert without.run("topk_cache", partition_range=two).success
    deployment = deploy(slurm, **shape, **real)
    with Background(deployment, two) as run:
        pid = worker_pid(run)
        stopped_in = stop_within_a_partition(deployment, pid)
        slurm.signal_job(run.task_id())
        wait_until("the signal has been passed on", lambda: has_pending(pid, signal.SIGUSR1))
        os.kill(pid, signal.SIGCONT)
        wait_until("the task has flushed", lambda: deployment.job_events("task_finished"))
        n_before = len(part_files(deployment, stopped_in))
        run.start_soon(run.task_id())
        run.succeeds()
    (first, second) = deployment.job_events("task_finished")
    assert (first.data["status"], first.data["signal"], second.data["status"]) == ("resumable", "SIGUSR1", "done")
    assert 0 < n_before < 40
    assert run.started(attempt=1).data["n_parts_on_disk"] >= n_before
    assert parts(deployment) == parts(without)
    assert deployment.n_teacher_loads() == without.n_teacher_loads() + 1
    assert len(deployment.submissions()) == 1
    assert "was requeued (time limit) and goes on as attempt 1" in run.log()
    assert "tried again" not in run.log()
    assert run.job_metadata()[0]["interruptions"] == "time limit × 1"


def stop_within_a_partition(deployment: SlurmDeployment, pid: int) -> str:
    """Stop a worker while one of its partitions has some parts and is not committed; returns which."""
    found: list[str] = []

    def stopped() -> bool:
        begun = {p.parent for p in part_files(deployment)}
        if not any(not (folder / "manifest.json").exists() for folder in begun):
            return False
        os.kill(pid, signal.SIGSTOP)
        wait_until("it is stopped", lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        found[:] = [folder.parent.name for folder in begun if not (folder / "manifest.json").exists()]
        if not found:  # too late: the next one
            os.kill(pid, signal.SIGCONT)
        return bool(found)

    wait_until("the worker is within a partition", stopped)
    return found[0]


def test_every_task_may_be_stopped_at_once(
    slurm: SlurmCluster, deploy: Deploy, undisturbed: dict[str, bytes], gate: Path
) -> None:
    deployment = deploy(slurm, told={"gate": str(gate), "before_gate": 1})
    with Background(deployment) as run:
        for task in range(3):
            run.wait_for_parts(run.keys_of(task)[0])
            slurm.signal_job(run.task_id(task))
        wait_until("all have flushed", lambda: len(deployment.job_events("task_finished")) == 3)
        gate.touch()
        for task in range(3):
            run.start_soon(run.task_id(task))
        result = run.succeeds()
    assert_whole(deployment, undisturbed)
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert deployment.n_teacher_loads() == 6
    assert run.job_metadata()[0]["interruptions"] == "time limit × 3"


# Killed


def test_a_killed_worker_is_tried_again_and_its_neighbours_do_not_notice(
    slurm: SlurmCluster, deploy: Deploy, undisturbed: dict[str, bytes], gate: Path
) -> None:
    deployment = deploy(slurm, told={"gate": str(gate), "before_gate": PARTS_OF_A_PARTITION + 1})
    with Background(deployment) as run:
        run.wait_for_parts(run.keys_of(1)[1])
        os.kill(worker_pid(run, task=1), signal.SIGKILL)
        gate.touch()
        result = run.succeeds()
    assert_whole(deployment, undisturbed)
    assert deployment.recorded(result.run_id) == list(KEYS)
    again = json.loads(run.submission(1).job_file.read_text())
    assert {unit["partition_key"] for unit in again["units"]} == set(run.keys_of(1)[1:])
    assert deployment.n_teacher_loads() == 3 + len(again["tasks"])
    assert f"{run.keys_of(1)[1]}: killed (task 1 {run.task_id(1)}: FAILED (NonZeroExitCode)" in run.log()
    assert run.job_metadata()[0]["failures"] == "killed × 1"


def test_a_killed_batch_script_is_tried_again(
    slurm: SlurmCluster, deploy: Deploy, undisturbed: dict[str, bytes], gate: Path
) -> None:
    deployment = deploy(slurm, n_tasks=1, told={"gate": str(gate), "before_gate": PARTS_OF_A_PARTITION + 1})
    with Background(deployment, FOUR) as run:
        run.wait_for_parts(KEYS[1])
        worker = worker_pid(run)
        os.kill(parent(worker), signal.SIGKILL)
        wait_for_end(worker)
        gate.touch()
        run.succeeds()
    assert_whole(deployment, undisturbed, FOUR)
    assert len(deployment.submissions()) == 2
    assert ": killed (task 0" in run.log()


def test_what_waits_for_its_turn_is_not_given_up_while_its_task_is_killed_again_and_again_and_gets_on(
    slurm: SlurmCluster, deploy: Deploy, undisturbed: dict[str, bytes], gate: Path
) -> None:
    deployment = deploy(slurm, n_tasks=1, told={"gate": str(gate), "before_gate": 1})
    with Background(deployment, FOUR) as run:
        for i in range(4):
            run.wait_for_parts(KEYS[i])
            # The next one: to the first part of the next partition.
            deployment.tell({"gate": str(gate), "before_gate": PARTS_OF_A_PARTITION})
            os.kill(worker_pid(run, submission=i), signal.SIGKILL)
        gate.touch()
        run.succeeds()
    assert_whole(deployment, undisturbed, FOUR)
    assert deployment.n_teacher_loads() == 5


# Nodes


def test_a_node_without_its_slurmd_works_on_while_the_task_is_started_elsewhere(
    make_cluster: MakeCluster, deploy: Deploy, undisturbed: dict[str, bytes], gate: Path
) -> None:
    cluster = make_cluster(nodes=2)
    deployment = deploy(cluster, n_tasks=1, told={"gate": str(gate), "before_gate": 1})
    with Background(deployment, FOUR) as run:
        run.wait_for_parts(KEYS[0])
        cluster.kill("slurmd0")
        cluster.set_node(0, "down")  # what SLURM finds out by itself after its SlurmdTimeout
        run.start_soon(run.task_id())
        run.waits_for_log("waits for an earlier attempt that still runs")
        gate.touch()
        run.succeeds()
    assert deployment.n_teacher_loads() == 1
    assert_whole(deployment, undisturbed, FOUR)
    cluster.wait_for(run.task_id(), "COMPLETED")
    cluster.start_daemon("slurmd0")
    cluster.set_node(0, "resume")
    cluster.wait_idle()
    assert_whole(deployment, undisturbed, FOUR)


def test_a_slurmd_that_comes_back_ends_the_old_attempt_and_the_new_one_takes_over(
    make_cluster: MakeCluster, deploy: Deploy, undisturbed: dict[str, bytes], gate: Path
) -> None:
    cluster = make_cluster(nodes=2)
    deployment = deploy(cluster, n_tasks=1, told={"gate": str(gate), "before_gate": 1})
    with Background(deployment, FOUR) as run:
        run.wait_for_parts(KEYS[0])
        old = worker_pid(run)
        cluster.kill("slurmd0")
        cluster.set_node(0, "down")
        run.start_soon(run.task_id())
        run.waits_for_log("waits for an earlier attempt that still runs")
        cluster.start_daemon("slurmd0")
        wait_for_end(old)
        gate.touch()
        run.succeeds()
    assert deployment.n_teacher_loads() == 2
    assert_whole(deployment, undisturbed, FOUR)
    assert run.job_metadata()[0]["interruptions"] == "node failure × 1"


def test_a_task_whose_node_goes_down_is_requeued_without_that_node(
    slurm: SlurmCluster, deploy: Deploy, undisturbed: dict[str, bytes], gate: Path
) -> None:
    deployment = deploy(slurm, n_tasks=1, told={"gate": str(gate), "before_gate": PARTS_OF_A_PARTITION + 1})
    with Background(deployment, FOUR) as run:
        run.wait_for_parts(KEYS[1])
        old = worker_pid(run)
        task_id, node = run.task_id(), str(run.started().data["slurm_nodelist"])
        slurm.set_node(slurm.nodes.index(node), "down")
        run.waits_for_log(f"its node {node} is down and is excluded from now on")
        shown = slurm.scontrol("--oneliner", "show", "job", task_id)
        wait_for_end(old)
        gate.touch()
        slurm.resume_nodes()
        run.start_soon(task_id)
        run.succeeds()
    assert f" ExcNodeList={node} " in shown
    assert run.started(attempt=1).data["slurm_nodelist"] != node
    assert_whole(deployment, undisturbed, FOUR)
    assert len(deployment.submissions()) == 1
    assert "task 0 was requeued (node failure) and goes on as attempt 1" in run.log()
    assert run.job_metadata()[0]["interruptions"] == "node failure × 1"


def test_what_a_run_submits_after_a_node_failed_excludes_that_node_too(
    slurm: SlurmCluster, deploy: Deploy, gate: Path
) -> None:
    deployment = deploy(slurm, n_tasks=1, told={"gate": str(gate), "before_gate": 1})
    with Background(deployment, FOUR) as run:
        node = str(run.started().data["slurm_nodelist"])
        run.waits_for_log(": 1 run")  # the scheduler has seen where it runs
        slurm.set_node(slurm.nodes.index(node), "down")
        run.waits_for_log("is excluded from now on")
        slurm.resume_nodes()
        run.start_soon(run.task_id())
        os.kill(int(run.started(attempt=1).data["pid"]), signal.SIGKILL)
        gate.touch()
        run.succeeds()
    assert [read_spec(s).excluded_nodes for s in deployment.submissions()] == [(), (node,)]


def test_a_task_that_slurm_does_not_requeue_is_submitted_again_without_the_node_that_went_down(
    slurm: SlurmCluster,
    deploy: Deploy,
    undisturbed: dict[str, bytes],
    gate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task_states, "REQUEUE_GRACE_S", 1.0)
    deployment = deploy(slurm, n_tasks=1, told={"gate": str(gate), "before_gate": PARTS_OF_A_PARTITION + 1})
    with Background(deployment, FOUR) as run:
        run.wait_for_parts(KEYS[1])
        old = worker_pid(run)
        slurm.scontrol("update", f"JobId={run.task_id()}", "Requeue=0")
        node = str(run.started().data["slurm_nodelist"])
        slurm.set_node(slurm.nodes.index(node), "down")
        run.waits_for_log(f"tried again, without node {node}")
        wait_for_end(old)
        gate.touch()
        slurm.resume_nodes()
        run.succeeds()
    assert run.started(submission=1).data["slurm_nodelist"] != node
    assert_whole(deployment, undisturbed, FOUR)
    assert "node failure" in run.job_metadata()[0]["failures"]


# Preempted


def test_tasks_that_more_important_jobs_push_aside_go_on_afterwards(
    slurm: SlurmCluster, deploy: Deploy, undisturbed: dict[str, bytes], gate: Path
) -> None:
    deployment = deploy(slurm, told={"gate": str(gate), "before_gate": 1})
    with Background(deployment) as run:
        for task in range(3):
            run.wait_for_parts(run.keys_of(task)[0])
        urgent = slurm.sbatch("-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
        slurm.wait_for(urgent, "COMPLETED")  # on all nodes: nothing of ours is left there
        gate.touch()
        result = run.succeeds()
    assert_whole(deployment, undisturbed)
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert len(deployment.submissions()) == 1
    assert "was requeued (preempted) and goes on as attempt 1" in run.log()
    assert "tried again" not in run.log()
    assert run.job_metadata()[0]["interruptions"] == "preempted × 3"
