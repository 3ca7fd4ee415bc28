"""The codec `compact` of top-k rows: token ids as byte planes, probabilities as differences of their fourth roots.

Numpy alone, and no files: `topk_columns` puts what is here into columns. FORMAT.md has the sentences ("Codec compact of
top-k caches") and a decoder of its own to copy. Names: M = positions, k as in top-k, w = slots of a band (a slot is a
place among the k).

A probability p is the byte round(255·p^¼), at least 1. The fourth root spends the steps where the divergence asks for
them: rounding costs 1.03·10⁻⁵·√p of KL an entry, and reaches down to 2·10⁻¹⁰. Rows descend, so that the differences of
neighbours are small and skewed, each slot in its own way: slots 0, 1, 2-3, 4-15, 16-63, … are planes of their own, as
one Huffman table for all of them would cost 0.7 bytes a position more. Bytes alone would leave the mass of all other
tokens to chance, many times the KL: one byte more says it, finest at its ends (see `TAIL`), and the kept probabilities
are scaled to the rest.

FORMAT.md's table says why the bytes are binary values of documents, and not lists: those open in every reader, take the
fewest bytes, and are read without a copy and without Parquet's levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]
Float64Array = npt.NDArray[np.float64]

N_ID_PLANES = 3
MAX_ID = (1 << (8 * N_ID_PLANES)) - 1

AS_CODED = 255
"""The tail byte of a position whose mass is the sum of the codes as they are: the better one where it is spread out."""

LARGEST_LOGPROB = 4e-3
"""What float16 and the order of summation may put a log-probability, and a row's mass, above what is possible."""

_ROWS = 8_192
"""Positions that are worked on together: what stays in a core's cache."""


def _codes_of_bits() -> ByteArray:
    """uint8 [65536]: the code of each float16 log-probability by its bits; 0 where it has none."""
    logprobs = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):
        holds = np.isfinite(logprobs) & (logprobs <= LARGEST_LOGPROB)
    codes = np.rint(255 * np.exp(np.where(holds, logprobs, 0.0) / 4)).clip(1, 255)
    return np.where(holds, codes, 0).astype(np.uint8)


def _probabilities_of_bits() -> Float64Array:
    """float64 [65536]: exp of each float16 by its bits; 0 for those that are no log-probability."""
    logprobs = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.exp(np.where(logprobs <= LARGEST_LOGPROB, logprobs, -np.inf))


