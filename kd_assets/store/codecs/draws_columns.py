"""The columns of random draws in a `compact` top-k part: planes of bytes, one binary value a document and plane.

What the bytes are: `draws_compact`. Used by the modules `topk_…`. Names: M = kept positions, S = their slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.store import schema as schemas
from kd_assets.store.arrays import elements_of, flat
from kd_assets.store.codecs import draws_compact
from kd_assets.store.codecs.draws_compact import CodedDraws, Draws, SlotIds
from kd_assets.store.codecs.topk_compact import N_ID_PLANES, ByteArray, bands
from kd_assets.store.writing.documents import Int64Array, offsets_of

NAMES = ("sampled_ids", "sampled_counts")
"""The columns that a reader gets."""

_OUTSIDE = tuple(f"sampled_outside_byte_{n}" for n in range(N_ID_PLANES))
_LARGEST_BYTE = 255

PlaneBytes = Callable[[str, Int64Array], ByteArray]
"""A column's name and offsets [D + 1] → its bytes of all documents, each of which has as many as these say."""


def fields(k: int, draws: int) -> list[pa.Field]:
    """The columns in the file, in the place of `NAMES`."""
    names = [*_slot_names(k, draws), *_OUTSIDE]
    return [schemas.column(name, pa.binary(), k=str(k), draws=str(draws)) for name in names]


def made_of(k: int, draws: int) -> list[str]:
    return [field.name for field in fields(k, draws)]


def is_coded(schema: pa.Schema) -> bool:
    return _OUTSIDE[0] in schema.names


def draws_field(schema: pa.Schema) -> str | None:
    """A column whose metadata have the number of draws; None where there are none."""
    return next((name for name in (_OUTSIDE[0], NAMES[0]) if name in schema.names), None)


def drawn_of(plain: pa.Table) -> Draws:
    """The draws of a table without a codec."""
    ids = plain["sampled_ids"]
    lists = [elements_of(chunk) for chunk in ids.chunks]
    lengths = [np.diff(flat(of.offsets)) for of in lists if len(of)]
    offsets = offsets_of(np.concatenate([np.zeros(0, np.int32), *lengths]))
    return Draws(ids=flat(ids), counts=flat(plain["sampled_counts"]), offsets=offsets)


def stored(slots: SlotIds, drawn: Draws, draws: int, k: int) -> dict[str, tuple[ByteArray, Int64Array]]:
    """Column → its bytes, and where those of each position begin. Raises RangeError as `draws_compact.encode`."""
    coded = draws_compact.encode(slots, drawn, draws)
    slot_S = slot_numbers(slots.offsets)
    planes: dict[str, tuple[ByteArray, Int64Array]] = {}
    for shift, names in _by_byte(k, draws):
        octets_S = (coded.counts_S >> np.uint16(shift)).astype(np.uint8)
        for name, (first, stop) in names.items():
            planes[name] = (octets_S[in_band(slot_S, first, stop)], band_offsets(slots.offsets, first, stop))
    of_gaps = offsets_of(coded.n_outside_M)
    for at, name in enumerate(_OUTSIDE):
        planes[name] = ((coded.gaps >> np.uint32(8 * at)).astype(np.uint8), of_gaps)
    return planes


def decoded(
    slots: SlotIds, draws: int, k: int, *, documents: Int64Array, read: PlaneBytes, vocabulary: int | None
) -> Draws:
    """The draws of positions whose slots have these ids. `documents` int64 [D + 1]: where those of each document begin
    among the positions. Raises CodeError as `draws_compact`."""
    slot_S = slot_numbers(slots.offsets)
    counts_S = np.zeros(len(slots.ids_S), np.uint16)
    for shift, names in _by_byte(k, draws):
        for name, (first, stop) in names.items():
            octets = read(name, band_offsets(slots.offsets, first, stop)[documents])
            counts_S[in_band(slot_S, first, stop)] |= octets.astype(np.uint16) << np.uint16(shift)
    n_outside_M = draws_compact.outside_of(counts_S, slots.offsets, draws)
    of_gaps = offsets_of(n_outside_M)[documents]
    gaps = np.zeros(int(of_gaps[-1]), np.uint32)
    for at, name in enumerate(_OUTSIDE):
        gaps |= read(name, of_gaps).astype(np.uint32) << np.uint32(8 * at)
    coded = CodedDraws(counts_S=counts_S, gaps=gaps, n_outside_M=n_outside_M)
    return draws_compact.decode(slots, coded, vocabulary=vocabulary)


def slot_numbers(offsets: Int64Array) -> Int64Array:
    """int64 [S]: which slot of its position each is."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


def in_band(slot_S: Int64Array, first: int, stop: int) -> npt.NDArray[np.bool_]:
    return (slot_S >= first) & (slot_S < stop)


def band_offsets(offsets: Int64Array, first: int, stop: int) -> Int64Array:
    """int64 [M + 1]: where the slots `first` to `stop` of each position begin among those of all."""
    return offsets_of((np.diff(offsets) - first).clip(0, stop - first))


def _slot_names(k: int, draws: int) -> list[str]:
    return [name for _, names in _by_byte(k, draws) for name in names]


def _by_byte(k: int, draws: int) -> list[tuple[int, Mapping[str, tuple[int, int]]]]:
    """Of each byte of a count, lowest first: how many bits are below it, and its columns with their slots."""
    low = {
        f"sampled_slots_{first}" if stop == first + 1 else f"sampled_slots_{first}_{stop - 1}": (first, stop)
        for first, stop in bands(k)
    }
    high = {f"{name}_high": slots for name, slots in low.items()}
    return [(0, low), *([(8, high)] if draws > _LARGEST_BYTE else [])]
