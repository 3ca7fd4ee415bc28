"""A record's messages in the form that a chat template takes.

Used by `renderer`. All that a message carries reaches the template; what differs between templates is the form: whether
the arguments of a tool call are an object or JSON text, whether `content` may be null, what reasoning is called. The
record's own form comes first where the template can take it, and the forms that follow mean the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from kd_assets.errors import BadRecordError, FieldNotUnderstoodError
from kd_assets.sources.chats.template_reads import TemplateReads
from kd_assets.sources.records import Message, Record

REASONING = ("reasoning_content", "thinking", "reasoning")
"""What data sets and templates call the same thing."""
_MEDIA = ("image", "image_url", "audio", "input_audio", "audio_url", "video", "video_url", "file")


class Form(NamedTuple):
    """Messages as a template may be given them."""

    messages: list[Message]
    emptied_null_content: bool
    """Content that is null became an empty text."""


def messages_for(record: Record, reads: TemplateReads) -> list[Message]:
    """The record's messages without what it leaves out knowingly and without keys that have no value.

    Raises FieldNotUnderstoodError for a key with a value that the template never reads: the text would be the same
    without it.
    """
    assert record.messages is not None
    messages: list[Message] = []
    unread: dict[str, str] = {}
    for i, message in enumerate(record.messages):
        kept: Message = {}
        for name, value in message.items():
            if name in ("role", "content"):
                kept[name] = value
            elif name not in record.ignored and not _has_no_value(value):
                own = _name_for(name, message, reads)
                kept[name if own is None else own] = value
                if own is None:
                    unread.setdefault(name, f"messages[{i}] of role {message.get('role')!r}")
        messages.append(kept)
    if unread:
        named = ", ".join(f"{name!r} ({where})" for name, where in unread.items())
        raise FieldNotUnderstoodError(
            f"{record.where}: the chat has {named}, which its chat template never reads: documents made without it "
            "would not be what it means. Use a chat template that reads it (chat_template), or leave it out knowingly: "
            f"ignore_fields: [{', '.join(unread)}] of source {record.source!r}"
        )
    return messages


def _has_no_value(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _name_for(name: str, message: Message, reads: TemplateReads) -> str | None:
    """What the template calls a message's key; None where it reads none of its names."""
    if reads.reads_key(name):
        return name
    if name in REASONING:
        return next((other for other in REASONING if reads.reads_key(other) and not message.get(other)), None)
    return None


def forms(messages: list[Message], reads: TemplateReads) -> Iterator[Form]:
    """Every form that means the same as the messages, the likeliest first; the messages themselves are among them.

    JSON text of an object is given as the object, as templates expect that write it with `tojson` or go through its
    items, unless the template asks by itself whether it is a string.
    """
    if not has_null_content(messages) and not any(m.get("tool_calls") or m.get("function_call") for m in messages):
        yield Form(messages, False)  # the others are the same
        return
    as_objects, as_text = _with_arguments(messages, _parsed), _with_arguments(messages, _as_json)
    by_arguments = [messages, as_objects, as_text] if reads.tells_arguments_as_text else [as_objects, messages, as_text]
    emptied = [Form(_with_empty_content(form), True) for form in by_arguments]
    # Some templates write the calls of a message only where its content is null.
    nulled = [Form(_with_null_content(form), False) for form in by_arguments]
    tried: list[list[Message]] = []
    for form in (*(Form(form, False) for form in by_arguments), *emptied, *nulled):
        if form.messages not in tried:
            tried.append(form.messages)
            yield form


