"""A controller that does not answer, or has forgotten; and runs that die. The jobs go on, and are found again."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets.orchestration.driving import waiting
from kd_assets_tests.orchestration.command_line import CommandLine
from kd_assets_tests.slurm.background import Background
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.deployment import ALL, KEYS, PARTS_OF_A_PARTITION, SlurmDeployment
from kd_assets_tests.slurm.fakes import put_first

Deploy = Callable[..., SlurmDeployment]
MakeCluster = Callable[..., SlurmCluster]
FOUR = (KEYS[0], KEYS[3])
ONCE = dict.fromkeys(KEYS, 1)


@pytest.fixture
def asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that does not let minutes pass between two questions to a controller that is away."""
    monkeypatch.setattr(waiting, "LONGEST_BACKOFF_S", 2.0)


# A controller that is away


@pytest.mark.slow
@pytest.mark.usefixtures("asks_often")
def test_a_controller_that_is_away_for_half_a_minute_costs_nothing(make_cluster: MakeCluster, deploy: Deploy) -> None:
    cluster = make_cluster(nodes=1, message_timeout_s=5)
    deployment = deploy(cluster, told={"part_s": 3.0})
    with Background(deployment) as run:
        for task in range(3):
            run.started(task)
        cluster.kill("slurmctld", signal.SIGTERM)
        away = time.monotonic()
        run.waits_for_log("the scheduler does not answer")
        n_recorded = len(deployment.recorded(run.run_id))
        wait_until("results are recorded", lambda: len(deployment.recorded(run.run_id)) >= n_recorded + 3)
        time.sleep(max(0.0, away + 30 - time.monotonic()))
        assert "the scheduler answers again" not in run.log()
        cluster.start_daemon("slurmctld")
        run.waits_for_log("the scheduler answers again, after")
        result = run.succeeds()
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert deployment.n_made() == ONCE
    assert deployment.n_teacher_loads() == 3
    assert run.log().count("the scheduler does not answer") == 1
    assert [(m["interruptions"], m["failures"]) for m in run.job_metadata()] == [("none", "none")]


@pytest.mark.usefixtures("asks_often")
def test_a_controller_that_hangs_costs_nothing(make_cluster: MakeCluster, deploy: Deploy) -> None:
    cluster = make_cluster(nodes=1)
    deployment = deploy(cluster, told={"part_s": 1.0}, profile={"command_timeout_s": 6})
    with Background(deployment) as run:
        for task in range(3):
            run.started(task)
        cluster.pause("slurmctld")
        run.waits_for_log("the scheduler does not answer (squeue gave no answer within 6 s and was killed")
        cluster.unpause("slurmctld")
        run.waits_for_log("the scheduler answers again")
        result = run.succeeds()
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert deployment.n_teacher_loads() == 3
    assert [(m["interruptions"], m["failures"]) for m in run.job_metadata()] == [("none", "none")]


# A SLURM that does not understand what it is asked: no version that is supported


NOT_UNDERSTOOD = """{ echo "squeue: unrecognized option '--array'" >&2; exit 1; }"""


