"""`dagster asset materialize` on a test's deployment, in processes that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from kd_assets.scheduler import LocalScheduler, Submission
from kd_assets.scheduler.local.scheduler import process_group
from kd_assets_tests.orchestration.deployment import Deployment, write_definitions


class CommandLine:
    """`dagster asset materialize` on a deployment, in processes of its own."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.file = write_definitions(deployment)
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self, *assets: str, partition: tuple[str, ...] = (), has_dagster_home: bool = True
    ) -> subprocess.Popen[str]:
        selection = " or ".join(f'key:"tiny/{a}"' for a in assets)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dagster",
                "asset",
                "materialize",
                "-f",
                str(self.file),
                "--select",
                selection,
                *partition,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "DAGSTER_HOME": self.deployment.instance.root_directory if has_dagster_home else ""},
            cwd=self.deployment.home,
        )
        self.started.append(process)
        return process

    def run(self, *assets: str, partition: tuple[str, ...] = (), has_dagster_home: bool = True) -> tuple[int, str]:
        process = self.start(*assets, partition=partition, has_dagster_home=has_dagster_home)
        text, _ = process.communicate(timeout=600)
        return process.returncode, text

    def wait_for_task(self, kind: str) -> tuple[LocalScheduler, Submission]:
        """The submission of this kind, once its task has begun."""
        deadline = time.monotonic() + 300
        while not (found := list((self.deployment.home / "jobs").glob(f"tiny/{kind}-*/*/events/*.jsonl"))):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        scheduler = self.deployment.platform.make_scheduler()
        assert isinstance(scheduler, LocalScheduler)
        return scheduler, Submission(folder=found[0].parents[1])


def group_of(submission: Submission) -> int:
    group = process_group(submission)
    assert group is not None
    return group
