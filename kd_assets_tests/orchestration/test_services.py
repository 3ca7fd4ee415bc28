"""The services of docs/deploy, started by the very commands of their units, on PostgreSQL, and killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]

from kd_assets.dagster_internals import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.project import PROJECT_FOLDER
from kd_assets_tests.benchmarks.do_nothing import write_python
from kd_assets_tests.benchmarks.only_commits import HOLD
from kd_assets_tests.benchmarks.scheduler import CACHE_SETTINGS
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, write_definitions
from kd_assets_tests.orchestration.postgresql_server import PostgresqlServer, server_programs
from kd_assets_tests.orchestration.web_queries import LAUNCH_RUN
from kd_assets_tests.ports import reserve_ports
from kd_assets_tests.slurm.deployment import commit_shards

pytestmark = pytest.mark.skipif(
    server_programs() is None and "CI" not in os.environ, reason="no PostgreSQL server: .ci/install-postgresql"
)
DEPLOY = PROJECT_FOLDER / "docs" / "deploy"
SERVICES = ("code", "daemon", "web", "guests")


class Services:
    """As systemd runs them, but on free ports, in a folder of a test."""

    def __init__(self, folder: Path, deployment: Deployment, url: str) -> None:
        self._folder, self._deployment = folder, deployment
        shutil.copy(DEPLOY / "workspace.yaml", folder)
        definitions = write_definitions(deployment)
        self._reserved = contextlib.ExitStack()
        ports = reserve_ports(3, until=self._reserved)
        self._env = {
            **os.environ,
            "PYTHONPATH": f"{definitions.parent}:{PROJECT_FOLDER}",
            "DAGSTER_HOME": deployment.instance.root_directory,
            "DAGSTER_POSTGRES_URL": url,
            "KD_CODE": definitions.stem,
            **dict(zip(("KD_CODE_PORT", "KD_WEB_PORT", "KD_GUESTS_PORT"), map(str, ports), strict=True)),
        }
        self._log = (folder / "services.log").open("ab")
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, service: str) -> None:
        self._started[service] = subprocess.Popen(
            command_of(service, self._folder, self._env),
            env=self._env,
            cwd=self._deployment.home,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def kill(self, service: str) -> None:
        """kill -9 of the unit's main process."""
        process = self._started.pop(service)
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self._started.values():
            process.terminate()
        for process in self._started.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._reserved.close()
        self._log.close()

    def said(self) -> str:
        return (self._folder / "services.log").read_text()

    def launch(self, service: str) -> dict[str, Any]:
        """What the web server says to a run of all caches over all partitions."""
        tags = {ASSET_PARTITION_RANGE_START_TAG: SHARDS[0], ASSET_PARTITION_RANGE_END_TAG: SHARDS[-1]}
        variables = {
            "selector": {
                "repositoryLocationName": "kd_assets",
                "repositoryName": "__repository__",
                "jobName": "tiny_caches",
            },
            "metadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
        }
        return dict(self._ask(service, LAUNCH_RUN, variables)["launchRun"])

    def wait_for_definitions(self, service: str) -> None:
        query = "{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError { __typename } } } } }"

        def is_loaded() -> bool:
            try:
                entries = self._ask(service, query, {})["workspaceOrError"]["locationEntries"]
            except (urllib.error.URLError, ConnectionError):
                return False
            return [e["locationOrLoadError"]["__typename"] for e in entries] == ["RepositoryLocation"]

        self.wait_until(is_loaded)

    def wait_until(self, happened: Any, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.said()[-6000:]
            time.sleep(0.1)

    def _ask(self, service: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._env[f'KD_{service.upper()}_PORT']}/graphql",
            data=json.dumps({"query": query, "variables": variables}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=240) as answer:
            return dict(json.loads(answer.read())["data"])


def command_of(service: str, etc: Path, env: dict[str, str]) -> list[str]:
    (line,) = re.findall(r"^ExecStart=(.*)$", (DEPLOY / f"kd-assets-{service}.service").read_text(), re.MULTILINE)
    line = line.replace("/srv/kd-assets/venv/bin/", f"{Path(sys.executable).parent}/").replace(
        "/etc/kd-assets", str(etc)
    )
    return [re.sub(r"\$\{(\w+)\}", lambda name: env[name[1]], word) for word in line.split()]


@pytest.fixture
def services(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    (tmp_path / "instance").mkdir()
    (tmp_path / "home").mkdir()
    shutil.copy(DEPLOY / "dagster.yaml", tmp_path / "instance")
    write_python(tmp_path / "home" / "python", module="kd_assets_tests.benchmarks.only_commits")
    with PostgresqlServer() as server:
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", server.url)
        with dg.DagsterInstance.from_config(str(tmp_path / "instance")) as instance:
            platform = Platform(home=str(tmp_path / "home"), compute_python=str(tmp_path / "home" / "python"))
            deployment = Deployment(
                tmp_path / "home", tiny_teacher, instance, platform=platform, caches=dict(CACHE_SETTINGS.values())
            )
            deployment.plan()
            commit_shards(deployment)
            made = Services(tmp_path, deployment, server.url)
            yield made
            (tmp_path / "home" / HOLD).unlink(missing_ok=True)
            made.close()


@pytest.mark.slow
def test_services_that_are_killed_one_after_the_other_leave_nothing_stuck(services: Services) -> None:
    deployment = services._deployment
    instance, hold = deployment.instance, deployment.home / HOLD
    for service in SERVICES:
        services.start(service)
    services.wait_for_definitions("guests")
    assert services.launch("guests")["__typename"] == "UnauthorizedError"
    services.wait_for_definitions("web")
    hold.touch()
    run_id = services.launch("web")["run"]["runId"]
    key = deployment.recipe.key("topk_cache")
    services.wait_until(lambda: len(instance.get_materialized_partitions(key)) == 1)
    for service in ("code", "daemon", "web"):
        services.kill(service)
        services.start(service)
    hold.unlink()
    services.wait_until(lambda: instance.get_run_by_id(run_id).status is dg.DagsterRunStatus.SUCCESS)  # type: ignore[union-attr]
    assert all(instance.get_materialized_partitions(deployment.recipe.key(a)) == set(SHARDS) for a in CACHES)
    services.wait_for_definitions("web")
    again = services.launch("web")["run"]["runId"]
    services.wait_until(lambda: instance.get_run_by_id(again).status is dg.DagsterRunStatus.SUCCESS)  # type: ignore[union-attr]


def test_the_dagster_yaml_of_production_is_that_of_the_checkout_but_for_what_it_says() -> None:
    ours, production = (yaml.safe_load((f / "dagster.yaml").read_text()) for f in (PROJECT_FOLDER, DEPLOY))
    assert {name for name in production if production[name] != ours.get(name)} == {
        "storage",
        "retention",
        "concurrency",
    }
    assert ours.keys() <= production.keys()


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    for unit in sorted(DEPLOY.glob("*.service")):
        text = unit.read_text().replace("/srv/kd-assets/venv/bin/", "/bin/").replace("User=kd-assets\n", "")
        (tmp_path / unit.name).write_text(
            re.sub(r"^ExecStart=/bin/\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
        )
    units = [str(unit) for unit in sorted(tmp_path.glob("*.service"))]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
