"""ShareGPT's conversations become messages."""

from __future__ import annotations

from typing import Any

import pytest

from kd_assets.errors import BadRecordError
from kd_assets_tests.sources.records.parsing import WHERE, parsed


def turns(*said: tuple[str, str], **beside: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in said], **beside}


def test_from_and_value_become_role_and_content() -> None:
    record = parsed(turns(("system", "Be brief."), ("human", "hi"), ("gpt", "Hello."), id="x"))
    assert record.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello."},
    )
    assert (record.document_id, record.text, record.passed_over) == ("x", None, ())


@pytest.mark.parametrize(
    ("word", "role"),
    [
        *(("human", "user"), ("user", "user"), ("gpt", "assistant"), ("assistant", "assistant"), ("bot", "assistant")),
        *(("chatgpt", "assistant"), ("model", "assistant"), ("system", "system"), ("tool", "tool")),
        *(("function", "tool"), ("observation", "tool")),
    ],
)
def test_each_word_for_a_speaker_is_a_role(word: str, role: str) -> None:
    assert parsed(turns((word, "x"))).messages == ({"role": role, "content": "x"},)
    assert parsed({"conversations": [{"role": word, "content": "x"}]}).messages == ({"role": role, "content": "x"},)


def test_an_unknown_speaker_is_a_bad_record_that_names_the_word_and_the_setting() -> None:
    with pytest.raises(
        BadRecordError, match=rf"^{WHERE}: conversations\[0\]\.from is 'narrator'.*roles of source 'web'"
    ):
        parsed(turns(("narrator", "x")))
    record = parsed(turns(("narrator", "x"), ("human", "y")), roles={"narrator": "system"})
    assert record.messages == ({"role": "system", "content": "x"}, {"role": "user", "content": "y"})


def test_the_system_field_beside_is_the_first_message_and_an_empty_one_is_none() -> None:
    record = parsed(turns(("human", "hi"), system="Be brief."))
    assert record.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"})
    assert parsed(turns(("human", "hi"), system="")).messages == ({"role": "user", "content": "hi"},)


def test_a_function_call_is_a_message_of_tool_calls_and_an_observation_one_of_a_tool() -> None:
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    record = parsed(
        turns(("human", "hi"), ("function_call", call), ("observation", "7"), tools='[{"name": "weather"}]')
    )
    assert record.messages is not None
    assert record.messages[1:] == (
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "content": "7"},
    )
    assert record.tools == ({"name": "weather"},)


def test_several_function_calls_of_one_turn_are_a_list() -> None:
    record = parsed(turns(("function_call", '[{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": {}}]')))
    assert record.messages is not None
    assert [call["function"]["name"] for call in record.messages[0]["tool_calls"]] == ["f", "g"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("weather()", "is text that is not JSON"),
        ('{"arguments": {}}', "has no name of a function"),
        ("[]", "holds no call"),
        (3, "is a number; expected the JSON text"),
    ],
)
def test_a_function_call_that_is_none_is_a_bad_record(value: Any, reason: str) -> None:
    with pytest.raises(BadRecordError, match=rf"conversations\[0\]\.value.*{reason}"):
        parsed({"conversations": [{"from": "function_call", "value": value}]})


def test_further_keys_of_a_turn_are_kept() -> None:
    record = parsed({"conversations": [{"from": "gpt", "value": "x", "weight": 0}]})
    assert record.messages == ({"role": "assistant", "content": "x", "weight": 0},)


def test_messages_may_be_written_as_from_and_value() -> None:
    assert parsed({"messages": [{"from": "human", "value": "x"}]}).messages == ({"role": "user", "content": "x"},)


def test_a_turn_without_a_value_is_a_bad_record() -> None:
    with pytest.raises(BadRecordError, match=r"conversations\[0\]\.value is null"):
        parsed({"conversations": [{"from": "human", "value": None}]})
    with pytest.raises(BadRecordError, match="'conversations' is a string; expected a list"):
        parsed({"conversations": "x"})
