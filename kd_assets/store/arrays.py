"""Arrow's arrays as numpy's and back, without pandas.

pyarrow's own `to_numpy` and `array` import pandas where it is installed, and `flatten` imports pyarrow.compute: 0.3 s
and 45 MB of every process that reads a cache. Here numbers are looked at in Arrow's buffers, which its columnar format
lays down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def flat(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[Any]:
    """All numbers of a column, nesting dropped; without a copy, and read-only, where the column is one chunk."""
    array = column
    if isinstance(column, pa.ChunkedArray):  # combine_chunks copies even a single chunk (pyarrow 26)
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # a column of no chunks stays chunked
        array = pa.array([], type=array.type)
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = elements_of(array)
    if array.null_count or not len(array):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    if pa.types.is_boolean(array.type):
        return _bools(array)
    if (kind := _kind(array.type)) is None:
        return np.asarray(array.to_numpy(zero_copy_only=False))
    dtype = np.dtype(f"{kind}{array.type.bit_width // 8}")
    values = np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
    values.flags.writeable = False
    return values


def elements_of(lists: pa.ListArray | pa.FixedSizeListArray) -> pa.Array:
    """All elements of all lists, one after the other; a view."""
    if lists.null_count or not len(lists):
        return lists.flatten()  # which leaves out what lies under a null
    if pa.types.is_fixed_size_list(lists.type):
        size = lists.type.list_size
        return lists.values.slice(lists.offset * size, len(lists) * size)
    first, stop = lists.offsets[0].as_py(), lists.offsets[-1].as_py()
    return lists.values.slice(first, stop - first)


def arrow_numbers(values: npt.NDArray[Any]) -> pa.Array:
    """Numbers [n] as an Arrow array that looks at the same memory; of bool, whose elements are bits there, a copy."""
    if values.dtype == np.bool_:
        bits = np.packbits(values, bitorder="little")
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])
    whole = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, whole])


def arrow_strings(values: Sequence[str]) -> pa.StringArray:
    """These strings as an Arrow array."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])


def _bools(array: pa.BooleanArray) -> npt.NDArray[np.bool_]:
    stop = array.offset + len(array)
    bits = np.frombuffer(array.buffers()[1], np.uint8, (stop + 7) // 8)
    return np.unpackbits(bits, count=stop, bitorder="little")[array.offset :].view(np.bool_)


def _kind(of: pa.DataType) -> str | None:
    """numpy's letter; None for what is no number."""
    if pa.types.is_floating(of):
        return "f"
    if pa.types.is_integer(of):
        return "i" if pa.types.is_signed_integer(of) else "u"
    return None
