"""Source files as records: where each lies in its file, and its content as bytes that depend on nothing but the record.

Used by the planner (inside Dagster) and by the job that tokenises; imports neither torch nor transformers. The
invariant: a record is one line of canonical bytes (`RawRecord.content`), the same wherever and in whichever layout the
file lies.

JSON Lines (https://jsonlines.org): UTF-8, one object a line, blank lines are no records, a byte order mark, CRLF and a
last line without newline are taken as they come. Parquet: one row a record, read in batches; each row becomes the JSON
line of the columns that count. Either way memory holds one record or one batch, never the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.contract import RecordRange
from kd_assets.durable import is_passing, read_patiently, storage_errors
from kd_assets.errors import InputError, MissingInputError

ID_FIELD = "id"
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
    b"ARROW1": "is an Arrow file: write it as Parquet or JSONL",
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
    """1-based line of a JSONL file; None for Parquet."""
    byte_offset: int | None
    """Where its line starts in a JSONL file; None for Parquet."""
    content: bytes
    """The line without the whitespace around it; for Parquet the row's fields that count, as canonical JSON."""


def iter_raw(records: RecordRange) -> Iterator[RawRecord]:
    """The records of one range, reading no more of the file than they need. Fewer where the file has shrunk."""
    path = Path(records.path)
    if records.file_format == "parquet":
        yield from iter_parquet(
            path,
            text_field=records.text_field,
            messages_field=records.messages_field,
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
            raise MissingInputError(f"source {path} is {kind}; a source is one JSONL or Parquet file: {remedy}")
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


def iter_parquet(
    path: Path, *, text_field: str, messages_field: str, first_record: int = 0, n_records: int | None = None
) -> Iterator[RawRecord]:
    """Rows of a Parquet file as records, from row `first_record` on; row groups before and after are not read.

    Raises InputError when the file is damaged, not Parquet, or lacks a text or messages column of the right type.
    """
    with open_source(path) as f:
        try:
            file = pq.ParquetFile(f)
            schema = _schema_read(file.schema_arrow, path, text_field=text_field, messages_field=messages_field)
            stop = file.metadata.num_rows if n_records is None else first_record + n_records
            groups, number = _row_groups(file.metadata, first_record, stop)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=schema.names):
                if number >= stop:
                    break  # the rest of the row group belongs to other shards
                skip = max(0, first_record - number)
                rows = pa.Table.from_batches([batch]).slice(skip, max(0, stop - number - skip))
                for i, row in enumerate(rows.select(schema.names).cast(schema).to_pylist(), number + skip):
                    yield RawRecord(i, None, None, _canonical_row(row))
                number += len(batch)
        except (pa.ArrowException, OSError) as e:
            if isinstance(e, OSError) and e.errno is not None:
                raise  # of the file system, not Arrow's own words about the content
            raise InputError(f"{path} cannot be read as Parquet ({e}): correct its format, or write it again") from e


def _schema_read(schema: Any, path: Path, *, text_field: str, messages_field: str) -> Any:
    """The columns that count, as bytes instead of strings: a string that is not UTF-8 is one bad row, not a crash."""
    read = []
    for name, fits, target, expected in (
        (ID_FIELD, _is_id, None, "string or integer"),
        (text_field, _is_string, pa.large_binary(), "string"),
        (messages_field, _is_messages, _MESSAGES, "list<struct<role: string, content: string>>"),
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
    if not {text_field, messages_field} & {name for name, _ in read}:
        raise InputError(
            f"{path} has neither a column {text_field!r} nor {messages_field!r}; it has "
            f"{', '.join(map(repr, schema.names[:16])) or 'none'}: set text_field or messages_field in the recipe"
        )
    return pa.schema(read)


_MESSAGES = pa.large_list(pa.struct([("role", pa.large_binary()), ("content", pa.large_binary())]))


def _is_string(found: Any) -> bool:
    if pa.types.is_dictionary(found):
        return _is_string(found.value_type)
    types = pa.types
    return any(is_type(found) for is_type in (types.is_string, types.is_large_string, types.is_string_view)) or bool(
        types.is_null(found)
    )


def _is_id(found: Any) -> bool:
    return _is_string(found) or bool(pa.types.is_integer(found))


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
    fields = {name: value for name, value in row.items() if value is not None}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), default=_decoded).encode()


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
