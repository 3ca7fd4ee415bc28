"""Records: what makes one a document, and the hash over those of a shard.

Used by the planner (inside Dagster) and by the job that tokenises; imports neither torch nor transformers. The
invariant: the hash over a shard's records changes exactly when what its documents are made of changes.

A record is `{"text": ...}` or `{"messages": [{"role", "content"}, ...]}`, with an optional `"id"`. Where both are given
the messages count: data sets that carry both hold the rendered chat as text. What a chat template or a loss would read
besides (`tools`, a message's `tool_calls` or `weight`) is not understood yet: such a record is an error, whatever
`on_bad_record` says, unless the source's `ignore_fields` name it. Other fields are passed over. Both are counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kd_assets.contract import RecordRange
from kd_assets.errors import BadRecordError, FieldNotUnderstoodError
from kd_assets.sources.fields import ID_FIELD, TEMPLATE_FIELDS, Fields, fields_of
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.read import iter_raw

ROLES = ("system", "developer", "user", "assistant", "tool")


Message = dict[str, Any]
"""One turn of a chat as the template is given it: `role`, `content`, and whatever else the record says of it."""


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
    passed_over: tuple[str, ...] = ()
    """Its fields that nothing was made of; those of messages as `messages.name`."""
    tools: tuple[Any, ...] | None = None
    """What the chat template is given as `tools`."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else of the record the chat template is given (`documents`, `chat_template_kwargs`)."""
    ignored: tuple[str, ...] = ()
    """Fields of messages that are left out though a template may read them: the source says so."""
    n_prompt_characters: int = 0
    """Of the text: the first ones, which are not learned."""
    n_prompt_messages: int = 0
    """The first ones, of which nothing is learned."""
    control_tokens: Literal["tokens", "text"] = "tokens"
    """What control tokens that the text spells out are."""
    sample_id: str = ""
    """Hash of source and content: the same wherever the record lies."""


class ShardHash:
    """The input hash of a shard: SHA-256 over its records and over what else its documents are made of.

    That is the source's name and the first record's number (they name the documents that have no id) and the fields
    that are read; not the path, the time of change, line ends, blank lines or other records of the file.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin_range(self, *, source: str, first_record: int, fields: Fields) -> None:
        header: list[Any] = [source, first_record, fields.text, fields.messages]
        # What came later is in the hash where it is used, so that what was planned before stays what it is.
        if fields.id != ID_FIELD or fields.ignored:
            header += [fields.id, list(fields.ignored)]
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
    cannot be read as what they are said to be, FieldNotUnderstoodError as `parse_record` does.
    """
    seen: dict[str, str] = {}
    for records in ranges:
        shard_hash.begin_range(source=records.source, first_record=records.first_record, fields=fields_of(records))
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


def parse_record(raw: RawRecord, records: RecordRange) -> Record:
    """The record that `raw` holds. Raises BadRecordError with file, line and reason; FieldNotUnderstoodError where it
    has what a template or a loss would read, and the source does not say to leave it out."""
    where = f"{records.path}:{raw.line}" if raw.line is not None else f"{records.path}: row {raw.number + 1}"
    try:
        fields = _parse_object(raw.content)
        messages = fields.get(records.messages_field)
        others = _others(fields, raw, records)
        _refuse_not_understood(others, where, records)
        return Record(
            where=where,
            source=records.source,
            number=raw.number,
            document_id=_document_id(fields.get(records.id_field), records, raw.number),
            text=_text(fields, raw, records) if messages is None else None,
            messages=None if messages is None else _messages(messages, records.messages_field),
            passed_over=_passed_over(fields, raw, records, others),
        )
    except _NoDocumentError as e:
        raise BadRecordError(f"{where}: {e}") from e


def _others(fields: dict[str, Any], raw: RawRecord, records: RecordRange) -> list[str]:
    """What of a chat has a value and may be read by a template or a loss: fields beside the messages by their names,
    those of messages as `messages.name`."""
    messages = fields.get(records.messages_field)
    if messages is None:
        return []
    of_messages = {
        f"{records.messages_field}.{name}": None
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, dict)
        for name, value in message.items()
        if value is not None and name not in ("role", "content")
    }
    beside = [name for name in TEMPLATE_FIELDS if fields.get(name) is not None and name not in _read(records)]
    return [*beside, *of_messages, *raw.others]


def _refuse_not_understood(others: Sequence[str], where: str, records: RecordRange) -> None:
    names = [name for name in others if name.removeprefix(f"{records.messages_field}.") not in records.ignore_fields]
    if names:
        bare = dict.fromkeys(name.removeprefix(f"{records.messages_field}.") for name in names)
        keys = [name if name.isidentifier() else repr(name) for name in bare]
        raise FieldNotUnderstoodError(
            f"{where}: the chat has {', '.join(map(repr, names))}, which its template or a loss may read, and which is "
            "not used here: documents made without it would not be what it means. Write chats that mean the same "
            f"without it, or leave it out knowingly: ignore_fields: [{', '.join(keys)}] of source {records.source!r}"
        )


def _passed_over(
    fields: dict[str, Any], raw: RawRecord, records: RecordRange, others: Sequence[str]
) -> tuple[str, ...]:
    """Every field of a record that nothing is made of. Columns of a file count in each of its rows."""
    names = [name for name in (*raw.columns, *fields) if name not in (*_read(records), *TEMPLATE_FIELDS)]
    if fields.get(records.messages_field) is not None and fields.get(records.text_field) is not None:
        names.append(records.text_field)
    if fields.get(records.messages_field) is None:
        names += [name for name in TEMPLATE_FIELDS if name in (*raw.columns, *fields) and name not in _read(records)]
    return tuple(dict.fromkeys((*names, *others)))


def _read(records: RecordRange) -> tuple[str, str, str]:
    return records.id_field, records.text_field, records.messages_field


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


def _document_id(value: Any, records: RecordRange, number: int) -> str:
    name = records.id_field
    if value is None:
        return f"{records.source}-{number:09d}"
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _NoDocumentError(f"{name!r} is {_kind(value)}; expected a string or an integer")
    if value == "":
        raise _NoDocumentError(f"{name!r} is an empty string")
    return _unicode(str(value), repr(name))


def _text(fields: dict[str, Any], raw: RawRecord, records: RecordRange) -> str:
    value = fields.get(records.text_field)
    if value is None and records.text_field in (*fields, *raw.columns):
        raise _NoDocumentError(f"{records.text_field!r} is null, and there are no {records.messages_field!r}")
    if value is None and records.messages_field in (*fields, *raw.columns):
        raise _NoDocumentError(f"{records.messages_field!r} is null, and there is no {records.text_field!r}")
    if value is None:
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
    return {"role": role, "content": _unicode(content, f"{name}.content")}


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
