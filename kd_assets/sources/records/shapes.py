"""Shapes of records: which one a record has, and the document that is made of it.

`auto` takes the first of this order whose fields have values: messages, text, conversations, preference, instruction,
completion. Text goes before the rest because data sets that carry both hold the rendered record as text, and after
messages because there the template renders anew. A shape whose fields the source's `fields` name, and preference where
`prefer` is said, go before the others. What of the record is not used is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from kd_assets.contract import RecordRange
from kd_assets.errors import RecipeError
from kd_assets.sources.records.beside import tools_of, variables_of, with_system
from kd_assets.sources.records.given import Given
from kd_assets.sources.records.messages import messages_in_text, messages_of
from kd_assets.sources.records.record import Content, Message
from kd_assets.sources.records.values import NoDocumentError, named_list, string

Shape = Literal["text", "messages", "conversations", "instruction", "completion", "preference"]

SHAPES: dict[Shape, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "text": (("text",),),
    "conversations": (("conversations",),),
    "preference": (("chosen", "rejected"),),
    "instruction": (("instruction", "output"),),
    "completion": (("prompt", "completion"), ("prompt", "response")),
}
"""Shape → the fields that make it, or others that do; in the order of `auto`."""

OPTIONAL: dict[Shape, tuple[str, ...]] = {"preference": ("prompt",), "instruction": ("input",)}


def order_of_shapes(records: RecordRange) -> tuple[Shape, ...]:
    """In which order they are tried on a record of this range."""
    return tuple(sorted(SHAPES, key=lambda shape: not _is_asked_for(records, shape)))


def shape_of(given: Given, order: Sequence[Shape]) -> Shape:
    """The shape of a record, tried in this `order`. Raises NoDocumentError, with its keys, where it has none or not the
    one that the source says."""
    said = given.records.shape
    if said != "auto":
        if not fits(given, said):
            raise _not_of(given, said)
        return said
    for shape in order:
        if fits(given, shape):
            return shape
    raise _no_shape(given)


def fits(given: Given, shape: Shape) -> bool:
    prefer = given.records.prefer
    if shape == "preference" and prefer is not None and given.has(prefer):
        return True
    return any(all(map(given.has, fields)) for fields in SHAPES[shape])


def content_of(given: Given, shape: Shape) -> Content:
    """The document that a record of this shape is. Raises NoDocumentError; RecipeError where the recipe has to choose
    between two answers."""
    return _MAKERS[shape](given)


def _is_asked_for(records: RecordRange, shape: Shape) -> bool:
    """Whether the source says something that is of this shape alone."""
    if shape == "preference" and records.prefer is not None:
        return True
    fields = {field for fields in SHAPES[shape] for field in fields} | set(OPTIONAL.get(shape, ()))
    # Of two shapes: it tells neither.
    return bool((fields - {"prompt"}) & records.fields.keys())


def _text(given: Given) -> Content:
    return Content(text=string(given.take("text"), repr(given.own("text"))))


def _messages(given: Given) -> Content:
    return _chat(given, messages_of(given.take("messages"), "messages", given))


def _conversations(given: Given) -> Content:
    return _chat(given, messages_of(given.take("conversations"), "conversations", given))


def _instruction(given: Given) -> Content:
    """Alpaca's: what is asked, with what it is about after a blank line, and the answer."""
    about = given.take("input") if given.has("input") else ""
    asked, answer = (string(given.take(field), repr(given.own(field))) for field in ("instruction", "output"))
    about = string(about, repr(given.own("input")))
    return _chat(given, (_turn("user", f"{asked}\n\n{about}" if about else asked), _turn("assistant", answer)))


def _completion(given: Given) -> Content:
    return _answered(given, "completion" if given.has("completion") else "response")


def _preference(given: Given) -> Content:
    prefer = given.records.prefer
    if prefer is None:
        raise RecipeError(
            f"its records have two answers, {given.own('chosen')!r} and {given.own('rejected')!r}: say which of them "
            f"is learned, with prefer: chosen (or rejected) of source {given.records.source!r}"
        )
    return _answered(given, prefer)


