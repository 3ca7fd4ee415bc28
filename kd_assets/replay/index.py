"""Which documents of a cache begin with given token ids, in memory that grows with documents and not with tokens.

A document has one hash of all its ids, and one of its first 1, 2, 4, 8, … ids; nothing else of it is held, about 110
bytes for a thousand tokens. A hash only proposes: whoever asks compares the ids of what is proposed with those that
were asked. Documents are sorted by their hashes, shortest beginning first, so that those that begin alike stand
together: a preamble that all of them share costs a step of a binary search.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kd_assets.store import Chosen
from kd_assets.store.reading.columns import column_of
from kd_assets.store.reading.parts import damage_named, open_part

Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_CHUNK_DOCUMENTS = 16_384
"""Whose hashes are held as Python numbers while the index is made."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Beginning:
    """What the index knows of documents that begin as a sequence does."""

    documents: Int64Array
    """Numbers of documents that may begin with the sequence. Of those that are equal for twice `known_length` ids,
    which is longer than the sequence, one is named, unless all were asked for."""
    known_length: int
    """Some document begins with the sequence's first `known_length` ids, none with more of 0, 1, 2, 4, 8, …"""
    shorter: Int64Array
    """Documents with these first `known_length` ids that are shorter than the sequence, the longest first."""


class PrefixIndex:
    """Finds documents by the ids that they begin with. Documents are numbered in the order in which they are given."""

    def __init__(self, documents: Iterable[Uint32Array]) -> None:
        """`documents`: the token ids of each, uint32 [L] with L ≥ 1; read once, one by one."""
        hashes_DJ, whole_D, lengths_D = _hashed(documents)
        n_documents, n_levels = hashes_DJ.shape
        # lexsort takes the last key as the first to sort by.
        order = np.lexsort([hashes_DJ[:, j] for j in reversed(range(n_levels))]) if n_levels else np.zeros(0, np.int64)
        number = np.int32 if n_documents <= np.iinfo(np.int32).max else np.int64
        self._documents = order.astype(number)
        self._levels = [np.ascontiguousarray(hashes_DJ[order, j]) for j in range(n_levels)]
        self._lengths = lengths_D[order].astype(np.int32)
        by_whole = np.argsort(whole_D, kind="stable")
        self._whole = whole_D[by_whole]
        self._whole_documents = by_whole.astype(number)
        self.longest = int(lengths_D.max(initial=0))
        """Tokens of the longest document."""

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def n_bytes(self) -> int:
        arrays = (self._documents, *self._levels, self._lengths, self._whole, self._whole_documents)
        return sum(array.nbytes for array in arrays)

    def exact(self, ids_L: Uint32Array) -> Int64Array:
        """Documents that may have exactly these ids, L ≥ 1."""
        first, stop = _equal_range(self._whole, _whole_hash(ids_L))
        return self._whole_documents[first:stop].astype(np.int64)

    def beginning_with(self, ids_L: Uint32Array, *, one_of_equal: bool = True) -> Beginning:
        """Documents that may begin with these ids, L ≥ 1, and what is known where there are none.

        `one_of_equal`: of those that go on alike, one is enough.
        """
        first, stop, known = 0, len(self), 0
        is_known = len(ids_L) <= self.longest
        for level, (length, prefix_hash) in enumerate(_prefix_hashes(ids_L)):
            found = _equal_range(self._levels[level][first:stop], prefix_hash) if level < len(self._levels) else (0, 0)
            if found[0] == found[1]:
                is_known = False
                break
            first, stop, known = first + found[0], first + found[1], length
        lengths = self._lengths[first:stop]
        shorter = first + np.flatnonzero(lengths < len(ids_L))
        longest_first = shorter[np.argsort(-self._lengths[shorter], kind="stable")]
        fitting = first + np.flatnonzero(lengths >= len(ids_L)) if is_known else np.zeros(0, np.int64)
        return Beginning(
            documents=self._one_of_each(fitting, known) if one_of_equal else self._documents[fitting].astype(np.int64),
            known_length=known,
            shorter=self._documents[longest_first].astype(np.int64),
        )

    def _one_of_each(self, places: Int64Array, known: int) -> Int64Array:
        """Of places whose first `known` ids are the same: one for each hash of twice as many ids, and all that end
        before."""
        level = known.bit_length()
        if level < len(self._levels):
            hashes = self._levels[level][places]  # sorted, as what comes before them is the same
            is_another = np.concatenate([np.ones(len(hashes[:1]), np.bool_), hashes[1:] != hashes[:-1]])
            places = places[is_another | (hashes == 0)]
        return self._documents[places].astype(np.int64)


