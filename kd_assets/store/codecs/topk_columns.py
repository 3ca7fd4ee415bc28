"""The columns of a `compact` top-k part: planes of bytes, one binary value a document and plane.

What the bytes are: `topk_compact`. Used by `codec`, and for the schema by the checks. Names: D = documents, M = their
kept positions, k as in top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.errors import CodecRangeError
from kd_assets.store import schema as schemas
from kd_assets.store.codecs import topk_compact
from kd_assets.store.codecs.coded import Coded
from kd_assets.store.codecs.topk_compact import ByteArray, CodedRows, CodeError, RangeError
from kd_assets.store.writing.documents import Int64Array, offsets_of
from kd_assets.store.writing.encode import flat, list_array, vector_array

COMPACT = "compact"
SINCE = "0.1.0"
"""The first version of kd_assets that reads it."""

CONVENTION = f"bytes by the codec compact of FORMAT.md, where a decoder stands; {schemas.CONVENTIONS['topk_cache']}"

_IDS = tuple(f"topk_ids_byte_{n}" for n in range(topk_compact.N_ID_PLANES))
_TAIL = "topk_tail"
_TARGET = "target_logprob_outside"
_LOGSUMEXP = "logsumexp_float16"
_LARGEST_NUMBER = 1 << 24
"""Of what a column's metadata may say: there are no more token ids."""
_LARGEST_HALF = float(np.finfo(np.float16).max)


def compact_topk_schema(k: int, draws: int = 0, *, positions: bool = False, logsumexp: bool = True) -> pa.Schema:
    """The columns in the file; arguments as of `schema.topk_schema`."""
    plain = schemas.topk_schema(k, draws, positions=positions, logsumexp=logsumexp)
    names = [*_IDS, *_code_names(k), _TAIL, _TARGET, *([_LOGSUMEXP] if logsumexp else [])]
    coded = [schemas.column(name, pa.binary(), k=str(k)) for name in names]
    as_they_are = [field for field in plain if field.name not in _made_of(k)]
    n_common = len(schemas.COMMON_COLUMNS)
    metadata = {
        **plain.metadata,
        b"kd_assets.convention": CONVENTION.encode(),
        b"kd_assets.codec": COMPACT.encode(),
        b"kd_assets.codec_since": SINCE.encode(),
    }
    return pa.schema([*as_they_are[:n_common], *coded, *as_they_are[n_common:]], metadata=metadata)


class CompactTopk:
    """`codec.Codec` of top-k caches."""

    def plain_schema(self, stored: pa.Schema) -> pa.Schema:
        names = stored.names
        draws = _number(stored, "sampled_ids", "draws") if "sampled_ids" in names else 0
        positions, logsumexp = "positions" in names, _LOGSUMEXP in names
        k = _number(stored, _TAIL, "k")
        expected = compact_topk_schema(k, draws, positions=positions, logsumexp=logsumexp)
        if names != expected.names:
            raise ValueError(f"its columns are {', '.join(names)}, expected {', '.join(expected.names)}")
        return schemas.topk_schema(k, draws, positions=positions, logsumexp=logsumexp)

    def stored_names(self, stored: pa.Schema, names: Sequence[str]) -> list[str]:
        made_of = _made_of(_number(stored, _TAIL, "k"))
        if not made_of.keys() & set(names):
            return list(names)
        counts = ["n_tokens", *(["positions"] if "positions" in stored.names else [])]
        return list(dict.fromkeys([*counts, *(column for name in names for column in made_of.get(name, (name,)))]))

    def decode(self, stored: pa.Table, wanted: pa.Schema, *, vocabulary: int | None) -> pa.Table:
        rows = _StoredRows(stored, vocabulary)
        columns = [rows.column(name) if name in _DECODED else stored[name] for name in wanted.names]
        return pa.Table.from_arrays(columns, schema=wanted)

    def encode(self, plain: pa.Table) -> Coded:
        """The error: `max_codec_kl`, the largest of a position, and `max_codec_mean_kl`, the mean of the part, at
        temperature 1, over the kept tokens and all others as one."""
        rows = _PlainRows(plain)
        coded = rows.coded()
        coded_Mk, tails_M = topk_compact.decode_logprobs(coded.codes, coded.tails_M)
        kl_M = topk_compact.divergence(rows.logprobs_Mk, coded_Mk, tails_M)
        return Coded(
            stored=rows.stored(coded),
            decoded=rows.decoded(coded_Mk),
            error={
                "max_codec_kl": float(kl_M.max(initial=0.0)),
                "max_codec_mean_kl": float(kl_M.mean()) if len(kl_M) else 0.0,
            },
        )


