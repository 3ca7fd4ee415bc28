"""A record as the job that tokenises is given it, and the id of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ROLES = ("system", "developer", "user", "assistant", "tool")

SAMPLE_ID_DIGITS = 32

Message = dict[str, Any]
"""One turn of a chat as the template is given it: `role`, `content` (a string, None or a list of parts), and whatever
else the record says of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a document is made of: a text or a chat, by whichever shape the record has. One of the first two is
    there."""

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    tools: tuple[Any, ...] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    n_prompt_characters: int = 0
    n_prompt_messages: int = 0


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
    """Fields of messages that were left out though a template may read them: the source says so."""
    n_prompt_characters: int = 0
    """Of the text: the first ones, which are not learned."""
    n_prompt_messages: int = 0
    """The first ones, of which nothing is learned."""
    control_tokens: Literal["tokens", "text"] = "tokens"
    """What control tokens that the text spells out are."""
    sample_id: str = ""
    """Hash of source and content: the same wherever the record lies."""
    file: str = ""
    """Its file's path within the source; of a source of one file, the file's name."""


def sample_id(source: str, content: Content) -> str:
    """32 hexadecimal digits: SHA-256 over the source's name and what the document is made of.

    The same wherever the record lies and whatever file holds it: a field that is null and one that is not there are
    the same, as in Parquet; ids and fields that are left out are not in it.
    """
    if content.messages is None:
        made_of: dict[str, Any] = {"text": content.text}
    else:
        made_of = {"messages": _without_nulls(content.messages)}
    for name in ("tools", "variables", "n_prompt_characters", "n_prompt_messages"):
        if value := getattr(content, name):
            made_of[name] = _without_nulls(value)
    return hashlib.sha256(_canonical([source, made_of]).encode("utf-8")).hexdigest()[:SAMPLE_ID_DIGITS]


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item) for item in value]
    return value
