"""What stands beside a chat in its record: tools, a system prompt, and variables of the template."""

from __future__ import annotations

from typing import Any

from kd_assets.errors import FieldNotUnderstoodError
from kd_assets.sources.fields import TEMPLATE_FIELDS
from kd_assets.sources.records.given import Given
from kd_assets.sources.records.record import Message
from kd_assets.sources.records.values import NoDocumentError, json_list, json_object, kind_of, string

USED_BESIDE_CHATS = ("tools", "functions", "documents", "system", "chat_template_kwargs")

OURS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")
"""Variables of a template that a record's `chat_template_kwargs` cannot say."""


def refuse_not_used(given: Given, where: str, *, is_chat: bool, but: tuple[str, ...] = USED_BESIDE_CHATS) -> None:
    """Raise FieldNotUnderstoodError for a field with a value that a template or a loss would read and nothing here
    does, unless the source says to leave it out: `on_bad_record: skip` must not pass over a whole source."""
    names = [
        given.own(field)
        for field in TEMPLATE_FIELDS
        if field not in but and given.has(field) and given.fields[given.own(field)] not in ("", [])
    ]
    if names:
        raise not_understood(names, where, given, what="chat" if is_chat else "text")


def not_understood(
    names: list[str], where: str, given: Given, *, what: str = "chat", remedy: str = ""
) -> FieldNotUnderstoodError:
    """`names`: of fields beside the messages, and `messages.key` of keys in them."""
    prefix = f"{given.own('messages')}."
    keys = [key if key.isidentifier() else repr(key) for key in dict.fromkeys(n.removeprefix(prefix) for n in names)]
    remedy = remedy or f"Write {what}s that mean the same without it"
    return FieldNotUnderstoodError(
        f"{where}: the {what} has {', '.join(map(repr, names))}, which its template or a loss may read, and which is "
        f"not used here: documents made without it would not be what it means. {remedy}, or leave it out knowingly: "
        f"ignore_fields: [{', '.join(keys)}] of source {given.records.source!r}"
    )


def tools_of(given: Given) -> tuple[Any, ...] | None:
    """The tools of a chat, as they are; `functions`, as OpenAI's older records have them, as tools of that type. Either
    may be JSON text of the list. None where there are none."""
    found: dict[str, tuple[Any, ...]] = {}
    for field in ("tools", "functions"):
        if given.has(field):
            name = given.own(field)
            items = json_list(given.take(field), repr(name))
            for i, item in enumerate(items):
                if not isinstance(item, dict):
                    raise NoDocumentError(f"{name}[{i}] is {kind_of(item)}; expected a tool's description")
            if items:
                found[field] = tuple(items)
    if len(found) > 1:
        raise NoDocumentError(
            f"it has both {given.own('tools')!r} and {given.own('functions')!r}: leave one out with ignore_fields"
        )
    if functions := found.get("functions"):
        return tuple(
            item if item.get("function") is not None else {"type": "function", "function": item} for item in functions
        )
    return found.get("tools")


def variables_of(given: Given) -> dict[str, Any]:
    """What else the template is given: the record's `documents`, and each of its `chat_template_kwargs`."""
    variables: dict[str, Any] = {}
    if given.has("documents"):
        documents = json_list(given.take("documents"), repr(given.own("documents")))
        variables |= {"documents": documents} if documents else {}
    if given.has("chat_template_kwargs"):
        name = given.own("chat_template_kwargs")
        kwargs = json_object(given.take("chat_template_kwargs"), repr(name))
        if odd := [key for key in kwargs if key in OURS or not key.isidentifier()]:
            raise NoDocumentError(f"{name!r} has {odd[0]!r:.60}, which is no variable that a record can say")
        variables |= {key: value for key, value in kwargs.items() if value is not None}
    return variables


def with_system(messages: tuple[Message, ...], given: Given) -> tuple[Message, ...]:
    """The messages after the system prompt that stands beside them; an empty one is none.

    Where they begin with one it must be the same, or be left out: which of two holds is not ours to say.
    """
    if not given.has("system"):
        return messages
    name = given.own("system")
    system = string(given.take("system"), repr(name))
    if not system:
        return messages
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return ({"role": "system", "content": system}, *messages)
    if first["content"] != system:
        raise NoDocumentError(
            f"{name!r} is another system prompt than the one that the messages begin with: write one of them, or set "
            f"ignore_fields: [{name}] of source {given.records.source!r}",
            kind="two system prompts",
        )
    return messages
