"""The benchmark of hidden states measures what it says it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_assets_tests.benchmarks import store_states as benchmark


def test_errors_and_bytes_are_of_every_codec_and_split_takes_fewest_of_those_that_lose_nothing(tmp_path: Path) -> None:
    whole = benchmark.documents([40, 1, 87])
    made_up = benchmark.made_up_states(whole.n_tokens, 256)[0]
    states: benchmark.States = {0: made_up, 5: made_up}
    figures = benchmark.sizes_and_errors(tmp_path, whole, states)
    assert 0.55 < figures["hidden_bytes_ratio"] < 0.8
    assert 0 < figures["fp8_rel_rms"] <= 0.03
    assert 0 < figures["int8_rel_rms"] < figures["int8_128_rel_rms"] <= 0.015
    assert figures["int8_rel_rms"] <= 0.01
    assert figures["split_rel_rms"] == 0
    assert figures["n_trained_tokens"] == whole.n_tokens


def test_every_codec_is_written_read_and_read_again_beside_a_plain_file(tmp_path: Path) -> None:
    figures = benchmark.speeds(tmp_path, hidden_size=128, n_documents=3, rounds=1)
    ways = {f"{codec} {way}" for codec in benchmark.CODECS for way in ("write", "first read", "read")}
    assert set(figures["mb_per_s"]) == ways | {"plain write", "plain read"}
    assert figures["hidden_write_ratio"] > 0
    assert figures["hidden_read_ratio"] > 0
    assert not list(tmp_path.iterdir()), "what was measured is removed"


def test_the_states_are_of_a_teacher_that_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    whole, states = benchmark.trained_states(tmp_path, steps=2, max_seconds=20.0, n_tokens=300)
    assert sorted(states, key=str) == list(range(6))
    assert {bits.shape for bits in states.values()} == {(whole.n_tokens, 256)}
    assert whole.n_tokens >= 300
