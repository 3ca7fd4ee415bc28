"""The benchmark of readers measures what it says it does."""

from __future__ import annotations

from pathlib import Path

from kd_assets.store import CacheReader
from kd_assets_tests.benchmarks import loader


def test_every_figure_is_measured(tmp_path: Path) -> None:
    figures = loader.measure(tmp_path, n_documents=200, n_tokens=8_192, n_hidden_tokens=2_048, rounds=1)
    assert not list(tmp_path.iterdir()), "what was measured is removed"
    assert all(figures[name] > 0 for name in figures if name != "open_1m_rss_mb")
    assert set(figures) == {
        "open_1m_documents_s",
        "open_1m_rss_mb",
        "loader_tokens_per_s",
        "loader_tokens_per_cpu_s",
        "loader_packed_tokens_per_s",
        "loader_packed_tokens_per_cpu_s",
        "loader_plain_tokens_per_s",
        "loader_plain_tokens_per_cpu_s",
        "loader_plain_packed_tokens_per_s",
        "loader_plain_packed_tokens_per_cpu_s",
        "hidden_plain_read_mb_per_s",
        "loader_hidden_ratio",
        "loader_hidden_first_ratio",
    }


def test_the_figures_of_the_name_are_of_the_compact_codec(tmp_path: Path) -> None:
    loader.topk_rate(tmp_path, n_tokens=2_048, rounds=1)
    for codec in ("compact", "plain"):
        (manifest,) = CacheReader(tmp_path / codec / loader.RECIPE, "topk_cache").manifests
        assert manifest.params.get("codec", "plain") == codec
