"""Documents packed into rows of one length: first-fit, each document whole and in one row.

Documents keep near the order they come in: a row is closed when `OPEN_ROWS` newer ones are open. Only lengths are
looked at, so packing decodes nothing; a million documents take a few seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kd_assets.errors import RecipeError
from kd_assets.store.writing.documents import Int64Array, offsets_of

OPEN_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Row i holds the documents `documents[offsets[i]:offsets[i + 1]]`, from left to right."""

    documents: Int64Array
    offsets: Int64Array

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> Int64Array:
        return self.documents[self.offsets[i] : self.offsets[i + 1]]


def single(documents: Int64Array) -> Rows:
    """One document a row."""
    return Rows(documents=documents, offsets=np.arange(len(documents) + 1))


def first_fit(documents: Int64Array, n_tokens_D: npt.NDArray[np.integer], *, length: int) -> Rows:
    """`documents` (places in `n_tokens_D`) in rows of at most `length` tokens.

    Raises RecipeError where a document is longer than a row.
    """
    lengths = n_tokens_D[documents]
    if len(lengths) and (longest := int(lengths.max())) > length:
        raise RecipeError(
            f"{int((lengths > length).sum())} documents are longer than a packed row of {length} tokens, the longest "
            f"has {longest}: cut them (max_length={length} of the data set), or pack to a greater length"
        )
    shortest = int(lengths.min(initial=length))
    row_of_document = np.empty(len(documents), np.int64)
    rooms: list[int] = []
    rows: list[int] = []
    n_rows = 0
    for i, n in enumerate(lengths.tolist()):
        place = next((place for place, room in enumerate(rooms) if room >= n), -1)
        if place < 0:
            if len(rooms) == OPEN_ROWS:
                del rooms[0], rows[0]
            place = len(rooms)
            rooms.append(length)
            rows.append(n_rows)
            n_rows += 1
        row_of_document[i] = rows[place]
        rooms[place] -= n
        if rooms[place] < shortest:
            del rooms[place], rows[place]
    by_row = np.argsort(row_of_document, kind="stable")
    return Rows(documents=documents[by_row], offsets=offsets_of(np.bincount(row_of_document, minlength=n_rows)))
