"""Records in, token ids and loss masks out: what the teacher reads and what a student learns to predict.

Runs in jobs only (it loads a tokenizer); the planner never imports it. The invariant: a document's tokens depend on the
record, the tokenizer's files and `max_length`, on nothing else: not on its batch, not on the day.

Choices, all of them what a user of Hugging Face's own calls expects:
- A text is tokenised as `tokenizer(text)` does it, with the special tokens that the tokenizer adds; every token is
  learned. A chat is rendered by the tokenizer's chat template, which writes its own special tokens; only what the
  assistant says is learned.
- Control tokens spelled out in a text or message (`<|eot_id|>`) become those tokens, as in training on the same data:
  texts that were rendered from a chat beforehand depend on it. Since it also lets a document pose as another speaker,
  such documents are counted, never passed over in silence.
- What the assistant says is what the template marks with `{% generation %}`. Without that mark it is what an assistant
  message adds to the rendering of the messages before it with the generation prompt; where a template rewrites earlier
  turns (drops their reasoning, say) there is no such prefix, and the chat is refused instead of being masked wrongly.
- A template that asks for today's date gets `TEMPLATE_DATE`, so that a shard made tomorrow is the same shard.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kd_assets.contract import ShardsParams
from kd_assets.durable import storage_error
from kd_assets.errors import BadRecordError, InputError, RecipeError, TeacherChangedError
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.model_files.folder import model_folder
from kd_assets.sources.records import Record

TEMPLATE_DATE = {
    **{"%d": "26", "%-d": "26", "%e": "26", "%j": "208", "%A": "Friday", "%a": "Fri"},
    **{"%m": "07", "%-m": "7", "%B": "July", "%b": "Jul", "%Y": "2024", "%y": "24", "%F": "2024-07-26"},
    **{"%H": "00", "%M": "00", "%S": "00", "%T": "00:00:00"},
}
"""What strftime gives for 26 July 2024, the date that Llama 3.1's template falls back on."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

TextSpan = tuple[int, int]
"""Characters `start` to `end` - 1 of a rendered chat."""


class RenderedChat(NamedTuple):
    """A chat as the tokenizer will see it."""

    text: str
    assistant_spans: Sequence[TextSpan]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenisedDocument:
    """A record's tokens, L of them."""

    record: Record
    input_ids: npt.NDArray[np.uint32]
    """uint32 [L]; L = 0 where the record holds nothing but what the tokenizer adds by itself."""
    loss_mask: npt.NDArray[np.bool_]
    """bool [L]."""
    truncated: bool
    """Tokens after `max_length` were cut off."""
    spells_control_tokens: bool
    """Its text or messages spell out control tokens, which were taken as such."""


class DocumentTokeniser:
    """Tokenises batches of records with one tokenizer (a fast one of transformers, already loaded)."""

    def __init__(self, tokenizer: Any, *, max_length: int) -> None:
        if max_length < 1:
            raise RecipeError(f"max_length is {max_length}: a document keeps at least one token")
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._n_added = int(tokenizer.num_special_tokens_to_add(pair=False))
        special = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len)
        self._control_token = re.compile("|".join(map(re.escape, reversed(special))) or "(?!)")
        self._chat: ChatRenderer | None = None

    def __call__(self, records: Sequence[Record]) -> list[TokenisedDocument | BadRecordError]:
        """One outcome for each record, in order. Raises RecipeError when chats cannot be rendered at all."""
        texts = self._tokenise_texts([record for record in records if record.messages is None])
        chats = self._tokenise_chats([record for record in records if record.messages is not None])
        return [next(texts if record.messages is None else chats) for record in records]

    def _tokenise_texts(self, records: Sequence[Record]) -> Iterator[TokenisedDocument | BadRecordError]:
        if not records:
            return
        encoded = self._tokenizer(
            [record.text for record in records],
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for record, ids in zip(records, encoded["input_ids"], strict=True):
            if len(ids) <= self._n_added:
                ids = []  # noqa: PLW2901 - a document of a lone BOS teaches nothing
            yield self._document(record, ids, np.ones(len(ids), dtype=np.bool_))

    def _tokenise_chats(self, records: Sequence[Record]) -> Iterator[TokenisedDocument | BadRecordError]:
        if not records:
            return
        if self._chat is None:
            self._chat = ChatRenderer(self._tokenizer)
        rendered: list[RenderedChat | BadRecordError] = []
        for record in records:
            try:
                rendered.append(self._chat.render(record))
            except BadRecordError as e:
                rendered.append(e)
        encoded = self._encode_chats([chat.text for chat in rendered if not isinstance(chat, BadRecordError)])
        for record, chat in zip(records, rendered, strict=True):
            if isinstance(chat, BadRecordError):
                yield chat
            else:
                ids, offsets = next(encoded)
                yield self._document(record, ids, tokens_in_spans(offsets, chat.assistant_spans))

    def _encode_chats(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[TextSpan]]]:
        """Ids and offsets of each rendered chat."""
        if not texts:
            return iter(())
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,  # the template has written them
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)

    def _document(self, record: Record, ids: Sequence[int], loss_mask: npt.NDArray[np.bool_]) -> TokenisedDocument:
        spoken = [record.text or ""] if record.messages is None else [m.content for m in record.messages]
        return TokenisedDocument(
            record=record,
            input_ids=np.asarray(ids[: self._max_length], dtype=np.uint32),
            loss_mask=loss_mask[: self._max_length],
            truncated=len(ids) > self._max_length,
            spells_control_tokens=any(self._control_token.search(text) for text in spoken),
        )


