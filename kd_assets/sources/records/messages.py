"""Messages of a record as the chat template is given them: whole, with every key that has a value.

A message is `role`, `content` (a string, a list of parts, or null where the message says something else) and any
further key: the template decides what it reads. ShareGPT's `from` and `value` become the same, its `function_call` a
message of `tool_calls`, its `observation` one of a tool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kd_assets.sources.records.given import Given
from kd_assets.sources.records.record import ROLES, Message
from kd_assets.sources.records.values import NoDocumentError, json_list, kind_of, string, unicode_all, unicode_text

OWN_WORDS = {role: role for role in ROLES}

SHAREGPT_WORDS = {
    **OWN_WORDS,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Who speaks in ShareGPT's conversations and those that were made after them."""

FUNCTION_CALL = "function_call"
"""Of a ShareGPT turn: its value is the call, as JSON text."""


def messages_of(value: Any, field: str, given: Given) -> tuple[Message, ...]:
    """The messages in a record's `field`, checked; a table has them as the JSON text of the list. Raises
    NoDocumentError, which names the message and the key."""
    name = given.own(field)
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = json_list(value, repr(name))
    if not isinstance(value, list):
        raise NoDocumentError(f"{name!r} is {kind_of(value)}; expected a list of messages, or JSON text of it")
    if not value:
        raise NoDocumentError(f"{name!r} is an empty list")
    return tuple(_message(message, field, f"{name}[{i}]", given) for i, message in enumerate(value))


def messages_in_text(value: Any) -> Any:
    """The list of messages whose JSON text a value is; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    says_who = all(isinstance(message, dict) and {"role", "from"} & message.keys() for message in found)
    return found if says_who else value


def _message(value: Any, field: str, name: str, given: Given) -> Message:
    if not isinstance(value, dict):
        raise NoDocumentError(f'{name} is {kind_of(value)}; expected {{"role": ..., "content": ...}}')
    is_sharegpt = value.get("role") is None and value.get("from") is not None
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    words = SHAREGPT_WORDS if is_sharegpt or field == "conversations" else OWN_WORDS
    said = value.get(role_key)
    role = _role(said, f"{name}.{role_key}", words, given)
    content = value.get(content_key)
    others = _others(value, (role_key, content_key), field, name, given)
    if said == FUNCTION_CALL and FUNCTION_CALL not in given.records.roles and "tool_calls" not in others:
        content, others["tool_calls"] = None, _function_calls(content, f"{name}.{content_key}")
    content = _content(content, f"{name}.{content_key}", says_more=bool(others.keys() - {"name"}))
    return {"role": role, "content": content, **others}


def _role(said: Any, name: str, words: Mapping[str, str], given: Given) -> str:
    if not isinstance(said, str) or (role := given.records.roles.get(said) or words.get(said)) is None:
        expected = ", ".join(ROLES if words is OWN_WORDS else words)
        raise NoDocumentError(
            f"{name} is {said!r:.40}; expected one of {expected}, or a word that roles of source "
            f"{given.records.source!r} explains",
            kind="unknown role",
        )
    return role


def _content(value: Any, name: str, *, says_more: bool) -> str | list[Message] | None:
    """A string, a list of parts as objects, or None where the message `says_more` than this."""
    if value is None and says_more:
        return None
    if isinstance(value, list):
        return _parts(value, name)
    if value is None:
        raise NoDocumentError(f"{name} is null; expected a string, or something else that the message says")
    return string(value, name)


def _parts(value: list[Any], name: str) -> list[Message]:
    if not value:
        raise NoDocumentError(f"{name} is a list without parts; expected a string or parts")
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise NoDocumentError(f'{name}[{i}] is {kind_of(part)}; expected a part: {{"type": "text", "text": ...}}')
        if not isinstance(part.get("type"), str):
            raise NoDocumentError(f"{name}[{i}].type is {kind_of(part.get('type'))}; expected a word such as 'text'")
        if part["type"] == "text":
            string(part.get("text"), f"{name}[{i}].text")
    unicode_all(value, name)
    return [{key: item for key, item in part.items() if item is not None} for part in value]


def _others(value: dict[str, Any], read: tuple[str, ...], field: str, name: str, given: Given) -> Message:
    """What the message says besides role and content. What is null is not there: columns cannot tell them apart."""
    others: Message = {}
    for key, item in value.items():
        if item is None or key in read:
            continue
        if key in given.records.ignore_fields:
            given.leave_out_of_messages(field, key)
        elif key == "tool_calls":
            if calls := tool_calls(item, f"{name}.{key}"):
                others[key] = calls
        else:
            unicode_text(key, f"a key of {name}")
            unicode_all(item, f"{name}.{key}")
            others[key] = item
    return others


def tool_calls(value: Any, name: str) -> list[Any]:
    """The calls as they are (JSON text of the list, which some columns have, parsed), each with a function's name and
    with arguments that are an object or JSON text."""
    calls = json_list(value, name)
    for i, call in enumerate(calls):
        _check_call(call, f"{name}[{i}]")
    return calls


def _check_call(call: Any, name: str) -> None:
    if not isinstance(call, dict):
        raise NoDocumentError(f'{name} is {kind_of(call)}; expected {{"function": {{"name", "arguments"}}}}')
    function, where = call, name
    if call.get("function") is not None:
        function, where = call["function"], f"{name}.function"
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise NoDocumentError(f"{where} has no name of a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            json.loads(arguments)
        except (ValueError, RecursionError) as e:
            raise NoDocumentError(
                f"{where}.arguments is text that is not JSON ({e}); expected an object, or its JSON text",
                kind="arguments that are not JSON",
            ) from e
    elif arguments is not None and not isinstance(arguments, dict):
        raise NoDocumentError(f"{where}.arguments is {kind_of(arguments)}; expected an object, or its JSON text")


def _function_calls(value: Any, name: str) -> list[Any]:
    """The calls that a ShareGPT turn of `function_call` spells: one object, or a list of them, as JSON text."""
    if not isinstance(value, str):
        raise NoDocumentError(f"{name} is {kind_of(value)}; expected the JSON text of a function's name and arguments")
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as e:
        raise NoDocumentError(
            f"{name} is text that is not JSON ({e}); expected a function's name and arguments",
            kind="arguments that are not JSON",
        ) from e
    found = tool_calls(calls if isinstance(calls, list) else [calls], name)
    if not found:
        raise NoDocumentError(f"{name} holds no call of a function")
    return [call if call.get("function") is not None else {"type": "function", "function": call} for call in found]
