"""Chats as text, by a tokenizer's chat template, with the characters that the assistant says.

Used by `tokenise`, in jobs only. What a student learns is found in one of two ways:

- The template marks it with `{% generation %}`. What transformers says of these marks is not believed (it counts
  characters wrongly for a block inside a macro): each block's own text is followed into the rendered chat, and marks
  that cannot be followed (a filter changed the text around them) are not used.
- Else it is what an assistant message adds to the rendering of the messages before it, without its header: that is the
  generation prompt where the template has one and the turn begins with it; else it is what the turn begins with
  whatever its content is. Where a template rewrites earlier turns (drops their reasoning, say) there is no such prefix,
  and the chat is refused instead of being masked wrongly.

A template that asks for today's date gets `TEMPLATE_DATE`, so that a shard made tomorrow is the same shard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from kd_assets.errors import BadRecordError, RecipeError
from kd_assets.sources.bounded_template import BoundedTemplate, EndlessTemplateError
from kd_assets.sources.records import Record

TEMPLATE_DATE = {
    **{"%d": "26", "%-d": "26", "%e": "26", "%j": "208", "%A": "Friday", "%a": "Fri"},
    **{"%m": "07", "%-m": "7", "%B": "July", "%b": "Jul", "%Y": "2024", "%y": "24", "%F": "2024-07-26"},
    **{"%H": "00", "%M": "00", "%S": "00", "%T": "00:00:00"},
}
"""What strftime gives for 26 July 2024, the date that Llama 3.1's template falls back on."""

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_BEGIN, _END = "\uf8f0\uf8f1", "\uf8f1\uf8f0"
"""Around a marked block's text while it is followed through a template: characters for private use."""
_ANY_CONTENT = ("Alpha is the first.", "Zulu ends it")
"""Contents of an assistant turn that have nothing in common at their beginning."""

TextSpan = tuple[int, int]
"""Characters `start` to `end` - 1 of a rendered chat."""


class RenderedChat(NamedTuple):
    """A chat as the tokenizer will see it."""

    text: str
    assistant_spans: Sequence[TextSpan]