def test_a_question_that_slurm_does_not_understand_fails_the_run_at_once_and_submits_nothing(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(slurm)
    put_first(tmp_path / "fakes", "squeue", NOT_UNDERSTOOD, monkeypatch)
    with Background(deployment) as run:
        said = run.fails()
    assert "SLURM does not understand `squeue --me --all --array " in said
    assert "unrecognized option '--array'" in said
    assert "does not answer" not in run.log()


def test_a_question_that_slurm_no_longer_understands_ends_the_run_and_not_its_jobs(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(slurm, n_tasks=1, told={"part_s": 0.5})
    updated = tmp_path / "updated"
    put_first(tmp_path / "fakes", "squeue", f"[ ! -e '{updated}' ] || {NOT_UNDERSTOOD}", monkeypatch)
    with Background(deployment, (KEYS[0], KEYS[1])) as run:
        run.started()
        updated.touch()
        said = run.fails()
    assert "SLURM does not understand `squeue --me --all --array " in said
    updated.unlink()
    with Background(deployment, (KEYS[0], KEYS[1])) as run:
        run.succeeds()
    assert len(deployment.submissions()) == 1
    assert deployment.n_made() == {KEYS[0]: 1, KEYS[1]: 1}


# A controller that has forgotten


def saved_state(cluster: SlurmCluster) -> Path:
    """What the controller knows now."""
    saved = cluster.root / "saved-state"
    cluster.kill("slurmctld", signal.SIGTERM)  # which saves its state
    shutil.copytree(cluster.root / "state", saved)
    cluster.start_daemon("slurmctld")
    return saved


def restart_with(saved: Path, cluster: SlurmCluster) -> None:
    """A controller that is killed and knows nothing of what has happened since then: its state on disk is always some
    seconds old."""
    cluster.kill("slurmctld", signal.SIGKILL)
    shutil.rmtree(cluster.root / "state")
    saved.rename(cluster.root / "state")
    cluster.start_daemon("slurmctld")


def test_ids_that_a_restarted_controller_gives_to_others_are_left_alone_and_the_work_is_done_once(
    make_cluster: MakeCluster, deploy: Deploy
) -> None:
    cluster = make_cluster(nodes=1)
    deployment = deploy(cluster, told={"part_s": 0.1}, profile={"absence_grace_s": 20})  # until others have the ids
    before = cluster.sbatch("--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    cluster.wait_for(before, "RUNNING")
    saved = saved_state(cluster)
    with Background(deployment) as run:
        ours = run.task_id().split("_")[0]
        wait_until("it waits", lambda: cluster.state(f"{ours}_0") == "PENDING")
        restart_with(saved, cluster)
        others = cluster.sbatch("--array=0-2", "-o", "others.%a", "--wrap", "sleep 3; echo whole")
        assert others == ours
        cluster.run("scancel", before)
        result = run.succeeds()
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert deployment.n_made() == ONCE
    assert deployment.n_teacher_loads() == 3
    assert len(deployment.submissions()) == 2
    assert "lost by the scheduler" in run.log()
    for task in range(3):
        cluster.wait_for(f"{others}_{task}", "COMPLETED")
        assert (cluster.root / f"work/others.{task}").read_text() == "whole\n"


def test_running_tasks_that_a_restarted_controller_does_not_know_are_lost_after_a_grace_and_made_again(
    make_cluster: MakeCluster, deploy: Deploy, tmp_path: Path
) -> None:
    cluster = make_cluster(nodes=1)
    gate = tmp_path / "gate"
    deployment = deploy(cluster, n_tasks=1, told={"gate": str(gate), "before_gate": 1})
    saved = saved_state(cluster)
    with Background(deployment, FOUR) as run:
        run.wait_for_parts(KEYS[0])
        restart_with(saved, cluster)
        run.waits_for_log("lost by the scheduler")
        gate.touch()
        result = run.succeeds()
    assert deployment.recorded(result.run_id) == list(KEYS[:4])
    assert deployment.n_made() == dict.fromkeys(KEYS[:4], 1)
    assert len(deployment.submissions()) == 2
    assert "nobody saw it end" in run.log()


def test_a_task_that_a_restarted_controller_takes_for_running_and_runs_again_makes_nothing_twice(
    make_cluster: MakeCluster, deploy: Deploy
) -> None:
    cluster = make_cluster(nodes=1, slurmd_timeout_s=20)  # and it asks its nodes every third of it
    deployment = deploy(cluster, n_tasks=2, told={"part_s": 0.8})
    five = (KEYS[0], KEYS[4])
    with Background(deployment, five) as run:
        run.started(0)
        run.started(1)
        shorter = min((0, 1), key=lambda task: len(run.keys_of(task)))
        saved = saved_state(cluster)
        cluster.wait_for(run.task_id(shorter), "COMPLETED")
        restart_with(saved, cluster)
        assert cluster.state(run.task_id(shorter)) in ("RUNNING", "PENDING"), "soon it learns that there is no process"
        result = run.succeeds()
    assert deployment.recorded(result.run_id) == list(KEYS[:5])
    assert deployment.n_made() == dict.fromkeys(KEYS[:5], 1)
    assert deployment.n_teacher_loads() == 2
    assert len(deployment.submissions()) == 1


# A run that dies


def test_the_run_after_one_that_was_killed_finds_its_job_and_records_what_it_had_done(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    deployment = deploy(slurm, told={"gate": str(gate), "before_gate": PARTS_OF_A_PARTITION})
    cache = deployment.recipe.key("topk_cache")
    first = CommandLine(deployment).start("topk_cache", partition=("--partition-range", f"{ALL[0]}...{ALL[1]}"))
    try:
        wait_until("three are recorded", lambda: len(deployment.instance.get_materialized_partitions(cache)) >= 3)
    finally:
        first.kill()
        first.communicate()
    with Background(deployment) as run:
        run.waits_for_log("found, still running, SLURM job")
        gate.touch()
        result = run.succeeds()
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert deployment.n_made() == ONCE
    assert deployment.n_teacher_loads() == 3
    assert len(deployment.submissions()) == 1
