"""The benchmark of the store measures what it says it does."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kd_assets.store.arrays import flat
from kd_assets.store.codecs.topk_columns import list_offsets
from kd_assets.store.writing.encode import list_array, vector_array
from kd_assets_tests.benchmarks import store_topk


def test_the_codec_of_top_k_caches_has_its_figures_and_is_within_its_targets() -> None:
    figures = store_topk.measure(n_tokens=8192, rounds=1, layouts=True)
    assert figures["topk_bytes_per_token"] <= 42
    assert figures["topk_bytes_per_token_without_logsumexp"] < figures["topk_bytes_per_token"]
    assert figures["topk_bytes_per_token"] < 0.7 * figures["topk_plain_bytes_per_token"]
    assert figures["topk_kl"] <= 3e-5
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
