"""Top-k rows on their way into a `compact` part: numbers into planes of bytes, one binary value a document and plane.

What the bytes are: `topk_compact`. Names: D = documents, M = their kept positions, k as in top-k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.errors import CodecRangeError
from kd_assets.store import schema as schemas
from kd_assets.store.arrays import flat
from kd_assets.store.codecs import draws_columns, topk_compact, topk_ragged
from kd_assets.store.codecs.topk_compact import ByteArray, CodedRows, RangeError
from kd_assets.store.codecs.topk_ragged import RaggedRows
from kd_assets.store.codecs.topk_rows import (
    NO_ID,
    list_offsets,
    rows_array,
    slots_of,
    target_logprobs,
    targets_among,
    targets_of,
)
from kd_assets.store.codecs.topk_schema import (
    COMPACT,
    IDS,
    KEPT,
    LOGSUMEXP_COLUMN,
    TAIL,
    TARGET,
    code_names,
    compact_topk_schema,
    draws_of,
)
from kd_assets.store.ragged_topk import fixed_ids, fixed_logprobs
from kd_assets.store.reading.columns import Ragged, column_of
from kd_assets.store.writing.documents import Int64Array, offsets_of
from kd_assets.store.writing.encode import list_array

_LARGEST_HALF = float(np.finfo(np.float16).max)


class PlainRows:
    """Rows without a codec, on their way into a file."""

    def __init__(self, plain: pa.Table) -> None:
        self._table, self._names = plain, plain.schema.names
        self.k, self._top_p = schemas.k_of(plain.schema), schemas.top_p_of(plain.schema)
        self._offsets = list_offsets(plain["topk_ids"])
        self._n_M: Int64Array | None = None
        if self._top_p is None:
            self.ids_Mk = flat(plain["topk_ids"]).reshape(-1, self.k)
            self.logprobs_Mk = flat(plain["topk_logprobs"]).reshape(-1, self.k)
        else:
            ids, logprobs = (column_of(plain[name]).values for name in ("topk_ids", "topk_logprobs"))
            assert isinstance(ids, Ragged)
            assert isinstance(logprobs, Ragged)
            self.ids_Mk, self.logprobs_Mk = fixed_ids(ids, self.k, NO_ID), fixed_logprobs(logprobs, self.k)
            self._n_M = ids.lengths.astype(np.int64)
        self._sums_M = flat(plain["logsumexp"]) if "logsumexp" in self._names else None
        self._target_M = flat(plain["target_logprob"])
        self._at_target_M, self._is_outside_M = targets_among(self.ids_Mk, targets_of(plain))
        self._draws = draws_of(plain.schema)

    def coded(self) -> tuple[CodedRows | RaggedRows, npt.NDArray[np.float16], npt.NDArray[np.float64]]:
        """The bytes, what will be decoded of them (float16 [M, k]), and the divergence of that (float64 [M]).

        Raises CodecRangeError, which names document and row, for numbers that the columns cannot hold."""
        try:
            _require_half("a target's log-probability", self._target_M, most=topk_compact.LARGEST_LOGPROB)
            if self._sums_M is not None:
                _require_half("a logsumexp", self._sums_M, most=_LARGEST_HALF)
            if self._n_M is None:
                return topk_compact.encode_measured(self.ids_Mk, self.logprobs_Mk)
            ragged = topk_ragged.encode(self.ids_Mk, self.logprobs_Mk, self._n_M)
        except RangeError as e:
            raise CodecRangeError(_refusal(self._table, self._offsets, e)) from e
        coded_Mk, tails_M = topk_ragged.decode_logprobs(ragged.falls_S, ragged.tails_M, self._n_M, self.k)
        return ragged, coded_Mk, self.divergence(coded_Mk, tails_M)

    def divergence(
        self, coded_Mk: npt.NDArray[np.float16], tails_M: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """float64 [M]: of decoded rows, with what the decoder says of the others, from these."""
        if self._n_M is None:
            return topk_compact.divergence(self.logprobs_Mk, coded_Mk, tails_M)
        return topk_ragged.divergence(self.logprobs_Mk, coded_Mk, tails_M, self._n_M)

    def _topk_planes(self, coded: CodedRows | RaggedRows) -> dict[str, pa.Array]:
        """The columns of token ids and of codes."""
        offsets, names = self._offsets, code_names(self.k)
        if isinstance(coded, CodedRows):
            of_ids = {name: _of_positions(plane, offsets) for name, plane in zip(IDS, coded.ids, strict=True)}
            return of_ids | {name: _of_positions(band, offsets) for name, band in zip(names, coded.codes, strict=True)}
        assert self._n_M is not None
        of_slots = offsets_of(self._n_M)
        slot_S = draws_columns.slot_numbers(of_slots)
        width = 1 if self.k <= topk_ragged.ONE_BYTE else 2
        planes = {KEPT: _binaries(topk_ragged.number_bytes(self._n_M, self.k), offsets * width)}
        planes |= {name: _binaries(plane, of_slots[offsets]) for name, plane in zip(IDS, coded.ids, strict=True)}
        for name, (first, stop) in zip(names, topk_compact.bands(self.k), strict=True):
            of_band = draws_columns.band_offsets(of_slots, first, stop)[offsets]
            planes[name] = _binaries(coded.falls_S[draws_columns.in_band(slot_S, first, stop)], of_band)
        return planes

    def _coded_draws(self) -> dict[str, pa.Array]:
        """Raises CodecRangeError, as `coded`."""
        if not self._draws:
            return {}
        drawn = draws_columns.drawn_of(self._table)
        try:
            planes = draws_columns.stored(slots_of(self.ids_Mk, self._n_M), drawn, self._draws, self.k)
        except RangeError as e:
            raise CodecRangeError(_refusal(self._table, self._offsets, e)) from e
        return {name: _binaries(octets, of_rows[self._offsets]) for name, (octets, of_rows) in planes.items()}

    @property
    def _stored_schema(self) -> pa.Schema:
        return compact_topk_schema(
            self.k,
            self._draws,
            is_cut="outside_mass" in self._names,
            positions="positions" in self._names,
            logsumexp=self._sums_M is not None,
            top_p=self._top_p,
        )

    def with_coded_draws(self, stored: pa.Table) -> pa.Table:
        planes = self._coded_draws()
        columns = [planes[name] if name in planes else stored[name] for name in self._stored_schema.names]
        return pa.Table.from_arrays(columns, schema=self._stored_schema)

    def stored(self, coded: CodedRows | RaggedRows) -> pa.Table:
        offsets, outside = self._offsets, self._target_M[self._is_outside_M]
        planes = {
            **self._coded_draws(),
            **self._topk_planes(coded),
            TAIL: _of_positions(coded.tails_M, offsets),
            TARGET: _binaries(_half_bytes(outside), 2 * offsets_of(self._is_outside_M.astype(np.int64))[offsets]),
        }
        if self._sums_M is not None:
            planes[LOGSUMEXP_COLUMN] = _of_positions(_half_bytes(self._sums_M).reshape(-1, 2), offsets)
        schema = self._stored_schema
        columns = [planes[name] if name in planes else self._table[name] for name in schema.names]
        return pa.Table.from_arrays(columns, schema=schema)

    def decoded(self, coded_Mk: npt.NDArray[np.float16]) -> pa.Table:
        """What a reader will get, of the log-probabilities that are decoded."""
        outside = _rounded(self._target_M[self._is_outside_M])
        changed = {
            "topk_logprobs": rows_array(coded_Mk, self._n_M),
            "target_logprob": pa.array(target_logprobs(coded_Mk, self._at_target_M, self._is_outside_M, outside)),
            **({} if self._sums_M is None else {"logsumexp": pa.array(_rounded(self._sums_M))}),
        }
        columns = [
            list_array(self._offsets, changed[name]) if name in changed else self._table[name] for name in self._names
        ]
        return pa.Table.from_arrays(columns, schema=self._table.schema)


def _of_positions(bytes_Mw: ByteArray, offsets: Int64Array) -> pa.Array:
    width = bytes_Mw.shape[1] if bytes_Mw.ndim == 2 else 1
    return _binaries(bytes_Mw.reshape(-1), offsets * width)


def _binaries(data: ByteArray, offsets: Int64Array) -> pa.Array:
    """One binary value for each document: bytes `offsets[i]` to `offsets[i + 1]`."""
    if int(offsets[-1]) > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]} bytes of a plane in one part: more than 2^31 - 1, make parts smaller")
    starts = pa.py_buffer(offsets.astype(np.int32))
    buffers = [None, starts, pa.py_buffer(np.ascontiguousarray(data))]
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers)


def _half_bytes(numbers: npt.NDArray[np.float32]) -> ByteArray:
    return numbers.astype("<f2").view(np.uint8)


def _rounded(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return numbers.astype(np.float16).astype(np.float32)


def _require_half(what: str, numbers: npt.NDArray[np.float32], *, most: float) -> None:
    """Raise RangeError for a number that float16 does not hold, or that is above `most`."""
    with np.errstate(invalid="ignore"):
        holds = (numbers >= -_LARGEST_HALF) & (numbers <= most)
    if (refused := np.flatnonzero(~holds)).size:
        row = int(refused[0])
        raise RangeError(f"has {numbers[row]} as {what}", row=row)


def _refusal(plain: pa.Table, offsets: Int64Array, e: RangeError) -> str:
    document = int(np.searchsorted(offsets, e.row, side="right")) - 1
    document_id: Any = plain["document_id"][document].as_py()
    return (
        f"row {e.row - int(offsets[document])} of document {document_id!r} {e}, which the codec {COMPACT} of top-k "
        "caches cannot hold: look at this document and at the teacher, or keep the cache plain (topk.codec: plain)"
    )