def _answered(given: Given, field: str) -> Content:
    """A prompt and its answer, or an answer alone. Two strings are one text; where one of them is a list of messages,
    a string is a message of the user or the assistant, and a table has the list as JSON text. The prompt's part is not
    learned."""
    prompt = messages_in_text(given.take("prompt")) if given.has("prompt") else None
    answer = messages_in_text(given.take(field))
    if not isinstance(answer, list) and not isinstance(prompt, list):
        before = "" if prompt is None else string(prompt, repr(given.own("prompt")))
        text = before + string(answer, repr(given.own(field)))
        return Content(text=text, n_prompt_characters=len(before))
    asked = () if prompt is None else _as_messages(prompt, "prompt", "user", given)
    answered = _as_messages(answer, field, "assistant", given)
    if asked and answered[: len(asked)] == asked:
        answered = answered[len(asked) :]  # data sets of preferences often repeat the prompt in each answer
    if not answered:
        raise NoDocumentError(f"{given.own(field)!r} has nothing after the messages of {given.own('prompt')!r}")
    return _chat(given, (*asked, *answered), n_prompt_messages=len(asked))


def _as_messages(value: Any, field: str, role: str, given: Given) -> tuple[Message, ...]:
    if isinstance(value, list):
        return messages_of(value, field, given)
    return (_turn(role, string(value, repr(given.own(field)))),)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _chat(given: Given, messages: tuple[Message, ...], *, n_prompt_messages: int = 0) -> Content:
    """The chat with what stands beside it."""
    whole = with_system(messages, given)
    n_before = len(whole) - len(messages) if n_prompt_messages else 0
    return Content(
        messages=whole,
        tools=tools_of(given),
        variables=variables_of(given),
        n_prompt_messages=n_prompt_messages + n_before,
    )


_MAKERS: dict[Shape, Callable[[Given], Content]] = {
    "text": _text,
    "messages": _messages,
    "conversations": _conversations,
    "instruction": _instruction,
    "completion": _completion,
    "preference": _preference,
}


def _no_shape(given: Given) -> NoDocumentError:
    text, messages, source = given.own("text"), given.own("messages"), given.records.source
    if text in given.names:
        return NoDocumentError(f"{text!r} is null, and there are no {messages!r}", kind="null")
    if messages in given.names:
        return NoDocumentError(f"{messages!r} is null, and there is no {text!r}", kind="null")
    return NoDocumentError(
        f"neither {text!r} nor {messages!r} is there (it has {named_list(given.names) or 'no field'}), nor the fields "
        f"of another shape ({_shapes_in_words()}){_what_is_said_of_others(given)}: say with fields of source "
        f"{source!r} which of its own stand for those",
        kind="no shape fits",
    )


def _what_is_said_of_others(given: Given) -> str:
    """What the source says of fields that the record does not have."""
    records = given.records
    said = [f"fields says {own!r} for {field}" for field, own in records.fields.items() if own not in given.names]
    if records.prefer is not None and given.own(records.prefer) not in given.names:
        said.append(f"prefer says {given.own(records.prefer)!r}")
    return f"; {', '.join(said)}, which is not there" if said else ""


def _not_of(given: Given, shape: Shape) -> NoDocumentError:
    own = [given.own(field) for field in min(SHAPES[shape], key=lambda fields: sum(not given.has(f) for f in fields))]
    missing = [name for name in own if given.fields.get(name) is None]
    return NoDocumentError(
        f"{' and '.join(map(repr, missing))} of shape {shape} {'is' if len(missing) == 1 else 'are'} null or not there "
        f"(it has {named_list(given.names) or 'no field'}): set another shape, or say with fields of source "
        f"{given.records.source!r} which of its own stand for them",
        kind="not of its shape",
    )


def _shapes_in_words() -> str:
    several = [fields for fields in SHAPES.values() if len(fields[0]) > 1]
    return "; ".join(" or ".join(", ".join(names) for names in fields) for fields in [(("conversations",),), *several])
