"""Batches: every document once, within the budget, with little padding, and the same for every attempt."""

from __future__ import annotations

import numpy as np
import pytest

from kd_assets.teacher.batching import (
    PAD_ID,
    Batch,
    batch_rows,
    concatenated_ranges,
    padded_ids,
    padding_fraction,
    plan_batches,
)


def lengths(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def documents_of(batches: tuple[Batch, ...]) -> list[list[int]]:
    return [batch.documents_B.tolist() for batch in batches]


def test_every_document_is_in_exactly_one_batch() -> None:
    lengths_D = np.random.default_rng(0).integers(1, 400, 300)
    batches = plan_batches(lengths_D, token_budget=2000)
    assert sorted(np.concatenate([batch.documents_B for batch in batches])) == list(range(300))
    for batch in batches:
        assert batch.lengths_B.tolist() == lengths_D[batch.documents_B].tolist()
        assert batch.n_padded_tokens <= 2000


def test_documents_are_sorted_longest_first_and_equal_ones_stay_in_order() -> None:
    (batch,) = plan_batches(lengths(5, 9, 5, 7), token_budget=36)
    assert batch.documents_B.tolist() == [1, 3, 0, 2]
    assert batch.lengths_B.tolist() == [9, 7, 5, 5]


def test_budget_counts_padding() -> None:
    assert sorted(map(len, documents_of(plan_batches(lengths(10, 10, 10), token_budget=29)))) == [1, 2]


def test_document_longer_than_the_budget_runs_alone_and_whole() -> None:
    first, second = plan_batches(lengths(3, 50, 4), token_budget=10)
    assert first.documents_B.tolist() == [1]
    assert first.width == 50
    assert second.documents_B.tolist() == [2, 0]


def test_long_and_short_documents_part_where_padding_costs_more_than_a_batch() -> None:
    assert documents_of(plan_batches(lengths(500, 10, 10, 500), token_budget=10_000)) == [[0, 3], [1, 2]]
    assert documents_of(plan_batches(lengths(12, 10), token_budget=10_000)) == [[0, 1]]


def test_documents_above_the_batch_dependent_length_run_alone() -> None:
    assert documents_of(plan_batches(lengths(30, 31, 5, 32), token_budget=1000, alone_above=30)) == [[3], [1], [0, 2]]


def test_padding_of_a_real_mix_of_lengths_is_small() -> None:
    lengths_D = np.random.default_rng(1).lognormal(5.5, 0.8, 256).astype(np.int64) + 1
    assert padding_fraction(plan_batches(lengths_D, token_budget=16384)) < 0.03


def test_no_documents_make_no_batches() -> None:
    assert plan_batches(lengths(), token_budget=10) == ()
    assert padding_fraction(()) == 0.0


def test_rows_are_padded_on_the_right() -> None:
    input_ids_W = np.array([11, 12, 13, 21, 31, 32], dtype=np.uint32)
    (batch,) = plan_batches(lengths(3, 1, 2), token_budget=9)
    assert padded_ids(input_ids_W, lengths(0, 3, 4, 6), batch).tolist() == [
        [11, 12, 13],
        [31, 32, PAD_ID],
        [21, PAD_ID, PAD_ID],
    ]
    assert batch_rows(batch, batch.lengths_B).tolist() == [0, 1, 2, 3, 4, 6]


@pytest.mark.parametrize(
    ("starts", "sizes", "expected"),
    [([5, 0], [2, 3], [5, 6, 0, 1, 2]), ([7, 3], [0, 1], [3]), ([], [], []), ([4], [0], [])],
)
def test_ranges_are_concatenated(starts: list[int], sizes: list[int], expected: list[int]) -> None:
    assert concatenated_ranges(lengths(*starts), lengths(*sizes)).tolist() == expected
