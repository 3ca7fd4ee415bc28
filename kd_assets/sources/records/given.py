"""The fields of one record, by the names that shapes have for them, and which of them were taken."""

from __future__ import annotations

from typing import Any

from kd_assets.contract import RecordRange
from kd_assets.sources.fields import SHAPE_FIELDS, TEMPLATE_FIELDS, named
from kd_assets.sources.files.raw import RawRecord


class OwnNames:
    """What the source of a range calls the fields of shapes; worked out once for all of its records."""

    def __init__(self, records: RecordRange) -> None:
        self.records = records
        self.own = {field: named(field, records) for field in (*SHAPE_FIELDS, *TEMPLATE_FIELDS)}
        self.template_fields = tuple(dict.fromkeys(self.own[field] for field in TEMPLATE_FIELDS))
        self.main = (self.own["text"], self.own["messages"])
        self.counted_apart = frozenset((*self.template_fields, *self.main))
        self.ignored = frozenset(records.ignore_fields)


class Given:
    """What a record gives; a shape takes from it what its document is made of."""

    def __init__(self, fields: dict[str, Any], raw: RawRecord, names: OwnNames) -> None:
        self.fields, self.records, self._names = fields, names.records, names
        self.names = tuple(dict.fromkeys((*raw.columns, *fields)))
        """Its own names, of fields with a value and of columns without."""
        self._others = raw.others
        self._taken = {names.records.id_field}
        self._left_out: dict[str, None] = {}

    def own(self, field: str) -> str:
        """What the source calls a field of a shape."""
        return self._names.own[field]

    def has(self, field: str) -> bool:
        """Whether a field of a shape has a value that the source does not leave out; null is none."""
        name = self._names.own[field]
        return self.fields.get(name) is not None and name not in self._names.ignored

    def take(self, field: str) -> Any:
        """The value of a field of a shape, None where it has none; the document is made of it."""
        name = self.own(field)
        self._taken.add(name)
        return self.fields.get(name)

    def leave_out_of_messages(self, field: str, key: str) -> None:
        """Note a key of a message that the source says is left out."""
        self._left_out[f"{self.own(field)}.{key}"] = None

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keys of messages that were left out."""
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in self._left_out))

    def passed_over(self, *, is_chat: bool) -> tuple[str, ...]:
        """Every field that nothing was made of. Columns of a file count in each of its rows; a field beside a chat that
        a template is given, and the text or messages beside the shape that was taken, where they have a value."""
        names, taken, fields = self._names, self._taken, self.fields
        found = [name for name in self.names if name not in taken and name not in names.counted_apart]
        found += [name for name in names.main if name not in taken and fields.get(name) is not None]
        found += [
            name
            for name in names.template_fields
            if name not in taken and (fields.get(name) is not None if is_chat else name in self.names)
        ]
        return tuple(dict.fromkeys((*found, *self._left_out, *self._others)))
