"""Names of a record's fields: which of them documents are made of.

Imported by `files` (which columns are read) and by `records` (what a record's shape is); pure names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

ID_FIELD = "id"

TEMPLATE_FIELDS = (
    *("tools", "functions", "documents", "system", "tool_choice", "function_call"),
    *("chat_template", "chat_template_kwargs"),
)
"""Fields of a record beside its messages that chat templates are given, or that are part of the prompt."""

SHAPE_FIELDS = (
    *("text", "messages", "conversations"),
    *("instruction", "input", "output"),
    *("prompt", "completion", "response"),
    *("chosen", "rejected"),
)
"""Fields that records of the known shapes are made of. What a source calls otherwise, its `fields` say."""


class HasFields(Protocol):
    """A source as the recipe or the contract names it."""

    @property
    def id_field(self) -> str: ...
    @property
    def text_field(self) -> str: ...
    @property
    def messages_field(self) -> str: ...
    @property
    def ignore_fields(self) -> tuple[str, ...]: ...
    @property
    def fields(self) -> dict[str, str]: ...


class Fields(NamedTuple):
    """Which fields of a source's records are read."""

    id: str
    text: str
    messages: str
    ignored: tuple[str, ...]


def fields_of(source: HasFields) -> Fields:
    return Fields(source.id_field, source.text_field, source.messages_field, source.ignore_fields)


def named(field: str, source: HasFields) -> str:
    """What a source calls a field of a shape."""
    if field in source.fields:
        return source.fields[field]
    return {"id": source.id_field, "text": source.text_field, "messages": source.messages_field}.get(field, field)


def fields_read(source: HasFields) -> tuple[str, ...]:
    """Every field, in the source's own words, that a document of some shape is made of."""
    standard = ("id", *SHAPE_FIELDS, *TEMPLATE_FIELDS)
    others: Mapping[str, str] = {name: own for name, own in source.fields.items() if name not in standard}
    return tuple(dict.fromkeys([*(named(field, source) for field in standard), *others.values()]))


def why_not(source: HasFields) -> str | None:
    """What is wrong with the names that a recipe gives the fields of a source; None where nothing is."""
    known = (ID_FIELD, *SHAPE_FIELDS, *TEMPLATE_FIELDS)
    for field, own in source.fields.items():
        if field not in known:
            return f"fields has {field!r}, which is of no shape: it takes {', '.join(known)}"
        if own in source.ignore_fields:
            return (
                f"fields says that {own!r} is its {field}, and ignore_fields that it is left out: take out one of them"
            )
        if twin := next((other for other in known if other != field and named(other, source) == own), None):
            return f"{own!r} is both its {twin} and its {field}: name another one in fields"
    return None
