"""The codec `compact` of positions that keep different numbers of tokens: those of each number are coded as rows of it.

Numpy alone, and no files, as `topk_compact`, which does the coding. Names: M = positions, k = the most that one keeps,
S = the slots of all, position after position. Rows [M, k] have -inf behind what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kd_assets.store.codecs import topk_compact
from kd_assets.store.codecs.topk_compact import ByteArray, CodeError, Float64Array, RangeError, bands
from kd_assets.store.writing.documents import Int64Array, offsets_of

ONE_BYTE = 255
"""How many tokens are kept is one byte a position up to this k, and two beyond."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RaggedRows:
    """M positions as bytes."""

    ids: tuple[ByteArray, ...]
    """uint8 [S] each: the bytes of the token ids, lowest first."""
    falls_S: ByteArray
    """Of a position's first slot the code, of the others how much it is below that of the slot before."""
    tails_M: ByteArray


def encode(
    ids_Mk: npt.NDArray[np.uint32], logprobs_Mk: npt.NDArray[np.float16], n_M: npt.NDArray[np.integer]
) -> RaggedRows:
    """The first `n_M` of each row. Raises RangeError as `topk_compact.encode`."""
    offsets = offsets_of(n_M)
    ids = tuple(np.empty(int(offsets[-1]), np.uint8) for _ in range(topk_compact.N_ID_PLANES))
    falls_S, tails_M = np.empty(int(offsets[-1]), np.uint8), np.empty(len(n_M), np.uint8)
    for n, rows in _by_number(n_M):
        try:
            coded = topk_compact.encode(
                np.ascontiguousarray(ids_Mk[rows, :n]), np.ascontiguousarray(logprobs_Mk[rows, :n])
            )
        except RangeError as e:
            raise RangeError(str(e), row=int(rows[e.row])) from e
        at = offsets[rows][:, None] + np.arange(n)
        for plane, of_rows in zip(ids, coded.ids, strict=True):
            plane[at] = of_rows
        falls_S[at] = np.concatenate(coded.codes, axis=1)
        tails_M[rows] = coded.tails_M
    return RaggedRows(ids=ids, falls_S=falls_S, tails_M=tails_M)


def decode_logprobs(
    falls_S: ByteArray, tails_M: ByteArray, n_M: Int64Array, k: int
) -> tuple[npt.NDArray[np.float16], Float64Array]:
    """float16 [M, k] and float64 [M], as of `topk_compact.decode_logprobs`, which says what it raises."""
    offsets = offsets_of(n_M)
    logprobs_Mk, masses_M = np.full((len(n_M), k), -np.inf, np.float16), np.empty(len(n_M), np.float64)
    for n, rows in _by_number(n_M):
        falls = falls_S[offsets[rows][:, None] + np.arange(n)]
        codes = [np.ascontiguousarray(falls[:, first:stop]) for first, stop in bands(n)]
        try:
            logprobs_Mk[rows, :n], masses_M[rows] = topk_compact.decode_logprobs(codes, tails_M[rows])
        except CodeError as e:
            raise CodeError(str(e), row=None if e.row is None else int(rows[e.row])) from e
    return logprobs_Mk, masses_M


def divergence(
    exact_Mk: npt.NDArray[np.float16], coded_Mk: npt.NDArray[np.float16], tails_M: Float64Array, n_M: Int64Array
) -> Float64Array:
    """float64 [M]: as `topk_compact.divergence`, over the kept tokens and all others as one."""
    found = np.empty(len(n_M), np.float64)
    for n, rows in _by_number(n_M):
        exact, coded = (np.ascontiguousarray(of[rows, :n]) for of in (exact_Mk, coded_Mk))
        found[rows] = topk_compact.divergence(exact, coded, tails_M[rows])
    return found


def number_bytes(n_M: Int64Array, k: int) -> ByteArray:
    """uint8 [M · 1 or 2], little-endian: how many tokens each position keeps."""
    return n_M.astype("<u1" if k <= ONE_BYTE else "<u2").view(np.uint8)


def numbers_of(octets: ByteArray, k: int) -> Int64Array:
    """int64 [M]. Raises CodeError for a number that is not 1 to k."""
    n_M = octets.view("<u1" if k <= ONE_BYTE else "<u2").astype(np.int64)
    if (wrong := np.flatnonzero((n_M < 1) | (n_M > k))).size:
        row = int(wrong[0])
        raise CodeError(f"keeps {n_M[row]} tokens, and it must be 1 to {k}", row=row)
    return n_M


def _by_number(n_M: npt.NDArray[np.integer]) -> Iterator[tuple[int, Int64Array]]:
    """Each number of kept tokens that there is, and the positions that keep so many."""
    if not len(n_M):
        return
    order = np.argsort(n_M, kind="stable")
    numbers, firsts = np.unique(n_M[order], return_index=True)
    for n, rows in zip(numbers, np.split(order, firsts[1:]), strict=True):
        yield int(n), rows
