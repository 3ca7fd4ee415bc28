"""The order of an epoch and how it is dealt, without a cache: every unit once, for any numbers and interrupts."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from kd_assets.errors import LoaderStateError, RecipeError
from kd_assets.student.loading.epoch import RUN_TOKENS, WINDOW_RUNS, Deal, Segment, Shares, epoch_order, units_left
from kd_assets.student.loading.packing import OPEN_ROWS, first_fit

# fmt: off
DOCUMENTS_7_1 = [
    1, 12, 0, 14, 36, 17, 18, 7, 26, 6, 23, 27, 38, 3, 28, 39, 11, 29, 22, 31,
    33, 4, 20, 16, 2, 5, 30, 9, 32, 19, 21, 34, 24, 37, 15, 35, 25, 8, 10, 13,
]
WINDOWS_7_1 = [
    1, 0, 14, 18, 26, 27, 39, 11, 22, 31, 33, 16, 32, 34, 37, 13, 36, 17, 6, 23,
    38, 3, 28, 29, 4, 21, 24, 15, 35, 25, 8, 10, 12, 7, 20, 2, 5, 30, 9, 19,
]
# fmt: on


def shares(n_ranks: int, n_workers: int, batch_size: int, *, drop_last: bool = False) -> Shares:
    return Shares(n_ranks=n_ranks, n_workers=n_workers, batch_size=batch_size, drop_last=drop_last)


def given_by(deal: Deal, steps: range) -> list[int]:
    return [unit for step in steps for rank in range(deal.shares.n_ranks) for unit in deal.batch(rank, step).tolist()]


@pytest.mark.parametrize("shuffle", ["windows", "documents", "none"])
def test_an_order_has_every_document_once_and_follows_from_seed_and_epoch(shuffle: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 3000, 5000)
    orders = {
        (seed, epoch): epoch_order(lengths, shuffle=shuffle, seed=seed, epoch=epoch)  # type: ignore[arg-type]
        for seed, epoch in itertools.product((0, 1), (0, 1, 2))
    }
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(5000))
    again = epoch_order(lengths, shuffle=shuffle, seed=1, epoch=2)  # type: ignore[arg-type]
    assert np.array_equal(again, orders[1, 2])
    assert len({order.tobytes() for order in orders.values()}) == (1 if shuffle == "none" else 6)


def test_an_order_is_the_same_for_ever() -> None:
    """A training that goes on with a later version of numpy must see the same order."""
    lengths = np.full(40, RUN_TOKENS)
    assert epoch_order(lengths, shuffle="documents", seed=7, epoch=1).tolist() == DOCUMENTS_7_1
    assert epoch_order(lengths, shuffle="windows", seed=7, epoch=1).tolist() == WINDOWS_7_1


def test_a_window_of_documents_lies_in_a_few_runs_and_all_windows_are_mixed() -> None:
    lengths = np.full(64 * 200, 512)
    order = epoch_order(lengths, shuffle="windows", seed=0, epoch=0)
    run_of = order * 512 // RUN_TOKENS
    of_window = WINDOW_RUNS * RUN_TOKENS // 512
    for start in range(0, len(order), of_window):
        runs = set(run_of[start : start + of_window].tolist())
        assert len(runs) <= WINDOW_RUNS
        assert max(runs) - min(runs) > WINDOW_RUNS  # they are neither neighbours …
        assert len(set(run_of[start : start + 32].tolist())) > len(runs) // 2  # … nor one after the other


def test_unknown_ways_to_shuffle_are_refused() -> None:
    with pytest.raises(RecipeError, match="must be windows, documents or none, found 'some'"):
        epoch_order(np.ones(3, np.int64), shuffle="some", seed=0, epoch=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_unit_is_dealt_once_and_all_ranks_have_as_many_steps(drop_last: bool) -> None:
    for n_units, n_ranks, n_workers, size in itertools.product(range(41), (1, 2, 3, 8), (1, 2, 3), (1, 2, 3, 5)):
        if 0 < n_units < n_ranks and not drop_last:
            with pytest.raises(RecipeError, match=f"{n_units} documents or rows are left of the epoch, for {n_ranks}"):
                Deal(n_units, shares(n_ranks, n_workers, size))
            continue
        deal = Deal(n_units, shares(n_ranks, n_workers, size, drop_last=drop_last))
        batches = [deal.batch(rank, step) for step in range(deal.n_steps) for rank in range(n_ranks)]
        sizes = {len(batch) for batch in batches}
        units = [unit for batch in batches for unit in batch.tolist()]
        assert len(units) == len(set(units))
        if drop_last:
            assert sizes <= {size}
            assert n_units - len(units) < n_ranks * size + n_ranks
        else:
            assert sorted(units) == list(range(n_units))
            assert sizes <= set(range(1, size + 1 if size > 1 else 3))


def test_whatever_the_interrupts_and_numbers_of_ranks_workers_and_rows_every_unit_is_given_once() -> None:
    rng = random.Random(0)
    for _ in range(400):
        n_units = rng.randrange(8, 300)
        segments: list[Segment] = []
        seen: list[int] = []
        while True:
            left = units_left(n_units, segments)
            assert sorted(seen + left.tolist()) == list(range(n_units))
            chosen = shares(rng.randrange(1, 1 + min(8, max(1, len(left)))), rng.randrange(1, 5), rng.randrange(1, 9))
            deal = Deal(len(left), chosen)
            n_steps = rng.randrange(deal.n_steps + 1)
            seen += left[given_by(deal, range(n_steps))].tolist()
            segments.append(Segment(shares=chosen, n_steps=n_steps))
            if n_steps == deal.n_steps:
                break
        assert sorted(seen) == list(range(n_units))
        assert len(units_left(n_units, segments)) == 0


def test_a_worker_has_neighbours_in_the_order() -> None:
    """Batches go to workers in turn: those of one are of one lane, so its groups of rows are decoded once."""
    deal = Deal(1000, shares(2, 4, 5))
    for rank, worker in itertools.product(range(2), range(4)):
        units = np.concatenate([deal.batch(rank, step) for step in range(worker, 96, 4)])
        assert np.array_equal(units, np.arange(units[0], units[0] + len(units)))


@pytest.mark.parametrize("n_steps", [-1, 4])
def test_a_stretch_that_cannot_have_been_is_refused(n_steps: int) -> None:
    with pytest.raises(LoaderStateError, match=f"after {n_steps} steps of a stretch of 3: it was changed"):
        units_left(6, [Segment(shares=shares(1, 1, 2), n_steps=n_steps)])


@pytest.mark.parametrize("field", ["n_ranks", "n_workers", "batch_size"])
def test_shares_of_nothing_are_refused(field: str) -> None:
    numbers = {"n_ranks": 1, "n_workers": 1, "batch_size": 1} | {field: 0}
    with pytest.raises(RecipeError, match=f"{field} is 0: it must be at least 1"):
        Shares(drop_last=False, **numbers)


def test_rows_are_packed_first_fit_in_the_order_of_documents() -> None:
    lengths = np.array([5, 4, 2, 6, 3, 1])
    rows = first_fit(np.array([5, 0, 1, 2, 3, 4]), lengths, length=8)
    assert [rows.row(i).tolist() for i in range(len(rows))] == [[5, 0, 2], [1, 4], [3]]


def test_packed_rows_have_every_document_once_whole_and_are_mostly_full() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 900, 3000)
    order = rng.permutation(3000)
    rows = first_fit(order, lengths, length=1024)
    assert np.array_equal(np.sort(rows.documents), np.arange(3000))
    filled = np.array([lengths[rows.row(i)].sum() for i in range(len(rows))])
    assert filled.max() <= 1024
    assert filled.mean() > 0.95 * 1024
    place = np.empty(3000, np.int64)
    place[order] = np.arange(3000)
    spread = [np.ptp(place[rows.row(i)]) for i in range(len(rows))]
    assert max(spread) < 20 * OPEN_ROWS  # a row's documents are near each other in the order


def test_a_document_longer_than_a_row_is_refused_with_what_to_do() -> None:
    with pytest.raises(RecipeError, match=r"1 documents are longer than a packed row of 4 tokens, the longest has 9"):
        first_fit(np.arange(3), np.array([1, 9, 4]), length=4)
