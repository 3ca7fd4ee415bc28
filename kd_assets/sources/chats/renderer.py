"""From a record of messages to the documents that are made of it, by one tokenizer's chat template."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from kd_assets.errors import BadRecordError, FieldNotUnderstoodError, RecipeError
from kd_assets.sources.chats.messages import (
    Form,
    called_names,
    forms,
    has_null_content,
    has_parts,
    messages_for,
    n_missing_texts,
    parts_as_text,
    refuse_media,
    text_as_parts,
    unhandled_part,
)
from kd_assets.sources.chats.template import ChatTemplate, TextSpan
from kd_assets.sources.chats.turns import Conversation, RenderedChat, kept
from kd_assets.sources.control_tokens import any_of, special_tokens_of
from kd_assets.sources.records import Message, Record

Turns = Literal["all", "last", "refuse"]


class ChatRenderer:
    """Renders chats with one tokenizer's chat template, or with the recipe's in its place."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        template_name: str | None = None,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        turns: Turns = "all",
    ) -> None:
        """`variables`, `tools`: of chats that bring none of their own. Raises RecipeError for a template that is not
        there, is none, or never looks at what the recipe would have it look at."""
        of_tokenizer = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        self._name = of_tokenizer if chat_template is None else "the recipe"
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._variables, self._turns = dict(variables or {}), turns
        self._tools = list(tools) if tools else None
        self.control_token = any_of(special_tokens_of(tokenizer))
        sources = _templates_of(tokenizer, of_tokenizer, chat_template, template_name)
        self.source = "\n".join(sources[use] for use in sorted(sources))
        """The text of its template; of two, one after the other."""
        self._templates = {use: self._compiled(source) for use, source in sources.items()}
        self._refuse_settings_without_use()

    def render(self, record: Record) -> list[RenderedChat]:
        """The documents of a chat: one, or one a turn where the template rewrites earlier turns.

        Raises BadRecordError, with the reason; FieldNotUnderstoodError for what the template never reads.
        """
        template, messages = self.prepared(record)
        form, chat = self._first_that_renders(record, template, messages)
        documents = self._documents(record, chat)
        n_unrendered = unrendered_messages(chat, [document.text for document in documents])
        if not form.emptied_null_content and not n_unrendered:
            return documents
        return [
            dataclasses.replace(
                document, emptied_null_content=form.emptied_null_content, unrendered_messages=n_unrendered
            )
            for document in documents
        ]

    def prepared(self, record: Record) -> tuple[ChatTemplate, list[Message]]:
        """The template for a record and the messages for it. Raises FieldNotUnderstoodError, before anything is
        rendered, where the record has what the template never reads."""
        tools = record.tools or self._tools
        template = self._templates.get("tool_use" if tools else "default") or self._templates["default"]
        beside = {"tools": record.tools, **record.variables}
        if unread := [name for name, v in beside.items() if v and name not in template.reads.variables]:
            raise FieldNotUnderstoodError(
                f"{record.where}: the chat has {', '.join(map(repr, unread))} beside its messages, and its chat "
                "template never reads that: documents made without it would not be what it means. Use a chat template "
                f"that reads it (chat_template), or leave it out knowingly: "
                f"ignore_fields: [{', '.join(unread)}] of source {record.source!r}"
            )
        return template, messages_for(record, template.reads)

    def _first_that_renders(
        self, record: Record, template: ChatTemplate, messages: list[Message]
    ) -> tuple[Form, Conversation]:
        """The messages in the first form that the template takes. Raises the error of the first form where none is."""
        refuse_media(messages, record.where)
        refused: BadRecordError | None = None
        without_calls: tuple[Form, Conversation] | None = None
        for form in self._forms(template, messages):
            chat = self._conversation(record, template, form.messages)
            try:
                text = chat.first(len(form.messages))
                if has_parts(form.messages) and (error := unhandled_part(form.messages, text, record.where)):
                    raise error
                if has_null_content(form.messages) and spells_null(chat, text):
                    raise BadRecordError(f"{record.where}: the chat template writes content that is null as a word")
            except BadRecordError as e:
                refused = refused or e
            else:
                if all(name in text for name in called_names(form.messages)):
                    return self._in_parts_if_needed(record, template, form, chat)
                without_calls = without_calls or (form, chat)
        if without_calls is not None:
            return without_calls
        if "text" in template.reads.names and not has_parts(messages):
            with contextlib.suppress(BadRecordError):
                form = Form(text_as_parts(messages), False)
                chat = self._conversation(record, template, form.messages)
                if not n_missing_texts(messages, chat.first(len(messages))):
                    return form, chat
        assert refused is not None
        raise refused

    def _in_parts_if_needed(
        self, record: Record, template: ChatTemplate, form: Form, chat: Conversation
    ) -> tuple[Form, Conversation]:
        """The same, with texts as parts where the template leaves texts out and writes all of such parts."""
        n = len(form.messages)
        if "text" not in template.reads.names or not n_missing_texts(form.messages, chat.first(n)):
            return form, chat
        in_parts = Form(text_as_parts(form.messages), form.emptied_null_content)
        other = self._conversation(record, template, in_parts.messages)
        text = other.first_or_none(n)
        return (form, chat) if text is None or n_missing_texts(form.messages, text) else (in_parts, other)

    def _forms(self, template: ChatTemplate, messages: list[Message]) -> Iterator[Form]:
        yield from forms(messages, template.reads)
        if has_parts(messages) and (joined := parts_as_text(messages)) is not None:
            yield from forms(joined, template.reads)

    def _conversation(self, record: Record, template: ChatTemplate, messages: Sequence[Message]) -> Conversation:
        tools = list(record.tools) if record.tools else self._tools
        return Conversation(
            template=template,
            messages=messages,
            variables={**({"tools": tools} if tools else {}), **record.variables},
            where=record.where,
            control_token=self.control_token,
        )

    def _documents(self, record: Record, chat: Conversation) -> list[RenderedChat]:
        text, n_prompt = chat.first(len(chat.messages)), record.n_prompt_messages
        if (spans := self._marked(record, chat, text)) is not None:
            return [RenderedChat(text=text, assistant_spans=spans)]
        turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i >= n_prompt]
        by_turn = [chat.turn_span(i, text) for i in turns]
        if all(span is not None for span in by_turn):
            return [RenderedChat(text=text, assistant_spans=[span for span in by_turn if span is not None])]
        if self._turns == "refuse":
            i = turns[by_turn.index(None)]
            raise BadRecordError(
                f"{record.where}: the chat template has no {{% generation %}} mark that can be followed, and renders "
                f"message {i} differently once others follow, so no rendering of the chat holds every turn as the "
                "model is asked for it: put {% generation %}...{% endgeneration %} around what the assistant says in "
                "the template, or learn each turn in a document of its own (turns: all), or only the last (turns: last)"
            )
        taken = turns[-1:] if self._turns == "last" else turns
        return [
            RenderedChat(text=turn, assistant_spans=[span], unlearned_turns=len(turns) - len(taken))
            for turn, span in map(chat.turn_document, taken)
        ]

    def _marked(self, record: Record, chat: Conversation, text: str) -> list[TextSpan] | None:
        """What the template marks, without the record's first messages that are not learned."""
        spans = chat.template.marked_spans(chat.messages, chat.variables, text, where=record.where)
        if spans is None or not record.n_prompt_messages:
            return spans
        before = chat.first_or_none(record.n_prompt_messages)
        start = None if before is None else kept(before, text, self.control_token)
        return None if start is None else [(max(start, begin), end) for begin, end in spans if end > start]

    def _compiled(self, source: str) -> ChatTemplate:
        return ChatTemplate(source, name=self._name, variables={**self._special_tokens, **self._variables})

    def _refuse_settings_without_use(self) -> None:
        given = [*self._variables, *(["tools"] if self._tools else [])]
        read = {name for template in self._templates.values() for name in template.reads.variables}
        if unused := [name for name in given if name not in read]:
            raise RecipeError(
                f"the recipe gives the chat template of {self._name} {', '.join(map(repr, unused))}, which it never "
                f"reads (it reads {', '.join(sorted(read))}): take it out of chat_template_kwargs or tools, or use a "
                "chat_template that reads it"
            )


