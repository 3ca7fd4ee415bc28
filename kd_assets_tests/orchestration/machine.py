"""The services of a deployment in processes of their own, which can all be killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from kd_assets.dagster_internals import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from kd_assets.orchestration.platform import PROJECT_FOLDER
from kd_assets_tests.orchestration.command_line import CommandLine
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment
from kd_assets_tests.ports import reserve_ports

SERVICES = {"daemon": ("dagster._daemon", "run"), "web server": ("dagster_webserver",)}


class Machine:
    """A daemon, with the project's own dagster.yaml, and a web server where it is asked for."""

    def __init__(self, command_line: CommandLine) -> None:
        self.deployment, self._file = command_line.deployment, command_line.file
        self.home = Path(self.deployment.instance.root_directory)
        shutil.copy(PROJECT_FOLDER / "dagster.yaml", self.home)
        self._log = (self.home / "services.log").open("ab")
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = contextlib.ExitStack()

    def _dagster(self, *words: str) -> list[str]:
        return [sys.executable, "-m", *words, "-f", str(self._file)]

    @property
    def _env(self) -> dict[str, str]:
        return {**os.environ, "DAGSTER_HOME": str(self.home)}

    def start(self, service: str) -> None:
        port = ["--port", str(*reserve_ports(1, until=self._ports))] if service == "web server" else []
        words = [*self._dagster(*SERVICES[service]), *port]
        self._services[service] = subprocess.Popen(words, env=self._env, stdout=self._log, stderr=self._log)

    def launch(self, job: str) -> None:
        """Have the daemon run a job over all partitions."""
        tags = json.dumps({ASSET_PARTITION_RANGE_START_TAG: SHARDS[0], ASSET_PARTITION_RANGE_END_TAG: SHARDS[2]})
        words = ("dagster", "job", "launch", "-j", job, "--tags", tags)
        subprocess.run(self._dagster(*words), env=self._env, check=True, stdout=self._log, stderr=self._log)

    def processes_of(self, service: str) -> list[psutil.Process]:
        """The service and all that it has started: code servers, and runs with the supervisors of their jobs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._services[service].pid)
            return [own, *own.children(recursive=True)]
        return []

    def kill(self, service: str, *, alone: bool = False) -> None:
        """With all that it has started, or alone, which leaves orphans."""
        kill_all(self.processes_of(service)[: 1 if alone else None])
        self._services.pop(service).wait()

    def power_off(self) -> None:
        """Every process at once: services, runs, supervisors and workers."""
        kill_all([process for service in self._services for process in self.processes_of(service)])
        for service in self._services.values():
            service.wait()
        self._services.clear()

    def close(self) -> None:
        self.power_off()
        self._ports.close()
        self._log.close()

    def said(self) -> str:
        return (self.home / "services.log").read_text()


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def everything_is_recorded(deployment: Deployment) -> bool:
    keys = [deployment.recipe.key(asset) for asset in ("shards_manifest", *CACHES)]
    return all(deployment.instance.get_materialized_partitions(key) == set(SHARDS) for key in keys)