_DECODED = ("topk_ids", "topk_logprobs", "logsumexp", "target_logprob")


def _number(schema: pa.Schema, name: str, key: str) -> int:
    """What a column's metadata say, a number above 0. Raises ValueError where they do not."""
    said = (schema.field(name).metadata or {}).get(key.encode(), b"").decode(errors="backslashreplace")
    if not said.isdecimal() or not 0 < int(said) <= _LARGEST_NUMBER:
        raise ValueError(f"the metadata of column {name} have {said!r:.40} as {key}")
    return int(said)


def _code_names(k: int) -> tuple[str, ...]:
    """Of the bands, by their slots: `topk_codes_4_15`."""
    return tuple(
        f"topk_codes_{first}" if stop == first + 1 else f"topk_codes_{first}_{stop - 1}"
        for first, stop in topk_compact.bands(k)
    )


def _made_of(k: int) -> dict[str, tuple[str, ...]]:
    """Column that a reader gets → those of the file that it is made of, but for what counts positions."""
    codes = (*_code_names(k), _TAIL)
    return {
        "topk_ids": _IDS,
        "topk_logprobs": codes,
        "logsumexp": (_LOGSUMEXP,),
        # of a token among the k it is that of its slot, and which token it is stands in the document
        "target_logprob": (*_IDS, *codes, _TARGET, "input_ids"),
    }


class _PlainRows:
    """Rows without a codec, on their way into a file."""

    def __init__(self, plain: pa.Table) -> None:
        self._table, self._names = plain, plain.schema.names
        self.k: int = plain.schema.field("topk_ids").type.value_type.list_size
        self._offsets = list_offsets(plain["topk_ids"])
        self.ids_Mk = flat(plain["topk_ids"]).reshape(-1, self.k)
        self.logprobs_Mk = flat(plain["topk_logprobs"]).reshape(-1, self.k)
        self._sums_M = flat(plain["logsumexp"]) if "logsumexp" in self._names else None
        self._target_M = flat(plain["target_logprob"])
        self._is_target_Mk = self.ids_Mk == _targets_of(plain)[:, None]
        self._is_outside_M = ~self._is_target_Mk.any(axis=1)

    def coded(self) -> CodedRows:
        """Raises CodecRangeError, which names document and row, for numbers that the columns cannot hold."""
        try:
            _require_half("a target's log-probability", self._target_M, most=topk_compact.LARGEST_LOGPROB)
            if self._sums_M is not None:
                _require_half("a logsumexp", self._sums_M, most=_LARGEST_HALF)
            return topk_compact.encode(self.ids_Mk, self.logprobs_Mk)
        except RangeError as e:
            raise CodecRangeError(_refusal(self._table, self._offsets, e)) from e

    def stored(self, coded: CodedRows) -> pa.Table:
        offsets, outside = self._offsets, self._target_M[self._is_outside_M]
        planes = {
            **{name: _of_positions(plane, offsets) for name, plane in zip(_IDS, coded.ids, strict=True)},
            **{name: _of_positions(band, offsets) for name, band in zip(_code_names(self.k), coded.codes, strict=True)},
            _TAIL: _of_positions(coded.tails_M, offsets),
            _TARGET: _binaries(_half_bytes(outside), 2 * offsets_of(self._is_outside_M)[offsets]),
        }
        if self._sums_M is not None:
            planes[_LOGSUMEXP] = _of_positions(_half_bytes(self._sums_M).reshape(-1, 2), offsets)
        draws = _number(self._table.schema, "sampled_ids", "draws") if "sampled_ids" in self._names else 0
        schema = compact_topk_schema(
            self.k, draws, positions="positions" in self._names, logsumexp=self._sums_M is not None
        )
        columns = [planes[name] if name in planes else self._table[name] for name in schema.names]
        return pa.Table.from_arrays(columns, schema=schema)

    def decoded(self, coded_Mk: npt.NDArray[np.float16]) -> pa.Table:
        """What a reader will get, of the log-probabilities that are decoded."""
        outside = _rounded(self._target_M[self._is_outside_M])
        changed = {
            "topk_logprobs": vector_array(coded_Mk),
            "target_logprob": pa.array(_target_logprobs(coded_Mk, self._is_target_Mk, outside)),
            **({} if self._sums_M is None else {"logsumexp": pa.array(_rounded(self._sums_M))}),
        }
        columns = [
            list_array(self._offsets, changed[name]) if name in changed else self._table[name] for name in self._names
        ]
        return pa.Table.from_arrays(columns, schema=self._table.schema)


