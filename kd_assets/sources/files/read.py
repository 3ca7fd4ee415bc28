"""The records of one range of a file, reading no more of it than they need.

Used by the job that tokenises and by the planner. The invariant: a range gives the records that the plan's pass over
the file gave there, or an error.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kd_assets.contract import FileFormat, RecordRange
from kd_assets.errors import InputError
from kd_assets.sources.fields import fields_of, fields_read, named
from kd_assets.sources.files.columns import earlier
from kd_assets.sources.files.columns.batches import arrow_errors, iter_batches, schema_of
from kd_assets.sources.files.columns.identity import file_identity
from kd_assets.sources.files.columns.rows import RowReader
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.storage import open_source
from kd_assets.sources.files.text.arrays import iter_array
from kd_assets.sources.files.text.compressed import decompressed
from kd_assets.sources.files.text.lines import iter_jsonl, skip_to
from kd_assets.sources.files.text.seekable import open_seekable
from kd_assets.sources.files.text.tables import iter_table

COLUMN_FORMATS = ("parquet", "arrow")


def iter_raw(records: RecordRange) -> Iterator[RawRecord]:
    """The records of one range, those that it drops among them. Fewer where the file has shrunk.

    Raises MissingInputError, InputError and StorageUnavailableError for a file that cannot be read as what it is said
    to be, or whose seekable copy is lost or damaged.
    """
    if records.file_format in COLUMN_FORMATS:
        yield from _rows(records) if records.file_identity is not None else _rows_of_earlier_plans(records)
        return
    assert records.byte_offset is not None
    with open_text(records) as f:
        found = text_records(
            f,
            records.path,
            records.file_format,
            byte_offset=records.byte_offset,
            first_record=records.first_record,
            first_line=records.first_line or 1,
        )
        yield from itertools.islice(found, records.n_records)


def check_identity(records: RecordRange) -> None:
    """Raise InputError when a file of columns is not what it was when it was planned. Other ranges pass: a hash over
    their records says it."""
    if records.file_identity is None or records.file_format not in COLUMN_FORMATS:
        return
    with open_source(records.path, in_order=False) as f:
        found = file_identity(f, records.path, records.file_format)
    if found != records.file_identity:
        raise InputError(
            f"{records.path} changed after it was planned (it was {records.file_identity}, and is {found}): "
            "materialize shard_plan again, or bring the file back"
        )


@contextlib.contextmanager
def open_text(records: RecordRange) -> Iterator[BinaryIO]:
    """The text of a file of text, at its beginning, with `seek`."""
    if records.compression is None:
        with open_source(records.path) as f:
            yield f
    elif records.seekable_path is not None:
        with open_seekable(records.seekable_path, records.path) as f:
            yield f
    else:
        with (
            open_source(records.path) as f,
            decompressed(f, records.path, records.compression) as text,
        ):
            yield text


def text_records(
    f: BinaryIO,
    path: str,
    file_format: FileFormat,
    *,
    byte_offset: int = 0,
    first_record: int = 0,
    first_line: int = 1,
) -> Iterator[RawRecord]:
    """The records of a text, all or from the one that starts at `byte_offset`; `f` stands at its beginning."""
    if file_format in ("csv", "tsv"):
        yield from iter_table(
            f, path, file_format, byte_offset=byte_offset, first_record=first_record, first_line=first_line
        )
        return
    if byte_offset:
        skip_to(f, byte_offset)
    if file_format == "json":
        yield from iter_array(f, path, byte_offset=byte_offset, first_record=first_record)
    else:
        yield from iter_jsonl(f, path, byte_offset=byte_offset, first_record=first_record, first_line=first_line)


def _rows(records: RecordRange) -> Iterator[RawRecord]:
    path, file_format = records.path, records.file_format
    with open_source(path, in_order=False) as f:
        with arrow_errors(path, file_format):
            schema = schema_of(f, file_format)
        reader = RowReader(schema, path, fields_read(records), id_column=named("id", records))
        batches = iter_batches(
            f,
            path,
            file_format,
            reader.names,
            first=records.first_record,
            stop=records.first_record + records.n_records,
            batch_offset=records.batch_offset,
            batch_first_record=records.batch_first_record,
        )
        for number, batch in batches:
            yield from reader.records(batch, number)


def _rows_of_earlier_plans(records: RecordRange) -> Iterator[RawRecord]:
    return earlier.iter_columns(
        Path(records.path),
        records.file_format,
        fields=fields_of(records),
        first_record=records.first_record,
        n_records=records.n_records,
    )
