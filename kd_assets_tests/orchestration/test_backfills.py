"""Backfills of many partitions, as the web UI launches them and the daemon makes runs of them: few runs, one job array
each, cancelled in the middle and asked for again."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import dagster as dg
import pytest

from kd_assets.contract import read_job
from kd_assets.orchestration.platform import PROJECT_FOLDER, Platform
from kd_assets.store import put_aside
from kd_assets_tests.benchmarks.do_nothing import write_python
from kd_assets_tests.benchmarks.only_commits import HOLD
from kd_assets_tests.benchmarks.scheduler import CACHE_SETTINGS
from kd_assets_tests.orchestration.dagster_daemon import dagster_daemon
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, documents
from kd_assets_tests.slurm.deployment import commit_shards

pytestmark = pytest.mark.slow
N, N_TASKS = 400, 2


class MakeDeployment(Protocol):
    def __call__(self, n_partitions: int) -> Deployment: ...


@pytest.fixture
def make_deployment(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDeployment]:
    """On the checkout's dagster.yaml. Its shards are committed; jobs commit tiny results at once."""
    (dagster_home := tmp_path / "dagster").mkdir()
    shutil.copy(PROJECT_FOLDER / "dagster.yaml", dagster_home)
    monkeypatch.setenv("DAGSTER_HOME", str(dagster_home))
    (home := tmp_path / "home").mkdir()
    write_python(home / "python", module="kd_assets_tests.benchmarks.only_commits")
    with dg.DagsterInstance.from_config(str(dagster_home)) as instance:

        def make(n_partitions: int) -> Deployment:
            made = Deployment(
                home,
                tiny_teacher,
                instance,
                platform=Platform(home=str(home), compute_python=str(home / "python")),
                documents_per_shard=1,
                caches=dict(CACHE_SETTINGS.values()),
                jobs={"teacher": {"n_tasks": N_TASKS, "concurrency": N_TASKS}},
            )
            made.write(documents(n_partitions))
            made.plan()
            commit_shards(made)
            return made

        yield make
        (home / HOLD).unlink(missing_ok=True)  # or jobs would wait for ever


def recorded(deployment: Deployment) -> int:
    """Of how many partitions all caches are."""
    keys = [deployment.recipe.key(asset) for asset in CACHES]
    return min(len(deployment.instance.get_materialized_partitions(key)) for key in keys)


def partitions_of_jobs(deployment: Deployment) -> list[list[str]]:
    """Of each job of the teacher, in the order of their submission."""
    files = sorted((deployment.home / "jobs").glob("*/teacher-*/*/job.json"), key=lambda f: f.stat().st_mtime)
    return [[unit.partition_key for unit in read_job(file).units] for file in files]


def n_commits(deployment: Deployment) -> Counter[str]:
    """How often tasks committed each result."""
    return Counter(f"{e.data['asset']} {e.data['partition_key']}" for e in deployment.job_events("committed"))


def last_line(deployment: Deployment, run: dg.DagsterRun) -> list[int]:
    """The numbers of the line that says what became of the partitions."""
    (line,) = [line for line in deployment.log_lines(run.run_id) if re.match(r"(stopped: )?[\d,]+ made, ", line)]
    return [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:made|reused|failed|are left)", line)]


def test_a_backfill_that_is_cancelled_and_launched_again_is_one_run_and_one_array_each_time_and_makes_nothing_twice(
    make_deployment: MakeDeployment,
) -> None:
    deployment = make_deployment(N)
    hold = deployment.home / HOLD
    with dagster_daemon(deployment) as daemon:
        hold.touch()
        first = daemon.backfill()
        daemon.run_until(lambda: recorded(deployment) == N_TASKS, "a partition of each task")
        daemon.cancel(first)
        daemon.run_until(lambda: daemon.status(first)[0] == "CANCELED", "the end of the cancelled backfill")
        hold.unlink()
        (run,) = daemon.runs_of(first)
        assert run.status is dg.DagsterRunStatus.CANCELED
        assert deployment.platform.make_scheduler().live("tiny", "teacher") == []
        n_done = recorded(deployment)
        assert n_done == N_TASKS
        assert last_line(deployment, run) == [n_done, 0, 0, N - n_done]
        shown = daemon.status(first)[1]["embedding_cache"]
        assert shown == (N, 0, n_done, N - n_done), "of a cancelled backfill Dagster's page counts the rest as failed"

        second = daemon.backfill()
        daemon.run_until(lambda: daemon.status(second)[0] != "REQUESTED", "the end of the backfill")
        assert daemon.status(second) == ("COMPLETED_SUCCESS", dict.fromkeys(CACHES, (N, 0, N, 0)))
        (run,) = daemon.runs_of(second)
        assert last_line(deployment, run) == [N - n_done, n_done, 0]
        jobs = [len(partitions) for partitions in partitions_of_jobs(deployment)]
        assert jobs == [N, N - n_done], "one array a run, and the second of the rest alone"
        commits = n_commits(deployment)
        assert (len(commits), set(commits.values())) == (len(CACHES) * N, {1}), "nothing was made twice"


