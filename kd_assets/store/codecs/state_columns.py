"""The columns of coded hidden states, and the way there and back: two in the place of a column of bfloat16.

A coded column has a name of its own, so that a program that knows no codecs finds no states rather than wrong ones:

- `split`: `<state>_high_bytes`, one zstd frame a document, and `<state>_low_bytes`, uint8 [L, H]
- `fp8`: `<state>_fp8`, uint8 [L, H], and `<state>_fp8_scale`, float32 [L]
- `int8_<group>`: `<state>_int8`, int8 [L, H], and `<state>_int8_scales`, uint16 [L, H / group]

What the numbers are: `states`. The metadata of a coded column are those of the column that it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.errors import CodecRangeError
from kd_assets.store.arrays import arrow_numbers, flat
from kd_assets.store.codecs import states
from kd_assets.store.codecs.coded import Coded
from kd_assets.store.codecs.state_codec import group_of
from kd_assets.store.schema import hidden_state_of, list_of, vector_of
from kd_assets.store.writing.documents import Int64Array
from kd_assets.store.writing.encode import list_array, vector_array

_SUFFIXES = {
    "split": ("_high_bytes", "_low_bytes"),
    "fp8": ("_fp8", "_fp8_scale"),
    "int8": ("_int8", "_int8_scales"),
}

CODEC_KEY, SINCE_KEY = b"kd_assets.codec", b"kd_assets.codec_since"
SINCE = "0.1.0"
"""The first version of kd_assets that reads them."""

Uint16Array = npt.NDArray[np.uint16]


class CodedStates:
    """`codec.Codec` of hidden-state caches: `split`, `fp8`, `int8_32` or `int8_128`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._kind = "int8" if group_of(name) is not None else name

    def stored_schema(self, plain: pa.Schema) -> pa.Schema:
        """The columns in the file. Raises ValueError for states that the codec's groups do not divide."""
        fields: list[pa.Field] = []
        for field in plain:
            fields += [field] if hidden_state_of(field.name) is None else self._fields(field)
        return pa.schema(fields, metadata={**plain.metadata, CODEC_KEY: self.name.encode(), SINCE_KEY: SINCE.encode()})

    def plain_schema(self, stored: pa.Schema) -> pa.Schema:
        """What a reader gets of a part with this schema. Raises ValueError or KeyError for one that is not of it."""
        main = _SUFFIXES[self._kind][self._kind == "split"]
        fields = []
        for field in stored:
            stem = _stem(field.name, _SUFFIXES[self._kind])
            if stem is None:
                if b"codec" in (field.metadata or {}):
                    raise ValueError(f"column {field.name} is none of codec {self.name}")
                fields.append(field)
            elif field.name == stem + main:
                of_field = {k: v for k, v in (field.metadata or {}).items() if k != b"codec"}
                bits = list_of(vector_of(pa.uint16(), _width(field)))
                fields.append(pa.field(stem, bits, nullable=False, metadata=of_field))
        metadata = {k: v for k, v in (stored.metadata or {}).items() if k not in (CODEC_KEY, SINCE_KEY)}
        plain = pa.schema(fields, metadata=metadata)
        expected = self.stored_schema(plain)
        if not stored.equals(expected, check_metadata=True):
            raise ValueError(
                f"its columns are {', '.join(stored.names)}, which are not as codec {self.name} writes them"
            )
        return plain

    def stored_names(self, stored: pa.Schema, names: Sequence[str]) -> list[str]:
        """The columns of the file that these columns of the plain schema are made of."""
        return [
            name for wanted in names for name in ((wanted,) if hidden_state_of(wanted) is None else self._names(wanted))
        ]

    def encode(self, plain: pa.Table) -> Coded:
        """The stored form, and what readers will get of it. Raises CodecRangeError, which names the document, for
        numbers that the codec cannot hold, ValueError for states that its groups do not divide.

        Its `error` has `max_codec_state_error`, the largest norm of a difference over that of the state,
        `max_codec_relative_rms`, of all values of the worst column, and `max_codec_abs_error`.
        """
        stored_schema = self.stored_schema(plain.schema)
        columns: list[pa.Array] = []
        for name in plain.schema.names:
            if hidden_state_of(name) is None:
                columns.append(plain[name])
                continue
            offsets, bits_NH = _lists_of(plain[name])
            try:
                columns += self._encoded(offsets, bits_NH)
            except states.StateRangeError as e:
                row = int(np.searchsorted(offsets, e.row, side="right")) - 1
                at = f"{name} of document {plain['document_id'][row].as_py()!r}, vector {e.row - offsets[row]}"
                raise CodecRangeError(f"{at}: {e}") from e
        stored = pa.Table.from_arrays(columns, schema=stored_schema)
        decoded = self.decode(stored, plain.schema, vocabulary=None)
        return Coded(stored=stored, decoded=decoded, error=states_error(plain, decoded))

    def decode(self, stored: pa.Table, wanted: pa.Schema, *, vocabulary: int | None) -> pa.Table:
        """These plain columns, of some rows. Raises ValueError for what `encode` never writes."""
        stored.validate(full=True)  # offsets that point elsewhere would end the process
        columns = [
            stored[field.name] if hidden_state_of(field.name) is None else self._decoded(stored, field)
            for field in wanted
        ]
        return pa.Table.from_arrays(columns, schema=wanted)

    def _names(self, state: str) -> tuple[str, str]:
        first, second = _SUFFIXES[self._kind]
        return state + first, state + second

    def _fields(self, field: pa.Field) -> list[pa.Field]:
        size, group = field.type.value_type.list_size, group_of(self.name)
        metadata = {**(field.metadata or {}), b"codec": self.name.encode()}
        match self._kind:
            case "split":
                types = (pa.large_binary(), list_of(vector_of(pa.uint8(), size)))
            case "fp8":
                types = (list_of(vector_of(pa.uint8(), size)), list_of(pa.float32()))
            case _:
                assert group is not None
                if size % group:
                    raise ValueError(f"groups of {group} do not divide {size} values")
                types = (list_of(vector_of(pa.int8(), size)), list_of(vector_of(pa.uint16(), size // group)))
        named = zip(self._names(field.name), types, strict=True)
        return [pa.field(name, type_, nullable=False, metadata=metadata) for name, type_ in named]

    def _encoded(self, offsets: Int64Array, bits_NH: Uint16Array) -> list[pa.Array]:
        match self._kind:
            case "split":
                high_NH, low_NH = states.split_planes(bits_NH)
                spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
                frames = [states.compressed(high_NH[start:stop]) for start, stop in spans]
                return [pa.array(frames, type=pa.large_binary()), list_array(offsets, vector_array(low_NH))]
            case "fp8":
                codes_NH, scale_N = states.encode_fp8(bits_NH)
                return [list_array(offsets, vector_array(codes_NH)), list_array(offsets, arrow_numbers(scale_N))]
            case _:
                group = group_of(self.name)
                assert group is not None
                numbers_NH, scales_NG = states.encode_int8(bits_NH, group)
                return [list_array(offsets, vector_array(array)) for array in (numbers_NH, scales_NG)]

    def _decoded(self, stored: pa.Table, field: pa.Field) -> pa.Array:
        """The states of these rows."""
        first, second = self._names(field.name)
        size = field.type.value_type.list_size
        if self._kind == "split":
            offsets, low_NH = _lists_of(stored[second])
            bits_NH = np.empty(low_NH.shape, dtype=np.uint16)
            frames = stored[first].combine_chunks()
            for row, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
                high = states.decompressed(frames[row].as_buffer() or b"", (stop - start) * size).reshape(-1, size)
                bits_NH[start:stop] = states.joined_planes(high, low_NH[start:stop])
            return list_array(offsets, vector_array(bits_NH))
        offsets, numbers_NH = _lists_of(stored[first])
        of_scales, scales = _lists_of(stored[second])
        if not np.array_equal(offsets, of_scales):
            raise ValueError(f"a document has other numbers of {second} than of {first}")
        decode: Any = states.decode_fp8 if self._kind == "fp8" else states.decode_int8
        return list_array(offsets, vector_array(decode(numbers_NH, scales)))


def states_error(plain: pa.Table, decoded: pa.Table) -> dict[str, float]:
    """The statistics of coding: of what a reader gets, against the same rows without a codec."""
    names = [name for name in plain.schema.names if hidden_state_of(name) is not None]
    found = [states.coding_error(_lists_of(plain[name])[1], _lists_of(decoded[name])[1]) for name in names]
    return {
        "max_codec_state_error": max((error.max_state for error in found), default=0.0),
        "max_codec_relative_rms": max((error.relative_rms for error in found), default=0.0),
        "max_codec_abs_error": max((error.max_abs for error in found), default=0.0),
    }


def _stem(name: str, suffixes: Sequence[str]) -> str | None:
    """The state whose coded column has this name; None where it is no coded column."""
    for suffix in suffixes:
        stem = name.removesuffix(suffix)
        if stem != name and hidden_state_of(stem) is not None:
            return stem
    return None


def _width(field: pa.Field) -> int:
    if not pa.types.is_list(field.type) or not pa.types.is_fixed_size_list(field.type.value_type):
        raise ValueError(f"column {field.name} is {field.type}, expected lists of vectors")
    return int(field.type.value_type.list_size)


def _lists_of(column: pa.ChunkedArray | pa.Array) -> tuple[Int64Array, npt.NDArray[Any]]:
    """Offsets from 0 on, int64 [rows + 1], and the elements of all lists, [N] or [N, width]."""
    array = column
    if isinstance(column, pa.ChunkedArray):
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # a column of no chunks stays chunked
        array = pa.array([], type=array.type)
    starts = array.offsets.to_numpy().astype(np.int64)
    offsets = starts - starts[0] if len(starts) else np.zeros(1, np.int64)
    inner = array.type.value_type
    values = flat(array)
    return offsets, values.reshape(-1, inner.list_size) if pa.types.is_fixed_size_list(inner) else values
