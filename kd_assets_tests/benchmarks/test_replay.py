"""The benchmark of the replay server measures answers that are answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_assets_tests.benchmarks import exports, replay


def test_it_measures_positions_and_times() -> None:
    figures = replay.measure(n_documents=8, rounds=1)
    assert figures["replay_positions_per_s"] > 100
    assert figures["replay_binary_positions_per_s"] > 100
    assert figures["replay_p99_ms"] >= figures["replay_p50_ms"] > 0


def test_an_answer_that_is_an_error_is_no_figure(tmp_path: Path) -> None:
    exports.commit(tmp_path, "topk_cache", exports.documents(2, 16), hidden_size=8, part_documents=2)
    with replay.served(tmp_path / exports.RECIPE) as port, pytest.raises(RuntimeError, match="404"):
        replay.ask(port, "/v1/completions", [replay.completions([[1, 2, 3]])])
