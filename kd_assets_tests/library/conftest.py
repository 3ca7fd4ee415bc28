from __future__ import annotations

from pathlib import Path

import pytest

from kd_assets_tests.library.environments import Environment, build_wheel, make_environment


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def service_node(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install kd-assets[control]`: no torch."""
    return make_environment(tmp_path_factory.mktemp("service") / "node", wheel, extra="control")


@pytest.fixture(scope="session")
def cluster_node(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install kd-assets[compute]`: no dagster."""
    return make_environment(tmp_path_factory.mktemp("cluster") / "node", wheel, extra="compute")
