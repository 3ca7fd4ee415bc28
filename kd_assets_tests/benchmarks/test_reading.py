"""The benchmark of readers measures what it says it does."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from kd_assets_tests.benchmarks import reading


def test_every_way_to_read_is_measured_over_all_documents(tmp_path: Path) -> None:
    with patch.object(reading, "HIDDEN_SIZE", 8), patch.object(reading, "PART_TOKENS", 1024):
        figures = reading.measure(tmp_path, n_tokens=2048, rounds=1)
    assert (figures["n_tokens"], figures["n_documents"]) == (2048, 4)
    for asset in reading.ASSETS:
        measured = figures[asset]
        assert isinstance(measured, dict)
        assert measured["n_parts"] == 2
        ways = [
            f"{cache}, {how}: {time}"
            for cache in ("warm", "cold")
            for how in ("believed", "verified")
            for time in ("first", "second")
        ]
        assert set(measured["seconds"]) == {*ways, "hashing alone, warm"}
