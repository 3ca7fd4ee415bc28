"""Records in, token ids and loss masks out: what the teacher reads and what a student learns to predict.

Runs in jobs only (it loads a tokenizer); the planner never imports it. The invariant: a document's tokens depend on the
record, the tokenizer's files and the recipe's parameters, on nothing else: not on its batch, not on the day.

Choices, all of them what a user of Hugging Face's own calls expects:
- A text is tokenised as `tokenizer(text)` does it, with the special tokens that the tokenizer adds; every token is
  learned, but for a prompt that the record names. A chat is rendered by a chat template, which writes its own special
  tokens: none is added to them, and a chat whose template writes no BOS though the tokenizer adds one is counted.
- Control tokens spelled out in a message (`<|eot_id|>`) become those tokens, as in training on the same data; in a text
  they do so where the record says `tokens`: texts that were rendered from a chat beforehand depend on it, and get no
  second BOS or EOS. Since it also lets a document pose as another speaker, such documents are counted either way.
- How a chat becomes text, and what of it the assistant says, is in `chats`; what is too long, in `windows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.contract import ShardsParams
from kd_assets.durable import storage_error
from kd_assets.errors import BadRecordError, InputError, RecipeError, TeacherChangedError
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.model_files.folder import model_folder
from kd_assets.model_files.reading import read_json, reads_folder
from kd_assets.sources.batch_encoding import BatchEncoder
from kd_assets.sources.chats import ChatRenderer, RenderedChat, TextSpan
from kd_assets.sources.chats.messages import texts_in
from kd_assets.sources.control_tokens import all_special, any_of, control_tokens_of
from kd_assets.sources.records import Record
from kd_assets.sources.token_offsets import SlowTokens, tokens_in_spans
from kd_assets.sources.tokenised import Outcome, TokenisedDocument
from kd_assets.sources.tokenizer_proof import prove
from kd_assets.sources.windows import OnLong, Windows


class DocumentTokeniser:
    """Tokenises batches of records with one tokenizer of transformers, already loaded."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        n_token_ids: int | None = None,
        on_long: OnLong = "truncate",
        overlap: int = 0,
        make_renderer: Callable[[], ChatRenderer] | None = None,
    ) -> None:
        """`n_token_ids`: how many the teacher has embeddings for, where that is known. `make_renderer`: called once
        there is a chat, since texts need no template."""
        self._windows = Windows(max_length=max_length, on_long=on_long, overlap=overlap)
        self._tokenizer, self._n_token_ids = tokenizer, n_token_ids
        self._n_added = int(tokenizer.num_special_tokens_to_add(pair=False))
        added = tokenizer("", verbose=False)["input_ids"]
        self._adds_bos = tokenizer.bos_token_id is not None and added[:1] == [tokenizer.bos_token_id]
        self._adds_eos = tokenizer.eos_token_id is not None and added[-1:] == [tokenizer.eos_token_id]
        self._slow = None if tokenizer.is_fast else SlowTokens(tokenizer)
        self._make_renderer = make_renderer or (lambda: ChatRenderer(tokenizer))
        self._chat: ChatRenderer | None = None
        self._control = control_tokens_of(tokenizer, self.chat_template)
        self._control_token = any_of(self._control.values())
        self._control_ids = np.array(sorted(self._control), dtype=np.int64)
        self._taking_text: Any = None
        self._encoders: dict[bool, BatchEncoder] = {}
        """By whether they take control tokens as text."""

    def __call__(self, records: Sequence[Record]) -> list[Outcome]:
        """One outcome for each record, in order.

        Raises RecipeError when chats cannot be rendered at all, and FieldNotUnderstoodError as `refuse_unread` does.
        """
        texts = self._tokenise_texts([record for record in records if record.messages is None])
        chats = self._tokenise_chats([record for record in records if record.messages is not None])
        return [self._within_the_embeddings(next(texts if r.messages is None else chats)) for r in records]

    @property
    def chat_template(self) -> str | None:
        """The text of the template that chats are rendered by; None where there is none."""
        try:
            return self._renderer().source
        except RecipeError:
            return None

    def refuse_unread(self, record: Record) -> None:
        """Raise FieldNotUnderstoodError where a chat has what its template never reads, without rendering it."""
        if record.messages is not None:
            self._renderer().prepared(record)

    def _renderer(self) -> ChatRenderer:
        if self._chat is None:
            self._chat = self._make_renderer()
        return self._chat

    def _within_the_embeddings(self, outcome: Outcome) -> Outcome:
        """An error instead of documents with a token that the teacher has no embedding for (a token that was added to
        a tokenizer, and no row to the model)."""
        if isinstance(outcome, BadRecordError) or self._n_token_ids is None:
            return outcome
        for document in outcome:
            beyond = document.input_ids[document.input_ids >= self._n_token_ids]
            if len(beyond):
                token = self._tokenizer.convert_ids_to_tokens(int(beyond[0]))
                return BadRecordError(
                    f"{document.record.where}: {token!r} is token {int(beyond[0])}, and the teacher has "
                    f"embeddings for ids 0 to {self._n_token_ids - 1} (vocab_size in its config.json): take it out of "
                    "the record, or name a teacher whose embeddings were resized"
                )
        return outcome

    def _tokenise_texts(self, records: Sequence[Record]) -> Iterator[Outcome]:
        spelling = [self._control_token.search(record.text or "") is not None for record in records]
        as_text = [spells and record.control_tokens == "text" for record, spells in zip(records, spelling, strict=True)]
        encoded = {
            text: iter(
                self._encoder(as_text=text).ids(
                    [record.text or "" for record, is_text in zip(records, as_text, strict=True) if is_text == text],
                    control_tokens_as_text=text,
                )
            )
            for text in set(as_text)
        }
        for record, spells, text in zip(records, spelling, as_text, strict=True):
            yield self._text_documents(record, next(encoded[text]), spells=spells, as_text=text)

    def _encoder(self, *, as_text: bool) -> BatchEncoder:
        if as_text not in self._encoders:
            self._encoders[as_text] = BatchEncoder(self._tokenizer_for_text() if as_text else self._tokenizer)
        return self._encoders[as_text]

    def _tokenizer_for_text(self) -> Any:
        """A tokenizer that takes every control token as text when it is told to split special tokens: also those that
        their model's tokenizer does not call special."""
        if self._taking_text is None:
            self._taking_text = (
                self._tokenizer if self._slow is not None else all_special(self._tokenizer, self._control)
            )
        return self._taking_text

    def _text_documents(self, record: Record, ids: list[int], *, spells: bool, as_text: bool) -> Outcome:
        once = self._with_ends_once(ids)
        kept = once if len(ids) > self._n_added else []  # a document of a lone BOS teaches nothing
        if as_text and self._n_control(kept) > self._n_control(self._tokenizer("", verbose=False)["input_ids"]):
            return BadRecordError(
                f"{record.where}: the text spells out control tokens, and this tokenizer cannot take them as text: "
                "mend the text, or have them taken as those tokens (control_tokens: tokens)"
            )
        learned = self._after_the_prompt(record, kept, as_text=as_text)
        if isinstance(learned, BadRecordError):
            return learned
        document = TokenisedDocument(
            record=record,
            input_ids=np.asarray(kept, dtype=np.uint32),
            loss_mask=learned,
            truncated=False,
            spells_control_tokens=spells,
            control_tokens_as_text=as_text,
            has_own_ends=len(once) < len(ids),
        )
        return self._windows.of(document)

    def _n_control(self, ids: Sequence[int]) -> int:
        return int(np.isin(np.asarray(ids, dtype=np.int64), self._control_ids).sum())

    def _after_the_prompt(
        self, record: Record, ids: Sequence[int], *, as_text: bool
    ) -> npt.NDArray[np.bool_] | BadRecordError:
        """What is learned of a text's tokens: all that hold a character after its prompt, and an EOS that was added."""
        if not record.n_prompt_characters or not ids:
            return np.ones(len(ids), dtype=np.bool_)
        text = record.text or ""
        split = {"split_special_tokens": True} if as_text else {}
        tokenizer = self._tokenizer_for_text() if as_text else self._tokenizer
        bare = tokenizer(text, add_special_tokens=False, verbose=False, **split)["input_ids"]
        n_before = next(
            (i for i in range(len(ids) - len(bare) + 1) if list(ids[i : i + len(bare)]) == list(bare)), None
        )
        mask = self._in_spans(tokenizer, text, bare, [(record.n_prompt_characters, len(text))], **split)
        if n_before is None or mask is None:
            return cannot_tell(record)
        n_after = len(ids) - n_before - len(bare)
        return np.concatenate([np.zeros(n_before, dtype=np.bool_), mask, np.ones(n_after, dtype=np.bool_)])

    def _in_spans(
        self, tokenizer: Any, text: str, ids: Sequence[int], spans: Sequence[TextSpan], **options: Any
    ) -> npt.NDArray[np.bool_] | None:
        if self._slow is not None:
            return self._slow.in_spans(text, ids, spans)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
        return tokens_in_spans(encoded["offset_mapping"], spans)

    def _with_ends_once(self, ids: list[int]) -> list[int]:
        """The tokens of a text without the BOS and EOS that the tokenizer added to those that the text has itself."""
        if self._adds_bos and ids[:2] == [self._tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        if self._adds_eos and ids[-2:] == [self._tokenizer.eos_token_id] * 2:
            ids = ids[:-1]
        return ids

    def _tokenise_chats(self, records: Sequence[Record]) -> Iterator[Outcome]:
        rendered: list[list[RenderedChat] | BadRecordError] = []
        for record in records:
            try:
                rendered.append(self._renderer().render(record))
            except BadRecordError as e:
                rendered.append(e)
        chats = [chat for found in rendered if not isinstance(found, BadRecordError) for chat in found]
        encoded = iter(self._encode_chats(chats))
        for record, found in zip(records, rendered, strict=True):
            if isinstance(found, BadRecordError):
                yield found
            else:
                yield self._chat_documents(record, [(chat, *next(encoded)) for chat in found])

    def _chat_documents(
        self, record: Record, chats: Sequence[tuple[RenderedChat, list[int], npt.NDArray[np.bool_] | None]]
    ) -> Outcome:
        spells = any(self._control_token.search(text) for text in texts_in(record.messages))
        documents = []
        for n, (chat, ids, mask) in enumerate(chats, 1):
            if mask is None:
                return cannot_tell(record)
            # A message that begins with a BOS of its own, right after the template's.
            second_bos = int(self._adds_bos and ids[:2] == [self._tokenizer.bos_token_id] * 2)
            document = TokenisedDocument(
                record=record,
                name_in_record=f"#{n}" if len(chats) > 1 else "",
                input_ids=np.asarray(ids[second_bos:], dtype=np.uint32),
                loss_mask=mask[second_bos:],
                truncated=False,
                spells_control_tokens=spells,
                has_own_ends=bool(second_bos),
                lacks_bos=self._adds_bos and self._tokenizer.bos_token_id not in ids,
                chat=chat,
            )
            documents += self._windows.of(document)
        return documents

    def _encode_chats(self, chats: Sequence[RenderedChat]) -> list[tuple[list[int], npt.NDArray[np.bool_] | None]]:
        """Ids and learned tokens of each rendered chat; None for the latter where a slow tokenizer cannot tell."""
        encoder, texts = self._encoder(as_text=False), [chat.text for chat in chats]
        if self._slow is None:
            return list(encoder.ids_in_spans(texts, [chat.assistant_spans for chat in chats]))
        return [
            (ids, self._slow.in_spans(chat.text, ids, chat.assistant_spans))
            for chat, ids in zip(chats, encoder.ids(texts, add_special_tokens=False), strict=True)
        ]


def cannot_tell(record: Record) -> BadRecordError:
    return BadRecordError(
        f"{record.where}: this tokenizer does not say where its tokens lie in a text, and they do not spell this one, "
        "so what is learned cannot be told from the rest: save the tokenizer with a tokenizer.json"
    )


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
    prove(tokenizer, folder)

    def make_renderer() -> ChatRenderer:
        return ChatRenderer(
            tokenizer,
            chat_template=params.chat_template,
            template_name=params.chat_template_name,
            variables=params.chat_template_kwargs,
            tools=params.tools,
            turns=params.turns,
        )

    return DocumentTokeniser(
        tokenizer,
        max_length=params.max_length,
        n_token_ids=vocabulary_size(folder),
        on_long=params.on_long,
        overlap=params.overlap,
        make_renderer=make_renderer,
    )


@reads_folder
def vocabulary_size(folder: Path) -> int | None:
    """Of the model beside a tokenizer, by its configuration, whose text part may be nested; None: it says none."""
    if not (folder / "config.json").exists():
        return None
    config = read_json(folder / "config.json", "it says how many embeddings the teacher has")
    for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
        if isinstance(part, dict) and isinstance(size := part.get("vocab_size"), int) and size > 0:
            return size
    return None