class _StoredRows:
    """Rows as they are in a file, decoded as far as is asked for. Raises CodeError, which names the document."""

    def __init__(self, stored: pa.Table, vocabulary: int | None) -> None:
        self._table, self._vocabulary = stored, vocabulary
        coded = next(field.name for field in stored.schema if field.type == pa.binary())
        self.k = _number(stored.schema, coded, "k")
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
                return list_array(self._offsets, vector_array(self.ids_Mk))
            case "topk_logprobs":
                return list_array(self._offsets, vector_array(self.logprobs[0]))
            case "logsumexp":
                return list_array(self._offsets, pa.array(self._halves(_LOGSUMEXP, 2 * self._offsets)))
            case _:
                return list_array(self._offsets, pa.array(self._target_logprob_M))

    @cached_property
    def ids_Mk(self) -> npt.NDArray[np.uint32]:
        planes = [self._plane(name, self.k) for name in _IDS]
        try:
            return topk_compact.decode_ids(planes, vocabulary=self._vocabulary)
        except CodeError as e:
            raise self._named(e) from e

    @cached_property
    def logprobs(self) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float64]]:
        """As of `topk_compact.decode_logprobs`."""
        widths = [stop - first for first, stop in topk_compact.bands(self.k)]
        codes = [self._plane(name, width) for name, width in zip(_code_names(self.k), widths, strict=True)]
        try:
            return topk_compact.decode_logprobs(codes, self._plane(_TAIL, 1).reshape(-1))
        except CodeError as e:
            raise self._named(e) from e

    @property
    def _target_logprob_M(self) -> npt.NDArray[np.float32]:
        is_target_Mk = self.ids_Mk == _targets_of(self._table)[:, None]
        is_outside_M = ~is_target_Mk.any(axis=1)
        outside = self._halves(_TARGET, 2 * offsets_of(is_outside_M)[self._offsets])
        return _target_logprobs(self.logprobs[0], is_target_Mk, outside)

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


def list_offsets(column: pa.ChunkedArray) -> Int64Array:
    """int64 [D + 1]: where each row's list begins among the elements of all, and the end."""
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks if len(chunk)]
    return offsets_of(np.concatenate([np.zeros(0, np.int32), *lengths]).astype(np.int64))


def _targets_of(table: pa.Table) -> npt.NDArray[np.uint32]:
    """uint32 [M]: the token that follows each kept position."""
    input_ids, offsets = flat(table["input_ids"]), list_offsets(table["input_ids"])
    if "positions" not in table.schema.names:
        is_next = np.ones(len(input_ids), np.bool_)
        is_next[offsets[:-1]] = False
        return input_ids[is_next]
    kept, lengths = flat(table["positions"]).astype(np.int64), np.diff(list_offsets(table["positions"]))
    if (kept >= np.repeat(np.diff(offsets) - 1, lengths)).any():
        raise CodeError("a position is beyond the end of its document")
    targets: npt.NDArray[np.uint32] = input_ids[np.repeat(offsets[:-1], lengths) + kept + 1]
    return targets


def _target_logprobs(
    logprobs_Mk: npt.NDArray[np.float16], is_target_Mk: npt.NDArray[np.bool_], outside: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """float32 [M]: of a target among the k that of its slot, of the others those of `outside`, one after the other."""
    slot_M = is_target_Mk.argmax(axis=1)
    rows_M = np.arange(len(slot_M))
    found_M: npt.NDArray[np.float32] = logprobs_Mk[rows_M, slot_M].astype(np.float32)
    found_M[~is_target_Mk[rows_M, slot_M]] = outside
    return found_M


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