class ChatRenderer:
    """Chats as text by a tokenizer's chat template, with the spans that the assistant says."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

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
        self._marks_generation = _GENERATION.search(template) is not None
        self._template = with_fixed_date(template)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._render_jinja: Callable[..., tuple[list[str], list[list[TextSpan]]]] = render_jinja_template

    def render(self, record: Record) -> RenderedChat:
        """The chat as text, with what the assistant says. Raises BadRecordError, with the reason."""
        assert record.messages is not None
        messages = [message._asdict() for message in record.messages]
        chat = self._render(record, messages, spans=self._marks_generation)
        return (
            chat if self._marks_generation else RenderedChat(chat.text, self._prefix_spans(record, messages, chat.text))
        )

    def _prefix_spans(self, record: Record, messages: list[dict[str, str]], text: str) -> list[TextSpan]:
        """What each assistant message adds to the rendering of those before it."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(record, messages[:i], add_generation_prompt=True).text
            after = self._render(record, messages[: i + 1]).text
            if not (text.startswith(after) and after.startswith(before)):
                raise BadRecordError(
                    f"{record.where}: the chat template has no {{% generation %}} mark and renders message {i} "
                    "differently once others follow, so what the assistant says cannot be told from the rest: put "
                    "{% generation %}...{% endgeneration %} around it in the template"
                )
            spans.append((len(before), len(after)))
        return spans

    def _render(
        self,
        record: Record,
        messages: list[dict[str, str]],
        *,
        spans: bool = False,
        add_generation_prompt: bool = False,
    ) -> RenderedChat:
        from jinja2 import TemplateError

        try:
            texts, all_spans = self._render_jinja(
                conversations=[messages],
                chat_template=self._template,
                return_assistant_tokens_mask=spans,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            # A template is a program: it raises on purpose ("roles must alternate") and by mistake.
            raise BadRecordError(f"{record.where}: the chat template refuses the messages: {e}") from e
        return RenderedChat(texts[0], all_spans[0] if spans else ())


def load_tokeniser(params: ShardsParams) -> DocumentTokeniser:
    """The tokenizer of the job, from local files. Raises TeacherChangedError when it is not the one planned with.

    Also MissingInputError and InputError, when it is not there or cannot be loaded, and StorageUnavailableError.
    """
    folder = model_folder(params.tokenizer, params.revision)
    found = tokenizer_fingerprint(folder, None)
    if found != params.tokenizer_fingerprint:
        raise TeacherChangedError(
            f"the tokenizer in {folder} has fingerprint {found[:16]}, the job was planned with "
            f"{params.tokenizer_fingerprint[:16]}: materialize shards_manifest again to plan with what is there now"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # the tokenizers library raises bare Exception
        if isinstance(e, OSError) and e.errno is not None:
            raise storage_error(e, folder, "read") from e
        if "trust_remote_code" in str(e):
            raise InputError(
                f"the tokenizer in {folder} needs Python code that comes with it, which never runs here "
                "(teacher.trust_remote_code is for the model alone): name a model with a tokenizer.json that "
                "transformers loads by itself"
            ) from e
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {e}") from e
    return DocumentTokeniser(tokenizer, max_length=params.max_length)


def tokens_in_spans(offsets: Sequence[TextSpan], spans: Sequence[TextSpan]) -> npt.NDArray[np.bool_]:
    """bool [L]: which of L tokens, at these characters, hold a character of one of the spans.

    Byte-level tokenizers leave spaces out of a token's offsets, so a token of spaces alone is empty at the character
    after it; it counts as holding the character before that.
    """
    start_L, end_L = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    start_L = start_L - (start_L == end_L)
    mask_L = np.zeros(len(start_L), dtype=np.bool_)
    for start, end in spans:
        mask_L |= (start_L < end) & (end_L > start)
    return mask_L


def with_fixed_date(template: str) -> str:
    """The template with `strftime_now` bound to `TEMPLATE_DATE`; as it is where it asks for no date."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f"|replace({directive!r}, {value!r})" for directive, value in TEMPLATE_DATE.items())
    # The newline ends the macro's line (Jinja trims it), so that the template still begins at the start of a line.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"
