"""Records in, token ids and loss masks out: what the teacher reads and what a student learns to predict.

Runs in jobs only (it loads a tokenizer); the planner never imports it. The invariant: a document's tokens depend on the
record, the tokenizer's files and `max_length`, on nothing else: not on its batch, not on the day.

Choices, all of them what a user of Hugging Face's own calls expects:
- A text is tokenised as `tokenizer(text)` does it, with the special tokens that the tokenizer adds; every token is
  learned. A chat is rendered by the tokenizer's chat template, which writes its own special tokens; only what the
  assistant says is learned.
- Control tokens spelled out in a text or message (`<|eot_id|>`) become those tokens, as in training on the same data:
  texts that were rendered from a chat beforehand depend on it, and get no second BOS or EOS. Since it also lets a
  document pose as another speaker, such documents are counted, never passed over in silence.
- How a chat becomes text, and what of it the assistant says, is in `chats`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from kd_assets.sources.chats import ChatRenderer, RenderedChat, TextSpan
from kd_assets.sources.records import Record
from kd_assets.sources.tokenizer_proof import prove


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
    has_own_ends: bool = False
    """Its text has the BOS or EOS that the tokenizer would have added: it was rendered before, and has each once."""


class DocumentTokeniser:
    """Tokenises batches of records with one tokenizer (a fast one of transformers, already loaded)."""

    def __init__(self, tokenizer: Any, *, max_length: int, n_token_ids: int | None = None) -> None:
        """`n_token_ids`: how many the teacher has embeddings for, where that is known."""
        if max_length < 1:
            raise RecipeError(f"max_length is {max_length}: a document keeps at least one token")
        self._tokenizer = tokenizer
        self._max_length, self._n_token_ids = max_length, n_token_ids
        self._n_added = int(tokenizer.num_special_tokens_to_add(pair=False))
        added = tokenizer("", verbose=False)["input_ids"]
        self._adds_bos = tokenizer.bos_token_id is not None and added[:1] == [tokenizer.bos_token_id]
        self._adds_eos = tokenizer.eos_token_id is not None and added[-1:] == [tokenizer.eos_token_id]
        special = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len)
        self._control_token = re.compile("|".join(map(re.escape, reversed(special))) or "(?!)")
        self._chat: ChatRenderer | None = None

    def __call__(self, records: Sequence[Record]) -> list[TokenisedDocument | BadRecordError]:
        """One outcome for each record, in order. Raises RecipeError when chats cannot be rendered at all."""
        texts = self._tokenise_texts([record for record in records if record.messages is None])
        chats = self._tokenise_chats([record for record in records if record.messages is not None])
        outcomes = [next(texts if record.messages is None else chats) for record in records]
        return [self._within_the_embeddings(outcome) for outcome in outcomes]

    def chat_template(self, name: str | None = None) -> str | None:
        """The text of the tokenizer's chat template, of several the one of this name; None where it has none."""
        try:
            template: str = self._tokenizer.get_chat_template(name)
        except ValueError:
            return None
        return template

    def _within_the_embeddings(self, outcome: TokenisedDocument | BadRecordError) -> TokenisedDocument | BadRecordError:
        """An error instead of a document with a token that the teacher has no embedding for (a token that was added to
        a tokenizer, and no row to the model)."""
        if isinstance(outcome, BadRecordError) or self._n_token_ids is None:
            return outcome
        beyond = outcome.input_ids[outcome.input_ids >= self._n_token_ids]
        if not len(beyond):
            return outcome
        token = self._tokenizer.convert_ids_to_tokens(int(beyond[0]))
        return BadRecordError(
            f"{outcome.record.where}: {token!r} is token {int(beyond[0])}, and the teacher has embeddings for ids 0 to "
            f"{self._n_token_ids - 1} (vocab_size in its config.json): take it out of the record, or name a teacher "
            "whose embeddings were resized"
        )

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
            once = self._with_ends_once(ids)
            kept = once if len(ids) > self._n_added else []  # a document of a lone BOS teaches nothing
            yield self._document(record, kept, np.ones(len(kept), dtype=np.bool_), has_own_ends=len(once) < len(ids))

    def _with_ends_once(self, ids: list[int]) -> list[int]:
        """The tokens of a text without the BOS and EOS that the tokenizer added to those that the text has itself."""
        if self._adds_bos and ids[:2] == [self._tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        if self._adds_eos and ids[-2:] == [self._tokenizer.eos_token_id] * 2:
            ids = ids[:-1]
        return ids

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

    def _document(
        self, record: Record, ids: Sequence[int], loss_mask: npt.NDArray[np.bool_], *, has_own_ends: bool = False
    ) -> TokenisedDocument:
        spoken = [record.text or ""] if record.messages is None else [m["content"] for m in record.messages]
        return TokenisedDocument(
            record=record,
            input_ids=np.asarray(ids[: self._max_length], dtype=np.uint32),
            loss_mask=loss_mask[: self._max_length],
            truncated=len(ids) > self._max_length,
            spells_control_tokens=any(self._control_token.search(text) for text in spoken),
            has_own_ends=has_own_ends,
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
    return DocumentTokeniser(tokenizer, max_length=params.max_length, n_token_ids=vocabulary_size(folder))


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
