"""A loaded tokenizer is proved to do what its own files say, or refused with both answers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from kd_assets.errors import InputError, MissingInputError
from kd_assets.sources.tokenizer_proof import PROBES, own_encoding, prove

TEXTS = ["in 2023 the value 650841823 fox and a quick brown fox, 2023 2024 650841823"] * 20


def save(folder: Path, tokenizer: Tokenizer, *, model_type: str = "llama", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def byte_level() -> Tokenizer:
    """Byte-level BPE whose merges know whole numbers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def with_split_digits() -> Tokenizer:
    tokenizer = byte_level()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def loaded(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("tokenizer", [byte_level, with_split_digits])
def test_a_tokenizer_that_does_what_its_tokenizer_json_says_is_proved(tmp_path: Path, tokenizer: Any) -> None:
    folder = save(tmp_path / "own", tokenizer(), tokenizer_class="TokenizersBackend", model_type="mistral")
    prove(loaded(folder), folder)


def test_a_class_that_splits_digits_otherwise_is_refused_with_both_answers(tmp_path: Path) -> None:
    folder = save(tmp_path / "wrong", with_split_digits(), tokenizer_class="GPT2Tokenizer")
    with pytest.raises(InputError, match=r"tokenizer\.json itself makes \d+") as refusal:
        prove(loaded(folder), folder)
    assert "GPT2Tokenizer of transformers makes" in str(refusal.value)
    assert "tokenizer_class" in str(refusal.value)


def test_a_class_that_overrules_the_one_that_the_folder_asks_for_has_another_remedy(tmp_path: Path) -> None:
    folder = save(tmp_path / "own", byte_level(), tokenizer_class="TokenizersBackend", model_type="qwen2")
    with pytest.raises(
        InputError, match="asks for TokenizersBackend, and transformers takes Qwen2Tokenizer"
    ) as refusal:
        prove(loaded(folder), folder)
    assert "mend them" not in str(refusal.value)
    loaded(folder).save_pretrained(folder)
    prove(loaded(folder), folder)  # the remedy that is named


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t, "normalizer", normalizers.Replace("\n\n", "\n")),
        lambda t: t.add_special_tokens(["<|turn|>"]),
    ],
    ids=["case", "first space", "spaces", "unicode", "newlines", "control token"],
)
def test_any_difference_of_the_pipelines_is_seen(tmp_path: Path, change: Any) -> None:
    folder = save(tmp_path / "loaded", byte_level(), tokenizer_class="TokenizersBackend", model_type="mistral")
    tokenizer = loaded(folder)
    other = byte_level()
    change(other)
    save(folder, other)
    with pytest.raises(InputError, match="is not what its own tokenizer"):
        prove(tokenizer, folder)


def test_truncation_and_padding_in_tokenizer_json_are_no_difference(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    folder = save(tmp_path / "own", tokenizer, tokenizer_class="TokenizersBackend", model_type="mistral")
    prove(loaded(folder), folder)


def test_a_sentencepiece_model_is_proved_by_its_own_library(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, hard_vocab_limit=False,
        byte_fallback=True, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    name, encode, _ = own_encoding(tmp_path)
    assert name == "tokenizer.model"
    expected = list(encode("the fox 2023"))

    class Equal:
        """Stands for a slow tokenizer of transformers."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(encode(text))}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [str(i) for i in ids]

    class Wrong(Equal):
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(encode(text.lower()))}

    assert expected
    prove(Equal(), tmp_path)
    with pytest.raises(InputError, match=r"not what its own tokenizer\.model says"):
        prove(Wrong(), tmp_path)


def test_ranks_of_tiktoken_alone_are_refused_with_the_way_out(tmp_path: Path) -> None:
    lines = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "tokenizer.model").write_bytes(lines)
    with pytest.raises(MissingInputError, match=r"convert it once to tokenizer\.json"):
        own_encoding(tmp_path)
    (tmp_path / "tokenizer.model").rename(tmp_path / "qwen.tiktoken")
    with pytest.raises(MissingInputError, match=r"convert it once to tokenizer\.json"):
        own_encoding(tmp_path)


def test_a_folder_whose_files_say_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(MissingInputError, match="save_pretrained"):
        own_encoding(tmp_path)


def test_probes_have_digits_spaces_newlines_and_many_scripts() -> None:
    text = "".join(PROBES)
    assert all(found in text for found in ("650841823", "  ", "\n\n", "\r\n", "\t", "\u0301", "中", "ع", "🏳️‍🌈"))
