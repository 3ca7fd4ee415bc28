"""Where the rows of Parquet and Arrow files lie, and batches of them from any row on.

Parquet has a footer that says it. An Arrow stream has not, nor do batches of an Arrow file say there how many rows they
have, so the messages' headers are read (https://arrow.apache.org/docs/format/Columnar.html, "Encapsulated message
format"), not what lies between them; a file is read as the stream that it holds. So a late row costs what an early one
costs, but for the rows before it in its own row group or batch, which are decoded.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.errors import InputError
from kd_assets.sources.files.storage import REMOTE_BLOCK_BYTES, is_url, size_of

BATCH_ROWS = 256
"""Rows decoded at a time."""
_PAGE_BUFFER_BYTES = 1 << 20
"""Read of a Parquet column at a time, without `pre_buffer`; otherwise all that is asked for is held, a whole file's
share of the column."""

_FILE_MAGIC = b"ARROW1"
_FILE_START = 8
"""Bytes before the stream in an Arrow file."""
_CONTINUATION = b"\xff\xff\xff\xff"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """Rows that are read together: a row group of a Parquet file, a record batch of an Arrow file or stream."""

    first_record: int
    n_records: int
    n_bytes: int
    """Of what is read of it: uncompressed for Parquet, as they lie there for Arrow."""
    batch_offset: int | None
    """Where an Arrow batch starts; None for Parquet, and where it cannot be read without those before it."""


class Layout(NamedTuple):
    schema: Any
    groups: tuple[RowGroup, ...]


@contextlib.contextmanager
def arrow_errors(path: str, file_format: str) -> Iterator[None]:
    """Turn what Arrow raises in the block about a file's content into an InputError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # of the file system, not Arrow's own words about the content
        name = file_format.capitalize()
        raise InputError(f"{path} cannot be read as {name} ({e}): correct its format, or write it again") from e


def layout(f: BinaryIO, path: str, file_format: str, columns_read: Sequence[str]) -> Layout:
    """What a file says of its rows; none is read. Raises InputError where it was cut or is of another format."""
    with arrow_errors(path, file_format):
        return _parquet_layout(f, columns_read) if file_format == "parquet" else _arrow_layout(f, path)


def schema_of(f: BinaryIO, file_format: str) -> Any:
    if file_format == "parquet":
        return pq.ParquetFile(f).schema_arrow
    return pa.ipc.open_stream(pa.PythonFile(_Stream(f, _stream_start(f)), mode="r")).schema


def iter_batches(
    f: BinaryIO,
    path: str,
    file_format: str,
    columns: Sequence[str],
    *,
    first: int,
    stop: int,
    batch_offset: int | None = None,
    batch_first_record: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """Rows `first` to `stop` - 1 in batches, each after the number of its first row. Fewer where the file has fewer."""
    if file_format == "parquet":
        batches = _parquet_batches(f, path, columns, first, stop)
    else:
        batches = _arrow_batches(f, path, columns, batch_offset, batch_first_record or 0)
    with arrow_errors(path, file_format):
        for number, batch in batches:
            if number >= stop:
                return
            skip = max(0, first - number)
            if skip < len(batch):
                yield number + skip, batch.slice(skip, stop - number - skip)


# ---------------------------------------------------------------------- Parquet


def _parquet_layout(f: BinaryIO, columns_read: Sequence[str]) -> Layout:
    metadata = pq.ParquetFile(f).metadata
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    wanted = set(columns_read)
    read = [i for i, path in enumerate(paths) if path in wanted or path.split(".")[0] in wanted]
    groups, first = [], 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        n_bytes = sum(group.column(j).total_uncompressed_size for j in read)
        groups.append(RowGroup(first_record=first, n_records=group.num_rows, n_bytes=n_bytes, batch_offset=None))
        first += group.num_rows
    return Layout(metadata.schema.to_arrow_schema(), tuple(groups))


def _parquet_batches(
    f: BinaryIO, path: str, columns: Sequence[str], first: int, stop: int
) -> Iterator[tuple[int, Any]]:
    buffer_bytes = REMOTE_BLOCK_BYTES if is_url(path) else _PAGE_BUFFER_BYTES
    file = pq.ParquetFile(f, buffer_size=buffer_bytes, pre_buffer=False)
    groups: list[int] = []
    number = row = 0
    for i in range(file.metadata.num_row_groups):
        n_rows = file.metadata.row_group(i).num_rows
        if row < stop and row + n_rows > first:
            if not groups:
                number = row
            groups.append(i)
        row += n_rows
    if groups:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=list(columns)):
            yield number, batch
            number += len(batch)


# ---------------------------------------------------------------------- Arrow


class _Message(NamedTuple):
    kind: int
    start: int
    stop: int
    """Where the next one starts."""
    n_rows: int
    n_body_bytes: int
    header: bytes


_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3