def _templates_of(tokenizer: Any, name: str, chat_template: str | None, template_name: str | None) -> dict[str, str]:
    """`default` → the template of all chats; `tool_use` → that of chats with tools, where there is one."""
    if chat_template is not None:
        return {"default": chat_template}
    own = tokenizer.chat_template
    if not own:
        asked = "" if template_name is None else f" (the recipe asks for the one called {template_name!r})"
        raise RecipeError(
            f"{name} has no chat template{asked}, and records of the source become chats (messages, instructions): "
            "name a template's file with chat_template of the recipe, add a chat_template.jinja to the tokenizer's "
            "folder, or give texts instead"
        )
    several = own if isinstance(own, dict) else {"default": own}
    if template_name is None and "default" in several:
        return {use: several[use] for use in ("default", "tool_use") if use in several}
    if template_name in several:
        return {"default": several[template_name]}
    asked = "no chat_template_name is given" if template_name is None else f"none is called {template_name!r}"
    raise RecipeError(f"{name} has the chat templates {', '.join(sorted(several))}, and {asked}: name one of them")


def spells_null(chat: Conversation, text: str) -> bool:
    """Whether content that is null stands as a word in the text (Jinja writes None for it)."""
    emptied = [m if m.get("content") is not None else {**m, "content": ""} for m in chat.messages]
    try:
        empty = chat.render(emptied)
    except BadRecordError:  # an empty text may be what a template refuses
        return False
    return any(text.count(word) > empty.count(word) for word in ("None", "null"))


def unrendered_messages(chat: Conversation, texts: Sequence[str]) -> int:
    """How many messages call a tool that is not named in the texts, or have content that could be any other: the
    template does not write it."""
    n = 0
    for i, message in enumerate(chat.messages):
        if any(not any(name in text for text in texts) for name in called_names([message])):
            n += 1
            continue
        content = message.get("content")
        if not isinstance(content, str) or any(content.strip() in text for text in texts):
            continue
        other = {**message, "content": "Alpha is the first."}
        with contextlib.suppress(BadRecordError):
            n += chat.render([*chat.messages[:i], other, *chat.messages[i + 1 :]]) == chat.first(len(chat.messages))
    return n
