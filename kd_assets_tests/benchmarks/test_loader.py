"""The benchmark of readers measures what it says it does."""

from __future__ import annotations

from pathlib import Path

from kd_assets_tests.benchmarks import loader


def test_every_figure_is_measured(tmp_path: Path) -> None:
    figures = loader.open_million(tmp_path / "open", n_documents=200, rounds=1)
    figures |= loader.topk_rate(tmp_path / "topk", n_tokens=8_192, rounds=1)
    figures |= loader.hidden_ratio(tmp_path / "hidden", n_tokens=2_048, rounds=1)
    assert all(figures[name] > 0 for name in figures if name != "open_1m_rss_mb")
    assert set(figures) == {
        "open_1m_documents_s",
        "open_1m_rss_mb",
        "loader_tokens_per_s",
        "loader_tokens_per_cpu_s",
        "loader_packed_tokens_per_s",
        "loader_packed_tokens_per_cpu_s",
        "hidden_plain_read_mb_per_s",
        "loader_hidden_ratio",
        "loader_hidden_first_ratio",
    }
