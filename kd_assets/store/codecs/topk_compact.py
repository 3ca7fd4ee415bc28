"""The codec `compact` of top-k rows: token ids as byte planes, probabilities as differences of their fourth roots.

Numpy alone, and no files: `topk_encoding` puts what is here into columns. FORMAT.md has the sentences ("Codec compact
of top-k caches") and a decoder of its own to copy. Names: M = positions, k as in top-k, w = slots of a band (a slot is
a place among the k).

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

from kd_assets.store.codecs.half_floats import VALUES, round_to_halves

ByteArray = npt.NDArray[np.uint8]
Float64Array = npt.NDArray[np.float64]

N_ID_PLANES = 3
MAX_ID = (1 << (8 * N_ID_PLANES)) - 1

AS_CODED = 255
"""The tail byte of a position whose mass is the sum of the codes as they are: the better one where it is spread out."""

LARGEST_LOGPROB = 4e-3
"""What float16 and the order of summation may put a log-probability, and a row's mass, above what is possible."""

_ROWS = 2_048
"""Positions that are worked on together: what stays in a core's cache, and few enough for BLAS to use one thread."""

_DECODED_ROWS = 4_096
"""Of a decoder, to which positions come in groups of about as many (`partfile.GROUP_TOKENS`)."""


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
RAW = (np.arange(256) / 255) ** 4
"""float64 [256]: the probability that a code stands for, before its row is scaled."""
TAIL = np.sin(np.pi / 2 * np.arange(256) / 255) ** 4
"""float64 [256]: the mass that a tail byte stands for, but for `AS_CODED`. Its rounding costs 1.3·10⁻⁵ of KL at most,
wherever it is, and the smallest mass is 1.4·10⁻⁹."""
with np.errstate(divide="ignore"):
    _LOG_RAW = np.log(RAW).astype(np.float32)
_RAW_OF_BITS, _LOG_RAW_OF_BITS = RAW.astype(np.float32)[CODES], _LOG_RAW[CODES]
"""float32 [65536]: of the code of each float16, so that it is looked up in one step."""
_TAIL_BOUNDS = np.append((TAIL[:-2] + TAIL[1:-1]) / 2, np.inf)
"""float64 [255]: the boundary between each tail byte and the next."""


def _cell(tail_M: Float64Array) -> npt.NDArray[np.intp]:
    """Where a mass of 0 to 1 lies among 65,537 cells, so narrow that none has two boundaries. It never falls."""
    return (np.sqrt(np.sqrt(tail_M)) * 65_536).astype(np.intp)


_BOUNDS_BELOW = np.searchsorted(_cell(_TAIL_BOUNDS[:-1]), np.arange(65_537))
"""intp [65537]: how many boundaries lie in the cells before each."""


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
    made = _no_rows(*ids_Mk.shape)
    for _ in _encoded(ids_Mk, logprobs_Mk, made):
        pass
    return made


def encode_measured(
    ids_Mk: npt.NDArray[np.uint32], logprobs_Mk: npt.NDArray[np.float16]
) -> tuple[CodedRows, npt.NDArray[np.float16], Float64Array]:
    """As `encode`, and in the same go what `decode_logprobs` makes of it, float16 [M, k], and its `divergence`, [M]."""
    made = _no_rows(*ids_Mk.shape)
    decoded_Mk, kl_M = np.empty(logprobs_Mk.shape, np.float16), np.empty(len(logprobs_Mk))
    for rows, run in _encoded(ids_Mk, logprobs_Mk, made):
        raw_M = RAW.take(np.ascontiguousarray(run.codes_Mk.T)).sum(axis=0)  # by slot, as the decoder adds them up
        tail_M, scale_M = _scales(raw_M, made.tails_M[rows])
        coded_Mk = _LOG_RAW_OF_BITS.take(run.at_Mk, mode="wrap")
        bits_Mk = _scaled(coded_Mk, scale_M[:, None])
        decoded_Mk[rows] = bits_Mk.view(np.float16)
        apart_Mk = np.subtract(VALUES.take(run.at_Mk, mode="wrap"), coded_Mk, out=coded_Mk)
        kl_M[rows] = _divergence(run.p_Mk, run.mass_M, apart_Mk, _row_sums(PROBABILITIES.take(bits_Mk)), tail_M)
    return made, decoded_Mk, kl_M


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Run:
    """What encoding knows of positions that are worked on together, until it goes on to the next ones."""

    at_Mk: npt.NDArray[np.intp]
    """The bits of their log-probabilities."""
    codes_Mk: ByteArray
    p_Mk: npt.NDArray[np.float32]
    mass_M: Float64Array


