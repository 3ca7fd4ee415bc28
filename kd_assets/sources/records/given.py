"""The fields of one record, by the names that shapes have for them, and which of them were taken."""

from __future__ import annotations

from typing import Any

from kd_assets.contract import RecordRange
from kd_assets.sources.fields import TEMPLATE_FIELDS, named
from kd_assets.sources.files.raw import RawRecord


class Given:
    """What a record gives; a shape takes from it what its document is made of."""

    def __init__(self, fields: dict[str, Any], raw: RawRecord, records: RecordRange) -> None:
        self.fields, self.records = fields, records
        self.names = tuple(dict.fromkeys((*raw.columns, *fields)))
        """Its own names, of fields with a value and of columns without."""
        self._others = raw.others
        self._taken = {records.id_field}
        self._left_out: dict[str, None] = {}

    def own(self, field: str) -> str:
        """What the source calls a field of a shape."""
        return named(field, self.records)

    def has(self, field: str) -> bool:
        """Whether a field of a shape has a value that the source does not leave out; null is none."""
        name = self.own(field)
        return self.fields.get(name) is not None and name not in self.records.ignore_fields

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
        of_chats = {self.own(field) for field in TEMPLATE_FIELDS}
        main = (self.own("text"), self.own("messages"))
        names = [name for name in self.names if name not in (*self._taken, *of_chats, *main)]
        names += [name for name in main if name not in self._taken and self.fields.get(name) is not None]
        names += [
            name
            for name in map(self.own, TEMPLATE_FIELDS)
            if name not in self._taken and (self.fields.get(name) is not None if is_chat else name in self.names)
        ]
        return tuple(dict.fromkeys((*names, *self._left_out, *self._others)))
