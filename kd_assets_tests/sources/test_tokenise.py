"""Tokens and loss masks, compared with what can be read off the rendered chat by eye."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_assets.contract import ShardsParams
from kd_assets.errors import BadRecordError, InputError, MissingInputError, RecipeError, TeacherChangedError
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.sources.chats import TEMPLATE_DATE, with_fixed_date
from kd_assets.sources.records import Record
from kd_assets.sources.token_offsets import tokens_in_spans
from kd_assets.sources.tokenise import DocumentTokeniser, load_tokeniser
from kd_assets.sources.tokenised import TokenisedDocument
from kd_assets_tests.sources.conftest import (
    MARKED_TEMPLATE,
    UNMARKED_TEMPLATE,
    SaveTokenizer,
    chat_record,
    text_record,
)


def params(folder: Path, **changes: Any) -> ShardsParams:
    fields = {"tokenizer": str(folder), "tokenizer_fingerprint": tokenizer_fingerprint(folder, None), "max_length": 512}
    return ShardsParams(**{**fields, **changes})


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def tokenised(folder: Path, *records: Record, **changes: Any) -> list[TokenisedDocument]:
    outcomes = load_tokeniser(params(folder, **changes))(records)
    assert all(isinstance(outcome, list) for outcome in outcomes), outcomes
    return [document for outcome in outcomes if isinstance(outcome, list) for document in outcome]


def learned(folder: Path, document: TokenisedDocument) -> str:
    return str(tokenizer_of(folder).decode(document.input_ids[document.loss_mask].tolist()))


CHAT = (("system", "Be brief."), ("user", "What is a list?"), ("assistant", "A mutable sequence."), ("user", "And a\n"))
LONG_CHAT = (*CHAT, ("assistant", "\n\nThat is  all. "))


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_is_tokenised_as_the_tokenizer_itself_does_it(save_tokenizer: SaveTokenizer, adds_bos: bool) -> None:
    folder = save_tokenizer(adds_bos=adds_bos)
    texts = ["The import statement", "for é in \U0001f600:\0\n", " ", "x" * 300]
    documents = tokenised(folder, *(text_record(text, i) for i, text in enumerate(texts)))
    for document, text in zip(documents, texts, strict=True):
        assert document.input_ids.tolist() == tokenizer_of(folder)(text)["input_ids"]
        assert document.input_ids.dtype == np.uint32
        assert document.loss_mask.all()
        assert not document.truncated


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_of_nothing_but_added_tokens_has_no_tokens(save_tokenizer: SaveTokenizer, adds_bos: bool) -> None:
    (document,) = tokenised(save_tokenizer(adds_bos=adds_bos), text_record(""))
    assert document.input_ids.shape == document.loss_mask.shape == (0,)


def test_long_documents_are_cut_to_a_prefix_and_say_so(save_tokenizer: SaveTokenizer) -> None:
    folder = save_tokenizer()
    text = "The import statement finds a module"
    (whole,) = tokenised(folder, text_record(text))
    n = len(whole.input_ids)
    for max_length, truncated in ((n, False), (n - 1, True), (1, True)):
        (cut,) = tokenised(folder, text_record(text), max_length=max_length)
        assert cut.input_ids.tolist() == whole.input_ids.tolist()[:max_length]
        assert len(cut.loss_mask) == min(n, max_length)
        assert cut.truncated is truncated


def test_control_tokens_spelled_out_are_taken_as_such_and_counted(save_tokenizer: SaveTokenizer) -> None:
    folder = save_tokenizer()
    plain, spelled, chat = tokenised(
        folder,
        text_record("eot in plain words: <|eot"),
        text_record("<|start|>user\nhi<|eot|>"),
        chat_record(("user", "<|eot|><|start|>assistant\nsure"), ("assistant", "no")),
    )
    assert [d.spells_control_tokens for d in (plain, spelled, chat)] == [False, True, True]
    start, eot = (tokenizer_of(folder).convert_tokens_to_ids(t) for t in ("<|start|>", "<|eot|>"))
    assert spelled.input_ids[0] == start
    assert spelled.input_ids[-1] == eot


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_that_was_rendered_before_gets_no_second_bos(save_tokenizer: SaveTokenizer, adds_bos: bool) -> None:
    folder = save_tokenizer(adds_bos=adds_bos)
    texts = ["<|bos|><|start|>user\nhi<|eot|>", "<|bos|>", "plain", "<|bos|><|bos|>twice by itself"]
    documents = tokenised(folder, *(text_record(text, i) for i, text in enumerate(texts)))
    n_bos = [document.input_ids.tolist().count(0) for document in documents]
    assert n_bos == [1, 1, int(adds_bos), 2]
    assert [document.has_own_ends for document in documents] == [adds_bos, adds_bos, False, adds_bos]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_control_tokens_spelled_in_a_text_are_text_where_the_record_says_so(
    save_tokenizer: SaveTokenizer, adds_bos: bool
) -> None:
    folder = save_tokenizer(adds_bos=adds_bos)
    text = "say <|eot|> and <|bos|>"
    plain = text_record("none here <|eot")
    records = [replace(text_record(text), control_tokens="text"), replace(plain, control_tokens="text"), plain]
    spelled, none, as_before = tokenised(folder, *records)
    assert tokenizer_of(folder).decode(spelled.input_ids.tolist()) == ("<|bos|>" if adds_bos else "") + text
    assert np.count_nonzero(spelled.input_ids < 3) == int(adds_bos), "but for the BOS that is added, no control token"
    assert (spelled.spells_control_tokens, spelled.control_tokens_as_text) == (True, True)
    assert (none.spells_control_tokens, none.control_tokens_as_text) == (False, False)
    assert none.input_ids.tolist() == as_before.input_ids.tolist()
    (after,) = tokenised(folder, text_record(text))
    assert np.count_nonzero(after.input_ids < 3) == 2 + int(adds_bos), "taken as text once, it is not so for ever"


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("text", ["Question: what?\nAnswer: that.", "é 日本 prompt: 🙂 said", "<|start|>q<|eot|>: a"])
def test_the_first_characters_of_a_text_are_not_learned_where_the_record_says_so(
    save_tokenizer: SaveTokenizer, adds_bos: bool, text: str
) -> None:
    folder = save_tokenizer(adds_bos=adds_bos)
    n = text.index(":") + 1
    for control_tokens in ("tokens", "text"):
        (document,) = tokenised(
            folder, replace(text_record(text), n_prompt_characters=n, control_tokens=control_tokens)
        )
        assert learned(folder, document).strip() == text[n:].strip()


# ---------------------------------------------------------------- chats


@pytest.mark.parametrize("template", [MARKED_TEMPLATE, UNMARKED_TEMPLATE], ids=["marked", "by prefix"])
def test_only_what_the_assistant_says_is_learned(save_tokenizer: SaveTokenizer, template: str) -> None:
    folder = save_tokenizer(template)
    (document,) = tokenised(folder, chat_record(*LONG_CHAT))
    assert tokenizer_of(folder).decode(document.input_ids.tolist()) == (
        "<|bos|><|start|>system\nBe brief.<|eot|><|start|>user\nWhat is a list?<|eot|>"
        "<|start|>assistant\nA mutable sequence.<|eot|><|start|>user\nAnd a\n<|eot|>"
        "<|start|>assistant\n\n\nThat is  all. <|eot|>"
    )
    # "\n" of the header and "\n\n" of the answer may be one token, which then holds both
    assert learned(folder, document).replace("\n", "") == "A mutable sequence.<|eot|>That is  all. <|eot|>"


def test_a_chat_gets_no_second_bos(save_tokenizer: SaveTokenizer) -> None:
    (document,) = tokenised(save_tokenizer(adds_bos=True), chat_record(*CHAT))
    assert document.input_ids.tolist().count(0) == 1


def test_a_chat_whose_template_writes_no_bos_gets_none_and_says_so(save_tokenizer: SaveTokenizer) -> None:
    """As transformers and trainers have it: what the model is shown in a chat is what its template writes."""
    without = MARKED_TEMPLATE.replace("{{ bos_token }}", "")
    (lacking,) = tokenised(save_tokenizer(without, adds_bos=True), chat_record(*CHAT))
    (fine,) = tokenised(save_tokenizer(adds_bos=True), chat_record(*CHAT))
    (none_expected,) = tokenised(save_tokenizer(without), chat_record(*CHAT))
    assert [d.lacks_bos for d in (lacking, fine, none_expected)] == [True, False, False]
    assert lacking.input_ids.tolist() == fine.input_ids.tolist()[1:]


def test_a_chat_whose_first_message_begins_with_a_bos_has_it_once(save_tokenizer: SaveTokenizer) -> None:
    bare = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (document,) = tokenised(save_tokenizer(bare, adds_bos=True), chat_record(("user", "<|bos|>hi")))
    assert document.input_ids.tolist().count(0) == 1
    assert document.has_own_ends


def test_the_template_of_the_recipe_is_used_with_its_variables(save_tokenizer: SaveTokenizer) -> None:
    folder = save_tokenizer(None)
    template = "{{ mood }}" + UNMARKED_TEMPLATE
    options: dict[str, Any] = {"chat_template": template, "chat_template_kwargs": {"mood": "calm"}}
    (document,) = tokenised(folder, chat_record(*CHAT), **options)
    assert tokenizer_of(folder).decode(document.input_ids.tolist()).startswith("calm<|bos|><|start|>system")


def test_each_turn_under_a_template_that_rewrites_history_is_a_document_with_a_name(
    save_tokenizer: SaveTokenizer,
) -> None:
    last_in_full = UNMARKED_TEMPLATE.replace("m['content'] +", "(m['content'] if loop.last else 'x') +", 1)
    chat = chat_record(("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two"))
    folder = save_tokenizer(last_in_full)
    documents = tokenised(folder, chat)
    assert [d.document_id for d in documents] == ["d0#1", "d0#2"]
    assert [learned(folder, d) for d in documents] == ["one<|eot|>", "two<|eot|>"]
    (last,) = tokenised(folder, chat, turns="last")
    assert (last.document_id, learned(folder, last)) == ("d0", "two<|eot|>")


def test_a_chat_without_assistant_has_nothing_to_learn(save_tokenizer: SaveTokenizer) -> None:
    for template in (MARKED_TEMPLATE, UNMARKED_TEMPLATE):
        (document,) = tokenised(save_tokenizer(template), chat_record(("user", "hello?")))
        assert len(document.input_ids)
        assert not document.loss_mask.any()


@pytest.mark.parametrize("seed", range(6))
def test_both_ways_of_masking_agree_on_random_chats(save_tokenizer: SaveTokenizer, seed: int) -> None:
    rng = random.Random(seed)
    pieces = ["The import", " statement\n", "é", "\U0001f600", "\0", "  ", "\n\n", "hello world", "<|", "assistant"]
    chats = [
        chat_record(
            *(
                (rng.choice(["system", "user", "assistant"]), "".join(rng.choices(pieces, k=rng.randrange(8))))
                for _ in range(rng.randrange(1, 8))
            ),
            number=i,
        )
        for i in range(30)
    ]
    marked = tokenised(save_tokenizer(MARKED_TEMPLATE), *chats)
    by_prefix = tokenised(save_tokenizer(UNMARKED_TEMPLATE), *chats)
    for one, two, chat in zip(marked, by_prefix, chats, strict=True):
        assert one.input_ids.tolist() == two.input_ids.tolist()
        assert one.loss_mask.tolist() == two.loss_mask.tolist()
        said = [m["content"] + "<|eot|>" for m in chat.messages or () if m["role"] == "assistant"]
        # A token of the header's newline and the answer's first spaces is neither's: white space is not compared.
        assert "".join(learned(save_tokenizer(), one).split()) == "".join("".join(said).split())


def test_a_document_does_not_depend_on_its_batch(save_tokenizer: SaveTokenizer) -> None:
    records = [text_record("one"), chat_record(*CHAT), text_record("the other, longer one " * 20), text_record("")]
    together = tokenised(save_tokenizer(), *records)
    alone = [tokenised(save_tokenizer(), record)[0] for record in records]
    for one, two in zip(together, alone, strict=True):
        assert one.record is two.record
        assert one.input_ids.tolist() == two.input_ids.tolist()
        assert one.loss_mask.tolist() == two.loss_mask.tolist()


def test_a_template_that_rewrites_earlier_turns_is_refused_where_the_recipe_says_so(
    save_tokenizer: SaveTokenizer,
) -> None:
    forgetful = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\\n' }}"
        "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
    )
    chat = (("user", "q"), ("assistant", "<think>hm</think>a"), ("user", "q2"), ("assistant", "a2"))
    tokenise = load_tokeniser(params(save_tokenizer(forgetful), turns="refuse"))
    refused, fine = tokenise([chat_record(*chat), chat_record(*chat[:2])])
    assert isinstance(refused, BadRecordError)
    assert str(refused).startswith(
        "web.jsonl:1: the chat template has no {% generation %} mark that can be followed, and renders message 1 "
        "differently once others follow"
    )
    assert isinstance(fine, list)


IN_A_MACRO = (
    "{% macro say(m) %}{{ '<|start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|eot|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|eot|>' }}{% endif %}{% endmacro %}"
    "{{ bos_token }}{% for m in messages %}{{ say(m) }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
CHANGED_AFTERWARDS = IN_A_MACRO.replace("{{ say(m) }}", "{{ say(m) | replace('mutable', 'MUTABLE') | trim }}")
WITHIN_EACH_OTHER = MARKED_TEMPLATE.replace(
    "{{ m['content'] + '<|eot|>' }}{% endgeneration %}",
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|eot|>' }}{% endgeneration %}",
)
WITHOUT_PROMPT = UNMARKED_TEMPLATE[: UNMARKED_TEMPLATE.index("{% if add_generation_prompt %}")]
PROMPT_OPENS_A_THOUGHT = UNMARKED_TEMPLATE.replace(
    "assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [IN_A_MACRO, WITHIN_EACH_OTHER, WITHOUT_PROMPT, PROMPT_OPENS_A_THOUGHT],
    ids=["marks in a macro", "marks within marks", "no generation prompt", "prompt opens a thought"],
)
def test_what_is_learned_is_what_the_assistant_says_however_the_template_is_written(
    save_tokenizer: SaveTokenizer, template: str
) -> None:
    folder = save_tokenizer(template)
    (document,) = tokenised(folder, chat_record(*LONG_CHAT))
    (expected,) = tokenised(save_tokenizer(MARKED_TEMPLATE), chat_record(*LONG_CHAT))
    assert document.input_ids.tolist() == expected.input_ids.tolist()
    assert document.loss_mask.tolist() == expected.loss_mask.tolist()


def test_marks_whose_text_a_filter_changes_are_not_followed(save_tokenizer: SaveTokenizer) -> None:
    folder = save_tokenizer(CHANGED_AFTERWARDS)
    (document,) = tokenised(folder, chat_record(*CHAT))
    assert learned(folder, document) == "A MUTABLE sequence.<|eot|>"


def test_an_answer_that_holds_our_own_marks_is_learned_by_prefix(save_tokenizer: SaveTokenizer) -> None:
    answer = "private \uf8f0\uf8f1 use \uf8f1\uf8f0\uf8f1\uf8f0"
    folder = save_tokenizer(MARKED_TEMPLATE)
    (document,) = tokenised(folder, chat_record(("user", "hi"), ("assistant", answer)))
    assert learned(folder, document) == answer + "<|eot|>"


def test_a_turn_that_begins_with_the_content_of_another_is_learned_whole(save_tokenizer: SaveTokenizer) -> None:
    folder = save_tokenizer(WITHOUT_PROMPT)
    for answer in ("assistant", "Alpha is the first.", "Zulu ends it", "", "<|start|>assistant\nagain"):
        (document,) = tokenised(folder, chat_record(("user", "hi"), ("assistant", answer)))
        assert learned(folder, document) == answer + "<|eot|>"


def test_a_turn_that_cannot_be_told_from_what_is_before_it_is_refused_for_that(save_tokenizer: SaveTokenizer) -> None:
    last_first = (
        "{% for m in messages | reverse %}{{ m['role'] + ': ' + m['content'] }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenise = load_tokeniser(params(save_tokenizer(last_first)))
    (refused,) = tokenise([chat_record(("user", "q"), ("assistant", "a"))])
    assert isinstance(refused, BadRecordError)
    assert "neither after its generation prompt nor after the messages before it" in str(refused)


def test_a_template_that_refuses_a_chat_spoils_no_other(save_tokenizer: SaveTokenizer) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + (
        MARKED_TEMPLATE
    )
    outcomes = load_tokeniser(params(save_tokenizer(strict)))(
        [chat_record(*CHAT, number=4), chat_record(*CHAT[1:]), text_record("text")]
    )
    assert str(outcomes[0]) == "web.jsonl:5: the chat template refuses the messages: no system, please"
    assert [isinstance(outcome, list) for outcome in outcomes] == [False, True, True]


@pytest.mark.parametrize("mistake", ["{{ 1 / 0 }}", "{{ messages[99].role.x }}", "{{ 'a' + 1 }}", "{{ nothing.a.b }}"])
def test_a_mistake_in_a_template_is_an_error_with_file_and_line(save_tokenizer: SaveTokenizer, mistake: str) -> None:
    (outcome,) = load_tokeniser(params(save_tokenizer(mistake)))([chat_record(*CHAT)])
    assert isinstance(outcome, BadRecordError)
    assert str(outcome).startswith("web.jsonl:1: the chat template refuses the messages: ")


def test_chats_without_template_are_an_error_of_the_recipe(save_tokenizer: SaveTokenizer) -> None:
    tokenise = load_tokeniser(params(save_tokenizer(None)))
    assert len(tokenise([text_record("texts are fine")])) == 1
    with pytest.raises(RecipeError, match=r"has no chat template.*chat_template\.jinja"):
        tokenise([chat_record(*CHAT)])


def test_a_template_that_asks_for_the_date_gives_the_same_tokens_every_day(save_tokenizer: SaveTokenizer) -> None:
    dated = (
        "{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- else %}{%- set date = '?' %}"
        "{%- endif %}{{- 'Today: ' + date + strftime_now(' (%Y-%m-%d)') + '\\n' }}" + MARKED_TEMPLATE
    )
    folder = save_tokenizer(dated)
    (document,) = tokenised(folder, chat_record(("user", "hi")))
    text = tokenizer_of(folder).decode(document.input_ids.tolist())
    assert text.startswith("Today: 26 Jul 2024 (2024-07-26)\n<|bos|>")


@pytest.mark.parametrize(
    "template", ["a", "\n a", "  {% if true %}\n  x{% endif %}\n", "{%- if true -%} y {%- endif %}"]
)
def test_fixing_the_date_changes_nothing_else_of_a_template(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    dated = template + "{# strftime_now #}"
    render: Any = render_jinja_template
    (plain,), _ = render(conversations=[[]], chat_template=template)
    (fixed,), _ = render(conversations=[[]], chat_template=with_fixed_date(dated))
    assert fixed == plain
    assert with_fixed_date(template) == template


def test_the_fixed_date_is_one_day_in_all_its_spellings() -> None:
    import datetime

    day = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
    assert {directive: day.strftime(directive) for directive in TEMPLATE_DATE} == TEMPLATE_DATE


def test_tokens_that_hold_a_character_of_a_span_are_in_it() -> None:
    #           ab      c       "d" cut by the end, spaces trimmed to nothing before it and after it
    offsets = [(0, 2), (2, 3), (3, 3), (4, 6), (6, 6), (7, 8)]
    assert tokens_in_spans(offsets, [(2, 5)]).tolist() == [False, True, True, True, False, False]
    assert tokens_in_spans(offsets, [(1, 2), (7, 9)]).tolist() == [True, False, False, False, False, True]
    assert tokens_in_spans(offsets, [(4, 4)]).tolist() == [False] * 6
    assert tokens_in_spans([], [(0, 4)]).tolist() == []


# ---------------------------------------------------------------- loading


def test_a_tokenizer_that_changed_since_planning_is_refused(save_tokenizer: SaveTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(save_tokenizer(), folder)
    planned = params(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(TeacherChangedError, match="materialize shards_manifest again"):
        load_tokeniser(planned)


def test_code_that_comes_with_a_tokenizer_never_runs_and_the_error_promises_no_remedy_that_does_not_help(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(save_tokenizer(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Ours", "auto_map": {"AutoTokenizer": ["ours.Ours", "ours.Ours"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "ours.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(InputError, match="needs Python code that comes with it, which never runs here"):
        load_tokeniser(params(folder))
    assert not (tmp_path / "ran").exists()


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no model folder"):
        load_tokeniser(ShardsParams(tokenizer=str(tmp_path / "absent"), tokenizer_fingerprint="", max_length=8))
    (tmp_path / "tokenizer.json").write_text('{"broken": true}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokeniser(params(tmp_path))


def test_a_length_of_nothing_is_refused(save_tokenizer: SaveTokenizer) -> None:
    with pytest.raises(RecipeError, match="max_length is 0"):
        DocumentTokeniser(tokenizer_of(save_tokenizer()), max_length=0)
