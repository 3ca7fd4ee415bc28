"""The demo's tokenizer, trained on its corpus, and the corpus as its tokens.

Used by `kd_assets.demo.teacher`; needs tokenizers and transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_assets.demo.corpus import CHATS_FILE, DOCUMENTS_FILE, passage_of
from kd_assets.errors import MissingInputError

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", END)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The generation markers tell `apply_chat_template(return_assistant_tokens_mask=True)` what the assistant wrote."""


def corpus_texts(corpus: Path) -> list[str]:
    """Every text and message of the corpus, in its order."""
    texts = [record["text"] for record in _corpus_records(corpus, DOCUMENTS_FILE)]
    chats = _corpus_records(corpus, CHATS_FILE)
    return texts + [message["content"] for chat in chats for message in chat["messages"]]


def train_tokenizer(texts: Sequence[str], *, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) as transformers wraps it, with chat template.

    Plain texts get the bos token in front, as Llama's do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def split_documents(corpus: Path, tokenizer: Any, *, held_out_one_in: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the training and of the held-out documents, each ended by eos. The split is by passage."""
    texts = [(record["id"], record["text"]) for record in _corpus_records(corpus, DOCUMENTS_FILE)]
    tokens = [(i, tokenizer(text)["input_ids"]) for i, text in texts]
    for record in _corpus_records(corpus, CHATS_FILE):
        text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        tokens.append((record["id"], tokenizer(text, add_special_tokens=False)["input_ids"]))
    split: tuple[list[list[int]], list[list[int]]] = ([], [])
    for document_id, ids in tokens:
        split[is_held_out(document_id, one_in=held_out_one_in)].append([*ids, tokenizer.eos_token_id])
    return split


def is_held_out(document_id: str, *, one_in: int) -> bool:
    """Whether a document or chat is kept from training: one passage in so many is, with all that was made from it."""
    digest = hashlib.sha256(passage_of(document_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") % one_in == 0


def corpus_bytes(corpus: Path, name: str) -> bytes:
    try:
        return (corpus / name).read_bytes()
    except OSError as e:
        raise MissingInputError(
            f"no corpus at {corpus / name} ({e.strerror}): write it with python -m kd_assets.demo.corpus --out {corpus}"
        ) from e


def _corpus_records(corpus: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in corpus_bytes(corpus, name).splitlines()]
