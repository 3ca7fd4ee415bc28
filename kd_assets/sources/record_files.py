"""Source files as records: where each lies in its file, and its content as bytes that depend on nothing but the record.

Used by the planner (inside Dagster) and by the job that tokenises; imports neither torch nor transformers. The
invariant: a record is one line of canonical bytes (`RawRecord.content`), the same wherever and in whichever layout the
file lies.

JSON Lines (https://jsonlines.org): UTF-8, one object a line, blank lines are no records, a byte order mark, CRLF and a
last line without newline are taken as they come. Parquet and Arrow (a stream, as `datasets.save_to_disk` writes it, or
a file): one row a record, read in batches; each row becomes the JSON line of the columns that count. Either way memory
holds one record or one batch, never the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_assets.contract import RecordRange
from kd_assets.durable import is_passing, read_patiently, storage_errors
from kd_assets.errors import InputError, MissingInputError
from kd_assets.sources.fields import TEMPLATE_FIELDS, Fields, fields_of

MAX_LINE_BYTES = 1 << 28
"""Longest line of a JSONL file. 256 MiB of text is no document: such a file is of another format."""
BATCH_ROWS = 256
"""Rows of a Parquet file decoded at a time."""

BLANK = b" \t\r\n"
"""What JSON calls whitespace."""
BOM = b"\xef\xbb\xbf"

OTHER_FORMATS = {
    b"PAR1": "is a Parquet file: set its format to parquet",
    b"\x1f\x8b": "is compressed with gzip: decompress it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: decompress it",
    b"BZh": "is compressed with bzip2: decompress it",
    b"\xfd7zXZ": "is compressed with xz: decompress it",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"ARROW1": "is an Arrow file: set its format to arrow",
    b"\xff\xff\xff\xff": "is an Arrow stream, as datasets.save_to_disk writes it: set its format to arrow",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8",
}
"""First bytes that no JSON Lines file has, and what they mean."""


class Hash(Protocol):
    """What `hashlib.sha256()` returns, as far as it is used here."""

    def update(self, data: bytes, /) -> None: ...


class RawRecord(NamedTuple):
    """A record as the file has it. A named tuple: a plan makes millions of them."""

    number: int
    """0-based, counting the file's records."""
    line: int | None
    """1-based line of a JSONL file; None for a row."""
    byte_offset: int | None
    """Where its line starts in a JSONL file; None for a row."""
    content: bytes
    """The line without the whitespace around it; for a row its fields that count, as canonical JSON."""
    columns: tuple[str, ...] = ()
    """Those of the file that a row comes from, with values or without."""
    others: tuple[str, ...] = ()
    """Of a row: fields with a value that a template or a loss may read, and that are not in `content`."""


def iter_raw(records: RecordRange) -> Iterator[RawRecord]:
    """The records of one range, reading no more of the file than they need. Fewer where the file has shrunk."""
    path = Path(records.path)
    if records.file_format != "jsonl":
        yield from iter_columns(
            path,
            records.file_format,
            fields=fields_of(records),
            first_record=records.first_record,
            n_records=records.n_records,
        )
        return
    assert records.byte_offset is not None
    assert records.first_line is not None
    with open_source(path) as f:
        f.seek(records.byte_offset)
        lines = iter_jsonl(
            f,
            path,
            byte_offset=records.byte_offset,
            first_record=records.first_record,
            first_line=records.first_line,
        )
        for _, raw in zip(range(records.n_records), lines, strict=False):
            yield raw


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[BinaryIO]:
    """A source file for reading. Raises MissingInputError, naming it, when it is not there or not to be read; and
    StorageUnavailableError, also while the block reads, where its file system fails."""
    remedy = "create it, or correct its path in the recipe"

    def open_file() -> int:
        try:
            # Not blocking: opening a named pipe would wait for its writer for ever.
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as e:
            if isinstance(e, OSError) and is_passing(e) and not isinstance(e, FileNotFoundError):
                raise
            reason = e.strerror if isinstance(e, OSError) else str(e)
            raise MissingInputError(f"source file {path} cannot be read: {reason}; {remedy}") from e

    fd = read_patiently(open_file, path)
    with storage_errors(path, "read"):
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(fd)
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise MissingInputError(
                f"source {path} is {kind}; a source is one JSONL, Parquet or Arrow file{_saved_to_disk(path)}: {remedy}"
            )
        with os.fdopen(fd, "rb", buffering=1 << 20) as f:
            yield f


