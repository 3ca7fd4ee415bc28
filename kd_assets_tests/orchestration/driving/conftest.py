from __future__ import annotations

from pathlib import Path

import pytest

from kd_assets_tests.orchestration.driving.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred real commits wait for no disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
