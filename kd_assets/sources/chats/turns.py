"""What the assistant says in a rendered chat, where the template does not mark it.

Used by `renderer`. It is what an assistant message adds to the rendering of the messages before it, without its header:
that is the generation prompt where the template has one and the turn begins with it; else it is what the turn begins
with whatever its content is.

Templates differ in what becomes of a turn once others follow. Most leave it as it is: all turns are learned in one
document. Some end each rendering with control tokens that are not there once others follow (Phi-3's EOS): these are no
part of an earlier turn. Some rewrite it (drop its reasoning, say): what the model is asked for at that turn is then in
no later rendering, so each turn becomes a document of its own, rendered as the last one, with everything before it as
the model would see it then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd_assets.errors import BadRecordError
from kd_assets.sources.chats.messages import REASONING, as_parts
from kd_assets.sources.chats.template import ChatTemplate, TextSpan
from kd_assets.sources.records import Message

_ANY_CONTENT = ("Alpha is the first.", "Zulu ends it")
"""Contents of an assistant turn that have nothing in common at their beginning."""
_SAID_BESIDES_CONTENT = {*REASONING, "tool_calls", "function_call"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedChat:
    """A document of a chat as the tokenizer will see it."""

    text: str
    assistant_spans: Sequence[TextSpan]
    emptied_null_content: bool = False
    """The template cannot take content that is null, and was given an empty text."""
    unlearned_turns: int = 0
    """Assistant turns of the chat that are in no document as what is learned: the recipe asks for the last alone."""
    unrendered_messages: int = 0
    """Messages whose content or tool calls the template does not write."""


@dataclass(kw_only=True, slots=True)
class Conversation:
    """The renderings of one chat's beginnings, each made once."""

    template: ChatTemplate
    messages: Sequence[Message]
    variables: Mapping[str, Any]
    where: str
    control_token: re.Pattern[str]
    _texts: dict[tuple[int, bool], str | BadRecordError] = field(default_factory=dict)

    def first(self, n: int, *, prompt: bool = False) -> str:
        """The rendering of the first `n` messages, with a generation prompt on request. Raises BadRecordError."""
        if (n, prompt) not in self._texts:
            try:
                self._texts[n, prompt] = self.render(self.messages[:n], prompt=prompt)
            except BadRecordError as e:
                self._texts[n, prompt] = e
        text = self._texts[n, prompt]
        if isinstance(text, BadRecordError):
            raise text
        return text

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        return self.template.render(messages, self.variables, where=self.where, add_generation_prompt=prompt)

    def first_or_none(self, n: int, *, prompt: bool = False) -> str | None:
        """As `first`; None where the template refuses a chat that is no longer than that."""
        try:
            return self.first(n, prompt=prompt)
        except BadRecordError:
            return None

    def turn_span(self, i: int, whole: str) -> TextSpan | None:
        """Where assistant message `i` is in a rendering of it and what follows; None where that rewrites it."""
        turn = self.first(i + 1)
        end = kept(turn, whole, self.control_token)
        if end is None:
            return None
        start = self.header_end(i)
        if start is None:
            return None
        return (start, end) if end == len(turn) or end > start else None

    def turn_document(self, i: int) -> tuple[str, TextSpan]:
        """Assistant message `i` as the last one, with everything before it as the model would see it then; and where in
        that text it is. Raises BadRecordError where it cannot be told from the rest."""
        turn = self.first(i + 1)
        if (start := self.header_end(i)) is not None:
            return turn, (start, len(turn))
        if (joined := self._after_its_prompt(i)) is not None:
            return joined
        raise BadRecordError(
            f"{self.where}: the chat template renders assistant message {i} neither after its generation prompt "
            "nor after the messages before it, so what the assistant says cannot be told from the rest: put "
            "{% generation %}...{% endgeneration %} around it in the template"
        )

    def _after_its_prompt(self, i: int) -> tuple[str, TextSpan] | None:
        """Message `i` after the prompt that the model is given for it, where the template rewrites that prompt once the
        answer is there (Mistral's leave out the system message then). None where the two do not end alike."""
        turn, prompt = self.first(i + 1), self.first_or_none(i, prompt=True)
        asked = self.messages[i - 1].get("content") if i else None
        if prompt is None or not isinstance(asked, str) or not asked.strip():
            return None
        header = turn[: self._common_header(i)]
        end = len(header.rstrip())
        n_alike = common_length(prompt[::-1], header[:end][::-1])
        if asked.strip() not in prompt[len(prompt) - n_alike :]:
            return None
        return prompt + turn[end:], (len(prompt), len(prompt) + len(turn) - end)

    def header_end(self, i: int) -> int | None:
        """Where what the assistant says begins in the rendering of the messages up to assistant message `i`; None where
        that rewrites the messages before it."""
        turn = self.first(i + 1)
        prompted = self.first_or_none(i, prompt=True)
        if prompted is not None and turn.startswith(prompted) and self._ends_with_a_prompt(i, prompted):
            return len(prompted)
        before = self.first_or_none(i)
        # There is no prompt (the template does not look at add_generation_prompt), or the turn begins otherwise (a
        # prompt that ends by opening a thought): the header is what every assistant turn here begins with.
        header_end = self._common_header(i)
        # A template that refuses so short a chat has nothing to compare with; that the last message before it is in the
        # header has to do.
        n_before = (0 if i == 0 else 1) if before is None else kept(before, turn, self.control_token)
        return None if n_before is None or header_end < n_before else header_end

    def _ends_with_a_prompt(self, i: int, prompted: str) -> bool:
        """Whether the rendering of the first `i` messages with a generation prompt has one: it differs from that
        without. That is not rendered where it ends as one that was found in another chat."""
        known, last = self.template.generation_prompt, str(self.messages[i - 1].get("content")) if i else ""
        if known and prompted.endswith(known) and not last.rstrip().endswith(known.strip()):
            return True
        before = self.first_or_none(i)
        if before and prompted.startswith(before) and len(prompted) > len(before):
            self.template.generation_prompt = prompted[len(before) :]
        return prompted != before

    def _common_header(self, i: int) -> int:
        """How far the rendering up to message `i` does not depend on what that says."""
        others = {name: value for name, value in self.messages[i].items() if name not in _SAID_BESIDES_CONTENT}
        in_parts = isinstance(self.messages[i].get("content"), list)
        return min(
            common_length(self.first(i + 1), self.render([*self.messages[:i], {**others, "content": content}]))
            for content in (as_parts(text) if in_parts else text for text in _ANY_CONTENT)
        )


def kept(text: str, whole: str, control_token: re.Pattern[str]) -> int | None:
    """How much of `text` begins `whole`: all, or all but control tokens and white space that end it; else None."""
    if whole.startswith(text):
        return len(text)
    k = common_length(text, whole)
    # Control tokens that begin alike (`<|end|>`, `<|user|>`) differ as a whole.
    k = next((m.start() for m in control_token.finditer(text) if m.start() < k < m.end()), k)
    return k if k and not control_token.sub("", text[k:]).strip() else None


def common_length(one: str, other: str) -> int:
    """How many characters the two have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halving, since a comparison of long texts is as quick as one of short ones
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
