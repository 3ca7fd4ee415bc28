"""Which ids a tokenizer has, by its files alone: as the tokenizer's own library says it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd_assets.contract import TokenIds
from kd_assets.errors import InputError, MissingInputError, RecipeError
from kd_assets.model_files.vocabulary import shared_token_ids, teacher_token_ids, token_table

TEXT = "the quick brown fox jumps over a lazy dog and then it sleeps under an old tree"
WORDS = TEXT.split(" ")


def byte_level(folder: Path, *, size: int = 300, added: tuple[str, ...] = ("<|pad|>",)) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def changed(folder: Path, change: Any, name: str = "tokenizer.json") -> Path:
    raw = json.loads((folder / name).read_text())
    change(raw)
    (folder / name).write_text(json.dumps(raw))
    return folder


def of_library(folder: Path) -> dict[int, str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordlevel", "wordpiece"])
def test_the_tokens_of_tokenizer_json_are_those_that_its_library_has(tmp_path: Path, kind: str) -> None:
    if kind == "bpe":
        byte_level(tmp_path)
    else:
        by_kind: dict[str, tuple[Any, Any]] = {
            "unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"])),
            "wordlevel": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(special_tokens=["<unk>"])),
            "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(special_tokens=["<unk>"])),
        }
        model, trainer = by_kind[kind]
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
        tokenizer.add_tokens(["<|extra|>"])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert token_table(tmp_path) == of_library(tmp_path)
    assert token_table(tmp_path / "tokenizer.json") == of_library(tmp_path)


def test_a_vocabulary_with_holes_has_them(tmp_path: Path) -> None:
    def move(raw: dict[str, Any]) -> None:
        vocabulary = raw["model"]["vocab"]
        vocabulary[next(token for token, token_id in vocabulary.items() if token_id == 9)] = 500

    folder = changed(byte_level(tmp_path), move)
    assert token_table(folder) == of_library(folder)
    assert teacher_token_ids(folder) == TokenIds.of(
        [i for i in range(300) if i != 9 and i in of_library(folder)] + [500]
    )


def in_config(**settings: Any) -> Any:
    return lambda folder: changed(folder, lambda raw: raw.update(settings), "tokenizer_config.json")


def beside(name: str, **content: Any) -> Any:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def in_tokenizer(**ids: int) -> Any:
    def renumber(raw: dict[str, Any]) -> None:
        for token in raw["added_tokens"]:
            token["id"] = ids.get(token["content"].strip("<|>"), token["id"])

    return lambda folder: changed(folder, renumber)


def token(content: str) -> dict[str, Any]:
    return {"content": content, "special": True}


@pytest.mark.parametrize(
    "changes",
    [
        [in_tokenizer(pad=400)],
        [in_tokenizer(pad=400), in_config(pad_token="<|pad|>")],
        [in_config(added_tokens_decoder={"350": token("<b>"), "299": token("<c>")})],
        [in_config(added_tokens_decoder={"1000": token("<b>"), "20": token("<c>")}, mask_token="<mask>")],
        [beside("added_tokens.json", **{"<later>": 298, "<last>": 305})],
        [beside("special_tokens_map.json", pad_token="<map>", cls_token=token("<cls>"))],
        [in_config(pad_token="<new>", additional_special_tokens=["<n1>", "<n2>"], sep_token="<s>")],
        [in_config(extra_special_tokens={"image_token": "<img>"}, bos_token="<bos>")],
        [in_config(extra_special_tokens=["<e1>", "<|pad|>"], unk_token="<unk>", image_token="<img>")],
    ],
)
def test_added_tokens_have_the_ids_that_their_library_gives_them(tmp_path: Path, changes: list[Any]) -> None:
    """Whatever their files say: those that leave ids free are numbered without."""
    folder = byte_level(tmp_path)
    for change in changes:
        change(folder)
    assert token_table(folder) == of_library(folder)


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
@pytest.mark.parametrize("added", [["<eos>", "<pad>"], ["<pad>", "<eos>", "<x>"], ["<x>", "<pad>"]])
def test_an_added_token_of_the_vocabulary_moves_no_other(tmp_path: Path, kind: str, added: list[str]) -> None:
    """A vocabulary with holes below a token that is among the added ones."""
    from tokenizers import Tokenizer, models

    vocabulary = {"a": 0, "b": 1, "<eos>": 9}
    model = models.WordLevel(vocabulary, "a") if kind == "WordLevel" else models.BPE(vocabulary, [])
    tokenizer = Tokenizer(model)
    tokenizer.add_tokens(added)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_table(tmp_path) == {token_id: token for token, token_id in tokenizer.get_vocab().items()}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer.json", "added_tokens", 5),
        ("tokenizer_config.json", "additional_special_tokens", 5),
        ("tokenizer_config.json", "additional_special_tokens", "<p>"),
        ("tokenizer_config.json", "extra_special_tokens", "<p>"),
    ],
)
def test_lists_of_tokens_that_are_none_are_refused_by_name(tmp_path: Path, name: str, key: str, value: Any) -> None:
    folder = byte_level(tmp_path)
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | {key: value}))
    with pytest.raises(InputError, match=f"{name} has {key} that are no list"):
        token_table(folder)


def test_a_sentencepiece_model_has_its_pieces_in_the_order_of_their_ids(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 50),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=36,
        user_defined_symbols=["[INST]"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert token_table(tmp_path) == {i: model.id_to_piece(i) for i in range(model.get_piece_size())}


def test_tekken_has_its_control_tokens_first_and_only_so_many_ranks_as_it_says(tmp_path: Path) -> None:
    raw = {
        "config": {"default_num_special_tokens": 3, "default_vocab_size": 5},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(b).decode()} for i, b in enumerate((b" a", b"\n", b"x"))],
        "special_tokens": [{"rank": 1, "token_str": "<s>"}],
    }
    (tmp_path / "tekken.json").write_text(json.dumps(raw))
    assert token_table(tmp_path) == {0: None, 1: "<s>", 2: None, 3: "Ġa", 4: "Ċ"}


def test_what_does_not_say_which_ids_it_has_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"tokenizer\.json, tekken\.json, tokenizer\.model"):
        token_table(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(MissingInputError, match="ranks of a tiktoken"):
        token_table(tmp_path)
    with pytest.raises(MissingInputError):
        token_table(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"vocab": 3}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "x"}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 3}]}'),
        ("tekken.json", b'{"config": {}}'),
        ("tokenizer.model", b"\xff\xff\xff"),
        ("tokenizer.model", b"\x0a\x7f"),
        ("tokenizer.model", b""),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        token_table(tmp_path)


def test_a_student_with_fewer_tokens_or_others_behind_has_the_ids_of_both(tmp_path: Path) -> None:
    teacher = byte_level(tmp_path / "teacher", added=("<|pad|>", "<|tool|>"))
    student = byte_level(tmp_path / "student", added=("<|pad|>",))
    n = len(token_table(student))
    assert shared_token_ids(teacher, student) == TokenIds.below(n)
    assert shared_token_ids(student, teacher) == TokenIds.below(n)
    assert shared_token_ids(teacher, teacher / "tokenizer.json") == TokenIds.below(n + 1)


def test_an_id_of_two_tokens_is_a_mismatched_vocabulary_with_examples(tmp_path: Path) -> None:
    teacher = byte_level(tmp_path / "teacher", added=("<|pad|>", "<|tool|>"))
    student = byte_level(tmp_path / "student", added=("<|pad|>", "<|call|>"))
    last = max(token_table(student))
    with pytest.raises(RecipeError) as e:
        shared_token_ids(teacher, student)
    assert str(e.value).startswith("mismatched vocabularies: 1 of the ")
    assert f"{last} is '<|tool|>' to the teacher and '<|call|>' to the student" in str(e.value)


def test_control_tokens_that_no_file_names_are_compared_with_none(tmp_path: Path) -> None:
    teacher = byte_level(tmp_path / "teacher", added=())
    tokens = token_table(teacher)
    raw = {
        "config": {"default_num_special_tokens": 2, "default_vocab_size": 3},
        "vocab": [{"rank": 0, "token_bytes": base64.b64encode(b"!").decode()}],
    }
    (tmp_path / "tekken.json").write_text(json.dumps(raw))
    assert tokens[2] == "!"
    assert shared_token_ids(teacher, tmp_path / "tekken.json") == TokenIds.below(3)
