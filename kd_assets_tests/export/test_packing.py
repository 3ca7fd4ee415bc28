"""First fit: every item once and whole, in order, and no more rows than needed by much."""

from __future__ import annotations

import numpy as np
import pytest

from kd_assets.export.packing import OPEN_ROWS, first_fit


@pytest.mark.parametrize("open_rows", [1, 2, OPEN_ROWS, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_in_one_row_and_no_row_has_too_many_tokens(seed: int, open_rows: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 101, 200).tolist()
    rows = list(first_fit([(n, (at, n)) for at, n in enumerate(lengths)], 100, open_rows=open_rows))
    assert sorted(item for row in rows for item in row) == list(enumerate(lengths))
    assert all(sum(n for _, n in row) <= 100 for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert sum(lengths) / 100 <= len(rows) <= len(lengths)


def test_an_item_goes_into_the_first_row_with_room_and_the_fullest_row_is_closed_first() -> None:
    items = [(n, n) for n in (6, 7, 3, 4, 9, 1)]
    assert list(first_fit(items, 10)) == [[6, 3, 1], [7], [4], [9]]
    assert list(first_fit(items, 10, open_rows=2)) == [[6, 3], [7], [4, 1], [9]]


def test_an_item_that_is_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="11 tokens has no room in a row of 10"):
        list(first_fit([(11, "long")], 10))


def test_two_percent_of_the_places_stay_empty() -> None:
    lengths = np.random.default_rng(0).integers(50, 2001, 1000).tolist()
    rows = list(first_fit([(n, n) for n in lengths], 4096))
    assert 1 - sum(lengths) / (4096 * len(rows)) < 0.025
