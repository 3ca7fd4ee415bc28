"""Columns of a part as numpy arrays, so that one document is a slice of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.store.arrays import elements_of, flat


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ragged:
    """Lists of different lengths, one after the other: an index gives an array, a slice the lists it spans."""

    values: npt.NDArray[Any]
    """[elements of all lists]."""
    offsets: npt.NDArray[np.int32]
    """[lists + 1]: list i is `values[offsets[i]:offsets[i + 1]]`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, i: int) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, i: slice) -> Ragged: ...
    def __getitem__(self, i: int | slice) -> npt.NDArray[Any] | Ragged:
        spanned = range(len(self))[i]
        if isinstance(spanned, int):
            return self.values[self.offsets[spanned] : self.offsets[spanned + 1]]
        if spanned.step != 1:
            raise ValueError(f"lists can be sliced in steps of 1, found {spanned.step}")
        stop = max(spanned.start, spanned.stop)
        offsets = self.offsets[spanned.start : stop + 1]
        return Ragged(values=self.values[offsets[0] : offsets[-1]], offsets=offsets - offsets[0])

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """int32 [lists]."""
        return np.diff(self.offsets)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Column:
    """One column of some rows. `values` are views of Arrow's memory where its layout allows it, and read-only then."""

    values: npt.NDArray[Any] | Sequence[str] | Ragged
    """[rows, …], or [elements of all rows, …] where there are offsets; `Ragged` where the elements are lists."""
    offsets: npt.NDArray[np.int32] | None
    """[rows + 1] for a column of lists: row i has `values[offsets[i]:offsets[i + 1]]`."""

    def row(self, i: int) -> Any:
        """The value of row i: an array for lists and vectors, `Ragged` for lists of lists, int or str for scalars."""
        if self.offsets is not None:
            return self.values[self.offsets[i] : self.offsets[i + 1]]
        value = self.values[i]
        return value.item() if isinstance(value, np.generic) else value

    @property
    def lengths(self) -> npt.NDArray[np.int32] | None:
        """int32 [rows]: elements of each row; None where the column has no lists."""
        return None if self.offsets is None else np.diff(self.offsets)

    @property
    def n_bytes(self) -> int:
        if isinstance(self.values, Ragged):
            return self.values.values.nbytes + self.values.offsets.nbytes
        return self.values.nbytes if isinstance(self.values, np.ndarray) else sum(map(len, self.values))


def column_of(chunked: pa.ChunkedArray) -> Column:
    """A column of a table. One chunk is not copied."""
    # combine_chunks copies even a single chunk (pyarrow 26), which of states is all of a group.
    array = chunked.chunk(0) if chunked.num_chunks == 1 else chunked.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else pa.array([], type=array.type)
    offsets = None
    if pa.types.is_string(array.type):
        array.validate(full=True)  # of offsets that lead elsewhere Python knows no words but a SystemError
        return Column(values=array.to_pylist(), offsets=None)
    if pa.types.is_list(array.type):
        offsets, array = _unwrapped(array)
        if pa.types.is_list(array.type):
            of_lists, array = _unwrapped(array)
            return Column(values=Ragged(values=flat(array), offsets=of_lists), offsets=offsets)
    width = array.type.list_size if pa.types.is_fixed_size_list(array.type) else None
    values = flat(array)
    return Column(values=values if width is None else values.reshape(-1, width), offsets=offsets)


def _unwrapped(lists: pa.ListArray) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """Offsets from 0 on, and the elements they point into."""
    starts = flat(lists.offsets)
    return starts - starts[0] if len(starts) else np.zeros(1, np.int32), elements_of(lists)