def _arrow_layout(f: BinaryIO, path: str) -> Layout:
    groups: list[RowGroup] = []
    first, head_stop, needs_all = 0, None, False
    for message in iter_messages(f, path):
        if message.kind == _BATCH:
            head_stop = message.start if head_stop is None else head_stop
            groups.append(
                RowGroup(
                    first_record=first,
                    n_records=message.n_rows,
                    n_bytes=message.n_body_bytes,
                    batch_offset=message.start,
                )
            )
            first += message.n_rows
        elif message.kind == _DICTIONARY and head_stop is not None:
            needs_all = True  # a dictionary that replaces or extends an earlier one
    schema = schema_of(f, "arrow")
    if needs_all:
        groups = [
            RowGroup(first_record=g.first_record, n_records=g.n_records, n_bytes=g.n_bytes, batch_offset=None)
            for g in groups
        ]
    return Layout(schema, tuple(groups))


def _arrow_batches(
    f: BinaryIO, path: str, columns: Sequence[str], batch_offset: int | None, first: int
) -> Iterator[tuple[int, Any]]:
    start = _stream_start(f)
    if batch_offset is None:
        stream = _Stream(f, start)
    else:
        head = b""
        for message in iter_messages(f, path):
            if message.kind == _BATCH:
                f.seek(start)
                head = f.read(message.start - start)  # the schema and the dictionaries
                break
        stream = _Stream(f, batch_offset, head)
    number = first if batch_offset is not None else 0
    for batch in pa.ipc.open_stream(pa.PythonFile(stream, mode="r")):
        for at in range(0, len(batch), BATCH_ROWS):
            part = batch.slice(at, BATCH_ROWS)
            yield number, part.select(list(columns))
            number += len(part)


class _Stream(io.RawIOBase):
    """A stream from some place of a file on, after bytes that are put before it."""

    def __init__(self, f: BinaryIO, start: int, head: bytes = b"") -> None:
        super().__init__()
        self._f, self._head = f, io.BytesIO(head)
        f.seek(start)

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        data = self._head.read(size)
        wanted = -1 if size is None or size < 0 else size - len(data)
        return data + self._f.read(wanted) if wanted else data


def _stream_start(f: BinaryIO) -> int:
    f.seek(0)
    return _FILE_START if f.read(len(_FILE_MAGIC)) == _FILE_MAGIC else 0


def iter_messages(f: BinaryIO, path: str) -> Iterator[_Message]:
    """The messages of an Arrow stream or file, by their headers. Raises InputError where it does not end as it must."""
    n_bytes = size_of(f)
    start = _stream_start(f)
    is_file = start == _FILE_START
    stop = _footer_start(f, n_bytes, path) if is_file else n_bytes
    while start < stop:
        f.seek(start)
        prefix = f.read(8)
        has_mark = prefix[:4] == _CONTINUATION  # absent in streams of before Arrow 0.15
        size = int.from_bytes(prefix[4:8] if has_mark else prefix[:4], "little")
        header_start = start + (8 if has_mark else 4)
        if len(prefix) == 8 and size == 0:
            if not is_file and header_start != n_bytes:
                raise InputError(f"{path} has {n_bytes - header_start:,} bytes after the end of its Arrow stream")
            return
        f.seek(header_start)
        header = f.read(size) if header_start + size <= stop else b""
        try:
            kind, n_rows, n_body_bytes = _parse_header(header)
        except (struct.error, IndexError) as e:
            raise _cut(path) from e
        end = header_start + size + n_body_bytes
        if n_body_bytes < 0 or n_rows < 0 or end > stop:
            raise _cut(path)
        yield _Message(kind, start, end, n_rows, n_body_bytes, prefix + header)
        start = end
    if not is_file:
        raise _cut(path)  # one that was cut between two batches looks whole but for the mark of its end


def _footer_start(f: BinaryIO, n_bytes: int, path: str) -> int:
    tail = 4 + len(_FILE_MAGIC)
    f.seek(max(0, n_bytes - tail))
    size, magic = struct.unpack(f"<i{len(_FILE_MAGIC)}s", f.read(tail).rjust(tail, b"\0"))
    if magic != _FILE_MAGIC or not 0 < size < n_bytes - tail - _FILE_START:
        raise _cut(path)
    return int(n_bytes - tail - size)


def _cut(path: str) -> InputError:
    return InputError(f"{path} is no whole Arrow file or stream: it was cut, or is of another format: write it again")


def _parse_header(header: bytes) -> tuple[int, int, int]:
    """Kind, rows and length of the body, of a message's flatbuffer (Message.fbs)."""

    def field(table: int, number: int, layout: str) -> tuple[int, int]:
        """Position and value of a scalar of a table; (0, 0) where it has its default."""
        (back,) = struct.unpack_from("<i", header, table)
        vtable = table - back
        (n_vtable_bytes,) = struct.unpack_from("<H", header, vtable)
        slot = 4 + 2 * number
        (offset,) = struct.unpack_from("<H", header, vtable + slot) if slot + 2 <= n_vtable_bytes else (0,)
        return (table + offset, struct.unpack_from(layout, header, table + offset)[0]) if offset else (0, 0)

    (message,) = struct.unpack_from("<I", header, 0)
    _, kind = field(message, 1, "<B")
    _, n_body_bytes = field(message, 3, "<q")
    n_rows = 0
    if kind == _BATCH:
        position, relative = field(message, 2, "<I")
        _, n_rows = field(position + relative, 0, "<q")
    return kind, n_rows, n_body_bytes
