"""Records of source files: where each lies, what counts of it, and what makes it a document.

Used by the planner (inside Dagster) and by the job that tokenises; imports neither torch nor transformers. The
invariant: a record is one line of canonical bytes (`RawRecord.content`) that depends on nothing but the record, so the
hash over a shard's records changes exactly when what its documents are made of changes, wherever the file lies.

JSON Lines (https://jsonlines.org): UTF-8, one object a line, blank lines are no records, a byte order mark, CRLF and a
last line without newline are taken as they come. Parquet: one row a record, read in batches; each row becomes the JSON
line of the columns that count. Either way memory holds one record or one batch, never the file.

A record is `{"text": ...}` or `{"messages": [{"role", "content"}, ...]}`, with an optional `"id"`. Where both are given
the messages count: data sets that carry both hold the rendered chat as text. Other fields are ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.contract import RecordRange
from kd_assets.errors import BadRecordError, InputError, MissingInputError

ID_FIELD = "id"
ROLES = ("system", "developer", "user", "assistant", "tool")
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


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A valid record: exactly one of `text` and `messages` is there."""

    where: str
    """`file:line`, for messages to people."""
    source: str
    number: int
    document_id: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None


class ShardHash:
    """The input hash of a shard: SHA-256 over its records and over what else its documents are made of.

    That is the source's name and the first record's number (they name the documents that have no id) and the fields
    that are read; not the path, the time of change, line ends, blank lines or other records of the file.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin_range(self, *, source: str, first_record: int, text_field: str, messages_field: str) -> None:
        header = [source, first_record, text_field, messages_field]
        self._digest.update(json.dumps(header).encode() + b"\n")

    def add(self, record: RawRecord) -> None:
        self._digest.update(record.content)
        self._digest.update(b"\n")  # no record holds one: no two lists of records give the same bytes

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def read_records(ranges: Sequence[RecordRange], shard_hash: ShardHash) -> Iterator[Record | BadRecordError]:
    """The records of a shard in order, each valid or as the error that says file, line and reason.

    Document ids are unique within what is yielded: a repeated one is a bad record. `shard_hash` takes in every record
    that passes; it is complete once the iterator is exhausted. Raises MissingInputError and InputError for files that
    cannot be read as what they are said to be.
    """
    seen: dict[str, str] = {}
    for records in ranges:
        shard_hash.begin_range(
            source=records.source,
            first_record=records.first_record,
            text_field=records.text_field,
            messages_field=records.messages_field,
        )
        for raw in iter_raw(records):
            shard_hash.add(raw)
            try:
                record = parse_record(raw, records)
            except BadRecordError as e:
                yield e
                continue
            if first := seen.get(record.document_id):
                yield BadRecordError(f"{record.where}: id {record.document_id!r} is already that of {first}")
                continue
            seen[record.document_id] = record.where
            yield record


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
    """A source file for reading. Raises MissingInputError, naming it, when it is not there or not to be read."""
    remedy = "create it, or correct its path in the recipe"
    try:
        # Not blocking: opening a named pipe would wait for its writer for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise MissingInputError(f"source file {path} cannot be read: {reason}; {remedy}") from e
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
    while line := _read_line(f, path):
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


def _read_line(f: BinaryIO, path: Path) -> bytes:
    try:
        return f.readline(MAX_LINE_BYTES + 1)
    except OSError as e:
        raise InputError(f"{path} cannot be read to its end: {e.strerror}; try again, or copy the file anew") from e


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
            raise InputError(f"{path} cannot be read as Parquet ({e}): correct its format, or write it again") from e


def parse_record(raw: RawRecord, records: RecordRange) -> Record:
    """The record that `raw` holds. Raises BadRecordError with file, line and reason."""
    where = f"{records.path}:{raw.line}" if raw.line is not None else f"{records.path}: row {raw.number + 1}"
    try:
        fields = _parse_object(raw.content)
        messages = fields.get(records.messages_field)
        return Record(
            where=where,
            source=records.source,
            number=raw.number,
            document_id=_document_id(fields.get(ID_FIELD), records.source, raw.number),
            text=_text(fields, records) if messages is None else None,
            messages=None if messages is None else _messages(messages, records.messages_field),
        )
    except _NoDocumentError as e:
        raise BadRecordError(f"{where}: {e}") from e


class _NoDocumentError(ValueError):
    """Why a record cannot become a document."""


def _parse_object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise _NoDocumentError(
            f"not UTF-8: byte 0x{content[e.start]:02x} at position {e.start + 1} of the record"
        ) from e
    except json.JSONDecodeError as e:
        raise _NoDocumentError(f"not JSON: {e.msg} at column {e.colno}") from e
    except ValueError as e:  # an integer of more digits than Python converts
        raise _NoDocumentError(f"not JSON that can be read: {e}") from e
    except RecursionError as e:
        raise _NoDocumentError("nested too deeply") from e
    if not isinstance(value, dict):
        raise _NoDocumentError(f'expected an object such as {{"text": "..."}}, found {_kind(value)}')
    return value


def _document_id(value: Any, source: str, number: int) -> str:
    if value is None:
        return f"{source}-{number:09d}"
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _NoDocumentError(f"{ID_FIELD!r} is {_kind(value)}; expected a string or an integer")
    if value == "":
        raise _NoDocumentError(f"{ID_FIELD!r} is an empty string")
    return _unicode(str(value), f"{ID_FIELD!r}")


def _text(fields: dict[str, Any], records: RecordRange) -> str:
    value = fields.get(records.text_field)
    if records.text_field not in fields or value is None:
        has = ", ".join(map(repr, list(fields)[:8])) or "no field"
        raise _NoDocumentError(f"neither {records.text_field!r} nor {records.messages_field!r} is there (it has {has})")
    if not isinstance(value, str):
        raise _NoDocumentError(f"{records.text_field!r} is {_kind(value)}; expected a string")
    return _unicode(value, repr(records.text_field))


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _NoDocumentError(f"{name!r} is {_kind(value)}; expected a list of messages")
    if not value:
        raise _NoDocumentError(f"{name!r} is an empty list")
    return tuple(_message(message, f"{name}[{i}]") for i, message in enumerate(value))


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise _NoDocumentError(f'{name} is {_kind(value)}; expected {{"role": ..., "content": ...}}')
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise _NoDocumentError(f"{name}.role is {role!r:.40}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise _NoDocumentError(f"{name}.content is {_kind(content)}; expected a string")
    return Message(role, _unicode(content, f"{name}.content"))


def _unicode(value: str, name: str) -> str:
    """`value` if it is text. JSON can spell half a surrogate pair, and bytes that are not UTF-8 arrive as such."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        code = ord(value[e.start])
        if 0xDC80 <= code <= 0xDCFF:  # how `_canonical_row` spells a byte that is not UTF-8
            raise _NoDocumentError(f"{name} is not UTF-8: byte 0x{code - 0xDC00:02x} or a lone surrogate") from e
        raise _NoDocumentError(f"{name} holds half a surrogate pair (\\u{code:04x}), which is no character") from e
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


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
