from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kd_assets_tests.orchestration.command_line import CommandLine
from kd_assets_tests.orchestration.deployment import Deployment, make_tiny_teacher


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def deploy(tmp_path: Path, tiny_teacher: Path) -> Iterator[Callable[..., Deployment]]:
    """Makes deployments in this test's folder, all on one Dagster instance."""
    (tmp_path / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "instance")) as instance:

        def make(**changes: Any) -> Deployment:
            home = tmp_path / "home with a space"
            home.mkdir(exist_ok=True)
            return Deployment(home, tiny_teacher, instance, **changes)

        yield make


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    made = deploy()
    made.plan()
    return made


@pytest.fixture
def command_line(deployment: Deployment) -> Iterator[CommandLine]:
    made = CommandLine(deployment)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()
