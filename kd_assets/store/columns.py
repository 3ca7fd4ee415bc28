"""Columns of a part as numpy arrays, so that one document is a slice of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.store.encode import flat


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Column:
    """One column of some rows. `values` are views of Arrow's memory where its layout allows it, and read-only then."""

    values: npt.NDArray[Any] | Sequence[str]
    """[rows, …], or [elements of all rows, …] where there are offsets."""
    offsets: npt.NDArray[np.int32] | None
    """[rows + 1] for a column of lists: row i has `values[offsets[i]:offsets[i + 1]]`."""

    def row(self, i: int) -> Any:
        """The value of row i: an array for lists and vectors, an int or str for scalars."""
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
        return self.values.nbytes if isinstance(self.values, np.ndarray) else sum(map(len, self.values))


def column_of(chunked: pa.ChunkedArray) -> Column:
    """A column of a table. One chunk is not copied."""
    array = chunked.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else pa.array([], type=array.type)
    offsets = None
    if pa.types.is_string(array.type):
        return Column(values=array.to_pylist(), offsets=None)
    if pa.types.is_list(array.type):
        starts = array.offsets.to_numpy()
        offsets = starts - starts[0] if len(starts) else np.zeros(1, np.int32)
        array = array.flatten()
    width = array.type.list_size if pa.types.is_fixed_size_list(array.type) else None
    values = flat(array)
    return Column(values=values if width is None else values.reshape(-1, width), offsets=offsets)
