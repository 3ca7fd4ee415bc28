"""Where tokens lie in a text, also where the tokenizer does not say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kd_assets.errors import BadRecordError
from kd_assets.sources.token_offsets import SlowTokens, aligned
from kd_assets.sources.tokenise import DocumentTokeniser
from kd_assets_tests.sources.conftest import CORPUS, UNMARKED_TEMPLATE, SaveTokenizer, chat_record
from kd_assets_tests.sources.test_tokenise import LONG_CHAT, tokenizer_of


def byte_tokenizer(template: str) -> Any:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(eos_token="<|eot|>", extra_ids=0)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>", "additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import sentencepiece
    from transformers import GPTSw3Tokenizer

    folder: Path = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = GPTSw3Tokenizer(vocab_file=str(folder / "spiece.model"), bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|bos|>", "<|eot|>", "<|start|>"]})
    tokenizer.chat_template = UNMARKED_TEMPLATE.replace("{{ bos_token }}", "<|bos|>")
    return tokenizer


@pytest.mark.parametrize("answer", ["A mutable sequence.", "é 日本語 🙂", "  two  spaces\n\nand lines"])
def test_a_slow_tokenizer_of_bytes_learns_what_the_assistant_says(answer: str) -> None:
    tokenizer = byte_tokenizer(UNMARKED_TEMPLATE)
    assert not tokenizer.is_fast
    (outcome,) = DocumentTokeniser(tokenizer, max_length=999)([chat_record(("user", "hi"), ("assistant", answer))])
    assert isinstance(outcome, list)
    (document,) = outcome
    text = f"<|bos|><|start|>user\nhi<|eot|><|start|>assistant\n{answer}<|eot|>"
    assert document.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(document.input_ids[document.loss_mask].tolist()) == answer + "<|eot|>"


@pytest.mark.parametrize("answer", ["A mutable sequence.", "A list is é 日本 🙂", "two lines\nhere"])
def test_a_slow_tokenizer_of_pieces_learns_what_the_assistant_says(sentencepiece_tokenizer: Any, answer: str) -> None:
    tokenizer = sentencepiece_tokenizer
    assert not tokenizer.is_fast
    chat = chat_record(("user", "What is a list?"), ("assistant", answer), ("user", "And?"), ("assistant", "Yes."))
    (outcome,) = DocumentTokeniser(tokenizer, max_length=999)([chat])
    assert isinstance(outcome, list)
    (document,) = outcome
    said = tokenizer.decode(document.input_ids[document.loss_mask].tolist())
    assert "".join(said.split()) == "".join(f"{answer}<|eot|>Yes.<|eot|>".split())


def test_offsets_that_are_found_are_those_that_a_fast_tokenizer_says(save_tokenizer: SaveTokenizer) -> None:
    fast = tokenizer_of(save_tokenizer())
    for text in (
        "The import statement",
        "é 日本語 🙂 x",
        "<|start|>user\nhi<|eot|>",
        " ".join(m[1] for m in LONG_CHAT),
    ):
        encoded = fast(text, return_offsets_mapping=True, add_special_tokens=False)
        found = SlowTokens(fast).offsets(text, encoded["input_ids"])
        assert found is not None
        for (start, end), (a, b) in zip(encoded["offset_mapping"], found, strict=True):
            assert text[start:end].strip() == text[a:b].strip()


def test_pieces_that_do_not_spell_the_text_are_placed_nowhere() -> None:
    assert aligned("ab c", [b"ab", b" c"]) == [(0, 2), (2, 4)]
    assert aligned("é", ["é".encode()[:1], "é".encode()[1:]]) == [(0, 1), (0, 1)]
    assert aligned("Ab", [b"ab"]) is None
    assert aligned("ab", [b"a"]) is None
    assert aligned("a", [b"a", b"b"]) is None
    assert aligned("", []) == []


def test_where_a_slow_tokenizer_cannot_tell_the_record_is_bad_and_says_what_to_do(sentencepiece_tokenizer: Any) -> None:
    class Unsure(SlowTokens):
        def in_spans(self, *_: Any) -> None:
            return None

    tokenise = DocumentTokeniser(sentencepiece_tokenizer, max_length=99)
    tokenise._slow = Unsure(sentencepiece_tokenizer)
    (outcome,) = tokenise([chat_record(("user", "hi"), ("assistant", "yes"))])
    assert isinstance(outcome, BadRecordError)
    assert "save the tokenizer with a tokenizer.json" in str(outcome)
