"""The short way to token ids gives what the tokenizer's own call gives, for every kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CodeLlamaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from kd_assets.library_internals import encoder_of
from kd_assets.sources.batch_encoding import BatchEncoder
from kd_assets.sources.token_offsets import tokens_in_spans
from kd_assets_tests.sources.conftest import CORPUS

SPECIAL = ["<unk>", "<s>", "</s>"]
PIECES = [
    "Hé",
    " ",
    "  ",
    "\n",
    "🙂👩‍👩‍👧",
    "日本語",
    "q\u0323\u0307",
    "\u1e9b\u0323",
    "e\u0301",
    "\u200b",
    "a",
    "the ",
    "</s>",
    "ไทย",
    "\t",
]


def byte_level(*, prefix_space: bool = False, trim_offsets: bool = True, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *PIECES], trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def that_cuts_and_pads() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40, pad_id=1)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, spaces before texts": lambda: byte_level(prefix_space=True),
    "byte level, whole offsets": lambda: byte_level(trim_offsets=False),
    "byte level, composed characters": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte level, decomposed characters": lambda: byte_level(normalizer=normalizers.NFKD()),
    "metaspace": metaspace,
    "word pieces": word_pieces,
    "cuts and pads": that_cuts_and_pads,
}


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_and_what_spans_hold_are_those_of_the_tokenizers_own_call(kind: str) -> None:
    made, choice = KINDS[kind](), random.Random(kind)
    own, encoder = fast(made), BatchEncoder(fast(Tokenizer.from_str(made.to_str())))
    texts = ["", *("".join(choice.choices([*PIECES, *CORPUS], k=choice.randint(1, 12))) for _ in range(150))]
    for as_text in (False, True):
        expected = own(texts, split_special_tokens=as_text, verbose=False)["input_ids"]
        assert encoder.ids(texts, control_tokens_as_text=as_text) == expected
    spans = []
    for text in texts:
        ends = sorted(choice.choices(range(len(text) + 1), k=4))
        spans.append([(ends[0], ends[1]), (ends[2], ends[3])])
    called = own(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for (ids, mask), of_call, offsets, of_text in zip(
        encoder.ids_in_spans(texts, spans), called["input_ids"], called["offset_mapping"], spans, strict=True
    ):
        assert ids == of_call
        np.testing.assert_array_equal(mask, tokens_in_spans(offsets, of_text))


def test_the_short_way_is_taken_of_the_usual_class_and_its_kin_alone() -> None:
    usual = fast(byte_level())
    assert encoder_of(usual) is usual.backend_tokenizer
    assert encoder_of(LlamaTokenizer()) is not None
    assert encoder_of(CodeLlamaTokenizer()) is None  # its call has a way of its own with infilling

    class Lower(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *arguments: Any, **options: Any) -> Any:
            return super()._encode_plus([t.lower() for t in text], *arguments, **options)

    lower = Lower(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    assert encoder_of(lower) is None
    assert BatchEncoder(lower).ids(["THE"]) == BatchEncoder(usual).ids(["the"])


def test_no_texts_are_no_tokens() -> None:
    encoder = BatchEncoder(fast(byte_level()))
    assert encoder.ids([]) == []
    assert encoder.ids_in_spans([], []) == []
