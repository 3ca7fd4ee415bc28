"""Batches: every document once, within the budget, with little padding, and the same for every attempt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kd_assets.store import plan_parts
from kd_assets.teacher.partition.batching import (
    BATCH_OVERHEAD_TOKENS,
    PAD_ID,
    Batch,
    batch_rows,
    concatenated_ranges,
    padded_ids,
    plan_batches,
    rounded_up,
)

Draw = Callable[[np.random.Generator, int], np.ndarray]

DISTRIBUTIONS: dict[str, Draw] = {
    "web text": lambda rng, n: rng.lognormal(6.2, 1.1, n) + 8,
    "short web text": lambda rng, n: rng.lognormal(5.5, 0.8, n) + 1,
    "uniform": lambda rng, n: rng.integers(30, 8193, n),
    "chats and long documents": lambda rng, n: np.where(
        rng.random(n) < 0.7, rng.lognormal(5.0, 0.7, n) + 10, rng.normal(6500, 1500, n).clip(2000)
    ),
    "all of 2,048": lambda rng, n: np.full(n, 2048),
    "nearly all cut at 3,000": lambda rng, n: rng.lognormal(9.0, 1.0, n).clip(max=3000),
    "passages": lambda rng, n: rng.normal(280, 60, n).clip(30, 400),
}
"""How long documents are, in tokens; cut at 8,192."""


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


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("token_budget", [4096, 32768])
def test_padding_with_the_rounding_of_widths_is_below_3_percent(distribution: str, token_budget: int) -> None:
    for seed in range(4):
        lengths_D = DISTRIBUTIONS[distribution](np.random.default_rng(seed), 1024).astype(np.int64).clip(1, 8192)
        longest = int(lengths_D.max())
        for part in plan_parts(lengths_D, max_documents=256, max_tokens=131_072):
            window_D = lengths_D[part.first_document : part.first_document + part.n_documents]
            if window_D.sum() < 50_000:
                continue  # the rest of the documents: too few to find equal ones
            batches = plan_batches(window_D, token_budget=token_budget, limits=(longest,))
            computed = sum(b.n_padded_tokens for b in batches)
            assert 1 - window_D.sum() / computed < 0.03


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_lengths_and_the_budget_all_documents_run_whole_and_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths_D = np.exp(rng.uniform(0, rng.uniform(1, 9), rng.integers(1, 300))).astype(np.int64)
    token_budget, alone_above = int(rng.integers(1, 40_000)), int(rng.integers(1, 9000)) if seed % 2 else None
    batches = plan_batches(lengths_D, token_budget=token_budget, alone_above=alone_above)
    assert sorted(np.concatenate([b.documents_B for b in batches])) == list(range(len(lengths_D)))
    for batch in batches:
        assert batch.lengths_B.tolist() == lengths_D[batch.documents_B].tolist()
        assert batch.lengths_B.max() <= batch.width <= batch.lengths_B.max() * (1 + 1 / 64)
        assert batch.n_padded_tokens <= token_budget or len(batch.documents_B) == 1
        if alone_above is not None:
            assert len(batch.documents_B) == 1 or batch.width <= alone_above
            assert (batch.lengths_B.max() > alone_above) == (batch.width > alone_above)


def test_batches_are_the_cheapest_there_are() -> None:
    """Against all ways to cut the sorted documents, on few of them."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths_D = np.sort(rng.integers(1, 900, 9))[::-1].astype(np.int64)
        budget = int(rng.integers(900, 4000))
        widths = rounded_up(lengths_D, {budget})
        costs = []
        for cut in range(1 << 8):
            ends = [i + 1 for i in range(8) if cut >> i & 1] + [9]
            batches = list(zip([0, *ends[:-1]], ends, strict=True))
            if all((j - i) * widths[i] <= budget for i, j in batches):
                costs.append(sum((j - i) * widths[i] + BATCH_OVERHEAD_TOKENS for i, j in batches))
        planned = plan_batches(lengths_D, token_budget=budget)
        assert sum(b.n_padded_tokens + BATCH_OVERHEAD_TOKENS for b in planned) == min(costs)


def test_widths_lie_on_a_grid_of_64_between_powers_of_two() -> None:
    assert rounded_up(lengths(1, 2, 63, 127, 128, 129, 257, 1000, 1025, 8191, 8192, 8193)).tolist() == [
        *(1, 2, 63, 127, 128, 130, 260, 1000, 1040, 8192, 8192, 8320)
    ]
    all_widths = np.unique(rounded_up(np.arange(1, 8193)))
    assert len(all_widths) == 128 + 6 * 64
    assert not (all_widths[all_widths >= 512] % 8).any()


def test_no_width_is_rounded_up_over_a_limit_or_the_budget() -> None:
    assert rounded_up(lengths(1000, 1001, 1002, 1003), stops=(1001, 1003)).tolist() == [1000, 1001, 1003, 1003]
    (batch,) = plan_batches(lengths(3000, 2990), token_budget=10_000, limits=(3000,))
    assert batch.width == 3000
    (alone,) = plan_batches(lengths(3001), token_budget=3001)
    assert alone.width == 3001


def test_a_width_that_was_rounded_up_does_not_reach_where_the_teacher_behaves_otherwise() -> None:
    batches = plan_batches(lengths(1001, 1001, 1002), token_budget=10_000, alone_above=1001)
    assert [(b.width, len(b.documents_B)) for b in batches] == [(1008, 1), (1001, 2)]


def test_no_documents_make_no_batches() -> None:
    assert plan_batches(lengths(), token_budget=10) == ()


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
