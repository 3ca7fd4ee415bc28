"""The benchmark of exports measures what it says it does, of every format."""

from __future__ import annotations

from pathlib import Path

from kd_assets.export.formats import FORMATS
from kd_assets_tests.benchmarks import exports


def test_every_format_has_its_figures_or_the_reason_why_not(tmp_path: Path) -> None:
    figures = exports.measure(
        tmp_path, formats=["hf", "safetensors"], state_documents=2, topk_documents=4, hidden_size=8, rounds=1
    )
    for name in ("hf", "safetensors"):
        for prefix in (name, f"{name}_topk"):
            assert figures[f"{prefix}_mb_per_s"] > 0
            assert figures[f"{prefix}_share_of_copy"] > 0
            assert figures[f"{prefix}_cpu_s_per_gb"] > 0
            assert figures[f"{prefix}_peak_rss_mb"] > 10
    assert set(FORMATS) >= {"hf", "safetensors", "original"}


def test_a_format_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    figures = exports.measure(
        tmp_path, formats=["nobodys"], state_documents=2, topk_documents=4, hidden_size=8, rounds=1
    )
    assert figures.keys() == {"nobodys_error"}
    assert "there is no export format 'nobodys'" in figures["nobodys_error"]
