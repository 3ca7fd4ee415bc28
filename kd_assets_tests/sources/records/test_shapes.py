"""Which shape a record has, and what is counted of what its document is not made of."""

from __future__ import annotations

from typing import Any

import pytest

from kd_assets.errors import BadRecordError
from kd_assets_tests.sources.records.parsing import WHERE, parsed

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ALL: dict[str, Any] = {
    "completion": "C",
    "prompt": "P",
    "output": "O",
    "instruction": "I",
    "rejected": "R",
    "chosen": "Y",
    "conversations": [{"from": "gpt", "value": "S"}],
    "text": "T",
    "messages": CHAT,
}


def test_of_several_shapes_the_first_of_the_documented_order_is_taken() -> None:
    """messages, text, conversations, preference, instruction, completion."""
    left = dict(ALL)
    assert parsed(left).messages == tuple(CHAT)
    del left["messages"]
    assert parsed(left).text == "T"
    del left["text"]
    assert parsed(left).messages == ({"role": "assistant", "content": "S"},)
    del left["conversations"]
    assert parsed(left, prefer="rejected").text == "PR"
    del left["chosen"], left["rejected"]
    assert parsed(left).messages == ({"role": "user", "content": "I"}, {"role": "assistant", "content": "O"})
    del left["instruction"]
    assert parsed(left).text == "PC"


def test_a_shape_whose_fields_are_null_is_none() -> None:
    assert parsed({"messages": None, "text": None, "instruction": "I", "output": "O"}).messages is not None


@pytest.mark.parametrize(
    ("shape", "made_of"),
    [("text", "T"), ("completion", "PC"), ("conversations", "S"), ("instruction", "I"), ("messages", "q")],
)
def test_an_explicit_shape_is_taken_whatever_else_is_there(shape: str, made_of: str) -> None:
    record = parsed(ALL, shape=shape)
    assert made_of == (record.text if record.messages is None else record.messages[0]["content"])


def test_what_the_source_says_of_a_shape_asks_for_it() -> None:
    assert parsed({"text": "T", "q": "I", "output": "O"}, fields={"instruction": "q"}).messages is not None
    assert parsed(ALL, prefer="chosen").text == "PY"


def test_an_explicit_shape_that_a_record_has_not_is_a_bad_record_that_shows_its_keys() -> None:
    keys = r"\(it has 'instruction', 'answer'\)"
    with pytest.raises(BadRecordError, match=rf"^{WHERE}: 'output' of shape instruction is null .* {keys}.*fields"):
        parsed({"instruction": "I", "answer": "O"}, shape="instruction")


def test_a_record_of_no_shape_shows_its_keys_and_what_to_set() -> None:
    with pytest.raises(
        BadRecordError, match=r"neither 'text' nor 'messages' .*\(it has 'question', 'answer'\).*fields of source 'web'"
    ):
        parsed({"question": "x", "answer": "y"})


def test_a_record_of_a_thousand_keys_shows_a_few() -> None:
    with pytest.raises(BadRecordError) as e:
        parsed({f"{i}" * 100: i for i in range(1000)})
    assert "and 992 more" in str(e.value)
    assert len(str(e.value)) < 1000


def test_everything_that_the_document_is_not_made_of_is_named() -> None:
    record = parsed({**ALL, "url": None, "id": "x"})
    assert set(record.passed_over) == {*ALL, "url"} - {"messages"}
    assert parsed({"messages": CHAT, "text": None}).passed_over == ()


def test_a_field_that_the_source_ignores_is_of_no_shape() -> None:
    record = parsed({"instruction": "I", "input": "N", "output": "O"}, ignore_fields=("input",))
    assert record.messages == ({"role": "user", "content": "I"}, {"role": "assistant", "content": "O"})
    assert record.passed_over == ("input",)
    record = parsed(
        {"conversations": [{"from": "gpt", "value": "S"}], "prompt": "P", "response": "R"},
        ignore_fields=("conversations",),
    )
    assert record.text == "PR"


def test_columns_without_a_value_in_a_row_are_named_too() -> None:
    assert parsed({"text": "x"}, columns=("text", "id", "messages", "url")).passed_over == ("url",)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"a": 1}', "no shape fits"),
        ('{"text": null}', "null"),
        ('{"text": 3}', "not of its shape"),
        (r'{"text": "\udc80"}', "not UTF-8"),
        ('{"text": "x", "id": 1.5}', "bad id"),
        ('{"messages": [{"role": "x", "content": "y"}]}', "unknown role"),
        ('{"messages": [{"role": "user", "tool_calls": [{"name": "f", "arguments": "("}]}]}', "arguments that are not"),
    ],
)
def test_kinds_of_bad_records_are_told_apart(line: str, kind: str) -> None:
    with pytest.raises(BadRecordError) as e:
        parsed(line)
    assert e.value.kind.startswith(kind)


def test_a_file_of_several_is_in_the_name_of_its_documents() -> None:
    record = parsed({"text": "x"}, file_name="a/b.jsonl.gz")
    assert (record.document_id, record.file) == ("web/a/b.jsonl.gz-000000006", "a/b.jsonl.gz")
    assert parsed({"text": "x"}).file == "web.jsonl"
    assert parsed({"text": "x", "id": "y"}, file_name="a/b.jsonl.gz").document_id == "y"


def test_what_control_tokens_are_is_said_of_each_record() -> None:
    assert parsed({"text": "x"}).control_tokens == "tokens"
    assert parsed({"text": "x"}, control_tokens="text").control_tokens == "text"


def test_a_record_without_a_field_that_its_source_names_says_which() -> None:
    with pytest.raises(BadRecordError, match="fields says 'question' for prompt, which is not there: say with fields"):
        parsed({"q": "a", "a": "b"}, fields={"prompt": "question", "completion": "a"})
    with pytest.raises(BadRecordError, match="prefer says 'rejected', which is not there"):
        parsed({"prompt": "a", "chosen": "b"}, prefer="rejected")
