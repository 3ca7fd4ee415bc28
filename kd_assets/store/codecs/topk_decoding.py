"""Top-k rows of a `compact` part: planes of bytes back into numbers, as far as they are asked for.

What the bytes are: `topk_compact`. The invariant: bytes that no encoder writes are refused, by document and row. Names:
D = documents, M = their kept positions, S = their slots, k as in top-k.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.store.arrays import arrow_numbers, flat
from kd_assets.store.codecs import draws_columns, topk_compact, topk_ragged
from kd_assets.store.codecs.draws_compact import Draws
from kd_assets.store.codecs.topk_compact import ByteArray, CodeError
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
    IDS,
    KEPT,
    LOGSUMEXP_COLUMN,
    TAIL,
    TARGET,
    code_names,
    coded_draws_of,
    made_of,
    number_of,
)
from kd_assets.store.ragged_topk import is_kept
from kd_assets.store.writing.documents import Int64Array, offsets_of
from kd_assets.store.writing.encode import list_array


class StoredRows:
    """Rows as they are in a file, decoded as far as is asked for. Raises CodeError, which names the document."""

    def __init__(self, stored: pa.Table, vocabulary: int | None) -> None:
        self._table, self._vocabulary = stored, vocabulary
        coded = next(field.name for field in stored.schema if field.type == pa.binary())
        self.k = number_of(stored.schema, coded, "k")
        self._draws = coded_draws_of(stored.schema)
        self.decoded = made_of(self.k, self._draws).keys()
        self._is_ragged = KEPT in stored.schema.names
        has_positions = "positions" in stored.schema.names
        self._offsets: Int64Array = (
            list_offsets(stored["positions"])
            if has_positions
            else offsets_of(flat(stored["n_tokens"]).astype(np.int64) - 1)
        )
        if not has_positions and (np.diff(self._offsets) < 0).any():
            raise CodeError("a document has no tokens")

    def column(self, name: str) -> pa.Array:
        match name:
            case "topk_ids":
                return list_array(self._offsets, rows_array(self.ids_Mk, self._n_M))
            case "topk_logprobs":
                return list_array(self._offsets, rows_array(self.logprobs[0], self._n_M))
            case "logsumexp":
                return list_array(self._offsets, arrow_numbers(self._halves(LOGSUMEXP_COLUMN, 2 * self._offsets)))
            case "sampled_ids" | "sampled_counts":
                values = self._drawn.ids if name == "sampled_ids" else self._drawn.counts
                return list_array(self._offsets, list_array(self._drawn.offsets, arrow_numbers(values)))
            case _:
                return list_array(self._offsets, arrow_numbers(self._target_logprob_M))

    @cached_property
    def _n_M(self) -> Int64Array | None:
        """How many tokens each position keeps; None where all keep k."""
        if not self._is_ragged:
            return None
        width = 1 if self.k <= topk_ragged.ONE_BYTE else 2
        try:
            return topk_ragged.numbers_of(self._bytes(KEPT, self._offsets * width), self.k)
        except CodeError as e:
            raise self._named(e) from e

    @cached_property
    def ids_Mk(self) -> npt.NDArray[np.uint32]:
        n_M = self._n_M
        of_slots = None if n_M is None else offsets_of(n_M)
        if of_slots is None:
            planes = [self._plane(name, self.k) for name in IDS]
        else:
            planes = [self._bytes(name, of_slots[self._offsets]).reshape(-1, 1) for name in IDS]
        try:
            ids = topk_compact.decode_ids(planes, vocabulary=self._vocabulary)
        except CodeError as e:
            if of_slots is not None and e.row is not None:
                e.row = int(np.searchsorted(of_slots, e.row, side="right")) - 1
            raise self._named(e) from e
        if n_M is None:
            return ids
        ids_Mk = np.full((len(n_M), self.k), NO_ID, np.uint32)
        ids_Mk[is_kept(n_M, self.k)] = ids.reshape(-1)
        return ids_Mk

    @cached_property
    def logprobs(self) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float64]]:
        """As of `topk_compact.decode_logprobs`."""
        n_M = self._n_M
        if n_M is not None:
            try:
                return topk_ragged.decode_logprobs(self._falls_S(n_M), self._plane(TAIL, 1).reshape(-1), n_M, self.k)
            except CodeError as e:
                raise self._named(e) from e
        widths = [stop - first for first, stop in topk_compact.bands(self.k)]
        codes = [self._plane(name, width) for name, width in zip(code_names(self.k), widths, strict=True)]
        try:
            return topk_compact.decode_logprobs(codes, self._plane(TAIL, 1).reshape(-1))
        except CodeError as e:
            raise self._named(e) from e

    def _falls_S(self, n_M: Int64Array) -> ByteArray:
        of_slots = offsets_of(n_M)
        slot_S, falls_S = draws_columns.slot_numbers(of_slots), np.empty(int(of_slots[-1]), np.uint8)
        for name, (first, stop) in zip(code_names(self.k), topk_compact.bands(self.k), strict=True):
            of_band = draws_columns.band_offsets(of_slots, first, stop)[self._offsets]
            falls_S[draws_columns.in_band(slot_S, first, stop)] = self._bytes(name, of_band)
        return falls_S

    @cached_property
    def _drawn(self) -> Draws:
        slots = slots_of(self.ids_Mk, self._n_M)
        try:
            return draws_columns.decoded(
                slots, self._draws, self.k, documents=self._offsets, read=self._bytes, vocabulary=self._vocabulary
            )
        except CodeError as e:
            raise self._named(e) from e

    @property
    def _target_logprob_M(self) -> npt.NDArray[np.float32]:
        at_target_M, is_outside_M = targets_among(self.ids_Mk, targets_of(self._table))
        outside = self._halves(TARGET, 2 * offsets_of(is_outside_M.astype(np.int64))[self._offsets])
        if outside.max(initial=0.0) > np.float16(topk_compact.LARGEST_LOGPROB):
            raise CodeError(f"{TARGET} has {outside.max()}, and no log-probability is above 0")
        return target_logprobs(self.logprobs[0], at_target_M, is_outside_M, outside)

    def _plane(self, name: str, width: int) -> ByteArray:
        return self._bytes(name, self._offsets * width).reshape(-1, width)

    def _halves(self, name: str, offsets: Int64Array) -> npt.NDArray[np.float32]:
        numbers: npt.NDArray[np.float32] = self._bytes(name, offsets).view("<f2").astype(np.float32)
        if not np.isfinite(numbers).all():
            raise CodeError(f"{name} has a number that is NaN or infinite")
        return numbers

    def _bytes(self, name: str, offsets: Int64Array) -> ByteArray:
        """uint8, of all documents; each must have as many as `offsets` say."""
        column = self._table[name]
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # a column of no chunks stays chunked
            array = pa.array([], type=pa.binary())
        _, starts_buffer, data = array.buffers()
        if not len(array):
            return np.zeros(0, np.uint8)
        starts = np.frombuffer(starts_buffer, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
        if (wrong := np.flatnonzero(np.diff(starts) != np.diff(offsets))).size:
            row = int(wrong[0])
            found, expected = int(starts[row + 1] - starts[row]), int(offsets[row + 1] - offsets[row])
            raise CodeError(f"{name} of document {row} of the rows has {found} bytes, expected {expected}")
        return np.frombuffer(data if data is not None else b"", np.uint8)[starts[0] : starts[-1]]

    def _named(self, e: CodeError) -> CodeError:
        if e.row is None:
            return e
        document = int(np.searchsorted(self._offsets, e.row, side="right")) - 1
        return CodeError(f"row {e.row - int(self._offsets[document])} of document {document} of the rows {e}")
