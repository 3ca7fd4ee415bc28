"""Rows of columns as records: the columns that count, as one JSON object.

Structs and maps become objects, in the order of their fields; what is null in them is left out, since Arrow cannot tell
it from what is absent; in lists it stays. Dates, times and decimals become strings in ISO form. A string that is not
UTF-8 is carried as half surrogates, so that it is one bad record and no crash. Values of Arrow's type for JSON, as
which `datasets` keeps what differs from row to row, are what their text says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from kd_assets.errors import InputError
from kd_assets.sources.files.raw import RawRecord

_Convert = Callable[[Any], Any]
"""A value that is not null, as JSON has it; None where it has no such form (NaN)."""


class RowReader:
    """How the rows of a file become records. Raises InputError, naming the column, for one that cannot be."""

    def __init__(self, schema: Any, path: str, columns_read: Sequence[str], *, id_column: str | None = None) -> None:
        self._path = path
        self.all_names = tuple(schema.names)
        self.names = sorted(name for name in dict.fromkeys(columns_read) if name in self.all_names)
        if not self.names:
            raise InputError(
                f"{path} has no column that documents are made of; it has "
                f"{', '.join(map(repr, self.all_names[:16])) or 'none'}: name them in the recipe (shape, fields)"
            )
        if self.all_names and (repeated := [n for n in self.names if len(schema.get_all_field_indices(n)) > 1]):
            n_columns = len(schema.get_all_field_indices(repeated[0]))
            raise InputError(f"{path} has {n_columns} columns named {repeated[0]!r}: rename all but one")
        forms = [_form(schema.field(name).type, f"{path}: column {name!r}") for name in self.names]
        self._schema = pa.schema(list(zip(self.names, [target for target, _ in forms], strict=True)))
        self._convert = [
            (name, _whole if name == id_column and pa.types.is_floating(target) else convert)
            for name, (target, convert) in zip(self.names, forms, strict=True)
        ]

    def records(self, batch: Any, first: int) -> Iterator[RawRecord]:
        """The rows of a batch of `names`, the first of which has this number."""
        try:
            batch.validate()
            rows = pa.Table.from_batches([batch]).select(self.names).cast(self._schema, safe=False)
            rows.validate(full=True)  # of a damaged file, offsets may lead anywhere
            columns = [column.to_pylist() for column in rows.columns]
        except (pa.ArrowNotImplementedError, OverflowError, ValueError) as e:
            raise InputError(
                f"{self._path}: rows {first + 1} to {first + len(batch)} cannot be read ({e}): write the file again, "
                "or convert the column"
            ) from e
        for i, values in enumerate(zip(*columns, strict=True)):
            row = {}
            for (name, convert), value in zip(self._convert, values, strict=True):
                if value is not None and (converted := convert(value)) is not None:
                    row[name] = converted
            content = json.dumps(row, separators=(",", ":")).encode()
            yield RawRecord(first + i, None, None, content, self.all_names)


def _form(found: Any, where: str) -> tuple[Any, _Convert]:
    """The type that a column is cast to, and what becomes of its values."""
    if isinstance(found, pa.BaseExtensionType):
        target, convert = _form(found.storage_type, where)
        return target, _of_json if found.extension_name == "arrow.json" else convert
    if pa.types.is_dictionary(found):
        return _form(found.value_type, where)
    for fits, target, convert in _PLAIN:
        if any(is_type(found) for is_type in fits):
            return found if target is None else target, convert
    if pa.types.is_timestamp(found):  # Python's have no nanoseconds
        return pa.timestamp("us", found.tz), _iso
    return _nested_form(found, where)


def _nested_form(found: Any, where: str) -> tuple[Any, _Convert]:
    types = pa.types
    if types.is_map(found):
        key, convert_key = _form(found.key_type, where)
        item, convert_item = _form(found.item_type, where)
        return pa.map_(key, item), _map_converter(convert_key, convert_item)
    if types.is_struct(found):
        names = [field.name for field in found]
        if len(set(names)) < len(names):
            raise InputError(f"{where} has two fields of one name in {found}: rename one")
        forms = [_form(field.type, where) for field in found]
        target = pa.struct(list(zip(names, [target for target, _ in forms], strict=True)))
        return target, _struct_converter(dict(zip(names, [convert for _, convert in forms], strict=True)))
    if types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found):
        target, convert = _form(found.value_type, where)
        return pa.large_list(target), _list_converter(convert)
    raise InputError(
        f"{where} has {found}, which is no text, number, date, list or object: convert it, or name another column in "
        "the source's fields"
    )


def _struct_converter(fields: dict[str, _Convert]) -> _Convert:
    def convert(value: dict[str, Any]) -> dict[str, Any]:
        converted = {name: fields[name](item) for name, item in value.items() if item is not None}
        return {name: item for name, item in converted.items() if item is not None}

    return convert


def _list_converter(convert_item: _Convert) -> _Convert:
    return lambda value: [None if item is None else convert_item(item) for item in value]


def _map_converter(convert_key: _Convert, convert_item: _Convert) -> _Convert:
    return lambda value: {
        str(convert_key(key)): converted
        for key, item in value
        if item is not None and (converted := convert_item(item)) is not None
    }


def _same(value: Any) -> Any:
    return value


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _of_json(value: bytes) -> Any:
    text = _decoded(value)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a bad record, where a document would be made of it


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _iso(value: Any) -> str:
    return str(value.isoformat())


def _whole(value: float) -> int | str | None:
    """An id in a column of floats, as which pandas keeps integers beside a null."""
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else repr(value)


_PLAIN: tuple[tuple[tuple[Callable[[Any], bool], ...], Any, _Convert], ...] = (
    # As bytes: a string of Arrow's that is not UTF-8 would be a crash.
    ((pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view), pa.large_binary(), _decoded),
    ((pa.types.is_null, pa.types.is_boolean, pa.types.is_integer), None, _same),
    ((pa.types.is_floating,), None, _finite),
    ((pa.types.is_decimal,), None, str),
    ((pa.types.is_date,), None, _iso),
    ((pa.types.is_time,), pa.time64("us"), _iso),
)
"""Types without parts: the type that they are cast to (None: none), and what becomes of their values."""
