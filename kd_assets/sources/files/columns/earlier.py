"""Rows of Parquet and Arrow files as earlier versions made records of them: id, text, and messages of role and content.

For ranges without a `file_identity`, whose shards' hashes are over these bytes: they stay as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_assets.errors import InputError
from kd_assets.sources.fields import TEMPLATE_FIELDS, Fields
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.storage import open_source

BATCH_ROWS = 256
"""Rows of a Parquet file decoded at a time."""


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
    file = pq.ParquetFile(f, buffer_size=1 << 20, pre_buffer=False)  # else all that is asked for is held

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