def iter_jsonl(
    f: BinaryIO,
    path: Path,
    *,
    byte_offset: int = 0,
    first_record: int = 0,
    first_line: int = 1,
    file_hash: Hash | None = None,
) -> Iterator[RawRecord]:
    """The records of a JSONL file from where `f` stands; `file_hash` takes in every byte that is read.

    Raises InputError for a line above `MAX_LINE_BYTES` and for a file that starts as another format does.
    """
    number, line_number = first_record, first_line
    while line := f.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise InputError(
                f"{path}:{line_number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; JSONL has one record a line"
            )
        if file_hash is not None:
            file_hash.update(line)
        start = byte_offset
        byte_offset += len(line)
        if start == 0:
            refuse_other_format(line, path)
            if line.startswith(BOM):
                line, start = line[len(BOM) :], len(BOM)
        if content := line.strip(BLANK):
            yield RawRecord(number, line_number, start, content)
            number += 1
        line_number += 1


def refuse_other_format(first_line: bytes, path: Path) -> None:
    """Raise InputError when a file that is said to be JSONL shows by its first line that it is something else."""
    for magic, meaning in OTHER_FORMATS.items():
        if first_line.startswith(magic):
            raise InputError(f"{path} {meaning}")
    if first_line.removeprefix(BOM).strip(BLANK) == b"[" or first_line.removeprefix(BOM).lstrip(BLANK)[:2] == b"[{":
        raise InputError(f"{path} holds one JSON array; JSONL has one object a line (`jq -c '.[]'` converts it)")


def iter_columns(
    path: Path, file_format: str, *, fields: Fields, first_record: int = 0, n_records: int | None = None
) -> Iterator[RawRecord]:
    """Rows of a Parquet or Arrow file as records, from row `first_record` on.

    Raises InputError when the file is damaged, of another format, or lacks a text or messages column of the right type.
    """
    stop = None if n_records is None else first_record + n_records
    open_batches = _parquet_batches if file_format == "parquet" else _arrow_batches
    with open_source(path) as f:
        try:
            schema, batches_from = open_batches(f, path)
            columns = _columns_read(schema, path, fields)
            for number, batch in batches_from(columns.names, first_record, stop):
                if stop is not None and number >= stop:
                    break  # the rest belongs to other shards
                skip = max(0, first_record - number)
                rows = pa.Table.from_batches([batch]).slice(skip)
                rows = rows if stop is None else rows.slice(0, max(0, stop - number - skip))
                yield from _rows(rows, number + skip, columns)
        except (pa.ArrowException, OSError) as e:
            if isinstance(e, OSError) and e.errno is not None:
                raise  # of the file system, not Arrow's own words about the content
            name = file_format.capitalize()
            raise InputError(f"{path} cannot be read as {name} ({e}): correct its format, or write it again") from e


Batches = Iterator[tuple[int, Any]]
"""Record batches, each after the number of its first row."""

BatchesFrom = Callable[[Sequence[str], int, int | None], Batches]
"""Of these columns, from a batch with row `first` on, perhaps beyond row `stop`."""


def _parquet_batches(f: BinaryIO, path: Path) -> tuple[Any, BatchesFrom]:
    """Row groups before and after the rows that are asked for are not read."""
    file = pq.ParquetFile(f)

    def batches_from(names: Sequence[str], first: int, stop: int | None) -> Batches:
        groups, number = _row_groups(file.metadata, first, file.metadata.num_rows if stop is None else stop)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=list(names)):
            yield number, batch
            number += len(batch)

    return file.schema_arrow, batches_from


def _arrow_batches(f: BinaryIO, path: Path) -> tuple[Any, BatchesFrom]:
    """A stream is read from its beginning. One that was cut between two batches looks whole but for its end's mark."""
    is_file = f.read(len(_ARROW_FILE)) == _ARROW_FILE
    if not is_file:
        f.seek(max(0, os.fstat(f.fileno()).st_size - len(_END_OF_STREAM)))
        if f.read() != _END_OF_STREAM:
            raise InputError(f"{path} is no whole Arrow stream: it was cut, or is of another format: write it again")
    f.seek(0)
    reader = pa.ipc.open_file(f) if is_file else pa.ipc.open_stream(f)

    def batches_from(names: Sequence[str], first: int, stop: int | None) -> Batches:
        number = 0
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, len(batch), BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                if number + len(part) > first:
                    yield number, part.select(list(names))
                number += len(part)

    return reader.schema, batches_from


_ARROW_FILE = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def _saved_to_disk(path: Path) -> str:
    """A hint, where a folder is one of `datasets.save_to_disk`."""
    try:
        files = sorted(path.glob("*.arrow"))
    except OSError:
        return ""
    return f" (of this one, name {files[0].name} and its others, each with format: arrow)" if files else ""


class _Columns(NamedTuple):
    """What of a file's columns is read, and how."""

    names: list[str]
    content: Any
    """Schema of what documents are made of, with bytes instead of strings: a string that is not UTF-8 is one bad row,
    not a crash."""
    all_names: tuple[str, ...]
    noticed: tuple[str, ...]
    """Columns of which only counts whether they have a value."""
    messages: str | None
    message_fields: tuple[str, ...]
    """What messages have besides role and content."""


