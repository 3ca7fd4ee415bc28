"""Parquet files that differ in the numbers and the name of their last column alone, of which pyarrow encodes one.

For each number in nested lists Parquet keeps two levels, which say where lists begin, and to encode them takes pyarrow
four times as long as all else it does. They follow from the lengths of the lists: files of the same documents have the
same. So what pyarrow writes is noted as it goes by (`NotedFile`), its numbers left out, and becomes the others' outline
(`FileOutline`), which need not hold a document as float32 whole either.

The invariant: a file made of an outline has the bytes that pyarrow would have written. Nothing is supposed of how
pyarrow lays out pages but that a page of the last column ends with numbers as they are in memory, which is compared;
where that does not hold of all of them there is no outline, and pyarrow writes every file.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.export.aside import FileAside
from kd_assets.export.tensor_file import tensor_bytes

_COMPARED_AT_A_TIME_BYTES = 1 << 20

_END_BYTES = 8
"""Of a Parquet file: the footer's length, and the magic number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Bytes that all of the files have, and how many bytes of numbers follow on them."""

    before: bytes
    n_bytes: int


class NotedFile(io.RawIOBase):
    """Passes on what pyarrow writes to a file, and notes all of it but the numbers of the last column."""

    def __init__(self, file: FileAside) -> None:
        super().__init__()
        self._file = file
        self._pieces: list[_Piece] = []
        self._ends: list[int] = []
        """Where in the file the numbers of each piece end."""
        self._before = bytearray()
        self._expected: list[npt.NDArray[np.uint8]] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def expect(self, numbers: npt.NDArray[Any]) -> None:
        """Numbers of the last column that are to be written, after those that are expected already."""
        self._expected.append(tensor_bytes(numbers))

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = self._file.write(view)
        n_bytes = self._numbers_at_the_end_of(np.frombuffer(view, np.uint8))
        self._before += view[: len(view) - n_bytes]
        if n_bytes:
            self._pieces.append(_Piece(before=bytes(self._before), n_bytes=n_bytes))
            self._ends.append(self.tell())
            self._before.clear()
        return written

    def outline(self, schema: pa.Schema, metadata: pq.FileMetaData) -> FileOutline | None:
        """Of the whole file, which has this schema and says this of itself; None where its numbers were not all found
        in the pages of the last column, or its names in the footer."""
        groups = [metadata.row_group(i).column(metadata.num_columns - 1) for i in range(metadata.num_row_groups)]
        spans = [(c.data_page_offset, c.data_page_offset + c.total_compressed_size) for c in groups]
        of_column = all(
            any(start <= end - piece.n_bytes and end <= stop for start, stop in spans)
            for piece, end in zip(self._pieces, self._ends, strict=True)
        )
        footer = _footer_in(bytes(self._before))
        if any(map(len, self._expected)) or not of_column or footer.count(_of_thrift(_saved(schema))) != 1:
            return None
        return FileOutline(pieces=tuple(self._pieces), footer=footer, schema=schema)

    def _numbers_at_the_end_of(self, page: npt.NDArray[np.uint8]) -> int:
        """How many bytes of the expected numbers the page ends with, after two lists of levels; 0: it is no such."""
        first = 0
        for _ in range(2):
            first += 4 + int.from_bytes(page[first : first + 4].tobytes(), "little")
        n_bytes = len(page) - first
        if n_bytes <= 0:
            return 0
        numbers, after = page[first:], []
        for array in self._expected:
            n = min(len(array), len(numbers))
            if not _equal(numbers[:n], array[:n]):
                return 0
            numbers = numbers[n:]
            if n < len(array):
                after.append(array[n:])
        if len(numbers):
            return 0
        self._expected = after
        return n_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class FileOutline:
    """A Parquet file without the numbers of its last column."""

    pieces: tuple[_Piece, ...]
    footer: bytes
    schema: pa.Schema

    def write(self, file: FileAside, name: str, numbers: Iterator[npt.NDArray[Any]]) -> None:
        """Write the file with these numbers, whose last column has this name."""
        left = np.empty(0, np.uint8)
        for piece in self.pieces:
            file.write(piece.before)
            n_bytes = piece.n_bytes
            while n_bytes:
                if not len(left):
                    left = tensor_bytes(next(numbers))
                n = min(n_bytes, len(left))
                if n:
                    file.write(left[:n])
                left, n_bytes = left[n:], n_bytes - n
        n_left = len(left) + sum(map(len, numbers))  # to the end, so that the last document is let go of
        assert not n_left, "files of the same documents"
        footer = self._footer(name)
        file.write(footer + len(footer).to_bytes(4, "little") + b"PAR1")

    def _footer(self, name: str) -> bytes:
        """The footer with another name of the last column: Thrift writes a string's length before it, and no other."""
        old = self.schema.names[-1]
        renamed = self.schema.set(len(self.schema) - 1, self.schema.field(old).with_name(name))
        footer = self.footer.replace(_of_thrift(_saved(self.schema)), _of_thrift(_saved(renamed)))
        return footer.replace(_of_thrift(old.encode()), _of_thrift(name.encode()))


def _footer_in(end: bytes) -> bytes:
    """The footer, with which the file ends; nothing where it has another form."""
    n_bytes = int.from_bytes(end[-_END_BYTES:-4], "little")
    return end[:-_END_BYTES] if end[-4:] == b"PAR1" and n_bytes == len(end) - _END_BYTES else b""


def _saved(schema: pa.Schema) -> bytes:
    """As Parquet files that Arrow writes have it among their key-value metadata."""
    return base64.b64encode(schema.serialize().to_pybytes())


def _of_thrift(text: bytes) -> bytes:
    """A string in Thrift's compact protocol: its length, seven bits a byte, the lowest first, and its bytes."""
    n, said = len(text), bytearray()
    while n > 0x7F:
        said.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*said, n]) + text


def _equal(some: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]) -> bool:
    step = _COMPARED_AT_A_TIME_BYTES
    return all(np.array_equal(some[i : i + step], others[i : i + step]) for i in range(0, len(some), step))