def _no_rows(m: int, k: int) -> CodedRows:
    return CodedRows(
        ids=tuple(np.empty((m, k), np.uint8) for _ in range(N_ID_PLANES)),
        codes=tuple(np.empty((m, stop - first), np.uint8) for first, stop in bands(k)),
        tails_M=np.empty(m, np.uint8),
    )


def _encoded(
    ids_Mk: npt.NDArray[np.uint32], logprobs_Mk: npt.NDArray[np.float16], made: CodedRows
) -> Iterator[tuple[slice, _Run]]:
    """Fill `made`, run by run."""
    m, k = ids_Mk.shape
    most = min(m, _ROWS + 1)
    # the same memory for every run: fresh pages cost as much as what is written to them
    at, p_Mk, raw_Mk = np.empty((most, k), np.intp), np.empty((most, k), np.float32), np.empty((most, k), np.float32)
    codes_Mk, falls_Mk = np.empty((most, k), np.uint8), np.empty((most, k), np.uint8)
    for rows in _runs(m):
        n = rows.stop - rows.start
        ids, at_Mk, codes, falls = ids_Mk[rows], at[:n], codes_Mk[:n], falls_Mk[:n]
        bits = np.ascontiguousarray(logprobs_Mk[rows]).view(np.uint16)
        np.copyto(at_Mk, bits)
        np.take(CODES, at_Mk, out=codes, mode="wrap")  # a third of the time that indexing takes
        _require_holdable(ids, logprobs_Mk[rows], codes, first_row=rows.start)
        for byte, plane in enumerate(made.ids):
            np.copyto(plane[rows], ids >> np.uint32(8 * byte) if byte else ids, casting="unsafe")
        np.subtract(codes.reshape(-1)[:-1], codes.reshape(-1)[1:], out=falls.reshape(-1)[1:])
        falls[:, 0] = codes[:, 0]
        for (first, stop), band in zip(bands(k), made.codes, strict=True):
            np.copyto(band[rows], falls[:, first:stop])
        mass_M = _row_sums(np.take(PROBABILITIES, at_Mk, out=p_Mk[:n], mode="wrap"))
        if (too_much := np.flatnonzero(mass_M > 1 + LARGEST_LOGPROB)).size:
            row = int(too_much[0])
            raise RangeError(f"its probabilities add up to {mass_M[row]:.6f}", row=rows.start + row)
        raw_M = _row_sums(np.take(_RAW_OF_BITS, at_Mk, out=raw_Mk[:n], mode="wrap"))
        made.tails_M[rows] = _tails_of(np.minimum(mass_M, 1.0), raw_M, k)
        yield rows, _Run(at_Mk=at_Mk, codes_Mk=codes, p_Mk=p_Mk[:n], mass_M=mass_M)


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
    for start in range(0, m, _DECODED_ROWS):
        rows = slice(start, min(start + _DECODED_ROWS, m))
        codes_kM = np.empty((k, rows.stop - rows.start), np.uint8)
        at = 0
        for band in codes:
            codes_kM[at : at + band.shape[1]] = band[rows].T
            at += band.shape[1]
        falls = codes_kM[0] == 0
        for slot in range(1, k):
            falls |= codes_kM[slot] >= codes_kM[slot - 1]
            np.subtract(codes_kM[slot - 1], codes_kM[slot], out=codes_kM[slot])
        if falls.any():
            raise CodeError("has a code below 1", row=rows.start + int(falls.argmax()))
        at_kM = codes_kM.astype(np.intp)
        raw_M = RAW.take(at_kM, mode="wrap").sum(axis=0)
        if (wrong := (tails_M[rows] == AS_CODED) & (raw_M >= 1)).any():
            raise CodeError("has a tail byte that cannot be", row=rows.start + int(wrong.argmax()))
        masses_M[rows], scale_M = _scales(raw_M, tails_M[rows])
        logprobs_Mk[rows] = _scaled(_LOG_RAW.take(at_kM, mode="wrap"), scale_M).view(np.float16).T
    return logprobs_Mk, masses_M


