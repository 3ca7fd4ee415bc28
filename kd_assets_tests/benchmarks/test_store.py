"""The benchmark of the store measures what it says it does."""

from __future__ import annotations

import importlib
import inspect
import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kd_assets.store.arrays import flat
from kd_assets.store.codecs.topk_rows import list_offsets
from kd_assets.store.writing.encode import list_array, vector_array
from kd_assets_tests.benchmarks import loader, store, store_states, store_topk

FIGURES = {
    "topk_bytes_per_token",
    "compact_draws_bytes_per_token",
    "topk_kl",
    "topk_kl_t2",
    "topk_write_speedup",
    "topk_read_speedup",
    "hidden_bytes_ratio",
    "hidden_write_ratio",
    "hidden_read_ratio",
    "loader_tokens_per_s",
    "open_1m_documents_s",
    "fp8_rel_rms",
    "int8_rel_rms",
}
"""What a cache is judged by."""


@pytest.mark.parametrize("name", store.OTHERS)
def test_every_module_that_is_gathered_measures_without_being_told_anything(name: str) -> None:
    measure = importlib.import_module(f"kd_assets_tests.benchmarks.{name}").measure
    inspect.signature(measure).bind()


def test_the_command_prints_every_figure_that_a_cache_is_judged_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    small = partial(loader.measure, tmp_path, n_documents=200, n_tokens=2_048, n_hidden_tokens=2_048, rounds=1)
    monkeypatch.setattr(loader, "measure", small)
    for name, value in (("N_DOCUMENTS", 2), ("STEPS", 2), ("TRAINED_TOKENS", 300), ("HIDDEN_SIZE", 128)):
        monkeypatch.setattr(store_states, name, value)
    monkeypatch.setattr("sys.argv", ["store", "--json", "--tokens", "2048", "--rounds", "1"])
    store.main()
    figures = json.loads(capsys.readouterr().out)
    assert {name for name in FIGURES if not figures.get(name, 0) > 0} == set()


def test_draws_are_those_of_the_distribution_that_they_lie_beside() -> None:
    ids, logprobs = store_topk.made_up_rows(2048)
    drawn = store_topk.made_up_draws(ids, logprobs)
    share_of_first = (drawn == ids[:, :1]).mean(axis=1)
    np.testing.assert_allclose(share_of_first.mean(), np.exp(logprobs[:, 0]).mean(), atol=0.01)
    assert np.corrcoef(share_of_first, np.exp(logprobs[:, 0]))[0, 1] > 0.9


def test_the_codec_of_top_k_caches_has_its_figures_and_is_within_its_targets() -> None:
    figures = store_topk.measure(n_tokens=8192, rounds=1, layouts=True)
    assert figures["topk_bytes_per_token"] <= 42
    assert figures["compact_draws_4096_bytes_per_token"] < figures["compact_draws_bytes_per_token"] <= 32
    assert figures["compact_draws_bytes_per_token"] < 0.6 * figures["plain_draws_bytes_per_token"]
    assert figures["topk_bytes_per_token_without_logsumexp"] < figures["topk_bytes_per_token"]
    assert figures["topk_bytes_per_token"] < 0.7 * figures["topk_plain_bytes_per_token"]
    assert figures["topk_kl"] <= 3e-5
    assert 1 < figures["topk_top_p_mean_kept"] < 16
    assert figures["topk_top_p_bytes_per_token"] < figures["topk_bytes_per_token"]
    assert figures["topk_top_p_kl"] <= 3e-5
    assert figures["topk_kl_t2"] <= 3e-5
    assert figures["topk_kl_without_tail_byte"] > 3 * figures["topk_kl"]
    assert figures["layout_binary_bytes_per_token"] <= figures["layout_uint_lists_bytes_per_token"]
    for way in ("write", "read"):
        assert figures[f"topk_{way}_speedup"] > 0


def test_ids_that_are_spread_over_a_larger_vocabulary_stay_different_and_their_targets_theirs() -> None:
    table = store_topk.made_up_table(1024)
    names = [table.schema.get_field_index(name) for name in ("topk_ids", "input_ids")]
    for at in names:  # of 4,096 ids, as the demo's are
        column = table.column(at).combine_chunks()
        leaf = flat(column)
        small = pa.array(np.arange(len(leaf), dtype=np.uint32) % 4096 if at == names[0] else leaf % 4096)
        small = vector_array(small.to_numpy().reshape(-1, store_topk.K)) if at == names[0] else small
        table = table.set_column(at, table.schema.field(at), list_array(list_offsets(table.column(at)), small))
    wide = store_topk.spread_ids(table)
    narrow_Mk, wide_Mk = (flat(x["topk_ids"]).reshape(-1, store_topk.K) for x in (table, wide))
    assert all(len(set(row)) == len(row) for row in wide_Mk.tolist())
    assert wide_Mk.max() > 120_000
    np.testing.assert_array_equal(wide_Mk[narrow_Mk < 256], narrow_Mk[narrow_Mk < 256])
    narrow_M, wide_M = (flat(x["input_ids"]).reshape(-1, 512)[:, 1:].reshape(-1, 1) for x in (table, wide))
    np.testing.assert_array_equal(narrow_Mk == narrow_M, wide_Mk == wide_M)
