"""Random draws beside a coded top-k: how often each slot's id was drawn, and all other draws as gaps between their ids.

Numpy alone, and no files: `draws_columns` puts what is here into columns. FORMAT.md has the sentences ("Coded random
draws"). Names: M = positions, S = their slots (a slot is a place among the ids that a position keeps), d = draws of a
position.

Most draws fall on ids that the cache keeps anyway: of these a small count is enough. The others are sorted, and each is
how far its id is above that of the one before: 0 where an id was drawn again, so that it needs no count, and their
number is what the counts leave of d.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kd_assets.store.codecs.topk_compact import MAX_ID, CodeError, RangeError
from kd_assets.store.writing.documents import Int64Array, offsets_of

UInt16Array = npt.NDArray[np.uint16]
UInt32Array = npt.NDArray[np.uint32]

_ROWS = 8_192
"""Positions that are worked on together: what stays in a core's cache, and 13 bits of a key."""
_ID_BITS = 24
_LOW = (1 << _ID_BITS) - 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlotIds:
    """The ids of M positions' slots, one position after the other."""

    ids_S: UInt32Array
    offsets: Int64Array
    """[M + 1]: position i has the slots `offsets[i]` to `offsets[i + 1]`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draws:
    """What was drawn at M positions: for each the different ids, ascending, and how often each."""

    ids: UInt32Array
    counts: UInt16Array
    offsets: Int64Array
    """[M + 1], as of `SlotIds`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CodedDraws:
    counts_S: UInt16Array
    """How often the id of each slot was drawn."""
    gaps: UInt32Array
    """Of the draws whose ids have no slot, sorted: the first id of a position, then how much more each next one is."""
    n_outside_M: Int64Array
    """How many of these a position has."""


def encode(slots: SlotIds, drawn: Draws, draws: int) -> CodedDraws:
    """Raises RangeError for a position whose draws are not `draws`, whose ids do not ascend, or which has one beyond
    `MAX_ID`."""
    counts_S = np.zeros(len(slots.ids_S), np.uint16)
    _require_draws(drawn, draws)
    gaps, n_outside = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
    for rows in _runs(len(drawn.offsets) - 1):
        keys, places = _sorted_slots(slots, rows)
        first, stop = drawn.offsets[rows.start], drawn.offsets[rows.stop]
        row_of, counts = _rows_of(drawn.offsets, rows), drawn.counts[first:stop]
        drawn_keys = row_of << _ID_BITS | drawn.ids[first:stop].astype(np.int64)
        at = np.searchsorted(keys, drawn_keys)
        is_kept = _at(keys, at) == drawn_keys
        counts_S[places[at[is_kept]]] = counts[is_kept]
        outside = np.repeat(drawn_keys[~is_kept], counts[~is_kept])
        row_of = outside >> _ID_BITS
        is_first = np.diff(row_of, prepend=-1) > 0
        gaps.append(np.where(is_first, outside & _LOW, np.diff(outside, prepend=0)).astype(np.uint32))
        n_outside.append(np.bincount(row_of, minlength=rows.stop - rows.start))
    return CodedDraws(counts_S=counts_S, gaps=np.concatenate(gaps), n_outside_M=np.concatenate(n_outside))


def outside_of(counts_S: UInt16Array, offsets: Int64Array, draws: int) -> Int64Array:
    """int64 [M]: how many draws the counts of a position's slots leave. Raises CodeError where that is below 0."""
    kept_M = np.diff(offsets_of(counts_S.astype(np.int64))[offsets])
    if (wrong := np.flatnonzero(kept_M > draws)).size:
        row = int(wrong[0])
        raise CodeError(f"has counts of its slots that add up to {kept_M[row]}, of {draws} draws", row=row)
    return draws - kept_M


