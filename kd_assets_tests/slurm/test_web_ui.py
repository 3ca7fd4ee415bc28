"""The web UI over a real SLURM cluster: a backfill that outlives what happens to it, and a termination that is one."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from selenium import webdriver

from kd_assets_tests.orchestration.deployment import make_tiny_teacher
from kd_assets_tests.slurm.cluster import SlurmCluster
from kd_assets_tests.slurm.deployment import KEYS, PARTS_OF_A_PARTITION, SlurmDeployment
from kd_assets_tests.ui.conftest import NO_BROWSER, browser, dagster_home, instance  # noqa: F401 - fixtures
from kd_assets_tests.ui.web_ui import click, dagster_dev, wait_for

pytestmark = [pytest.mark.ui, pytest.mark.slow, NO_BROWSER]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A deployment on a cluster of its own, and its web UI. Each task of its stub teacher makes one partition, and the
    others once the gate is there."""

    cluster: SlurmCluster
    deployment: SlurmDeployment
    dagster_home: Path
    gate: Path

    @contextmanager
    def web_ui(self) -> Iterator[str]:
        with dagster_dev(self.deployment, self.dagster_home, self.cluster.env) as url:
            yield url

    @property
    def materialized(self) -> set[str]:
        return self.deployment.instance.get_materialized_partitions(self.deployment.recipe.key("topk_cache"))

    def runs(self, *statuses: dg.DagsterRunStatus) -> list[dg.DagsterRun]:
        return list(self.deployment.instance.get_runs(dg.RunsFilter(statuses=list(statuses) or None)))

    def running(self) -> list[dg.DagsterRun]:
        """Runs of the caches that are under way."""
        return [r for r in self.runs(dg.DagsterRunStatus.STARTED) if self.deployment.submissions()]

    def process_of(self, run: dg.DagsterRun) -> int:
        """The process id that Dagster says it started for a run."""
        for record in self.deployment.instance.get_records_for_run(run.run_id).records:
            if found := re.search(r"Started process for run \(pid: (\d+)\)", record.event_log_entry.message or ""):
                return int(found[1])
        raise AssertionError(f"no process is known for {run.run_id}")

    def nodes_at_work(self) -> list[str]:
        text = self.cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%N").stdout
        return [name for name in text.split() if name]

    def live_jobs(self) -> list[str]:
        return self.cluster.run("squeue", "--noheader", "--format=%i").stdout.split()


@pytest.fixture
def site(
    make_cluster: Callable[..., SlurmCluster],
    instance: dg.DagsterInstance,  # noqa: F811
    dagster_home: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Site:
    cluster = make_cluster()
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    gate = tmp_path / "gate"
    told = {"gate": str(gate), "before_gate": PARTS_OF_A_PARTITION}
    deployment = SlurmDeployment(
        tmp_path / "home", make_tiny_teacher(tmp_path / "teacher"), instance, cluster, told=told
    )
    return Site(cluster=cluster, deployment=deployment, dagster_home=dagster_home, gate=gate)


def backfill_all(browser: webdriver.Chrome, address: str) -> None:  # noqa: F811
    browser.get(f"{address}/assets/tiny/topk_cache?view=partitions")
    click(browser, "Materialize")
    click(browser, "All")
    click(browser, "Launch")


def test_a_backfill_ends_with_every_partition_though_its_run_and_a_node_are_killed(
    site: Site,
    browser: webdriver.Chrome,  # noqa: F811
) -> None:
    with site.web_ui() as address:
        backfill_all(browser, address)
        wait_for(lambda: site.materialized, "the first partition")
        (first,) = site.running()
        os.kill(site.process_of(first), signal.SIGKILL)
        wait_for(lambda: [r for r in site.running() if r.run_id != first.run_id], "the run that takes over")
        node = wait_for(site.nodes_at_work, "a node at work")[0]
        site.cluster.kill(f"slurmd{site.cluster.nodes.index(node)}")
        site.cluster.set_node(site.cluster.nodes.index(node), "down")
        site.gate.touch()
        wait_for(lambda: site.materialized == set(KEYS), "all partitions")
        wait_for(lambda: all(r.is_finished for r in site.runs()), "the end of all runs")
        backfills = wait_for(
            lambda: [b for b in site.deployment.instance.get_backfills() if b.status.value.startswith("COMPLETED")],
            "the end of the backfill",
        )
    assert [b.status.value for b in backfills] == ["COMPLETED_SUCCESS"]
    assert site.live_jobs() == []
    assert len(site.deployment.array_jobs()) == 1, "the second run found the job of the first"


def test_terminating_a_run_in_the_ui_cancels_its_job_and_stopping_the_server_does_not(
    site: Site,
    browser: webdriver.Chrome,  # noqa: F811
) -> None:
    with site.web_ui() as address:
        backfill_all(browser, address)
        wait_for(lambda: site.materialized, "the first partition")
    assert site.live_jobs(), "the web server and the daemon are gone, the job is not"
    with site.web_ui() as address:
        (run,) = wait_for(site.running, "the run that takes over")[:1]
        browser.get(f"{address}/runs/{run.run_id}")
        click(browser, "Terminate")
        click(browser, "Terminate")
        wait_for(lambda: not site.live_jobs(), "the end of the job")
        wait_for(lambda: all(r.is_finished for r in site.runs()), "the end of the run")
    assert site.deployment.instance.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.CANCELED  # type: ignore[union-attr]
    assert site.materialized < set(KEYS)


CANCEL = """mutation($id: String!) { cancelPartitionBackfill(backfillId: $id) { __typename } }"""


def test_cancelling_a_backfill_cancels_its_job(site: Site, browser: webdriver.Chrome) -> None:  # noqa: F811
    with site.web_ui() as address:
        backfill_all(browser, address)
        wait_for(lambda: site.materialized, "the first partition")
        (backfill,) = site.deployment.instance.get_backfills()
        query = json.dumps({"query": CANCEL, "variables": {"id": backfill.backfill_id}}).encode()
        request = urllib.request.Request(f"{address}/graphql", query, {"Content-Type": "application/json"})
        assert b"CancelBackfillSuccess" in urllib.request.urlopen(request).read()
        wait_for(lambda: not site.live_jobs(), "the end of the job")
        wait_for(
            lambda: [r for r in site.runs(dg.DagsterRunStatus.CANCELED) if "dagster/backfill" in r.tags],
            "its run's end",
        )
    assert site.materialized < set(KEYS)
