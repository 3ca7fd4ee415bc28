"""One pass over a file while it is planned: its records or row groups, and what it is pinned by.

A file of text is read once, in order. Of a file of columns no row is read: Parquet has a footer, Arrow its messages'
headers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kd_assets.errors import InputError, MissingInputError
from kd_assets.sources.files.columns.batches import RowGroup, layout
from kd_assets.sources.files.columns.identity import file_identity
from kd_assets.sources.files.columns.rows import RowReader
from kd_assets.sources.files.found import SourceFile
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.read import text_records
from kd_assets.sources.files.storage import open_source, version_of
from kd_assets.sources.files.text.compressed import decompressed
from kd_assets.sources.files.text.seekable import SeekableCopy, seekable_copy

_BUFFER_BYTES = 1 << 20


class TextScan:
    """The records of a file of text (jsonl, json, csv, tsv), plain or compressed: iterate over it once, to the end.

    After that `sha256`, `n_bytes` and `seekable_path` are there. Where a `seekable_folder` is given, a compressed file
    is copied there as it can be read from anywhere; whoever stops before the end leaves no copy. Raises
    MissingInputError for a file that is not there or empty, InputError for one that was cut, is of another format, or
    changes meanwhile.
    """

    def __init__(self, file: SourceFile, *, seekable_folder: Path | None = None) -> None:
        self._file, self._seekable_folder = file, seekable_folder
        self.sha256 = ""
        """Of the file's own bytes."""
        self.n_bytes = 0
        """Of the file itself."""
        self.seekable_path: Path | None = None

    def __iter__(self) -> Iterator[RawRecord]:
        file = self._file
        with contextlib.ExitStack() as stack:
            f = stack.enter_context(open_source(file.path))
            _require_unchanged(file, f)
            hashing = _Hashing(f)
            whole: BinaryIO = stack.enter_context(io.BufferedReader(hashing, _BUFFER_BYTES))
            text, copy = whole, None
            if file.compression is not None:
                text = stack.enter_context(decompressed(whole, file.path, file.compression))
                if self._seekable_folder is not None:
                    copy = stack.enter_context(seekable_copy(self._seekable_folder))
                    text = stack.enter_context(_copying(text, copy))
            yield from text_records(text, file.path, file.file_format)
            for rest in (text, whole):  # what follows the last record is in the hash, too, and is copied
                while rest.read(_BUFFER_BYTES):
                    pass
            _require_unchanged(file, f)
            self.sha256, self.n_bytes = hashing.digest.hexdigest(), file.n_bytes
            self.seekable_path = copy.keep(self.sha256) if copy is not None else None


class _Hashing(io.RawIOBase):
    """What is read of a file, hashed in the order in which it is read."""

    def __init__(self, f: BinaryIO) -> None:
        super().__init__()
        self._f = f
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._f.read(len(buffer))
        self.digest.update(data)
        buffer[: len(data)] = data
        return len(data)


def _copying(text: BinaryIO, copy: SeekableCopy) -> io.BufferedReader:
    return io.BufferedReader(_Copying(text, copy), _BUFFER_BYTES)


class _Copying(io.RawIOBase):
    """What is read of a text, on its way into a copy."""

    def __init__(self, text: BinaryIO, copy: SeekableCopy) -> None:
        super().__init__()
        self._text, self._copy = text, copy

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._text.read(len(buffer))
        self._copy.add(data)
        buffer[: len(data)] = data
        return len(data)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnScan:
    """What a file of columns says of itself."""

    identity: str
    """See `columns.identity`."""
    n_records: int
    groups: tuple[RowGroup, ...]
    columns: tuple[str, ...]
    """Names of all its columns."""

    @property
    def n_bytes(self) -> int:
        """Of the columns that are read."""
        return sum(group.n_bytes for group in self.groups)


def scan_columns(file: SourceFile, *, columns_read: Sequence[str]) -> ColumnScan:
    """The row groups of a Parquet file from its footer, those of an Arrow file from its messages' headers.

    Raises MissingInputError for a file that is not there or empty, InputError for one that was cut, is of another
    format, has none of `columns_read` or one of a type that records cannot have, or changes meanwhile.
    """
    with open_source(file.path, in_order=False) as f:
        _require_unchanged(file, f)
        schema, groups = layout(f, file.path, file.file_format, columns_read)
        reader = RowReader(schema, file.path, columns_read)
        identity = file_identity(f, file.path, file.file_format)
        _require_unchanged(file, f)
    return ColumnScan(
        identity=identity,
        n_records=sum(group.n_records for group in groups),
        groups=groups,
        columns=reader.all_names,
    )


def _require_unchanged(file: SourceFile, f: BinaryIO) -> None:
    if version_of(file.path, f) != (file.n_bytes, file.changed):
        raise InputError(f"{file.path} changed while it was being planned: plan again once nothing writes to it")
    if file.n_bytes == 0:
        raise MissingInputError(f"{file.path} is empty: write its records, or take it out of the source")
