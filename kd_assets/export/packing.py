"""Packing documents into rows of one length: greedy first fit, in the order in which they come.

A row's documents lie one after the other, each whole; only one that is longer than a row is cut, into rows of its own
but for its end. Equal lengths give equal rows. What remains of a row is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Tokens `start` to `stop - 1` of a document."""

    document: int
    """Its place among those that were packed."""
    start: int
    stop: int

    @property
    def n_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Rows, each the pieces in it."""

    rows: tuple[tuple[Piece, ...], ...]
    n_cut: int
    """Documents that are longer than a row."""


def pack(lengths: Sequence[int], row_length: int) -> Packed:
    """Put documents of these lengths into rows of at most `row_length` tokens, each into the first with room for it.

    Raises ValueError for a row without room, and for a document without tokens.
    """
    if row_length < 1 or min(lengths, default=1) < 1:
        raise ValueError(f"row_length {row_length} and all lengths must be at least 1")
    rows: list[list[Piece]] = []
    room = _Room(row_length)
    n_cut = 0
    for document, length in enumerate(lengths):
        n_cut += length > row_length
        for start in range(0, length, row_length):
            piece = Piece(document=document, start=start, stop=min(start + row_length, length))
            row = room.take(piece.n_tokens)
            if row == len(rows):
                rows.append([])
            rows[row].append(piece)
    return Packed(rows=tuple(map(tuple, rows)), n_cut=n_cut)


class _Room:
    """What is free in each row: a tree of the largest room below each node, so that the first row with room is found in
    log n steps."""

    def __init__(self, row_length: int) -> None:
        self._row_length, self._n_rows, self._width = row_length, 0, 1
        self._largest = [0, 0]

    def take(self, n: int) -> int:
        """The first row with room for `n` tokens, which are taken from it; a new one where there is none."""
        if self._largest[1] < n:
            row = self._new_row()
        else:
            node = 1
            while node < self._width:
                node = 2 * node if self._largest[2 * node] >= n else 2 * node + 1
            row = node - self._width
        self._set(row, self._largest[self._width + row] - n)
        return row

    def _new_row(self) -> int:
        if self._n_rows == self._width:
            leaves = self._largest[self._width :]
            self._width *= 2
            self._largest = [0] * self._width + leaves + [0] * len(leaves)
            for node in reversed(range(1, self._width)):
                self._largest[node] = max(self._largest[2 * node], self._largest[2 * node + 1])
        row, self._n_rows = self._n_rows, self._n_rows + 1
        self._set(row, self._row_length)
        return row

    def _set(self, row: int, room: int) -> None:
        node = self._width + row
        self._largest[node] = room
        while node > 1:
            node //= 2
            self._largest[node] = max(self._largest[2 * node], self._largest[2 * node + 1])
