"""The machine goes down in the middle of a run and comes up again, and nobody helps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil  # type: ignore[import-untyped]
import pytest

from kd_assets.dagster_internals import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from kd_assets.orchestration.platform import PROJECT_FOLDER
from kd_assets.store import verify
from kd_assets_tests.orchestration.command_line import CommandLine, group_of
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment


class Machine:
    """The services of a deployment, with the project's own dagster.yaml, in processes that can all be killed."""

    def __init__(self, command_line: CommandLine) -> None:
        self.deployment, self._file = command_line.deployment, command_line.file
        self._home = Path(self.deployment.instance.root_directory)
        shutil.copy(PROJECT_FOLDER / "dagster.yaml", self._home)
        self._log = (self._home / "daemon.log").open("ab")
        self._daemon: subprocess.Popen[bytes] | None = None

    def _dagster(self, *words: str) -> list[str]:
        return [sys.executable, "-m", *words, "-f", str(self._file)]

    @property
    def _env(self) -> dict[str, str]:
        return {**os.environ, "DAGSTER_HOME": str(self._home)}

    def boot(self) -> None:
        self._daemon = subprocess.Popen(
            self._dagster("dagster._daemon", "run"), env=self._env, stdout=self._log, stderr=self._log
        )

    def launch(self, job: str) -> None:
        tags = json.dumps({ASSET_PARTITION_RANGE_START_TAG: SHARDS[0], ASSET_PARTITION_RANGE_END_TAG: SHARDS[2]})
        words = ("dagster", "job", "launch", "-j", job, "--tags", tags)
        subprocess.run(self._dagster(*words), env=self._env, check=True, stdout=self._log, stderr=self._log)

    def power_off(self) -> None:
        """Every process at once: services, run, supervisor and worker."""
        if self._daemon is None or self._daemon.poll() is not None:
            return
        ours = psutil.Process(self._daemon.pid)
        for process in [ours, *ours.children(recursive=True)]:
            process.kill()
        self._daemon.wait()

    def close(self) -> None:
        self.power_off()
        self._log.close()

    def said(self) -> str:
        return (self._home / "daemon.log").read_text()


@pytest.fixture
def machine(command_line: CommandLine) -> Iterator[Machine]:
    made = Machine(command_line)
    yield made
    made.close()


def everything_is_recorded(deployment: Deployment) -> bool:
    keys = [deployment.recipe.key(asset) for asset in ("shards_manifest", *CACHES)]
    return all(deployment.instance.get_materialized_partitions(key) == set(SHARDS) for key in keys)


@pytest.mark.slow
def test_after_a_hard_reboot_everything_is_done_and_nobody_helped(command_line: CommandLine, machine: Machine) -> None:
    deployment = machine.deployment
    deployment.plan()
    machine.boot()
    machine.launch("tiny_caches")
    _, submission = command_line.wait_for_task("teacher")
    os.killpg(group_of(submission), signal.SIGKILL)
    machine.power_off()
    assert not everything_is_recorded(deployment)
    (run,) = deployment.instance.get_runs(dg.RunsFilter(job_name="tiny_caches"))
    assert run.status is dg.DagsterRunStatus.STARTED

    machine.boot()
    deadline = time.monotonic() + 240
    while not everything_is_recorded(deployment):
        assert time.monotonic() < deadline, machine.said()[-4000:]
        time.sleep(0.5)
    while deployment.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        assert time.monotonic() < deadline, machine.said()[-4000:]
        time.sleep(0.5)
    again, first = deployment.instance.get_runs(dg.RunsFilter(job_name="tiny_caches"))
    assert (again.status, first.status) == (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE)
    assert verify(deployment.platform.recipe_folder("tiny")).problems == ()
