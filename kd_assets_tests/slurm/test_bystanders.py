"""What happens to jobs while somebody only looks, before anybody follows them, and after everybody has gone."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from kd_assets.diagnose.preview import preview, text_lines
from kd_assets.orchestration import orphans
from kd_assets.scheduler.job import TaskPhase
from kd_assets.scheduler.slurm.submitter import SlurmSubmitter
from kd_assets.scheduler.submissions import followers
from kd_assets_tests.orchestration.command_line import CommandLine
from kd_assets_tests.slurm.background import RUN_S
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.deployment import ALL, KEYS, SlurmDeployment
from kd_assets_tests.slurm.fakes import put_first

Deploy = Callable[..., SlurmDeployment]
MakeCluster = Callable[..., SlurmCluster]


class KilledError(BaseException):
    """In the place of a kill -9 between the files of a submission and sbatch."""


def abandon(deployment: SlurmDeployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run over the first four partitions that ends before its sbatch."""

    def die(*anything: object) -> list[str]:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(SlurmSubmitter, "submit_more", die)
        assert not deployment.run("topk_cache", partition_range=(KEYS[0], KEYS[3])).success
    assert deployment.array_jobs() == []


def test_looking_at_jobs_submits_nothing(slurm: SlurmCluster, deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = deploy(slurm)
    abandon(deployment, monkeypatch)
    (submission,) = deployment.slurm.live("tiny", "teacher")
    shown = preview(deployment.recipe, deployment.platform, partitions=f"{KEYS[6]}..{KEYS[7]}", assets=["topk_cache"])
    assert list(text_lines(shown))[-1].strip() == "Nothing was submitted."
    assert deployment.array_jobs() == []
    assert not list((submission.folder / "arrays").iterdir())


def test_a_submission_that_was_abandoned_before_sbatch_is_taken_up_by_who_wants_its_work(
    slurm: SlurmCluster, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(slurm)
    abandon(deployment, monkeypatch)
    result = deployment.run("topk_cache", partition_range=(KEYS[0], KEYS[3]))
    assert result.success
    assert len(deployment.submissions()) == 1
    assert deployment.recorded(result.run_id) == list(KEYS[:4])


def test_a_termination_while_sbatch_is_asked_cancels_the_job_that_it_made(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(slurm, told={"gate": str(tmp_path / "gate")})
    put_first(tmp_path / "fakes", "sbatch", 'first && { real "$@"; sleep 6; exit 0; }', monkeypatch)
    run = CommandLine(deployment).start("topk_cache", partition=("--partition-range", f"{ALL[0]}...{ALL[1]}"))
    wait_until("the job is in the queue", deployment.array_jobs)
    run.send_signal(signal.SIGINT)
    text, _ = run.communicate(timeout=RUN_S)
    assert run.returncode != 0
    assert "terminated: cancelling" in text
    assert deployment.alive() == []


def test_the_work_of_a_job_that_is_still_being_cancelled_is_submitted_anew(
    make_cluster: MakeCluster, deploy: Deploy
) -> None:
    deployment = deploy(make_cluster(nodes=2, kill_wait_s=6))
    worker = (deployment.home / "python").read_text()
    (deployment.home / "python").write_text("#!/bin/bash\ntrap '' TERM\nwhile :; do sleep 1; done\n")
    run = CommandLine(deployment).start("topk_cache", partition=("--partition-range", f"{ALL[0]}...{ALL[1]}"))
    wait_until("its tasks run", lambda: "RUNNING" in " ".join(deployment.alive()))
    run.send_signal(signal.SIGINT)
    wait_until("it is being cancelled", lambda: list(deployment.home.glob("jobs/tiny/*/*/cancelled")))
    (deployment.home / "python").write_text(worker)
    result = deployment.run("topk_cache", partition_range=ALL)
    run.communicate(timeout=RUN_S)
    assert result.success
    assert len(deployment.submissions()) == 2


def test_a_job_is_asked_to_end_without_waiting_for_it(slurm: SlurmCluster, deploy: Deploy, tmp_path: Path) -> None:
    """As by the orphan sensor, whose ticks have a minute."""
    deployment = deploy(slurm, told={"gate": str(tmp_path / "gate")})
    run = CommandLine(deployment).start("topk_cache", partition=("--partition-range", f"{ALL[0]}...{ALL[1]}"))
    wait_until("its tasks run", lambda: "RUNNING" in " ".join(deployment.alive()))
    run.kill()
    run.communicate(timeout=RUN_S)
    (submission,) = deployment.submissions()
    deployment.slurm.begin_cancelling([submission])
    assert (submission.folder / "cancelled").exists()
    wait_until("none of its tasks is alive", lambda: not deployment.alive())
    deployment.slurm.begin_cancelling([submission])  # of one that is gone: nothing to do


def test_a_finished_job_is_no_orphan_and_over_once_the_cluster_has_forgotten_it(
    make_cluster: MakeCluster, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "SETTLING_S", 0.0)
    deployment = deploy(make_cluster(nodes=2, min_job_age_s=2), profile={"absence_grace_s": 3})
    assert deployment.run("topk_cache", partition_range=ALL).success
    wait_until("the cluster has forgotten it", lambda: not deployment.array_jobs())
    settled = orphans.settle_orphans(
        deployment.instance, deployment.recipe, deployment.slurm, deployment.platform.jobs_folder
    )
    assert [type(s) for s in settled] == [dg.SkipReason]
    # Each look is another process's: what one has missed first, the next goes on waiting for.
    wait_until("it is over", lambda: not deployment.slurm.live("tiny", "teacher"))
    (submission,) = deployment.submissions()
    states = deployment.slurm.poll([submission]).states[submission]
    assert {s.phase for s in states.values()} == {TaskPhase.ENDED}
    assert not any(followers(submission).values())


def test_what_a_job_leaves_on_disk_is_for_its_user_and_group_only(slurm: SlurmCluster, deploy: Deploy) -> None:
    deployment = deploy(slurm)
    assert deployment.run("topk_cache", partition=KEYS[0]).success
    (submission,) = deployment.submissions()
    files = [p for p in submission.folder.rglob("*") if p.is_file()]
    assert len(files) > 5
    assert {oct(p.stat().st_mode & 0o007) for p in files} == {"0o0"}
