"""The teacher that all consumers' exports are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_assets_tests.consumers.taught import Taught, make_taught


@pytest.fixture
def taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Taught:
    return make_taught(tmp_path, monkeypatch)