class ChatRenderer:
    """Renders chats with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        if not tokenizer.is_fast:
            raise RecipeError(
                f"{name} is a slow tokenizer, which cannot say where its tokens lie in a chat: save it with a "
                "tokenizer.json, or give texts instead of messages"
            )
        try:
            template = tokenizer.get_chat_template()
        except ValueError as e:
            raise RecipeError(
                f"{name} has no chat template, and the source holds messages: add a chat_template.jinja to the "
                "tokenizer's folder, or give texts instead"
            ) from e
        followed = with_followed_marks(template)
        try:
            self._template = BoundedTemplate(with_fixed_date(template))
            self._followed = None if followed is None else BoundedTemplate(followed)
        except (TemplateError, RecursionError) as e:
            raise RecipeError(f"the chat template of {name} is none that Jinja can read: {e}") from e
        self._name, self._special_tokens = name, tokenizer.special_tokens_map

    def render(self, record: Record) -> RenderedChat:
        """The chat as text, with what the assistant says. Raises BadRecordError, with the reason."""
        assert record.messages is not None
        messages = list(record.messages)
        text = self._render(record, messages)
        spans = self._marked_spans(record, messages, text)
        return RenderedChat(text, self._prefix_spans(record, messages, text) if spans is None else spans)

    def _marked_spans(self, record: Record, messages: list[dict[str, str]], text: str) -> list[TextSpan] | None:
        """What the template marks; None where it marks nothing, or where its marks cannot be followed."""
        if self._followed is None or _BEGIN in text or _END in text:
            return None
        followed = self._render(record, messages, template=self._followed)
        return spans_between_marks(followed, text)

    def _prefix_spans(self, record: Record, messages: list[dict[str, str]], text: str) -> list[TextSpan]:
        """What each assistant message adds to the rendering of those before it, without its header."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = self._render(record, messages[: i + 1])
            if not text.startswith(turn):
                raise BadRecordError(
                    f"{record.where}: the chat template has no {{% generation %}} mark that can be followed, and "
                    f"renders message {i} differently once others follow, so what the assistant says cannot be told "
                    "from the rest: put {% generation %}...{% endgeneration %} around it in the template"
                )
            spans.append((self._header_end(record, messages, i, turn), len(turn)))
        return spans

    def _header_end(self, record: Record, messages: list[dict[str, str]], i: int, turn: str) -> int:
        """Where what the assistant says begins in the rendering of the messages up to assistant message `i`."""
        before = self._render(record, messages[:i])
        prompted = self._render(record, messages[:i], add_generation_prompt=True)
        if prompted != before and turn.startswith(prompted):
            return len(prompted)
        # There is no prompt (the template does not look at add_generation_prompt), or the turn begins otherwise (a
        # prompt that ends by opening a thought): the header is what every assistant turn here begins with.
        one, other = (
            self._render(record, [*messages[:i], {**messages[i], "content": content}]) for content in _ANY_CONTENT
        )
        header_end = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
        if not (one.startswith(before) and turn.startswith(before) and turn.startswith(one[:header_end])):
            raise BadRecordError(
                f"{record.where}: the chat template renders assistant message {i} neither after its generation prompt "
                "nor after the messages before it, so what the assistant says cannot be told from the rest: put "
                "{% generation %}...{% endgeneration %} around it in the template"
            )
        return header_end

    def _render(
        self,
        record: Record,
        messages: list[dict[str, str]],
        *,
        template: BoundedTemplate | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return (template or self._template).render(**variables)
        except (EndlessTemplateError, RecursionError, MemoryError) as e:
            reason = str(e) or type(e).__name__
            raise RecipeError(
                f"the chat template of {self._name} does not come to an end for the chat in {record.where}: {reason}; "
                "mend the template (its loops, macros and texts that grow)"
            ) from e
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            # A template is a program: it raises on purpose ("roles must alternate") and by mistake.
            raise BadRecordError(f"{record.where}: the chat template refuses the messages: {e}") from e


def spans_between_marks(followed: str, text: str) -> list[TextSpan] | None:
    """The spans of `text` that `followed`, the same text with marks in it, has between marks; of marks within marks the
    outer ones. None where the two are not the same text, or a mark lacks its other half."""
    pieces = re.split(f"({_BEGIN}|{_END})", followed)
    if "".join(piece for piece in pieces if piece not in (_BEGIN, _END)) != text:
        return None
    spans, position, depth, start = [], 0, 0, 0
    for piece in pieces:
        if piece == _BEGIN:
            start = position if depth == 0 else start
            depth += 1
        elif piece == _END:
            depth -= 1
            if depth < 0:
                return None
            if depth == 0:
                spans.append((start, position))
        else:
            position += len(piece)
    return spans if depth == 0 else None


def with_followed_marks(template: str) -> str | None:
    """The template with the text of each `{% generation %}` block put between marks; None where it has no such block.

    A call of a macro is the same node of Jinja's as that block, with the same white space around it.
    """
    if _GENERATION.search(template) is None:
        return None
    called = _GENERATION.sub(
        lambda tag: f"{{%{tag[1]} {'endcall' if tag[2] else 'call kd_learned()'} {tag[3]}%}}", template
    )
    macro = f"{{% macro kd_learned() %}}{_BEGIN}{{{{ caller() }}}}{_END}{{% endmacro %}}\n"
    return with_fixed_date(macro + called)


def with_fixed_date(template: str) -> str:
    """The template with `strftime_now` bound to `TEMPLATE_DATE`; as it is where it asks for no date."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f"|replace({directive!r}, {value!r})" for directive, value in TEMPLATE_DATE.items())
    # The newline ends the macro's line (Jinja trims it), so that the template still begins at the start of a line.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"