def _columns_read(schema: Any, path: Path, fields: Fields) -> _Columns:
    read = []
    for name, fits, target, expected in (
        (fields.id, _is_id, None, "string, integer or float; name another column in id_field"),
        (fields.text, _is_string, pa.large_binary(), "string"),
        (fields.messages, _is_messages, _MESSAGES, "list<struct<role: string, content: string>>"),
    ):
        positions = schema.get_all_field_indices(name)
        if not positions:
            continue
        if len(positions) > 1:
            raise InputError(f"{path} has {len(positions)} columns named {name!r}: rename all but one")
        found = schema.field(positions[0]).type
        if not fits(found):
            raise InputError(f"{path}: column {name!r} has type {found}; expected {expected}")
        read.append((name, target or (pa.large_binary() if _is_string(found) else found)))
    names = [name for name, _ in read]
    if not {fields.text, fields.messages} & set(names):
        raise InputError(
            f"{path} has neither a column {fields.text!r} nor {fields.messages!r}; it has "
            f"{', '.join(map(repr, schema.names[:16])) or 'none'}: set text_field or messages_field in the recipe"
        )
    has_messages = fields.messages in names and not pa.types.is_null(schema.field(fields.messages).type)
    noticed = tuple(
        name
        for name in TEMPLATE_FIELDS
        if has_messages and name not in names and len(schema.get_all_field_indices(name)) == 1
    )
    message = schema.field(fields.messages).type.value_type if has_messages else pa.struct([])
    return _Columns(
        names=[*names, *noticed],
        content=pa.schema(read),
        all_names=tuple(schema.names),
        noticed=noticed,
        messages=fields.messages if has_messages else None,
        message_fields=tuple(field.name for field in message if field.name not in ("role", "content")),
    )


def _rows(rows: Any, first: int, columns: _Columns) -> Iterator[RawRecord]:
    others = [
        *((name, rows.column(name).is_valid().to_pylist()) for name in columns.noticed),
        *_message_fields_there(rows, columns),
    ]
    content = rows.select(columns.content.names).cast(columns.content).to_pylist()
    for i, row in enumerate(content):
        there = tuple(name for name, is_there in others if is_there[i])
        yield RawRecord(first + i, None, None, _canonical_row(row), columns.all_names, there)


def _message_fields_there(rows: Any, columns: _Columns) -> Iterator[tuple[str, list[bool]]]:
    """What messages have besides role and content, and in which rows any message has a value of it."""
    if columns.messages is None or not columns.message_fields:
        return
    messages = rows.column(columns.messages).combine_chunks()
    parents, flat = pc.list_parent_indices(messages), pc.list_flatten(messages)
    for name in columns.message_fields:
        there = [False] * len(rows)
        for parent in parents.filter(pc.struct_field(flat, name).is_valid()).unique().to_pylist():
            there[parent] = True
        yield f"{columns.messages}.{name}", there


_MESSAGES = pa.large_list(pa.struct([("role", pa.large_binary()), ("content", pa.large_binary())]))


def _is_string(found: Any) -> bool:
    if pa.types.is_dictionary(found):
        return _is_string(found.value_type)
    types = pa.types
    return any(is_type(found) for is_type in (types.is_string, types.is_large_string, types.is_string_view)) or bool(
        types.is_null(found)
    )


def _is_id(found: Any) -> bool:
    return _is_string(found) or bool(pa.types.is_integer(found) or pa.types.is_floating(found))


def _is_messages(found: Any) -> bool:
    types = pa.types
    if types.is_null(found):
        return True
    if not any(is_type(found) for is_type in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        return False
    item = found.value_type
    return bool(types.is_struct(item)) and all(
        item.get_field_index(name) >= 0 and _is_string(item.field(name).type) for name in ("role", "content")
    )


def _row_groups(metadata: Any, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows `start` to `stop` - 1, and the number of the first one's first row."""
    groups: list[int] = []
    first_row = row = 0
    for i in range(metadata.num_row_groups):
        n_rows = metadata.row_group(i).num_rows
        if row < stop and row + n_rows > start:
            if not groups:
                first_row = row
            groups.append(i)
        row += n_rows
    return groups, first_row


def _canonical_row(row: dict[str, Any]) -> bytes:
    """One JSON line a row, the same whatever the file's row groups, compression and column order."""
    named = {name: _whole(value) if isinstance(value, float) else value for name, value in row.items()}
    fields = {name: value for name, value in named.items() if value is not None}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), default=_decoded).encode()


def _whole(value: float) -> int | str | None:
    """An id in a column of floats, as which pandas keeps integers beside a null."""
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else repr(value)


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