CODES = _codes_of_bits()
PROBABILITIES = _probabilities_of_bits().astype(np.float32)
"""float32 [65536]: exp of each float16 log-probability by its bits."""
_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""float32 [65536]: the number that each float16 is; looked up faster than converted."""
RAW = (np.arange(256) / 255) ** 4
"""float64 [256]: the probability that a code stands for, before its row is scaled."""
TAIL = np.sin(np.pi / 2 * np.arange(256) / 255) ** 4
"""float64 [256]: the mass that a tail byte stands for, but for `AS_CODED`. Its rounding costs 1.3·10⁻⁵ of KL at most,
wherever it is, and the smallest mass is 1.4·10⁻⁹."""
_RAW32 = RAW.astype(np.float32)
with np.errstate(divide="ignore"):
    _LOG_RAW = np.log(RAW).astype(np.float32)
_TAIL_BOUNDS = (TAIL[:-2] + TAIL[1:-1]) / 2
"""float64 [254]: the boundary between each tail byte and the next."""


class CodeError(ValueError):
    """Bytes that the encoder does not write. `row`: the first position with them, where one can be named."""

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class RangeError(ValueError):
    """Numbers that this codec cannot hold. `row`: the first position with them."""

    def __init__(self, message: str, *, row: int) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CodedRows:
    """M positions as bytes."""

    ids: tuple[ByteArray, ...]
    """`N_ID_PLANES` × uint8 [M, k]: the bytes of the token ids, lowest first."""
    codes: tuple[ByteArray, ...]
    """uint8 [M, w] for each band: of slot 0 the code, of the others how much it is below that of the slot before."""
    tails_M: ByteArray


def bands(k: int) -> tuple[tuple[int, int], ...]:
    """First slot and stop of each band: 0-1, 1-2, 2-4, 4-16, 16-64, 64-256, …, the last up to k."""
    starts = [0, 1, 2]
    while starts[-1] < k:
        starts.append(4 if starts[-1] == 2 else 4 * starts[-1])
    starts = [start for start in starts if start < k]
    return tuple(zip(starts, [*starts[1:], k], strict=True))


def encode(ids_Mk: npt.NDArray[np.uint32], logprobs_Mk: npt.NDArray[np.float16]) -> CodedRows:
    """Rows of token ids and their log-probabilities, most likely first, as bytes.

    Raises RangeError for an id above `MAX_ID` or twice in a row, for a log-probability that is no finite number up to
    `LARGEST_LOGPROB` or is above the one before it, and for a row whose mass is more than 1 by more than that.
    """
    m, k = ids_Mk.shape
    planes = tuple(np.empty((m, k), np.uint8) for _ in range(N_ID_PLANES))
    of_slots = np.empty((m, k), np.uint8)
    tails_M = np.empty(m, np.uint8)
    for rows in _runs(m):
        ids, bits = ids_Mk[rows], np.ascontiguousarray(logprobs_Mk[rows]).view(np.uint16)
        codes = CODES.take(bits)  # half the time that indexing takes
        _require_holdable(ids, logprobs_Mk[rows], codes, first_row=rows.start)
        for at, plane in enumerate(planes):
            np.copyto(plane[rows], ids >> np.uint32(8 * at), casting="unsafe")
        of_slots[rows, 0] = codes[:, 0]
        np.subtract(codes[:, :-1], codes[:, 1:], out=of_slots[rows, 1:])
        mass = _row_sums(PROBABILITIES.take(bits))
        if (too_much := np.flatnonzero(mass > 1 + LARGEST_LOGPROB)).size:
            row = int(too_much[0])
            raise RangeError(f"its probabilities add up to {mass[row]:.6f}", row=rows.start + row)
        tails_M[rows] = _tails_of(np.minimum(mass, 1.0), _row_sums(_RAW32.take(codes)), k)
    return CodedRows(
        ids=planes,
        codes=tuple(np.ascontiguousarray(of_slots[:, first:stop]) for first, stop in bands(k)),
        tails_M=tails_M,
    )


def decode_ids(planes: Sequence[ByteArray], *, vocabulary: int | None = None) -> npt.NDArray[np.uint32]:
    """uint32 [M, k]. Raises CodeError for an id that a `vocabulary` of this size does not have."""
    octets = np.zeros((*planes[0].shape, 4), np.uint8)
    for at, plane in enumerate(planes):
        octets[:, :, at] = plane
    ids_Mk = octets.view("<u4")[:, :, 0].astype(np.uint32, copy=False)
    if vocabulary is not None and (beyond := np.flatnonzero(ids_Mk.max(axis=1, initial=0) >= vocabulary)).size:
        row = int(beyond[0])
        raise CodeError(f"has token id {ids_Mk[row].max()}, the teacher knows ids 0 to {vocabulary - 1}", row=row)
    return ids_Mk


def decode_logprobs(
    codes: Sequence[ByteArray], tails_M: ByteArray
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float64]]:
    """float16 [M, k], descending, and float64 [M], the mass of all other tokens: together they are 1 but for rounding.

    Raises CodeError for codes that fall below 1, and for a mass that leaves nothing, or less, to one of the two.
    """
    m, k = len(tails_M), sum(band.shape[1] for band in codes)
    logprobs_Mk = np.empty((m, k), np.float16)
    masses_M = np.empty(m, np.float64)
    for rows in _runs(m):
        codes_kM = np.empty((k, rows.stop - rows.start), np.uint8)
        at = 0
        for band in codes:
            codes_kM[at : at + band.shape[1]] = band[rows].T
            at += band.shape[1]
        falls = np.zeros(codes_kM.shape[1], np.bool_)
        for slot in range(1, k):
            falls |= codes_kM[slot] >= codes_kM[slot - 1]
            np.subtract(codes_kM[slot - 1], codes_kM[slot], out=codes_kM[slot])
        falls |= codes_kM[0] == 0
        if falls.any():
            raise CodeError("has a code below 1", row=rows.start + int(falls.argmax()))
        raw_M = RAW.take(codes_kM).sum(axis=0)
        is_coded = tails_M[rows] == AS_CODED
        if (wrong := is_coded & (raw_M >= 1)).any():
            raise CodeError("has a tail byte that cannot be", row=rows.start + int(wrong.argmax()))
        tail_M = np.where(is_coded, 1 - raw_M, TAIL[tails_M[rows]])
        scale_M = np.where(is_coded, 0.0, np.log((1 - np.where(is_coded, 0.0, tail_M)) / raw_M)).astype(np.float32)
        logprobs_kM = _LOG_RAW.take(codes_kM)
        logprobs_kM += scale_M
        np.minimum(logprobs_kM, np.float32(0), out=logprobs_kM)
        logprobs_Mk[rows] = logprobs_kM.T
        masses_M[rows] = tail_M
    return logprobs_Mk, masses_M


def divergence(
    exact_Mk: npt.NDArray[np.float16], coded_Mk: npt.NDArray[np.float16], tails_M: Float64Array
) -> Float64Array:
    """float64 [M]: KL at temperature 1 of decoded rows from the exact ones, over the kept tokens and all others as one.

    `tails_M`: what the decoder says of the others; of the exact rows it is what their kept probabilities leave. In the
    form Σ p·ln(p/q) − p + q, which rounding of a sum to other than 1 does not make negative.
    """
    found = np.empty(len(exact_Mk), np.float64)
    for rows in _runs(len(exact_Mk)):
        bits = np.ascontiguousarray(exact_Mk[rows]).view(np.uint16)
        coded_bits = coded_Mk[rows].view(np.uint16)
        p_Mk, q_Mk = PROBABILITIES.take(bits), PROBABILITIES.take(coded_bits)
        mass_M, coded_M = _row_sums(p_Mk), _row_sums(q_Mk)
        whole_M = np.maximum(mass_M, 1.0)  # rounded up: divided by it
        apart_Mk = _VALUES.take(bits) - _VALUES.take(coded_bits)
        kept_M = (np.einsum("ij,ij->i", p_Mk, apart_Mk) - mass_M * (1 + np.log(whole_M))) / whole_M + coded_M
        p_M, q_M = np.maximum(1 - mass_M, 0.0), tails_M[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            rest_M = np.where(p_M > 0, p_M * np.log(p_M / q_M), 0.0) - p_M + q_M
        found[rows] = np.maximum(kept_M + rest_M, 0.0)
    return found


def logprob_tolerance(logprobs_Mk: Float64Array, *, at: Float64Array) -> Float64Array:
    """How far decoded log-probabilities may be from those that were encoded, for rows that keep `logprobs_Mk`: float64,
    of the log-probabilities `at` of those rows.

    Half a step of its code, and what the other codes and the tail byte do to the scale of the row: the tail byte alone
    6·10⁻³ at most where the codes' own sum cannot take its place.
    """
    p_Mk, of_kept_Mk = np.exp(logprobs_Mk), _half_step(logprobs_Mk)
    scale_M1 = np.log((p_Mk * np.exp(of_kept_Mk)).sum(axis=1, keepdims=True) / p_Mk.sum(axis=1, keepdims=True))
    tolerance: Float64Array = _half_step(at) + 2 * scale_M1 + 6e-3
    return tolerance


def _half_step(logprobs: Float64Array) -> Float64Array:
    """What rounding to a code changes in a log-probability, at most."""
    code = 255 * np.exp(logprobs / 4)
    below_one = np.maximum(-4 * np.log(np.minimum(code, 1.0)), 0.0)  # all of these are stored as 1
    half: Float64Array = -4 * np.log1p(-0.5 / np.maximum(code, 1.0)) + below_one
    return half


def divergence_limit(k: int) -> float:
    """The largest KL that coding a position can cost: what half a step of every code and of the tail byte comes to."""
    return 4e-5 * (1 + math.sqrt(k))


def _tails_of(mass_M: Float64Array, raw_M: Float64Array, k: int) -> ByteArray:
    """uint8 [M]: the tail bytes of rows that keep this mass, and whose k codes add up to `raw_M`, as float32 says."""
    tail_M = 1 - mass_M
    byte_M = np.searchsorted(_TAIL_BOUNDS, tail_M)
    byte_M[(byte_M == 0) & (tail_M > 0)] = 1  # nothing is impossible that was possible
    below_one = raw_M < 1 - k * 2.0**-23  # by more than float32 is off: the decoder, in float64, must find it so
    as_coded = below_one & (np.abs(raw_M - mass_M) <= np.abs(1 - TAIL[byte_M] - mass_M))
    return np.where(as_coded, AS_CODED, byte_M).astype(np.uint8)


def _require_holdable(ids: npt.NDArray[Any], logprobs: npt.NDArray[Any], codes: ByteArray, *, first_row: int) -> None:
    # Whether there is any is asked of all at once, which is much faster than of each row.
    if ids.size and ids.max() > MAX_ID:
        row = int((ids > MAX_ID).any(axis=1).argmax())
        raise RangeError(f"has token id {ids[row].max()}, and {MAX_ID} is the largest", row=first_row + row)
    if not codes.all():
        row = int((codes == 0).any(axis=1).argmax())
        value = logprobs[row][codes[row] == 0][0]
        raise RangeError(f"has {value} as a log-probability", row=first_row + row)
    # The order of the bits of negative numbers is that of their sizes: float16 itself is slow to compare.
    bits = np.ascontiguousarray(logprobs).view(np.uint16)
    if (bits[:, 1:] < bits[:, :-1]).any() and (rising := logprobs[:, 1:] > logprobs[:, :-1]).any():
        raise RangeError("has log-probabilities that do not descend", row=first_row + int(rising.any(axis=1).argmax()))
    ordered = np.sort(ids, axis=1)
    if (twice := ordered[:, 1:] == ordered[:, :-1]).any():
        raise RangeError("has a token id twice", row=first_row + int(twice.any(axis=1).argmax()))


def _row_sums(numbers_Mk: npt.NDArray[np.float32]) -> Float64Array:
    """float64 [M]; by BLAS, as numpy's own sum is slow over rows as short as these."""
    return (numbers_Mk @ np.ones(numbers_Mk.shape[1], np.float32)).astype(np.float64)


def _runs(m: int) -> Iterator[slice]:
    for start in range(0, m, _ROWS):
        yield slice(start, min(start + _ROWS, m))
