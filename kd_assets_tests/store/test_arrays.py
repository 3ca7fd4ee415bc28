"""Arrow's arrays as numpy's and back: the same as pyarrow's own conversions, without pandas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from kd_assets.store.arrays import arrow_numbers, arrow_strings, elements_of, flat

TYPES = (pa.uint16(), pa.uint32(), pa.int32(), pa.int64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_())


def numbers(kind: pa.DataType, n: int) -> pa.Array:
    values = np.arange(n) % 3
    return pa.array(values.astype(np.bool_) if kind == pa.bool_() else values.astype(kind.to_pandas_dtype()), kind)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, 30), slice(3, 21), slice(9, 30)], ids=str)
def test_numbers_of_a_slice_are_those_that_pyarrow_gives(kind: pa.DataType, cut: slice) -> None:
    array = numbers(kind, 30)[cut]
    found, expected = flat(array), array.to_numpy(zero_copy_only=False)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    assert arrow_numbers(expected).equals(array)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, 5), slice(1, 4), slice(4, 5)], ids=str)
def test_elements_of_lists_in_lists_are_those_that_pyarrow_gives(kind: pa.DataType, cut: slice) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(numbers(kind, 30)[6:], 3)
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 2, 3, 7, 8], pa.int32()), vectors)[cut]
    assert elements_of(lists).equals(lists.flatten())
    assert elements_of(elements_of(lists)).equals(lists.flatten().flatten())
    assert np.array_equal(flat(pa.chunked_array([lists])), flat(lists.flatten().flatten()))
    assert np.array_equal(flat(pa.chunked_array([lists, lists])), np.tile(flat(lists), 2))


def test_lists_that_are_null_have_no_elements() -> None:
    lists = pa.array([[1, 2], None, [3]], pa.list_(pa.int32()))
    assert flat(lists).tolist() == [1, 2, 3]


def test_what_is_looked_at_cannot_be_written_to() -> None:
    found = flat(pa.array([1, 2, 3], pa.int32()))
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 5


def test_strings_are_those_of_pyarrow() -> None:
    values = ["", "a", "dokument-ü", "文書"]
    assert arrow_strings(values).equals(pa.array(values))
    assert arrow_strings([]).equals(pa.array([], pa.string()))


def test_nothing_of_it_imports_pandas() -> None:
    code = (
        "import sys, numpy as np, pyarrow as pa\n"
        "from kd_assets.store.arrays import *\n"
        "lists = pa.ListArray.from_arrays(arrow_numbers(np.array([0, 2], np.int32)), arrow_numbers(np.zeros(2)))\n"
        "flat(pa.chunked_array([lists])), arrow_strings(['a'])\n"
        "assert not {'pandas', 'pyarrow.compute'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
