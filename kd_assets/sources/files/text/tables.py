"""CSV and TSV (RFC 4180, with commas or tabs): a header line, then a record a row, each field a string.

A quoted field may hold line ends and doubled quotes. A record's content is `{column: field}` as compact JSON; an empty
field is an empty string. A row of another length than the header is an error: its fields cannot be told apart.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from kd_assets.errors import InputError
from kd_assets.sources.files import raw
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.text.arrays import compact
from kd_assets.sources.files.text.lines import BOM, refuse_other_magic, skip_to

DELIMITERS = {"csv": ",", "tsv": "\t"}


def iter_table(
    f: BinaryIO, path: str, file_format: str, *, byte_offset: int = 0, first_record: int = 0, first_line: int = 1
) -> Iterator[RawRecord]:
    """The rows of a table: all, or those from the one at `byte_offset` on. `f` stands at the table's beginning.

    Raises InputError for a header that names a column twice, for a row of another length and for quotes that do not
    end.
    """
    # The limit is one of the whole process; records of any other reader in it are not longer than ours may be.
    csv.field_size_limit(max(csv.field_size_limit(), raw.MAX_RECORD_BYTES))
    rows = _Rows(f, path, DELIMITERS[file_format])
    columns = _header(rows, path, file_format)
    if byte_offset:
        skip_to(f, byte_offset, at=rows.byte_offset)
        rows = _Rows(f, path, DELIMITERS[file_format], byte_offset=byte_offset, line=first_line)
    number = first_record
    for line, start, fields in rows:
        if len(fields) != len(columns):
            raise InputError(
                f"{path}:{line}: the row has {len(fields)} fields and the header {len(columns)}: quote fields that "
                f"hold a delimiter or a quote, or correct its format ({file_format})"
            )
        yield RawRecord(number, line, start, compact(dict(zip(columns, fields, strict=True))), columns)
        number += 1


def _header(rows: _Rows, path: str, file_format: str) -> tuple[str, ...]:
    columns = next((tuple(fields) for _, _, fields in rows), ())
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise InputError(f"{path}: its header names {repeated[0]!r} twice: rename all but one column")
    if columns and columns[0][:1] in ("{", "["):
        raise InputError(
            f"{path} starts as JSON does, not with the header of a {file_format} table: correct its format"
        )
    return columns


class _Rows:
    """Rows with a field or more, each after its first line and where that starts. Lines are handed to the parser one by
    one, so that it has never taken more of them than the row needs."""

    def __init__(self, f: BinaryIO, path: str, delimiter: str, *, byte_offset: int = 0, line: int = 1) -> None:
        self._f, self._path = f, path
        self.byte_offset, self._line = byte_offset, line
        self._parser = csv.reader(self._lines(), delimiter=delimiter, strict=True)

    def __iter__(self) -> Iterator[tuple[int, int, list[str]]]:
        while True:
            start, line = self.byte_offset, self._line
            try:
                fields = next(self._parser, None)
            except csv.Error as e:
                raise InputError(f"{self._path}:{line}: the row cannot be read ({e}): correct its quotes") from e
            if fields is None:
                return
            if fields:
                yield line, start, fields

    def _lines(self) -> Iterator[str]:
        while line := self._f.readline(raw.MAX_RECORD_BYTES + 1):
            if len(line) > raw.MAX_RECORD_BYTES:
                raise InputError(f"{self._path}:{self._line}: the line is longer than {raw.MAX_RECORD_BYTES >> 20} MiB")
            if self.byte_offset == 0:
                refuse_other_magic(line, self._path)
                line, self.byte_offset = line.removeprefix(BOM), len(line)
            else:
                self.byte_offset += len(line)
            self._line += 1
            yield line.decode("utf-8", "surrogateescape")