def decode(slots: SlotIds, coded: CodedDraws, *, vocabulary: int | None = None) -> Draws:
    """Raises CodeError for ids that a `vocabulary` of this size, or any, does not have, and for an id among the gaps
    that has a slot, or has two."""
    most = MAX_ID if vocabulary is None else min(MAX_ID, vocabulary - 1)
    of_gaps = offsets_of(coded.n_outside_M)
    ids, counts, lengths = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint16)], [np.zeros(0, np.int64)]
    for rows in _runs(len(slots.offsets) - 1):
        n_rows = rows.stop - rows.start
        keys, places = _sorted_slots(slots, rows)
        if (twice := np.flatnonzero(keys[1:] == keys[:-1])).size:
            raise CodeError("has a token id twice", row=rows.start + int(keys[twice[0]] >> _ID_BITS))
        outside, of_outside = _distinct(coded.gaps, of_gaps, rows)
        if (beyond := np.flatnonzero(outside.ids > most)).size:
            row, found = int(outside.rows[beyond[0]]), int(outside.ids[beyond[0]])
            raise CodeError(f"has {found} as a drawn id, the teacher knows ids 0 to {most}", row=rows.start + row)
        outside_keys = outside.rows << _ID_BITS | outside.ids
        at = np.searchsorted(keys, outside_keys)
        if (in_slot := np.flatnonzero(_at(keys, at) == outside_keys)).size:
            row, found = int(outside.rows[in_slot[0]]), int(outside.ids[in_slot[0]])
            raise CodeError(f"has {found} as a drawn id without a slot, which has one", row=rows.start + row)
        counts_of_slots = coded.counts_S[places]
        is_drawn = counts_of_slots > 0
        is_outside = np.zeros(len(outside_keys) + int(is_drawn.sum()), np.bool_)
        is_outside[np.arange(len(at)) + offsets_of(is_drawn.astype(np.int64))[at]] = True
        merged_keys, merged_counts = np.empty(len(is_outside), np.int64), np.empty(len(is_outside), np.uint16)
        merged_keys[is_outside], merged_keys[~is_outside] = outside_keys, keys[is_drawn]
        merged_counts[is_outside], merged_counts[~is_outside] = of_outside, counts_of_slots[is_drawn]
        ids.append((merged_keys & _LOW).astype(np.uint32))
        counts.append(merged_counts)
        lengths.append(np.bincount(merged_keys >> _ID_BITS, minlength=n_rows))
    offsets = offsets_of(np.concatenate(lengths))
    return Draws(ids=np.concatenate(ids), counts=np.concatenate(counts), offsets=offsets)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Outside:
    rows: Int64Array
    """From the first of the run on."""
    ids: Int64Array


def _distinct(gaps: UInt32Array, offsets: Int64Array, rows: slice) -> tuple[_Outside, UInt16Array]:
    """The different ids that the gaps of some positions come to, and how often each is there."""
    row_of, of_rows = _rows_of(offsets, rows), gaps[offsets[rows.start] : offsets[rows.stop]]
    summed = offsets_of(of_rows.astype(np.int64))
    starts = offsets[rows.start : rows.stop] - offsets[rows.start]
    ids = summed[1:] - np.repeat(summed[starts], np.diff(offsets[rows.start : rows.stop + 1]))
    is_new = of_rows > 0
    is_new |= np.diff(row_of, prepend=-1) > 0
    firsts = np.flatnonzero(is_new)
    counts = np.diff(firsts, append=len(is_new)).astype(np.uint16)
    return _Outside(rows=row_of[firsts], ids=ids[firsts]), counts


def _require_draws(drawn: Draws, draws: int) -> None:
    """Raise RangeError unless each position has `draws` draws, of ascending ids that the planes can hold."""
    n_M = np.diff(offsets_of(drawn.counts.astype(np.int64))[drawn.offsets])
    if (wrong := np.flatnonzero(n_M != draws)).size:
        raise RangeError(f"has {n_M[wrong[0]]} draws, not {draws}", row=int(wrong[0]))
    row_of = np.repeat(np.arange(len(n_M)), np.diff(drawn.offsets))
    if (beyond := np.flatnonzero(drawn.ids > MAX_ID)).size:
        found = drawn.ids[beyond[0]]
        raise RangeError(f"has {found} as a drawn id, and {MAX_ID} is the largest", row=int(row_of[beyond[0]]))
    if (none := np.flatnonzero(drawn.counts == 0)).size:
        raise RangeError("has a drawn id with a count of 0", row=int(row_of[none[0]]))
    keys = row_of << _ID_BITS | drawn.ids.astype(np.int64)
    if (wrong := np.flatnonzero(keys[1:] <= keys[:-1])).size:
        raise RangeError("has drawn ids that do not ascend", row=int(row_of[wrong[0] + 1]))


def _sorted_slots(slots: SlotIds, rows: slice) -> tuple[Int64Array, Int64Array]:
    """Of the slots of some positions, ascending: row · 2²⁴ + id, rows from 0 on, and where each slot is among all."""
    offsets = slots.offsets[rows.start : rows.stop + 1]
    row_of = _rows_of(slots.offsets, rows)
    slot_of = np.arange(offsets[0], offsets[-1]) - offsets[row_of]
    keys = (row_of << _ID_BITS | slots.ids_S[offsets[0] : offsets[-1]].astype(np.int64)) << _ID_BITS | slot_of
    keys.sort()  # the slot within the key: many times faster than argsort
    keys, slot_of = keys >> _ID_BITS, keys & _LOW
    return keys, offsets[keys >> _ID_BITS] + slot_of


def _rows_of(offsets: Int64Array, rows: slice) -> Int64Array:
    """int64: of each element of some positions, which of them it is of, from 0 on."""
    n_M = np.diff(offsets[rows.start : rows.stop + 1])
    return np.repeat(np.arange(len(n_M), dtype=np.int64), n_M)


def _at(keys: Int64Array, at: Int64Array) -> Int64Array:
    """`keys[at]`, and -1 behind the end."""
    return np.append(keys, -1)[at]


def _runs(m: int) -> Iterator[slice]:
    for start in range(0, m, _ROWS):
        yield slice(start, min(start + _ROWS, m))
