"""From a selection to arrays on a real SLURM: how the work is cut, what is submitted, and what is left when it fails.

The worker's teacher is a stub; tasks, leases, parts and commits are real.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets.diagnose.preview import preview, text_lines
from kd_assets.orchestration.materialize import planner_of
from kd_assets_tests.orchestration.deployment import failure_text
from kd_assets_tests.slurm.background import Background
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.conftest import SshLogin
from kd_assets_tests.slurm.deployment import ALL, KEYS, SlurmDeployment, key, log_of
from kd_assets_tests.slurm.fakes import count_calls

Deploy = Callable[..., SlurmDeployment]
MakeCluster = Callable[..., SlurmCluster]
ONCE = dict.fromkeys(KEYS, 1)


def test_twelve_partitions_in_three_tasks_are_one_array_and_load_the_teacher_three_times(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    deployment = deploy(slurm, told={"gate": str(gate)})
    with Background(deployment) as run:
        for task in range(3):
            run.started(task)
        gate.touch()
        result = run.succeeds()
    assert deployment.n_teacher_loads() == 3
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert len(deployment.array_jobs()) == 1
    assert deployment.most_at_once() == 3


def test_no_more_tasks_run_at_once_than_the_recipe_says(slurm: SlurmCluster, deploy: Deploy, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    deployment = deploy(slurm, n_tasks=6, concurrency=2, told={"part_s": 0.1, "gate": str(gate)})
    with Background(deployment) as run:
        wait_until("two have started", lambda: len(deployment.job_events("task_started")) >= 2)
        gate.touch()
        run.succeeds()
    assert deployment.n_teacher_loads() == 6
    assert deployment.most_at_once() == 2


def test_a_failed_partition_leaves_the_others_recorded_and_is_alone_submitted_again(
    slurm: SlurmCluster, deploy: Deploy
) -> None:
    deployment = deploy(slurm, told={"units": {KEYS[4]: "fail"}})
    result = deployment.run("topk_cache", partition_range=ALL)
    assert not result.success
    others = [k for k in KEYS if k != KEYS[4]]
    assert deployment.recorded(result.run_id) == others
    said = failure_text(result)
    assert f"{KEYS[4]} (topk_cache): TeacherError: {KEYS[4]}: the stub was told to fail" in said
    (log,) = set(re.findall(r"\(log: ([^)]*\.log)\)", said))
    assert Path(log).is_file()

    deployment.tell({})
    again = deployment.run("topk_cache", partition_range=ALL)
    assert again.success, failure_text(again)
    assert deployment.recorded(again.run_id) == list(KEYS)
    assert deployment.n_made() == ONCE
    _, second = deployment.submissions()
    (unit,) = json.loads(second.job_file.read_text())["units"]
    assert unit["partition_key"] == KEYS[4]


def test_what_tasks_print_reaches_the_runs_log_while_they_run(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    deployment = deploy(slurm, n_tasks=1, told={"gate": str(gate)})
    with Background(deployment) as run:
        run.waits_for_log(f"task 0 | stub teacher at {KEYS[0]}")
        assert deployment.recorded(run.run_id) == []
        gate.touch()
        run.succeeds()


def test_the_last_lines_of_the_log_of_a_failed_task_are_in_the_runs_log(
    slurm: SlurmCluster, deploy: Deploy, capfd: pytest.CaptureFixture[str]
) -> None:
    deployment = deploy(slurm, n_tasks=1)
    python = deployment.home / "python"
    python.write_text(python.read_text().replace("#!/bin/bash\n", "#!/bin/bash\necho 'no such module: xyz'; exit 1\n"))
    result = deployment.run("topk_cache", partition=KEYS[0])
    assert not result.success
    assert "no such module: xyz" in capfd.readouterr().err
    assert f"{KEYS[0]} (topk_cache): task 0" in failure_text(result)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"partition": "nowhere"}, "Invalid partition name"),
        ({"gpus_per_node": 99}, "Requested node configuration is not available"),
    ],
)
def test_what_sbatch_refuses_fails_the_run_at_once_in_slurms_words(
    wanted: dict[str, object],
    words: str,
    slurm: SlurmCluster,
    deploy: Deploy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deployment = deploy(slurm, slurm=wanted)
    calls = count_calls(tmp_path / "counted", monkeypatch)
    with Background(deployment) as run:
        said = run.fails()
    assert calls()["sbatch"] == 1
    assert calls().get("squeue", 0) <= 1, "nothing is waited for"
    assert words in said
    assert f"{KEYS[0]} … {KEYS[-1]} (12 partitions)" in said
    assert deployment.alive() == []
    assert deployment.slurm.live("tiny", "teacher") == []


def test_what_could_never_start_fails_the_run_and_leaves_the_queue(make_cluster: MakeCluster, deploy: Deploy) -> None:
    # Sites that do not enforce a partition's limits on submission let such jobs wait for ever.
    cluster = make_cluster(nodes=1, slurm_conf="PartitionName=short Nodes=ALL MaxTime=1 State=UP")
    deployment = deploy(cluster, slurm={"partition": "short", "time": 30})
    with Background(deployment) as run:
        said = run.fails()
    assert re.search(r"SLURM cannot start it: Partition(TimeLimit|Config) ", said)
    assert deployment.alive() == []
    assert deployment.slurm.live("tiny", "teacher") == []


def test_more_tasks_than_an_array_may_have_become_several_with_each_its_own_partitions(
    make_cluster: MakeCluster, deploy: Deploy
) -> None:
    cluster = make_cluster(max_array_size=5)
    deployment = deploy(cluster, n_tasks=12, concurrency=6)
    result = deployment.run("topk_cache", partition_range=ALL)
    assert result.success, failure_text(result)
    assert [(a["first_task"], a["n_tasks"]) for a in deployment.arrays()] == [(0, 5), (5, 5), (10, 2)]
    assert len(deployment.array_jobs()) == 3
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert deployment.n_teacher_loads() == 12
    assert deployment.most_at_once() <= 6
    made = deployment.materializations(result.run_id, "topk_cache")
    logs = {log_of(m) for (m,) in made.values()}
    assert len(logs) == 12
    assert all(Path(log).is_file() for log in logs)
    again = deployment.run("topk_cache", partition=KEYS[7])
    ((reused,),) = deployment.materializations(again.run_id, "topk_cache").values()
    (first,) = made["topk_cache", KEYS[7]]
    assert reused.metadata["made_by"].value == f"reused: {first.metadata['made_by'].value}"
    assert reused.metadata["queue_wait_s"] == first.metadata["queue_wait_s"], "of the run that made it"


def test_a_site_that_takes_few_jobs_gets_them_in_smaller_arrays_as_room_appears(
    make_cluster: MakeCluster,
    deploy: Deploy,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kd_assets.scheduler.slurm.submitter.PACE_S", (1.0, 2.0))
    cluster = make_cluster(accounting=True, enforce_limits=True)
    cluster.limit_submitted_jobs(4)
    deployment = deploy(cluster, n_tasks=12)
    result = deployment.run("topk_cache", partition_range=ALL)
    assert result.success, failure_text(result)
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)
    taken = [a for a in deployment.arrays() if "job_id" in a]
    assert sum(int(str(a["n_tasks"])) for a in taken) == 12
    assert max(int(str(a["n_tasks"])) for a in taken) > 1
    assert deployment.most_at_once() <= 4
    said = capfd.readouterr().err
    assert re.search(r"SLURM takes no more jobs now \(.*QOSMaxSubmitJobPerUserLimit.*\); \d+ tasks wait", said)


def test_everything_works_over_ssh(
    slurm: SlurmCluster, sshd: SshLogin, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(slurm, profile={"ssh": sshd.target, "ssh_options": sshd.options})
    monkeypatch.delenv("SLURM_CONF")
    result = deployment.run("topk_cache", partition_range=ALL)
    assert result.success, failure_text(result)
    assert deployment.n_teacher_loads() == 3
    assert deployment.recorded(result.run_id) == list(KEYS)
    assert len(deployment.array_jobs()) == 1


def test_processes_of_one_task_share_its_partitions(slurm: SlurmCluster, deploy: Deploy) -> None:
    deployment = deploy(slurm, n_tasks=3, processes_per_task=2)
    result = deployment.run("topk_cache", partition_range=ALL)
    assert result.success, failure_text(result)
    assert deployment.n_teacher_loads() == 6
    assert {e.data["process_index"] for e in deployment.job_events("task_started")} == {0, 1}
    assert deployment.n_made() == ONCE
    assert deployment.recorded(result.run_id) == list(KEYS)


def test_one_process_of_a_task_fails_and_the_partitions_of_the_other_are_recorded(
    slurm: SlurmCluster, deploy: Deploy
) -> None:
    deployment = deploy(slurm, n_tasks=1, processes_per_task=2, told={"units": {KEYS[1]: "fail"}})
    result = deployment.run("topk_cache", partition_range=ALL)
    assert not result.success
    assert deployment.recorded(result.run_id) == [k for k in KEYS if k != KEYS[1]]
    assert f"{KEYS[1]}: the stub was told to fail" in failure_text(result)


def test_preview_prints_the_command_line_that_is_submitted_and_submits_nothing(
    slurm: SlurmCluster, deploy: Deploy
) -> None:
    deployment = deploy(
        slurm, slurm={"cpus": 2, "memory_gib": 0.5, "time": 30}, profile={"array_concurrency": 2, "gpus_per_node": 1}
    )
    planner_of(deployment.recipe, deployment.platform).teacher()  # its weights are hashed, as by an earlier run
    shown = preview(deployment.recipe, deployment.platform, partitions=None, assets=["topk_cache"])
    assert deployment.array_jobs() == []
    assert deployment.submissions() == []
    assert not (deployment.home / "secrets").exists()
    (printed,) = [line.strip() for line in text_lines(shown) if line.strip().startswith("sbatch ")]

    result = deployment.run("topk_cache", partition_range=ALL)
    assert result.success, failure_text(result)
    (array,) = deployment.arrays()
    nonce = str(array["name"]).rpartition("-")[2]
    assert shlex.split(printed.replace("NUMBER", "0001").replace("NONCE", nonce)) == array["argv"]


@pytest.mark.slow
def test_a_thousand_partitions_cost_one_query_an_interval(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 1000
    deployment = deploy(
        slurm, n_shards=n, documents_per_shard=1, n_tasks=4, profile={"poll_interval_s": 1}, records_shards=False
    )
    calls = count_calls(tmp_path / "counted", monkeypatch)
    began = time.monotonic()
    result = deployment.run("topk_cache", partition_range=(key(0), key(n - 1)))
    wall_s = time.monotonic() - began
    assert result.success, failure_text(result)
    counted = calls()
    assert sum(counted.values()) <= wall_s / 1 + 10, counted
    assert counted["sbatch"] == 1
    assert deployment.recorded(result.run_id) == [key(i) for i in range(n)]
    assert deployment.n_made() == dict.fromkeys((key(i) for i in range(n)), 1)
    assert deployment.n_teacher_loads() == 4
