"""One chat template, compiled: what it makes of messages, and what of that it marks with `{% generation %}`.

What transformers says of these marks is not believed (it counts characters wrongly for a block inside a macro): each
block's own text is followed into the rendered chat, and marks that cannot be followed (a filter changed the text around
them) are not used. A template that asks for today's date gets `TEMPLATE_DATE`, so that a shard made tomorrow is the
same shard.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from kd_assets.errors import BadRecordError, RecipeError
from kd_assets.sources.bounded_template import BoundedTemplate, EndlessTemplateError
from kd_assets.sources.chats.template_reads import template_reads
from kd_assets.sources.records import Message

TEMPLATE_DATE = {
    **{"%d": "26", "%-d": "26", "%e": "26", "%j": "208", "%A": "Friday", "%a": "Fri"},
    **{"%m": "07", "%-m": "7", "%B": "July", "%b": "Jul", "%Y": "2024", "%y": "24", "%F": "2024-07-26"},
    **{"%H": "00", "%M": "00", "%S": "00", "%T": "00:00:00"},
}
"""What strftime gives for 26 July 2024, the date that Llama 3.1's template falls back on."""

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_BEGIN, _END = "\uf8f0\uf8f1", "\uf8f1\uf8f0"
"""Around a marked block's text while it is followed through a template: characters for private use."""

TextSpan = tuple[int, int]
"""Characters `start` to `end` - 1 of a rendered chat."""


class ChatTemplate:
    """One template of one tokenizer. Not for several threads at a time."""

    def __init__(self, source: str, *, name: str, variables: Mapping[str, Any]) -> None:
        """`name`: of the tokenizer, for messages to people. Raises RecipeError for what is no template."""
        followed = with_followed_marks(source)
        try:
            self._template = BoundedTemplate(with_fixed_date(source))
            self._followed = None if followed is None else BoundedTemplate(followed)
            self.reads = template_reads(source)
        except (TemplateError, RecursionError) as e:
            raise RecipeError(f"the chat template of {name} is none that Jinja can read: {e}") from e
        self._name, self._variables = name, variables
        self.generation_prompt = ""
        """What it adds for a prompt, once that was seen."""

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        where: str,
        add_generation_prompt: bool = False,
        template: BoundedTemplate | None = None,
    ) -> str:
        """The messages as text. Raises BadRecordError where the template refuses them, RecipeError where it does not
        come to an end."""
        given: dict[str, Any] = {
            **{"tools": None, "documents": None},
            **self._variables,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return (template or self._template).render(**given)
        except (EndlessTemplateError, RecursionError, MemoryError) as e:
            reason = str(e) or type(e).__name__
            raise RecipeError(
                f"the chat template of {self._name} does not come to an end for the chat in {where}: {reason}; "
                "mend the template (its loops, macros and texts that grow)"
            ) from e
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            # A template is a program: it raises on purpose ("roles must alternate") and by mistake.
            raise BadRecordError(f"{where}: the chat template refuses the messages: {e}") from e

    def marked_spans(
        self, messages: Sequence[Message], variables: Mapping[str, Any], text: str, *, where: str
    ) -> list[TextSpan] | None:
        """What the template marks in `text`, its rendering of the messages; None where it marks nothing, or where its
        marks cannot be followed."""
        if self._followed is None or _BEGIN in text or _END in text:
            return None
        return spans_between_marks(self.render(messages, variables, where=where, template=self._followed), text)


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