def _with_arguments(messages: Sequence[Message], convert: Callable[[Any], Any]) -> list[Message]:
    """The messages with the arguments of all their tool calls converted."""

    def call_of(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": call_of(call["function"])}
        return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else call

    converted = []
    for message in messages:
        changed = dict(message)
        if isinstance(calls := message.get("tool_calls"), list):
            changed["tool_calls"] = [call_of(call) for call in calls]
        if isinstance(call := message.get("function_call"), dict):
            changed["function_call"] = call_of(call)
        converted.append(changed)
    return converted


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_empty_content(messages: Sequence[Message]) -> list[Message]:
    return [m if m.get("content") is not None else {**m, "content": ""} for m in messages]


def _with_null_content(messages: Sequence[Message]) -> list[Message]:
    """Content that is empty beside tool calls made null."""
    return [{**m, "content": None} if m.get("tool_calls") and m.get("content") == "" else m for m in messages]


def called_names(messages: Sequence[Message]) -> Iterator[str]:
    """What the tools are called that messages call."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(name := function.get("name"), str):
                yield name


def has_parts(messages: Sequence[Message]) -> bool:
    return any(isinstance(message.get("content"), list) for message in messages)


def has_null_content(messages: Sequence[Message]) -> bool:
    return any(message.get("content") is None for message in messages)


def parts_as_text(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with parts that are all text joined; None where a part is something else."""
    joined = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            texts = [_text_of(part) for part in content]
            if any(text is None for text in texts):
                return None
            joined.append({**message, "content": "".join(text or "" for text in texts)})
        else:
            joined.append(message)
    return joined


def text_as_parts(messages: Sequence[Message]) -> list[Message]:
    """The messages with each text as a part, for templates that go through parts and take a text for none."""
    return [{**m, "content": as_parts(m["content"])} if isinstance(m.get("content"), str) else m for m in messages]


def as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def n_missing_texts(messages: Sequence[Message], text: str) -> int:
    """How many messages have content that is not in the text as it is: lost, or cut as the template means it."""
    contents = [message.get("content") for message in messages]
    return sum(isinstance(content, str) and content.strip() not in text for content in contents)


def refuse_media(messages: Sequence[Message], where: str) -> None:
    """Raise BadRecordError for a part that is no text, whatever the template would put in its place: a teacher of text
    would read a placeholder."""
    for i, part, kind in _parts(messages):
        if kind in _MEDIA or (isinstance(part, dict) and any(part.get(name) is not None for name in _MEDIA)):
            raise BadRecordError(
                f"{where}: messages[{i}].content has a part of type {kind!r}, and only text is learned here: give "
                "chats without it"
            )


def unhandled_part(messages: Sequence[Message], text: str, where: str) -> BadRecordError | None:
    """What is wrong where the template wrote parts of content as Python or JSON spells them, or left their text out."""
    # One that is no text is named before others: joined as one string, those would do.
    for i, part, kind in sorted(_parts(messages), key=lambda found: _text_of(found[1]) is not None):
        spelled = {str(part), json.dumps(part, ensure_ascii=False)} if isinstance(part, dict) else set[str]()
        part_text = _text_of(part)
        if any(s in text for s in spelled) or (part_text is not None and part_text.strip() not in text):
            return BadRecordError(
                f"{where}: messages[{i}].content has a part of type {kind!r}, and the chat template has no way with "
                "such parts: give content as one string, or another chat_template"
            )
        if part_text is None and not any(isinstance(v, str) and v.strip() in text for v in _values(part)):
            return BadRecordError(
                f"{where}: nothing of a part of type {kind!r} of messages[{i}].content is in what the chat template "
                "makes of it: give chats without it, or another chat_template"
            )
    return None


def _parts(messages: Sequence[Message]) -> Iterator[tuple[int, Any, Any]]:
    """Message, part and the part's type, of each content that is a list."""
    for i, message in enumerate(messages):
        if isinstance(content := message.get("content"), list):
            for part in content:
                yield i, part, part.get("type", "?") if isinstance(part, dict) else type(part).__name__


def _values(part: Any) -> list[Any]:
    return [value for name, value in part.items() if name != "type"] if isinstance(part, dict) else []


def _text_of(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    is_text = isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
    return str(part["text"]) if is_text else None


def texts_in(value: Any) -> list[str]:
    """Every text in a JSON value, keys of objects left out, in no order."""
    texts, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
    return texts