def test_a_backfill_of_all_makes_what_is_missing_stale_or_put_aside_and_waits_for_what_a_live_run_is_at(
    make_deployment: MakeDeployment,
) -> None:
    deployment = make_deployment(12)
    instance, hold = deployment.instance, deployment.home / HOLD
    keys = instance.get_dynamic_partitions("tiny_shards")
    with dagster_daemon(deployment) as daemon:
        first = daemon.backfill(keys[:6])
        daemon.run_until(lambda: daemon.status(first)[0] == "COMPLETED_SUCCESS", "the first six")
        put_aside(deployment.platform.recipe_folder("tiny"), [keys[1]], ["topk_cache"], why="a bad node")
        changed = documents(12)
        changed[3]["text"] += " then it sleeps"
        deployment.write(changed)
        deployment.plan()
        commit_shards(deployment, [keys[3]])

        hold.touch()
        night = daemon.launch("tiny_caches", keys[6], keys[8])
        daemon.run_until(lambda: recorded(deployment) == 6 + N_TASKS, "a partition of each task of the night's run")
        second = daemon.backfill()
        daemon.run_until(lambda: daemon.runs_of(second), "its run")
        daemon.tick()
        assert [run.status for run in daemon.runs_of(second)] == [dg.DagsterRunStatus.QUEUED], "the pool has one slot"
        instance.event_log_storage.set_concurrency_slots("tiny_teacher", 2)
        daemon.run_until(lambda: len(partitions_of_jobs(deployment)) == 3, "the job of the second backfill")
        hold.unlink()
        daemon.run_until(lambda: daemon.status(second)[0] != "REQUESTED", "the end of the second backfill")
        assert daemon.status(second) == ("COMPLETED_SUCCESS", dict.fromkeys(CACHES, (12, 0, 12, 0)))
        assert partitions_of_jobs(deployment) == [keys[:6], keys[6:9], [keys[1], keys[3], *keys[9:]]]
        (run,) = daemon.runs_of(second)
        n_made, n_reused, n_failed = last_line(deployment, run)
        assert (n_made + n_reused, n_failed) == (12, 0)
        daemon.run_until(lambda: instance.get_run_by_id(night).is_finished, "the end of the night's run")  # type: ignore[union-attr]
        (run,) = instance.get_runs(dg.RunsFilter(run_ids=[night]))
        assert last_line(deployment, run) == [3, 0, 0]
    again = Counter({f"{asset} {keys[3]}": 1 for asset in CACHES} | {f"topk_cache {keys[1]}": 1})
    once = Counter(f"{asset} {key}" for asset in CACHES for key in keys)
    assert n_commits(deployment) == once + again


def test_a_run_that_finds_partitions_committed_says_how_many_while_it_looks_and_before_it_makes_the_rest(
    deploy: Callable[..., Deployment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_python(tmp_path / "python", module="kd_assets_tests.benchmarks.only_commits")
    home = tmp_path / "home with a space"
    platform = Platform(home=str(home), compute_python=str(tmp_path / "python"))
    small = deploy(platform=platform, caches=dict(CACHE_SETTINGS.values()))
    small.plan()
    commit_shards(small)
    assert small.run(*CACHES, partition=SHARDS[1]).success
    monkeypatch.setattr("kd_assets.orchestration.run.EVERY_S", 0.0)
    run = small.run(*CACHES, partition_range=(SHARDS[0], SHARDS[2]))
    assert run.success
    lines = small.log_lines(run.run_id)
    assert "teacher: 1 of 3 partitions found committed so far" in lines
    assert "teacher: 1 of 3 partitions are committed" in lines