def _scales(raw_M: Float64Array, tails_M: ByteArray) -> tuple[Float64Array, npt.NDArray[np.float32]]:
    """Of rows whose codes add up to `raw_M`: the mass of all other tokens, and what is added to their logarithms."""
    is_coded = tails_M == AS_CODED
    said_M = TAIL.take(tails_M)
    scale_M = np.where(is_coded, 0.0, np.log((1 - np.where(is_coded, 0.0, said_M)) / raw_M)).astype(np.float32)
    return np.where(is_coded, 1 - raw_M, said_M), scale_M


def _scaled(log_raw: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the decoded log-probabilities, which `log_raw` become."""
    log_raw += scale
    np.minimum(log_raw, np.float32(0), out=log_raw)
    return round_to_halves(log_raw)


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
        apart_Mk = VALUES.take(bits) - VALUES.take(coded_bits)
        found[rows] = _divergence(p_Mk, mass_M, apart_Mk, coded_M, tails_M[rows])
    return found


def _divergence(
    p_Mk: npt.NDArray[np.float32],
    mass_M: Float64Array,
    apart_Mk: npt.NDArray[np.float32],
    coded_M: Float64Array,
    tails_M: Float64Array,
) -> Float64Array:
    """Of the exact probabilities and their sum, ln p - ln q, and what the decoder keeps and says of the others."""
    whole_M = np.maximum(mass_M, 1.0)  # rounded up: divided by it
    kept_M = (np.einsum("ij,ij->i", p_Mk, apart_Mk) - mass_M * (1 + np.log(whole_M))) / whole_M + coded_M
    p_M = np.maximum(1 - mass_M, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest_M = np.where(p_M > 0, p_M * np.log(p_M / tails_M), 0.0) - p_M + tails_M
    kl_M: Float64Array = np.maximum(kept_M + rest_M, 0.0)
    return kl_M


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
    byte_M = _BOUNDS_BELOW.take(_cell(tail_M))
    byte_M += _TAIL_BOUNDS.take(byte_M) < tail_M  # `searchsorted` in a sixth of its time
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
    if _any_neighbours(np.less, bits) and (rising := logprobs[:, 1:] > logprobs[:, :-1]).any():
        raise RangeError("has log-probabilities that do not descend", row=first_row + int(rising.any(axis=1).argmax()))
    ordered = np.sort(ids, axis=1)
    if _any_neighbours(np.equal, ordered):
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        raise RangeError("has a token id twice", row=first_row + int(twice.argmax()))


def _any_neighbours(compare: np.ufunc, numbers_Mk: npt.NDArray[Any]) -> bool:
    """Whether this is so of a number and the one before it in its row; rows as short as these are compared as one."""
    k, flat = numbers_Mk.shape[1], numbers_Mk.reshape(-1)
    found = compare(flat[1:], flat[:-1])
    found[k - 1 :: k] = False
    return bool(found.any())


def _row_sums(numbers_Mk: npt.NDArray[np.float32]) -> Float64Array:
    """float64 [M]; by BLAS, as numpy's own sum is slow over rows as short as these."""
    return (numbers_Mk @ np.ones(numbers_Mk.shape[1], np.float32)).astype(np.float64)


_SUMMED = 8_192
"""Where rows have always been cut for BLAS, which adds a row that is alone up in another order than one among others:
the bytes of a part hang on it."""


def _runs(m: int) -> Iterator[slice]:
    start = 0
    while start < m:
        stop = min(start + _ROWS, m)
        if m - stop == 1 and stop % _SUMMED:
            stop = m
        yield slice(start, stop)
        start = stop