def documents_of(chosen: Chosen) -> Iterator[Uint32Array]:
    """The token ids of every document, in a reader's order.

    Bytes are not hashed here, as that would read all of a cache: who reads a document's numbers has its part verified,
    and compares its ids. Raises CorruptPartError for what is no table.
    """
    for folder, manifest in zip(chosen.folders, chosen.manifests, strict=True):
        for record in manifest.parts:
            path = folder / record.name
            with open_part(path, record) as part:
                for group in range(part.n_groups):
                    table = part.read_group(group, ["input_ids"])
                    with damage_named(path):
                        column = column_of(table["input_ids"])
                    for row in range(table.num_rows):
                        yield column.row(row)


def _equal_range(sorted_hashes: Uint64Array, wanted: int) -> tuple[int, int]:
    key = np.uint64(wanted)
    return int(np.searchsorted(sorted_hashes, key, "left")), int(np.searchsorted(sorted_hashes, key, "right"))


def _hashed(documents: Iterable[Uint32Array]) -> tuple[Uint64Array, Uint64Array, Int64Array]:
    """uint64 [D, J] of beginnings, 0 where a document is shorter; uint64 [D] of all ids; int64 [D] lengths."""
    rows = (([h for _, h in _prefix_hashes(ids_L)], _whole_hash(ids_L), len(ids_L)) for ids_L in documents)
    levels: list[Uint64Array] = []
    whole: list[Uint64Array] = []
    lengths: list[Int64Array] = []
    while chunk := list(itertools.islice(rows, _CHUNK_DOCUMENTS)):
        hashes = np.zeros((len(chunk), max(len(of_levels) for of_levels, _, _ in chunk)), dtype=np.uint64)
        for row, (of_levels, _, _) in enumerate(chunk):
            hashes[row, : len(of_levels)] = of_levels
        levels.append(hashes)
        whole.append(np.array([of_all for _, of_all, _ in chunk], dtype=np.uint64))
        lengths.append(np.array([length for _, _, length in chunk], dtype=np.int64))
    n_levels = max((hashes.shape[1] for hashes in levels), default=0)
    padded = [np.pad(hashes, ((0, 0), (0, n_levels - hashes.shape[1]))) for hashes in levels]
    return (
        np.concatenate([np.zeros((0, n_levels), np.uint64), *padded]),
        np.concatenate([np.zeros(0, np.uint64), *whole]),
        np.concatenate([np.zeros(0, np.int64), *lengths]),
    )


def _prefix_hashes(ids_L: Uint32Array) -> Iterator[tuple[int, int]]:
    """(2^j, hash of the first 2^j ids) for every power of 2 that is no longer than the ids; no hash is 0."""
    data = memoryview(_little_endian(ids_L))
    digest, hashed = hashlib.blake2b(digest_size=8), 0
    for level in range(len(ids_L).bit_length()):
        length = 1 << level
        digest.update(data[hashed * 4 : length * 4])
        hashed = length
        yield length, int.from_bytes(digest.digest(), "little") or 1


def _whole_hash(ids_L: Uint32Array) -> int:
    return int.from_bytes(hashlib.blake2b(_little_endian(ids_L), digest_size=8).digest(), "little")


def _little_endian(ids_L: Uint32Array) -> bytes:
    return np.ascontiguousarray(ids_L, dtype="<u4").tobytes()
